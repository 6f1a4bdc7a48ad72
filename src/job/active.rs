//! The commit of a layer that a guest writes: the guest goes on on the base at the end.
//!
//! ```text
//!   tap ─▶ old requests end ─▶ copy ─▶ READY ─▶ complete ─▶ turn ─▶ old requests end ─▶ flush ─▶ over
//!                                        │
//!                                        └─ cancel: the tap goes, and the base keeps its copy
//! ```
//!
//! From the beginning a [tap](crate::chain::tap) gives what guests write to the base as well. What was
//! begun before it was there goes to the guest's image alone, so nothing is copied before that has ended.
//! Then all that the layers hold is copied once, and the base follows by itself however fast a guest
//! writes. As long as the guest's image counts, it is read through it, and the base changes only where the
//! layers hide it: an end at any moment leaves both good.
//!
//! The turn is the tap's: while it is decided, the base is made stable, and the graph puts the base in the
//! place of the layer in all disks. Nobody is held up for that. Requests that began before go to both
//! images until they end; when the last one has, the base is made stable again, and the layers are let
//! go of. Why nothing is lost by it is argued with the tap.

use std::pin::pin;
use std::sync::Arc;

use futures_util::future::{self, Either, LocalBoxFuture};

use super::commit::{CommitSpec, Layers};
use super::context::{ErrorAction, Flow, JobContext};
use super::handle::Completion;
use super::records::{self, Recording};
use super::source::{CopySource, Guests, JobIoError};
use super::{Body, JobError, copier};
use crate::chain::Tap;
use crate::error::{Action, Error, Result};
use crate::format::Format;
use crate::graph::{Grant, Graph, Transaction};
use crate::planted::{Fault, is_planted};
use crate::state::record;
use crate::storage::opener::settled_contents;

/// Those who are served the disk.
pub trait Tenants {
    /// Adds to the changes that put node `to` in the place of `from` what the tenants of that need.
    ///
    /// # Errors
    /// When they cannot be put there.
    fn prepare(&self, transaction: &mut Transaction, from: &str, to: &str) -> Result<()>;

    /// They are there now.
    fn moved(&self, graph: &Graph);
}

/// The body of a commit job whose first layer guests write.
pub struct Active {
    graph: Arc<Graph>,
    layers: Layers,
    /// The node of the first layer's image.
    top: String,
    tap: Arc<Tap>,
    tenants: Box<dyn Tenants>,
    /// Where it is recorded that guests have left the layer.
    recording: Option<Recording>,
    /// To write the base, and that the layers stay as they are, until the end.
    grant: Option<Grant>,
    /// Guests write the base.
    turned: bool,
    /// What is recorded of that.
    moved: Option<record::Moved>,
}

impl Active {
    /// A commit as `spec` wants it, by `grant`: the base can be written to.
    ///
    /// # Errors
    /// When a node does not exist.
    pub fn new(
        graph: Arc<Graph>,
        guests: Box<dyn Guests>,
        spec: &CommitSpec,
        tenants: Box<dyn Tenants>,
        (grant, recording): (Grant, Option<Recording>),
    ) -> Result<Self> {
        let target = graph.root(&spec.base)?;
        let tap = Tap::new(target.clone());
        Ok(Self {
            layers: Layers {
                source: graph.root(spec.top())?,
                target,
                base: spec.base.clone(),
                guests,
                tap: Some(tap.clone()),
            },
            top: graph.image_node(spec.top())?.name,
            tap,
            tenants,
            recording,
            graph,
            grant: Some(grant),
            turned: false,
            moved: None,
        })
    }

    fn transaction(&self) -> Transaction {
        let transaction = self.graph.transaction();
        match &self.grant {
            Some(grant) => transaction.by(grant),
            None => transaction,
        }
    }

    /// Begins to follow what guests write, and waits until nothing is under way that was begun before, or
    /// the job is to end: a guest's request may take for ever.
    async fn follow(&self, context: &JobContext) -> Result<()> {
        self.layers.make_room(&self.graph).await?;
        let mut transaction = self.transaction();
        transaction.set_tap(&self.top, Some(self.tap.clone()))?;
        drop(self.graph.commit(transaction)?);
        let node = self.graph.node(&self.top)?;
        let Format::Qcow2(image) = &node.layer.format else {
            return Err(Error::Invalid(format!(
                "node '{}' has no layers under it",
                self.top
            )));
        };
        for chain in image.users().untapped() {
            // Those in which it is under other layers are not written through.
            let mut ended = pin!(chain.ended());
            loop {
                let changed = context.changed();
                if context.should_stop() {
                    return Ok(());
                }
                match future::select(&mut ended, changed).await {
                    Either::Left(_) => break,
                    Either::Right(_) => context.pause_point().await,
                }
            }
        }
        Ok(())
    }

