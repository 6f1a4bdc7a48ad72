//! What the daemon records of its disks and jobs, and how the next one goes on with it.
//!
//! At the start what is recorded decides what lies under images ([`recorded`]), and is compared with
//! the nodes that the command line has made ([`plan`]): a job or a chain of another image is
//! nothing to guess about. Then jobs go on ([`Engine::go_on`]).

mod moves;
mod plan;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::Setup;
use crate::error::SyncFailure;
use crate::error::{Error, Result};
use crate::format::qcow2::Backing;
use crate::graph::recorded::{is_same_image, is_same_place, other_file};
use crate::graph::{Graph, Node, Recorded, RecordedLink, RecordedNode};
use crate::job::records::identity;
use crate::state::record::{self, Identity};
use crate::state::{StateError, StateOptions, Store};
use crate::storage::Syncs;

pub use moves::follow_moves;
pub use plan::{Plan, plan};

impl From<StateError> for Error {
    fn from(error: StateError) -> Self {
        Self::Invalid(error.to_string())
    }
}

/// Opens the state that the configuration names, if it names one.
///
/// # Errors
/// When it cannot be read, or belongs to another process.
pub fn open(options: Option<&StateOptions>) -> Result<Option<Arc<Store>>> {
    let Some(StateOptions { dir, name }) = options else {
        return Ok(None);
    };
    let store = Store::open(dir, name)?;
    for failed in &store.state().failed_syncs {
        keep_failure(failed);
    }
    Ok(Some(Arc::new(store)))
}

/// What there is to be, where this is what the command line names. What the command line has learnt
/// of the changes that are recorded is taken out of the record.
///
/// # Errors
/// When the two do not fit together, or the record cannot be written.
pub fn setup(store: Option<&Arc<Store>>, named: &Setup) -> Result<Setup> {
    let Some(store) = store else {
        return Ok(named.clone());
    };
    let mut changes = store.state().changes;
    let setup = named.with(&mut changes, &store.path().display().to_string())?;
    store.change(|state| state.changes = changes)?;
    Ok(setup)
}

/// What [`setup`] is going to say, as far as is known while another process may have the state.
#[must_use]
pub fn expected(options: Option<&StateOptions>, named: &Setup) -> Setup {
    let state = options.and_then(|options| crate::state::peek(&options.dir, &options.name).ok());
    // What is wrong with it is told when it is opened.
    let setup = state.and_then(|mut state| named.with(&mut state.changes, "").ok());
    setup.unwrap_or_else(|| named.clone())
}

/// A flush that failed for an earlier process has failed for this one.
fn keep_failure(failed: &record::FailedSync) {
    let failure = SyncFailure {
        file: failed.file.clone(),
        errno: failed.errno,
        at: UNIX_EPOCH + Duration::from_secs(failed.at),
    };
    Syncs::keep(failure, failed.identity);
}

/// The record of a failed flush.
pub fn failed_sync(failure: &SyncFailure, identity: Identity) -> record::FailedSync {
    let path = std::path::absolute(&failure.file).unwrap_or_else(|_| failure.file.clone().into());
    let at = failure.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    record::FailedSync {
        file: path.display().to_string(),
        identity,
        errno: failure.errno,
        at: at.as_secs(),
    }
}

/// What is recorded of chains, for those who open images.
pub fn recorded(store: Option<&Arc<Store>>) -> Recorded {
    let Some(store) = store else {
        return Recorded::default();
    };
    let state = store.state();
    let commits = state.jobs.iter().filter_map(|job| job.commit.as_ref());
    // A job's comes first: the same image's older link is not in force any more.
    let links: Vec<(&record::Link, bool)> = commits
        .map(|commit| (&commit.link, commit.done))
        .chain(state.links.iter().map(|link| (link, true)))
        .collect();
    let mut superseding: Vec<&record::Link> = Vec::new();
    let mut released = HashSet::new();
    let mut recorded = Vec::new();
    for (link, certain) in &links {
        // Unless it is not certain: then either may be in force, and the header tells.
        if superseding.iter().any(|newer| newer.supersedes(link)) {
            continue;
        }
        if *certain {
            superseding.push(link);
        }
        released.extend(link.released.iter().cloned());
        recorded.push(RecordedLink {
            format: link.node.format.clone(),
            file: link.node.file.clone(),
            identity: link.identity,
            header: link.header.as_ref().map(backing),
            certain: *certain,
            let_go: link.let_go
                || links.iter().any(|(other, certain)| {
                    *certain && other.released_files.contains(&link.node.file)
                }),
            below: link.below.as_ref().map(|below| RecordedNode {
                name: below.node.name.clone(),
                format: below.node.format.clone(),
                file: below.node.file.clone(),
                open_as: Backing {
                    name: below.open_as.clone(),
                    format: Some(below.node.format.clone()),
                },
            }),
        });
    }
    Recorded {
        place: store.path().display().to_string(),
        links: recorded,
        released,
    }
}

fn backing(header: &record::Header) -> Backing {
    Backing {
        name: header.name.clone(),
        format: header.format.clone(),
    }
}

/// The node that a record means: under whatever path its file is now. `None` if its image is not
/// open, and what is open is not in its place.
pub(super) fn find(
    graph: &Graph,
    wanted: &record::Node,
    of: Identity,
) -> std::result::Result<Option<Node>, String> {
    let file_of = |node: &Node| graph.file_of(node).unwrap_or_default();
    let is_named = |node: &Node| wanted.name.as_ref().is_none_or(|name| *name == node.name);
    // A file is a disk of its own only where the record is about that node.
    let is_meant = |node: &Node| !node.is_file() || (wanted.name.is_some() && is_named(node));
    let is_it = |node: &&Node| {
        is_meant(node) && is_same_image((&wanted.file, of), (&file_of(node), identity(node)))
    };
    let nodes = graph.nodes();
    let images: Vec<&Node> = nodes.iter().filter(is_it).collect();
    let fits = |node: &&&Node| node.format_name() == wanted.format && is_named(node);
    if let Some(node) = images.iter().find(fits) {
        return Ok(Some((*node).clone()));
    }
    let named = wanted.name.as_ref().and_then(|name| graph.node(name).ok());
    let image = images.first();
    let (found, image) = match (named, image) {
        (Some(node), _) => (node, image),
        (None, Some(image)) if wanted.name.is_none() => ((*image).clone(), Some(image)),
        (None, Some(image)) => {
            return Err(format!(
                "there is no node '{}', the {} image in '{}'; '{}' is",
                wanted.name.as_deref().unwrap_or_default(),
                wanted.format,
                wanted.file,
                image.name
            ));
        }
        (None, None) => return Ok(None),
    };
    let (name, file) = (&found.name, file_of(&found));
    Err(match image {
        Some(image) if image.name == *name => format!(
            "node '{name}' is of format {}, and was of format {}",
            found.format_name(),
            wanted.format
        ),
        _ if is_same_place(&file, &wanted.file) => other_file(&file, identity(&found), of),
        _ => format!("node '{name}' is in '{file}', and was in '{}'", wanted.file),
    })
}
