//! Storage in memory: before and behind each operation another thread may go on.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::reactor::{Reactor, Token};
use crate::storage::{Answer, IoBufs, Limits, Op, Storage, Submission, Syncs, at_once};
use crate::sync::atomic::{AtomicBool, Ordering};

/// A file in memory.
#[derive(Debug)]
pub struct Disk {
    bytes: Mutex<Vec<u8>>,
    point: AtomicBool,
    /// It has its length for good.
    device: bool,
    syncs: Arc<Syncs>,
}

impl Disk {
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            point: AtomicBool::new(false),
            device: false,
            syncs: Syncs::new(true),
        })
    }

    /// A device in memory.
    #[must_use]
    pub fn device(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            point: AtomicBool::new(false),
            device: true,
            syncs: Syncs::new(true),
        })
    }

    /// Another thread may go on here. It need not: a thread that yields lets all others pass, so
    /// that none would ever be left behind while another waits for the disk several times.
    fn point(&self) {
        self.point.load(Ordering::SeqCst);
    }

    fn bytes(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it holds.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        self.bytes().clone()
    }

    /// # Safety
    /// The vectors of `op` are valid.
    unsafe fn call(&self, op: Op<'_>) -> io::Result<u32> {
        let mut file = self.bytes();
        let mut put = |offset: u64, bytes: &[u8]| {
            let end = offset as usize + bytes.len();
            if file.len() < end && self.device {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            if file.len() < end {
                file.resize(end, 0);
            }
            file[offset as usize..end].copy_from_slice(bytes);
            Ok(bytes.len() as u32)
        };
        match op {
            Op::Read { iovecs, offset } => {
                // SAFETY: valid by contract.
                let bufs = unsafe { IoBufs::new(iovecs) };
                let rest = file.get(offset as usize..).unwrap_or(&[]);
                let count = rest.len().min(bufs.len());
                bufs.copy_from(&rest[..count]);
                Ok(count as u32)
            }
            Op::Write { iovecs, offset } => {
                // SAFETY: valid by contract.
                let bufs = unsafe { IoBufs::new(iovecs) };
                let mut bytes = vec![0; bufs.len()];
                bufs.copy_to(&mut bytes);
                put(offset, &bytes)
            }
            Op::Sync => Ok(0),
            Op::Reserve { .. } => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            Op::Zero { offset, len, .. } => put(offset, &vec![0; len as usize]).map(|_| 0),
        }
    }
}

impl Storage for Disk {
    unsafe fn submit(&self, _reactor: &Reactor, op: Op<'_>, _token: Token) -> Submission {
        self.point();
        // SAFETY: passed on to the caller.
        let result = unsafe { self.call(op) };
        self.point();
        Submission::Ready(result)
    }

    fn len(&self) -> Answer<'_, io::Result<u64>> {
        at_once(Ok(self.bytes().len() as u64))
    }

    fn capacity(&self) -> Answer<'_, io::Result<Option<u64>>> {
        at_once(Ok(self.device.then(|| self.bytes().len() as u64)))
    }

    fn set_len(&self, len: u64) -> Answer<'_, io::Result<()>> {
        self.bytes().resize(len as usize, 0);
        at_once(Ok(()))
    }

    fn limits(&self) -> Limits {
        Limits {
            memory_align: 1,
            offset_align: 1,
            zero_past_end: !self.device,
        }
    }

    fn name(&self) -> &'static str {
        "disk"
    }

    fn writable(&self) -> bool {
        true
    }

    /// As a file: the next process is given what is in it.
    fn outlives_process(&self) -> bool {
        true
    }

    fn syncs(&self) -> Option<&Arc<Syncs>> {
        Some(&self.syncs)
    }
}
