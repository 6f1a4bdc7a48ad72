//! Storage in memory that records what is done to it and breaks on demand, for tests of
//! everything above it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::fault::Uneven;
use super::{Answer, Limits, Op, Storage, Submission, Syncs, at_once};
use crate::reactor::{Reactor, Token};

/// One step of the recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Bytes written at an offset.
    Write {
        /// Position in bytes.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// A range zeroed.
    Zero {
        /// Position in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The length set.
    SetLen(u64),
    /// The length set to at least this.
    Grow(u64),
    /// A barrier: everything before is stable.
    Sync,
}

/// Storage in a vector.
#[derive(Debug)]
pub struct MemoryStorage {
    bytes: Mutex<Vec<u8>>,
    log: Mutex<Option<Vec<Step>>>,
    /// Operations until one fails; `usize::MAX`: never.
    fail_after: AtomicUsize,
    errno: AtomicUsize,
    fail_syncs: AtomicBool,
    syncs: Arc<Syncs>,
    uneven: Mutex<Option<Uneven>>,
    /// It has its length for good.
    fixed: bool,
}

impl MemoryStorage {
    /// Storage that holds `bytes`.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            log: Mutex::new(None),
            fail_after: AtomicUsize::new(usize::MAX),
            errno: AtomicUsize::new(libc::EIO as usize),
            fail_syncs: AtomicBool::new(false),
            // A failed sync takes nothing away.
            syncs: Syncs::new(false),
            uneven: Mutex::new(None),
            fixed: false,
        }
    }

    /// A device that holds `bytes`, and no more.
    #[must_use]
    pub fn device(bytes: Vec<u8>) -> Self {
        Self {
            fixed: true,
            ..Self::new(bytes)
        }
    }

    /// Nothing makes a device longer.
    fn reach(&self, bytes: &mut Vec<u8>, end: usize) -> io::Result<bool> {
        if bytes.len() >= end {
            return Ok(false);
        }
        if self.fixed {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        bytes.resize(end, 0);
        Ok(true)
    }

    /// Starts a recording.
    pub fn record(&self) {
        *self.log.lock() = Some(Vec::new());
    }

    /// Ends the recording and returns it.
    #[must_use]
    pub fn take_log(&self) -> Vec<Step> {
        self.log.lock().take().unwrap_or_default()
    }

    /// How many steps have been recorded.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.log.lock().as_ref().map_or(0, Vec::len)
    }

    /// The bytes as they are.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        self.bytes.lock().clone()
    }

    /// Every operation after the next `count` fails with `errno`; `usize::MAX` heals it.
    pub fn fail_after(&self, count: usize, errno: i32) {
        self.errno
            .store(errno.unsigned_abs() as usize, Ordering::SeqCst);
        self.fail_after.store(count, Ordering::SeqCst);
    }

    /// Whether every sync fails, and nothing else.
    pub fn fail_syncs(&self, fail: bool) {
        self.fail_syncs.store(fail, Ordering::SeqCst);
    }

    /// From now on transfers are short and operations interrupted, as the seed decides; or no longer.
    pub fn uneven(&self, seed: Option<u64>) {
        *self.uneven.lock() = seed.map(Uneven::new);
    }

    /// How many bytes of a transfer of `len` are moved now.
    fn admit(&self, len: usize) -> io::Result<usize> {
        match self.uneven.lock().as_mut() {
            Some(uneven) => uneven.transfer(len, 1),
            None => Ok(len),
        }
    }

    fn step(&self, step: impl FnOnce() -> Step) {
        if let Some(log) = self.log.lock().as_mut() {
            log.push(step());
        }
    }

    fn maybe_fail(&self) -> io::Result<()> {
        let left = self.fail_after.load(Ordering::SeqCst);
        if left == 0 {
            let errno = self.errno.load(Ordering::SeqCst) as i32;
            return Err(io::Error::from_raw_os_error(errno));
        }
        if left != usize::MAX {
            self.fail_after.store(left - 1, Ordering::SeqCst);
        }
        Ok(())
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        self.maybe_fail()?;
        if self.fixed {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.bytes.lock().resize(len as usize, 0);
        self.step(|| Step::SetLen(len));
        Ok(())
    }

    /// # Safety
    /// The vectors of `op` are valid.
    unsafe fn call(&self, op: Op<'_>) -> io::Result<u32> {
        self.maybe_fail()?;
        match op {
            Op::Read { iovecs, offset } => {
                let bytes = self.bytes.lock();
                let mut rest = bytes.get(offset as usize..).unwrap_or(&[]);
                let all = rest.len();
                // SAFETY: valid by contract.
                let bufs = unsafe { super::IoBufs::new(iovecs) };
                let bufs = bufs.slice(0, self.admit(bufs.len())?);
                rest = rest.get(..bufs.len()).unwrap_or(rest);
                bufs.copy_from(rest);
                Ok(all.min(bufs.len()) as u32)
            }
            Op::Write { iovecs, offset } => {
                // SAFETY: valid by contract.
                let bufs = unsafe { super::IoBufs::new(iovecs) };
                let bufs = bufs.slice(0, self.admit(bufs.len())?);
                let mut new = vec![0; bufs.len()];
                bufs.copy_to(&mut new);
                let mut bytes = self.bytes.lock();
                let end = offset as usize + new.len();
                self.reach(&mut bytes, end)?;
                if let Some(target) = bytes.get_mut(offset as usize..end) {
                    target.copy_from_slice(&new);
                }
                let count = new.len() as u32;
                self.step(|| Step::Write { offset, bytes: new });
                Ok(count)
            }
            Op::Sync if self.fail_syncs.load(Ordering::SeqCst) => {
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            Op::Sync => {
                self.admit(0)?;
                self.step(|| Step::Sync);
                Ok(0)
            }
            Op::Reserve { offset, len } => {
                self.admit(0)?;
                let mut bytes = self.bytes.lock();
                let end = (offset + len) as usize;
                if self.reach(&mut bytes, end)? {
                    self.step(|| Step::Grow(offset + len));
                }
                Ok(0)
            }
            Op::Zero { offset, len, .. } => {
                self.admit(0)?;
                let mut bytes = self.bytes.lock();
                let end = (offset + len).min(bytes.len() as u64) as usize;
                if let Some(range) = bytes.get_mut(offset as usize..end) {
                    range.fill(0);
                }
                self.step(|| Step::Zero { offset, len });
                Ok(0)
            }
        }
    }
}

impl Storage for MemoryStorage {
    unsafe fn submit(&self, _reactor: &Reactor, op: Op<'_>, _token: Token) -> Submission {
        // SAFETY: passed on to the caller.
        Submission::Ready(unsafe { self.call(op) })
    }

    fn len(&self) -> Answer<'_, io::Result<u64>> {
        at_once(Ok(self.bytes.lock().len() as u64))
    }

    fn capacity(&self) -> Answer<'_, io::Result<Option<u64>>> {
        at_once(Ok(self.fixed.then(|| self.bytes.lock().len() as u64)))
    }

    fn set_len(&self, len: u64) -> Answer<'_, io::Result<()>> {
        at_once(self.resize(len))
    }

    fn limits(&self) -> Limits {
        Limits {
            memory_align: 1,
            offset_align: 1,
            zero_past_end: true,
        }
    }

    fn name(&self) -> &str {
        "memory"
    }

    fn writable(&self) -> bool {
        true
    }

    /// As a file: tests kill processes over it.
    fn outlives_process(&self) -> bool {
        true
    }

    fn syncs(&self) -> Option<&Arc<Syncs>> {
        Some(&self.syncs)
    }
}
