//! Opening images: from options to nodes, down to the last backing file.
//!
//! All nodes that one command opens are one [`Transaction`]: nobody sees them before all are open,
//! and nothing has to be taken back where one fails.
//!
//! Images are opened as readers: they share their files with other readers, and nothing is
//! written to them. An export or a job that is going to write asks for it with
//! [`Graph::make_writable`].

use std::cell::{Ref, RefCell};
use std::future::ready;
use std::sync::Arc;

use futures_util::future::LocalBoxFuture;

use super::below::backing_options_with;
use super::compile::compile;
use super::descent::Descent;
use super::driver::{self, WHOLE};
use super::nodes::{Node, State};
use super::recorded::{RecordedLink, RecordedNode};
use super::together::Together;
use super::{Graph, Transaction};
use crate::chain::{Backed, Root};
use crate::error::{Action, Error, Result};
use crate::format::Format;
use crate::format::qcow2::Backing;
use crate::options::{self, BackingRef, BlockRef, BlockdevOptions};
use crate::storage::Storage;

/// Who asked for a node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// A user, by name.
    Named,
    /// It is written inside another node.
    Nested,
    /// The header of the image above it.
    Header,
}

/// An image that is open, to be written.
pub(super) type Opened = (Format, Arc<dyn Storage>);

/// How a driver opens its nodes, with the options that only it has.
pub(super) trait OpenNode {
    /// Opens node `name` with `options`, and nodes under it that are not open yet.
    fn open<'a>(
        &'a self,
        opening: &'a Opening<'_>,
        name: &'a str,
        options: &'a BlockdevOptions,
        descent: &'a mut Descent,
    ) -> LocalBoxFuture<'a, Result<Node>>;

    /// Opens the image of `node` anew, to write it. When that fails, others may go on reading it.
    fn reopen<'a>(
        &'a self,
        _graph: &'a Graph,
        node: &'a Node,
    ) -> LocalBoxFuture<'a, Result<Opened>> {
        let text = format!("node '{}' has no image of its own", node.name);
        Box::pin(ready(Err(Error::Invalid(text))))
    }

    /// Its own bytes, where `file` has those of the node under it.
    ///
    /// # Errors
    /// When they are not within those.
    fn bytes_in(&self, file: Arc<dyn Storage>) -> LocalBoxFuture<'_, Result<Arc<dyn Storage>>> {
        Box::pin(ready(Ok(file)))
    }
}

/// The table of all drivers.
pub(super) type Drivers = fn(&options::Driver) -> &dyn OpenNode;

/// Nodes that are being opened.
pub(super) struct Opening<'a> {
    graph: &'a Graph,
    drivers: Drivers,
    transaction: RefCell<Transaction>,
    pub(super) together: Together,
}

impl<'a> Opening<'a> {
    pub(super) fn new(graph: &'a Graph, drivers: Drivers, together: Together) -> Self {
        Self {
            graph,
            drivers,
            transaction: RefCell::new(graph.transaction()),
            together,
        }
    }

    pub(super) fn graph(&self) -> &Graph {
        self.graph
    }

