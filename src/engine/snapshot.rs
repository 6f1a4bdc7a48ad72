//! Snapshots and transactions of them: new images on top of those that guests write, and snapshots
//! inside of these ([`internal`](super::internal)).
//!
//! ```text
//!   find ─▶ make, open ─▶ reserve ─▶ grants, locks ─▶ flush ─▶ record ─▶ hold ─▶ publish ─▶ close ─▶ answer
//!   └────────────── an error takes all of it back ──────────────────────────────────┘
//! ```
//!
//! All but the publishing happens on the thread of the client, and may take long without anybody's
//! notice. While exports are held (see [`chain::turn`](crate::chain::turn)) nothing is waited for but
//! their workers' answers. What is published stays: a failure to close the old top is told by the
//! guest's flushes, which fail then.

use std::path::PathBuf;
use std::sync::Arc;

use super::covered::{Covered, Moved};
use super::internal::{Internal, Taken};
use super::overlay_image::{check_fits, local_file, make, overlay_options, settle};
use super::overlays::{Cover, Recorder};
use super::{Engine, on_this_thread};
use crate::chain::turn::Turn;
use crate::error::{Error, Result};
use crate::export::Held;
use crate::graph::{
    Grant, Holder, Node, NodeUser, Request, Rights, Role, State, Transaction, busy,
};
use crate::job::Refused;
use crate::options::check_node_name;
use crate::planted::{Fault, is_planted};
use crate::state::{Gone, record};
use crate::storage::MadeFile;

/// One action of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Puts a node that is there on top of another one.
    Snapshot {
        /// The export or node that is covered.
        node: String,
        /// The image that covers it.
        overlay: String,
    },
    /// Makes an image, or opens one, and puts it on top of a node.
    SnapshotSync(NewOverlay),
    /// Takes a snapshot inside of an image.
    Internal {
        /// The export or node.
        device: String,
        /// The snapshot's name.
        name: String,
    },
    /// Fails.
    Abort,
}

/// An image that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewOverlay {
    /// The export or node that is covered; or else the node.
    pub device: Option<String>,
    /// The node that is covered, by its name.
    pub node_name: Option<String>,
    /// The new image's file.
    pub file: String,
    /// The new node's name.
    pub snapshot_node_name: Option<String>,
    /// The new image's format.
    pub format: Option<String>,
    /// The image is there already.
    pub existing: bool,
}

impl Engine {
    /// Carries out all `actions`, or none.
    ///
    /// # Errors
    /// What stands in the way, in QEMU's words. All is as before then. Or what was covered could not
    /// be made stable: then all is done but for that.
    pub fn transact(&self, actions: &[Action]) -> std::result::Result<(), Refused> {
        let mut change = Change::new(self);
        match change.prepare(actions) {
            Ok(prepared) => {
                drop(change);
                prepared.map_or(Ok(()), |covered| self.close_covered(covered))
            }
            Err(error) => {
                change.take_back();
                Err(Refused(error.to_string()))
            }
        }
    }
}

/// What has been done for a transaction, as long as it can be taken back.
pub(super) struct Change<'e> {
    pub(super) engine: &'e Engine,
    covers: Vec<Cover>,
    /// Images that get snapshots.
    pub(super) internal: Vec<Internal>,
    /// Files and nodes that were made for it.
    files: Vec<MadeFile>,
    nodes: Vec<String>,
    moved: Vec<Moved>,
    /// Keeps jobs from the nodes.
    reserved: Vec<Grant>,
    recorded: Vec<record::Top>,
    /// What was recorded before in the place of each of these.
    replaced: Vec<Gone>,
}

impl<'e> Change<'e> {
    pub(super) fn new(engine: &'e Engine) -> Self {
        Self {
            engine,
            covers: Vec::new(),
            internal: Vec::new(),
            files: Vec::new(),
            nodes: Vec::new(),
            moved: Vec::new(),
            reserved: Vec::new(),
            recorded: Vec::new(),
            replaced: Vec::new(),
        }
    }

