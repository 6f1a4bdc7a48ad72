//! What happens far below and clients are to hear of: requests that fail, writes past a threshold,
//! images that contradict themselves. The latter are marked as well, on a thread for each: their storage
//! may take long.
//!
//! Those who meet such a thing serve guests, or hold locks. They leave a note, which takes no time,
//! and a thread of its own makes an event of it. Notes do not pile up: of the failed requests of an
//! export the first and the last are kept, and the others happen once for each threshold or image.

use std::sync::{Arc, Weak};

use parking_lot::{Condvar, Mutex};
use serde_json::json;

use super::{Exports, Served, on_this_thread};
use crate::chain::Root;
use crate::error::errno_text;
use crate::export::{OnFailure, RequestFailure};
use crate::format::qcow2::soundness::Corruption;
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

/// A contradiction in an image of this graph, whose top is served by one of these.
type Corrupt = (Corruption, Weak<Graph>, Weak<Exports>);

/// What is to be told.
#[derive(Debug, Default)]
struct News {
    devices: Vec<Arc<Device>>,
    crossed: Vec<Past>,
    corrupt: Vec<Corrupt>,
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
    corrupt: Vec<Corrupt>,
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
        while !notes.failed && notes.crossed.is_empty() && notes.corrupt.is_empty() {
            if notes.end {
                return None;
            }
            self.changed.wait(&mut notes);
        }
        let has_failed = std::mem::take(&mut notes.failed);
        Some(News {
            devices: match has_failed {
                true => notes.devices.clone(),
                false => Vec::new(),
            },
            crossed: std::mem::take(&mut notes.crossed),
            corrupt: std::mem::take(&mut notes.corrupt),
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
                    for corrupt in news.corrupt {
                        sink(contradiction(&corrupt));
                        mark(corrupt);
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

impl Incidents {
    /// Tells of images of `graph` that contradict themselves, and marks those that are lost. Can be
    /// said once for a graph.
    pub fn of_images(&self, graph: &Arc<Graph>, exports: &Arc<Exports>) {
        let shared = self.shared.clone();
        let (of, exports) = (Arc::downgrade(graph), Arc::downgrade(exports));
        graph.on_corruption(move |corruption| {
            let corrupt = (corruption, of.clone(), exports.clone());
            shared.note(|notes| notes.corrupt.push(corrupt));
        });
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

/// The event of an image that contradicts itself: of the export whose guest writes it, or of none.
fn contradiction((corruption, graph, exports): &Corrupt) -> Event {
    let device = graph.upgrade().zip(exports.upgrade());
    let device = device.and_then(|(graph, exports)| {
        let state = graph.state();
        let is_its_top = |served: &Served| {
            let top = state.image_node(&served.export.node_name());
            top.is_ok_and(|top| *top.name == *corruption.node)
        };
        let served = exports.list().into_iter().find(is_its_top)?;
        Some(served.options.id)
    });
    let mut data = json!({
        "device": device.unwrap_or_default(),
        "node-name": &*corruption.node,
        "msg": corruption.message,
        "fatal": corruption.fatal,
    });
    if let (Some(members), Some((offset, size))) = (data.as_object_mut(), corruption.place) {
        members.insert("offset".to_owned(), offset.into());
        members.insert("size".to_owned(), size.into());
    }
    Event {
        name: "BLOCK_IMAGE_CORRUPTED",
        data,
    }
}

/// Has an image that is lost say so in its header.
fn mark((corruption, graph, _): Corrupt) {
    if !corruption.fatal {
        return;
    }
    let thread = std::thread::Builder::new().name("mark-corrupt".into());
    let marking = thread.spawn(move || {
        let Some(graph) = graph.upgrade() else { return };
        let node = &corruption.node;
        if let Err(error) = on_this_thread(|reactor| reactor.block_on(graph.mark_corrupt(node))) {
            log::error!("node '{node}' is corrupt, and its header does not say so: {error}");
        }
    });
    if let Err(error) = marking {
        log::error!("a thread for a corrupt image: {error}");
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
