//! Which images were put on top of others, as it is recorded, and what becomes of that at a start.
//!
//! A command line that names the image below would send its guest back to where it was before the
//! snapshot, and would let it write under its own overlay, which destroys the disk. So what is
//! recorded wins: the image on top is served, and the one below is read.
//!
//! The guest is told by its export's id. An export of another id is the same guest's under a new name
//! where it is the only one; beside that guest's own it is refused, if it writes. One that reads shows
//! what the snapshot was taken for.

use std::sync::Arc;

use serde_json::Value;

use super::in_place::in_place;
use super::state::{find, recorded};
use crate::error::{Error, Result};
use crate::graph::recorded::is_same_image;
use crate::graph::{Graph, Holder, Node, Request, Role, State};
use crate::job::records::{self, identity};
use crate::options::{BackingRef, BlockdevOptions, Dialect, Driver, ExportOptions};
use crate::reactor::Reactor;
use crate::state::Store;
use crate::state::record::{self, Top};

/// A node, and the one that is put on top of it.
#[derive(Clone, Debug)]
pub(super) struct Cover {
    pub old: String,
    pub overlay: String,
}

/// Makes the records of nodes that are about to be put on top of others, one after the other.
pub(super) struct Recorder<'a> {
    graph: &'a Graph,
    /// The images that exports have on top, with the exports' ids.
    tops: Vec<(String, String)>,
    /// Those that guests write now.
    written: &'a [&'a str],
    pub made: Vec<Top>,
}

impl<'a> Recorder<'a> {
    /// `tops` are the images that exports have on top now, with the exports' ids, and `written` those
    /// of them that guests write.
    pub fn new(graph: &'a Graph, tops: Vec<(String, String)>, written: &'a [&'a str]) -> Self {
        Self {
            graph,
            tops,
            written,
            made: Vec::new(),
        }
    }

    /// For the next one, where `state` is what those before it make of the graph.
    ///
    /// # Errors
    /// When a node does not exist.
    pub fn add(&mut self, state: &State, cover: &Cover) -> Result<()> {
        let (covered, top) = (state.image_node(&cover.old)?, state.node(&cover.overlay)?);
        let mut exports = Vec::new();
        for (image, export) in &mut self.tops {
            if *image == covered.name {
                exports.push(export.clone());
                image.clone_from(&top.name);
            }
        }
        self.made.push(Top {
            covered: records::node(self.graph, covered)?,
            identity: identity(covered),
            top: records::node(self.graph, top)?,
            top_identity: identity(top),
            exports,
            open_as: options_of(state, top),
            closed: !self.written.contains(&covered.name.as_str()),
        });
        Ok(())
    }
}

/// The options of a node, with those that it is laid out in inside of it. What is to lie under it is
/// recorded apart.
fn options_of(state: &State, node: &Node) -> Value {
    let mut options = node.options.clone();
    options.node_name = Some(node.name.clone());
    match &mut options.driver {
        Driver::Qcow2(qcow2) => qcow2.backing = BackingRef::Default,
        Driver::Qed(qed) => qed.backing = BackingRef::Default,
        _ => {}
    }
    let options = in_place(state, &options, |_| true);
    options.with_absolute_paths().to_value()
}

/// Puts back on top what is recorded to be there, and has the exports of what is below serve it.
///
/// # Errors
/// When what is recorded cannot be found, or does not fit the nodes there are.
pub fn restore(
    graph: &Graph,
    store: Option<&Arc<Store>>,
    exports: &mut [ExportOptions],
    reactor: &Reactor,
) -> Result<()> {
    let Some(store) = store else {
        return Ok(());
    };
    let state = store.state();
    for record in &state.tops {
        let top = state.standing(record);
        let restoring = Restoring {
            graph,
            store,
            record,
            top: &top,
        };
        restoring.restore(exports, reactor).map_err(|error| {
            Error::Invalid(format!(
                "'{place}' records that '{on_top}' is on top of '{covered}', and its guest writes \
                 there: {error} (put back what is missing; removing '{place}' forgets all that it \
                 records, and an export of '{covered}' then gives its guest the disk as it was \
                 before, without anything written since, and destroys '{on_top}' as soon as it \
                 writes)",
                place = store.path().display(),
                on_top = top.top.file,
                covered = top.covered.file
            ))
        })?;
    }
    Ok(())
}

struct Restoring<'a> {
    graph: &'a Graph,
    store: &'a Arc<Store>,
    record: &'a Top,
    /// What stands of it.
    top: &'a Top,
}

