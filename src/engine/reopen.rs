//! Nodes that get other options while they are there: what lies under them, and whether they may be
//! written. All other options stay as they are, and a request to change one is refused.
//!
//! Guests go on meanwhile. A request that has begun ends on the chain that it began with.

use serde_json::{Map, Value};

use super::Engine;
use super::in_place::{in_place, unnamed};
use super::nodes::refused;
use super::runtime::{Change, names_in};
use super::stream::no_such_device;
use crate::error::Error;
use crate::graph::recorded::is_same_image;
use crate::graph::{FilterKind, Node, Role, State, Transaction};
use crate::job::Refused;
use crate::job::records::{self, identity};
use crate::options::{BackingRef, BlockRef, BlockdevOptions, Driver};
use crate::state::record::{self, Link};

/// Options that may change, and the name, which says which node is meant.
const MAY_CHANGE: &[&str] = &["node-name", "read-only", "auto-read-only"];

/// Options that hold a child.
const CHILDREN: &[&str] = &["file", "image", "data-file", "backing"];

impl Engine {
    /// Gives nodes other options, all or none.
    ///
    /// # Errors
    /// In QEMU's words, what cannot be changed. Nothing has changed then.
    pub fn reopen_nodes(&self, list: &[BlockdevOptions]) -> Result<(), Refused> {
        let _changing = self.runtime.change();
        let before = self.graph.state();
        let mut transaction = self.graph.transaction();
        for options in list {
            self.check_reopen(options)?;
            reopen(&mut transaction, &self.without_filters(options))?;
        }
        let names = list
            .iter()
            .filter_map(|options| options.node_name.as_deref());
        let names: Vec<&str> = names.collect();
        // Before it is published, so that the record has what is in force.
        let links = self.links_of(&transaction, &names)?;
        let recorded = names.iter().map(|name| {
            let node = transaction.state().node(name).map_err(refused)?;
            Ok((*name, in_place(transaction.state(), &node.options, unnamed)))
        });
        let recorded = recorded.collect::<Result<Vec<_>, Refused>>()?;
        let released = self.graph.commit(transaction).map_err(refused)?;
        let changes = recorded
            .iter()
            .flat_map(|(name, options)| [Change::RemoveNode(name), Change::AddNode(options)]);
        let changes: Vec<_> = changes.chain([Change::Links(&links)]).collect();
        if let Err(error) = self.record(&changes) {
            self.take_back(&before, &names);
            return Err(error);
        }
        drop((before, released));
        Ok(())
    }

    /// Refuses other options of a job's filter, a node that is to be over a filter that is over it, and one
    /// that would take the place of a filter.
    fn check_reopen(&self, options: &BlockdevOptions) -> Result<(), Refused> {
        let name = options.node_name.as_deref().unwrap_or_default();
        if let Some(filter) = self.graph.filter(name) {
            return refuse(format!(
                "Block format '{}' used by node '{name}' does not support reopening files",
                filter.kind.driver()
            ));
        }
        self.check_under(options)?;
        for (key, child) in options.children() {
            let BlockRef::Name(child) = child else {
                continue;
            };
            if !self.graph.has_name(child) {
                return Err(no_such_device("", child));
            }
            if let Some(filter) = self.graph.filter(child)
                && self.graph.state().is_under(name, &filter.node)
            {
                return refuse(format!(
                    "Making '{child}' a {key} child of '{name}' would create a cycle"
                ));
            }
        }
        Ok(())
    }

    /// Refuses options for what is under a node where clients see the filter of a commit there.
    fn check_under(&self, options: &BlockdevOptions) -> Result<(), Refused> {
        let name = options.node_name.as_deref().unwrap_or_default();
        let state = self.graph.state();
        let below = state.node(name).ok();
        let below = below.and_then(|node| node.child(Role::Backing));
        let over = below.and_then(|below| self.graph.filter_over(below));
        let Some(filter) = over.filter(|filter| filter.kind == FilterKind::Commit) else {
            return Ok(());
        };
        let wanted = match &options.driver {
            Driver::Qcow2(qcow2) => &qcow2.backing,
            Driver::Qed(qed) => &qed.backing,
            _ => return Ok(()),
        };
        match wanted {
            BackingRef::Node(BlockRef::Inline(_)) => {
                refuse("Cannot change the option 'backing.driver'")
            }
            BackingRef::None if !filter.named => {
                refuse(format!("Cannot replace implicit backing child of {name}"))
            }
            _ => Ok(()),
        }
    }

    /// What is recorded of the chains of nodes `names`, as it is to be.
    fn links_of(&self, transaction: &Transaction, names: &[&str]) -> Result<Vec<Link>, Refused> {
        let Some(store) = &self.store else {
            return Ok(Vec::new());
        };
        let state = store.state();
        let mut links = Vec::new();
        for name in names {
            let link = self.link_of(transaction, name, &state);
            links.extend(link.map_err(refused)?);
        }
        Ok(links)
    }

