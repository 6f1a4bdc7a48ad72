//! Opening many nodes at once: what a configuration names is read side by side, so that a long
//! chain whose layers are named one by one opens as fast as its headers come.
//!
//! What a user sees does not depend on which is read first: a node may refer to those before it
//! alone, nodes without a name get theirs in the order of the list and are opened in that order,
//! and the first of the list that fails is what is reported.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::ops::Range;
use std::task::{Poll, Waker};

use super::recorded::Recorded;
use crate::options::BlockdevOptions;

/// Nodes that are being opened together, known by their places in the list; none, where one is
/// opened alone.
#[derive(Default)]
pub(super) struct Together {
    /// The first place of each name.
    pub(super) places: HashMap<String, usize>,
    /// Whether the node of a place is open, or has failed; and who waits for that.
    nodes: RefCell<Vec<(bool, Vec<Waker>)>>,
    /// What is recorded of their chains.
    pub(super) recorded: Recorded,
}

impl Together {
    pub(super) fn new(list: &[&BlockdevOptions], recorded: Recorded) -> Self {
        let mut places = HashMap::new();
        for (place, options) in list.iter().enumerate() {
            if let Some(name) = &options.node_name {
                places.entry(name.clone()).or_insert(place);
            }
        }
        let nodes = list.iter().map(|_| (false, Vec::new())).collect();
        Self {
            places,
            nodes: RefCell::new(nodes),
            recorded,
        }
    }

    /// Waits until the nodes of `places` are open, or have failed.
    async fn done(&self, places: Range<usize>) {
        poll_fn(|context| {
            let mut nodes = self.nodes.borrow_mut();
            let open = nodes.get_mut(places.clone()).into_iter().flatten();
            match open.into_iter().find(|(done, _)| !*done) {
                Some((_, waiting)) => {
                    waiting.push(context.waker().clone());
                    Poll::Pending
                }
                None => Poll::Ready(()),
            }
        })
        .await;
    }

    pub(super) fn set_done(&self, place: usize) {
        let mut nodes = self.nodes.borrow_mut();
        if let Some((done, waiting)) = nodes.get_mut(place) {
            *done = true;
            waiting.drain(..).for_each(Waker::wake);
        }
    }

    /// Waits for the node called `name`, if it is one of those before `own`.
    pub(super) async fn wait_for(&self, own: usize, name: &str) {
        if let Some(&place) = self.places.get(name)
            && place < own
        {
            self.done(place..place + 1).await;
        }
    }

    /// Waits until all nodes before `own` are open, or have failed.
    pub(super) async fn turn(&self, own: usize) {
        self.done(0..own).await;
    }
}
