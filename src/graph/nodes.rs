//! Nodes, and the graph as a value.
//!
//! A [`State`] never changes: a transaction makes another one, and readers keep the one that they
//! have. Nodes refer to each other by name.
//!
//! Invariants, kept by [`Transaction`](super::Transaction): names are unique, every child exists,
//! and no node is under itself.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use super::driver::{self, Driver, WHOLE};
use super::edges::{Edge, Role};
use super::job_filter::FilterKind;
use crate::chain::{Layer, Root, Tap};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::options::BlockdevOptions;
use crate::storage::Threshold;

/// An element of the graph.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// The layer that it stands for. A filter has that of the node under it, with the filter's
    /// attribute; the transaction that changes the one changes the other.
    pub layer: Arc<Layer>,
    /// The file that its bytes are in.
    pub filename: PathBuf,
    /// Its children, at most one in each role.
    pub edges: Vec<Edge>,
    /// What it was opened with.
    pub options: BlockdevOptions,
    /// Nobody asked for it by name: it goes when nothing uses it any longer.
    pub implicit: bool,
    /// It is never to be written.
    pub fixed_read_only: bool,
    /// It was the top of a disk, and what the guest began to write then may still arrive.
    pub closing: bool,
    /// It is what clients see of a job ([`shown`](super::Graph::shown)), whose kind this is, and whether a
    /// client has given its name.
    pub of_job: Option<(FilterKind, bool)>,
}

impl Node {
    /// A node without children, called as its layer is.
    #[must_use]
    pub fn new(options: BlockdevOptions, layer: Layer, filename: PathBuf) -> Self {
        Self {
            name: layer.name.clone(),
            layer: Arc::new(layer),
            filename,
            edges: Vec::new(),
            options,
            implicit: false,
            fixed_read_only: false,
            closing: false,
            of_job: None,
        }
    }

    /// The node with another child, if there is one.
    #[must_use]
    pub fn over(mut self, role: Role, child: Option<&str>) -> Self {
        self.set_child(role, child);
        self
    }

    pub(super) fn set_child(&mut self, role: Role, child: Option<&str>) {
        let old = self.edges.iter_mut().find(|edge| edge.role == role);
        match (old, child) {
            (Some(edge), Some(child)) => child.clone_into(&mut edge.child),
            (_, None) => self.edges.retain(|edge| edge.role != role),
            (None, Some(child)) => self.edges.push(Edge {
                role,
                child: child.to_owned(),
            }),
        }
    }

    /// The child in this role.
    #[must_use]
    pub fn child(&self, role: Role) -> Option<&str> {
        let edge = self.edges.iter().find(|edge| edge.role == role)?;
        Some(&edge.child)
    }

    /// The node that it is a filter of, or that its bytes are in or are those of.
    #[must_use]
    pub fn file(&self) -> Option<&str> {
        let roles = [Role::File, Role::Filtered, Role::Image];
        roles.into_iter().find_map(|role| self.child(role))
    }

    /// Whether it shows the disk of the node under it.
    #[must_use]
    pub fn is_filter(&self) -> bool {
        self.child(Role::Filtered).is_some()
    }

    /// Whether it is an image in what is under it, and neither a file nor a filter.
    pub(super) fn is_image(&self) -> bool {
        !self.is_filter() && self.file().is_some()
    }

    /// Whether another image can be under it, and supply what it lacks.
    pub(super) fn can_have_backing(&self) -> bool {
        !self.is_filter()
    }

    /// Whether it is a file or a device, and not an image in one.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.driver().path().is_some()
    }

    pub(super) fn driver(&self) -> &dyn Driver {
        driver::of(&self.options.driver)
    }

    /// The name of its driver.
    #[must_use]
    pub fn driver_name(&self) -> &'static str {
        match self.of_job {
            Some((kind, _)) => kind.driver(),
            None => self.options.driver.name(),
        }
    }

    /// Its format, as a header would name it: a bare file is a raw disk, and a filter has the
    /// format of what it filters.
    #[must_use]
    pub fn format_name(&self) -> &'static str {
        self.layer.format.name()
    }
}

/// All nodes, and the disks that hang on them, as of one moment.
#[derive(Clone, Debug, Default)]
pub struct State {
    nodes: Vec<Arc<Node>>,
    /// Where each is among them.
    places: HashMap<String, usize>,
    /// Disks, each with the name of its top.
    pub(super) roots: Vec<(Weak<Root>, String)>,
    /// Disks that other nodes are laid out in, likewise.
    pub(super) inner: Vec<(Weak<Root>, String)>,
    /// Images of which all that is written goes to another disk as well.
    pub(super) taps: Vec<(String, Arc<Tap>)>,
    /// Nodes of which somebody wants to hear when a write reaches past an offset.
    pub(super) thresholds: Vec<(String, Arc<Threshold>)>,
    /// Windows and filters are served through their chains, too.
    pub(super) unflattened: bool,
}