    /// What is to be recorded to lie under node `name`, if anything is by now: by a job that has ended,
    /// or since it was put on top of another one.
    fn link_of(
        &self,
        transaction: &Transaction,
        name: &str,
        state: &record::State,
    ) -> Result<Option<Link>, Error> {
        let node = self.graph.node(name)?;
        let (file, own) = (self.graph.file_of(&node)?, identity(&node));
        let is_it = |file_of: &str, identity| is_same_image((file_of, identity), (&file, own));
        let mut known = state.links.iter();
        let known = known.find(|link| is_it(&link.node.file, link.identity));
        let mut tops = state.tops.iter();
        let covers = tops.any(|top| is_it(&top.top.file, top.top_identity));
        let mut link = match known {
            Some(link) => link.clone(),
            None if covers => Link {
                node: records::node(&self.graph, &node)?,
                identity: own,
                header: records::header_of(&node),
                below: None,
                released: Vec::new(),
                released_files: Vec::new(),
                let_go: false,
            },
            None => return Ok(None),
        };
        let now = transaction.state();
        let under = now.node(name)?.child(Role::Backing);
        let under = under.map(|under| self.graph.node(under)).transpose()?;
        let under = under.map(|under| records::below(&self.graph, &under));
        link.below = under.transpose()?;
        let chain = now.chain_nodes(name)?;
        let is_there = |node: &Node| chain.iter().any(|there| there.name == node.name);
        let left = self.graph.chain_nodes(name)?;
        let left: Vec<_> = left.iter().filter(|node| !is_there(node)).collect();
        let left_names = records::names_of(&self.graph, left.iter().copied());
        release(&mut link.released, left_names);
        let files = left.iter().map(|node| self.graph.file_of(node));
        release(&mut link.released_files, files.collect::<Result<_, _>>()?);
        for node in &chain {
            let file = now.file_of(node)?;
            link.released.retain(|name| node.name != *name);
            link.released_files.retain(|released| file != *released);
        }
        Ok(Some(link))
    }

    /// Gives nodes the options and children again that they had before.
    fn take_back(&self, before: &State, names: &[&str]) {
        let mut transaction = self.graph.transaction();
        let gone = before.nodes_children_first();
        let gone = gone.filter(|node| self.graph.node(&node.name).is_err());
        let mut result = Ok(());
        for node in gone {
            result = result.and_then(|()| transaction.add(Node::clone(node)));
        }
        for node in names.iter().filter_map(|name| before.node(name).ok()) {
            let child = node.child(Role::Backing);
            result = result
                .and_then(|()| transaction.set_child(&node.name, Role::Backing, child))
                .and_then(|()| transaction.set_options(&node.name, node.options.clone()));
        }
        if let Err(error) = result.and_then(|()| self.graph.commit(transaction)) {
            log::error!("a change of nodes that is not recorded stays: {error}");
        }
    }
}

/// Adds to what is known to have left a chain.
fn release(known: &mut Vec<String>, left: Vec<String>) {
    for one in left {
        if !known.contains(&one) {
            known.push(one);
        }
    }
}

fn refuse<T>(text: impl Into<String>) -> Result<T, Refused> {
    Err(Refused(text.into()))
}

fn reopen(transaction: &mut Transaction, options: &BlockdevOptions) -> Result<(), Refused> {
    let Some(name) = options.node_name.as_deref() else {
        return refuse("node-name not specified");
    };
    let Ok(node) = transaction.state().node(name).cloned() else {
        return refuse(format!("Failed to find node with node-name='{name}'"));
    };
    if node.implicit {
        return refuse(format!("Node {name} is not owned by the monitor"));
    }
    check_unchanged(transaction.state(), &node, &options.to_value(), false)?;
    let backing = backing(transaction.state(), &node, options)?;
    if backing.as_deref() != node.child(Role::Backing) {
        transaction
            .set_child(name, Role::Backing, backing.as_deref())
            .map_err(refused)?;
    }
    let file = node
        .file()
        .and_then(|file| transaction.state().node(file).ok());
    if !options.read_only && file.is_some_and(|file| file.fixed_read_only) {
        return refuse("Block node is read-only");
    }
    // Nodes inside it stay as they are, and so do their options.
    let mut now = options.clone();
    if let (Some(new), Some(old)) = (
        now.driver.file_mut(),
        node.options.clone().driver.file_mut(),
    ) {
        *new = old.clone();
    }
    if let Driver::Qcow2(new) = &mut now.driver
        && let Driver::Qcow2(old) = &node.options.driver
    {
        new.data_file.clone_from(&old.data_file);
    }
    if let (Some(new @ BlockRef::Inline(_)), Some(own)) = (backing_mut(&mut now), &backing) {
        let below = transaction.state().node(own).map_err(refused)?;
        *new = match below.implicit || names_in(&node.options).contains(own) {
            true => BlockRef::Inline(Box::new(below.options.clone())),
            false => BlockRef::Name(own.clone()),
        };
    }
    transaction.set_options(name, now).map_err(refused)
}

