//! From reading to writing and back: how images follow the grants for writing them.
//!
//! The writer's locks are taken first, then the image is opened anew, and only then is anything
//! written to it. A file that was opened to be read gets a second descriptor for that, under the
//! locks of the first.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use async_lock::{Mutex as AsyncMutex, MutexGuardArc as AsyncMutexGuardArc};
use parking_lot::Mutex;

use super::opening::text;
use super::{Grant, Graph, Holder, Node, Request, Role, drivers};
use crate::chain::Layer;
use crate::error::{Error, Result};
use crate::format::Format;
use crate::options::Driver;
use crate::storage::{Access, Storage, is_same_path};

/// Turns of those who open or lower the images in a file, by the name of the file's node.
pub(super) type Turns = Mutex<HashMap<String, Weak<AsyncMutex<()>>>>;

impl Graph {
    /// Takes a grant, and makes the images ready that it is to write: takes the writer's locks and
    /// opens them anew.
    ///
    /// # Errors
    /// What does not go with what others do; or a node is read-only, another program uses the image,
    /// or its state forbids it.
    pub async fn access(&self, request: Request) -> Result<Grant> {
        let grant = self.grant(request)?;
        for node in grant.written() {
            if let Err(error) = self.prepare(&node, grant.reopens()).await {
                if let Err(error) = grant.give_back().await {
                    log::error!("{error}");
                }
                return Err(error);
            }
        }
        Ok(grant)
    }

    /// Makes a node's image ready to be written, for as long as the graph is there.
    ///
    /// # Errors
    /// As for [`Graph::access`].
    pub async fn make_writable(&self, name: &str) -> Result<()> {
        let request = Request::disk(Holder::Tool, name, true);
        self.access(request).await.map(Grant::keep)
    }

    /// Waits for its turn with the files that `node` is in, those of disks that it is laid out in
    /// among them. Others' turns with these wait meanwhile, and no others.
    pub(super) async fn turn(&self, node: &Node) -> Result<Vec<AsyncMutexGuardArc<()>>> {
        self.turn_of(std::slice::from_ref(node)).await
    }

    /// As [`turn`](Self::turn), with the files of several nodes.
    pub(super) async fn turn_of(&self, nodes: &[Node]) -> Result<Vec<AsyncMutexGuardArc<()>>> {
        let state = self.state();
        let mut files = Vec::new();
        let below = nodes.iter().flat_map(|node| state.disks_under(node));
        for node in nodes.iter().chain(below.map(|node| &**node)) {
            files.push(state.bottom(node)?);
            if let Some(data) = node.child(Role::DataFile) {
                files.push(state.bottom(state.node(data)?)?);
            }
        }
        drop(state);
        // In one order, so that nobody waits in a circle.
        files.sort();
        files.dedup();
        let mut held = Vec::new();
        for file in files {
            let turn = {
                let mut turns = self.0.turns.lock();
                turns.retain(|_, turn| turn.strong_count() > 0);
                let turn = turns.get(&file).and_then(Weak::upgrade).unwrap_or_default();
                turns.insert(file, Arc::downgrade(&turn));
                turn
            };
            held.push(turn.lock_arc().await);
        }
        Ok(held)
    }

    async fn prepare(&self, name: &str, reopens: bool) -> Result<()> {
        let node = self.image_node(name)?;
        // A filter may be read-only too.
        for node in [&node, &self.node(name)?] {
            if node.fixed_read_only && !(reopens && self.may_reopen(node)) {
                return Err(Error::Invalid("Block node is read-only".into()));
            }
        }
        for disk in self.names_of_disks_in(&node) {
            if self.node(&disk)?.fixed_read_only || self.image_node(&disk)?.fixed_read_only {
                return Err(read_only(&disk));
            }
            // Before the node's own turn: nobody waits for one turn in another. The grant for the
            // node is one for these.
            Box::pin(self.prepare(&disk, false)).await?;
        }
        let _turn = self.turn(&node).await?;
        let node = self.node(&node.name)?;
        if !node.layer.read_only {
            return Ok(());
        }
        let (format, storage) = (drivers::of(&node.options.driver).reopen(self, &node).await)
            .map_err(|error| self.explain(error, &node))?;
        let layer = Layer {
            format,
            storage,
            read_only: false,
            ..(*node.layer).clone()
        };
        self.replace_layer(&node.name, Arc::new(layer))
    }

    /// Whether a job may write a node that is read-only for guests: an image, in a file of which nobody
    /// has said that it is to stay as it is.
    #[must_use]
    pub fn may_reopen(&self, node: &Node) -> bool {
        let file = node.file().filter(|_| node.is_image());
        file.and_then(|file| self.node(file).ok())
            .is_some_and(|file| !file.options.read_only || file.options.auto_read_only)
    }

    /// Gives a node's image back to its readers, unless a grant is for writing it: to be called where a
    /// grant was dropped and not [given back](Grant::give_back).
    ///
    /// # Errors
    /// As for [`Grant::give_back`].
    pub async fn lower_image(&self, name: &str) -> Result<()> {
        self.lower_unwritten(name).await
    }

    /// Gives a node's image back to its readers, unless a grant is for writing it.
    ///
    /// # Errors
    /// When what was written cannot be made stable; it stays writable then.
    pub(super) async fn lower_unwritten(&self, name: &str) -> Result<()> {
        let Ok(node) = self.image_node(name) else {
            // It has gone, and its files with it.
            return Ok(());
        };
        if self.is_written(&node.name) {
            return Ok(());
        }
        let turn = self.turn(&node).await?;
        if !self.is_written(&node.name) && !self.has_open_image(&node.name) {
            self.make_read_only(&node.name).await?;
        }
        drop(turn);
        for disk in self.names_of_disks_in(&node) {
            Box::pin(self.lower_unwritten(&disk)).await?;
        }
        Ok(())
    }