    /// Copies what is dirty. False: there is something else to see to first.
    async fn clean(&self, context: &JobContext) -> std::result::Result<bool, JobError> {
        while let Some(range) = self.tap.take_dirty(copier::MAX_COPY) {
            let len = range.end - range.start;
            if context.interrupted() || context.limit(len).await == Flow::Interrupted {
                self.tap.mark(range);
                return Ok(false);
            }
            if let Err(error) = self.layers.copy(range.start, len).await {
                self.tap.mark(range);
                log::warn!("{}: {error}", context.name());
                match context.error_action(error.errno, error.write) {
                    ErrorAction::Stop => return Ok(false),
                    // What was not copied would be missing.
                    ErrorAction::Report | ErrorAction::Ignore => {
                        return Err(JobError::from_errno(error.errno));
                    }
                }
            }
        }
        Ok(true)
    }

    /// Fails when the base could not be made stable for a guest.
    fn check(&self) -> std::result::Result<(), JobError> {
        match self.tap.failure() {
            Some(failure) => Err(JobError::from_errno(failure.errno)),
            None => Ok(()),
        }
    }

    /// Is ready, and follows, until a client says how to end.
    async fn stay_ready(&self, context: &JobContext) -> std::result::Result<(), JobError> {
        while !context.should_stop() {
            let (job, tap) = (context.changed(), self.tap.changes());
            self.check()?;
            if context.interrupted() || !self.clean(context).await? {
                context.pause_point().await;
                continue;
            }
            context.set_ready();
            if context.completion().is_some() && self.tap.is_clean() {
                return Ok(());
            }
            future::select(pin!(job), pin!(tap)).await;
        }
        Ok(())
    }

    /// Puts guests on the base.
    async fn turn(&mut self, context: &JobContext) -> std::result::Result<(), JobError> {
        let failed = |error: Error| JobError::new(error.to_string());
        loop {
            self.check()?;
            self.recopy().await?;
            if !self.tap.begin_turn() {
                continue;
            }
            let turned = self.put_in_force().await;
            // Requests that wait for the turn hear of it.
            self.tap.end_turn(matches!(turned, Ok(true)));
            self.turned = turned.map_err(failed)?;
            if self.turned {
                break;
            }
            log::debug!(
                "{}: once more, since the base has failed a write",
                context.name()
            );
        }
        self.tenants.moved(&self.graph);
        if self.recording.is_none() {
            log::warn!(
                "the guest of node '{}' writes node '{}' since the commit, and what '{0}' has is out of \
                 date: name '{1}' in the options of the next start (with --state it is recorded)",
                self.top,
                self.layers.base
            );
        }
        self.tap.unused().await;
        // The guest is on the base, whatever comes of this; a base that cannot be made stable fails its
        // flushes from here on.
        if let Err(error) = self.layers.settle().await {
            log::error!(
                "node '{}', which a guest writes since the commit, cannot be made stable: {error}",
                self.layers.base
            );
        }
        Ok(())
    }

    /// Copies what has become dirty since the job was to end.
    async fn recopy(&self) -> std::result::Result<(), JobError> {
        while let Some(range) = self.tap.take_dirty(copier::MAX_COPY) {
            let copied = self.layers.copy(range.start, range.end - range.start).await;
            copied.map_err(|JobIoError { errno, .. }| JobError::from_errno(errno))?;
        }
        Ok(())
    }

    /// What the turn consists of, while the tap makes those wait whom the base fails. False: it has
    /// failed one.
    ///
    /// Recorded before it is in force, it is in force for the next process if this one is killed. What was
    /// recorded and cannot be taken back comes about, then, even if the base has failed a write: that
    /// fails for its guest, and nothing that has completed is lost.
    async fn put_in_force(&mut self) -> Result<bool> {
        if !is_planted(Fault::BaseNotFlushed) {
            self.layers.target.chain().top().flush().await?;
        }
        let mut transaction = self.transaction().ending();
        transaction.replace(&self.top, &self.layers.base)?;
        transaction.set_tap(&self.top, None)?;
        transaction.open_for_guests(&self.layers.base)?;
        // The layer is there until it has been closed, also if no user has named it.
        transaction.set_top(&self.layers.source, &self.top)?;
        self.tenants
            .prepare(&mut transaction, &self.top, &self.layers.base)?;
        if !self.tap.is_clean() {
            return Ok(false);
        }
        let Some(recording) = &self.recording else {
            drop(self.graph.commit(transaction)?);
            return Ok(true);
        };
        let moved = self.moved()?;
        let gone = recording.moved(&moved)?;
        if !self.tap.is_clean() && recording.not_moved(&moved, &gone).is_ok() {
            return Ok(false);
        }
        let turned = self.graph.commit(transaction);
        if turned.is_err()
            && let Err(error) = recording.not_moved(&moved, &gone)
        {
            log::error!(
                "node '{}' stays the guest's, and it is recorded that node '{}' is: {error} (remove the \
                 record before the next start)",
                self.top,
                self.layers.base
            );
        }
        drop(turned?);
        self.moved = Some(moved);
        Ok(true)
    }

