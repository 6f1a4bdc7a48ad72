//! Stream jobs: from what a client named to a running job, and on again in the next process.
//!
//! The layers and the job's name are taken before anything is prepared, so that two commands see
//! each other although neither waits for the other. What is prepared (the target's image is opened
//! to be written) may take long: nothing is locked meanwhile.

use std::path::Path;
use std::sync::Arc;

use super::guests::Guests;
use super::job_filters::{Wanted, filter};
use super::{Engine, on_this_thread};
use crate::graph::{FilterKind, Grant, Graph, Node, Request, resolve};
use crate::job::handle::checked_speed;
use crate::job::records::{self, Recording};
use crate::job::stream::{Stream, StreamSpec, check_base_name};
use crate::job::{Body, BodyFactory, Job, JobError, JobSpec, Lease, OnError, Refused};
use crate::options::{BackingRef, Driver};
use crate::state::record::{self, Work};

/// How often a chain may change under us before we give up.
pub(super) const ATTEMPTS: usize = 8;

/// Where a stream ends, as a client says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Base {
    /// Above the layer whose file has this name.
    File(String),
    /// Above this node.
    Node(String),
    /// Below this node.
    Bottom(String),
}

/// A stream that a client wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamRequest {
    /// The export or node to stream into.
    pub device: String,
    /// Where it ends; none to stream the whole chain.
    pub base: Option<Base>,
    /// What to write into the header as the base's name.
    pub backing_file: Option<String>,
    /// Clusters are to be compressed where that makes them smaller.
    pub compress: bool,
    /// The job's name; that of the export, if there is none.
    pub job_id: Option<String>,
    /// The name of the job's filter; one is made up, if there is none.
    pub filter_node_name: Option<String>,
    /// The speed limit in bytes per second; 0 is none.
    pub speed: i64,
    /// What the job does about errors.
    pub on_error: OnError,
    /// Whether it makes its result count by itself.
    pub auto_finalize: bool,
    /// Whether it goes by itself when it has ended.
    pub auto_dismiss: bool,
}

/// The layers that a device names.
#[derive(Debug)]
pub(super) struct Layers {
    /// The export whose top the first is. Jobs on it are called after it.
    pub(super) export: Option<String>,
    /// The one that was named first, then those under it.
    pub(super) nodes: Vec<Node>,
}

impl Layers {
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().map(|node| node.name.as_str())
    }

    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.names().position(|node| node == name)
    }

    /// The file names by which a client may name the layer `at`: as it was opened, as the header of
    /// the layer above has it.
    fn filenames(&self, at: usize) -> Vec<String> {
        let Some(node) = self.nodes.get(at) else {
            return Vec::new();
        };
        let above = at.checked_sub(1).and_then(|above| self.nodes.get(above));
        let path = std::path::absolute(&node.filename).ok();
        let path = path.map(|path| path.display().to_string());
        let header = above.and_then(|above| header_name(above, node));
        std::iter::once(node.filename.display().to_string())
            .chain(header)
            .chain(path)
            .collect()
    }

    /// Whether a client may call the layer `at` by the name `file` of its file.
    pub(super) fn is_called(&self, at: usize, file: &str) -> bool {
        self.filenames(at).iter().any(|name| name == file)
    }

    /// The layer below layer `above` whose file a client calls `file`.
    pub(super) fn find_file(&self, above: usize, file: &str) -> Option<usize> {
        let mut below = above + 1..self.nodes.len();
        below
            .clone()
            .find(|at| self.is_called(*at, file))
            .or_else(|| {
                let wanted = Path::new(file).canonicalize().ok()?;
                let is_it = |name: &String| {
                    Path::new(name)
                        .canonicalize()
                        .is_ok_and(|name| name == wanted)
                };
                below.find(|at| self.filenames(*at).iter().any(is_it))
            })
    }
}

/// What the header of image `above` calls `node`, which is under it; `None` where it means another file
/// than the options have put there.
fn header_name(above: &Node, node: &Node) -> Option<String> {
    let name = above.layer.format.backing()?.name;
    let by_header = match &above.options.driver {
        Driver::Qcow2(options) => options.backing == BackingRef::Default,
        Driver::Qed(options) => options.backing == BackingRef::Default,
        _ => false,
    };
    let path = resolve(&above.filename, &name);
    let is_it = || {
        let canonical = |path: &Path| path.canonicalize().ok();
        path == node.filename
            || canonical(&path).is_some_and(|path| canonical(&node.filename) == Some(path))
    };
    (by_header || is_it()).then_some(name)
}

