//! The nodes that there are to be at a start, and what was put on top of them.
//!
//! A node may refer to one that a snapshot has made, and that one is put back on top of others which
//! have to be there before. So nodes are opened in rounds:
//!
//! ```text
//!   ┌─▶ those whose references are there ─▶ what snapshots have put on top ─▶ what they have made ─┐
//!   └──────────────────────────── as long as there are more ◀──────────────────────────────────────┘
//! ```
//!
//! Then exports are put on the images that their guests have gone on to, step by step. What refers to a
//! node that never comes is opened last, and is the error.

use std::collections::HashSet;
use std::sync::Arc;

use super::later::{Later, is_to_come, links_of};
use super::overlays;
use super::runtime::{names_in, references};
use super::state::{find, follow_moves, recorded};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::graph::recorded::{is_same_image, other_file};
use crate::job::records::{self, identity};
use crate::options::{BackingRef, BlockRef, BlockdevOptions, Dialect, Driver, ExportOptions};
use crate::reactor::Reactor;
use crate::state::Store;
use crate::state::record::{self, Made, State, are_different};

/// What there is at a start.
#[derive(Debug)]
pub struct AtStart {
    /// The exports, each of the node that its guest has by now.
    pub exports: Vec<ExportOptions>,
    /// Nodes that no client had named: they are there for those who use them.
    unnamed: Vec<String>,
}

impl AtStart {
    /// Has nodes that no client had named go with the last of those who use them, from now on.
    ///
    /// # Errors
    /// When one does not exist.
    pub fn disown(&self, graph: &Graph) -> Result<()> {
        let mut transaction = graph.transaction();
        for name in &self.unnamed {
            transaction.disown(name)?;
        }
        transaction.sweep();
        graph.commit(transaction).map(drop)
    }
}

/// Opens `nodes`, with what is recorded of them, and puts `exports` on what their guests have.
///
/// # Errors
/// When a node cannot be opened, or something recorded does not fit.
pub fn open(
    graph: &Graph,
    store: Option<&Arc<Store>>,
    (nodes, exports): (&[BlockdevOptions], &[ExportOptions]),
    reactor: &Reactor,
) -> Result<AtStart> {
    let mut start = AtStart {
        exports: exports.to_vec(),
        unnamed: Vec::new(),
    };
    let Some(store) = store else {
        reactor.block_on(graph.open_all(nodes))?;
        return Ok(start);
    };
    let opening = Opening {
        graph,
        store,
        reactor,
    };
    opening.open_nodes(nodes, &mut start)?;
    opening.follow(exports, &mut start)?;
    opening.warn_of_left_out();
    Ok(start)
}

struct Opening<'a> {
    graph: &'a Graph,
    store: &'a Arc<Store>,
    reactor: &'a Reactor,
}

