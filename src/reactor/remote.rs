//! What other threads may do to a reactor: queue one of its tasks, complete one of its operations,
//! and wake it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Token;

/// The part of a reactor that is shared between threads.
///
/// Invariant: a task identifier or a completion that is in its queue before the reactor sleeps
/// keeps it awake; one pushed while it sleeps comes with a write to the eventfd.
///
/// On cache lines of its own: its thread looks at it in every turn, and writes to it with every
/// sleep and every wake of a task.
#[derive(Debug)]
#[repr(align(128))]
pub struct Remote {
    ready: Mutex<Vec<usize>>,
    completed: Mutex<Vec<(Token, io::Result<u32>)>>,
    has_work: AtomicBool,
    sleeping: AtomicBool,
    event: EventFd,
}

impl Remote {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            ready: Mutex::new(Vec::with_capacity(64)),
            completed: Mutex::default(),
            has_work: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Makes a sleeping reactor run one turn: for state that it looks at by itself. One that is
    /// awake does not fall asleep before it has run one.
    pub fn wake(&self) {
        self.has_work.store(true, Ordering::SeqCst);
        self.notify();
    }

    /// Delivers the result of an operation that storage has answered with
    /// [`Pending`](crate::storage::Submission::Pending) on the reactor's thread, and that this
    /// thread has carried out: once for each, and the last that is done with its memory. A reactor
    /// that has ended takes no notice.
    pub fn complete(&self, token: Token, result: io::Result<u32>) {
        self.completed.lock().push((token, result));
        self.wake();
    }

    pub(super) fn push(&self, task: usize) {
        self.ready.lock().push(task);
        self.wake();
    }

    fn notify(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst)
            && let Err(error) = self.event.write(1)
        {
            // The counter is full: the reactor has been woken often enough.
            log::debug!("waking a reactor: {error}");
        }
    }

    /// Moves the queued tasks into `tasks`, and the completions into `completed`.
    pub(super) fn take(
        &self,
        tasks: &mut Vec<usize>,
        completed: &mut Vec<(Token, io::Result<u32>)>,
    ) {
        if self.has_work.swap(false, Ordering::SeqCst) {
            tasks.append(&mut self.ready.lock());
            completed.append(&mut self.completed.lock());
        }
    }

    pub(super) fn has_work(&self) -> bool {
        self.has_work.load(Ordering::Relaxed)
    }

    /// Announces that the reactor is about to sleep. False: there is work, it must not.
    pub(super) fn prepare_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        !self.has_work.load(Ordering::SeqCst)
    }

    pub(super) fn end_sleep(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
    }
}
