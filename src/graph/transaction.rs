//! Changes of the graph that happen together or not at all.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use super::edges::Role;
use super::grants::{Grant, Held, Request, Taken};
use super::nodes::{Node, State, duplicate_name};
use crate::chain::{Layer, Root, Tap};
use crate::error::{Error, Result};
use crate::options::BlockdevOptions;
use crate::storage::Threshold;

/// One change.
#[derive(Debug)]
enum Change {
    Add(Arc<Node>),
    Remove(String),
    Layer(String, Arc<Layer>),
    Child(String, Role, Option<String>),
    Options(String, Box<BlockdevOptions>),
    Inner(Weak<Root>, String),
    Tap(String, Option<Arc<Tap>>),
    Threshold(String, Option<Arc<Threshold>>),
    Crossed(String),
    Top(Weak<Root>, String),
    Closing(String, bool),
    Disown(String),
    Replace(String, String),
    Sweep,
}

/// Changes that are to be published together ([`Graph::commit`](super::Graph::commit)).
///
/// Until then they are seen here alone. They are made a second time when they are published, in
/// the graph as it is by then: what does not go with what others have published meanwhile fails.
#[derive(Debug)]
pub struct Transaction {
    draft: State,
    changes: Vec<Change>,
    /// What the grant holds whose holder makes them.
    by: Weak<Held>,
    /// They end what that grant was for.
    ends: bool,
    /// Grants that are taken with them.
    takes: Vec<Taken>,
}

impl Transaction {
    pub(super) fn new(state: State) -> Self {
        Self {
            draft: state,
            changes: Vec::new(),
            by: Weak::new(),
            ends: false,
            takes: Vec::new(),
        }
    }

    /// Made by the holder of `grant`: the links that it has frozen may change.
    #[must_use]
    pub fn by(mut self, grant: &Grant) -> Self {
        self.by = grant.held();
        self
    }

    /// They are the end of what the holder's grant was for: it minds nothing any more that others do.
    #[must_use]
    pub fn ending(mut self) -> Self {
        self.ends = true;
        self
    }

    /// A grant that is taken when the changes are published, if it goes with the graph by then. It
    /// [comes to be](Taken::grant) only if they are; images are not made ready for it.
    pub fn taking(&mut self, request: Request) -> Taken {
        let taken = Taken::new(request);
        self.takes.push(taken.clone());
        taken
    }

    /// The grants that are taken with them.
    pub(super) fn takes(&self) -> &[Taken] {
        &self.takes
    }

    /// Says whether the changes have ended what the holder's grant was for, if they are to.
    pub(super) fn end_grant(&self, over: bool) {
        if let Some(held) = self.by.upgrade().filter(|_| self.ends) {
            held.end(over);
        }
    }

    /// What the grant holds whose holder makes the changes, if one does.
    pub(super) fn holder(&self) -> &Weak<Held> {
        &self.by
    }

    /// The nodes that it removes by name.
    pub(super) fn removed(&self) -> impl Iterator<Item = &String> {
        self.changes.iter().filter_map(|change| match change {
            Change::Remove(name) => Some(name),
            _ => None,
        })
    }

    /// The nodes whose places others take.
    pub(super) fn replaced(&self) -> impl Iterator<Item = &String> {
        self.changes.iter().filter_map(|change| match change {
            Change::Replace(from, _) => Some(from),
            _ => None,
        })
    }

