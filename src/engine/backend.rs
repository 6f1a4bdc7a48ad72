//! The daemon as the control socket sees it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::guests::Guests;
use super::{Exports, on_this_thread, sync_errors};
use crate::control::backend::{
    Backend, Backing, BlockNode, ChainView, Export, ExportStats, LayerView, SyncError,
};
use crate::format::Format;
use crate::format::qcow2;
use crate::graph::Graph;
use crate::graph::{Node, resolve};
use crate::job::records::{self, Recording};
use crate::job::stream::{Stream, StreamSpec, check_base_name};
use crate::job::{Body, BodyFactory, JobError, Refused};
use crate::options::{DetectZeroes, Driver};
use crate::state::Store;
use crate::state::record::{self, Work};

/// Nodes and exports, for commands.
pub struct DaemonBackend {
    graph: Arc<Graph>,
    exports: Arc<Exports>,
    quit: Box<dyn Fn() + Send + Sync>,
    /// Where jobs and failed flushes are recorded, if they are.
    store: Option<Arc<Store>>,
}

impl DaemonBackend {
    /// The backend over what the daemon has.
    #[must_use]
    pub fn new(
        graph: Arc<Graph>,
        exports: Arc<Exports>,
        quit: impl Fn() + Send + Sync + 'static,
        store: Option<Arc<Store>>,
    ) -> Self {
        Self {
            graph,
            exports,
            quit: Box::new(quit),
            store,
        }
    }

    /// The node that a device's name stands for, and the export it is the top of.
    fn resolve(&self, device: &str) -> Option<(String, Option<String>)> {
        let exports = self.exports.list();
        if let Some(export) = exports.iter().find(|export| export.id == device) {
            return Some((export.node_name.clone(), Some(export.id.clone())));
        }
        self.graph.node(device).ok()?;
        let export = exports.iter().find(|export| export.node_name == device);
        Some((device.to_owned(), export.map(|export| export.id.clone())))
    }
}

impl Backend for DaemonBackend {
    fn block_nodes(&self) -> Vec<BlockNode> {
        let nodes = self.graph.nodes();
        nodes.iter().map(|node| block_node(node, &nodes)).collect()
    }

    fn exports(&self) -> Vec<Export> {
        self.exports.list()
    }

    fn export_stats(&self) -> Vec<ExportStats> {
        self.exports.stats()
    }

    fn chain(&self, device: &str) -> Option<ChainView> {
        let (top, export) = self.resolve(device)?;
        let top = self.graph.image_node(&top).ok()?.name;
        let nodes = self.graph.chain_nodes(&top).ok()?;
        let mut layers = Vec::with_capacity(nodes.len());
        let mut above: Option<&Node> = None;
        for node in &nodes {
            let mut filenames = vec![node.filename.display().to_string()];
            filenames.extend(above.and_then(header_backing).map(|(name, _)| name));
            filenames.extend(
                std::path::absolute(&node.filename)
                    .ok()
                    .map(|path| path.display().to_string()),
            );
            layers.push(LayerView {
                node_name: node.name.clone(),
                filenames,
                read_only: node.fixed_read_only,
            });
            above = Some(node);
        }
        let len = nodes.first()?.layer.format.size();
        Some(ChainView {
            export,
            len,
            layers,
        })
    }

    fn work(&self, spec: &StreamSpec) -> Result<Option<Work>, Refused> {
        if self.store.is_none() {
            return Ok(None);
        }
        let record = |name: &str| records::node(&self.graph, &self.graph.node(name)?);
        let base = spec
            .base
            .as_deref()
            .map(record)
            .transpose()
            .map_err(refused)?;
        let target = self.graph.node(&spec.target).map_err(refused)?;
        Ok(Some(Work::Stream(record::Stream {
            target: record(&spec.target).map_err(refused)?,
            identity: records::identity(&target),
            base,
            backing_file: spec.backing_file.clone(),
            compress: spec.compress,
        })))
    }

