//! The graph of nodes, and the disks that hang on it.
//!
//! * [`edges`]: edges with roles, and what nodes demand of each other;
//! * [`nodes`]: nodes, and the graph as an immutable value;
//! * [`transaction`]: changes that happen together or not at all;
//! * [`grants`]: who does what with which node;
//! * [`compile`]: from the graph to the flat chains of the data path;
//! * `driver`: what is known of a node by its driver alone; `drivers`: each of them;
//! * `below`, `descent`, `recorded`, `together`, `opening`, `open`: from options, headers and
//!   records to nodes;
//! * `overlay`: a new image on top of others;
//! * `writable`, `resize`: images that are open to be written;
//! * `resize_in_use`: another size while guests use a disk;
//! * `removal`: nodes that go;
//! * `thresholds`: writes that somebody wants to hear of;
//! * `job_filter`, `shown`: the filters of jobs, and the graph as clients see it.
//!
//! Readers load the present value ([`Graph::state`]) and never wait for a change. All that is
//! published goes through [`Graph::commit`], which neither opens, syncs nor waits: what takes time
//! (opening images) happens before, in a [`Transaction`] that nobody else sees, and what only the
//! old value held is dropped after, by who asked for the change. Guests never come here.

mod below;
mod compile;
mod descent;
mod driver;
mod drivers;
mod edges;
mod grants;
mod job_filter;
mod nodes;
mod open;
mod opening;
mod overlay;
mod owner;
pub mod recorded;
mod removal;
mod resize;
mod resize_in_use;
mod shown;
#[cfg(test)]
mod tests;
mod thresholds;
mod together;
mod transaction;
mod writable;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::chain::{Chain, Layer, Root};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::format::qcow2::journal::Folder;
use crate::format::qcow2::soundness::{Corruption, Reports};
use crate::grace::Grace;
use grants::Grants;
use owner::Owner;
use thresholds::Watched;
use writable::Turns;

pub use below::{Allowed, backing_options, layer_options};
pub use edges::{Demand, Edge, Rights, Role};
pub use grants::{Busy, Grant, Holder, NodeUse, NodeUser, Request, Taken};
pub use job_filter::{FilterKind, JobFilter, busy};
pub use nodes::{Node, State};
pub use owner::Task;
pub use recorded::{Recorded, RecordedLink, RecordedNode};
pub use transaction::Transaction;

/// All nodes, and the disks that hang on them. Clones are the same graph.
#[derive(Clone, Debug, Default)]
pub struct Graph(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: ArcSwap<State>,
    /// All grants. Held while one is taken or given back, or a new value is made from the present
    /// one, and for nothing else.
    publishing: Mutex<Grants>,
    turns: Turns,
    owner: OnceLock<Owner>,
    /// Names made up so far.
    named: AtomicU64,
    journals: OnceLock<Arc<Folder>>,
    allowed: OnceLock<Allowed>,
    reports: Arc<Reports>,
}

/// What only an old value of the graph held, layers and files among it. To drop it may close
/// files, which may wait for their storage.
#[derive(Debug, Default)]
pub struct Released {
    _states: Vec<Arc<State>>,
    /// Disks that were looked at, each with a chain that is not in force.
    chains: Vec<(Arc<Root>, Option<Arc<Chain>>)>,
}

impl Released {
    /// What says, of each disk that has another chain since, when the requests of the old one, and of
    /// all before it, have ended. They end later if this is kept.
    #[must_use]
    pub fn ended(&self) -> Vec<Arc<Grace>> {
        let changed = self.chains.iter().filter(|(_, chain)| chain.is_some());
        changed.flat_map(|(root, _)| root.past()).collect()
    }
}

impl Graph {
    /// A graph in which nothing is flattened but files: for tests, which compare. A window or a
    /// filter that is the file of another node is served as the disk inside an image is.
    #[doc(hidden)]
    #[must_use]
    pub fn unflattened() -> Self {
        let mut state = State::default();
        state.unflattened = true;
        Self(Arc::new(Inner {
            state: ArcSwap::from_pointee(state),
            ..Inner::default()
        }))
    }

    /// From now on the images that are opened have their journals in `folder`. Can be said once.
    pub fn keep_journals(&self, folder: Arc<Folder>) {
        let _ = self.0.journals.set(folder);
    }

    /// Whether images that are opened have journals.
    #[must_use]
    pub fn has_journals(&self) -> bool {
        self.0.journals.get().is_some()
    }

    /// From now on the headers of images that are opened may name this, too. Can be said once.
    pub fn allow_backing(&self, allowed: Allowed) {
        let _ = self.0.allowed.set(allowed);
    }

    /// What headers may name besides local image files.
    pub(super) fn allowed(&self) -> Allowed {
        self.0.allowed.get().copied().unwrap_or_default()
    }

