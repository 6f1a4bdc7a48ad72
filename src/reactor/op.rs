//! Operation slots: where the result of an operation waits for the task that started it.

use std::any::Any;
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use slab::Slab;

use super::Reactor;

const CLIENT: u64 = 1 << 63;
const WATCH: u64 = 1 << 62;
const KIND: u64 = CLIENT | WATCH;

/// Names an operation in the ring's completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(u64);

impl Token {
    /// The completion is of no interest.
    pub(super) const IGNORE: Self = Self(u64::MAX);
    /// The reactor's own eventfd.
    pub(super) const WAKE: Self = Self(WATCH | (WATCH - 1));

    /// A token of the data path: its completion is handed to [`Reactor::next_completion`].
    /// The two highest bits of `value` are lost.
    #[must_use]
    pub fn client(value: u64) -> Self {
        Self(CLIENT | (value & !KIND))
    }

    pub(super) fn watch(value: u64) -> Self {
        Self(WATCH | (value & !KIND))
    }

    fn op(index: usize) -> Self {
        Self(index as u64)
    }

    pub(super) fn raw(self) -> u64 {
        self.0
    }

    pub(super) fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// Whether it is one of the data path.
    #[must_use]
    pub fn is_client(self) -> bool {
        self.0 & KIND == CLIENT
    }

    pub(super) fn is_watch(self) -> bool {
        self.0 & KIND == WATCH
    }

    /// The value without the kind.
    #[must_use]
    pub fn value(self) -> u64 {
        self.0 & !KIND
    }
}

enum Slot {
    /// Started, or about to be: nobody waits yet.
    Reserved,
    Waiting(Waker),
    Done(io::Result<u32>),
    /// Nobody waits any more. What the operation uses goes with its end.
    Abandoned(Box<dyn Any>),
}

/// What is to be done outside of the slots when an operation has ended.
pub(super) enum Ended {
    Nothing,
    Wake(Waker),
    Free(Box<dyn Any>),
}

impl Ended {
    pub(super) fn finish(self) {
        match self {
            Self::Nothing => {}
            Self::Wake(waker) => waker.wake(),
            // Whatever it is, it may start operations of its own.
            Self::Free(kept) => drop(kept),
        }
    }
}

/// All operation slots and watches of a reactor.
#[derive(Default)]
pub(crate) struct OpSlots {
    slots: Slab<Slot>,
    abandoned: usize,
    watches: HashMap<u64, RawFd>,
}

impl OpSlots {
    pub(super) fn reserve(&mut self) -> Token {
        Token::op(self.slots.insert(Slot::Reserved))
    }

    /// Stores a result for the task that waits for it.
    pub(super) fn complete(&mut self, token: Token, result: io::Result<u32>) -> Ended {
        let index = token.value() as usize;
        let Some(slot) = self.slots.get_mut(index) else {
            return Ended::Nothing;
        };
        match std::mem::replace(slot, Slot::Done(result)) {
            Slot::Waiting(waker) => Ended::Wake(waker),
            Slot::Reserved | Slot::Done(_) => Ended::Nothing,
            Slot::Abandoned(kept) => {
                self.slots.remove(index);
                self.abandoned -= 1;
                Ended::Free(kept)
            }
        }
    }

    /// How many operations go on that nobody waits for.
    pub(super) fn abandoned(&self) -> usize {
        self.abandoned
    }

    /// Leaves what such operations use where it is for good, since nobody will know when they end.
    pub(super) fn leak(&mut self) {
        for (_, slot) in std::mem::take(&mut self.slots) {
            if let Slot::Abandoned(kept) = slot {
                std::mem::forget(kept);
            }
        }
    }

    fn poll(&mut self, token: Token, waker: &Waker) -> Poll<io::Result<u32>> {
        let Some(slot) = self.slots.get_mut(token.value() as usize) else {
            return Poll::Ready(Err(io::Error::other("operation polled after its end")));
        };
        match slot {
            Slot::Done(result) => {
                let result = std::mem::replace(result, Ok(0));
                Poll::Ready(result)
            }
            other => {
                *other = Slot::Waiting(waker.clone());
                Poll::Pending
            }
        }
    }

    fn is_done(&self, token: Token) -> bool {
        matches!(
            self.slots.get(token.value() as usize),
            Some(Slot::Done(_)) | None
        )
    }

    fn release(&mut self, token: Token) {
        self.slots.try_remove(token.value() as usize);
    }

    fn abandon(&mut self, token: Token, kept: Box<dyn Any>) {
        if let Some(slot) = self.slots.get_mut(token.value() as usize) {
            *slot = Slot::Abandoned(kept);
            self.abandoned += 1;
        }
    }

    pub(super) fn remember_watch(&mut self, token: Token, fd: RawFd) {
        self.watches.insert(token.raw(), fd);
    }

    pub(super) fn forget_watch(&mut self, token: Token) {
        self.watches.remove(&token.raw());
    }

    pub(super) fn watched(&self, token: Token) -> Option<RawFd> {
        self.watches.get(&token.raw()).copied()
    }
}

/// A reserved slot, what its operation uses, and after that was started the future of its result.
///
/// Dropped while the operation is in flight, it leaves `K` in the slot, until the operation has
/// ended: the kernel or another thread goes on with memory that `K` owns (not with `K` itself, which
/// moves).
pub struct OpGuard<K: 'static> {
    reactor: Reactor,
    token: Token,
    started: bool,
    kept: Option<K>,
}

impl<K> std::fmt::Debug for OpGuard<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OpGuard({:?})", self.token)
    }
}

impl<K> OpGuard<K> {
    pub(super) fn new(reactor: Reactor, token: Token, kept: K) -> Self {
        Self {
            reactor,
            token,
            started: false,
            kept: Some(kept),
        }
    }

    /// The token to start the operation with.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    /// What the operation uses.
    #[must_use]
    pub fn kept(&self) -> Option<&K> {
        self.kept.as_ref()
    }

    /// Gives back what the operation used. `None`: it is still in flight.
    #[must_use]
    pub fn into_kept(mut self) -> Option<K> {
        self.kept.take_if(|_| !self.started)
    }

    /// Says that the operation has been started: from now on it uses what is kept.
    pub fn mark_started(&mut self) {
        self.started = true;
    }
}

impl<K: Unpin> Future for OpGuard<K> {
    type Output = io::Result<u32>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let polled = this
            .reactor
            .with_ops(|ops| ops.poll(this.token, context.waker()));
        if polled.is_ready() {
            this.started = false;
        }
        polled
    }
}

impl<K> Drop for OpGuard<K> {
    fn drop(&mut self) {
        let in_flight = self.started && !self.reactor.with_ops(|ops| ops.is_done(self.token));
        let Some(kept) = self.kept.take_if(|_| in_flight) else {
            return self.reactor.with_ops(|ops| ops.release(self.token));
        };
        // What is only queued names its file by a number, which may soon be another's.
        self.reactor.submit();
        let kept = Box::new(kept);
        self.reactor.with_ops(|ops| ops.abandon(self.token, kept));
    }
}
