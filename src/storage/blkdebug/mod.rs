//! Storage whose operations fail as rules say: QEMU's `blkdebug`.
//!
//! It passes operations on to another storage. Before, each one happens as an event, and is checked
//! against the [`rules`]. An operation that fails by a rule is not passed on: nothing has been
//! written, or made stable, and what it was to read is not there.
//!
//! Rules count operations, so none may be tried twice unseen. The data path tries an operation that
//! has failed once more, by a task; here its first try is told to be made again, and only the task
//! comes to the rules.
//!
//! A failure of a sync counts as one of the file: it stays as a real one does ([`Syncs`]).

mod events;
pub mod rules;

use std::any::Any;
use std::io;
use std::iter;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::{
    Access, Answer, Identity, IoBufs, Limits, Op, Purpose, Storage, Submission, Syncs, Target,
    Watches, at_once, later,
};
use crate::reactor::{Reactor, Token};
use rules::{Engine, Event, Injected, IoType, Rules};

/// What a [`Blkdebug`] is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// What fails, and when.
    pub rules: Rules,
    /// What offsets and lengths are to be multiples of, in bytes.
    pub align: Option<u64>,
    /// Bytes that one operation moves at most.
    pub max_transfer: Option<u64>,
}

/// Storage over another one that fails by rules.
#[derive(Debug)]
pub struct Blkdebug {
    inner: Arc<dyn Storage>,
    /// Those of the file: what is lost there is lost for all who have it.
    syncs: Arc<Syncs>,
    shared: Arc<Shared>,
}

/// What storages over descriptors of one file have in common.
#[derive(Debug)]
struct Shared {
    /// Held to decide, and not while an operation is under way.
    engine: Mutex<Engine>,
    align: u64,
    max_transfer: Option<u64>,
    /// The end of a write is an event that a rule is about.
    tells_done: bool,
    watches: Watches,
}

/// An operation that is passed on by a task.
enum Passed {
    Read(u64),
    Write(u64),
    Zero { offset: u64, len: u64, unmap: bool },
}

impl Blkdebug {
    /// Over `inner`, which is opened just now.
    #[must_use]
    pub fn new(inner: Arc<dyn Storage>, settings: &Settings) -> Self {
        let rules = &settings.rules;
        let events = rules.inject.iter().map(|rule| rule.event);
        let mut events = events.chain(rules.set_state.iter().map(|rule| rule.event));
        let shared = Shared {
            tells_done: events.any(|event| event == Event::PwritevDone),
            engine: Mutex::new(Engine::new(rules)),
            align: settings.align.unwrap_or(1),
            max_transfer: settings.max_transfer,
            watches: Watches::default(),
        };
        Self::sharing(inner, Arc::new(shared))
    }

    fn sharing(inner: Arc<dyn Storage>, shared: Arc<Shared>) -> Self {
        Self {
            syncs: Syncs::of(&inner),
            inner,
            shared,
        }
    }

    /// How much of a transfer of `len` bytes is made at a time.
    fn part(&self, len: u64) -> u64 {
        let block = self.limits().offset_align.max(1);
        let most = self.shared.max_transfer.map(|most| {
            let most = most.checked_next_multiple_of(block);
            most.unwrap_or(u64::MAX)
        });
        most.map_or(len, |most| len.min(most))
    }

    /// Passes an operation on, and tells when a write has ended.
    fn pass_on(
        &self,
        reactor: &Reactor,
        (bufs, op): (IoBufs, Passed),
        token: Token,
        purpose: Purpose,
    ) -> Submission {
        let (inner, shared) = (self.inner.clone(), self.shared.clone());
        reactor.spawn(async move {
            let result = carry_out(purpose.on(&*inner), bufs, &op).await;
            if !matches!(op, Passed::Read(_)) {
                shared.engine.lock().happen(Event::PwritevDone);
            }
            complete(token, result);
        });
        Submission::Pending
    }
}

/// Carries out an operation on the storage that it is passed on to.
async fn carry_out(to: Target<'_>, bufs: IoBufs, op: &Passed) -> io::Result<u32> {
    let inner = to.storage;
    let reactor = Reactor::current()
        .ok_or_else(|| io::Error::other("storage used on a thread without a reactor"))?;
    let mut guard = reactor.reserve((bufs, inner.hold()));
    let iovecs = guard.kept().map_or(&[][..], |(bufs, _)| bufs.iovecs());
    let op = match *op {
        Passed::Read(offset) => Op::Read { iovecs, offset },
        Passed::Write(offset) => Op::Write { iovecs, offset },
        Passed::Zero { offset, len, unmap } => Op::Zero { offset, len, unmap },
    };
    // SAFETY: the vectors are kept by the guard until the operation has ended, and the memory that
    // they name by the caller until its own token is completed, which is done after that.
    match unsafe { inner.submit_for(&reactor, op, guard.token(), to.purpose) } {
        Submission::Ready(result) => result,
        Submission::Pending => {
            guard.mark_started();
            (&mut guard).await
        }
    }
}

/// Ends the operation of a task.
fn complete(token: Token, result: io::Result<u32>) {
    // A task has no handle of the reactor, which would keep the reactor that has the task.
    match Reactor::current() {
        Some(reactor) => reactor.complete(token, result),
        None => log::error!("an operation ended on a thread without a reactor"),
    }
}

