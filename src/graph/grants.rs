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

mod check;
mod request;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::edges::{Demand, Rights, Role};
use super::job_filter::{JobFilter, busy};
use super::nodes::{State, duplicate_name};
use super::{Graph, Inner, Released};
use crate::error::{Error, Result};

use check::{User, Who};
pub use request::{Holder, Request};

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

    /// Whether it has images written that are read-only for guests.
    pub(super) fn reopens(&self) -> bool {
        self.held.request.reopens
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

#[cfg(test)]
mod tests;