    /// Has `listener` told of images that contradict themselves. It is called with locks held, and must
    /// not block. Can be said once.
    pub fn on_corruption(&self, listener: impl Fn(Corruption) + Send + Sync + 'static) {
        self.0.reports.listen(listener);
    }

    pub(super) fn reports(&self) -> Arc<Reports> {
        self.0.reports.clone()
    }

    pub(super) fn journal(&self) -> Option<Arc<Folder>> {
        self.0.journals.get().cloned()
    }

    /// The graph as it is now.
    #[must_use]
    pub fn state(&self) -> Arc<State> {
        self.0.state.load_full()
    }

    /// Begins a transaction on the graph as it is now.
    #[must_use]
    pub fn transaction(&self) -> Transaction {
        Transaction::new(State::clone(&self.state()))
    }

    /// Publishes the changes of `transaction`, with the chains of all disks that they affect; or
    /// none of them. Returns what is left of the old value.
    ///
    /// # Errors
    /// What does not go with the graph as it is by now.
    pub fn commit(&self, transaction: Transaction) -> Result<Released> {
        let inner = self.0.clone();
        let done = self.by_owner(move || {
            let change = |old: &State, grants: &mut Grants, state: &mut State| {
                transaction.apply(state)?;
                grants.check_names(state)?;
                for replaced in transaction.replaced() {
                    grants.check_replaced(replaced, transaction.takes())?;
                }
                transaction.end_grant(true);
                grants.take(transaction.takes());
                grants.check_change(old, state, transaction.removed(), transaction.holder())
            };
            // Before anybody else sees the grants.
            let undo = |grants: &mut Grants| {
                grants.forget(transaction.takes());
                transaction.end_grant(false);
            };
            let published = inner.publish(change, undo);
            // What is dropped may close files, and is not dropped there.
            (published, transaction)
        });
        let Some(((result, released), _made)) = done else {
            return Err(Error::Invalid("the graph could not be changed".into()));
        };
        result.map(|()| released)
    }

    /// Whether a node's own bytes are in a part of a file, or in the disk of another image.
    #[must_use]
    pub fn shares_file(&self, node: &Node) -> bool {
        self.state().shares_file(node)
    }

    /// Makes one change.
    fn change(&self, make: impl FnOnce(&mut Transaction) -> Result<()>) -> Result<()> {
        let mut transaction = self.transaction();
        make(&mut transaction)?;
        self.commit(transaction).map(drop)
    }

    /// Adds a node.
    ///
    /// # Errors
    /// When its name is taken.
    pub fn add(&self, node: Node) -> Result<()> {
        self.change(|transaction| transaction.add(node))
    }

    /// A name for a node that was given none.
    #[must_use]
    pub fn make_name(&self) -> String {
        let number = self.0.named.fetch_add(1, Ordering::Relaxed) + 1;
        format!("#block{number:03}")
    }

    /// A node as it is now.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn node(&self, name: &str) -> Result<Node> {
        Ok(Node::clone(self.state().node(name)?))
    }

    /// The node that has the image of `name`: the one under a filter, any other itself.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn image_node(&self, name: &str) -> Result<Node> {
        Ok(Node::clone(self.state().image_node(name)?))
    }

    /// All nodes as they are now.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        cloned(self.state().nodes())
    }

    /// The nodes of a disk, top first.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn chain_nodes(&self, top: &str) -> Result<Vec<Node>> {
        Ok(cloned(self.state().chain_nodes(top)?))
    }

    /// Removes a node and what only it used.
    ///
    /// # Errors
    /// When there is no such node, or it is in use.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.change(|transaction| transaction.remove(name))
    }

    /// A disk whose top is node `top`. It is kept up to date while somebody holds it.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn root(&self, top: &str) -> Result<Arc<Root>> {
        let (inner, node) = (self.0.clone(), top.to_owned());
        let made = self.by_owner(move || {
            let mut made = None;
            let make = |_: &State, _: &mut Grants, state: &mut State| {
                let root = Root::new(compile::compile(state, &node)?);
                state.roots.push((Arc::downgrade(&root), node));
                made = Some(root);
                Ok(())
            };
            let published = inner.publish(make, |_| ());
            // What is dropped may close files, and is not dropped there.
            (published, made)
        });
        let lost = || Error::Invalid(format!("Cannot find node '{top}'"));
        let ((result, _released), root) = made.ok_or_else(lost)?;
        result.and(root.ok_or_else(lost))
    }

    /// Gives a node another layer: one that can be written, or no longer.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn replace_layer(&self, name: &str, layer: Arc<Layer>) -> Result<()> {
        self.change(|transaction| transaction.set_layer(name, layer))
    }

    /// Puts another node under `name`, or none. Nodes that nobody uses any longer go.
    ///
    /// # Errors
    /// When a node does not exist.
    pub fn set_backing(&self, name: &str, backing: Option<&str>) -> Result<()> {
        self.change(|transaction| transaction.set_child(name, Role::Backing, backing))
    }

    /// Flushes and closes every image that was written.
    pub async fn close(&self) {
        // An image before those that it is laid out in.
        for node in self.state().children_first().into_iter().rev() {
            if let Err(error) = Self::close_image(node).await {
                log::error!("closing '{}': {error}", node.name);
            }
        }
    }

    /// Flushes and closes the image of a node if it was written. Nobody writes it any more.
    ///
    /// # Errors
    /// When what was written may not be stable.
    pub async fn close_image(node: &Node) -> Result<()> {
        match &node.layer.format {
            // What was written before has been closed then.
            _ if node.layer.read_only => Ok(()),
            Format::Qcow2(qcow2) => qcow2.close().await,
            _ => node.layer.flush().await,
        }
    }
}