impl Restoring<'_> {
    fn restore(&self, exports: &mut [ExportOptions], reactor: &Reactor) -> Result<()> {
        let covered = self.find(&self.top.covered, self.top.identity)?;
        let is_gone = |export: &ExportOptions| {
            covered.is_none()
                && self.graph.node(&export.node_name).is_err()
                && self.top.covered.name.as_ref() == Some(&export.node_name)
        };
        if covered.is_none() && !exports.iter().any(is_gone) {
            // Neither it nor what was put on top of it is served from it.
            return Ok(());
        }
        if let Some(covered) = &covered {
            self.close_below(covered, reactor)?;
        }
        let overlay = match self.find(&self.top.top, self.top.top_identity)? {
            Some(node) => node,
            None => self.open(covered.as_ref(), reactor)?,
        };
        if let Some(covered) = &covered {
            self.put_over(&overlay, covered)?;
        }
        let names = covered.as_ref().map(|covered| &covered.name);
        let is_of = |export: &ExportOptions| Some(&export.node_name) == names || is_gone(export);
        let known = |export: &ExportOptions| self.top.exports.contains(&export.id);
        let mut own = exports.iter().filter(|export| known(export));
        let has_own = own.any(|export| is_of(export) || export.node_name == overlay.name);
        for export in exports.iter_mut().filter(|export| is_of(export)) {
            if !known(export) {
                if !export.writable
                    || (self.has_link() && self.is_free(&overlay, covered.as_ref())?)
                {
                    continue;
                }
                if has_own {
                    return Err(Error::Invalid(format!(
                        "export '{}' is to write the one below, beside export '{}', whose disk it is \
                         a part of (expected writable=off)",
                        export.id,
                        self.top.exports.join("', '")
                    )));
                }
            }
            log::warn!(
                "export '{}': node '{}' is served in place of node '{}', which it is on top of, as \
                 '{}' records (the command line should name it)",
                export.id,
                overlay.name,
                export.node_name,
                self.store.path().display()
            );
            export.node_name.clone_from(&overlay.name);
        }
        Ok(())
    }

    /// Makes stable what the guest has written to the image below, if the process that covered it
    /// has not come to that: a flush by the guest may make the image on top stable alone from here
    /// on.
    fn close_below(&self, covered: &Node, reactor: &Reactor) -> Result<()> {
        if self.record.closed {
            return Ok(());
        }
        let closing = async {
            let request = Request::disk(Holder::Tool, &covered.name, true);
            let grant = self.graph.access(request).await?;
            let flushed = self.graph.image_node(&covered.name)?.layer.flush().await;
            flushed.and(grant.give_back().await)
        };
        reactor.block_on(closing).map_err(|error| {
            Error::Invalid(format!(
                "'{}' may hold what its guest has written before, which was not made stable, and \
                 it cannot be now: {error} (it has to be opened for writing once, without \
                 read-only=on)",
                self.top.covered.file
            ))
        })?;
        let closed = self
            .store
            .happened(|state| state.close_covered(self.record));
        if let Err(error) = closed {
            log::error!("that '{}' is stable: {error}", self.top.covered.file);
        }
        Ok(())
    }

    /// The node with a recorded image, whatever it is called now.
    fn find(&self, wanted: &record::Node, of: record::Identity) -> Result<Option<Node>> {
        let any = record::Node {
            name: None,
            ..wanted.clone()
        };
        find(self.graph, &any, of).map_err(Error::Invalid)
    }

    /// Whether a stream has ended since in the image on top: then that says what lies under it.
    fn has_link(&self) -> bool {
        let state = self.store.state();
        let commits = state.jobs.iter().filter_map(|job| job.commit.as_ref());
        let mut links = commits.map(|commit| &commit.link).chain(&state.links);
        links.any(|link| {
            is_same_image(
                (&link.node.file, link.identity),
                (&self.top.top.file, self.top.top_identity),
            )
        })
    }

    /// Whether the image below is no part any more of the disk of the one on top: a stream has let go
    /// of it.
    fn is_free(&self, overlay: &Node, covered: Option<&Node>) -> Result<bool> {
        let Some(covered) = covered else {
            return Ok(true);
        };
        let file = self.graph.file_of(covered)?;
        for node in self.graph.chain_nodes(&overlay.name)? {
            let below = self.graph.file_of(&node)?;
            if is_same_image((&below, identity(&node)), (&file, identity(covered))) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn open(&self, covered: Option<&Node>, reactor: &Reactor) -> Result<Node> {
        let mut value = self.top.open_as.clone();
        refer(&self.graph.state(), &mut value);
        let named = value.get("node-name").is_some();
        if !named && let Some(members) = value.as_object_mut() {
            // It has no name for users, and needs one to be read.
            members.insert(
                "node-name".into(),
                self.graph.make_name().replace('#', "x-").into(),
            );
        }
        let mut options = BlockdevOptions::from_value(&value, Dialect::Recorded)
            .map_err(|error| Error::Invalid(error.to_string()))?;
        if !named {
            options.node_name = Some(self.graph.make_name());
        }
        if let Driver::Qcow2(qcow2) = &mut options.driver {
            qcow2.backing = match self.has_link() || covered.is_none() {
                true => BackingRef::Default,
                false => BackingRef::None,
            };
        }
        let recorded = recorded(Some(self.store));
        let list = [options];
        reactor.block_on(self.graph.open_recorded_all(&list, recorded))?;
        let [options] = list;
        self.graph.node(&options.node_name.unwrap_or_default())
    }

    /// Sees to it that `overlay` is over `covered`, and filters of that one over the overlay.
    fn put_over(&self, overlay: &Node, covered: &Node) -> Result<()> {
        let state = self.graph.state();
        let below = state.backing(&overlay.name)?.map(str::to_owned);
        let below = below.map(|name| state.image_node(&name)).transpose()?;
        let mut transaction = self.graph.transaction();
        match below {
            Some(below) if below.name == covered.name => {}
            _ if self.has_link() => {}
            Some(below) => {
                return Err(Error::Invalid(format!(
                    "node '{}' is on top of node '{}' here",
                    overlay.name, below.name
                )));
            }
            None => transaction.set_child(&overlay.name, Role::Backing, Some(&covered.name))?,
        }
        for node in state.nodes() {
            if node.child(Role::Filtered) == Some(&covered.name)
                && !state.is_under(&node.name, &overlay.name)
            {
                transaction.set_child(&node.name, Role::Filtered, Some(&overlay.name))?;
            }
        }
        self.graph.commit(transaction).map(drop)
    }
}

/// Has nodes inside a node that are there already be referred to by name.
fn refer(state: &State, value: &mut Value) {
    let Some(members) = value.as_object_mut() else {
        return;
    };
    for key in ["file", "data-file", "image", "backing"] {
        let Some(child) = members.get_mut(key) else {
            continue;
        };
        let name = child.get("node-name").and_then(Value::as_str);
        match name.filter(|name| state.node(name).is_ok()) {
            Some(name) => *child = Value::from(name),
            None => refer(state, child),
        }
    }
}
