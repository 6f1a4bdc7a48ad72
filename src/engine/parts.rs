//! What is to end, and in which order: jobs and exports, then the images that they use, and the
//! control `sockets` when clients have heard how their jobs ended.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::ending::{Activity, Part};
use super::sync_errors::syncs_of;
use super::{Exports, Served, on_this_thread};
use crate::chain::Layer;
use crate::error::{Error, Result};
use crate::export::Export;
use crate::graph::Graph;
use crate::graph::Node;
use crate::job::Manager;
use crate::storage::Syncs;

/// The parts of the daemon's end. From here on no job begins.
pub fn of(
    graph: &Arc<Graph>,
    exports: &Exports,
    jobs: Option<&Manager>,
    sockets: Option<Box<dyn FnMut() + Send>>,
) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut all_served = Vec::new();
    let mut users = Vec::new();
    let mut written = BTreeSet::new();
    let jobs = jobs.map(Manager::close);
    exports.close();
    // Only now: no job changes it any more, apart from those that end here.
    let nodes = graph.nodes();
    for job in jobs.into_iter().flatten() {
        let name = format!("job '{}'", job.id);
        let uses = job.nodes.iter().flat_map(|node| images_of(&nodes, node));
        users.push((name.clone(), uses.collect::<BTreeSet<_>>()));
        written.extend(job.nodes.iter().cloned());
        let what = format!("{name} does not end, its images are not closed");
        let mut job = Some(job);
        parts.push(Part {
            name,
            after: Vec::new(),
            work: Box::new(move |_| {
                if let Some(job) = job.take() {
                    job.wait();
                }
                Ok(())
            }),
            storage: None,
            abandoned: Box::new(move || what.clone()),
        });
    }
    if let Some(mut shut_down) = sockets {
        parts.push(Part {
            name: "control sockets".to_owned(),
            after: users.iter().map(|(job, _)| job.clone()).collect(),
            work: Box::new(move |_| {
                shut_down();
                Ok(())
            }),
            storage: None,
            abandoned: Box::new(|| "the control sockets do not end".to_owned()),
        });
    }
    for served in exports.list() {
        let Served {
            export, options, ..
        } = &served;
        let name = format!("export '{}'", options.id);
        let uses = images_of(&nodes, &export.node_name());
        all_served.push((export.clone(), uses.clone()));
        users.push((name.clone(), uses));
        let (ending, stuck, what) = (served.clone(), export.clone(), name.clone());
        parts.push(Part {
            name,
            after: Vec::new(),
            work: Box::new(move |_| {
                let removed = !ending.begin_to_end();
                ending.export.shutdown();
                if removed {
                    // Its image is given back to the readers then.
                    ending.wait_for_end(None);
                }
                Ok(())
            }),
            storage: None,
            abandoned: Box::new(move || {
                let left = stuck.unfinished();
                format!("{what}: {left} requests have not completed, its images are not closed")
            }),
        });
    }
    let (state, mut images) = (graph.state(), Vec::new());
    for node in nodes {
        // A filter is the image that it is over: two threads would close the same one. What is
        // only read has nothing to close; but a job may be about to close what it has written.
        let is_written = !node.layer.read_only || written.contains(&node.name);
        if !node.is_filter() && is_written {
            // What is laid out in an image is closed before it.
            let under = state.disks_under(&node).into_iter();
            users.push((
                image_name(&node),
                under.map(|disk| disk.name.clone()).collect(),
            ));
            images.push(node);
        }
    }
    parts.extend(images.into_iter().map(|node| {
        let exports = all_served
            .iter()
            .filter(|(_, uses)| uses.contains(&node.name));
        let exports = exports.map(|(export, _)| export.clone()).collect();
        image(graph, node, &users, exports)
    }));
    parts
}

/// What an image is stored in, and who serves it.
struct Storages {
    disks: Vec<Arc<Layer>>,
    exports: Vec<Arc<Export>>,
}

impl Activity for Storages {
    fn is_syncing(&self) -> bool {
        let mut syncs = self.disks.iter().flat_map(|disk| syncs_of(disk));
        syncs.any(|syncs| syncs.is_under_way())
    }

    /// What the kernel answers of a file that is in its memory is no sign of life: calls that
    /// have ended do not count.
    fn silent_for(&self) -> Duration {
        let storages = self.disks.iter().flat_map(|disk| disk.storages());
        let since =
            storages.filter_map(|storage| Syncs::of(storage).silent_since(storage.call_since()));
        let Some(since) = since.min() else {
            return Duration::ZERO;
        };
        let queues = self.exports.iter().flat_map(|export| export.stats());
        let answered = queues.filter_map(|queue| queue.last_end.at()).max();
        answered
            .map_or(since, |answered| answered.max(since))
            .elapsed()
    }
}

