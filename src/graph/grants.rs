//! Grants: who does what with which node.
//!
//! A holder takes a grant before it reads or writes a node, and gives it back by dropping it. A
//! grant says what its holder does, what it tolerates from others, and which links of the graph it
//! relies on. What a node does with the nodes under it follows from what is done with the node: an
//! edge is a grant that nobody takes. Conflicts are refused in QEMU's words.
//!
//! A grant is there before what it is for is ready. While an image is opened to be written, which
//! may take minutes, its grant is pending: all others see it, and nobody waits for it.
//!
//! The image of a node is open for writing, and locked, as long as a grant needs that:
//! [`Graph::access`] prepares it for the first one, and [`Grant::give_back`] lowers it with the last.
//! A grant that is dropped gives its rights back at once, and leaves the image as it is.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::edges::{Demand, Rights, Role};
use super::job_filter::{JobFilter, busy};
use super::nodes::{State, duplicate_name};
use super::{Graph, Inner, Released};
use crate::error::{Error, Result};

/// Who holds a grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// An export, by its id.
    Export(String),
    /// A job, by its kind and its id.
    Job(&'static str, String),
    /// A tool that has the graph for itself.
    Tool,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Job(kind, id) => write!(f, "{kind} job '{id}'"),
            Self::Export(_) | Self::Tool => f.write_str("an unnamed block device"),
        }
    }
}

/// What a grant is for.
#[derive(Clone, Debug)]
pub struct Request {
    holder: Holder,
    uses: Vec<Use>,
    /// Links that stay as they are, each with the node that has the child.
    frozen: Vec<(String, Role)>,
    /// Images whose own reading of what is under them does not count: what changes there is hidden by
    /// them, or by those above.
    hidden: Vec<String>,
}

/// One node of a grant.
#[derive(Clone, Debug)]
struct Use {
    node: String,
    /// What the node is to the holder, in QEMU's words.
    child: &'static str,
    demand: Demand,
    /// No other job has the node.
    alone: bool,
}

impl Request {
    /// Nothing yet.
    #[must_use]
    pub fn new(holder: Holder) -> Self {
        Self {
            holder,
            uses: Vec::new(),
            frozen: Vec::new(),
            hidden: Vec::new(),
        }
    }

    /// To read the disk of `node`, or to write it, whatever others do.
    #[must_use]
    pub fn disk(holder: Holder, node: &str, writable: bool) -> Self {
        let does = match writable {
            true => Rights::READ | Rights::WRITE,
            false => Rights::READ,
        };
        let tolerates = Rights::ALL;
        Self::new(holder).with(node, "root", Demand { does, tolerates })
    }

    /// And `node`, which is `child` to the holder.
    #[must_use]
    pub fn with(mut self, node: &str, child: &'static str, demand: Demand) -> Self {
        self.uses.push(Use {
            node: node.to_owned(),
            child,
            demand,
            alone: false,
        });
        self
    }

    /// And the link of `node` to its child in this role.
    #[must_use]
    pub fn frozen(mut self, node: &str, role: Role) -> Self {
        self.frozen.push((node.to_owned(), role));
        self
    }

    /// For a stream into the first of `layers`, which may be written meanwhile, from the others.
    #[must_use]
    pub fn stream(state: &State, id: &str, layers: &[String]) -> Self {
        let mut request = Self::new(Holder::Job("stream", id.to_owned()));
        let tolerates = Rights::READ | Rights::WRITE_UNCHANGED;
        for (index, layer) in layers.iter().enumerate() {
            let (child, does, tolerates) = match index {
                // The disks over it read the same all the while.
                0 => (
                    "active node",
                    Rights::READ | Rights::WRITE_UNCHANGED | Rights::OPEN,
                    tolerates | Rights::WRITE,
                ),
                _ => ("intermediate node", Rights::READ, tolerates),
            };
            request = request
                .with(layer, child, Demand { does, tolerates })
                .frozen_below(state, layer);
        }
        request
    }