    /// Does all of it up to the switch of the chains. What is left is to close the images that have
    /// been covered.
    fn prepare(&mut self, actions: &[Action]) -> Result<Option<Covered>> {
        for action in actions {
            let cover = match action {
                Action::Snapshot { node, overlay } => self.find(node, overlay)?,
                Action::SnapshotSync(new) => self.make(new)?,
                Action::Internal { device, name } => {
                    self.add_internal(device, name)?;
                    continue;
                }
                Action::Abort => {
                    let text = "Transaction aborted using Abort action";
                    return Err(Error::Invalid(text.into()));
                }
            };
            self.covers.push(cover);
        }
        if self.covers.is_empty() && self.internal.is_empty() {
            return Ok(None);
        }
        if !self.covers.is_empty() {
            self.take_grants()?;
            self.flush()?;
            self.record()?;
        }
        // Last, since guests' writes may wait from there on.
        self.prepare_internal()?;
        let (turns, taken) = self.switch()?;
        Ok(Some(Covered {
            taken,
            moved: std::mem::take(&mut self.moved),
            turns,
            recorded: std::mem::take(&mut self.recorded),
        }))
    }

    /// The graph as it is going to be.
    pub(super) fn draft(&self) -> Result<Transaction> {
        let exports = self.engine.exports.list();
        let disks = exports.iter().filter_map(|served| served.export.root());
        let disks: Vec<_> = disks.collect();
        let mut draft = self.engine.graph.transaction();
        for Cover { old, overlay } in &self.covers {
            draft.cover(old, overlay, &disks)?;
        }
        Ok(draft)
    }

    /// The node that a client calls `device`, as the actions so far leave it: for an export, the top
    /// of its disk.
    pub(super) fn device(&self, state: &State, device: &str) -> Option<String> {
        let exports = self.engine.exports.list();
        let export = exports.iter().find(|served| served.options.id == device);
        if let Some(served) = export {
            return state.top_of(&served.export.root()?).map(str::to_owned);
        }
        state.node(device).is_ok().then(|| device.to_owned())
    }

    /// Refuses to cover node `old`, which jobs may not have from here on.
    fn check_old(&mut self, state: &State, old: &str) -> Result<()> {
        let mut next = Some(old);
        // With what it is a filter of: somebody else may know the disk by that name.
        while let Some(name) = next {
            self.reserve(name)?;
            next = state.node(name)?.child(Role::Filtered);
        }
        state.check_covered(old)
    }

    pub(super) fn reserve(&mut self, node: &str) -> Result<()> {
        if self.reserved.iter().any(|held| held.nodes() == [node]) {
            return Ok(());
        }
        let reserved = self.engine.jobs.reserve(&[node.to_owned()], "snapshot");
        let grant = reserved.map_err(|held| Error::Invalid(busy(node, held.kind)))?;
        self.reserved.push(grant);
        Ok(())
    }

    /// Two nodes that are there.
    fn find(&mut self, node: &str, overlay: &str) -> Result<Cover> {
        self.engine.check_no_filter(node).map_err(said)?;
        let draft = self.draft()?;
        let state = draft.state();
        let old = self
            .device(state, node)
            .ok_or_else(|| no_node(node, node))?;
        self.check_old(state, &old)?;
        if self.engine.graph.filter(overlay).is_some() {
            return Err(Error::Invalid("The overlay is already in use".into()));
        }
        if state.node(overlay).is_err() {
            return Err(no_node(overlay, overlay));
        }
        if old == overlay {
            return Err(Error::Invalid("The overlay is already in use".into()));
        }
        self.engine.graph.check_overlay(overlay)?;
        state.check_overlay(overlay)?;
        self.reserve(overlay)?;
        Ok(Cover {
            old,
            overlay: overlay.to_owned(),
        })
    }

