//! Write thresholds of nodes: which there are, and which disks and storages have to look at them.
//!
//! A threshold of an image, or of a filter, is looked at by the chains whose top that is; one of a node
//! that has its bytes in a storage, by that storage. A disk with any of them, however far under it,
//! has a chain that asks. The graph keeps a threshold until it is replaced, has been crossed, or its
//! node goes.

use std::collections::HashSet;
use std::sync::Arc;

use super::edges::Role;
use super::nodes::{Node, State};
use super::{Graph, Released};
use crate::error::Result;
use crate::format::Format;
use crate::storage::threshold::Listener;
use crate::storage::{Threshold, Watches};

impl State {
    /// The threshold of node `name`, if it has one.
    #[must_use]
    pub fn threshold(&self, name: &str) -> Option<&Arc<Threshold>> {
        let mut thresholds = self.thresholds.iter();
        Some(&thresholds.find(|(node, _)| node == name)?.1)
    }

    /// The names of the nodes that have one, and where it is, in bytes.
    pub fn thresholds(&self) -> impl Iterator<Item = (&str, u64)> {
        let thresholds = self.thresholds.iter();
        thresholds.map(|(name, threshold)| (&**name, threshold.at()))
    }

    /// What the chain of the disk whose top is node `top` has to look at: the thresholds of that node
    /// and of what it filters, the outermost first. `None`: neither there nor in what the disk is laid
    /// out in is one.
    pub(super) fn watch(&self, top: &str) -> Option<Vec<Arc<Threshold>>> {
        if self.thresholds.is_empty() {
            return None;
        }
        let mut watch = None;
        let (mut seen, mut open) = (HashSet::new(), vec![top]);
        while let Some(node) = open.pop().and_then(|name| self.node(name).ok()) {
            if !seen.insert(&node.name) {
                continue;
            }
            if let Some(threshold) = self.threshold(&node.name) {
                let watch: &mut Vec<_> = watch.get_or_insert_default();
                if !has_storage(node) && self.is_shown_by(node, top) {
                    watch.push(threshold.clone());
                }
            }
            let own = node.edges.iter().filter(|edge| edge.role != Role::Backing);
            open.extend(own.map(|edge| &*edge.child));
        }
        watch
    }

    /// Whether `node` is `top` or filtered by it.
    fn is_shown_by(&self, node: &Node, top: &str) -> bool {
        let filtered = |name: &&str| self.node(name).ok()?.child(Role::Filtered);
        std::iter::successors(Some(top), filtered).any(|name| name == node.name)
    }

    /// The storages that thresholds have to do with, here or in `old`, each with those that it has to
    /// look at, the outermost first.
    pub(super) fn watched(&self, old: &Self) -> Vec<Watched> {
        let mut all: Vec<Watched> = Vec::new();
        if self.thresholds.is_empty() && old.thresholds.is_empty() {
            return all;
        }
        for node in self.children_first().into_iter().rev() {
            let threshold = self.threshold(&node.name).cloned();
            let concerns = threshold.is_some() || old.threshold(&node.name).is_some();
            if !concerns || !has_storage(node) {
                continue;
            }
            let Some(watches) = node.layer.storage.watches() else {
                continue;
            };
            let known = all.iter_mut().find(|known| known.is(watches));
            match known {
                Some(known) => known.thresholds.extend(threshold),
                None => all.push(Watched {
                    node: node.clone(),
                    thresholds: threshold.into_iter().collect(),
                }),
            }
        }
        all
    }

    /// Forgets the thresholds of nodes that have gone.
    pub(super) fn settle_thresholds(&mut self) {
        let places = &self.thresholds;
        if places.iter().any(|(name, _)| self.node(name).is_err()) {
            let mut thresholds = std::mem::take(&mut self.thresholds);
            thresholds.retain(|(name, _)| self.node(name).is_ok());
            self.thresholds = thresholds;
        }
    }

    /// Says to thresholds that are not in `new` that they are not to be told any more.
    pub(super) fn disarm_all_but(&self, new: &Self) {
        for (name, threshold) in &self.thresholds {
            let stays = new.threshold(name);
            if stays.is_none_or(|stays| !Arc::ptr_eq(stays, threshold)) {
                threshold.disarm();
            }
        }
    }
}

/// Whether the bytes of `node` are just those of its storage.
fn has_storage(node: &Node) -> bool {
    matches!(node.layer.format, Format::Raw(_)) && !node.is_filter()
}

/// A storage, by one of the nodes that have it, and the thresholds that it has to look at.
pub(super) struct Watched {
    node: Arc<Node>,
    thresholds: Vec<Arc<Threshold>>,
}

impl Watched {
    fn is(&self, other: &Watches) -> bool {
        let own = self.node.layer.storage.watches();
        own.is_some_and(|own| std::ptr::eq(own, other))
    }

    /// From now on the storage looks at them.
    pub(super) fn put_in_force(self) {
        if let Some(watches) = self.node.layer.storage.watches() {
            watches.set(self.thresholds);
        }
    }
}

impl Graph {
    /// Has `listener` told of the first write that reaches past offset `at` of node `name`, in place of
    /// what was wanted before; nobody with 0.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn set_threshold(&self, name: &str, at: u64, listener: Listener) -> Result<Released> {
        let threshold = (at != 0).then(|| Threshold::new(name, at, listener));
        let mut transaction = self.transaction();
        transaction.set_threshold(name, threshold)?;
        self.commit(transaction)
    }

    /// Forgets a threshold that has been crossed, so that nobody looks at it any more.
    ///
    /// # Errors
    /// When the graph cannot be changed.
    pub fn forget_crossed(&self, name: &str) -> Result<Released> {
        let mut transaction = self.transaction();
        transaction.forget_crossed(name);
        self.commit(transaction)
    }
}
