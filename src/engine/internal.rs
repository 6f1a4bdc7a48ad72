//! Internal snapshots: taken of images that guests write, alone or in a transaction, and deleted.
//!
//! ```text
//!   find ─▶ grants, locks ─▶ new tables, header ─▶ hold ─▶ in force ─▶ go on ─▶ old tables freed ─▶ answer
//!   └───────────── an error takes all of it back ───────┘
//! ```
//!
//! The image does what there is to do ([`format::qcow2::snapshots`](crate::format::qcow2::snapshots)).
//! The exports over it are held for the instant alone, while nothing is waited for but their workers'
//! answers.

use std::sync::Arc;
use std::time::SystemTime;

use super::{Engine, on_this_thread};
use crate::chain::turn::Turn;
use crate::error::{Error, Result};
use crate::export::Export;
use crate::format::qcow2::snapshots::change::{Prepared, Rest};
use crate::format::{Format, Qcow2};
use crate::graph::{Demand, Grant, Graph, Holder, NodeUser, Request, Rights, State};

/// An image that gets snapshots.
pub(super) struct Internal {
    /// As the client calls it.
    device: String,
    /// The image's node.
    pub(super) node: String,
    /// The snapshots' names.
    pub(super) names: Vec<String>,
    grant: Option<Grant>,
    prepared: Option<Prepared>,
}

/// An image that has got snapshots.
pub(super) struct Taken {
    device: String,
    image: Arc<Qcow2>,
    grant: Option<Grant>,
    rest: Rest,
}

impl Internal {
    /// A snapshot of the image of `node`, which a client calls `device`.
    pub(super) fn new(device: &str, node: String, name: &str) -> Self {
        Self {
            device: device.to_owned(),
            node,
            names: vec![name.to_owned()],
            grant: None,
            prepared: None,
        }
    }

    /// Leaves the image as it was, and the grant to the caller.
    pub(super) fn take_back(self) -> Option<Grant> {
        if let Some(prepared) = self.prepared {
            let taken_back = on_this_thread(|reactor| {
                reactor.block_on(prepared.take_back());
                Ok(())
            });
            if let Err(error) = taken_back {
                log::error!("a snapshot that was not taken: {error}");
            }
        }
        self.grant
    }

    /// Opens the image to be written, and makes stable what there is.
    pub(super) async fn open(&mut self, graph: &Graph) -> Result<()> {
        self.grant = Some(graph.access(request(&self.node)).await?);
        let image = image_of(graph, &self.node)?;
        image.flush().await.map_err(|error| self.failed(&error))
    }

    /// Does what guests that allocate wait for, up to the instant.
    pub(super) async fn prepare(&mut self, graph: &Graph, date: SystemTime) -> Result<()> {
        let image = image_of(graph, &self.node)?;
        let prepared = image.take_snapshots(&self.names, date).await;
        self.prepared = Some(prepared.map_err(|error| self.failed(&error))?);
        Ok(())
    }

    fn failed(&self, error: &Error) -> Error {
        Error::Invalid(format!(
            "Failed to create snapshot '{}' on device '{}': {error}",
            self.names.join("', '"),
            self.device
        ))
    }

    /// What each export has to hand over whose disk the image is a part of.
    pub(super) fn turns(&self, engine: &Engine) -> Result<Vec<(Arc<Export>, Arc<Turn>)>> {
        let Some(prepared) = &self.prepared else {
            return Ok(Vec::new());
        };
        let image = prepared.image();
        // Whoever gives a node another image has a grant that does not go with ours.
        if !Arc::ptr_eq(image, &image_of(&engine.graph, &self.node)?) {
            return Err(Error::Invalid(format!(
                "node '{}' has changed while its snapshot was taken (try again)",
                self.node
            )));
        }
        let state = engine.graph.state();
        let mut turns = Vec::new();
        self.check_exports(engine, &state)?;
        for served in engine.exports.list() {
            let Some(root) = served.export.root() else {
                continue;
            };
            let top = state.top_of(&root);
            if !top.is_some_and(|top| state.is_under(&self.node, top)) {
                continue;
            }
            // What is not on top is written by tasks alone.
            let chain = root.chain();
            let is_top =
                matches!(&chain.top().format, Format::Qcow2(top) if Arc::ptr_eq(top, image));
            let turn = Turn {
                root,
                images: is_top.then(|| image.clone()).into_iter().collect(),
                in_place: true,
            };
            turns.push((served.export.clone(), Arc::new(turn)));
        }
        Ok(turns)
    }

    /// Refuses to go on if an export is about to write the image that nobody would hold. One that is
    /// being made has its grant first.
    fn check_exports(&self, engine: &Engine, state: &State) -> Result<()> {
        let listed = engine.exports.list();
        for used in engine.graph.uses() {
            let NodeUser::Holder(Holder::Export(id)) = &used.user else {
                continue;
            };
            if used.demand.does.has(Rights::WRITE)
                && state.is_under(&self.node, &used.node)
                && !listed.iter().any(|served| served.options.id == *id)
            {
                return Err(Error::Invalid(format!(
                    "export '{id}' has changed while a snapshot of its disk was taken (try again)"
                )));
            }
        }
        Ok(())
    }

    pub(super) fn take_effect(&mut self) -> Option<Taken> {
        let prepared = self.prepared.take()?;
        Some(Taken {
            device: self.device.clone(),
            image: prepared.image().clone(),
            grant: self.grant.take(),
            rest: prepared.take_effect(),
        })
    }
}

impl Taken {
    /// Waits for writes in place that are on their way, makes everything stable, and gives back what is
    /// in use no longer.
    pub(super) async fn close(self) -> Result<()> {
        self.image.late().those_there_end().await;
        let finished = self.rest.finish().await;
        let given = match self.grant {
            Some(grant) => grant.give_back().await,
            None => Ok(()),
        };
        finished.and(given).map_err(|error| {
            Error::Invalid(format!(
                "The snapshot of device '{}' was taken, and stays; but what had been written until \
                 then could not be made stable: {error}",
                self.device
            ))
        })
    }
}

/// The image of a node.
pub(super) fn image_of(graph: &Graph, node: &str) -> Result<Arc<Qcow2>> {
    match &graph.node(node)?.layer.format {
        Format::Qcow2(image) => Ok(image.clone()),
        Format::Raw(_) | Format::Qed(_) => Err(Error::Invalid(format!(
            "node '{node}' has no internal snapshots any more"
        ))),
    }
}

/// To change the tables of an image, whose bytes read the same before and after.
pub(super) fn request(node: &str) -> Request {
    let demand = Demand {
        does: Rights::READ | Rights::WRITE_UNCHANGED | Rights::OPEN,
        tolerates: Rights::READ | Rights::WRITE | Rights::WRITE_UNCHANGED,
    };
    Request::new(Holder::Tool).with(node, "root", demand)
}