    /// The graph with the changes so far.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.draft
    }

    /// Adds a node.
    ///
    /// # Errors
    /// When its name is taken, or a child does not exist.
    pub fn add(&mut self, node: Node) -> Result<()> {
        self.make(Change::Add(Arc::new(node)))
    }

    /// Removes a node, and nodes without a user's name that only it used.
    ///
    /// # Errors
    /// When there is no such node, or it is in use.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        self.make(Change::Remove(name.to_owned()))
    }

    /// Gives a node another layer: one that can be written, or no longer. Filters over it follow.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn set_layer(&mut self, name: &str, layer: Arc<Layer>) -> Result<()> {
        self.make(Change::Layer(name.to_owned(), layer))
    }

    /// Puts another node under `name`, or none. Nodes without a user's name go when nothing uses
    /// them any longer.
    ///
    /// # Errors
    /// When a node does not exist, or would be under itself.
    pub fn set_child(&mut self, name: &str, role: Role, child: Option<&str>) -> Result<()> {
        let child = child.map(str::to_owned);
        self.make(Change::Child(name.to_owned(), role, child))
    }

    /// From then on all that is written to the disks over image `name` goes to the tap's disk as well;
    /// or no longer.
    ///
    /// # Errors
    /// When there is no such node, or it has a tap already.
    pub fn set_tap(&mut self, name: &str, tap: Option<Arc<Tap>>) -> Result<()> {
        self.make(Change::Tap(name.to_owned(), tap))
    }

    /// Puts `threshold` in the place of the one that node `name` has; or none.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn set_threshold(&mut self, name: &str, threshold: Option<Arc<Threshold>>) -> Result<()> {
        self.make(Change::Threshold(name.to_owned(), threshold))
    }

    /// Forgets the threshold of node `name` if it has been crossed by then.
    pub(super) fn forget_crossed(&mut self, name: &str) {
        self.changes.push(Change::Crossed(name.to_owned()));
    }

    /// Gives a node that a user has named other options: those of its driver and of nodes inside it
    /// are taken as they are.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn set_options(&mut self, name: &str, options: BlockdevOptions) -> Result<()> {
        self.make(Change::Options(name.to_owned(), Box::new(options)))
    }

    /// Has the image of node `name` one that guests may write, whatever its options say: a guest has moved
    /// there.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn open_for_guests(&mut self, name: &str) -> Result<()> {
        let node = self.draft.image_node(name)?;
        if !node.fixed_read_only {
            return Ok(());
        }
        let options = BlockdevOptions {
            read_only: false,
            ..node.options.clone()
        };
        let name = node.name.clone();
        self.set_options(&name, options)
    }

    /// Puts node `to` in the place of `from` in all disks whose top that is, and under all filters of it.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn replace(&mut self, from: &str, to: &str) -> Result<()> {
        self.make(Change::Replace(from.to_owned(), to.to_owned()))
    }

    /// Drops nodes without a user's name that nothing uses any longer.
    pub fn sweep(&mut self) {
        self.changes.push(Change::Sweep);
    }

    /// Keeps the chain of `root`, whose top is `top`, as the graph has it, for as long as a node is
    /// laid out in that disk.
    pub(super) fn keep_inner(&mut self, root: &Arc<Root>, top: &str) -> Result<()> {
        self.make(Change::Inner(Arc::downgrade(root), top.to_owned()))
    }

    /// Makes node `top` the top of the disk at `root`, whose guest writes there from then on.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn set_top(&mut self, root: &Arc<Root>, top: &str) -> Result<()> {
        self.make(Change::Top(Arc::downgrade(root), top.to_owned()))
    }

    /// Says whether node `name`, which is no longer the top of a disk, may still be written by what
    /// its guest had begun: guests' flushes make it stable as well, until it is not.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn set_closing(&mut self, name: &str, closing: bool) -> Result<()> {
        self.make(Change::Closing(name.to_owned(), closing))
    }

    /// No user has named node `name`: it goes when nothing uses it any longer.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn disown(&mut self, name: &str) -> Result<()> {
        self.make(Change::Disown(name.to_owned()))
    }

    fn make(&mut self, change: Change) -> Result<()> {
        if let Change::Add(node) = &change {
            check_children(&self.draft, node)?;
        }
        change.apply(&mut self.draft)?;
        self.changes.push(change);
        Ok(())
    }

    /// Puts nodes that are added and have a place first, in its order.
    pub(super) fn arrange(&mut self, places: &HashMap<String, usize>) {
        let key = |change: &Change| match change {
            Change::Add(node) => places.get(&node.name).copied().unwrap_or(usize::MAX),
            _ => usize::MAX,
        };
        self.changes.sort_by_key(key);
    }

    /// Makes the changes in `state`.
    pub(super) fn apply(&self, state: &mut State) -> Result<()> {
        for change in &self.changes {
            change.apply(state)?;
        }
        // A node may have been arranged before its children.
        for node in state.nodes() {
            check_children(state, node)?;
        }
        let frees = |change: &Change| {
            matches!(
                change,
                Change::Remove(_)
                    | Change::Child(..)
                    | Change::Top(..)
                    | Change::Replace(..)
                    | Change::Sweep
            )
        };
        if self.changes.iter().any(frees) {
            state.collect();
            state.settle_thresholds();
        }
        Ok(())
    }
}