    /// For a commit of `layers`, top first, into `base`. The image of the `overlay` over them is to name
    /// the base at the end; where there is none, the first of the layers is written meanwhile.
    ///
    /// The layers hide what changes in the base. So they may be read all the while, through the first of
    /// them; who reads the base, or starts between, would see it change.
    #[must_use]
    pub fn commit(
        state: &State,
        id: &str,
        overlay: Option<&str>,
        layers: &[String],
        base: (&str, Rights),
    ) -> Self {
        let mut request = Self::new(Holder::Job("commit", id.to_owned()));
        let reads = Rights::READ | Rights::WRITE_UNCHANGED;
        if let Some(overlay) = overlay {
            let demand = Demand {
                does: Rights::READ | Rights::WRITE_UNCHANGED | Rights::OPEN,
                tolerates: reads | Rights::WRITE,
            };
            request = request
                .with(overlay, "main node", demand)
                .frozen_below(state, overlay);
        }
        for (index, layer) in layers.iter().enumerate() {
            let (child, tolerates) = match (index, overlay) {
                (0, None) => ("source", reads | Rights::WRITE),
                (0, Some(_)) => ("intermediate node", reads),
                _ => ("intermediate node", Rights::WRITE_UNCHANGED),
            };
            let does = Rights::NONE;
            request = request
                .with(layer, child, Demand { does, tolerates })
                .frozen_below(state, layer);
            let image = state.image_node(layer).map(|image| image.name.clone());
            request.hidden.extend(image);
        }
        let demand = Demand {
            does: Rights::READ | Rights::WRITE | base.1,
            tolerates: Rights::WRITE_UNCHANGED,
        };
        let child = match overlay {
            Some(_) => "base",
            None => "target",
        };
        request.with(base.0, child, demand)
    }

    /// And the links from `layer` down to what supplies what its image lacks.
    fn frozen_below(mut self, state: &State, layer: &str) -> Self {
        let mut node = state.node(layer);
        while let Ok(filter) = node
            && let Some(child) = filter.child(Role::Filtered)
        {
            self = self.frozen(&filter.name, Role::Filtered);
            node = state.node(child);
        }
        match node {
            Ok(image) => self.frozen(&image.name, Role::Backing),
            Err(_) => self,
        }
    }
}

/// A node that cannot be had because another job holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Busy {
    /// Which of the nodes asked for it is, counted from 0.
    pub index: usize,
    /// What kind of job holds it.
    pub kind: &'static str,
}

/// What is held by a grant.
#[derive(Debug)]
pub(super) struct Held {
    request: Request,
    /// What it was for is over: it minds nothing any more.
    over: AtomicBool,
    /// What clients see of it in the graph.
    filter: Mutex<Option<Arc<JobFilter>>>,
}

impl Held {
    fn new(request: Request) -> Self {
        Self {
            request,
            over: AtomicBool::new(false),
            filter: Mutex::default(),
        }
    }

    /// Says whether it is over.
    pub(super) fn end(&self, over: bool) {
        self.over.store(over, Ordering::SeqCst);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }
}

/// A grant that is taken together with changes of the graph.
#[derive(Clone, Debug)]
pub struct Taken(Arc<Held>);

impl Taken {
    pub(super) fn new(request: Request) -> Self {
        Self(Arc::new(Held::new(request)))
    }

    /// The grant, when the changes have been published.
    #[must_use]
    pub fn grant(self, graph: &Graph) -> Grant {
        graph.granted(self.0)
    }
}

/// All grants.
#[derive(Debug, Default)]
pub(super) struct Grants(Vec<Arc<Held>>);

/// What its holder may do, until it is dropped.
#[derive(Debug)]
pub struct Grant {
    graph: Weak<Inner>,
    held: Arc<Held>,
    kept: bool,
}