impl Inner {
    /// Makes a new value of the graph, and the chains of the disks that differ in it, and puts
    /// them in the place of the old ones; after an error all is as before. Nothing is dropped here
    /// that could wait: the caller has it then.
    fn publish(
        &self,
        change: impl FnOnce(&State, &mut Grants, &mut State) -> Result<()>,
        undo: impl FnOnce(&mut Grants),
    ) -> (Result<()>, Released) {
        let mut grants = self.publishing.lock();
        let old = self.state.load_full();
        let mut new = State::clone(&old);
        // Jobs come and go: what they have left would pile up.
        new.roots.retain(|(root, _)| root.strong_count() > 0);
        new.inner.retain(|(root, _)| root.strong_count() > 0);
        let mut chains = Vec::new();
        let result = change(&old, &mut grants, &mut new)
            .and_then(|()| new.settle_filters(&old))
            .and_then(|()| compile_changed(&old, &new, &mut chains));
        let mut states = Vec::new();
        if result.is_err() {
            undo(&mut grants);
            states.push(Arc::new(new));
        } else {
            // Before the chains that rely on it.
            let watched = new.watched(&old);
            watched.into_iter().for_each(Watched::put_in_force);
            old.disarm_all_but(&new);
            for (root, chain) in &mut chains {
                *chain = chain.take().map(|chain| root.publish(chain));
            }
            states.extend([self.state.swap(Arc::new(new)), old]);
        }
        (
            result,
            Released {
                _states: states,
                chains,
            },
        )
    }
}

/// The chains of the disks that are other ones in `new` than in `old`.
fn compile_changed(
    old: &State,
    new: &State,
    chains: &mut Vec<(Arc<Root>, Option<Arc<Chain>>)>,
) -> Result<()> {
    // What goes together with the nodes that are laid out in it needs no chain.
    let inner = new.inner.iter().filter(|(_, top)| new.node(top).is_ok());
    let inner = inner.map(|(root, top)| {
        // Its chain was made while others changed the graph.
        let mut known = old.inner.iter();
        let is_known = known.any(|(known, of)| known.ptr_eq(root) && of == top);
        (root, top, is_known)
    });
    let roots = new.roots.iter().map(|(root, top)| {
        // One that is new has its chain.
        let mut known = old.roots.iter();
        let was = known.find(|(known, _)| known.ptr_eq(root));
        (root, top, was.is_none_or(|(_, of)| of == top))
    });
    for (root, top, is_known) in roots.chain(inner) {
        let Some(root) = root.upgrade() else {
            continue;
        };
        chains.push((root, None));
        let nodes = new.chain_nodes(top)?;
        let same = old.chain_nodes(top).is_ok_and(|old| {
            let mut pairs = old.iter().zip(&nodes);
            old.len() == nodes.len() && pairs.all(|(one, other)| Arc::ptr_eq(one, other))
        });
        let same = same
            && old.tap(top).map(Arc::as_ptr) == new.tap(top).map(Arc::as_ptr)
            && has_same_watch(old, new, top);
        if !(same && is_known)
            && let Some((_, chain)) = chains.last_mut()
        {
            *chain = Some(Arc::new(compile::compile(new, top)?));
        }
    }
    Ok(())
}

/// Whether the chain of the disk with this top looks at the same thresholds in both.
fn has_same_watch(old: &State, new: &State, top: &str) -> bool {
    let places = |state: &State| {
        let watch = state.watch(top)?;
        Some(watch.iter().map(Arc::as_ptr).collect::<Vec<_>>())
    };
    places(old) == places(new)
}

fn cloned<N: std::ops::Deref<Target = Arc<Node>>>(nodes: impl IntoIterator<Item = N>) -> Vec<Node> {
    nodes.into_iter().map(|node| Node::clone(&node)).collect()
}

/// Where the file that an image names is: relative names start from the image's own folder.
#[must_use]
pub fn resolve(image: &Path, name: &str) -> PathBuf {
    let name = Path::new(name);
    match image.parent() {
        Some(folder) if name.is_relative() => folder.join(name),
        _ => name.to_owned(),
    }
}
