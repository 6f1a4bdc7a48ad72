//! All grants together: which go with one another, and with a change of the graph.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Weak};

use super::{
    Demand, Grants, Held, Holder, JobFilter, Rights, Role, State, Taken, busy, duplicate_name,
};
use crate::error::{Error, Result};

/// What uses a node: a grant, or a node over it.
pub(super) struct User<'a> {
    pub(super) who: Who<'a>,
    pub(super) child: &'static str,
    pub(super) demand: Demand,
}

#[derive(Clone, Copy)]
pub(super) enum Who<'a> {
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
    pub(in crate::graph) fn take(&mut self, takes: &[Taken]) {
        self.0.extend(takes.iter().map(|taken| taken.0.clone()));
    }

    /// They were not taken after all.
    pub(in crate::graph) fn forget(&mut self, takes: &[Taken]) {
        let is_one = |held: &Arc<Held>| takes.iter().any(|taken| Arc::ptr_eq(&taken.0, held));
        self.0.retain(|held| !is_one(held));
    }

    /// The filters of jobs.
    pub(in crate::graph) fn filters(&self) -> impl Iterator<Item = Arc<JobFilter>> {
        self.0.iter().filter_map(|held| held.filter.lock().clone())
    }

    /// Refuses nodes with the names of filters.
    pub(in crate::graph) fn check_names(&self, state: &State) -> Result<()> {
        let mut filters = self.filters();
        match filters.find(|filter| state.node(&filter.name).is_ok()) {
            Some(filter) => Err(duplicate_name(&filter.name)),
            None => Ok(()),
        }
    }

    pub(super) fn reserved_by(&self, node: &str) -> Option<&'static str> {
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
    pub(super) fn users<'a>(&'a self, state: &'a State) -> HashMap<&'a str, Vec<User<'a>>> {
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
    pub(super) fn check(&self, state: &State) -> Result<()> {
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
    pub(in crate::graph) fn check_change<'n>(
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
    pub(in crate::graph) fn check_replaced(&self, name: &str, taken: &[Taken]) -> Result<()> {
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
    pub(super) fn used(&self) -> Vec<String> {
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