impl Drop for Grant {
    fn drop(&mut self) {
        if !self.kept
            && let Some(graph) = self.graph.upgrade()
        {
            let mut grants = graph.publishing.lock();
            grants.0.retain(|held| !Arc::ptr_eq(held, &self.held));
        }
    }
}

impl Grant {
    /// The nodes that it is for.
    #[must_use]
    pub fn nodes(&self) -> Vec<String> {
        let uses = self.held.request.uses.iter();
        uses.map(|used| used.node.clone()).collect()
    }

    /// The nodes that it is to write.
    pub(super) fn written(&self) -> Vec<String> {
        let uses = self.held.request.uses.iter();
        let written = uses.filter(|used| used.demand.does.has(Rights::WRITE | Rights::OPEN));
        written.map(|used| used.node.clone()).collect()
    }

    /// Leaves it in force for the graph's time.
    pub fn keep(mut self) {
        self.kept = true;
    }

    /// Gives it back, and images that nobody writes any more back to their readers.
    ///
    /// # Errors
    /// When what was written cannot be made stable; it stays writable then.
    pub async fn give_back(self) -> Result<()> {
        let (graph, written) = (self.graph.upgrade().map(Graph), self.written());
        drop(self);
        let mut result = Ok(());
        for node in written {
            if let Some(graph) = &graph {
                result = result.and(graph.lower_unwritten(&node).await);
            }
        }
        result
    }

    /// As [`Graph::set_backing`], where this grant relies on what is there now, and is over then: it minds
    /// nothing any more that others do. Returns what is left of the graph before.
    ///
    /// # Errors
    /// When a node does not exist, or another grant relies on that.
    pub fn set_backing(&self, name: &str, backing: Option<&str>) -> Result<Released> {
        let Some(graph) = self.graph.upgrade().map(Graph) else {
            return Err(Error::Invalid(format!("Cannot find node '{name}'")));
        };
        let mut transaction = graph.transaction().by(self).ending();
        transaction.set_child(name, Role::Backing, backing)?;
        graph.commit(transaction)
    }

    /// The graph, while it is there.
    pub(super) fn graph(&self) -> Option<Graph> {
        self.graph.upgrade().map(Graph)
    }

    /// Sets what clients see of it. Nobody looks meanwhile, since `_all` are locked.
    pub(super) fn set_filter(&self, _all: &Grants, filter: Option<JobFilter>) {
        *self.held.filter.lock() = filter.map(Arc::new);
    }

    pub(super) fn held(&self) -> Weak<Held> {
        Arc::downgrade(&self.held)
    }
}

impl Graph {
    /// The names of the nodes that somebody uses, and of all under them.
    #[must_use]
    pub fn in_use(&self) -> HashSet<String> {
        let grants = self.0.publishing.lock();
        self.state().below(grants.used())
    }

    /// Takes a grant. It is in force at once; an image is not made ready to be written for it.
    ///
    /// # Errors
    /// What others do or do not tolerate, in QEMU's words.
    pub fn grant(&self, request: Request) -> Result<Grant> {
        let mut grants = self.0.publishing.lock();
        let held = Arc::new(Held::new(request));
        grants.0.push(held.clone());
        if let Err(error) = grants.check(&self.state()) {
            grants.0.pop();
            return Err(error);
        }
        Ok(self.granted(held))
    }

    /// Takes `nodes` for a job of this kind, all or none: no other job has them meanwhile.
    ///
    /// # Errors
    /// Another job has one of them.
    pub fn reserve(
        &self,
        nodes: &[String],
        kind: &'static str,
    ) -> std::result::Result<Grant, Busy> {
        let mut grants = self.0.publishing.lock();
        for (index, node) in nodes.iter().enumerate() {
            if let Some(kind) = grants.reserved_by(node) {
                return Err(Busy { index, kind });
            }
        }
        let mut request = Request::new(Holder::Job(kind, String::new()));
        for node in nodes {
            request = request.with(node, "main node", Demand::NOTHING);
        }
        request.uses.iter_mut().for_each(|used| used.alone = true);
        let held = Arc::new(Held::new(request));
        grants.0.push(held.clone());
        Ok(self.granted(held))
    }