    /// The graph with the nodes that are open so far. It is not kept while others are opened.
    pub(super) fn state(&self) -> Ref<'_, State> {
        Ref::map(self.transaction.borrow(), Transaction::state)
    }

    pub(super) fn node(&self, name: &str) -> Result<Arc<Node>> {
        self.state().node(name).cloned()
    }

    /// Publishes all nodes, in the order of the list that they are from.
    pub(super) fn commit(self) -> Result<()> {
        let graph = self.graph;
        graph.commit(self.finish()).map(drop)
    }

    /// All nodes, to be published in the order of the list that they are from.
    pub(super) fn finish(self) -> Transaction {
        let mut transaction = self.transaction.into_inner();
        transaction.arrange(&self.together.places);
        transaction
    }

    pub(super) fn open_node<'o>(
        &'o self,
        options: &'o BlockdevOptions,
        descent: &'o mut Descent,
        origin: Origin,
    ) -> LocalBoxFuture<'o, Result<String>> {
        Box::pin(async move {
            let name = match &options.node_name {
                Some(name) => name.clone(),
                None => {
                    // So that the same configuration always gives the same names.
                    self.together.turn(descent.place).await;
                    self.graph.make_name()
                }
            };
            let driver = (self.drivers)(&options.driver);
            let node = driver.open(self, &name, options, descent).await?;
            // A node that is not a user's own may be made writable by a job that needs it.
            let own = origin == Origin::Named;
            self.transaction.borrow_mut().add(Node {
                implicit: !own,
                fixed_read_only: options.read_only && own,
                ..node
            })?;
            Ok(name)
        })
    }

    /// Opens what an image is laid out in. Which part of the image is wanted says nothing of where
    /// in there it is.
    pub(super) async fn open_whole(
        &self,
        node: &BlockRef,
        descent: &mut Descent,
    ) -> Result<String> {
        let part = std::mem::replace(&mut descent.wanted, WHOLE);
        let opened = self.open_ref(node, descent).await;
        descent.wanted = part;
        opened
    }

    /// The bytes of node `file`, in which another node is laid out: what only passes bytes on is
    /// the storage of what is under it, or a window of that; the disk in an image is served through
    /// its chain.
    ///
    /// # Errors
    /// When the disk cannot be storage.
    pub(super) fn bytes(&self, file: &Node) -> Result<Arc<dyn Storage>> {
        if !self.state().is_disk(file) {
            return Ok(file.layer.storage.clone());
        }
        let root = Root::new(compile(&self.state(), &file.name)?);
        let storage = Backed::new(root.clone())?;
        let mut transaction = self.transaction.borrow_mut();
        transaction.keep_inner(&root, &file.name)?;
        Ok(Arc::new(storage))
    }

    pub(super) async fn open_ref(&self, node: &BlockRef, descent: &mut Descent) -> Result<String> {
        match node {
            BlockRef::Name(name) => {
                self.together.wait_for(descent.place, name).await;
                Ok(self.node(name)?.name.clone())
            }
            BlockRef::Inline(options) => self.open_node(options, descent, Origin::Nested).await,
        }
    }

    /// Opens what lies under the image in node `image`: what the options say, or what its header
    /// names; but first of all what is recorded.
    pub(super) async fn open_below(
        &self,
        above: &BlockdevOptions,
        image: &Node,
        wanted: &BackingRef,
        named: Option<Backing>,
        descent: &mut Descent,
    ) -> Result<Option<String>> {
        let used = descent.used();
        let below = self.open_lower(above, image, wanted, named, descent).await;
        // An image that is opened after these may be over the same ones.
        descent.keep(used);
        below
    }

    async fn open_lower(
        &self,
        above: &BlockdevOptions,
        image: &Node,
        wanted: &BackingRef,
        named: Option<Backing>,
        descent: &mut Descent,
    ) -> Result<Option<String>> {
        let driver = above.driver.name();
        if let Some(link) = self.recorded_link(driver, image, named.as_ref())? {
            let Some(below) = &link.below else {
                return Ok(None);
            };
            let opened = self.open_recorded(above, image, wanted, below, descent);
            return Ok(Some(opened.await?));
        }
        match (wanted, named) {
            (BackingRef::None, _) | (BackingRef::Default, None) => Ok(None),
            (BackingRef::Node(node), _) => Ok(Some(self.open_ref(node, descent).await?)),
            (BackingRef::Default, Some(backing)) => Ok(Some(
                self.open_backing(above, image, &backing, descent).await?,
            )),
        }
    }

    /// What is recorded of the image in node `file`, whose header names `header`.
    fn recorded_link(
        &self,
        format: &str,
        file: &Node,
        header: Option<&Backing>,
    ) -> Result<Option<RecordedLink>> {
        let recorded = &self.together.recorded;
        if recorded.links.is_empty() {
            return Ok(None);
        }
        let identity = file.layer.storage.identity().unwrap_or_default();
        let file = self.state().bytes_name(&file.name)?;
        Ok(recorded.link(format, &file, identity, header)?.cloned())
    }

    /// Opens the node that is recorded to lie under the image of a node with the options `above`,
    /// which is in `image`: as the options have it, where it is anywhere in the chain that they
    /// describe from `wanted` on; otherwise as it is recorded.
    async fn open_recorded(
        &self,
        above: &BlockdevOptions,
        image: &Node,
        wanted: &BackingRef,
        below: &RecordedNode,
        descent: &mut Descent,
    ) -> Result<String> {
        if let Some(name) = &below.name {
            self.together.wait_for(descent.place, name).await;
            if let Ok(node) = self.node(name)
                && below.is(&self.state(), &node)
            {
                return Ok(name.clone());
            }
        }
        let mut next = Some(wanted);
        while let Some(BackingRef::Node(node)) = next {
            match node {
                BlockRef::Name(name) => {
                    self.together.wait_for(descent.place, name).await;
                    let state = self.state();
                    let nodes = state.chain_nodes(name).unwrap_or_default();
                    if let Some(found) = nodes.iter().find(|node| below.is(&state, node)) {
                        return Ok(found.name.clone());
                    }
                    break;
                }
                BlockRef::Inline(options) => {
                    if self.state().describes(options, below) {
                        return self.open_node(options, descent, Origin::Nested).await;
                    }
                    next = driver::of(&options.driver).backing();
                }
            }
        }
        descent.step_down(&image.filename)?;
        let allowed = self.graph.allowed();
        let open_as = &below.open_as;
        let mut options = backing_options_with(above, &image.filename, open_as, allowed)?;
        self.state().share_file(&mut options, image, descent)?;
        options.node_name = below.name.clone().filter(|name| self.node(name).is_err());
        self.open_node(&options, descent, Origin::Header).await
    }

    /// Opens the backing file that a header names.
    async fn open_backing(
        &self,
        above: &BlockdevOptions,
        image: &Node,
        backing: &Backing,
        descent: &mut Descent,
    ) -> Result<String> {
        descent.step_down(&image.filename)?;
        let context = |error: Error| match error {
            Error::Invalid(text) => Error::Invalid(format!("Could not open backing file: {text}")),
            Error::Busy(text) => Error::Busy(format!("Could not open backing file: {text}")),
            other => other,
        };
        let allowed = self.graph.allowed();
        let mut options =
            backing_options_with(above, &image.filename, backing, allowed).map_err(context)?;
        self.state()
            .share_file(&mut options, image, descent)
            .map_err(context)?;
        self.open_node(&options, descent, Origin::Header)
            .await
            .map_err(context)
    }
}

pub(super) fn text(error: std::io::Error) -> Error {
    match error.kind() {
        // A lock is held by somebody else.
        std::io::ErrorKind::WouldBlock => Error::Busy(error.to_string()),
        _ => Error::Invalid(error.to_string()),
    }
}

pub(super) async fn storage_len(storage: &dyn Storage) -> Result<u64> {
    storage
        .len()
        .await
        .map_err(|error| Error::io(Action::Read, storage.name(), 0, &error))
}
