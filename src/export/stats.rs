//! Counters of a queue: written by its worker alone, read by any thread.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

use crate::storage::silence::LastEnd;

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

/// Defines [`QueueStats`]: a line for each counter, with the name that clients know it by.
macro_rules! queue_stats {
    ($($(#[$doc:meta])* $field:ident: $name:literal,)*) => {
        /// What a queue has done since the export began. On cache lines of its own.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct QueueStats {
            $($(#[$doc])* pub $field: Counter,)*
            /// Requests that a queue which is being given back still waits for.
            pub unfinished: AtomicU32,
            /// The worker's thread, as the kernel numbers it.
            pub thread: AtomicI32,
            /// When requests were last answered while a sync was under way, as the worker saw when it
            /// went to sleep or let others run.
            pub last_end: LastEnd,
        }

        impl QueueStats {
            /// All counters: their names and values.
            pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$(($name, self.$field.get()),)*].into_iter()
            }
        }
    };
}

queue_stats! {
    /// Requests that read.
    reads: "reads",
    /// Bytes read.
    read_bytes: "read-bytes",
    /// Requests that wrote.
    writes: "writes",
    /// Bytes written.
    write_bytes: "write-bytes",
    /// Flushes.
    flushes: "flushes",
    /// Discards and requests to write zeros.
    discards: "discards",
    /// Requests answered with an error.
    errors: "errors",
    /// Requests that needed a task of their own.
    slow: "slow",
    /// Signals sent to the driver.
    signals: "signals",
    /// Times that the worker slept.
    sleeps: "sleeps",
    /// Times that the worker's ring entered the kernel, up to when it last slept.
    enters: "enters",
    /// Polls before a sleep that found work.
    polls_found: "polls-found",
    /// Polls before a sleep that found none.
    polls_missed: "polls-missed",
    /// Nanoseconds that the polls took, as far as the clock was read: what found work within its
    /// first looks counts as nothing.
    poll_ns: "poll-ns",
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
