//! What happens far below and clients are to hear of: requests that fail, writes past a threshold.
//!
//! Those who meet such a thing serve guests, or hold locks. They leave a note, which takes no time,
//! and a thread of its own makes an event of it. Notes do not pile up: of the failed requests of an
//! export the first and the last are kept, and a threshold is crossed once.

use std::sync::{Arc, Weak};

use parking_lot::{Condvar, Mutex};
use serde_json::json;

use crate::chain::Root;
use crate::error::errno_text;
use crate::export::{OnFailure, RequestFailure};
use crate::graph::Graph;
use crate::job::{Event, EventSink};
use crate::storage::threshold::{Crossed, Listener};

/// The failures of an export's requests that have not been told.
#[derive(Debug, Default)]
struct Failures {
    first: Option<RequestFailure>,
    last: Option<RequestFailure>,
}

impl Failures {
    fn add(&mut self, failure: RequestFailure) {
        match self.first {
            None => self.first = Some(failure),
            Some(_) => self.last = Some(failure),
        }
    }

    fn take(&mut self) -> impl Iterator<Item = RequestFailure> + use<> {
        let taken = std::mem::take(self);
        taken.first.into_iter().chain(taken.last)
    }
}

/// A write past a threshold of a node of this graph.
type Past = (Crossed, Weak<Graph>);

/// What is to be told.
#[derive(Debug, Default)]
struct News {
    devices: Vec<Arc<Device>>,
    crossed: Vec<Past>,
}

/// An export whose failures are told.
#[derive(Debug)]
struct Device {
    id: String,
    /// Its disk.
    root: Weak<Root>,
    failures: Mutex<Failures>,
}

impl Device {
    /// The node that it shows; without a name if it has ended.
    fn node_name(&self) -> String {
        let root = self.root.upgrade();
        root.map_or_else(String::new, |root| root.chain().top().name.clone())
    }

    fn event(&self, failure: RequestFailure) -> Event {
        io_error(
            (&self.id, &self.node_name()),
            failure.is_write,
            failure.errno,
        )
    }
}

/// The event of a request that has failed, of an export and the node that it shows.
pub(super) fn io_error((device, node): (&str, &str), is_write: bool, errno: i32) -> Event {
    Event {
        name: "BLOCK_IO_ERROR",
        data: json!({
            "qom-path": "",
            "device": device,
            "node-name": node,
            "operation": if is_write { "write" } else { "read" },
            "action": "report",
            "nospace": errno == libc::ENOSPC,
            "reason": errno_text(errno),
        }),
    }
}

#[derive(Debug, Default)]
struct Notes {
    devices: Vec<Arc<Device>>,
    /// Some of them have failures.
    failed: bool,
    crossed: Vec<Past>,
    end: bool,
}

#[derive(Debug, Default)]
struct Shared {
    notes: Mutex<Notes>,
    changed: Condvar,
}

impl Shared {
    fn note(&self, note: impl FnOnce(&mut Notes)) {
        note(&mut self.notes.lock());
        self.changed.notify_one();
    }

    /// Waits for something to tell. `None`: the end.
    fn next(&self) -> Option<News> {
        let mut notes = self.notes.lock();
        while !notes.failed && notes.crossed.is_empty() {
            if notes.end {
                return None;
            }
            self.changed.wait(&mut notes);
        }
        let has_failed = std::mem::take(&mut notes.failed);
        Some(News {
            devices: has_failed
                .then(|| notes.devices.clone())
                .unwrap_or_default(),
            crossed: std::mem::take(&mut notes.crossed),
        })
    }
}

/// Tells clients of what happens far below.
#[derive(Debug)]
pub struct Incidents {
    shared: Arc<Shared>,
}

impl Incidents {
    /// Tells through `sink` from now on. Without a thread for it, which the log says, nothing is told.
    #[must_use]
    pub fn start(sink: EventSink) -> Self {
        let shared = Arc::<Shared>::default();
        let notes = shared.clone();
        let started = std::thread::Builder::new()
            .name("incidents".into())
            .spawn(move || {
                while let Some(news) = notes.next() {
                    for past in news.crossed {
                        sink(past_threshold(&past.0));
                        forget(&past);
                    }
                    for device in news.devices {
                        let failures = device.failures.lock().take();
                        failures.map(|one| device.event(one)).for_each(&*sink);
                    }
                }
            });
        if let Err(error) = started {
            log::error!("clients are not told of failed requests and thresholds: {error}");
        }
        Self { shared }
    }

    /// Tells of the failed requests of the export `id`, whose disk is at `root`.
    #[must_use]
    pub fn of_export(&self, id: &str, root: &Arc<Root>) -> OnFailure {
        let device = Arc::new(Device {
            id: id.to_owned(),
            root: Arc::downgrade(root),
            failures: Mutex::default(),
        });
        let list = device.clone();
        self.shared.note(|notes| {
            // Those that have ended, and of which all has been told.
            let is_used = |device: &Arc<Device>| {
                Arc::strong_count(device) > 1 || device.failures.lock().first.is_some()
            };
            notes.devices.retain(is_used);
            notes.devices.push(list);
        });
        let shared = self.shared.clone();
        OnFailure::new(move |failure| {
            device.failures.lock().add(failure);
            shared.note(|notes| notes.failed = true);
        })
    }

    /// Tells of writes past thresholds of the nodes of `graph`.
    pub(super) fn of_thresholds(&self, graph: &Arc<Graph>) -> Listener {
        let (shared, graph) = (self.shared.clone(), Arc::downgrade(graph));
        Arc::new(move |crossed| {
            let past = (crossed, graph.clone());
            shared.note(|notes| notes.crossed.push(past));
        })
    }
}

impl Drop for Incidents {
    fn drop(&mut self) {
        self.shared.note(|notes| notes.end = true);
    }
}

/// Has nobody look at a threshold any more that has been crossed.
fn forget((crossed, graph): &Past) {
    let forgotten = graph
        .upgrade()
        .map(|graph| graph.forget_crossed(&crossed.node));
    if let Some(Err(error)) = forgotten {
        log::error!("the threshold of node '{}': {error}", crossed.node);
    }
}

fn past_threshold(crossed: &Crossed) -> Event {
    Event {
        name: "BLOCK_WRITE_THRESHOLD",
        data: json!({
            "node-name": &*crossed.node,
            "amount-exceeded": crossed.exceeded,
            "write-threshold": crossed.threshold,
        }),
    }
}
