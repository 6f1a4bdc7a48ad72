//! Guests that have moved to other images than the options name, by commits that have ended.

use std::sync::Arc;

use super::find;
use crate::error::{Error, Result};
use crate::graph::recorded::is_same_image;
use crate::graph::{Graph, Node};
use crate::job::records::{files_of, identity};
use crate::options::ExportOptions;
use crate::state::Store;
use crate::state::record::{self, Identity, State, Work};
use crate::storage::identity::contents_of;

/// Puts exports on the images that their guests write since commits have ended, whatever the options
/// say: what those have that they name is out of date.
///
/// `own` are the exports as the options have them, `exports` as they have been changed so far.
///
/// # Errors
/// When such an image is not among those that are open.
pub fn follow_moves(
    graph: &Graph,
    store: Option<&Arc<Store>>,
    own: &[ExportOptions],
    exports: &mut [ExportOptions],
) -> Result<()> {
    let Some(store) = store else {
        return Ok(());
    };
    let state = store.state();
    let named = own.iter().flat_map(|export| image_of(graph, export));
    let named: Vec<_> = named.collect();
    for export in exports {
        // A guest may have moved several times, and never in a circle.
        for _ in 0..state.moved.len() {
            let Ok(node) = graph.image_node(&export.node_name) else {
                // A client may have removed it, since its guest has left it; or it is one that is put
                // back only with what is on top of it.
                match left_for(graph, &state.moved, &export.node_name) {
                    Some(to) => export.node_name = to,
                    None => break,
                }
                continue;
            };
            let file = graph.file_of(&node)?;
            let Some(moved) = state.moved_from((&file, identity(&node))) else {
                break;
            };
            let any = record::Node {
                name: None,
                ..moved.to.clone()
            };
            let found = find(graph, &any, moved.to_identity);
            let to = found.ok().flatten().ok_or_else(|| {
                Error::Invalid(format!(
                    "export '{}': its guest has left node '{}' for '{}', as '{}' records, and that \
                     is not open (add it to the options, or remove that file to forget this: what \
                     '{file}' has is out of date)",
                    export.id,
                    node.name,
                    moved.to.file,
                    store.path().display()
                ))
            })?;
            check_left(graph, store, moved, (export, &node))?;
            log::warn!(
                "export '{}' shows node '{}' in place of '{}', which was committed into it: name it in \
                 the options",
                export.id,
                to.name,
                node.name
            );
            if export.node_name == node.name {
                export.node_name.clone_from(&to.name);
            }
            // Filters over it.
            let mut transaction = graph.transaction();
            transaction.replace(&node.name, &to.name)?;
            transaction.open_for_guests(&to.name)?;
            drop(graph.commit(transaction)?);
        }
    }
    forget_known(graph, store, &named)
}

/// The node that a guest writes since it has left the one called `name`, which is not open. That need
/// not be open either, where something is on top of it.
fn left_for(graph: &Graph, moved: &[record::Moved], name: &str) -> Option<String> {
    let mut moved = moved.iter();
    let moved = moved.find(|moved| moved.from.name.as_deref() == Some(name))?;
    let any = record::Node {
        name: None,
        ..moved.to.clone()
    };
    match find(graph, &any, moved.to_identity).ok().flatten() {
        Some(to) => Some(to.name),
        None => moved.to.name.clone(),
    }
}

/// The file of the image that an export shows, and what tells it from others.
fn image_of(graph: &Graph, export: &ExportOptions) -> Result<(String, Identity)> {
    let node = graph.image_node(&export.node_name)?;
    Ok((graph.file_of(&node)?, identity(&node)))
}

/// Compares what is in an image with what a guest has left there: who has made another disk of it since
/// means that one.
fn check_left(
    graph: &Graph,
    store: &Store,
    moved: &record::Moved,
    (export, node): (&ExportOptions, &Node),
) -> Result<()> {
    let (files, place) = (files_of(graph, node), store.path().display());
    let found = contents_of(&files).map_err(|error| {
        Error::Invalid(format!(
            "node '{}': when its files were changed is not known: {error}",
            node.name
        ))
    })?;
    match &moved.left {
        // The process was ended while the guest was leaving it.
        None => Ok(store.change(|state| state.keep_left(moved, found.clone()))?),
        Some(left) if *left == found => Ok(()),
        Some(_) => Err(Error::Invalid(format!(
            "export '{}': its guest has left node '{}' for '{}', as '{place}' records, and the file of that \
             node, '{}', has been changed since: it may hold another disk (expected the file as the commit \
             has left it; name the image that the guest is to have in a file of another name, or '{2}' in \
             the options without that node, or remove '{place}' to forget this)",
            export.id,
            node.name,
            moved.to.file,
            node.filename.display()
        ))),
    }
}

/// Forgets where guests have gone whose exports, which show the images of `named`, are there by their own
/// options: what was left is not open, and may become another disk.
fn forget_known(graph: &Graph, store: &Store, named: &[(String, Identity)]) -> Result<()> {
    let state = store.state();
    let known = state.moved.iter().filter(|moved| {
        let (from, to) = (
            (moved.from.file.as_str(), moved.identity),
            (moved.to.file.as_str(), moved.to_identity),
        );
        let any = record::Node {
            name: None,
            ..moved.from.clone()
        };
        let is_closed = || matches!(find(graph, &any, moved.identity), Ok(None));
        // How such a job has ended is known from it.
        let ends_a_job = || {
            state.jobs.iter().any(|job| match &job.work {
                Work::Commit(commit) => {
                    is_same_image((&commit.top.file, commit.identity), from)
                        && commit.overlay.is_none()
                }
                Work::Stream(_) => false,
            })
        };
        named
            .iter()
            .any(|(file, identity)| is_same_image((file, *identity), to))
            && is_closed()
            && !ends_a_job()
    });
    let known: Vec<_> = known.cloned().collect();
    if known.is_empty() {
        return Ok(());
    }
    let forget = |state: &mut State| state.moved.retain(|moved| !known.contains(moved));
    Ok(store.change(forget)?)
}