    /// What a grant is for that uses `node` by name, in QEMU's words for who wants to remove it.
    pub(super) fn user_of(&self, node: &str) -> Option<String> {
        let grants = self.0.publishing.lock();
        let over = grants.filters().find(|filter| filter.node == node);
        let uses = |held: &&Arc<Held>| held.request.uses.iter().any(|used| used.node == node);
        let users: Vec<_> = grants.0.iter().filter(uses).collect();
        let job = users.iter().find_map(|held| match held.request.holder {
            Holder::Job(kind, _) => Some(busy(node, kind)),
            Holder::Export(_) | Holder::Tool => None,
        });
        // What is written, and the first layer of a commit, QEMU's jobs use as guests do.
        let is_written = users.iter().any(|held| {
            let mut uses = held.request.uses.iter().filter(|used| used.node == node);
            uses.any(|used| used.demand.does.has(Rights::WRITE))
        });
        let others = users
            .iter()
            .any(|held| !matches!(held.request.holder, Holder::Job(..)));
        let in_use = match over {
            // Others use the filter.
            Some(filter) => !filter.kind.is_held(),
            None => is_written || others,
        };
        match in_use {
            true => Some(format!("Node {node} is in use")),
            false => job,
        }
    }

    /// The kind of the job that has `node`, if one does.
    #[must_use]
    pub fn reserved_by(&self, node: &str) -> Option<&'static str> {
        self.0.publishing.lock().reserved_by(node)
    }

    /// Who uses which node for what: all edges of the graph, and all grants.
    #[must_use]
    pub fn uses(&self) -> Vec<NodeUse> {
        let grants = self.0.publishing.lock();
        let state = self.state();
        let users = grants.users(&state);
        let nodes = state.nodes().iter();
        let uses = nodes.flat_map(|node| {
            let users = users.get(node.name.as_str()).into_iter().flatten();
            users.map(|user| NodeUse {
                user: match user.who {
                    Who::Node(name) => NodeUser::Node(name.to_owned()),
                    Who::Held(held) => NodeUser::Holder(held.request.holder.clone()),
                },
                child: user.child,
                node: node.name.clone(),
                demand: user.demand,
            })
        });
        uses.collect()
    }

    fn granted(&self, held: Arc<Held>) -> Grant {
        Grant {
            graph: Arc::downgrade(&self.0),
            held,
            kept: false,
        }
    }

    /// Whether a grant is for `node` itself.
    pub(super) fn is_granted(&self, node: &str) -> bool {
        let grants = self.0.publishing.lock();
        let mut uses = grants.0.iter().flat_map(|held| &held.request.uses);
        uses.any(|used| used.node == node)
    }

    /// Whether a grant is for writing `node`, or something that is laid out in it.
    pub(super) fn is_written(&self, node: &str) -> bool {
        let grants = self.0.publishing.lock();
        let state = self.state();
        let users = grants.users(&state);
        let writing = Rights::WRITE | Rights::RESIZE | Rights::OPEN;
        let writes = |user: &User<'_>| user.demand.does.has(writing);
        users
            .get(node)
            .is_some_and(|users| users.iter().any(writes))
    }
}

/// Who uses a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeUser {
    /// A node over it.
    Node(String),
    /// The holder of a grant.
    Holder(Holder),
}

/// A use of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeUse {
    /// Who uses it.
    pub user: NodeUser,
    /// What it is to the user, in QEMU's words.
    pub child: &'static str,
    /// The node.
    pub node: String,
    /// What is done and tolerated.
    pub demand: Demand,
}

/// What uses a node: a grant, or a node over it.
struct User<'a> {
    who: Who<'a>,
    child: &'static str,
    demand: Demand,
}

