//! The io_uring itself: set-up with the best flags the kernel has, queueing, waiting.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, squeue};

use super::uring;

/// How many entries a ring has.
#[derive(Clone, Copy)]
struct Size {
    /// Of operations between two system calls.
    entries: u32,
    /// Of completions that were not looked at yet. The kernel keeps those beyond in a list of its
    /// own, so that none is lost.
    completions: u32,
}

/// From the best to the smallest. The kernel wants memory for each of the two queues that is
/// contiguous: the first size is 32 KiB and 128 KiB, the second twice 32 KiB, which it goes to
/// lengths to provide, the last two pages. A host that has been up for long has no larger pieces
/// though much of its memory is free, and fails with ENOMEM at once (Linux up to 7.1, liburing
/// issue 1614). The limit of locked memory has the same effect.
const SIZES: [Size; 4] = [
    Size::of(512, 4096),
    Size::of(512, 1024),
    Size::of(128, 512),
    Size::of(32, 64),
];

/// How often a ring is tried to be made while there is no memory, and how long after the last time:
/// a second in all. What is to be made stable at the end of a disk needs one.
const TRIES: u32 = 50;
const BETWEEN_TRIES: Duration = Duration::from_millis(20);

impl Size {
    const fn of(entries: u32, completions: u32) -> Self {
        Self {
            entries,
            completions,
        }
    }
}

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
    /// A ring of the largest size that the kernel has memory for.
    ///
    /// # Errors
    /// Whatever `io_uring_setup(2)` reports, with what to look at.
    pub(super) fn new() -> io::Result<Self> {
        for _ in 0..TRIES {
            match Self::of_any_size() {
                // The memory of rings that have ended is given back a little later.
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                    std::thread::sleep(BETWEEN_TRIES);
                }
                Err(error) => return Err(uring::refused(&error)),
                Ok(ring) => return Ok(ring),
            }
        }
        Self::of_any_size().map_err(|error| uring::refused(&error))
    }

    fn of_any_size() -> io::Result<Self> {
        let [best, ..] = SIZES;
        for (refused, size) in SIZES.into_iter().enumerate() {
            match Self::of_size(size) {
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {}
                Ok(ring) if refused > 0 => {
                    log::info!(
                        "io_uring: no memory for {} entries and {} completions, made one of {} and \
                         {}: deep queues cost more system calls",
                        best.entries,
                        best.completions,
                        size.entries,
                        size.completions
                    );
                    return Ok(ring);
                }
                made => return made,
            }
        }
        Err(io::Error::from_raw_os_error(libc::ENOMEM))
    }

    fn of_size(size: Size) -> io::Result<Self> {
        let mut plain = IoUring::builder();
        plain.setup_cqsize(size.completions);
        let mut best = plain.clone();
        best.setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag();
        let (uring, deferred) = match uring::build(&best, size.entries) {
            // Kernels before 6.1 know none of the flags.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (uring::build(&plain, size.entries)?, false)
            }
            made => (made?, true),
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

#[cfg(test)]
mod tests {
    //! What would be caught: a completion that is lost in a small ring. (It hangs then, and ends by
    //! the deadline of the runner.)

    use super::*;

    #[test]
    fn the_smallest_ring_loses_no_completion() {
        let [.., smallest] = SIZES;
        let mut ring = Ring::of_size(smallest).unwrap();
        // Far more than there is room for, none of which is looked at before all are begun.
        const OPERATIONS: u64 = 1000;
        for number in 0..OPERATIONS {
            let entry = io_uring::opcode::Nop::new().build().user_data(number);
            // SAFETY: an operation that does nothing points at no memory.
            unsafe { ring.push(&entry) }.unwrap();
        }
        let mut seen = Vec::new();
        while seen.len() < OPERATIONS as usize {
            ring.wait(None).unwrap();
            let mut batch = [(0, 0, 0); 64];
            loop {
                let count = ring.reap(&mut batch);
                seen.extend(batch[..count].iter().map(|(number, ..)| *number));
                if count == 0 {
                    break;
                }
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, Vec::from_iter(0..OPERATIONS));
    }
}