impl Engine {
    /// Starts a stream job.
    ///
    /// # Errors
    /// What stands in its way, in QEMU's words.
    pub fn start_stream(&self, request: &StreamRequest) -> Result<Arc<Job>, Refused> {
        let (layers, spec, lease) = self.find_and_reserve(request)?;
        if spec.base.is_none() && request.backing_file.is_some() {
            return refuse("backing file specified, but streaming the entire chain");
        }
        let export = layers.export.as_deref().unwrap_or_default();
        let id = request.job_id.as_deref().unwrap_or(export);
        self.show_filter(
            &lease,
            request.filter_node_name.as_deref(),
            "Could not create node: ",
            filter(FilterKind::Stream, id, &spec.target),
        )?;
        let Some(target) = layers.nodes.first() else {
            return Err(no_such_device(&request.device, &request.device));
        };
        if target.fixed_read_only && !self.graph.may_reopen(target) {
            return refuse("Block node is read-only");
        }
        let job = JobSpec {
            work: self.recorded_work(&spec)?,
            filter: request.filter_node_name.clone(),
            len: target.layer.format.size(),
            speed: checked_speed(request.speed)?,
            on_error: request.on_error,
            auto_finalize: request.auto_finalize,
            auto_dismiss: request.auto_dismiss,
            ..JobSpec::stream(id)
        };
        let id = self.jobs.claim_id(id)?;
        let body = (self.streams)(&spec, &job.id)?;
        self.jobs.start_claimed(id, job, lease, body)
    }

    /// Goes on with a stream that another process recorded as `job`.
    ///
    /// # Errors
    /// What stands in its way.
    pub(super) fn restore_stream(
        &self,
        job: &record::Job,
        spec: &StreamSpec,
    ) -> Result<(), Refused> {
        let lease = self.reserve(spec, spec.layers.first().map_or("", String::as_str))?;
        let shown = filter(FilterKind::Stream, &job.id, &spec.target);
        self.show_filter_again(&lease, job.filter.as_deref(), &shown)?;
        let body = (self.streams)(spec, &job.id)?;
        self.jobs.restore(job, lease, body)?;
        log::info!("job '{}' goes on", job.id);
        Ok(())
    }

    /// Finds the layers concerned and takes them for the job.
    fn find_and_reserve(
        &self,
        request: &StreamRequest,
    ) -> Result<(Layers, StreamSpec, Lease), Refused> {
        for _ in 0..ATTEMPTS {
            let layers = self.layers(&request.device)?;
            let spec = self.find_spec(&layers, request)?;
            let lease = self.reserve(&spec, &request.device)?;
            // A job that ended just now may have changed the chain before its layers were held.
            if self.layers(&request.device)?.names().eq(layers.names()) {
                return Ok((layers, spec, lease));
            }
        }
        refuse(format!("The chain of '{}' keeps changing", request.device))
    }

    /// The layers of what a client calls `device`.
    pub(super) fn layers(&self, device: &str) -> Result<Layers, Refused> {
        let found = self.find_device(device).and_then(|(node, export)| {
            let top = self.graph.image_node(&node).ok()?.name;
            let nodes = self.graph.chain_nodes(&top).ok()?;
            Some(Layers { export, nodes })
        });
        found.ok_or_else(|| no_such_device(device, device))
    }

    /// Takes the layers of a stream, the first of which a client calls `device`.
    fn reserve(&self, spec: &StreamSpec, device: &str) -> Result<Lease, Refused> {
        let wanted = Wanted {
            nodes: &spec.layers,
            device,
            overlay: None,
        };
        let reserved = self.jobs.reserve(&spec.layers, "stream");
        reserved.map_err(|busy| self.busy_for_stream(&wanted, &busy))
    }

    /// The layers from the first down to the base that the client named.
    fn find_spec(&self, layers: &Layers, request: &StreamRequest) -> Result<StreamSpec, Refused> {
        let known = |name: &str| match self.graph.has_name(name) {
            true => Ok(self.graph.meant_by(name)),
            false => Err(no_such_device("", name)),
        };
        let end = match &request.base {
            None => layers.nodes.len(),
            Some(Base::File(file)) => layers
                .find_file(0, file)
                .ok_or_else(|| Refused(format!("Can't find '{file}' in the backing chain")))?,
            Some(Base::Node(node)) => {
                let at = layers.position(&known(node)?).filter(|&at| at > 0);
                at.ok_or_else(|| {
                    let device = &request.device;
                    Refused(format!(
                        "Node '{node}' is not a backing image of '{device}'"
                    ))
                })?
            }
            Some(Base::Bottom(node)) => {
                let meant = known(node)?;
                if meant != *node || self.graph.node(node).is_ok_and(|node| node.is_filter()) {
                    return refuse(format!(
                        "Node '{node}' is a filter, use a non-filter node as 'bottom'"
                    ));
                }
                let at = layers.position(&meant).map(|at| at + 1);
                at.ok_or_else(|| {
                    let device = &request.device;
                    Refused(format!(
                        "Node '{node}' is not in a chain starting from '{device}'"
                    ))
                })?
            }
        };
        Ok(StreamSpec {
            target: layers.names().next().unwrap_or_default().to_owned(),
            base: layers.names().nth(end).map(str::to_owned),
            layers: layers.names().take(end).map(str::to_owned).collect(),
            backing_file: request.backing_file.clone(),
            compress: request.compress,
        })
    }