    /// The disks that a node is laid out in. By name: who waits for storage must not hold a state of
    /// the graph meanwhile, since the files of all nodes in it would stay open.
    fn names_of_disks_in(&self, node: &Node) -> Vec<String> {
        let state = self.state();
        let disks = state.disks_in(node).into_iter();
        disks.map(|disk| disk.name.clone()).collect()
    }

    /// Whether an image in the disk of node `name` is open for writing, granted or not: what it has
    /// still to write would not reach a disk that is closed.
    fn has_open_image(&self, name: &str) -> bool {
        let state = self.state();
        let is_in = |image: &Node| {
            state
                .disks_under(image)
                .iter()
                .any(|disk| disk.name == name)
        };
        let mut nodes = state.nodes().iter();
        nodes.any(|node| !node.layer.read_only && !node.is_filter() && is_in(node))
    }

    /// The bytes of a node without a format of its own, open for writing: those of the file at the
    /// bottom, through the same windows.
    ///
    /// # Errors
    /// When it is read-only, or the file cannot be opened to be written.
    pub(super) async fn writable_bytes(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let node = self.node(name)?;
        if node.fixed_read_only {
            return Err(read_only(name));
        }
        self.bytes_to_write(&node).await
    }

    /// As [`writable_bytes`](Self::writable_bytes), of a node that may be written whatever it says.
    pub(super) async fn bytes_to_write(&self, node: &Node) -> Result<Arc<dyn Storage>> {
        if node.layer.storage.writable() {
            return Ok(node.layer.storage.clone());
        }
        match node.file() {
            Some(file) => {
                let bytes = Box::pin(self.writable_bytes(file)).await?;
                // What only passes on another node's bytes has that one's wrapper, which is around
                // them by now.
                let is_wrapper = match &node.options.driver {
                    Driver::Raw(raw) => raw.offset > 0 || raw.size.is_some(),
                    Driver::Blkdebug(_) => true,
                    _ => false,
                };
                let over = is_wrapper.then(|| node.layer.storage.over(&bytes));
                let over = over.flatten();
                // Also of a wrapper that goes on: what it is a part of may be shorter by now.
                let within = drivers::of(&node.options.driver).bytes_in(bytes).await?;
                Ok(over.unwrap_or(within))
            }
            None => node.layer.storage.open_writable().await.map_err(text),
        }
    }

    /// Has the header of a node's image say that it is corrupt, if it has been found so and is still
    /// open to be written.
    ///
    /// # Errors
    /// When there is no such node, or the header cannot be written.
    pub async fn mark_corrupt(&self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        let _turn = self.turn(&node).await?;
        let layer = self.node(name)?.layer;
        match &layer.format {
            Format::Qcow2(image) if !layer.read_only => image.mark_corrupt().await,
            _ => Ok(()),
        }
    }

    /// Names the other node, where it is one of this process that stands in the way.
    fn explain(&self, error: Error, node: &Node) -> Error {
        let Error::Busy(text) = error else {
            return error;
        };
        let state = self.state();
        let own = state.below(vec![node.name.clone()]);
        let is_other = |other: &Node| {
            !own.contains(&other.name)
                && other.file().is_some()
                && other.file() != node.file()
                // Not what is laid out in this one.
                && state.disks_in(other).is_empty()
                && is_same_path(&other.filename, &node.filename)
        };
        match state.nodes().iter().find(|other| is_other(other)) {
            Some(other) => Error::Busy(format!(
                "Could not open '{}': Failed to get \"write\" lock: node '{}' reads it, too",
                node.filename.display(),
                other.name
            )),
            None => Error::Busy(text),
        }
    }

    /// Gives a node's image back to its readers, since nobody writes it any longer.
    ///
    /// # Errors
    /// When what was written cannot be made stable; it stays writable then.
    async fn make_read_only(&self, name: &str) -> Result<()> {
        let node = self.image_node(name)?;
        if node.layer.read_only {
            return Ok(());
        }
        // Before it is closed: a guest that only reads may write, too, by copy-on-read.
        let layer = Layer {
            read_only: true,
            ..(*node.layer).clone()
        };
        self.replace_layer(&node.name, Arc::new(layer))?;
        let closed = match &node.layer.format {
            Format::Raw(_) => node.layer.flush().await,
            Format::Qcow2(qcow2) => qcow2.close().await,
            Format::Qed(_) => Ok(()),
        };
        if let Err(error) = closed {
            self.replace_layer(&node.name, node.layer.clone())?;
            return Err(error);
        }
        if let Format::Qcow2(image) = &node.layer.format {
            image.lower();
            self.lower(&node, image.storage()).await?;
        }
        self.lower(&node, &node.layer.storage).await
    }

    /// Lets other programs read what a node is in, unless another node goes on writing through the
    /// same descriptor: windows of one file share it.
    pub(super) async fn lower(&self, node: &Node, storage: &Arc<dyn Storage>) -> Result<()> {
        if self.writes_beside(node)? {
            return Ok(());
        }
        storage.set_access(reading(node)).await.map_err(text)
    }

    /// Whether another node writes to what `node` is in.
    fn writes_beside(&self, node: &Node) -> Result<bool> {
        let state = self.state();
        let bottom = state.bottom(node)?;
        for other in state.nodes() {
            let writes = !other.layer.read_only && !other.is_filter();
            if writes && other.name != node.name && state.bottom(other)? == bottom {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn read_only(name: &str) -> Error {
    Error::Invalid(format!("Block node '{name}' is read-only"))
}

/// What a node asks of others while it is not written.
fn reading(node: &Node) -> Access {
    match node.options.force_share {
        true => Access::ReadShared,
        false => Access::Read,
    }
}