    fn open_stream(&self, spec: &StreamSpec, job: &str) -> Result<BodyFactory, Refused> {
        check_base_name(&self.graph, spec).map_err(refused)?;
        let node = self.graph.node(&spec.target).map_err(refused)?;
        let restore = node.layer.read_only;
        if restore {
            on_this_thread(|reactor| reactor.block_on(self.graph.make_writable(&spec.target)))
                .map_err(refused)?;
        }
        let unused = Unused(restore.then(|| (self.graph.clone(), spec.target.clone())));
        let (graph, exports) = (self.graph.clone(), self.exports.clone());
        let spec = spec.clone();
        let store = self.store.clone();
        let recording = store.map(|store| Recording::new(store, job));
        Ok(Box::new(move || {
            Box::pin(async move {
                let guests = Box::new(Guests::new(exports));
                match Stream::new(graph, guests, &spec, restore, recording) {
                    Ok(stream) => {
                        // From here on the job sees to it.
                        unused.forget();
                        Ok(Box::new(stream) as Box<dyn Body>)
                    }
                    Err(error) => {
                        unused.give_back().await;
                        Err(JobError::new(error.to_string()))
                    }
                }
            })
        }))
    }

    fn sync_errors(&self, export: &Export) -> Vec<SyncError> {
        sync_errors::of(&self.graph, &export.node_name)
    }

    fn clear_sync_error(&self, device: &str) -> Result<(), Refused> {
        let Some((node, _)) = self.resolve(device) else {
            return Err(Refused(format!(
                "Cannot find device='{device}' nor node-name='{device}'"
            )));
        };
        sync_errors::clear(&self.graph, &node, self.store.as_deref())
    }

    fn quit(&self) {
        (self.quit)();
    }
}

fn refused(error: crate::error::Error) -> Refused {
    Refused(error.to_string())
}

/// A node that was made writable for a job that may not come to be. It is given back when this is
/// dropped.
struct Unused(Option<(Arc<Graph>, String)>);

impl Unused {
    fn forget(mut self) {
        self.0 = None;
    }

    /// Gives it back on a thread that has a reactor at work, such as a job's.
    async fn give_back(mut self) {
        if let Some((graph, node)) = self.0.take() {
            told(&node, graph.make_read_only(&node).await);
        }
    }
}

impl Drop for Unused {
    fn drop(&mut self) {
        let Some((graph, node)) = self.0.take() else {
            return;
        };
        let given = on_this_thread(|reactor| reactor.block_on(graph.make_read_only(&node)));
        told(&node, given);
    }
}

fn told(node: &str, given: crate::error::Result<()>) {
    if let Err(error) = given {
        log::error!("node '{node}': back to read-only: {error}");
    }
}

fn header_backing(node: &Node) -> Option<(String, Option<String>)> {
    match &node.layer.format {
        Format::Qcow2(image) => image
            .backing()
            .map(|backing| (backing.name, backing.format)),
        Format::Qed(image) => image
            .backing()
            .map(|backing| (backing.name.clone(), backing.format.clone())),
        Format::Raw(_) => None,
    }
}

fn block_node(node: &Node, all: &[Node]) -> BlockNode {
    let cluster_size = match &node.layer.format {
        Format::Qcow2(image) => Some(image.cluster_size()),
        Format::Qed(image) => Some(image.cluster_size()),
        Format::Raw(_) => None,
    };
    let options = &node.options;
    BlockNode {
        node_name: node.name.clone(),
        driver: node.driver.to_owned(),
        filename: node.filename.display().to_string(),
        read_only: options.read_only,
        virtual_size: node.layer.format.size(),
        actual_size: actual_size(&node.filename),
        cluster_size,
        dirty: false,
        cache_direct: options.cache.direct,
        cache_no_flush: options.cache.no_flush,
        cache_writeback: true,
        detect_zeroes: match options.detect_zeroes {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        }
        .to_owned(),
        backing: backing_of(node, all),
        children: children_of(node),
        format_specific: format_specific(node),
    }
}

fn children_of(node: &Node) -> Vec<(&'static str, String)> {
    // What is below a filter is below what it filters.
    let backing = (node.driver != "copy-on-read").then_some(&node.backing);
    [
        ("file", Some(&node.file)),
        ("backing", backing),
        ("data-file", Some(&node.data_file)),
    ]
    .into_iter()
    .filter_map(|(role, child)| Some((role, child?.clone()?)))
    .collect()
}

fn backing_of(node: &Node, all: &[Node]) -> Option<Backing> {
    let name = node.backing.as_ref()?;
    let below = all.iter().find(|other| other.name == *name)?;
    let full = below.filename.display().to_string();
    let (filename, format) = header_backing(node).unwrap_or_else(|| (full.clone(), None));
    // The header may name another file than the one that was asked for.
    let names_it = resolve(&node.filename, &filename) == below.filename;
    Some(Backing {
        filename: if names_it { filename } else { full.clone() },
        full_filename: full,
        format: format.or_else(|| Some(below.driver.to_owned())),
        node_name: name.clone(),
    })
}

