//! What tests make storage do that real storage does now and then.
//!
//! [`Uneven`] is the kernel as it may be at any time: transfers that are short, operations that are
//! interrupted or to be tried again. A seed decides which, so that tests can repeat it.
//! [`FaultStorage`] gives any storage a trait of another one: blocks, holes, a page cache, calls
//! that hang at a [`Gate`], operations that fail by the rules of [`Faults`].

mod rules;

use std::any::Any;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::calls::Calls;
use super::{Access, Answer, Limits, Op, Purpose, Storage, Submission, Syncs, at_once, later};
use crate::reactor::{Reactor, Token};

pub use rules::{Call, Faults, Gate, Rule};

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
            gate.pass_close();
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
    faults: Option<Arc<Faults>>,
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
            faults: None,
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

    /// Its operations fail as the rules of `faults` say.
    #[must_use]
    pub fn with_faults(mut self, faults: &Arc<Faults>) -> Self {
        self.faults = Some(faults.clone());
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
        if !self.is_whole(&op) {
            // As a file that was opened with O_DIRECT.
            return Submission::Ready(Err(io::Error::from_raw_os_error(libc::EINVAL)));
        }
        if let Some(Closing { gate, .. }) = &self.gate
            && gate.holds(&op, purpose, reactor, token)
        {
            return Submission::Pending;
        }
        let met = self.faults.as_ref().map(|faults| faults.meet(&op, purpose));
        if let Some(Err(error)) = met {
            return Submission::Ready(Err(error));
        }
        // SAFETY: passed on to the caller.
        unsafe { self.inner.submit_for(reactor, op, token, purpose) }
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

    /// An operation that fails, or hangs, though it is for something else; or one of these that does not.
    #[test]
    fn rules_choose_operations_by_what_they_are_for() {
        let reactor = Reactor::for_this_thread().unwrap();
        let (faults, gate) = (Arc::new(Faults::default()), Arc::new(Gate::default()));
        let storage = FaultStorage::over(Arc::new(MemoryStorage::new(vec![7; 8192])))
            .with_faults(&faults)
            .with_gate(&gate);
        let read = |purpose: Purpose| {
            let read = reactor.block_on(read_buf(purpose.on(&storage), 0, 512));
            read.map(drop).map_err(|error| error.raw_os_error())
        };
        faults.add(Rule {
            call: Call::Read,
            purpose: Some(Purpose::L2Table),
            errno: libc::EIO,
            times: 1,
        });
        let bytes = AlignedBuf::zeroed(512);
        let write = write_buf(Purpose::L2Table.on(&storage), 0, &bytes);
        reactor.block_on(write).unwrap();
        assert_eq!(read(Purpose::Data), Ok(()));
        assert_eq!(read(Purpose::L2Table), Err(Some(libc::EIO)));
        assert_eq!(read(Purpose::L2Table), Ok(()));
        gate.shut_for(Call::Read, Purpose::Copy);
        assert_eq!(read(Purpose::L2Table), Ok(()));
        assert_eq!(gate.hung(), 0);
        let mut copy = Box::pin(read_buf(Purpose::Copy.on(&storage), 0, 512));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(copy.as_mut().poll(&mut context).is_pending());
        assert_eq!(gate.hung(), 1);
        gate.open();
        reactor.block_on(copy).unwrap();
        drop(storage);
        Reactor::leave_thread();
    }
}
