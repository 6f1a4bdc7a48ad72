//! Failed syncs that stay: told to clients, and forgotten when an operator says so.
//!
//! The thread that meets one only passes it on. A thread of its own finds out whom it concerns,
//! since the lists of nodes and exports may be in use by somebody who waits for that thread.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use super::incidents::io_error;
use super::{Exports, Served, on_this_thread, state};
use crate::chain::Layer;
use crate::error::{Error, Result, SyncFailure};
use crate::graph::Graph;
use crate::graph::Node;
use crate::job::{Event, EventSink, Refused};
use crate::state::Store;
use crate::state::record::FailedSync;
use crate::storage::syncs::{on_failure, on_removal};
use crate::storage::{Identity, Syncs, is_same_file};

/// A flush that has failed, since which all flushes of its file fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncError {
    /// The node that is in the file.
    pub node_name: String,
    /// The file.
    pub filename: String,
    /// It failed for lack of space.
    pub no_space: bool,
    /// When and why it failed, what that means and what to do.
    pub description: String,
}

/// The syncs that a flush of a layer needs.
pub(super) fn syncs_of(layer: &Layer) -> Vec<Arc<Syncs>> {
    layer.storages().into_iter().map(Syncs::of).collect()
}

/// What the thread is sent.
enum Message {
    Failed(Arc<Syncs>, SyncFailure),
    /// The file is there no more, and nobody needs it.
    Removed(Arc<Syncs>, SyncFailure),
    /// The daemon has ended.
    End,
}

/// Records failures, from its making to the daemon's end, and tells the clients of them as soon as
/// there can be some.
pub struct Watch {
    messages: Sender<Message>,
    sink: Arc<OnceLock<EventSink>>,
    /// Told by the thread when it has ended.
    ended: Receiver<()>,
}

impl Watch {
    /// From now on failures are recorded in `store`.
    ///
    /// # Errors
    /// When there can be no thread for it.
    pub fn start(
        graph: &Arc<Graph>,
        exports: &Arc<Exports>,
        store: Option<Arc<Store>>,
    ) -> Result<Self> {
        let (messages, received) = channel();
        let (end, ended) = channel();
        let (graph, exports) = (Arc::downgrade(graph), Arc::downgrade(exports));
        let sink: Arc<OnceLock<EventSink>> = Arc::default();
        let told = sink.clone();
        std::thread::Builder::new()
            .name("sync-errors".into())
            .spawn(move || {
                while let Ok(message) = received.recv() {
                    let (syncs, failure) = match message {
                        Message::Failed(syncs, failure) => (syncs, failure),
                        Message::Removed(syncs, failure) => {
                            let gone = state::failed_sync(&failure, syncs.identity());
                            store.iter().for_each(|store| forget(store, &gone));
                            continue;
                        }
                        Message::End => break,
                    };
                    if let Some(store) = &store {
                        record(store, &failure, syncs.identity());
                    }
                    if let Some(tell) = told.get() {
                        for event in events(&graph, &exports, &syncs, &failure) {
                            tell(event);
                        }
                    }
                }
                if let Some(Err(error)) = store.map(|store| store.finish()) {
                    log::error!("the next process does not know all: {error}");
                }
                // Nobody waits if the end took too long.
                let _ = end.send(());
            })
            .map_err(|error| Error::Invalid(format!("starting: {error}")))?;
        let failures = messages.clone();
        let removals = messages.clone();
        on_removal(move |syncs, failure| {
            let _ = removals.send(Message::Removed(syncs.clone(), failure.clone()));
        });
        on_failure(move |syncs, failure| {
            // Nobody listens any more when the daemon has ended.
            let _ = failures.send(Message::Failed(syncs.clone(), failure.clone()));
        });
        Ok(Self {
            messages,
            sink,
            ended,
        })
    }

    /// From now on clients are told through `sink`.
    pub fn tell(&self, sink: EventSink) {
        let _ = self.sink.set(sink);
    }

    /// Waits until what has failed so far is recorded, and with it all else that could not be
    /// recorded before; for as long as `patience` at most, since that disk may hang, too.
    pub fn finish(self, patience: Duration) {
        let ended = self.messages.send(Message::End).is_ok();
        if !ended || self.ended.recv_timeout(patience).is_err() {
            log::error!("flushes that failed may not be known to the next process");
        }
    }
}

/// Records a failure: the next process does not know of it otherwise, and the kernel tells of it
/// no more.
fn record(store: &Store, failure: &SyncFailure, identity: Identity) {
    let failed = state::failed_sync(failure, identity);
    let recorded = store.happened(|state| {
        state.failed_syncs.retain(|other| !is_same(other, &failed));
        state.failed_syncs.push(failed);
    });
    if let Err(error) = recorded {
        log::error!("a failed flush is not known to the next process yet: {error}");
    }
}

