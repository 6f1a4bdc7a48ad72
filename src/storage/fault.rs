//! What tests make storage do that real storage does now and then.
//!
//! [`Uneven`] is the kernel as it may be at any time: transfers that are short, operations that are
//! interrupted or to be tried again. A seed decides which, so that tests can repeat it.
//! [`FaultStorage`] gives any storage a trait of another one: blocks, holes, a page cache, calls
//! that hang at a [`Gate`].

use std::any::Any;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::calls::Calls;
use super::{Access, Answer, Limits, Op, Storage, Submission, Syncs, at_once, later};
use crate::reactor::{Reactor, Remote, Token};
use crate::sync::Event;

/// Decides what becomes of each operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uneven {
    state: u64,
}

impl Uneven {
    /// The decisions that follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            state: seed ^ 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// A number below `end`, which is above 0 (splitmix64).
    fn below(&mut self, end: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    /// Whether an operation that moves nothing is carried out.
    ///
    /// # Errors
    /// EINTR or EAGAIN, one time in eight: nothing is done then.
    pub fn admit(&mut self) -> io::Result<()> {
        match self.below(16) {
            0 => Err(io::Error::from_raw_os_error(libc::EINTR)),
            1 => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
            _ => Ok(()),
        }
    }

    /// How many bytes of a transfer of `len` are moved: at least one block of `block` bytes, and
    /// whole blocks unless it is all of them.
    ///
    /// # Errors
    /// As for [`Uneven::admit`].
    pub fn transfer(&mut self, len: usize, block: u64) -> io::Result<usize> {
        self.admit()?;
        let blocks = len as u64 / block.max(1);
        if blocks < 2 || self.below(2) == 0 {
            return Ok(len);
        }
        Ok(((1 + self.below(blocks - 1)) * block.max(1)) as usize)
    }
}

/// A kind of call that storage is asked to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// [`Op::Read`].
    Read,
    /// [`Op::Write`].
    Write,
    /// [`Op::Sync`].
    Sync,
    /// [`Op::Reserve`].
    Reserve,
    /// [`Op::Zero`].
    Zero,
    /// [`Storage::len`] and [`Storage::capacity`].
    Len,
    /// [`Storage::set_len`].
    SetLen,
    /// [`Storage::set_access`].
    SetAccess,
    /// [`Storage::open_writable`].
    OpenWritable,
    /// [`Storage::next_data`].
    NextData,
    /// The last reference goes.
    Close,
}

impl Call {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Read,
        Self::Write,
        Self::Sync,
        Self::Reserve,
        Self::Zero,
        Self::Len,
        Self::SetLen,
        Self::SetAccess,
        Self::OpenWritable,
        Self::NextData,
        Self::Close,
    ];

    fn of(op: &Op<'_>) -> Self {
        match op {
            Op::Read { .. } => Self::Read,
            Op::Write { .. } => Self::Write,
            Op::Sync => Self::Sync,
            Op::Reserve { .. } => Self::Reserve,
            Op::Zero { .. } => Self::Zero,
        }
    }
}

/// Where calls hang, until it is opened by any thread. Operations that have hung end as
/// interrupted then, having done nothing, and are tried again; everything else goes on.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<GateState>,
    opened: Event,
    opened_to_threads: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    shut: Vec<Call>,
    operations: Vec<(Arc<Remote>, Token)>,
    /// Calls that have hung.
    hung: usize,
}

impl Gate {
    /// Calls of these kinds hang from now on.
    pub fn shut(&self, calls: &[Call]) {
        self.state.lock().shut.extend(calls);
    }

    /// Nothing hangs any more.
    pub fn open(&self) {
        let operations = {
            let mut state = self.state.lock();
            state.shut.clear();
            std::mem::take(&mut state.operations)
        };
        self.opened.notify(usize::MAX);
        self.opened_to_threads.notify_all();
        for (remote, token) in operations {
            remote.complete(token, Err(io::Error::from_raw_os_error(libc::EAGAIN)));
        }
    }

    /// How many calls have hung so far.
    #[must_use]
    pub fn hung(&self) -> usize {
        self.state.lock().hung
    }

