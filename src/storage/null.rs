//! Storage that keeps nothing: `null-co` and `null-aio`.
//!
//! Writes are dropped. A read gives zeros, whatever `read-zeroes` says: memory that a read leaves as
//! it is may have held what another guest wrote, since buffers are used again. What `read-zeroes`
//! decides is whether the range is known to be zeros before it is read.
//!
//! Each operation can be made to take a time. It waits as a task with a timer, beside all others of
//! its thread.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::{Answer, Limits, Op, Storage, Submission, Syncs, Watches, at_once};
use crate::reactor::{Reactor, Token};

/// Bytes that one operation moves at most; a longer transfer is short.
const MAX_TRANSFER: usize = 1 << 30;
/// Disks are counted in sectors of this many bytes.
const SECTOR: u64 = 512;

/// Storage of some size in which nothing is kept.
#[derive(Debug)]
pub struct Null {
    name: String,
    size: u64,
    latency: Duration,
    is_zero: bool,
    syncs: Arc<Syncs>,
    watches: Watches,
}

impl Null {
    /// Storage of `size` bytes and what lacks to a whole sector.
    #[must_use]
    pub fn new(name: String, size: u64) -> Self {
        Self {
            name,
            size: size.next_multiple_of(SECTOR),
            latency: Duration::ZERO,
            is_zero: false,
            syncs: Syncs::new(false),
            watches: Watches::default(),
        }
    }

    /// Each operation takes so long.
    #[must_use]
    pub fn with_latency(mut self, latency: Duration) -> Self {
        self.latency = latency;
        self
    }

    /// Whether it says, before it is read, that it is all zeros.
    #[must_use]
    pub fn known_zero(mut self, is_zero: bool) -> Self {
        self.is_zero = is_zero;
        self
    }

    fn within(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    /// Carries out an operation. Returns the bytes moved.
    ///
    /// # Safety
    /// The memory that `op` names is valid.
    unsafe fn carry_out(&self, op: Op<'_>) -> io::Result<u32> {
        match op {
            Op::Read { iovecs, offset } => {
                let wanted: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
                let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
                let len = wanted.min(left).min(MAX_TRANSFER);
                let mut left = len;
                for iovec in iovecs {
                    let now = iovec.iov_len.min(left);
                    // SAFETY: the memory is valid, as the caller says.
                    unsafe { std::ptr::write_bytes(iovec.iov_base.cast::<u8>(), 0, now) };
                    left -= now;
                }
                Ok(len as u32)
            }
            Op::Write { iovecs, offset } => {
                let len: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
                self.within(offset, len as u64)?;
                Ok(len.min(MAX_TRANSFER) as u32)
            }
            Op::Sync => Ok(0),
            // There is nothing behind the end.
            Op::Reserve { .. } => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            Op::Zero { offset, len, unmap } => {
                // What is given back may end behind the end, where there is nothing to do.
                let rest = self.size.saturating_sub(offset);
                let len = if unmap { len.min(rest) } else { len };
                self.within(offset, len).map(|()| 0)
            }
        }
    }
}

impl Storage for Null {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        // SAFETY: passed on to the caller.
        let result = unsafe { self.carry_out(op) };
        if self.latency.is_zero() {
            return Submission::Ready(result);
        }
        let latency = self.latency;
        reactor.spawn(async move {
            // The task has no handle of the reactor, which would keep the reactor that has the task.
            let sleep = Reactor::current().map(|reactor| reactor.sleep(latency));
            if let Some(sleep) = sleep {
                sleep.await;
            }
            match Reactor::current() {
                Some(reactor) => reactor.complete(token, result),
                None => log::error!("an operation ended on a thread without a reactor"),
            }
        });
        Submission::Pending
    }

    fn len(&self) -> Answer<'_, io::Result<u64>> {
        at_once(Ok(self.size))
    }

    fn capacity(&self) -> Answer<'_, io::Result<Option<u64>>> {
        at_once(Ok(Some(self.size)))
    }

    /// As of a device: nothing is cut off, and it does not grow.
    fn set_len(&self, len: u64) -> Answer<'_, io::Result<()>> {
        at_once(self.within(0, len))
    }

    fn limits(&self) -> Limits {
        Limits {
            memory_align: 1,
            offset_align: 1,
            zero_past_end: false,
        }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn writable(&self) -> bool {
        true
    }

    fn syncs(&self) -> Option<&Arc<Syncs>> {
        Some(&self.syncs)
    }

    fn watches(&self) -> Option<&Watches> {
        Some(&self.watches)
    }

    fn next_data(&self, offset: u64) -> Answer<'_, Option<(u64, u64)>> {
        at_once((!self.is_zero && offset < self.size).then_some((offset, self.size)))
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a read that shows what was in the buffer, or that is longer than the
    //! storage; a write behind the end that succeeds; an operation that takes no time, or holds up
    //! those beside it.

    #![allow(clippy::unwrap_used)]

    use std::time::Instant;

    use futures_util::future::join_all;

    use super::*;
    use crate::storage::{AlignedBuf, IoBufs, io as storage_io};

    #[test]
    fn reads_are_zeros_and_writes_are_dropped() {
        let reactor = Reactor::for_this_thread().unwrap();
        for known in [false, true] {
            let storage = Null::new("null-co://".into(), 1000).known_zero(known);
            assert_eq!(reactor.block_on(storage.len()).unwrap(), 1024);
            let buffer = AlignedBuf::copy_of(&[7; 2048]);
            let new = AlignedBuf::copy_of(&[8; 1024]);
            reactor
                .block_on(storage_io::write_buf(&storage, 0, &new))
                .unwrap();
            // SAFETY: `buffer` outlives the operation.
            let bufs = unsafe { IoBufs::of(&buffer, 0, 1024) };
            reactor
                .block_on(storage_io::read(&storage, &bufs, 0))
                .unwrap();
            assert!(buffer[..1024] == [0; 1024] && buffer[1024..] == [7; 1024]);
            let past = reactor.block_on(storage_io::write_buf(&storage, 512, &buffer));
            assert_eq!(past.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
            reactor
                .block_on(storage_io::zero(&storage, 0, 1024, false))
                .unwrap();
            reactor
                .block_on(storage_io::discard(&storage, 512, 4096))
                .unwrap();
            reactor.block_on(storage_io::sync(&storage)).unwrap();
            let data = [0, 512, 1024].map(|at| reactor.block_on(storage.next_data(at)));
            let expected = match known {
                true => [None, None, None],
                false => [Some((0, 1024)), Some((512, 1024)), None],
            };
            assert_eq!(data, expected);
            assert!(reactor.block_on(storage.set_len(2000)).is_err());
        }
        Reactor::leave_thread();
    }

    #[test]
    fn operations_take_their_time_beside_each_other() {
        const LATENCY: Duration = Duration::from_millis(50);
        let reactor = Reactor::for_this_thread().unwrap();
        let storage = Null::new("null-aio://".into(), 1 << 20).with_latency(LATENCY);
        let began = Instant::now();
        let read = |at: u64| storage_io::read_buf(&storage, at * 512, 512);
        // One after the other they would take longer than the test may.
        let read = reactor.block_on(join_all((0..2000).map(read)));
        assert!(
            read.iter()
                .all(|bytes| bytes.as_ref().unwrap()[..] == [0; 512])
        );
        assert!(began.elapsed() >= LATENCY);
        let began = Instant::now();
        reactor.block_on(storage_io::sync(&storage)).unwrap();
        assert!(began.elapsed() >= LATENCY);
        Reactor::leave_thread();
    }
}