/// What an image takes on the disk.
fn actual_size(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |stat| stat.blocks() * 512)
}

fn format_specific(node: &Node) -> Option<Value> {
    let Format::Qcow2(image) = &node.layer.format else {
        return match &node.options.driver {
            Driver::File(_) => Some(json!({"type": "file", "data": {}})),
            _ => None,
        };
    };
    // The bitmaps would have to be read.
    Some(qcow2::format_specific(&image.header(), &[], None))
}

#[cfg(test)]
mod tests {
    //! What would be caught: a stream that copies for hours, and cannot name its base then; and a
    //! layer that stays writable, and locked, after a job that did not come to be.

    use super::*;
    use crate::format::qcow2::create::{CreateOptions, create};
    use crate::options::{BlockdevOptions, Dialect};
    use crate::reactor::Reactor;
    use crate::storage::memory::MemoryStorage;

    const SIZE: u64 = 1 << 20;

    /// A chain of `top`, `mid` and `base`, a part of a file that has a long path.
    fn backend(dir: &Path) -> DaemonBackend {
        let reactor = Reactor::for_this_thread().unwrap();
        let memory = MemoryStorage::new(Vec::new());
        reactor
            .block_on(create(&memory, &CreateOptions::new(SIZE)))
            .unwrap();
        let file = |name: &str| {
            let path = dir.join(name);
            json!({"driver": "file", "filename": path})
        };
        for name in ["top", "mid"] {
            std::fs::write(dir.join(name), memory.snapshot()).unwrap();
        }
        let folders = (0..6).map(|_| "long".repeat(50));
        let folder = folders.fold(dir.to_owned(), |folder, name| folder.join(name));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("base"), vec![7; 2 << 20]).unwrap();
        let path = folder.join("base");
        let base = json!({"driver": "raw", "node-name": "base", "offset": SIZE, "size": SIZE,
            "file": {"driver": "file", "filename": path}});
        let mid = json!({"driver": "qcow2", "node-name": "mid", "backing": "base",
            "file": file("mid"), "discard": "unmap"});
        let top = json!({"driver": "qcow2", "node-name": "top", "backing": "mid",
            "file": file("top")});
        let graph = Arc::new(Graph::default());
        for node in [base, mid, top] {
            let options = BlockdevOptions::from_value(&node, Dialect::Json).unwrap();
            reactor.block_on(graph.open(&options)).unwrap();
        }
        Reactor::leave_thread();
        DaemonBackend::new(graph, Arc::default(), || {}, None)
    }

    fn spec(target: &str, base: Option<&str>, backing_file: Option<String>) -> StreamSpec {
        StreamSpec {
            target: target.to_owned(),
            base: base.map(str::to_owned),
            layers: Vec::new(),
            backing_file,
            compress: false,
        }
    }

    #[test]
    fn a_base_that_no_header_can_name_is_refused_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let backend = backend(dir.path());
        let refused = |name: Option<String>| {
            let spec = spec("top", Some("base"), name);
            backend
                .open_stream(&spec, "job")
                .err()
                .map(|refused| refused.0)
        };
        let named = "The image of node 'top' could not name its new backing file, node 'base'";
        for (name, len) in [(None, None), (Some("x".repeat(1024)), Some(1024))] {
            let text = refused(name).expect("it is too long");
            assert!(text.starts_with(named), "{text}");
            assert!(text.contains("expected at most 1023"), "{text}");
            assert!(
                text.contains("a shorter name with 'backing-file'"),
                "{text}"
            );
            let len = len.map(|len: usize| format!("name of {len} bytes"));
            assert!(len.is_none_or(|len| text.contains(&len)), "{text}");
        }
        let is_read_only = || backend.graph.node("top").unwrap().layer.read_only;
        assert!(is_read_only());
        assert_eq!(refused(Some("x".repeat(1023))), None);
        assert!(is_read_only(), "it was made writable for nothing");
    }

    #[test]
    fn a_layer_is_given_back_when_its_job_cannot_begin() {
        let dir = tempfile::tempdir().unwrap();
        let backend = backend(dir.path());
        let make = backend
            .open_stream(&spec("mid", None, None), "job")
            .unwrap();
        let is_read_only = || backend.graph.node("mid").unwrap().layer.read_only;
        assert!(!is_read_only());
        // So that the chain cannot be made any more.
        backend.graph.remove("base");
        let reactor = Reactor::for_this_thread().unwrap();
        assert!(reactor.block_on(make()).is_err());
        assert!(is_read_only());
        Reactor::leave_thread();
    }
}