    /// Whether an operation hangs.
    fn holds(&self, op: &Op<'_>, reactor: &Reactor, token: Token) -> bool {
        let mut state = self.state.lock();
        let shut = state.shut.contains(&Call::of(op));
        if shut {
            state.hung += 1;
            state.operations.push((reactor.remote(), token));
        }
        shut
    }

    /// Hangs while the gate is shut for `call`; blocks nobody.
    async fn pass(&self, call: Call) {
        let mut counted = false;
        loop {
            let opened = self.opened.listen();
            {
                let mut state = self.state.lock();
                if !state.shut.contains(&call) {
                    return;
                }
                state.hung += usize::from(!std::mem::replace(&mut counted, true));
            }
            opened.await;
        }
    }
}

/// Hangs when it is dropped, on a thread that is there for that, and lets go of a storage then.
#[derive(Debug)]
struct Closing {
    gate: Arc<Gate>,
    inner: Option<Arc<dyn Storage>>,
}

impl Drop for Closing {
    fn drop(&mut self) {
        let (gate, inner) = (self.gate.clone(), self.inner.take());
        let hang = move || {
            let mut state = gate.state.lock();
            state.hung += usize::from(state.shut.contains(&Call::Close));
            while state.shut.contains(&Call::Close) {
                gate.opened_to_threads.wait(&mut state);
            }
            drop(inner);
        };
        Calls::default().dispose(OnDrop(Some(hang)));
    }
}

struct OnDrop<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        if let Some(call) = self.0.take() {
            call();
        }
    }
}

/// Storage that has its bytes in another one, and differs from it in what it was told.
#[derive(Debug)]
pub struct FaultStorage<S> {
    inner: Arc<S>,
    limits: Limits,
    data: Option<Range<u64>>,
    tells_syncs: bool,
    gate: Option<Closing>,
}

impl<S: Storage> FaultStorage<S> {
    /// As `inner` in everything.
    #[must_use]
    pub fn over(inner: Arc<S>) -> Self {
        Self {
            limits: inner.limits(),
            inner,
            data: None,
            tells_syncs: true,
            gate: None,
        }
    }

    /// It has blocks of `block` bytes, and refuses transfers of anything else; buffers are aligned
    /// to `memory_align` bytes.
    #[must_use]
    pub fn with_blocks(mut self, memory_align: usize, block: u64) -> Self {
        self.limits.memory_align = memory_align;
        self.limits.offset_align = block;
        self
    }

    /// All but this range of bytes is a hole.
    #[must_use]
    pub fn with_data(mut self, data: Range<u64>) -> Self {
        self.data = Some(data);
        self
    }

    /// It does not say whose syncs it has: it counts as a file of its own with a page cache.
    #[must_use]
    pub fn with_page_cache(mut self) -> Self {
        self.tells_syncs = false;
        self
    }

    /// Its calls hang at a gate while that is shut.
    #[must_use]
    pub fn with_gate(mut self, gate: &Arc<Gate>) -> Self
    where
        S: 'static,
    {
        self.gate = Some(Closing {
            gate: gate.clone(),
            inner: Some(self.inner.clone()),
        });
        self
    }

    /// Carries `call` out when the gate is open for it.
    fn behind_gate<'a, T: 'a>(
        &'a self,
        kind: Call,
        call: impl FnOnce(&'a S) -> Answer<'a, T> + 'a,
    ) -> Answer<'a, T> {
        let Some(Closing { gate, .. }) = &self.gate else {
            return call(&self.inner);
        };
        later(async move {
            gate.pass(kind).await;
            call(&self.inner).await
        })
    }

    /// Where its bytes are.
    #[must_use]
    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn is_whole(&self, op: &Op<'_>) -> bool {
        let (Op::Read { iovecs, offset } | Op::Write { iovecs, offset }) = op else {
            return true;
        };
        let block = self.limits.offset_align;
        let len: u64 = iovecs.iter().map(|iovec| iovec.iov_len as u64).sum();
        offset.is_multiple_of(block) && len.is_multiple_of(block)
    }
}

