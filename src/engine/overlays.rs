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
use super::later::Later;
use super::state::{find, recorded};
use crate::error::{Error, Result};
use crate::graph::recorded::is_same_image;
use crate::graph::{Graph, Holder, Node, Request, Role, State};
use crate::job::records::{self, identity};
use crate::options::{BackingRef, BlockRef, BlockdevOptions, Dialect, Driver, ExportOptions};
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
/// What is about nodes that are still `later` is left for then. Nodes that no client had named are
/// added to `unnamed`.
///
/// # Errors
/// When what is recorded cannot be found, or does not fit the nodes there are.
pub(super) fn restore(
    graph: &Graph,
    store: &Arc<Store>,
    exports: &mut [ExportOptions],
    later: &Later<'_>,
    reactor: &Reactor,
    unnamed: &mut Vec<String>,
) -> Result<()> {
    let state = store.state();
    let mut waiting: Vec<&Top> = Vec::new();
    for record in &state.tops {
        let top = state.standing(record);
        let covered = (record.covered.file.as_str(), record.identity);
        let is_over = |other: &&Top| is_same_image((&other.top.file, other.top_identity), covered);
        let is_later = [&record.covered, &record.top, &top.top].map(|node| later.has(node));
        let image = (top.top.file.as_str(), top.top_identity);
        if is_later.contains(&true)
            || later.has_below(graph, &state, image)
            || waiting.iter().any(is_over)
        {
            waiting.push(record);
            continue;
        }
        let restoring = Restoring {
            graph,
            store,
            state: &state,
            later,
            record,
            top: &top,
        };
        let restored = restoring.restore(exports, reactor, unnamed);
        restored.map_err(|error| {
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
    state: &'a record::State,
    later: &'a Later<'a>,
    record: &'a Top,
    /// What stands of it.
    top: &'a Top,
}

impl Restoring<'_> {
    fn restore(
        &self,
        exports: &mut [ExportOptions],
        reactor: &Reactor,
        unnamed: &mut Vec<String>,
    ) -> Result<()> {
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
            self.put_left_over(covered)?;
        }
        let names = covered.as_ref().map(|covered| &covered.name);
        let is_of = |export: &ExportOptions| Some(&export.node_name) == names || is_gone(export);
        let known = |export: &ExportOptions| self.top.exports.contains(&export.id);
        let goes = |export: &ExportOptions| is_of(export) && (known(export) || export.writable);
        let overlay = match self.find(&self.top.top, self.top.top_identity)? {
            Some(node) => node,
            None => {
                if let Some(to) = self.left_for()? {
                    // The image below may be another guest's, where it was let go of.
                    let own = |export: &ExportOptions| known(export) || !self.has_link();
                    let exports = exports.iter_mut();
                    for export in exports.filter(|export| goes(export) && own(export)) {
                        export.node_name.clone_from(&to);
                    }
                    return Ok(());
                }
                if !self.is_wanted(exports, goes)? {
                    return Ok(());
                }
                self.open(covered.as_ref(), reactor, unnamed)?
            }
        };
        if let Some(covered) = &covered {
            self.put_over(&overlay, covered)?;
        }
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

    /// The node that the guest has gone on to, if it has left what is on top: that need not be there.
    /// Neither need the other one, where something is on top of that.
    fn left_for(&self) -> Result<Option<String>> {
        let image = (self.top.top.file.as_str(), self.top.top_identity);
        let mut name = None;
        for moved in self.state.moves_from(image) {
            if let Some(node) = self.find(&moved.to, moved.to_identity)? {
                return Ok(Some(node.name));
            }
            name.clone_from(&moved.to.name);
        }
        Ok(name)
    }

    /// Whether anybody needs what is on top: an export that `goes` there, or a node that is there, by
    /// itself or since it is on top of that one. A client may have removed it otherwise, and its file.
    fn is_wanted(
        &self,
        exports: &[ExportOptions],
        goes: impl Fn(&ExportOptions) -> bool,
    ) -> Result<bool> {
        let names_it =
            |export: &&ExportOptions| self.top.top.name.as_ref() == Some(&export.node_name);
        if exports
            .iter()
            .any(|export| goes(export) || names_it(&export))
        {
            return Ok(true);
        }
        if self.later.want(self.state, &self.top.top) {
            return Ok(true);
        }
        for above in self.state.upwards(self.record) {
            let image = (above.top.file.as_str(), above.top_identity);
            let mut made = self.state.made.iter();
            if made.any(|made| is_same_image((&made.node.file, made.identity), image))
                || self.find(&above.top, above.top_identity)?.is_some()
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Sees to it that an image which was let go of is over what it was put on top of, as it was: it
    /// is read so.
    fn put_left_over(&self, covered: &Node) -> Result<()> {
        let (record, image) = (self.record, |top: &Top| {
            (top.top.file.clone(), top.top_identity)
        });
        if image(record) == image(self.top) || self.has_link_of(record) {
            return Ok(());
        }
        let Some(left) = self.find(&record.top, record.top_identity)? else {
            return Ok(());
        };
        if left.child(Role::Backing).is_some() {
            return Ok(());
        }
        let mut transaction = self.graph.transaction();
        transaction.set_child(&left.name, Role::Backing, Some(&covered.name))?;
        self.graph.commit(transaction).map(drop)
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

    /// Whether a stream has ended since in the image on top, or a client has put something else under
    /// it: then that says what lies under it.
    fn has_link(&self) -> bool {
        self.has_link_of(self.top)
    }

    fn has_link_of(&self, top: &Top) -> bool {
        let mut links = records::links(self.state);
        links.any(|link| {
            is_same_image(
                (&link.node.file, link.identity),
                (&top.top.file, top.top_identity),
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

    fn open(
        &self,
        covered: Option<&Node>,
        reactor: &Reactor,
        unnamed: &mut Vec<String>,
    ) -> Result<Node> {
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
            qcow2.backing = match covered {
                None => BackingRef::Default,
                // What is recorded to lie under it is looked for there.
                Some(covered) if self.has_link() => {
                    BackingRef::Node(BlockRef::Name(covered.name.clone()))
                }
                Some(_) => BackingRef::None,
            };
        }
        let recorded = recorded(Some(self.store));
        let list = [options];
        reactor.block_on(self.graph.open_recorded_all(&list, recorded))?;
        let [options] = list;
        let name = options.node_name.unwrap_or_default();
        if !named {
            unnamed.push(name.clone());
        }
        self.graph.node(&name)
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
pub(super) fn refer(state: &State, value: &mut Value) {
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
