//! The graph of nodes: names, files, backing links; and the disks that hang on it.
//!
//! A node is a layer with a name, and what it was opened with. The links between nodes are the
//! one thing that changes: when they do, every [`Root`] above gets its chain anew. Control
//! commands come here, guests never do.

mod below;
mod descent;
mod open;
pub mod recorded;
mod resize;
mod together;
mod writable;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use crate::chain::{Chain, Layer, Root};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::format::qcow2::journal::Folder;
use crate::options::BlockdevOptions;

pub use below::{backing_options, layer_options};
pub use recorded::{Recorded, RecordedLink, RecordedNode};

/// A named layer, as of one moment.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its driver: `file`, `raw`, `qcow2`, `copy-on-read`.
    pub driver: &'static str,
    /// The layer that it stands for.
    pub layer: Arc<Layer>,
    /// The file that its bytes are in.
    pub filename: PathBuf,
    /// The node under it that supplies what it lacks.
    pub backing: Option<String>,
    /// The node that it is a filter of, or that its bytes are in.
    pub file: Option<String>,
    /// The node that its guest data is in, where that is not `file`.
    pub data_file: Option<String>,
    /// What it was opened with.
    pub options: BlockdevOptions,
    /// Nobody asked for it by name: it goes when nothing uses it any longer.
    pub implicit: bool,
    /// It is never to be written, whoever asks.
    pub fixed_read_only: bool,
}

impl Node {
    /// Its format, as a header would name it: a bare file is a raw disk.
    #[must_use]
    pub fn format_name(&self) -> &'static str {
        match self.driver {
            "qcow2" => "qcow2",
            "qed" => "qed",
            _ => "raw",
        }
    }

    /// The nodes under it, each with its role.
    pub fn children(&self) -> impl Iterator<Item = (&str, &'static str)> {
        // A filter has its child's chain, and one child.
        let own = self.driver != "copy-on-read";
        let of_its_own = [(&self.backing, "backing"), (&self.data_file, "data-file")];
        let of_its_own = of_its_own.into_iter().filter(move |_| own);
        std::iter::once((&self.file, "file"))
            .chain(of_its_own)
            .filter_map(|(below, role)| Some((below.as_deref()?, role)))
    }
}

/// All nodes, and the disks that hang on them.
#[derive(Debug, Default)]
pub struct Graph {
    state: Mutex<State>,
    journals: OnceLock<Arc<Folder>>,
}

#[derive(Debug, Default)]
struct State {
    nodes: Vec<Node>,
    roots: Vec<(Weak<Root>, String)>,
    named: u64,
}

