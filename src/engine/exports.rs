//! The exports: what guests are served, and what they have asked for.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;

use crate::control::backend::{Export as ExportView, ExportStats, QueueStats as QueueView};
use crate::export::{Export, QueueStats};
use crate::options::ExportOptions;
use crate::sched;

/// The exports of the daemon.
#[derive(Debug, Default)]
pub struct Exports {
    list: Mutex<Vec<(Arc<Export>, ExportOptions)>>,
}

impl Exports {
    /// Adds one that serves.
    pub fn add(&self, export: Export, options: ExportOptions) {
        self.list.lock().push((Arc::new(export), options));
    }

    /// All exports, each with its options.
    #[must_use]
    pub fn all(&self) -> Vec<(Arc<Export>, ExportOptions)> {
        self.list.lock().clone()
    }

    /// All exports, for queries.
    #[must_use]
    pub fn list(&self) -> Vec<ExportView> {
        self.list
            .lock()
            .iter()
            .map(|(export, options)| ExportView {
                id: options.id.clone(),
                kind: "vhost-user-blk".to_owned(),
                node_name: options.node_name.clone(),
                shutting_down: export.info().shutting_down,
            })
            .collect()
    }

    /// The counters of all exports, for queries.
    #[must_use]
    pub fn stats(&self) -> Vec<ExportStats> {
        self.list
            .lock()
            .iter()
            .map(|(export, options)| ExportStats {
                id: options.id.clone(),
                node_name: options.node_name.clone(),
                elapsed_ns: nanoseconds(export.elapsed()),
                poll_max_ns: nanoseconds(export.poll_max()),
                queues: export.stats().iter().map(|queue| view(queue)).collect(),
            })
            .collect()
    }

    /// The requests that guests have made so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        let exports = self.list.lock();
        let queues = exports.iter().flat_map(|(export, _)| export.stats());
        queues.map(|queue| queue.requests()).sum()
    }

    /// How long the threads that serve guests have been ready to run without a processor.
    #[must_use]
    pub fn waited(&self) -> Duration {
        let exports = self.list.lock();
        let queues = exports.iter().flat_map(|(export, _)| export.stats());
        queues
            .filter_map(|queue| sched::waited(queue.thread.load(Ordering::Relaxed)))
            .sum()
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// A queue's counters as they are now.
fn view(queue: &QueueStats) -> QueueView {
    QueueView {
        thread_id: queue.thread.load(Ordering::Relaxed),
        reads: queue.reads.get(),
        read_bytes: queue.read_bytes.get(),
        writes: queue.writes.get(),
        write_bytes: queue.write_bytes.get(),
        flushes: queue.flushes.get(),
        discards: queue.discards.get(),
        errors: queue.errors.get(),
        slow: queue.slow.get(),
        signals: queue.signals.get(),
        sleeps: queue.sleeps.get(),
        enters: queue.enters.get(),
        polls_found: queue.polls_found.get(),
        polls_missed: queue.polls_missed.get(),
        poll_ns: queue.poll_ns.get(),
    }
}