/// The image of a node, which is closed after those of `users` that use it, `exports` among them.
fn image(
    graph: &Arc<Graph>,
    node: Node,
    users: &[(String, BTreeSet<String>)],
    exports: Vec<Arc<Export>>,
) -> Part {
    let name = image_name(&node);
    let uses = users.iter().filter(|(_, nodes)| nodes.contains(&node.name));
    let after = uses.map(|(user, _)| user.clone()).collect();
    let what = format!("{name}: what was written may not be stable");
    let state = graph.state();
    let disks = state.disks_under(&node).into_iter().map(|disk| &**disk);
    let disks = disks.chain([&node]).map(|disk| disk.layer.clone());
    let storage = Arc::new(Storages {
        disks: disks.collect(),
        exports,
    });
    let graph = graph.clone();
    Part {
        name,
        after,
        work: Box::new(move |alone| match graph.node(&node.name) {
            Ok(now) if !now.layer.read_only => close(&now, alone),
            // Its job has closed it, or was the last to use it.
            _ => Ok(()),
        }),
        abandoned: Box::new({
            let storage = storage.clone();
            move || match storage.silent_for() {
                silent if silent.is_zero() => what.clone(),
                silent => format!(
                    "{what}, its storage has not answered for {} s",
                    silent.as_secs()
                ),
            }
        }),
        storage: Some(storage),
    }
}

fn image_name(node: &Node) -> String {
    format!("node '{}'", node.name)
}

/// The nodes that a user of `top` may use.
fn images_of(nodes: &[Node], top: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut next = vec![top.to_owned()];
    while let Some(name) = next.pop() {
        if let Some(node) = nodes.iter().find(|node| node.name == name)
            && found.insert(name)
        {
            next.extend(node.edges.iter().map(|edge| edge.child.clone()));
        }
    }
    found
}

/// Closes the image of a node, or flushes it if somebody may still use it.
///
/// # Errors
/// When what was written may not be stable.
fn close(node: &Node, alone: bool) -> Result<()> {
    let done = on_this_thread(|reactor| {
        reactor.block_on(async {
            if alone {
                return Graph::close_image(node).await;
            }
            if node.layer.storage.writable() {
                log::error!("'{}' is flushed and not closed: it is in use", node.name);
            }
            node.layer.flush().await
        })
    });
    done.map_err(|error| {
        Error::Invalid(format!(
            "closing node '{}': {error} (what was written since the last flush may be lost: check \
             the image before it is used)",
            node.name
        ))
    })
}

#[cfg(test)]
mod tests {
    //! What would be caught: a thread and a ring for an image that nobody has written, an image
    //! that is left out, and one that waits for jobs it has nothing to do with.

    use std::path::PathBuf;
    use std::sync::mpsc::channel;

    use serde_json::json;

    use super::*;
    use crate::format::{Format, Raw};
    use crate::graph::Role;
    use crate::job::{BodyFactory, JobError, JobSpec, ParkRunner, SystemClock};
    use crate::options::{BlockdevOptions, Dialect};
    use crate::storage::memory::MemoryStorage;

    fn add(graph: &Graph, name: &str, backing: Option<&str>, read_only: bool) {
        let options = json!({"driver": "raw", "node-name": name,
            "file": {"driver": "file", "filename": "/disk"}});
        let layer = Layer {
            name: name.to_owned(),
            format: Format::Raw(Raw::new(512)),
            storage: Arc::new(MemoryStorage::new(vec![0; 512])),
            read_only,
            discard: true,
            copy_on_read: false,
        };
        let options = BlockdevOptions::from_value(&options, Dialect::Json).unwrap();
        let node = Node::new(options, layer, PathBuf::from("/disk"));
        graph.add(node.over(Role::Backing, backing)).unwrap();
    }

    /// A job that ends with an error after it has done `work`.
    fn ends(work: impl FnOnce() + Send + 'static) -> BodyFactory {
        Box::new(move || {
            work();
            Box::pin(std::future::ready(Err(JobError::new("there is no more"))))
        })
    }

    #[test]
    fn each_image_waits_for_its_own_users() {
        let (graph, exports) = (Arc::new(Graph::default()), Arc::new(Exports::default()));
        add(&graph, "base", None, true);
        add(&graph, "top", Some("base"), false);
        add(&graph, "other", None, false);
        let runner = Arc::new(ParkRunner);
        let manager = Manager::new(
            Graph::default(),
            runner,
            Arc::new(SystemClock::new()),
            Arc::new(|_| {}),
        );
        let lease = manager.reserve(&["top".to_owned()], "stream").unwrap();
        let (release, hang) = channel::<()>();
        manager
            .start(
                JobSpec::stream("j"),
                lease,
                ends(move || assert!(hang.recv().is_err())),
            )
            .unwrap();
        let parts = of(&graph, &exports, Some(&manager), Some(Box::new(|| {})));
        let told: Vec<_> = parts
            .iter()
            .map(|part| (part.name.as_str(), part.after.join(", ")))
            .collect();
        let wanted = [
            ("job 'j'", ""),
            ("control sockets", "job 'j'"),
            ("node 'top'", "job 'j'"),
            ("node 'other'", ""),
        ];
        assert_eq!(told, wanted.map(|(name, after)| (name, after.to_owned())));
        let late = manager.reserve(&["other".to_owned()], "stream").unwrap();
        let refused = manager.start(JobSpec::stream("k"), late, ends(|| {})).err();
        assert_eq!(refused.unwrap().0, "The daemon is shutting down");
        drop(release);
        let patience = super::super::ending::Patience::within(None);
        super::super::ending::end(parts, patience).unwrap();
    }
}
