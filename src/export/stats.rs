//! Counters of a queue: written by its worker alone, read by whoever asks.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`. Only the owner may call it: a plain load and store, no locked instruction.
    pub fn add(&self, count: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed) + count, Ordering::Relaxed);
    }

    /// The value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a queue has done since the export began. On cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct QueueStats {
    /// Requests that read.
    pub reads: Counter,
    /// Bytes read.
    pub read_bytes: Counter,
    /// Requests that wrote.
    pub writes: Counter,
    /// Bytes written.
    pub write_bytes: Counter,
    /// Flushes.
    pub flushes: Counter,
    /// Discards and requests to write zeros.
    pub discards: Counter,
    /// Requests answered with an error.
    pub errors: Counter,
    /// Requests that needed a task of their own.
    pub slow: Counter,
    /// Signals sent to the driver.
    pub signals: Counter,
    /// Times that the worker slept.
    pub sleeps: Counter,
    /// Requests that a queue which is being given back still waits for.
    pub unfinished: AtomicU32,
    /// The worker's thread, as the kernel numbers it.
    pub thread: AtomicI32,
    /// Times that the worker's ring entered the kernel, up to when it last slept.
    pub enters: Counter,
    /// Polls before a sleep that found work.
    pub polls_found: Counter,
    /// Polls before a sleep that found none.
    pub polls_missed: Counter,
    /// Nanoseconds that the polls took, as far as the clock was read: what found work within its
    /// first looks counts as nothing.
    pub poll_ns: Counter,
}

impl QueueStats {
    /// Requests of every kind that were answered.
    #[must_use]
    pub fn requests(&self) -> u64 {
        [&self.reads, &self.writes, &self.flushes, &self.discards]
            .map(Counter::get)
            .into_iter()
            .sum()
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: two workers that write to one cache line.

    use std::sync::Arc;

    use super::*;

    #[test]
    fn no_two_queues_share_a_cache_line() {
        // Processors fetch lines of 64 bytes in pairs.
        const LINE: usize = 128;
        assert_eq!(align_of::<QueueStats>(), LINE);
        assert!(size_of::<QueueStats>().is_multiple_of(LINE));
        let queues: Vec<_> = (0..4).map(|_| Arc::new(QueueStats::default())).collect();
        for stats in &queues {
            assert!(Arc::as_ptr(stats).addr().is_multiple_of(LINE));
        }
    }
}