impl State {
    fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .ok_or_else(|| Error::Invalid(format!("Cannot find node '{name}'")))
    }

    /// The names of the filters on a node, and of those on them.
    fn filters_of(&self, name: &str) -> Vec<String> {
        let mut names = vec![name.to_owned()];
        // A node refers to those before it alone, but the list can be in any order.
        let mut at = 0;
        while let Some(below) = names.get(at) {
            let filters = self
                .nodes
                .iter()
                .filter(|node| node.driver == "copy-on-read" && node.file.as_ref() == Some(below))
                .map(|node| node.name.clone());
            let filters: Vec<_> = filters.collect();
            names.extend(filters);
            at += 1;
        }
        names.split_off(1)
    }

    fn node_mut(&mut self, name: &str) -> Result<&mut Node> {
        self.nodes
            .iter_mut()
            .find(|node| node.name == name)
            .ok_or_else(|| Error::Invalid(format!("Cannot find node '{name}'")))
    }

    /// The nodes that are over `name`, each with its child's role.
    fn over<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a Node, &'static str)> {
        self.nodes.iter().flat_map(move |node| {
            let to_it = node.children().filter(move |(below, _)| *below == name);
            to_it.map(move |(_, role)| (node, role))
        })
    }

    /// Whether `node` lets others write what it has as `role`: an image does not let anybody change
    /// the bytes that it is laid out in, nor does what passes them on to one.
    fn shares_writes(&self, node: &Node, role: &str) -> bool {
        let passes_on = role == "backing" || matches!(node.driver, "raw" | "copy-on-read");
        passes_on
            && self
                .over(&node.name)
                .all(|(above, role)| self.shares_writes(above, role))
    }

    /// Refuses that `name` is written, in QEMU's words, if another node relies on bytes that
    /// change with it. `by` is the node whose write it is, `None` for one that is asked for.
    fn check_write(&self, name: &str, by: Option<&Node>) -> Result<()> {
        let rival = self.over(name).find(|(node, role)| {
            by.is_none_or(|by| by.name != node.name) && !self.shares_writes(node, role)
        });
        if let Some((node, role)) = rival {
            let child = by.and_then(|by| by.children().find(|(below, _)| *below == name));
            let child = child.map_or("root", |(_, role)| role);
            let who = match by {
                Some(by) => format!("node '{}'", by.name),
                None => "an unnamed block device".to_owned(),
            };
            return Err(Error::Invalid(format!(
                "Permission conflict on node '{name}': permissions 'write' are both required by \
                 {who} (uses node '{name}' as '{child}' child) and unshared by node '{}' (uses \
                 node '{name}' as '{role}' child).",
                node.name
            )));
        }
        let node = self.node(name)?;
        node.children()
            .filter(|(_, role)| *role != "backing")
            .try_for_each(|(below, _)| self.check_write(below, Some(node)))
    }

    /// The nodes that supply a disk's bytes, top first: filters stand for what they filter.
    fn chain_nodes(&self, top: &str) -> Result<Vec<&Node>> {
        let mut nodes = Vec::new();
        let mut next = Some(top.to_owned());
        while let Some(name) = next {
            let node = self.node(&name)?;
            if nodes.len() >= self.nodes.len() {
                return Err(Error::Invalid(format!("node '{name}' is under itself")));
            }
            nodes.push(node);
            next = node.backing.clone();
        }
        Ok(nodes)
    }

    fn chain(&self, top: &str) -> Result<Chain> {
        let nodes = self.chain_nodes(top)?;
        Chain::new(nodes.iter().map(|node| node.layer.clone()).collect())
    }

    /// Gives every disk its chain anew.
    fn publish(&mut self) -> Result<()> {
        self.roots.retain(|(root, _)| root.strong_count() > 0);
        for (root, top) in &self.roots {
            if let Some(root) = root.upgrade() {
                root.publish(Arc::new(self.chain(top)?));
            }
        }
        Ok(())
    }

    /// Drops implicit nodes that nothing refers to.
    fn collect(&mut self) {
        let mut used: HashSet<String> = HashSet::new();
        let explicit = self
            .nodes
            .iter()
            .filter(|node| !node.implicit)
            .map(|n| n.name.clone());
        let tops = self
            .roots
            .iter()
            .filter(|(r, _)| r.strong_count() > 0)
            .map(|(_, t)| t.clone());
        let mut open: Vec<String> = explicit.chain(tops).collect();
        while let Some(name) = open.pop() {
            if let Ok(node) = self.node(&name)
                && used.insert(name)
            {
                let below = [&node.backing, &node.file, &node.data_file];
                open.extend(below.into_iter().flatten().cloned());
            }
        }
        self.nodes.retain(|node| used.contains(&node.name));
    }
}

impl Graph {
    /// From now on the images that are opened have their journals in `folder`. Can be said once.
    pub fn keep_journals(&self, folder: Arc<Folder>) {
        let _ = self.journals.set(folder);
    }

    pub(super) fn journal(&self) -> Option<Arc<Folder>> {
        self.journals.get().cloned()
    }