/// Forgets the failure of a new file that was not needed, and was removed.
fn forget(store: &Store, gone: &FailedSync) {
    let recorded = store.happened(|state| state.failed_syncs.retain(|mark| !is_same(mark, gone)));
    if let Err(error) = recorded {
        let file = &gone.file;
        log::warn!("a flush of '{file}', which is gone, is still recorded as failed: {error}");
    }
}

/// Whether both records are about the same file.
fn is_same(one: &FailedSync, other: &FailedSync) -> bool {
    is_same_file(
        (Path::new(&one.file), one.identity),
        (Path::new(&other.file), other.identity),
    )
}

/// An event for each export whose flushes fail, or one without a device.
fn events(
    graph: &Weak<Graph>,
    exports: &Weak<Exports>,
    syncs: &Arc<Syncs>,
    failure: &SyncFailure,
) -> Vec<Event> {
    let (Some(graph), Some(exports)) = (graph.upgrade(), exports.upgrade()) else {
        return Vec::new();
    };
    let concerned = |node: &Node| {
        let all = syncs_of(&node.layer);
        all.iter().any(|own| Arc::ptr_eq(own, syncs))
    };
    let event = |device: &str, node: &str| io_error((device, node), true, failure.errno);
    let served: Vec<Event> = exports
        .list()
        .iter()
        .filter_map(
            |Served {
                 options, export, ..
             }| {
                let state = graph.state();
                let chains = state.suppliers(&export.node_name()).ok()?;
                let node = chains.iter().flatten().find(|node| concerned(node))?;
                Some(event(&options.id, &node.name))
            },
        )
        .collect();
    if !served.is_empty() {
        return served;
    }
    let nodes = graph.nodes();
    let mut found = nodes.iter().filter(|node| concerned(node));
    let first = found.clone().next();
    let image = found.find(|node| !node.is_file()).or(first);
    image
        .map(|node| event("", &node.name))
        .into_iter()
        .collect()
}

/// The syncs of each node that supplies bytes of a node's image, top first. Nodes in one file have the same.
fn chain_syncs(graph: &Graph, name: &str) -> Result<Vec<(String, Arc<Syncs>)>> {
    let state = graph.state();
    let mut all: Vec<(String, Arc<Syncs>)> = Vec::new();
    for node in state.suppliers(name)?.into_iter().flatten() {
        for syncs in syncs_of(&node.layer) {
            if !all.iter().any(|(_, other)| Arc::ptr_eq(other, &syncs)) {
                all.push((node.name.clone(), syncs));
            }
        }
    }
    Ok(all)
}

/// The failures in the chain of a node's image, top first.
pub fn of(graph: &Graph, name: &str) -> Vec<SyncError> {
    // A node that has gone meanwhile has none.
    let all = chain_syncs(graph, name).unwrap_or_default();
    all.into_iter()
        .filter_map(|(node_name, syncs)| {
            let failure = syncs.failure()?;
            Some(SyncError {
                node_name,
                no_space: failure.errno == libc::ENOSPC,
                description: failure.to_string(),
                filename: failure.file,
            })
        })
        .collect()
}

/// Lets the flushes of a node's image, and of those under it, be tried again, in the next process
/// as well.
///
/// # Errors
/// When there is no such node, none of these flushes has failed, or that cannot be recorded.
pub fn clear(graph: &Graph, name: &str, store: Option<&Store>) -> std::result::Result<(), Refused> {
    let all = chain_syncs(graph, name).map_err(|error| Refused(error.to_string()))?;
    if let Some(store) = store {
        let failed = all.iter().filter_map(|(_, syncs)| {
            let failure = syncs.failure()?;
            Some(state::failed_sync(&failure, syncs.identity()))
        });
        let failed: Vec<_> = failed.collect();
        store.change(|state| {
            let is_cleared = |mark: &FailedSync| failed.iter().any(|own| is_same(own, mark));
            state.failed_syncs.retain(|mark| !is_cleared(mark));
        })?;
    }
    let mut cleared = 0;
    for (node, syncs) in &all {
        if let Some(failure) = syncs.clear() {
            log::warn!("node '{node}': an operator lets flushes be tried again after: {failure}");
            cleared += 1;
        }
    }
    lower(graph, all.iter().map(|(node, _)| node.as_str()));
    match (cleared, all.first()) {
        (0, Some((node, _))) => Err(Refused(format!("No flush of node '{node}' has failed"))),
        _ => Ok(()),
    }
}

