//! Commit jobs: from what a client named to a running job, and on again in the next process.
//!
//! As with streams, the layers and the job's name are taken before anything is prepared, and what is
//! prepared (the base and the image over the layers are opened to be written) takes its time under a
//! grant.

use std::cell::RefCell;
use std::sync::Arc;

use super::guests::Guests;
use super::job_filters::{Wanted, filter};
use super::stream::{ATTEMPTS, Layers, Unused, no_such_device, refuse, refused};
use super::{Engine, Exports, Served, on_this_thread};
use crate::error::Error;
use crate::export::Export;
use crate::graph::{
    FilterKind, Graph, Holder, JobFilter, Node, Request, Rights, Role, Taken, Transaction,
};
use crate::job::active::{self, Active};
use crate::job::commit::{Commit, CommitSpec, check_base_name};
use crate::job::handle::{HoldsNodes, checked_speed};
use crate::job::records::{self, Recording};
use crate::job::{Body, BodyFactory, Job, JobError, JobSpec, Lease, OnError, Refused};
use crate::state::record::{self, Work};

/// A layer, as a client says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The one whose file has this name.
    File(String),
    /// This node.
    Node(String),
}

/// A commit that a client wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitRequest {
    /// The export or node in whose chain the layers are.
    pub device: String,
    /// The first of the layers; none for the device's own.
    pub top: Option<Place>,
    /// What they are committed into; none for the last one of the chain.
    pub base: Option<Place>,
    /// What to write into the header of the image over the layers as the base's name.
    pub backing_file: Option<String>,
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

/// Why there is no commit.
#[derive(Debug)]
pub enum NoCommit {
    /// There is no such device. Clients tell by that whether the command is there.
    NoDevice(String),
    /// It is refused.
    Refused(Refused),
}

impl From<Refused> for NoCommit {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

impl Engine {
    /// Starts a commit job.
    ///
    /// # Errors
    /// What stands in its way, in QEMU's words.
    pub fn start_commit(&self, request: &CommitRequest) -> Result<Arc<Job>, NoCommit> {
        if self.layers(&request.device).is_err() {
            let text = format!("Device '{}' not found", request.device);
            return Err(NoCommit::NoDevice(text));
        }
        Ok(self.start_found_commit(request)?)
    }

    fn start_found_commit(&self, request: &CommitRequest) -> Result<Arc<Job>, Refused> {
        let (layers, spec, lease) = self.find_and_take(request)?;
        let export = layers.export.as_deref().unwrap_or_default();
        let id = request.job_id.as_deref().unwrap_or(export);
        let claimed = self.jobs.claim_id(id)?;
        let shown = JobFilter {
            top: layers.names().next().map(str::to_owned),
            ..filter_of(&spec, id)
        };
        self.show_filter(&lease, request.filter_node_name.as_deref(), "", shown)?;
        let top = self.graph.node(spec.top()).map_err(refused)?;
        let job = JobSpec {
            work: self.recorded_commit(&spec)?,
            filter: request.filter_node_name.clone(),
            len: top.layer.format.size(),
            speed: checked_speed(request.speed)?,
            on_error: request.on_error,
            auto_finalize: request.auto_finalize,
            auto_dismiss: request.auto_dismiss,
            holds: HoldsNodes::of_commit(spec.overlay.is_some()),
            ..JobSpec::new("commit", id)
        };
        let body = self.commit_body(&spec, id)?;
        self.jobs.start_claimed(claimed, job, lease, body)
    }

    /// Goes on with a commit that another process recorded as `job`.
    ///
    /// # Errors
    /// What stands in its way.
    pub(super) fn restore_commit(
        &self,
        job: &record::Job,
        spec: &CommitSpec,
    ) -> Result<(), Refused> {
        let lease = self.take_nodes(spec, spec.top())?;
        self.check_readers(spec)?;
        let shown = filter_of(spec, &job.id);
        self.show_filter_again(&lease, job.filter.as_deref(), &shown)?;
        let body = self.commit_body(spec, &job.id)?;
        self.jobs.restore(job, lease, body)?;
        log::info!("job '{}' goes on", job.id);
        Ok(())
    }

    /// Finds the layers concerned and takes them for the job.
    fn find_and_take(
        &self,
        request: &CommitRequest,
    ) -> Result<(Layers, CommitSpec, Lease), Refused> {
        for _ in 0..ATTEMPTS {
            let layers = self.layers(&request.device)?;
            let spec = self.find_commit(&layers, request)?;
            let device = match (&spec.overlay, &request.top) {
                (None, _) => request.device.as_str(),
                (Some(_), Some(Place::Node(node))) => node,
                (Some(_), _) => spec.top(),
            };
            let lease = self.take_nodes(&spec, device)?;
            // A job that ended just now may have changed the chain before its layers were held.
            if self.layers(&request.device)?.names().eq(layers.names()) {
                self.check_readers(&spec)?;
                return Ok((layers, spec, lease));
            }
        }
        refuse(format!("The chain of '{}' keeps changing", request.device))
    }