    /// Adds a node.
    ///
    /// # Errors
    /// When its name is taken.
    pub fn add(&self, node: Node) -> Result<()> {
        let mut state = self.state.lock();
        if state.nodes.iter().any(|other| other.name == node.name) {
            return Err(Error::Invalid(format!(
                "Duplicate nodes with node-name='{}'",
                node.name
            )));
        }
        state.nodes.push(node);
        Ok(())
    }

    /// Puts the nodes that have a place first, in its order.
    pub(super) fn arrange(&self, place: impl Fn(&str) -> Option<usize>) {
        let key = |node: &Node| place(&node.name).unwrap_or(usize::MAX);
        self.state.lock().nodes.sort_by_key(key);
    }

    /// A name for a node that was given none.
    #[must_use]
    pub fn make_name(&self) -> String {
        let mut state = self.state.lock();
        state.named += 1;
        format!("#block{:03}", state.named)
    }

    /// A node as it is now.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn node(&self, name: &str) -> Result<Node> {
        self.state.lock().node(name).cloned()
    }

    /// The node that has the image of `name`: the one under a filter, any other itself.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn image_node(&self, name: &str) -> Result<Node> {
        let mut node = self.node(name)?;
        while node.driver == "copy-on-read"
            && let Some(file) = &node.file
        {
            node = self.node(file)?;
        }
        Ok(node)
    }

    /// Refuses that node `name` is written, if another one relies on its bytes, or on those that
    /// it is laid out in.
    ///
    /// # Errors
    /// When that is so, naming the other one; or there is no such node.
    pub(super) fn check_write(&self, name: &str) -> Result<()> {
        self.state.lock().check_write(name, None)
    }

    /// All nodes as they are now.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        self.state.lock().nodes.clone()
    }

    /// The nodes of a disk, top first.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn chain_nodes(&self, top: &str) -> Result<Vec<Node>> {
        let state = self.state.lock();
        Ok(state.chain_nodes(top)?.into_iter().cloned().collect())
    }

    /// Removes a node and what only it used, for instance when opening did not go to its end.
    pub fn remove(&self, name: &str) {
        let mut state = self.state.lock();
        state.nodes.retain(|node| node.name != name);
        state.collect();
    }

    /// A disk whose top is node `top`. It is kept up to date while somebody holds it.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn root(&self, top: &str) -> Result<Arc<Root>> {
        let mut state = self.state.lock();
        let root = Root::new(state.chain(top)?);
        // Jobs come and go: what they have left would pile up until the next change.
        state.roots.retain(|(root, _)| root.strong_count() > 0);
        state.roots.push((Arc::downgrade(&root), top.to_owned()));
        Ok(root)
    }

    /// Gives a node another layer: one that can be written, or no longer.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn replace_layer(&self, name: &str, layer: Arc<Layer>) -> Result<()> {
        let mut state = self.state.lock();
        let filters = state.filters_of(name);
        for filter in filters {
            let of = filter_layer(&layer, &filter);
            state.node_mut(&filter)?.layer = of;
        }
        state.node_mut(name)?.layer = layer;
        state.publish()
    }

    /// Puts another node under `name`, or none. Nodes that nobody uses any longer go.
    ///
    /// # Errors
    /// When a node does not exist.
    pub fn set_backing(&self, name: &str, backing: Option<&str>) -> Result<()> {
        let mut state = self.state.lock();
        if let Some(backing) = backing {
            state.node(backing)?;
        }
        let filters = state.filters_of(name);
        for changed in filters.iter().map(String::as_str).chain([name]) {
            state.node_mut(changed)?.backing = backing.map(str::to_owned);
        }
        state.publish()?;
        state.collect();
        Ok(())
    }

    /// Flushes and closes every image that was written.
    pub async fn close(&self) {
        for node in self.nodes() {
            if let Err(error) = Self::close_image(&node).await {
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

/// The layer of a copy-on-read filter over `layer`.
pub(super) fn filter_layer(layer: &Layer, name: &str) -> Arc<Layer> {
    Arc::new(Layer {
        name: name.to_owned(),
        copy_on_read: true,
        ..layer.clone()
    })
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