impl<S: Storage> Storage for FaultStorage<S> {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        if !self.is_whole(&op) {
            // As a file that was opened with O_DIRECT.
            return Submission::Ready(Err(io::Error::from_raw_os_error(libc::EINVAL)));
        }
        if let Some(Closing { gate, .. }) = &self.gate
            && gate.holds(&op, reactor, token)
        {
            return Submission::Pending;
        }
        // SAFETY: passed on to the caller.
        unsafe { self.inner.submit(reactor, op, token) }
    }

    fn len(&self) -> Answer<'_, io::Result<u64>> {
        self.behind_gate(Call::Len, |inner| inner.len())
    }

    fn capacity(&self) -> Answer<'_, io::Result<Option<u64>>> {
        self.behind_gate(Call::Len, |inner| inner.capacity())
    }

    fn set_len(&self, len: u64) -> Answer<'_, io::Result<()>> {
        self.behind_gate(Call::SetLen, move |inner| inner.set_len(len))
    }

    fn set_access(&self, access: Access) -> Answer<'_, io::Result<()>> {
        self.behind_gate(Call::SetAccess, move |inner| inner.set_access(access))
    }

    fn open_writable(&self) -> Answer<'_, io::Result<Arc<dyn Storage>>> {
        self.behind_gate(Call::OpenWritable, |inner| inner.open_writable())
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn writable(&self) -> bool {
        self.inner.writable()
    }

    fn outlives_process(&self) -> bool {
        self.inner.outlives_process()
    }

    fn hold(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        self.inner.hold()
    }

    fn syncs(&self) -> Option<&Arc<Syncs>> {
        self.inner.syncs().filter(|_| self.tells_syncs)
    }

    fn next_data(&self, offset: u64) -> Answer<'_, Option<(u64, u64)>> {
        match &self.data {
            Some(data) => {
                at_once((offset < data.end).then_some((offset.max(data.start), data.end)))
            }
            None => self.behind_gate(Call::NextData, move |inner| inner.next_data(offset)),
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: storage that lets tests of the others pass, since it is not what it
    //! was told to be.

    use super::super::io::{read_buf, write_buf};
    use super::super::{AlignedBuf, memory::MemoryStorage};
    use super::*;

    #[test]
    fn it_is_what_it_was_told_to_be() {
        let reactor = Reactor::for_this_thread().unwrap();
        let found = |storage: &dyn Storage, at| reactor.block_on(storage.next_data(at));
        let inner = Arc::new(MemoryStorage::new(vec![7; 16384]));
        let plain = FaultStorage::over(inner.clone());
        assert_eq!(
            (plain.limits(), found(&plain, 9)),
            (inner.limits(), found(&*inner, 9))
        );
        assert!(plain.syncs().is_some());
        assert!(
            FaultStorage::over(inner.clone())
                .with_page_cache()
                .syncs()
                .is_none()
        );
        let holes = FaultStorage::over(inner.clone()).with_data(4096..8192);
        let seen = [0, 5000, 8192].map(|at| found(&holes, at));
        assert_eq!(seen, [Some((4096, 8192)), Some((5000, 8192)), None]);
        let blocks = FaultStorage::over(inner).with_blocks(512, 4096);
        let new = AlignedBuf::zeroed(4096);
        reactor.block_on(write_buf(&blocks, 4096, &new)).unwrap();
        let seen = reactor.block_on(read_buf(&blocks, 0, 8192)).unwrap();
        assert!(seen[..4096] == [7; 4096] && seen[4096..] == [0; 4096]);
        // Nobody comes to such storage with a part of a block: `io` sees to that.
        // SAFETY: the call is refused, and touches no memory.
        let part = |offset| unsafe {
            let op = Op::Write {
                iovecs: &[libc::iovec {
                    iov_base: new.as_ptr().cast_mut().cast(),
                    iov_len: 4096,
                }],
                offset,
            };
            blocks.submit(&reactor, op, Token::client(0))
        };
        assert!(matches!(part(512), Submission::Ready(Err(_))));
        Reactor::leave_thread();
    }
}
