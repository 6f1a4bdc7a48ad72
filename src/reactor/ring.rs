//! The io_uring itself: set-up with the best flags the kernel has, queueing, waiting.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, squeue};

use super::uring;

/// An io_uring owned by one thread.
pub(super) struct Ring {
    uring: IoUring,
    /// Entries queued since the last submission.
    queued: u32,
    /// How often the kernel has been entered.
    enters: u64,
    /// Completions are posted only when this thread enters the kernel (`DEFER_TASKRUN`).
    deferred: bool,
}

impl Ring {
    pub(super) fn new(entries: u32) -> io::Result<Self> {
        let mut plain = IoUring::builder();
        plain.setup_cqsize(entries * 8);
        let mut best = plain.clone();
        best.setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag();
        let (uring, deferred) = match uring::build(&best, entries) {
            Ok(uring) => (uring, true),
            // Kernels before 6.1 know none of the flags.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (uring::build(&plain, entries)?, false)
            }
            Err(error) => {
                return Err(io::Error::new(
                    error.kind(),
                    format!(
                        "setting up an io_uring: {error} (is it allowed by \
                         /proc/sys/kernel/io_uring_disabled and the memlock limit?)"
                    ),
                ));
            }
        };
        Ok(Self {
            uring,
            queued: 0,
            enters: 0,
            deferred,
        })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }

    /// Queues an entry, making room by a submission if need be.
    ///
    /// # Safety
    /// As for [`io_uring::SubmissionQueue::push`]: what the entry points at stays valid until
    /// its completion.
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: passed on to the caller.
        if unsafe { self.uring.submission().push(entry) }.is_err() {
            self.submit()?;
            // SAFETY: passed on to the caller.
            unsafe { self.uring.submission().push(entry) }
                .map_err(|_| io::Error::from_raw_os_error(libc::EBUSY))?;
        }
        self.queued += 1;
        Ok(())
    }

    pub(super) fn queued(&self) -> u32 {
        self.queued
    }

    pub(super) fn submit(&mut self) -> io::Result<()> {
        if self.queued == 0 {
            return Ok(());
        }
        let result = self.uring.submit();
        self.settle(result)
    }

    /// Submits and waits for at least one completion, or `timeout`.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if !self.uring.completion().is_empty() {
            return self.submit();
        }
        let result = match timeout {
            Some(timeout) => {
                let timeout = Timespec::from(timeout);
                self.uring
                    .submitter()
                    .submit_with_args(1, &SubmitArgs::new().timespec(&timeout))
            }
            None => self.uring.submit_and_wait(1),
        };
        self.settle(result)
    }

    /// How often the kernel has been entered.
    pub(super) fn enters(&self) -> u64 {
        self.enters
    }

    /// Interprets what entering the kernel returned.
    fn settle(&mut self, result: io::Result<usize>) -> io::Result<()> {
        self.enters += 1;
        match result {
            Ok(taken) => {
                self.queued = self.queued.saturating_sub(taken as u32);
                Ok(())
            }
            Err(error) => match error.raw_os_error() {
                // Interrupted or timed out: what was queued has been taken or stays queued,
                // which the next look at the submission queue tells.
                Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY) => {
                    self.queued = self.uring.submission().len() as u32;
                    Ok(())
                }
                _ => Err(error),
            },
        }
    }

    pub(super) fn has_completions(&mut self) -> bool {
        !self.uring.completion().is_empty() || (self.deferred && self.uring.submission().taskrun())
    }

    /// Moves completions into `batch`; entering the kernel only when it has deferred some.
    pub(super) fn reap(&mut self, batch: &mut [(u64, i32, u32)]) -> usize {
        if self.deferred && self.uring.completion().is_empty() && self.uring.submission().taskrun()
        {
            // SAFETY: no argument is passed; the call only runs the deferred completions and
            // takes what is queued, whose validity `push` has put on its caller.
            let result = unsafe {
                self.uring.submitter().enter::<libc::sigset_t>(
                    self.queued,
                    0,
                    1, // IORING_ENTER_GETEVENTS
                    None,
                )
            };
            if let Err(error) = self.settle(result) {
                log::error!("io_uring: collecting completions: {error}");
            }
        }
        let mut count = 0;
        // The batch leads: an entry taken from the queue must have a place.
        for (slot, entry) in batch.iter_mut().zip(self.uring.completion()) {
            *slot = (entry.user_data(), entry.result(), entry.flags());
            count += 1;
        }
        count
    }
}
