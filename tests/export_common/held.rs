//! Storage in memory whose operations hang until it is told to let them go.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use io_uring::{opcode, types};
use stratablk::reactor::{Reactor, Token};
use stratablk::storage::memory::MemoryStorage;
use stratablk::storage::{Answer, Limits, Op, Storage, Submission};
use vmm_sys_util::eventfd::EventFd;

/// Storage in memory whose operations hang until `release`.
#[derive(Debug)]
pub struct Held {
    pub inner: MemoryStorage,
    gate: EventFd,
    open: AtomicBool,
    /// How many operations have hung.
    pub waiting: AtomicUsize,
    /// The bytes of the largest transfer.
    pub largest: AtomicUsize,
}

impl Held {
    /// A disk of `len` bytes that are all 5, whose operations hang unless it is `open`.
    pub fn new(len: usize, open: bool) -> Arc<Self> {
        Arc::new(Self {
            inner: MemoryStorage::new(vec![5; len]),
            gate: EventFd::new(0).unwrap(),
            open: AtomicBool::new(open),
            waiting: AtomicUsize::new(0),
            largest: AtomicUsize::new(0),
        })
    }

    /// Lets go what hangs, and what is to come.
    pub fn release(&self) {
        self.open.store(true, Ordering::SeqCst);
        self.gate.write(1).unwrap();
    }
}

/// Lets a test that fails end.
pub struct Release(pub Arc<Held>);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl Storage for Held {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        if let Op::Read { iovecs, .. } | Op::Write { iovecs, .. } = op {
            let len = iovecs.iter().map(|iovec| iovec.iov_len).sum();
            self.largest.fetch_max(len, Ordering::SeqCst);
        }
        if self.open.load(Ordering::SeqCst) {
            // SAFETY: passed on to the caller.
            return unsafe { self.inner.submit(reactor, op, token) };
        }
        // The poll ends when the gate opens, as an operation that moved one byte: a short one,
        // which is done once more in full.
        let fd = types::Fd(self.gate.as_raw_fd());
        let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build();
        // SAFETY: a poll names no memory.
        unsafe { reactor.start(entry, token) }.unwrap();
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Submission::Pending
    }

    fn len(&self) -> Answer<'_, std::io::Result<u64>> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Answer<'_, std::io::Result<()>> {
        self.inner.set_len(len)
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn name(&self) -> &str {
        "held"
    }

    fn writable(&self) -> bool {
        true
    }
}
