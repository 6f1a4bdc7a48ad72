//! What is recorded of nodes and of a job's result, so that the next process knows what lies under
//! images.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Result;
use crate::format::Format;
use crate::format::qcow2::Backing;
use crate::graph::{Graph, Node, Role};
use crate::state::record::{self, Identity, State};
use crate::state::{Gone, Store};

/// The record of what a header says.
pub fn header(backing: &Backing) -> record::Header {
    record::Header {
        name: backing.name.clone(),
        format: backing.format.clone(),
    }
}

/// What is recorded to lie under images, the results of jobs first: they may be in force.
pub fn links(state: &State) -> impl Iterator<Item = &record::Link> {
    let commits = state.jobs.iter().filter_map(|job| job.commit.as_ref());
    commits.map(|commit| &commit.link).chain(&state.links)
}

/// The record of what the header of a node's image says.
#[must_use]
pub fn header_of(node: &Node) -> Option<record::Header> {
    match &node.layer.format {
        Format::Qcow2(image) => image.backing().as_ref().map(header),
        Format::Raw(_) | Format::Qed(_) => None,
    }
}

/// The record of a node.
pub fn node(graph: &Graph, node: &Node) -> Result<record::Node> {
    Ok(record::Node {
        // Names that were made up may be other ones the next time.
        name: Some(node.name.clone()).filter(|name| !name.starts_with('#')),
        format: node.format_name().to_owned(),
        file: graph.file_of(node)?,
    })
}

/// What tells the file of a node's image from others.
pub fn identity(node: &Node) -> Identity {
    let storages = node.layer.storages();
    let identity = storages.first().and_then(|storage| storage.identity());
    identity.unwrap_or_default()
}

/// The files that hold what node `node`'s image has and nothing else: none for an image that is in a
/// part of a file or in another image, since others change that file.
pub fn files_of(graph: &Graph, node: &Node) -> Vec<PathBuf> {
    if graph.shares_file(node) {
        return Vec::new();
    }
    let data = node.child(Role::DataFile);
    let data = data.and_then(|data| graph.node(data).ok());
    let data = data.map(|data| data.filename);
    [node.filename.clone()].into_iter().chain(data).collect()
}

/// The record of a node that lies under another one.
pub fn below(graph: &Graph, below: &Node) -> Result<record::Below> {
    Ok(record::Below {
        node: node(graph, below)?,
        open_as: graph.header_name(&below.name)?,
    })
}

/// The names of nodes and of those that they alone are laid out in.
pub fn names_of<'a>(graph: &Graph, nodes: impl Iterator<Item = &'a Node>) -> Vec<String> {
    let mut names = Vec::new();
    let mut next: Vec<Node> = nodes.cloned().collect();
    while let Some(node) = next.pop() {
        let under = [node.file(), node.child(Role::DataFile)];
        let under = under.into_iter().flatten();
        next.extend(under.filter_map(|name| graph.node(name).ok()));
        if !node.name.starts_with('#') {
            names.push(node.name);
        }
    }
    names
}

/// Where a job's result is recorded.
#[derive(Clone)]
pub struct Recording {
    store: Arc<Store>,
    job: String,
}

impl Recording {
    /// For the job called `job`.
    pub fn new(store: Arc<Store>, job: &str) -> Self {
        Self {
            store,
            job: job.to_owned(),
        }
    }

    /// Records what the result is going to be, or that it is in force: it is not otherwise.
    pub fn commit(&self, commit: &record::Commit) -> Result<()> {
        let recorded = self.store.change(|state| self.put(state, commit));
        Ok(recorded?)
    }

    /// Records that the result is in force, as the header says.
    pub fn in_force(&self, commit: &record::Commit) {
        if let Err(error) = self.store.happened(|state| self.put(state, commit)) {
            log::error!("a stream's end is not recorded yet: {error}");
        }
    }

    /// Records that a guest writes another image from now on.
    /// Returns what had to go for that.
    pub fn moved(&self, moved: &record::Moved) -> Result<Gone> {
        let mut gone = Gone::default();
        self.store
            .change(|state| gone = state.put_moved(moved.clone()))?;
        Ok(gone)
    }

    /// Takes that back, and what had to go for it: the guest has not moved.
    pub fn not_moved(&self, moved: &record::Moved, gone: &Gone) -> Result<()> {
        Ok(self
            .store
            .change(|state| state.take_move_back(moved, gone))?)
    }

    /// Records what is in the image that the guest has left, which nobody writes any more.
    pub fn left(&self, moved: &record::Moved, left: &[record::Content]) -> Result<()> {
        Ok(self
            .store
            .change(|state| state.keep_left(moved, left.to_vec()))?)
    }

    fn put(&self, state: &mut State, commit: &record::Commit) {
        if let Some(job) = state.job_named(&self.job) {
            job.commit = Some(commit.clone());
        }
    }
}