    /// A node that is there, and an image that is made or opened.
    fn make(&mut self, new: &NewOverlay) -> Result<Cover> {
        for name in [&new.device, &new.node_name].into_iter().flatten() {
            self.engine.check_no_filter(name).map_err(said)?;
        }
        let draft = self.draft()?;
        let state = draft.state();
        let names = [new.node_name.as_deref(), new.device.as_deref()];
        let found = new
            .device
            .as_deref()
            .and_then(|name| self.device(state, name));
        let node = new.node_name.as_deref();
        let node = node.filter(|name| state.node(name).is_ok());
        let old = found.or_else(|| node.map(str::to_owned)).ok_or_else(|| {
            let [node, device] = names.map(Option::unwrap_or_default);
            no_node(device, node)
        })?;
        self.check_old(state, &old)?;
        if new.node_name.is_some() && new.snapshot_node_name.is_none() {
            return Err(Error::Invalid("New overlay node-name missing".into()));
        }
        if let Some(name) = &new.snapshot_node_name {
            check_node_name(name).map_err(Error::Invalid)?;
        }
        if let Some(name) = &new.snapshot_node_name
            && (state.node(name).is_ok() || self.engine.graph.filter(name).is_some())
        {
            let text = "New overlay node-name already in use";
            return Err(Error::Invalid(text.into()));
        }
        let format = new.format.as_deref().unwrap_or("qcow2");
        let path = local_file(&new.file)?;
        let below = Node::clone(state.node(&old)?);
        if !new.existing {
            self.files.push(make(state, &below, format, &path)?);
        }
        let options = overlay_options(&below, format, &path, new.snapshot_node_name.as_deref())?;
        let graph = &self.engine.graph;
        let overlay = on_this_thread(|reactor| reactor.block_on(graph.open(&options)))?;
        self.nodes.push(overlay.clone());
        graph.check_overlay(&overlay)?;
        self.reserve(&overlay)?;
        Ok(Cover { old, overlay })
    }

    /// Takes what each export needs that gets another image, and opens that to be written.
    fn take_grants(&mut self) -> Result<()> {
        let draft = self.draft()?;
        for served in self.engine.exports.list() {
            let old = served.export.node_name();
            let Some(root) = served.export.root() else {
                continue;
            };
            let Some(top) = draft.state().top_of(&root) else {
                continue;
            };
            let before = self.engine.graph.image_node(&old)?.name;
            let image = draft.state().image_node(top)?;
            if image.name == before {
                continue;
            }
            self.reserve(&before)?;
            check_fits(&served, image)?;
            let writable = served.options.writable;
            let request = |node: &str| {
                let holder = Holder::Export(served.options.id.clone());
                Request::disk(holder, node, writable)
            };
            let graph = &self.engine.graph;
            self.moved.push(Moved {
                grant: None,
                closing: Some(graph.grant(request(&before))?),
                export: served.export.clone(),
                writable,
                old: before,
            });
            let granted = graph.access(request(&image.name));
            let granted = on_this_thread(|reactor| reactor.block_on(granted))?;
            if let Some(moved) = self.moved.last_mut() {
                moved.grant = Some(granted);
            }
        }
        Ok(())
    }

    /// Makes stable what is going to be covered: a disk that cannot be must not be let go of, and
    /// there is less to do afterwards. And the images that come on top, with their places: they are
    /// what is recorded, and may have been made a moment ago by another program.
    fn flush(&self) -> Result<()> {
        for Cover { old, .. } in &self.covers {
            let node = self.engine.graph.image_node(old)?;
            let flushed = node.layer.flush();
            on_this_thread(|reactor| reactor.block_on(flushed))
                .map_err(|error| Error::Invalid(format!("An IO error has occurred: {error}")))?;
        }
        for Cover { overlay, .. } in &self.covers {
            let node = self.engine.graph.image_node(overlay)?;
            let files = [Some(node.filename.clone()), self.data_file_of(&node)?];
            on_this_thread(|reactor| reactor.block_on(settle(&node, files.iter().flatten())))?;
        }
        Ok(())
    }