/// Gives images back to their readers, which failed as long as their flushes did.
fn lower<'n>(graph: &Graph, nodes: impl Iterator<Item = &'n str>) {
    let lowered = on_this_thread(|reactor| {
        for node in nodes {
            if let Err(error) = reactor.block_on(graph.lower_image(node)) {
                log::warn!("node '{node}': back to read-only: {error}");
            }
        }
        Ok(())
    });
    if let Err(error) = lowered {
        log::warn!("images whose flushes had failed stay writable: {error}");
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a failure that no client is told of, or with the wrong node; one that
    //! a word for another node clears, or that goes on after it was cleared; one of a layer that a
    //! word for the disk above it does not reach, or a query for the disk does not show.

    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::path::PathBuf;

    use serde_json::json;

    use super::*;
    use crate::format::{Format, Raw};
    use crate::options::{BlockdevOptions, Dialect};
    use crate::reactor::Reactor;
    use crate::storage::fault::FaultStorage;
    use crate::storage::memory::MemoryStorage;

    /// A file behind a page cache.
    type Cached = FaultStorage<MemoryStorage>;

    fn cached() -> Arc<Cached> {
        let bytes = Arc::new(MemoryStorage::new(vec![0; 512]));
        Arc::new(FaultStorage::over(bytes).with_page_cache())
    }

    /// Adds a node to the graph, and returns its file.
    fn add(
        graph: &Graph,
        driver: &'static str,
        name: &str,
        file: Option<&Arc<Cached>>,
    ) -> Arc<Cached> {
        let storage = file.cloned().unwrap_or_else(cached);
        let mut options = json!({"driver": driver, "node-name": name});
        match driver {
            "file" => options["filename"] = json!("/disk"),
            _ => options["file"] = json!({"driver": "file", "filename": "/disk"}),
        }
        let layer = Layer {
            name: name.to_owned(),
            format: Format::Raw(Raw::new(512)),
            storage: storage.clone(),
            read_only: false,
            discard: true,
            copy_on_read: false,
        };
        let options = BlockdevOptions::from_value(&options, Dialect::Json).unwrap();
        let node = Node::new(options, layer, PathBuf::from("/disk"));
        graph.add(node).unwrap();
        storage
    }

    #[test]
    fn a_failure_is_told_and_stays_until_it_is_cleared() {
        let (graph, exports) = (Arc::default(), Arc::default());
        add(
            &graph,
            "file",
            "f",
            Some(&add(&graph, "raw", "other", None)),
        );
        let file = add(&graph, "file", "g", None);
        add(&graph, "raw", "disk", Some(&file));
        let watch = Watch::start(&graph, &exports, None).unwrap();
        let (sender, events) = channel();
        watch.tell(Arc::new(move |event| drop(sender.send(event))));
        let reactor = Reactor::for_this_thread().unwrap();
        let flush = |name: &str| {
            let layer = graph.node(name).unwrap().layer;
            reactor.block_on(layer.flush())
        };
        flush("disk").unwrap();
        file.inner().fail_syncs(true);
        let text = flush("disk").unwrap_err().to_string();
        assert!(text.starts_with("memory: a flush failed at 2"), "{text}");
        file.inner().fail_syncs(false);
        flush("disk").unwrap_err();
        flush("other").unwrap();

        let event = events.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(event.name, "BLOCK_IO_ERROR");
        let data = json!({"qom-path": "", "device": "", "node-name": "disk",
            "operation": "write", "action": "report", "nospace": false,
            "reason": "Input/output error"});
        assert_eq!(event.data, data);

        let refused = clear(&graph, "other", None).unwrap_err().0;
        assert_eq!(refused, "No flush of node 'other' has failed");
        assert!(clear(&graph, "nothing", None).is_err());
        flush("disk").unwrap_err();
        clear(&graph, "disk", None).unwrap();
        flush("disk").unwrap();
        clear(&graph, "disk", None).unwrap_err();
        watch.finish(Duration::from_secs(20));
        // One event for one failure.
        assert!(events.try_recv().is_err());
        Reactor::leave_thread();
    }

    #[test]
    fn a_failure_of_a_lower_layer_is_one_of_the_disk() {
        let graph = Graph::default();
        let base = add(&graph, "raw", "base", None);
        add(&graph, "raw", "top", None);
        graph.set_backing("top", Some("base")).unwrap();
        let reactor = Reactor::for_this_thread().unwrap();
        let flush = || reactor.block_on(graph.node("base").unwrap().layer.flush());
        base.inner().fail_syncs(true);
        flush().unwrap_err();
        base.inner().fail_syncs(false);
        let found = of(&graph, "top");
        let [error] = found.as_slice() else {
            panic!("{found:?}");
        };
        assert_eq!(
            (error.node_name.as_str(), error.filename.as_str()),
            ("base", "memory")
        );
        assert!(!error.no_space && error.description.contains("stratactl clear-sync-error"));
        clear(&graph, "top", None).unwrap();
        flush().unwrap();
        assert_eq!(of(&graph, "top"), []);
        let refused = clear(&graph, "top", None).unwrap_err().0;
        assert_eq!(refused, "No flush of node 'top' has failed");
        Reactor::leave_thread();
    }
}