impl State {
    /// All nodes, in the order of their making.
    #[must_use]
    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    /// The node of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<&Arc<Node>> {
        let place = self.places.get(name);
        let found = place.and_then(|&place| self.nodes.get(place));
        found.ok_or_else(|| no_node(name))
    }

    pub(super) fn node_mut(&mut self, name: &str) -> Result<&mut Node> {
        let place = self.places.get(name);
        let found = place.and_then(|&place| self.nodes.get_mut(place));
        found.map(Arc::make_mut).ok_or_else(|| no_node(name))
    }

    /// Adds a node, whose name is not taken.
    pub(super) fn push(&mut self, node: Arc<Node>) {
        self.places.insert(node.name.clone(), self.nodes.len());
        self.nodes.push(node);
    }

    /// Drops the nodes that are not to `keep`.
    pub(super) fn retain(&mut self, keep: impl Fn(&Node) -> bool) {
        self.nodes.retain(|node| keep(node));
        let places = self.nodes.iter().enumerate();
        self.places = places
            .map(|(place, node)| (node.name.clone(), place))
            .collect();
    }

    /// The node that has the image of `name`: the one under filters, any other itself.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn image_node(&self, name: &str) -> Result<&Arc<Node>> {
        let mut node = self.node(name)?;
        while let Some(child) = node.child(Role::Filtered) {
            node = self.node(child)?;
        }
        Ok(node)
    }

    /// Whether the bytes of `node` are those of a disk, and not of a file or a window of one: to
    /// lay something out in them takes a storage over the node's chain.
    pub(super) fn is_disk(&self, node: &Node) -> bool {
        match node.layer.format {
            Format::Raw(_) => self.unflattened && node.file().is_some(),
            Format::Qcow2(_) | Format::Qed(_) => true,
        }
    }

    /// The nodes whose disks a node's own bytes are in: images, or filters of these.
    pub(super) fn disks_in(&self, node: &Node) -> Vec<&Arc<Node>> {
        let (mut disks, mut open) = (Vec::new(), vec![node]);
        while let Some(node) = open.pop() {
            let own = node.edges.iter().filter(|edge| edge.role != Role::Backing);
            for below in own.flat_map(|edge| self.node(&edge.child)) {
                match self.is_disk(below) && !node.is_filter() {
                    true => disks.push(below),
                    false => open.push(below),
                }
            }
        }
        disks
    }

    /// Whether a node's own bytes are in a part of a file, or in the disk of another image.
    pub(super) fn shares_file(&self, node: &Node) -> bool {
        let mut open = vec![node];
        while let Some(node) = open.pop() {
            if node.driver().behind(&WHOLE) != WHOLE || !self.disks_in(node).is_empty() {
                return true;
            }
            let own = node.edges.iter().filter(|edge| edge.role != Role::Backing);
            open.extend(
                own.flat_map(|edge| self.node(&edge.child))
                    .map(|node| &**node),
            );
        }
        false
    }

    /// The images whose disks a node's bytes are in, and those that these are in.
    #[must_use]
    pub fn disks_under(&self, node: &Node) -> Vec<&Arc<Node>> {
        let mut found: Vec<&Arc<Node>> = Vec::new();
        let mut open = self.disks_in(node);
        while let Some(disk) = open.pop() {
            if let Ok(image) = self.image_node(&disk.name)
                && !found.iter().any(|known| Arc::ptr_eq(known, image))
            {
                found.push(image);
                open.extend(self.disks_in(image));
            }
        }
        found
    }

    /// The nodes that supply a disk's bytes: those of its image's chain, top first, and then those
    /// of each disk that one of them is laid out in.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn suppliers(&self, top: &str) -> Result<Vec<Vec<&Arc<Node>>>> {
        let mut chains: Vec<Vec<&Arc<Node>>> = Vec::new();
        let mut open = vec![self.image_node(top)?];
        while let Some(top) = open.pop() {
            let mut firsts = chains.iter().filter_map(|chain| chain.first());
            if firsts.any(|first| Arc::ptr_eq(first, top)) {
                continue;
            }
            let chain = self.chain_nodes(&top.name)?;
            for disk in chain.iter().flat_map(|node| self.disks_in(node)) {
                open.push(self.image_node(&disk.name)?);
            }
            chains.push(chain);
        }
        Ok(chains)
    }

    /// The name of the node that supplies what `name` lacks; a filter lacks what its image does.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn backing(&self, name: &str) -> Result<Option<&str>> {
        Ok(self.image_node(name)?.child(Role::Backing))
    }

    /// The nodes that supply a disk's bytes, top first: filters stand for what they filter.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn chain_nodes(&self, top: &str) -> Result<Vec<&Arc<Node>>> {
        let mut nodes = vec![self.node(top)?];
        let mut next = self.backing(top)?;
        while let Some(name) = next {
            nodes.push(self.node(name)?);
            next = self.backing(name)?;
        }
        Ok(nodes)
    }

    /// The tap of the disk whose top is node `top`, if its image has one.
    pub(super) fn tap(&self, top: &str) -> Option<&Arc<Tap>> {
        let image = self.image_node(top).ok()?;
        let mut taps = self.taps.iter();
        Some(&taps.find(|(name, _)| *name == image.name)?.1)
    }

    /// The top of the disk at `root`, if that is one of the graph's.
    #[must_use]
    pub fn top_of(&self, root: &Arc<Root>) -> Option<&str> {
        let mut roots = self.roots.iter();
        let (_, top) = roots.find(|(known, _)| std::ptr::eq(known.as_ptr(), Arc::as_ptr(root)))?;
        Some(top)
    }

    /// Whether node `name` is `top` or under it.
    #[must_use]
    pub fn is_under(&self, name: &str, top: &str) -> bool {
        self.below(vec![top.to_owned()]).contains(name)
    }

    /// A node over `name`, and the child's role.
    pub(super) fn over(&self, name: &str) -> Option<(&Node, Role)> {
        self.all_over(name).next()
    }

    /// The nodes over `name`, each with the child's role.
    pub fn all_over(&self, name: &str) -> impl Iterator<Item = (&Node, Role)> {
        self.nodes.iter().filter_map(move |node| {
            let edge = node.edges.iter().find(|edge| edge.child == name)?;
            Some((&**node, edge.role))
        })
    }

    /// A node that is laid out in the disk of image `name` or of a filter of it, and the role of that.
    #[must_use]
    pub fn laid_out_in(&self, name: &str) -> Option<(&Node, Role)> {
        let mut open = vec![name];
        while let Some(name) = open.pop() {
            for (above, role) in self.all_over(name) {
                match role {
                    Role::Filtered => open.push(&above.name),
                    Role::Backing => {}
                    Role::File | Role::DataFile | Role::Image => return Some((above, role)),
                }
            }
        }
        None
    }

    /// Whether a node over `name` shows or uses its disk.
    #[must_use]
    pub fn is_under_another(&self, name: &str) -> bool {
        self.over(name).is_some()
    }

    /// The node at the bottom of a node's file children that has the same descriptor.
    pub(super) fn bottom(&self, node: &Node) -> Result<String> {
        let mut node = node;
        while let Some(file) = node.file() {
            let below = self.node(file)?;
            let apart = self.is_disk(below) && !node.is_filter();
            node = below;
            if apart {
                break;
            }
        }
        Ok(node.name.clone())
    }

    /// The names of `tops` that exist, and of all nodes under them.
    pub(super) fn below(&self, tops: Vec<String>) -> HashSet<String> {
        let (mut found, mut open) = (HashSet::new(), tops);
        while let Some(name) = open.pop() {
            if let Ok(node) = self.node(&name)
                && found.insert(name)
            {
                open.extend(node.edges.iter().map(|edge| edge.child.clone()));
            }
        }
        found
    }

    /// The nodes, children before those over them.
    pub fn nodes_children_first(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.children_first().into_iter()
    }

    /// The nodes, children before those over them.
    pub(super) fn children_first(&self) -> Vec<&Arc<Node>> {
        let (mut seen, mut order) = (HashSet::new(), Vec::new());
        let mut open: Vec<_> = self.nodes.iter().rev().map(|node| (node, false)).collect();
        while let Some((node, children_are_in)) = open.pop() {
            if children_are_in {
                order.push(node);
            } else if seen.insert(&node.name) {
                open.push((node, true));
                let children = node.edges.iter().flat_map(|edge| self.node(&edge.child));
                open.extend(children.map(|child| (child, false)));
            }
        }
        order
    }
}

/// What is told of a node that is to have the name of another one.
pub(super) fn duplicate_name(name: &str) -> Error {
    Error::Invalid(format!("Duplicate nodes with node-name='{name}'"))
}

fn no_node(name: &str) -> Error {
    Error::Invalid(format!("Cannot find node '{name}'"))
}