impl Opening<'_> {
    fn open_nodes(&self, nodes: &[BlockdevOptions], start: &mut AtStart) -> Result<()> {
        let mut later = nodes.to_vec();
        loop {
            let before = self.count();
            let ready = self.take_ready(&mut later);
            self.open_all(&ready)?;
            self.put_back(&mut [], &later, start)?;
            if later.is_empty() {
                return Ok(());
            }
            if ready.is_empty() && self.count() == before {
                // To be told what is missing.
                return self.open_all(&later);
            }
        }
    }

    fn count(&self) -> usize {
        self.graph.state().nodes().len()
    }

    fn open_all(&self, list: &[BlockdevOptions]) -> Result<()> {
        let recorded = recorded(Some(self.store));
        let opening = self.graph.open_recorded_all(list, recorded);
        self.reactor.block_on(opening)
    }

    /// Takes those that can be opened, in an order in which each is behind those that it refers to.
    fn take_ready(&self, later: &mut Vec<BlockdevOptions>) -> Vec<BlockdevOptions> {
        let state = self.store.state();
        let mut waiting: HashSet<String> = later.iter().flat_map(names_in).collect();
        let tops = state.tops.iter().map(|top| &top.top);
        let promised = tops.chain(state.made.iter().map(|made| &made.node));
        let promised = promised.filter_map(|node| node.name.clone());
        let promised = promised.filter(|name| self.graph.node(name).is_err());
        let promised: HashSet<String> = promised.filter(|name| !waiting.contains(name)).collect();
        let is_ready = |node: &BlockdevOptions, waiting: &HashSet<String>| {
            let own = names_in(node);
            let needs = needs(node, &state);
            let mut needs = needs.iter().filter(|name| !own.contains(name));
            !needs.any(|name| waiting.contains(name) || promised.contains(name))
                && !links_of(node, &state)
                    .filter_map(|link| link.below.as_ref())
                    .any(|below| is_to_come(self.graph, &state, &below.node))
        };
        let mut ready = Vec::new();
        loop {
            let before = ready.len();
            for node in std::mem::take(later) {
                if !is_ready(&node, &waiting) {
                    later.push(node);
                    continue;
                }
                for name in names_in(&node) {
                    waiting.remove(&name);
                }
                ready.push(node);
            }
            if ready.len() == before {
                return ready;
            }
        }
    }

    /// Puts back what snapshots have put on top, and what they have made.
    fn put_back(
        &self,
        exports: &mut [ExportOptions],
        later: &[BlockdevOptions],
        start: &mut AtStart,
    ) -> Result<()> {
        let mut patient = true;
        loop {
            let before = self.count();
            let later = Later {
                nodes: later,
                patient,
            };
            let unnamed = &mut start.unnamed;
            overlays::restore(
                self.graph,
                self.store,
                exports,
                &later,
                self.reactor,
                unnamed,
            )?;
            let state = self.store.state();
            let can_be_opened = |made: &&Made| {
                let image = (made.node.file.as_str(), made.identity);
                !later.has(&made.node) && !later.has_below(self.graph, &state, image)
            };
            for made in state.made.iter().filter(can_be_opened) {
                if let Err(error) = self.open_made(made, &state) {
                    log::debug!("'{}': {error}", made.node.file);
                }
            }
            match self.count() == before {
                false => patient = true,
                // What it would wait for never comes.
                true if patient && later.nodes.is_empty() => patient = false,
                true => return Ok(()),
            }
        }
    }

    /// Puts exports on the images that guests have moved to, those that were put on top of these, and
    /// again: a guest has never come back to an image that it has left.
    fn follow(&self, own: &[ExportOptions], start: &mut AtStart) -> Result<()> {
        let state = self.store.state();
        for _ in 0..=state.moved.len() + state.tops.len() {
            let mut exports = start.exports.clone();
            let before = self.count();
            follow_moves(self.graph, Some(self.store), own, &mut exports)?;
            self.put_back(&mut exports, &[], start)?;
            let is_done = exports == start.exports && self.count() == before;
            start.exports = exports;
            if is_done {
                break;
            }
        }
        Ok(())
    }

    /// Opens a node that a snapshot has made, if it is not there: over what it was put on top of, or
    /// what is recorded to lie under it since.
    fn open_made(&self, made: &Made, state: &State) -> Result<()> {
        let is_open = find(self.graph, &any(&made.node), made.identity);
        if is_open.map_err(Error::Invalid)?.is_some() {
            return Ok(());
        }
        let below = find(self.graph, &any(&made.below), made.below_identity);
        let mut links = records::links(state);
        let link = links.find(|link| {
            let image = (made.node.file.as_str(), made.identity);
            is_same_image((&link.node.file, link.identity), image)
        });
        let backing = match below.map_err(Error::Invalid)? {
            Some(below) => BackingRef::Node(BlockRef::Name(below.name)),
            None if link.is_some() => BackingRef::None,
            None => {
                let text = format!("'{}', which was below it, is not open", made.below.file);
                return Err(Error::Invalid(text));
            }
        };
        let mut value = made.open_as.clone();
        overlays::refer(&self.graph.state(), &mut value);
        let options = BlockdevOptions::from_value(&value, Dialect::Recorded);
        let mut options = options.map_err(|error| Error::Invalid(error.to_string()))?;
        match &mut options.driver {
            Driver::Qcow2(qcow2) => qcow2.backing = backing,
            Driver::Qed(qed) => qed.backing = backing,
            _ => {}
        }
        let name = options.node_name.clone().unwrap_or_default();
        let opening = self
            .graph
            .open_unseen(std::slice::from_ref(&options), recorded(Some(self.store)));
        let transaction = self.reactor.block_on(opening)?;
        let found = identity(transaction.state().node(&name)?);
        if are_different(found, made.identity) {
            let text = other_file(&made.node.file, found, made.identity);
            return Err(Error::Invalid(text));
        }
        self.graph.commit(transaction).map(drop)
    }

    /// Tells of nodes that snapshots had made and that cannot be had: nothing has needed them.
    fn warn_of_left_out(&self) {
        let state = self.store.state();
        for made in &state.made {
            if let Err(error) = self.open_made(made, &state) {
                log::warn!(
                    "node '{}', which a snapshot has made, is left out, and stays recorded in '{}': \
                     {error}",
                    made.node.name.as_deref().unwrap_or_default(),
                    self.store.path().display()
                );
            }
        }
    }
}

/// The names of nodes that have to be there before a node: those that it refers to, and the one that
/// is recorded to lie under it.
fn needs(node: &BlockdevOptions, state: &State) -> Vec<String> {
    let mut needs = references(node);
    let below = links_of(node, state).filter_map(|link| link.below.as_ref()?.node.name.clone());
    needs.extend(below);
    needs
}

/// The record of an image, whatever its node is called.
fn any(node: &record::Node) -> record::Node {
    record::Node {
        name: None,
        ..node.clone()
    }
}
