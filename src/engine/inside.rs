//! What a change does for snapshots inside of images ([`internal`](super::internal)): in a transaction,
//! and to delete one.

use std::sync::Arc;
use std::time::SystemTime;

use futures_util::future::join_all;

use super::internal::{Internal, Taken, image_of, request};
use super::snapshot::{Change, no_node};
use super::{Engine, on_this_thread};
use crate::chain::turn::Turn;
use crate::error::{Error, Result};
use crate::export::Export;
use crate::format::qcow2::snapshots::Snapshot;
use crate::format::{Format, Qcow2};
use crate::graph::{Grant, Node, Role};
use crate::job::Refused;

impl Change<'_> {
    /// Notes a snapshot with this name, of what a client calls `device`.
    pub(super) fn add_internal(&mut self, device: &str, name: &str) -> Result<()> {
        let image = self.find_image(device)?;
        let refuse = |text: String| Err(Error::Invalid(text));
        if image.read_only {
            return refuse(format!("Device '{device}' is read only"));
        }
        let Some((node, format)) = image.image else {
            return refuse(format!(
                "Block format '{}' used by device '{device}' does not support internal snapshots",
                image.driver
            ));
        };
        if name.is_empty() {
            return refuse("Name is empty".into());
        }
        let mut internal = self.internal.iter_mut();
        let known = internal.position(|other| other.node == node);
        let taken = known.and_then(|at| self.internal.get(at));
        let taken = taken.into_iter().flat_map(|other| &other.names);
        let listed = list(&format)?;
        let mut names = listed.iter().map(|snapshot| &snapshot.name).chain(taken);
        if names.any(|old| old == name) {
            return refuse(format!(
                "Snapshot with name '{name}' already exists on device '{device}'"
            ));
        }
        match known.and_then(|at| self.internal.get_mut(at)) {
            Some(other) => other.names.push(name.to_owned()),
            None => self.internal.push(Internal::new(device, node, name)),
        }
        Ok(())
    }

    /// Does all that takes time: first what guests need not wait for, of all images, then what they
    /// do wait for.
    pub(super) fn prepare_internal(&mut self) -> Result<()> {
        if self.internal.is_empty() {
            return Ok(());
        }
        let date = SystemTime::now();
        let graph = &self.engine.graph;
        let internal = &mut self.internal;
        on_this_thread(|reactor| {
            reactor.block_on(async {
                let opened = internal.iter_mut().map(|one| one.open(graph));
                join_all(opened).await.into_iter().collect::<Result<()>>()?;
                let prepared = internal.iter_mut().map(|one| one.prepare(graph, date));
                join_all(prepared).await.into_iter().collect()
            })
        })
    }

    /// What the exports over the images have to hand over.
    pub(super) fn turns_in_place(&self) -> Result<Vec<(Arc<Export>, Arc<Turn>)>> {
        let turns = self.internal.iter();
        let turns = turns.map(|internal| internal.turns(self.engine));
        let turns: Vec<_> = turns.collect::<Result<_>>()?;
        Ok(turns.into_iter().flatten().collect())
    }

    /// The instant: nothing can fail any more.
    pub(super) fn take_effect(&mut self) -> Vec<Taken> {
        let internal = self.internal.drain(..);
        internal
            .filter_map(|mut internal| internal.take_effect())
            .collect()
    }

    /// Leaves images as they were, and their grants to the caller.
    pub(super) fn take_internal_back(&mut self) -> Vec<Grant> {
        let internal = self.internal.drain(..).rev();
        internal.filter_map(Internal::take_back).collect()
    }

    /// The image that a client calls `device`, which jobs may not have from here on.
    fn find_image(&mut self, device: &str) -> Result<Found> {
        let draft = self.draft()?;
        let state = draft.state();
        let top = self.device(state, device);
        let top = top.ok_or_else(|| no_node(device, device))?;
        if state.is_under_another(&top) {
            return Err(Error::Invalid("Need a root block node".into()));
        }
        let mut node = state.node(&top)?;
        let mut found = Found {
            driver: node.driver_name(),
            read_only: node.fixed_read_only,
            image: None,
        };
        loop {
            self.reserve(&node.name)?;
            if let Format::Qcow2(image) = &node.layer.format
                && node.child(Role::Filtered).is_none()
            {
                found.read_only |= node.fixed_read_only;
                found.image = Some((node.name.clone(), image.clone()));
                return Ok(found);
            }
            // Through what has no snapshots of its own, and no more than one child.
            let child = match below(node) {
                Some(child) => state.node(child)?,
                None => return Ok(found),
            };
            node = child;
        }
    }
}