    fn data_file_of(&self, node: &Node) -> Result<Option<PathBuf>> {
        let data = node.child(Role::DataFile);
        let data = data.map(|name| self.engine.graph.node(name)).transpose()?;
        Ok(data.map(|data| data.filename))
    }

    /// Records what is on top of what from now on.
    fn record(&mut self) -> Result<()> {
        let engine = self.engine;
        let Some(store) = &engine.store else {
            return Ok(());
        };
        let before = self.moved.iter();
        let before = before.map(|moved| (moved.old.clone(), moved.export.id().to_owned()));
        let written = self.moved.iter().filter(|moved| moved.writable);
        let written: Vec<_> = written.map(|moved| moved.old.as_str()).collect();
        let exports = engine.exports.list();
        let disks: Vec<_> = exports.iter().filter_map(|one| one.export.root()).collect();
        let mut draft = engine.graph.transaction();
        let mut tops = Recorder::new(&engine.graph, before.collect(), &written);
        for cover in &self.covers {
            tops.add(draft.state(), cover)?;
            draft.cover(&cover.old, &cover.overlay, &disks)?;
        }
        let tops = tops.made;
        if is_planted(Fault::TopNotRecorded) {
            return Ok(());
        }
        let mut replaced = Vec::new();
        store.change(|state| {
            let covers = self.covers.iter().zip(&tops);
            let replacing = covers.map(|(Cover { overlay, .. }, top)| {
                let is_made = self.nodes.contains(overlay) && top.top.name.is_some();
                state.put_top(top.clone(), is_made)
            });
            replaced = replacing.collect();
        })?;
        self.replaced = replaced;
        self.recorded = tops;
        Ok(())
    }

    /// Switches the chains of all disks at once.
    fn switch(&mut self) -> Result<(Vec<Arc<Turn>>, Vec<Taken>)> {
        // None comes or goes until the chains are stored.
        let runtime = &self.engine.runtime;
        let _changing = match self.internal.is_empty() {
            true => runtime.change(),
            false => runtime.change_soon()?,
        };
        let turning = self.engine.exports.turn();
        let _turning = turning.map_err(|refused| Error::Invalid(refused.to_string()))?;
        // Anew: images have been opened for writing since.
        let mut draft = self.draft()?;
        self.disown_unnamed(&mut draft)?;
        self.check_exports(&draft)?;
        let mut turns = self.turns_in_place()?;
        for Moved { export, old, .. } in &self.moved {
            let Some(root) = export.root() else {
                continue;
            };
            let Some(top) = draft.state().top_of(&root) else {
                continue;
            };
            let images = draft.state().images_above(top, old)?;
            let turn = Turn {
                root,
                images,
                in_place: false,
            };
            turns.push((export.clone(), Arc::new(turn)));
        }
        for Moved { writable, old, .. } in &self.moved {
            if *writable {
                draft.set_closing(old, true)?;
            }
        }
        let held = Held::all(&turns)?;
        let released = match self.covers.is_empty() {
            true => None,
            false => Some(self.engine.graph.commit(draft)?),
        };
        let taken = self.take_effect();
        // From here on there is no way back.
        for moved in &mut self.moved {
            let top = moved.export.node_name();
            match moved.grant.take() {
                Some(grant) if grant.nodes() == [top] => {
                    self.engine.exports.regrant(&moved.export, grant);
                }
                // The one that is for a filter over the image is for the image as well.
                other => drop(other),
            }
        }
        held.switched();
        drop(released);
        self.files.drain(..).for_each(MadeFile::keep);
        // Others may go on with the nodes: what is left to do is under the closing grants.
        self.reserved.clear();
        self.tell();
        Ok((turns.into_iter().map(|(_, turn)| turn).collect(), taken))
    }

    /// Nobody has named the image that was made, and it is there for those who use it: it goes with the
    /// last of them.
    fn disown_unnamed(&self, draft: &mut Transaction) -> Result<()> {
        let unnamed = self.nodes.iter().filter(|name| name.starts_with('#'));
        for name in unnamed {
            if draft.state().is_used(name) {
                draft.disown(name)?;
            }
        }
        Ok(())
    }

