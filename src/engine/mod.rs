//! The engine: the owner of everything that can change (nodes, exports, jobs), and the operations
//! that change it. The command line, the control socket, the recorded state and tests use the
//! same ones.
//!
//! - [`control_thread`]: publishes all changes
//! - [`exports`]: what guests are served
//! - [`nodes`], [`objects`], [`serving`]: nodes, objects and exports that come and go
//! - [`runtime`]: what the next process knows of that
//! - [`nodes_at_start`], `later`: how it opens the nodes
//! - [`stream`], [`commit`]: stream and commit jobs
//! - `resize`: another size for a disk
//! - `job_filters`: what jobs are called in the graph
//! - [`snapshot`]: new images on top of those that guests write; transactions
//! - `internal`, `inside`: snapshots inside of images
//! - `overlay_image`: how these images are made and opened
//! - `covered`: how the images below are closed
//! - [`overlays`]: what is recorded of them
//! - [`state`]: what is recorded, and how the next process goes on with it
//! - [`neighbours`]: what other processes have recorded of the same images
//! - [`sync_errors`]: failed flushes
//! - [`incidents`]: failed requests, writes past a threshold, corrupt images
//! - [`parts`], [`ending`]: the end

mod backing_file;
pub mod commit;
pub mod control_thread;
mod covered;
mod create;
pub mod ending;
pub mod exports;
mod guests;
mod in_place;
pub mod incidents;
mod inside;
mod internal;
mod job_filters;
mod later;
pub mod neighbours;
mod nodes;
pub mod nodes_at_start;
mod object_changes;
pub mod objects;
mod overlay_image;
pub mod overlays;
pub mod parts;
mod reopen;
mod resize;
pub mod runtime;
pub mod serving;
pub mod sizes;
pub mod snapshot;
pub mod state;
pub mod stream;
pub mod sync_errors;

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::job::{Manager, Refused};
use crate::reactor::Reactor;
use crate::state::Store;

pub use exports::{Exports, Served};
pub use runtime::{Fences, NoFences, Runtime, Setup};
pub use serving::Removal;
use stream::Streams;
pub use sync_errors::SyncError;

/// Everything that can change.
pub struct Engine {
    /// The nodes.
    pub graph: Arc<Graph>,
    /// What guests are served.
    pub exports: Arc<Exports>,
    /// The jobs.
    pub jobs: Arc<Manager>,
    /// Where jobs and failed flushes are recorded, if they are.
    pub store: Option<Arc<Store>>,
    /// Makes the bodies of streams.
    pub streams: Streams,
    /// What operations at run time need.
    pub runtime: Runtime,
    /// Ends the process, soon.
    pub quit: Box<dyn Fn() + Send + Sync>,
}

impl Engine {
    /// The node that a device's name stands for (the id of an export, the name of a node), and the
    /// export that it is the top of.
    #[must_use]
    pub fn find_device(&self, device: &str) -> Option<(String, Option<String>)> {
        let exports = self.exports.list();
        let found = exports.iter().find(|served| served.options.id == device);
        if let Some(Served {
            export, options, ..
        }) = found
        {
            return Some((export.node_name(), Some(options.id.clone())));
        }
        let device = &*self.graph.meant_by(device);
        self.graph.node(device).ok()?;
        let export = exports
            .iter()
            .find(|served| served.export.node_name() == device);
        let id = export.map(|served| served.options.id.clone());
        Some((device.to_owned(), id))
    }

    /// The flushes that have failed and stay failed, in the chain of a node, top first.
    #[must_use]
    pub fn sync_errors(&self, node: &str) -> Vec<SyncError> {
        sync_errors::of(&self.graph, node)
    }

    /// Lets the flushes of a device be tried again, which fail since one of them has failed.
    ///
    /// # Errors
    /// When there is no such device, or none of its flushes has failed.
    pub fn clear_sync_error(&self, device: &str) -> std::result::Result<(), Refused> {
        let Some((node, _)) = self.find_device(device) else {
            return Err(Refused(format!(
                "Cannot find device='{device}' nor node-name='{device}'"
            )));
        };
        sync_errors::clear(&self.graph, &node, self.store.as_deref())
    }
}

/// Runs `work` with a reactor on a thread that has none of its own.
fn on_this_thread<T>(work: impl FnOnce(&Reactor) -> Result<T>) -> Result<T> {
    let had_one = Reactor::current().is_some();
    let reactor =
        Reactor::for_this_thread().map_err(|error| Error::Invalid(format!("starting: {error}")))?;
    let result = work(&reactor);
    if !had_one {
        Reactor::leave_thread();
    }
    result
}