fn backing_mut(options: &mut BlockdevOptions) -> Option<&mut BlockRef> {
    match &mut options.driver {
        Driver::Qcow2(qcow2) => qcow2.backing.node_mut(),
        Driver::Qed(qed) => qed.backing.node_mut(),
        _ => None,
    }
}

/// What is to lie under a node.
fn backing(
    state: &State,
    node: &Node,
    options: &BlockdevOptions,
) -> Result<Option<String>, Refused> {
    let own = node.child(Role::Backing).map(str::to_owned);
    let wanted = match &options.driver {
        Driver::Qcow2(qcow2) => &qcow2.backing,
        Driver::Qed(qed) => &qed.backing,
        _ => return Ok(own),
    };
    match (wanted, &own) {
        // The header's would be meant, and nobody has said whether it still is to be.
        (BackingRef::Default, own) if own.is_some() || node.layer.format.backing().is_some() => {
            refuse(format!("backing is missing for '{}'", node.name))
        }
        (BackingRef::Default | BackingRef::None, _) => Ok(None),
        (BackingRef::Node(BlockRef::Name(name)), _) => match state.node(name) {
            Ok(_) => Ok(Some(name.clone())),
            Err(_) => Err(no_such_device("", name)),
        },
        (BackingRef::Node(BlockRef::Inline(inline)), Some(own)) => {
            let below = state.node(own).map_err(refused)?;
            check_unchanged(state, below, &inline.to_value(), true)?;
            Ok(Some(own.clone()))
        }
        (BackingRef::Node(BlockRef::Inline(_)), None) => {
            refuse("Cannot change the option 'backing.driver'")
        }
    }
}

/// Refuses options `new` of a node, or of those written inside it, that are not those of the nodes that
/// are there, and cannot change. What lies under the node that is reopened itself may change, and is
/// not looked at; under one that `is_inside` it may not.
fn check_unchanged(
    state: &State,
    node: &Node,
    new: &Value,
    is_inside: bool,
) -> Result<(), Refused> {
    let name = new.get("node-name").and_then(Value::as_str);
    if is_inside && name.is_some_and(|name| name != node.name) {
        return refuse("Cannot change the option 'node-name'");
    }
    let old = node.options.to_value();
    // What is not said is inherited, and comes out otherwise for a node that was made elsewhere.
    let inherited: &[&str] = match is_inside {
        true => &["discard", "cache", "force-share"],
        false => &[],
    };
    let but = [MAY_CHANGE, CHILDREN, inherited].concat();
    if let Some((key, old, new)) = differences(&old, new, &but).first() {
        return refuse(cannot(key, old, new));
    }
    for key in CHILDREN {
        let child = match *key {
            "file" => node.file(),
            "image" => node.child(Role::Image),
            "data-file" => node.child(Role::DataFile),
            _ if is_inside => node.child(Role::Backing),
            _ => continue,
        };
        let same = match (child, new.get(*key)) {
            (Some(child), Some(Value::String(name))) => child == name,
            (Some(child), Some(inline @ Value::Object(_))) => {
                let child = state.node(child).map_err(refused)?;
                check_unchanged(state, child, inline, true)?;
                true
            }
            (None, Some(Value::Null)) => true,
            // As the header says, or as it is.
            (_, None) => *key == "backing" || old.get(*key).is_none(),
            _ => false,
        };
        if !same {
            let value = |of: &Value| of.get(*key).cloned().unwrap_or_default();
            return refuse(cannot(key, &value(&old), &value(new)));
        }
    }
    Ok(())
}

fn cannot(key: &str, old: &Value, new: &Value) -> String {
    let inner = differences(old, new, &[]);
    match inner.first() {
        Some((own, ..)) if old.is_object() && new.is_object() => {
            format!("Cannot change the option '{key}.{own}'")
        }
        _ => format!("Cannot change the option '{key}'"),
    }
}

/// The members that differ, but for those `but`.
fn differences(old: &Value, new: &Value, but: &[&str]) -> Vec<(String, Value, Value)> {
    let none = Map::new();
    let (old, new) = (
        old.as_object().unwrap_or(&none),
        new.as_object().unwrap_or(&none),
    );
    let mut keys: Vec<&String> = old.keys().chain(new.keys()).collect();
    keys.sort();
    keys.dedup();
    // The driver first: all else follows from it.
    keys.sort_by_key(|key| *key != "driver");
    let keys = keys.into_iter().filter(|key| !but.contains(&key.as_str()));
    let pairs = keys.map(|key| {
        let value = |map: &Map<String, Value>| map.get(key).cloned().unwrap_or_default();
        (key.clone(), value(old), value(new))
    });
    pairs.filter(|(_, old, new)| old != new).collect()
}