    /// Refuses to switch if other guests have, or are about to have, what is covered than those that
    /// have been seen to: they would stay there.
    fn check_exports(&self, draft: &Transaction) -> Result<()> {
        let graph = &self.engine.graph;
        let changed = |id: &str| {
            Error::Invalid(format!(
                "export '{id}' has changed while a snapshot of its disk was taken (try again)"
            ))
        };
        for served in self.engine.exports.list() {
            let Some(root) = served.export.root() else {
                continue;
            };
            let Some(top) = draft.state().top_of(&root) else {
                continue;
            };
            let image = graph.image_node(&served.export.node_name())?.name;
            let mut moved = self.moved.iter();
            let moved = moved.find(|moved| Arc::ptr_eq(&moved.export, &served.export));
            let fits = match moved {
                Some(moved) => moved.old == image,
                None => draft.state().image_node(top)?.name == image,
            };
            if !fits {
                return Err(changed(&served.options.id));
            }
        }
        // One that is being made has its grant first.
        for used in graph.uses() {
            let NodeUser::Holder(Holder::Export(id)) = &used.user else {
                continue;
            };
            let is_moved = self.moved.iter().any(|moved| moved.export.id() == id);
            let image = graph.image_node(&used.node)?.name;
            let mut covers = self.covers.iter();
            if !is_moved
                && used.demand.does.has(Rights::WRITE)
                && covers.any(|cover| {
                    graph
                        .image_node(&cover.old)
                        .is_ok_and(|old| old.name == image)
                })
            {
                return Err(changed(id));
            }
        }
        Ok(())
    }

    fn tell(&self) {
        for Cover { old, overlay } in &self.covers {
            log::info!("node '{overlay}' is on top of node '{old}'");
        }
        if self.engine.store.is_none() {
            for Moved { export, .. } in &self.moved {
                let graph = &self.engine.graph;
                let top = graph.image_node(&export.node_name());
                let file = top.map(|node| node.filename.display().to_string());
                log::warn!(
                    "export '{}': its guest writes '{}' from now on, and nothing records that: the \
                     command line must name it before the next start, or the guest would go back \
                     (with --state it is recorded)",
                    export.id(),
                    file.unwrap_or_default()
                );
            }
        }
    }

    /// Leaves all as it was.
    pub(super) fn take_back(mut self) {
        let internal = self.take_internal_back();
        let engine = self.engine;
        if let Some(store) = &engine.store
            && !self.recorded.is_empty()
        {
            let forgotten = store.happened(|state| {
                for (top, gone) in self.recorded.iter().zip(&self.replaced).rev() {
                    state.take_top_back(top, gone);
                }
            });
            if let Err(error) = forgotten {
                log::error!("a snapshot that was not taken stays recorded for now: {error}");
            }
        }
        let grants = self.moved.into_iter();
        let grants: Vec<_> = grants
            .flat_map(|moved| [moved.grant, moved.closing])
            .chain(internal.into_iter().map(Some))
            .collect();
        let given_back = on_this_thread(|reactor| {
            reactor.block_on(async {
                for grant in grants.into_iter().flatten() {
                    grant.give_back().await?;
                }
                Ok(())
            })
        });
        if let Err(error) = given_back {
            log::error!("a snapshot that was not taken: back to read-only: {error}");
        }
        self.reserved.clear();
        for node in self.nodes.iter().rev() {
            if is_planted(Fault::RefusedLeaves) {
                break;
            }
            if let Err(error) = engine.graph.remove(node) {
                log::error!("node '{node}' of a snapshot that was not taken stays: {error}");
            }
        }
        // Behind the nodes that are in them.
        self.files.clear();
    }
}

fn said(Refused(text): Refused) -> Error {
    Error::Invalid(text)
}

pub(super) fn no_node(device: &str, node: &str) -> Error {
    Error::Invalid(format!(
        "Cannot find device='{device}' nor node-name='{node}'"
    ))
}
