//! Operation slots: where the result of an operation waits for the task that started it.

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

    pub(super) fn is_client(self) -> bool {
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

#[derive(Debug)]
enum Slot {
    /// Started, or about to be: nobody waits yet.
    Reserved,
    Waiting(Waker),
    Done(io::Result<u32>),
}

/// All operation slots and watches of a reactor.
#[derive(Debug, Default)]
pub(crate) struct OpSlots {
    slots: Slab<Slot>,
    watches: HashMap<u64, RawFd>,
}

impl OpSlots {
    pub(super) fn reserve(&mut self) -> Token {
        Token::op(self.slots.insert(Slot::Reserved))
    }

    /// Stores a result; returns the waker of whoever waits for it.
    pub(super) fn complete(&mut self, token: Token, result: io::Result<u32>) -> Option<Waker> {
        let slot = self.slots.get_mut(token.value() as usize)?;
        match std::mem::replace(slot, Slot::Done(result)) {
            Slot::Waiting(waker) => Some(waker),
            Slot::Reserved | Slot::Done(_) => None,
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

/// A reserved slot, and after the operation was started the future of its result.
///
/// Dropping it while the operation is in flight blocks until the kernel is done with the
/// operation's memory: memory declared before the guard may therefore be lent to the kernel.
#[derive(Debug)]
#[must_use = "the operation is waited for when this is dropped"]
pub struct OpGuard {
    reactor: Reactor,
    token: Token,
    started: bool,
}

impl OpGuard {
    pub(super) fn new(reactor: Reactor, token: Token) -> Self {
        Self {
            reactor,
            token,
            started: false,
        }
    }

    /// The token to start the operation with.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    /// The reactor that the slot belongs to.
    #[must_use]
    pub fn reactor(&self) -> &Reactor {
        &self.reactor
    }

    /// Says that the operation has been started: from now on it must be waited for.
    pub fn mark_started(&mut self) {
        self.started = true;
    }
}

impl Future for OpGuard {
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

impl Drop for OpGuard {
    fn drop(&mut self) {
        while self.started && !self.reactor.with_ops(|ops| ops.is_done(self.token)) {
            // Only completions are collected: running tasks from inside a task's drop would
            // poll them out of turn.
            self.reactor.wait(None);
            self.reactor.take_completions();
        }
        self.reactor.with_ops(|ops| ops.release(self.token));
    }
}