    /// Takes the nodes of a commit, the first of whose layers a client calls `device`.
    fn take_nodes(&self, spec: &CommitSpec, device: &str) -> Result<Lease, Refused> {
        let nodes = spec.nodes();
        let wanted = Wanted {
            nodes: &nodes,
            device,
            overlay: spec.overlay.as_deref(),
        };
        let reserved = self.jobs.reserve(&nodes, "commit");
        reserved.map_err(|busy| self.busy(&wanted, &busy))
    }

    /// The layers from the top down to the base that the client named.
    fn find_commit(&self, layers: &Layers, request: &CommitRequest) -> Result<CommitSpec, Refused> {
        let named = self.find_device(&request.device);
        let state = self.graph.state();
        if self.graph.filter(&request.device).is_some()
            || named.is_some_and(|(node, _)| state.is_under_another(&node))
        {
            return refuse("Need a root block node");
        }
        let top = self.find_place(layers, 0, request.top.as_ref(), |file| {
            format!("Top image file {file} not found")
        })?;
        let top = top.unwrap_or(0);
        let base = self.find_place(layers, top, request.base.as_ref(), |file| {
            format!("Can't find '{file}' in the backing chain")
        })?;
        let base = base.unwrap_or(layers.nodes.len().saturating_sub(1));
        if top == base {
            return refuse("cannot commit an image into itself");
        }
        if top == 0 && request.backing_file.is_some() {
            return refuse("'backing-file' specified, but 'top' is the active layer");
        }
        let name = |at: usize| layers.names().nth(at).map(str::to_owned);
        let of_layers = layers.names().take(base).skip(top);
        Ok(CommitSpec {
            overlay: top.checked_sub(1).and_then(name),
            layers: of_layers.map(str::to_owned).collect(),
            base: name(base).unwrap_or_default(),
            backing_file: request.backing_file.clone(),
        })
    }

    /// Where a layer is that a client named, at `from` or below.
    fn find_place(
        &self,
        layers: &Layers,
        from: usize,
        place: Option<&Place>,
        no_file: impl Fn(&str) -> String,
    ) -> Result<Option<usize>, Refused> {
        match place {
            None => Ok(None),
            Some(Place::Node(node)) => {
                if !self.graph.has_name(node) {
                    return Err(no_such_device("", node));
                }
                let meant = self.graph.meant_by(node);
                let found = layers.position(&meant).filter(|at| *at >= from);
                found
                    .map(Some)
                    .ok_or_else(|| Refused(format!("'{node}' is not in this backing file chain")))
            }
            Some(Place::File(file)) => {
                let own = from == 0 && layers.is_called(0, file);
                let found = own.then_some(0).or_else(|| layers.find_file(from, file));
                found.map(Some).ok_or_else(|| Refused(no_file(file)))
            }
        }
    }

    /// Refuses a commit under which another image would read other bytes than before.
    fn check_readers(&self, spec: &CommitSpec) -> Result<(), Refused> {
        let (state, read) = (self.graph.state(), self.graph.in_use());
        let image = |name: &str| state.image_node(name).map(|node| node.name.clone());
        let top = state.image_node(spec.top()).map_err(refused)?;
        if spec.overlay.is_none()
            && let Some((above, role)) = state.laid_out_in(&top.name)
        {
            return refuse(format!(
                "Node '{}' is busy: node '{}' is laid out in its disk ('{}'), and would lose it when the \
                 guest goes on on node '{}' (remove that node first, with blockdev-del if it was added)",
                top.name,
                above.name,
                role.key(),
                spec.base
            ));
        }
        let own = spec.layers.iter().flat_map(|name| image(name));
        let own: Vec<String> = own.collect();
        // Where guests go on on the base, the first of the layers is out of date as well.
        let hidden = usize::from(spec.overlay.is_some());
        let changed = spec.layers.iter().skip(hidden).chain([&spec.base]);
        for name in changed {
            let meant = image(name);
            let reads = |node: &&Arc<Node>| {
                let below = node.child(Role::Backing).map(image);
                !own.contains(&node.name)
                    && read.contains(&node.name)
                    && matches!((&below, &meant), (Some(Ok(below)), Ok(meant)) if below == meant)
            };
            if let Some(node) = state.nodes().iter().find(reads) {
                return refuse(format!(
                    "Node '{name}' is busy: it is the backing file of node '{}' as well, which would \
                     read other bytes after the commit (remove what uses that node first, with \
                     block-export-del)",
                    node.name
                ));
            }
        }
        Ok(())
    }