impl Shared {
    /// An operation comes, with what happens by it. Tells whether it fails.
    fn meet(
        &self,
        happens: impl Iterator<Item = Event>,
        kind: Option<IoType>,
        offset: u64,
        len: u64,
    ) -> Option<Injected> {
        let mut engine = self.engine.lock();
        happens.for_each(|event| engine.happen(event));
        let injected = engine.check(kind?, offset, len);
        if injected.is_some() && matches!(kind, Some(IoType::Write | IoType::WriteZeroes)) {
            // It has ended, too.
            engine.happen(Event::PwritevDone);
        }
        injected
    }
}

impl Storage for Blkdebug {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        // SAFETY: passed on to the caller.
        unsafe { self.submit_for(reactor, op, token, Purpose::Data) }
    }

    unsafe fn submit_for(
        &self,
        reactor: &Reactor,
        op: Op<'_>,
        token: Token,
        purpose: Purpose,
    ) -> Submission {
        if token.is_client() {
            return Submission::Ready(Err(io::Error::from_raw_os_error(libc::EAGAIN)));
        }
        self.shared.watches.note_op(&op);
        let (kind, offset, len) = events::range(&op, purpose);
        let len = match kind {
            Some(IoType::Read | IoType::Write) => self.part(len),
            _ => len,
        };
        let happens = events::of(&op, purpose);
        if let Some(injected) = self.shared.meet(happens, kind, offset, len) {
            let error = io::Error::from_raw_os_error(injected.errno);
            if injected.immediately {
                return Submission::Ready(Err(error));
            }
            reactor.spawn(async move { complete(token, Err(error)) });
            return Submission::Pending;
        }
        let cut = |iovecs: &[libc::iovec]| {
            // SAFETY: the memory is the caller's, who keeps it valid.
            let bufs = unsafe { IoBufs::new(iovecs) };
            bufs.slice(0, bufs.len().min(len as usize))
        };
        match op {
            Op::Read { iovecs, offset } if self.shared.max_transfer.is_some() => {
                self.pass_on(reactor, (cut(iovecs), Passed::Read(offset)), token, purpose)
            }
            Op::Write { iovecs, offset }
                if self.shared.max_transfer.is_some() || self.shared.tells_done =>
            {
                self.pass_on(
                    reactor,
                    (cut(iovecs), Passed::Write(offset)),
                    token,
                    purpose,
                )
            }
            Op::Zero { offset, len, unmap }
                if self.shared.tells_done && kind == Some(IoType::WriteZeroes) =>
            {
                let op = Passed::Zero { offset, len, unmap };
                self.pass_on(reactor, (IoBufs::empty(), op), token, purpose)
            }
            // SAFETY: the memory is the caller's, who keeps it valid.
            op => unsafe { self.inner.submit_for(reactor, op, token, purpose) },
        }
    }

    fn len(&self) -> Answer<'_, io::Result<u64>> {
        self.inner.len()
    }

    fn capacity(&self) -> Answer<'_, io::Result<Option<u64>>> {
        self.inner.capacity()
    }

    fn set_len(&self, len: u64) -> Answer<'_, io::Result<()>> {
        self.inner.set_len(len)
    }

    fn limits(&self) -> Limits {
        let limits = self.inner.limits();
        Limits {
            offset_align: limits.offset_align.max(self.shared.align),
            ..limits
        }
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn writable(&self) -> bool {
        self.inner.writable()
    }

    fn set_access(&self, access: Access) -> Answer<'_, io::Result<()>> {
        self.inner.set_access(access)
    }

    fn over(&self, inner: &Arc<dyn Storage>) -> Option<Arc<dyn Storage>> {
        let shared = self.shared.clone();
        Some(Arc::new(Self::sharing(inner.clone(), shared)))
    }

    fn identity(&self) -> Option<Identity> {
        self.inner.identity()
    }

    fn outlives_process(&self) -> bool {
        self.inner.outlives_process()
    }

    fn allocated(&self) -> Answer<'_, io::Result<u64>> {
        self.inner.allocated()
    }

    fn allocated_before(&self) -> u64 {
        self.inner.allocated_before()
    }

    fn hold(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        self.inner.hold()
    }

    fn syncs(&self) -> Option<&Arc<Syncs>> {
        Some(&self.syncs)
    }

    fn watches(&self) -> Option<&Watches> {
        Some(&self.shared.watches)
    }

    /// The data path's tries come to nothing here: the task that follows is looked at.
    fn note_write(&self, _offset: u64, _len: u64) {}

    fn call_since(&self) -> Option<Instant> {
        self.inner.call_since()
    }

    fn next_data(&self, offset: u64) -> Answer<'_, Option<(u64, u64)>> {
        let rest = u64::MAX - offset;
        let kind = Some(IoType::BlockStatus);
        let failed = self.shared.meet(iter::empty(), kind, offset, rest);
        match failed {
            // Who is not told where data is takes it to be everywhere.
            Some(_) => at_once(Some((offset, u64::MAX))),
            None => later(async move { self.inner.next_data(offset).await }),
        }
    }
}

#[cfg(test)]
mod tests;