#[derive(Clone, Copy)]
enum Who<'a> {
    Node(&'a str),
    Held(&'a Arc<Held>),
}

impl fmt::Display for Who<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node '{name}'"),
            Self::Held(held) => held.request.holder.fmt(f),
        }
    }
}

impl Who<'_> {
    fn is(self, other: Self) -> bool {
        match (self, other) {
            (Self::Node(one), Self::Node(other)) => one == other,
            (Self::Held(one), Self::Held(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

impl Grants {
    /// Adds grants that are taken with changes of the graph.
    pub(super) fn take(&mut self, takes: &[Taken]) {
        self.0.extend(takes.iter().map(|taken| taken.0.clone()));
    }

    /// They were not taken after all.
    pub(super) fn forget(&mut self, takes: &[Taken]) {
        let is_one = |held: &Arc<Held>| takes.iter().any(|taken| Arc::ptr_eq(&taken.0, held));
        self.0.retain(|held| !is_one(held));
    }

    /// The filters of jobs.
    pub(super) fn filters(&self) -> impl Iterator<Item = Arc<JobFilter>> {
        self.0.iter().filter_map(|held| held.filter.lock().clone())
    }

    /// Refuses nodes with the names of filters.
    pub(super) fn check_names(&self, state: &State) -> Result<()> {
        let mut filters = self.filters();
        match filters.find(|filter| state.node(&filter.name).is_ok()) {
            Some(filter) => Err(duplicate_name(&filter.name)),
            None => Ok(()),
        }
    }

    fn reserved_by(&self, node: &str) -> Option<&'static str> {
        self.0.iter().find_map(|held| match held.request.holder {
            Holder::Job(kind, _) => {
                let mut uses = held.request.uses.iter();
                let has = uses.any(|used| used.alone && used.node == node);
                has.then_some(kind)
            }
            _ => None,
        })
    }

    /// Whether what changes under `image` is hidden from those who read it.
    fn hides(&self, image: &str) -> bool {
        let held = self.0.iter().filter(|held| !held.is_over());
        let mut hidden = held.flat_map(|held| &held.request.hidden);
        hidden.any(|hidden| hidden == image)
    }

    /// What uses each node of `state`.
    fn users<'a>(&'a self, state: &'a State) -> HashMap<&'a str, Vec<User<'a>>> {
        let mut users: HashMap<&str, Vec<User>> = HashMap::new();
        for held in &self.0 {
            for used in &held.request.uses {
                users.entry(&used.node).or_default().push(User {
                    who: Who::Held(held),
                    child: used.child,
                    demand: match held.is_over() {
                        true => used.demand.minding_nothing(),
                        false => used.demand,
                    },
                });
            }
        }
        for node in state.children_first().into_iter().rev() {
            let mut own = Demand::NOTHING;
            for user in users.get(node.name.as_str()).into_iter().flatten() {
                own.does = own.does | user.demand.does;
                own.tolerates = own.tolerates & user.demand.tolerates;
            }
            for edge in &node.edges {
                let hides = edge.role == Role::Backing && self.hides(&node.name);
                users.entry(&edge.child).or_default().push(User {
                    who: Who::Node(&node.name),
                    child: edge.role.key(),
                    demand: match hides {
                        true => Demand::NOTHING,
                        false => node.driver().demand(own, edge.role),
                    },
                });
            }
        }
        users
    }

    /// Refuses grants that do not go together.
    fn check(&self, state: &State) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let users = self.users(state);
        for node in state.children_first().into_iter().rev() {
            let name = &node.name;
            let users = users.get(name.as_str()).map_or(&[][..], Vec::as_slice);
            // The newest first, as QEMU does.
            for rival in users.iter().rev() {
                let refused = |user: &&User| {
                    // A job that is over has the image open, and writes nothing more: what its end
                    // has put over the image may rely on that.
                    let is_still = matches!(rival.who, Who::Node(_))
                        && matches!(user.who, Who::Held(held) if held.is_over());
                    user.demand.does.has(Rights::ALL - rival.demand.tolerates)
                        && !is_still
                        && !user.who.is(rival.who)
                };
                if let Some(user) = users.iter().rev().find(refused) {
                    return Err(Error::Invalid(format!(
                        "Permission conflict on node '{name}': permissions '{}' are both required \
                         by {} (uses node '{name}' as '{}' child) and unshared by {} (uses node \
                         '{name}' as '{}' child).",
                        user.demand.does - rival.demand.tolerates,
                        user.who,
                        user.child,
                        rival.who,
                        rival.child
                    )));
                }
            }
        }
        Ok(())
    }

    /// Refuses the change from `old` to `new`, which removes nodes by name and is made by the holder
    /// of `by`, if it takes away what another grant relies on, or brings together what does not go
    /// together.
    pub(super) fn check_change<'n>(
        &self,
        old: &State,
        new: &State,
        removed: impl Iterator<Item = &'n String>,
        by: &Weak<Held>,
    ) -> Result<()> {
        for removed in removed {
            if let Some(kind) = self.reserved_by(removed) {
                return Err(Error::Invalid(busy(removed, kind)));
            }
            let mut uses = self.0.iter().flat_map(|held| &held.request.uses);
            if uses.any(|used| used.node == *removed) {
                return Err(Error::Invalid(format!("Block device {removed} is in use")));
            }
        }
        let child = |state: &State, node: &str, role| {
            let node = state.node(node).ok()?;
            node.child(role).map(str::to_owned)
        };
        for held in &self.0 {
            if std::ptr::eq(by.as_ptr(), Arc::as_ptr(held)) {
                continue;
            }
            for (node, role) in &held.request.frozen {
                let before = child(old, node, *role);
                if before != child(new, node, *role) {
                    return Err(Error::Invalid(format!(
                        "Cannot change frozen '{}' link from '{node}' to '{}'",
                        role.key(),
                        before.unwrap_or_default()
                    )));
                }
            }
        }
        self.check_read_only(old, new)?;
        self.check(new)
    }

    /// Refuses that node `name` is replaced when an export has come to it that gets no grant of what takes
    /// its place among those that are `taken`.
    pub(super) fn check_replaced(&self, name: &str, taken: &[Taken]) -> Result<()> {
        let stays = |held: &&Arc<Held>| {
            matches!(held.request.holder, Holder::Export(_))
                && held.request.uses.iter().any(|used| used.node == name)
                && taken
                    .iter()
                    .all(|Taken(taken)| taken.request.holder != held.request.holder)
        };
        match self.0.iter().find(stays) {
            Some(held) => Err(Error::Invalid(format!(
                "Node '{name}' is busy: {} has just begun to use it (try again)",
                held.request.holder
            ))),
            None => Ok(()),
        }
    }

    /// The nodes that somebody uses.
    fn used(&self) -> Vec<String> {
        let uses = self.0.iter().flat_map(|held| &held.request.uses);
        uses.map(|used| used.node.clone()).collect()
    }

    /// Refuses nodes that are not to be written any more, and are.
    fn check_read_only(&self, old: &State, new: &State) -> Result<()> {
        let was_writable = |name: &str| old.node(name).is_ok_and(|node| !node.fixed_read_only);
        let closed = new.nodes().iter().filter(|node| node.fixed_read_only);
        let mut closed = closed.filter(|node| was_writable(&node.name)).peekable();
        if closed.peek().is_none() {
            return Ok(());
        }
        let users = self.users(new);
        for node in closed {
            let writing = Rights::WRITE | Rights::RESIZE | Rights::OPEN;
            let users = users.get(node.name.as_str()).into_iter().flatten();
            if users.into_iter().any(|user| user.demand.does.has(writing)) {
                return Err(Error::Invalid(format!(
                    "Read-only block node '{}' cannot support read-write users",
                    node.name
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