    /// What is recorded of a stream that is about to be made; `None` if nobody can go on with it.
    fn recorded_work(&self, spec: &StreamSpec) -> Result<Option<Work>, Refused> {
        if self.store.is_none() {
            return Ok(None);
        }
        let record = |name: &str| records::node(&self.graph, &self.graph.node(name)?);
        let base = spec.base.as_deref().map(record).transpose();
        let target = self.graph.node(&spec.target).map_err(refused)?;
        Ok(Some(Work::Stream(record::Stream {
            target: record(&spec.target).map_err(refused)?,
            identity: records::identity(&target),
            base: base.map_err(refused)?,
            backing_file: spec.backing_file.clone(),
            compress: spec.compress,
        })))
    }
}

/// How the bodies of streams are made: the layers concerned are reserved for the job, which is
/// called by the second argument. What can fail early fails here.
pub type Streams = Box<dyn Fn(&StreamSpec, &str) -> Result<BodyFactory, Refused> + Send + Sync>;

/// Makes the bodies of streams on `graph`, which know the guests of `exports` and record their
/// results in `store`.
#[must_use]
pub fn on_graph(
    graph: &Arc<Graph>,
    exports: &Arc<super::Exports>,
    store: Option<&Arc<crate::state::Store>>,
) -> Streams {
    let (graph, exports, store) = (graph.clone(), exports.clone(), store.cloned());
    Box::new(move |spec, job| {
        check_base_name(&graph, spec).map_err(refused)?;
        let request = Request::stream(&graph.state(), job, &spec.layers);
        let grant = on_this_thread(|reactor| reactor.block_on(graph.access(request)));
        let unused = Unused(Some(grant.map_err(refused)?));
        let (graph, exports, spec) = (graph.clone(), exports.clone(), spec.clone());
        let recording = store.clone().map(|store| Recording::new(store, job));
        Ok(Box::new(move || {
            Box::pin(async move {
                let guests = Box::new(Guests::new(exports));
                let Some(grant) = unused.take() else {
                    return Err(JobError::new("the job's nodes are no longer its own"));
                };
                let stream = Stream::new(graph, guests, &spec, grant, recording);
                let stream = stream.map_err(|error| JobError::new(error.to_string()))?;
                Ok(Box::new(stream) as Box<dyn Body>)
            })
        }))
    })
}

pub(super) fn refuse<T>(text: impl Into<String>) -> Result<T, Refused> {
    Err(Refused(text.into()))
}

pub(super) fn refused(error: crate::error::Error) -> Refused {
    Refused(error.to_string())
}

pub(super) fn no_such_device(device: &str, node: &str) -> Refused {
    Refused(format!(
        "Cannot find device='{device}' nor node-name='{node}'"
    ))
}

/// The grant of a job that may not come to be. It is given back when this is dropped.
pub(super) struct Unused(pub(super) Option<Grant>);

impl Unused {
    pub(super) fn take(mut self) -> Option<Grant> {
        self.0.take()
    }
}

impl Drop for Unused {
    fn drop(&mut self) {
        let Some(grant) = self.0.take() else {
            return;
        };
        if let Err(error) = on_this_thread(|reactor| reactor.block_on(grant.give_back())) {
            log::error!("a job that does not begin: back to read-only: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a stream that copies for hours, and cannot name its base then; and a
    //! layer that stays writable, and locked, after a job that did not come to be.

    use serde_json::json;

    use super::*;
    use crate::format::qcow2::create::{CreateOptions, create};
    use crate::options::{BlockdevOptions, Dialect};
    use crate::reactor::Reactor;
    use crate::storage::memory::MemoryStorage;

    const SIZE: u64 = 1 << 20;

    /// A chain of `top`, `mid` and `base`, a part of a file that has a long path.
    fn graph(dir: &Path) -> Arc<Graph> {
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
        graph
    }

    fn spec(target: &str, base: Option<&str>, backing_file: Option<String>) -> StreamSpec {
        StreamSpec {
            target: target.to_owned(),
            base: base.map(str::to_owned),
            layers: vec![target.to_owned()],
            backing_file,
            compress: false,
        }
    }

    #[test]
    fn a_base_that_no_header_can_name_is_refused_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let graph = graph(dir.path());
        let refused = |name: Option<String>| {
            let spec = spec("top", Some("base"), name);
            on_graph(&graph, &Arc::default(), None)(&spec, "job")
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
        let is_read_only = || graph.node("top").unwrap().layer.read_only;
        assert!(is_read_only());
        assert_eq!(refused(Some("x".repeat(1023))), None);
        assert!(is_read_only(), "it was made writable for nothing");
    }

    #[test]
    fn a_layer_is_given_back_when_its_job_cannot_begin() {
        let dir = tempfile::tempdir().unwrap();
        let graph = graph(dir.path());
        let make = on_graph(&graph, &Arc::default(), None)(&spec("mid", None, None), "job");
        let make = make.unwrap();
        let is_read_only = || graph.node("mid").unwrap().layer.read_only;
        assert!(!is_read_only());
        drop(make);
        assert!(is_read_only());
    }
}
