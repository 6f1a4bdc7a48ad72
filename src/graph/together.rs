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

use futures_util::future::join_all;

use super::Graph;
use super::descent::Descent;
use super::opening::{Opening, Origin};
use super::recorded::Recorded;
use crate::error::Result;
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
    fn new(list: &[&BlockdevOptions], recorded: Recorded) -> Self {
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

    fn set_done(&self, place: usize) {
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

impl Graph {
    /// Opens an image with everything under it. Returns the node's name.
    ///
    /// # Errors
    /// When a file cannot be opened or is no image that can be served. No node is added then.
    pub async fn open(&self, options: &BlockdevOptions) -> Result<String> {
        let opening = Opening::new(self, Together::default());
        let mut descent = Descent::new(0);
        let opened = opening.open_node(options, &mut descent, Origin::Named);
        let name = opened.await?;
        opening.commit()?;
        Ok(name)
    }

    /// Opens images, each with everything under it. A node may refer to those before it.
    ///
    /// # Errors
    /// As for [`Graph::open`], of the first that fails. No node is added then.
    pub async fn open_all(&self, list: &[BlockdevOptions]) -> Result<()> {
        self.open_recorded_all(list, Recorded::default()).await
    }

    /// As [`Graph::open_all`], with chains as they are recorded where that is something else.
    ///
    /// # Errors
    /// As there; or an image was changed since by something else.
    pub async fn open_recorded_all(
        &self,
        list: &[BlockdevOptions],
        recorded: Recorded,
    ) -> Result<()> {
        let list = recorded.present(list);
        let opening = Opening::new(self, Together::new(&list, recorded));
        let opened = join_all(list.iter().enumerate().map(async |(place, options)| {
            let mut descent = Descent::new(place);
            let node = opening.open_node(options, &mut descent, Origin::Named);
            let result = node.await;
            opening.together.set_done(place);
            result
        }))
        .await;
        opened.into_iter().try_for_each(|result| result.map(drop))?;
        opening.commit()
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a list whose outcome depends on what is read first, a reference to a
    //! later node, nodes left behind after an error.

    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::options::Dialect;
    use crate::reactor::Reactor;
    use serde_json::{Value, json};

    fn open(list: &[Value]) -> (Result<()>, Vec<String>) {
        let list: Vec<BlockdevOptions> = list
            .iter()
            .map(|value| BlockdevOptions::from_value(value, Dialect::Json).unwrap())
            .collect();
        let (graph, reactor) = (Graph::default(), Reactor::for_this_thread().unwrap());
        let result = reactor.block_on(graph.open_all(&list));
        (result, graph.nodes().into_iter().map(|n| n.name).collect())
    }

    /// Three nodes: a file, a raw node over it and one with a nested file.
    fn list(dir: &std::path::Path) -> Vec<Value> {
        let path = |name: &str| {
            let path = dir.join(name);
            std::fs::write(&path, [7; 4096]).unwrap();
            path.to_str().unwrap().to_owned()
        };
        vec![
            json!({"driver": "file", "node-name": "f", "filename": path("f")}),
            json!({"driver": "raw", "node-name": "a", "file": "f"}),
            json!({"driver": "raw", "node-name": "b",
                "file": {"driver": "file", "filename": path("b")}}),
            json!({"driver": "raw", "node-name": "c",
                "file": {"driver": "file", "filename": path("c")}}),
        ]
    }

    #[test]
    fn nodes_come_in_the_order_of_the_list() {
        let dir = tempfile::tempdir().unwrap();
        let (result, names) = open(&list(dir.path()));
        result.unwrap();
        assert_eq!(names, ["f", "a", "b", "c", "#block001", "#block002"]);
    }

    #[test]
    fn a_node_refers_to_those_before_it_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut list = list(dir.path());
        list.swap(0, 1);
        let (result, names) = open(&list);
        let text = result.unwrap_err().to_string();
        assert!(text.contains("Cannot find node 'f'"), "{text}");
        assert!(names.is_empty(), "{names:?} are left");
    }

    #[test]
    fn the_first_error_of_the_list_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut list = list(dir.path());
        let missing = |name: &str| {
            let path = format!("/missing/{name}");
            json!({"driver": "file", "node-name": name, "filename": path})
        };
        list.insert(3, missing("first"));
        list.push(missing("second"));
        let (result, names) = open(&list);
        let text = result.unwrap_err().to_string();
        assert!(text.contains("/missing/first"), "{text}");
        assert!(names.is_empty(), "{names:?} are left");
    }

    #[test]
    fn a_name_that_is_taken_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut list = list(dir.path());
        list.push(json!({"driver": "raw", "node-name": "a", "file": "f"}));
        let (result, names) = open(&list);
        let text = result.unwrap_err().to_string();
        assert!(text.contains("Duplicate nodes"), "{text}");
        assert!(names.is_empty(), "{names:?} are left");
    }
}
