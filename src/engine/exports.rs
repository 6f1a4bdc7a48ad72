//! The exports: what guests are served.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;

use crate::export::Export;
use crate::graph::Grant;
use crate::options::ExportOptions;
use crate::sched;

/// An export, and what it was made with.
#[derive(Clone, Debug)]
pub struct Served {
    /// The export.
    pub export: Arc<Export>,
    /// What it was made with.
    pub options: ExportOptions,
    /// What it may do with its node.
    pub grant: Arc<Grant>,
}

/// All exports.
#[derive(Debug, Default)]
pub struct Exports {
    list: Mutex<Vec<Served>>,
}

impl Exports {
    /// Adds one that serves.
    pub fn add(&self, export: Export, options: ExportOptions, grant: Grant) {
        let (export, grant) = (Arc::new(export), Arc::new(grant));
        let served = Served {
            export,
            options,
            grant,
        };
        self.list.lock().push(served);
    }

    /// All exports as they are now, in the order of their making.
    #[must_use]
    pub fn list(&self) -> Vec<Served> {
        self.list.lock().clone()
    }

    /// The requests that guests have made so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        let exports = self.list.lock();
        let queues = exports.iter().flat_map(|served| served.export.stats());
        queues.map(|queue| queue.requests()).sum()
    }

    /// How long the threads that serve guests have been ready to run without a processor.
    #[must_use]
    pub fn waited(&self) -> Duration {
        let exports = self.list.lock();
        let queues = exports.iter().flat_map(|served| served.export.stats());
        queues
            .filter_map(|queue| sched::waited(queue.thread.load(Ordering::Relaxed)))
            .sum()
    }
}