impl Change {
    fn apply(&self, state: &mut State) -> Result<()> {
        match self {
            Self::Add(node) => {
                if state.node(&node.name).is_ok() {
                    return Err(duplicate_name(&node.name));
                }
                state.push(node.clone());
            }
            Self::Remove(name) => {
                state.node(name)?;
                if let Some((above, role)) = state.over(name) {
                    return Err(in_use(name, above, role));
                }
                state.retain(|node| node.name != *name);
            }
            Self::Layer(name, layer) => state.node_mut(name)?.layer = layer.clone(),
            Self::Child(name, role, child) => {
                if let Some(child) = child {
                    state.node(child)?;
                    if state.below(vec![child.clone()]).contains(name) {
                        return Err(Error::Invalid(format!(
                            "Making '{child}' a {} child of '{name}' would create a cycle",
                            role.key()
                        )));
                    }
                }
                let node = state.node_mut(name)?;
                if *role == Role::Backing && !node.can_have_backing() {
                    return Err(Error::Invalid(format!(
                        "Driver '{}' of node '{name}' does not support backing files",
                        node.driver_name()
                    )));
                }
                node.set_child(*role, child.as_deref());
            }
            Self::Options(name, options) => {
                let node = state.node_mut(name)?;
                node.fixed_read_only = options.read_only && !node.implicit;
                node.options = (**options).clone();
            }
            Self::Inner(root, top) => state.inner.push((root.clone(), top.clone())),
            Self::Replace(from, to) => {
                state.node(from)?;
                state.node(to)?;
                if let Some((above, role)) = state.laid_out_in(from) {
                    return Err(in_use(from, above, role));
                }
                let disks = state.roots.iter_mut().chain(&mut state.inner);
                for (_, top) in disks.filter(|(_, top)| top == from) {
                    to.clone_into(top);
                }
                let filters = state.nodes().iter();
                let filters = filters.filter(|node| node.child(Role::Filtered) == Some(from));
                let filters: Vec<_> = filters.map(|node| node.name.clone()).collect();
                for filter in filters {
                    state.node_mut(&filter)?.set_child(Role::Filtered, Some(to));
                }
            }
            Self::Tap(name, tap) => {
                let name = state.node(name)?.name.clone();
                let has_one = state.taps.iter().any(|(tapped, _)| *tapped == name);
                if has_one && tap.is_some() {
                    return Err(Error::Invalid(format!(
                        "Node '{name}' is busy: what is written to it is copied already"
                    )));
                }
                state.taps.retain(|(tapped, _)| *tapped != name);
                state.taps.extend(tap.clone().map(|tap| (name, tap)));
            }
            Self::Threshold(name, threshold) => {
                state.node(name)?;
                state.thresholds.retain(|(node, _)| node != name);
                let new = threshold.clone().map(|new| (name.clone(), new));
                state.thresholds.extend(new);
            }
            Self::Crossed(name) => {
                let is_over = |node: &str, at| node == name && at == 0;
                let thresholds = &mut state.thresholds;
                thresholds.retain(|(node, threshold)| !is_over(node, threshold.at()));
            }
            Self::Top(root, top) => {
                state.node(top)?;
                let mut roots = state.roots.iter_mut();
                // One that nobody holds any longer needs no top.
                if let Some((_, of)) = roots.find(|(known, _)| known.ptr_eq(root)) {
                    top.clone_into(of);
                }
            }
            // When all have been made.
            Self::Sweep => {}
            Self::Disown(name) => {
                let node = state.node_mut(name)?;
                (node.implicit, node.fixed_read_only) = (true, false);
            }
            Self::Closing(name, closing) => state.node_mut(name)?.closing = *closing,
        }
        Ok(())
    }
}

fn check_children(state: &State, node: &Node) -> Result<()> {
    let mut edges = node.edges.iter();
    edges.try_for_each(|edge| state.node(&edge.child).map(drop))
}

pub(super) fn in_use(name: &str, above: &Node, role: Role) -> Error {
    let what = match role {
        Role::Backing => "backing hd",
        other => other.key(),
    };
    Error::Invalid(format!(
        "Node '{name}' is busy: node is used as {what} of '{}'",
        above.name
    ))
}

impl State {
    /// Drops nodes that no user has named and nothing refers to.
    fn collect(&mut self) {
        // What a guest has begun to write there may still arrive in one that is closing.
        let named = self.nodes().iter();
        let named = named.filter(|node| !node.implicit || node.closing);
        let named = named.map(|node| node.name.clone());
        let used = self.below(named.chain(self.tops()).collect());
        self.retain(|node| used.contains(&node.name));
    }

    /// The tops of the disks that somebody has.
    fn tops(&self) -> impl Iterator<Item = String> {
        let roots = self.roots.iter();
        let tops = roots.filter(|(root, _)| root.strong_count() > 0);
        tops.map(|(_, top)| top.clone())
    }

    /// Whether somebody has node `name` in a disk, or another one that a user has named is over it.
    #[must_use]
    pub fn is_used(&self, name: &str) -> bool {
        let named = self.nodes().iter().filter(|node| !node.implicit);
        let named = named.map(|node| node.name.clone());
        let others = named.filter(|other| other != name).chain(self.tops());
        self.below(others.collect()).contains(name)
    }
}
