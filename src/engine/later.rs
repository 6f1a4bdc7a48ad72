//! What is still to come while the nodes of a start are opened, as far as others have to wait for it.

use std::path::Path;

use super::runtime::names_in;
use crate::graph::recorded::{is_same_image, is_same_place};
use crate::graph::{Graph, Node};
use crate::job::records;
use crate::options::{BlockRef, BlockdevOptions, Driver};
use crate::state::record::{self, Identity, Link, State};
use crate::storage::is_same_path;

/// Nodes that are opened later than others.
pub(super) struct Later<'a> {
    pub nodes: &'a [BlockdevOptions],
    /// What snapshots have put on top of others may come as well, and is waited for.
    pub patient: bool,
}

impl Later<'_> {
    /// Whether the recorded node is one of them, or may be.
    pub fn has(&self, node: &record::Node) -> bool {
        self.nodes.iter().any(|options| {
            let is_named = |name: &String| names_in(options).contains(name);
            node.name.as_ref().is_some_and(is_named) || is_in(options, Path::new(&node.file))
        })
    }

    /// Whether what is recorded to lie under an image is still to come.
    pub fn has_below(&self, graph: &Graph, state: &State, image: (&str, Identity)) -> bool {
        let links = records::links(state)
            .filter(|link| is_same_image((&link.node.file, link.identity), image));
        let mut below = links.filter_map(|link| link.below.as_ref());
        below.any(|below| {
            self.has(&below.node) || self.patient && is_to_come(graph, state, &below.node)
        })
    }

    /// Whether one of them waits for this image, which is recorded to lie under it.
    pub fn want(&self, state: &State, image: &record::Node) -> bool {
        let mut links = records::links(state).filter(|link| self.has(&link.node));
        links.any(|link| {
            let below = link.below.as_ref();
            below.is_some_and(|below| is_same_place(&below.node.file, &image.file))
        })
    }
}

/// Whether a snapshot has put the image of this node on top of another one, and it is not open.
pub(super) fn is_to_come(graph: &Graph, state: &State, node: &record::Node) -> bool {
    let is_it = |other: &record::Node| is_same_place(&other.file, &node.file);
    let known = state.tops.iter().any(|top| is_it(&top.top))
        || state.made.iter().any(|made| is_it(&made.node));
    let is_open = |open: &Node| {
        let file = graph.file_of(open);
        !open.is_file() && file.is_ok_and(|file| is_same_place(&file, &node.file))
    };
    known && !graph.nodes().iter().any(is_open)
}

/// Whether a node, or one written inside it, is in this file.
fn is_in(options: &BlockdevOptions, file: &Path) -> bool {
    let own = match &options.driver {
        Driver::File(own) | Driver::HostDevice(own) => is_same_path(&own.filename, file),
        _ => false,
    };
    own || options.children().iter().any(|(_, child)| match child {
        BlockRef::Inline(child) => is_in(child, file),
        BlockRef::Name(_) => false,
    })
}

/// What is recorded to lie under a node, or under one that is written inside it.
pub(super) fn links_of<'s>(
    node: &BlockdevOptions,
    state: &'s State,
) -> impl Iterator<Item = &'s Link> {
    let own = names_in(node);
    records::links(state).filter(move |link| {
        let is_own = |name: &String| own.contains(name);
        link.node.name.as_ref().is_some_and(is_own) || is_in(node, Path::new(&link.node.file))
    })
}