    /// The record of what the turn changes.
    fn moved(&self) -> Result<record::Moved> {
        let (from, to) = (
            self.graph.node(&self.top)?,
            self.graph.image_node(&self.layers.base)?,
        );
        Ok(record::Moved {
            from: records::node(&self.graph, &from)?,
            identity: records::identity(&from),
            to: records::node(&self.graph, &to)?,
            to_identity: records::identity(&to),
            left: None,
        })
    }

    /// Records what is in the image that the guest has left, for the next process to find it so.
    async fn keep_left(&self) -> Result<()> {
        let (Some(recording), Some(moved)) = (&self.recording, &self.moved) else {
            return Ok(());
        };
        let top = self.graph.node(&self.top)?;
        let left = settled_contents(records::files_of(&self.graph, &top)).await;
        let left = left.map_err(|error| {
            Error::io(
                Action::Flush,
                &top.filename.display().to_string(),
                0,
                &error,
            )
        })?;
        recording.left(moved, &left)
    }

    /// Closes the layer that guests have left, and lets go of it.
    async fn close_left(&mut self) {
        let mut closed = self.graph.lower_image(&self.top).await;
        if closed.is_ok() {
            closed = self.keep_left().await;
        }
        if let Err(error) = closed {
            log::error!("node '{}', which was committed: {error}", self.top);
        }
        self.layers.source = self.layers.target.clone();
        let mut transaction = self.graph.transaction();
        transaction.sweep();
        if let Err(error) = self.graph.commit(transaction).map(drop) {
            log::error!("node '{}', which was committed: {error}", self.top);
        }
    }

    /// Lets guests write their own image alone.
    async fn leave(&self) -> Result<()> {
        let mut transaction = self.transaction();
        transaction.set_tap(&self.top, None)?;
        drop(self.graph.commit(transaction)?);
        self.tap.unused().await;
        Ok(())
    }
}

impl Body for Active {
    fn run<'a>(
        &'a mut self,
        context: &'a JobContext,
    ) -> LocalBoxFuture<'a, std::result::Result<(), JobError>> {
        Box::pin(async move {
            let follows = self.follow(context).await;
            follows.map_err(|error| JobError::new(error.to_string()))?;
            if context.should_stop() {
                return Ok(());
            }
            copier::run(&self.layers, context).await?;
            self.stay_ready(context).await
        })
    }

    fn commit<'a>(
        &'a mut self,
        context: &'a JobContext,
    ) -> LocalBoxFuture<'a, std::result::Result<(), JobError>> {
        Box::pin(async move {
            match context.completion() {
                Some(Completion::Result) => self.turn(context).await,
                Some(Completion::Copy) | None => {
                    self.recopy().await?;
                    let left = self.leave().await;
                    left.map_err(|error| JobError::new(error.to_string()))?;
                    // What the base has failed to take since then, or at last, is missing there.
                    self.check()?;
                    if !self.tap.is_clean() {
                        return Err(JobError::from_errno(libc::EIO));
                    }
                    let settled = self.layers.settle().await;
                    settled.map_err(|error| JobError::from_errno(error.errno))
                }
            }
        })
    }

    fn close(&mut self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            // Nothing may be on its way to the base when it is given back.
            if !self.turned
                && let Err(error) = self.leave().await
            {
                log::error!("node '{}': {error}", self.top);
            }
            if let Some(grant) = self.grant.take()
                && let Err(error) = grant.give_back().await
            {
                log::error!("node '{}': back to read-only: {error}", self.layers.base);
            }
            if self.turned {
                self.close_left().await;
            } else if let Err(error) = self.graph.lower_image(&self.top).await {
                log::error!("node '{}': back to read-only: {error}", self.top);
            }
        })
    }
}
