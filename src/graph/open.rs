//! Opening images in a graph with its drivers: one, many at once, or what a header is going to name.

use futures_util::future::join_all;

use super::below::backing_options_with;
use super::descent::Descent;
use super::driver::WHOLE;
use super::opening::{Opening, Origin};
use super::recorded::Recorded;
use super::together::Together;
use super::{Graph, Transaction, drivers};
use crate::error::Result;
use crate::format::qcow2::Backing;
use crate::options::BlockdevOptions;
use crate::storage::opener;

impl Graph {
    /// Opens an image with everything under it. Returns the node's name.
    ///
    /// # Errors
    /// When a file cannot be opened or is no image that can be served. No node is added then.
    pub async fn open(&self, options: &BlockdevOptions) -> Result<String> {
        let opening = Opening::new(self, drivers::of, Together::default());
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
        let transaction = self.open_unseen(list, recorded).await?;
        self.commit(transaction).map(drop)
    }

    /// As [`Graph::open_recorded_all`], up to the moment when the nodes are to be published.
    ///
    /// # Errors
    /// As there.
    pub async fn open_unseen(
        &self,
        list: &[BlockdevOptions],
        recorded: Recorded,
    ) -> Result<Transaction> {
        let list = recorded.present(list);
        let opening = Opening::new(self, drivers::of, Together::new(&list, recorded));
        let opened = join_all(list.iter().enumerate().map(async |(place, options)| {
            let mut descent = Descent::new(place);
            let node = opening.open_node(options, &mut descent, Origin::Named);
            let result = node.await;
            opening.together.set_done(place);
            result
        }))
        .await;
        opened.into_iter().try_for_each(|result| result.map(drop))?;
        Ok(opening.finish())
    }

    /// Opens `backing` as the header of node `above`'s image would name it. It is not put under
    /// that node. Returns the new node's name.
    ///
    /// # Errors
    /// As for [`Graph::open`]; or the image is itself in that chain.
    pub async fn open_as_backing(&self, above: &str, backing: &Backing) -> Result<String> {
        let node = self.node(above)?;
        let options = backing_options_with(&node.options, &node.filename, backing, self.allowed())?;
        let mut descent = Descent::new(0);
        if let Ok(stat) = opener::look(&node.filename).await {
            descent.wanted = self.state().extent(&node)?;
            descent.enter(&node.filename, &stat)?;
            descent.wanted = WHOLE;
        }
        let opening = Opening::new(self, drivers::of, Together::default());
        let opened = opening.open_node(&options, &mut descent, Origin::Header);
        let name = opened.await?;
        opening.commit()?;
        Ok(name)
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
