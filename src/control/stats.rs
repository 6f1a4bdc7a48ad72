//! What guests have asked of the exports, told to clients: `query-blockstats`.

use serde_json::{Value, json};

/// What an export's guests have asked of it since it began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportStats {
    /// Its id.
    pub id: String,
    /// The node it serves.
    pub node_name: String,
    /// How long it has been counting, in nanoseconds.
    pub elapsed_ns: u64,
    /// The longest time that a queue looks for work before it sleeps, in nanoseconds.
    pub poll_max_ns: u64,
    /// Its queues, in their order.
    pub queues: Vec<QueueStats>,
}

/// What one queue has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Its thread, as the kernel numbers it.
    pub thread_id: i32,
    /// Requests that read.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Requests that wrote.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards and requests to write zeros.
    pub discards: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Requests that needed a task of their own.
    pub slow: u64,
    /// Signals sent to the driver.
    pub signals: u64,
    /// Times that the thread slept.
    pub sleeps: u64,
    /// Times that the thread entered the kernel for I/O or to wait.
    pub enters: u64,
    /// Polls that found work.
    pub polls_found: u64,
    /// Polls that found none.
    pub polls_missed: u64,
    /// How long it has polled, in nanoseconds.
    pub poll_ns: u64,
}

impl ExportStats {
    /// The export as an item of `query-blockstats`.
    pub(super) fn to_value(&self) -> Value {
        json!({
            "device": self.id,
            "node-name": self.node_name,
            "stats": self.device_stats(),
            "elapsed-ns": self.elapsed_ns,
            "poll-max-ns": self.poll_max_ns,
            "queues": self.queues.iter().map(|queue| self.queue(queue)).collect::<Value>(),
        })
    }

    /// The members that QEMU's clients expect, all of them: typed ones refuse an answer that lacks
    /// one. What is not counted here is 0.
    fn device_stats(&self) -> Value {
        let sum = |count: fn(&QueueStats) -> u64| self.queues.iter().map(count).sum::<u64>();
        json!({
            "rd_bytes": sum(|queue| queue.read_bytes),
            "rd_operations": sum(|queue| queue.reads),
            "wr_bytes": sum(|queue| queue.write_bytes),
            "wr_operations": sum(|queue| queue.writes),
            "flush_operations": sum(|queue| queue.flushes),
            "unmap_operations": sum(|queue| queue.discards),
            "unmap_bytes": 0,
            "zone_append_bytes": 0,
            "zone_append_operations": 0,
            "rd_total_time_ns": 0,
            "wr_total_time_ns": 0,
            "flush_total_time_ns": 0,
            "unmap_total_time_ns": 0,
            "zone_append_total_time_ns": 0,
            "rd_merged": 0,
            "wr_merged": 0,
            "unmap_merged": 0,
            "zone_append_merged": 0,
            "wr_highest_offset": 0,
            "failed_rd_operations": 0,
            "failed_wr_operations": 0,
            "failed_flush_operations": 0,
            "failed_unmap_operations": 0,
            "failed_zone_append_operations": 0,
            "invalid_rd_operations": 0,
            "invalid_wr_operations": 0,
            "invalid_flush_operations": 0,
            "invalid_unmap_operations": 0,
            "invalid_zone_append_operations": 0,
            "account_invalid": false,
            "account_failed": false,
            "timed_stats": [],
        })
    }

    fn queue(&self, queue: &QueueStats) -> Value {
        json!({
            "thread-id": queue.thread_id,
            "reads": queue.reads,
            "read-bytes": queue.read_bytes,
            "writes": queue.writes,
            "write-bytes": queue.write_bytes,
            "flushes": queue.flushes,
            "discards": queue.discards,
            "errors": queue.errors,
            "slow": queue.slow,
            "signals": queue.signals,
            "sleeps": queue.sleeps,
            "enters": queue.enters,
            "polls-found": queue.polls_found,
            "polls-missed": queue.polls_missed,
            "poll-ns": queue.poll_ns,
            "poll-share": share(queue.poll_ns, self.elapsed_ns),
        })
    }
}

/// How much of `total` it is, from 0 to 1.
fn share(part: u64, total: u64) -> f64 {
    if total == 0 {
        return 0.0;
    }
    (part as f64 / total as f64).min(1.0)
}