    /// What is recorded of a commit that is about to be made; `None` if nobody can go on with it.
    fn recorded_commit(&self, spec: &CommitSpec) -> Result<Option<Work>, Refused> {
        if self.store.is_none() {
            return Ok(None);
        }
        // As images: filters over them may be others in the next process.
        let record = |name: &str| records::node(&self.graph, &self.graph.image_node(name)?);
        let identity = |name: &str| Ok(records::identity(&self.graph.image_node(name)?));
        let overlay = spec.overlay.as_deref();
        let about = overlay.unwrap_or(spec.top());
        Ok(Some(Work::Commit(record::Committed {
            overlay: overlay.map(record).transpose().map_err(refused)?,
            identity: identity(about).map_err(refused)?,
            top: record(spec.top()).map_err(refused)?,
            base: record(&spec.base).map_err(refused)?,
            base_identity: identity(&spec.base).map_err(refused)?,
            backing_file: spec.backing_file.clone(),
        })))
    }

    /// Makes the body of a commit whose layers are reserved for the job, which is called `job`. What can
    /// fail early fails here.
    fn commit_body(&self, spec: &CommitSpec, job: &str) -> Result<BodyFactory, Refused> {
        check_base_name(&self.graph, spec).map_err(refused)?;
        let (state, overlay) = (self.graph.state(), spec.overlay.as_deref());
        let size = |name: &str| state.node(name).map(|node| node.layer.format.size());
        let grows = match (size(spec.top()), size(&spec.base)) {
            (Ok(top), Ok(base)) if top > base => Rights::RESIZE,
            _ => Rights::NONE,
        };
        let request = Request::commit(&state, job, overlay, &spec.layers, (&spec.base, grows));
        let graph = self.graph.clone();
        let grant = on_this_thread(|reactor| reactor.block_on(graph.access(request)));
        let unused = Unused(Some(grant.map_err(refused)?));
        let (exports, spec) = (self.exports.clone(), spec.clone());
        let tenants = self.exports.clone();
        let recording = self.store.clone().map(|store| Recording::new(store, job));
        Ok(Box::new(move || {
            Box::pin(async move {
                let guests = Box::new(Guests::new(exports));
                let Some(grant) = unused.take() else {
                    return Err(JobError::new("the job's nodes are no longer its own"));
                };
                let failed = |error: Error| JobError::new(error.to_string());
                let Some(overlay) = &spec.overlay else {
                    let tenants = Box::new(Tenants::of(tenants));
                    let commit = Active::new(graph, guests, &spec, tenants, (grant, recording));
                    return Ok(Box::new(commit.map_err(failed)?) as Box<dyn Body>);
                };
                let commit = Commit::new(graph, guests, (&spec, overlay), grant, recording);
                Ok(Box::new(commit.map_err(failed)?) as Box<dyn Body>)
            })
        }))
    }
}

/// What clients see of a commit in the graph.
fn filter_of(spec: &CommitSpec, job: &str) -> JobFilter {
    let kind = match spec.overlay {
        Some(_) => FilterKind::Commit,
        None => FilterKind::ActiveCommit,
    };
    JobFilter {
        overlay: spec.overlay.clone(),
        ..filter(kind, job, spec.top())
    }
}

/// The exports of a disk whose top is committed.
struct Tenants {
    exports: Arc<Exports>,
    /// What they may do with the base when they are there.
    taken: RefCell<Vec<(Arc<Export>, Taken)>>,
}

impl Tenants {
    fn of(exports: Arc<Exports>) -> Self {
        Self {
            exports,
            taken: RefCell::default(),
        }
    }
}

impl active::Tenants for Tenants {
    fn prepare(&self, transaction: &mut Transaction, from: &str, to: &str) -> Result<(), Error> {
        let mut taken = Vec::new();
        for Served {
            export, options, ..
        } in self.exports.list()
        {
            // Those of filters over it have what they need by these.
            if export.node_name() == from {
                let holder = Holder::Export(options.id.clone());
                let request = Request::disk(holder, to, options.writable);
                taken.push((export, transaction.taking(request)));
            }
        }
        *self.taken.borrow_mut() = taken;
        Ok(())
    }

    fn moved(&self, graph: &Graph) {
        for (export, taken) in self.taken.take() {
            self.exports.regrant(&export, taken.grant(graph));
        }
    }
}