/// What a device is.
struct Found {
    /// The driver of its topmost node.
    driver: &'static str,
    read_only: bool,
    /// The image's node, and the image. `None`: it is none that has snapshots.
    image: Option<(String, Arc<Qcow2>)>,
}

/// The node whose snapshots are those of a node that has none itself.
fn below(node: &Node) -> Option<&str> {
    match (&node.layer.format, node.child(Role::Filtered)) {
        (_, Some(filtered)) => Some(filtered),
        (Format::Raw(_), None) => node.file(),
        _ => None,
    }
}

/// The snapshots of an image that can have some.
fn list(image: &Qcow2) -> Result<Arc<[Snapshot]>> {
    if image.header().has_data_file() {
        let text = "Failed to get a snapshot list: Operation not supported";
        return Err(Error::Invalid(text.into()));
    }
    Ok(image.snapshots())
}

impl Engine {
    /// Deletes the snapshot of `device` that has this identifier, this name, or both. Returns what was
    /// known of it.
    ///
    /// # Errors
    /// In QEMU's words, where it has some; the image is as before then.
    pub fn delete_internal_snapshot(
        &self,
        device: &str,
        id: Option<&str>,
        name: Option<&str>,
    ) -> std::result::Result<Snapshot, Refused> {
        let mut change = Change::new(self);
        let deleted = self.delete_from(&mut change, device, id, name);
        change.take_back();
        deleted.map_err(|error| Refused(error.to_string()))
    }

    fn delete_from(
        &self,
        change: &mut Change<'_>,
        device: &str,
        id: Option<&str>,
        name: Option<&str>,
    ) -> Result<Snapshot> {
        let found = change.find_image(device)?;
        if id.is_none() && name.is_none() {
            return Err(Error::Invalid("Name or id must be provided".into()));
        }
        let Some((node, image)) = found.image else {
            let text = "Failed to get a snapshot list: Operation not supported";
            return Err(Error::Invalid(text.into()));
        };
        let wanted = |snapshot: &&Snapshot| {
            id.is_none_or(|id| snapshot.id == id) && name.is_none_or(|name| snapshot.name == name)
        };
        let listed = list(&image)?;
        let snapshot = listed.iter().find(wanted).cloned().ok_or_else(|| {
            Error::Invalid(format!(
                "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
                id.unwrap_or("null"),
                name.unwrap_or("null")
            ))
        })?;
        on_this_thread(|reactor| {
            reactor.block_on(async {
                let grant = self.graph.access(request(&node)).await?;
                let image = image_of(&self.graph, &node)?;
                let deleted = image.delete_snapshot(&snapshot).await;
                let is_deleted = deleted.is_ok();
                let finished = match deleted {
                    Ok(prepared) => prepared.take_effect().finish().await,
                    Err(error) => Err(error),
                };
                let given = grant.give_back().await;
                finished.and(given).map_err(|error| match is_deleted {
                    true => Error::Invalid(format!(
                        "Snapshot '{}' was deleted, but not all could be made stable: {error}",
                        snapshot.name
                    )),
                    false => error,
                })
            })
        })?;
        Ok(snapshot)
    }
}
