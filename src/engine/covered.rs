//! Images that snapshots have covered, or that have got snapshots: how they are closed.
//!
//! What the guest had begun to write there ends first. Then the image is made stable and given back
//! to its readers, and that is recorded: until then the next start has to see to it.

use std::sync::Arc;

use super::internal::Taken;
use super::{Engine, on_this_thread};
use crate::chain::turn::Turn;
use crate::error::{Error, Result};
use crate::export::Export;
use crate::graph::{Grant, Graph};
use crate::job::Refused;
use crate::planted::{Fault, is_planted};
use crate::state::record;

/// An export whose guest gets another image to write.
pub(super) struct Moved {
    pub(super) export: Arc<Export>,
    pub(super) writable: bool,
    /// The node that it had on top.
    pub(super) old: String,
    /// What it may do with the image that it gets.
    pub(super) grant: Option<Grant>,
    /// What its guest has begun to do with the one that it had.
    pub(super) closing: Option<Grant>,
}

/// What is left to do when the chains have been switched.
pub(super) struct Covered {
    pub(super) moved: Vec<Moved>,
    pub(super) turns: Vec<Arc<Turn>>,
    pub(super) recorded: Vec<record::Top>,
    /// Images that have got snapshots.
    pub(super) taken: Vec<Taken>,
}

fn stays_open(old: &str, error: &Error) -> Error {
    Error::Invalid(format!(
        "The snapshot was taken, and stays: guests write the new image. But node '{old}', which is \
         below it now, could not be made stable and stays open for writing: {error} (guests' \
         flushes fail until it can be; the next start makes it stable first)"
    ))
}

/// Gives node `old` back to its readers, once nobody is writing it any more.
async fn close(graph: &Graph, old: &str, grant: Grant) -> Result<()> {
    let node = graph.image_node(old)?;
    if is_planted(Fault::TopNotFlushed) {
        let mut transaction = graph.transaction();
        transaction.set_closing(&node.name, false)?;
        graph.commit(transaction)?;
        grant.keep();
        return Ok(());
    }
    if let Err(error) = node.layer.flush().await {
        grant.keep();
        return Err(error);
    }
    let mut transaction = graph.transaction();
    transaction.set_closing(&node.name, false)?;
    graph.commit(transaction)?;
    grant.give_back().await
}

impl Engine {
    /// Waits until nothing is on its way any more into images that were covered, makes them stable,
    /// and gives them back to their readers.
    ///
    /// # Errors
    /// When one cannot be made stable. What was covered stays covered.
    pub(super) fn close_covered(&self, covered: Covered) -> std::result::Result<(), Refused> {
        let closed = on_this_thread(|reactor| {
            reactor.block_on(async {
                for turn in &covered.turns {
                    turn.late_writes_end().await;
                }
                let mut result = Ok(());
                for taken in covered.taken {
                    result = result.and(taken.close().await);
                }
                for Moved { old, closing, .. } in covered.moved {
                    if let Some(grant) = closing {
                        let closed = close(&self.graph, &old, grant).await;
                        result = result.and(closed.map_err(|error| stays_open(&old, &error)));
                    }
                }
                result
            })
        });
        let closed = closed.map_err(|error| Refused(error.to_string()));
        closed.inspect_err(|error| log::error!("{error}"))?;
        self.record_closed(&covered.recorded);
        Ok(())
    }

    /// Records that what was covered is stable, by `tops`: the next start need not see to that.
    fn record_closed(&self, tops: &[record::Top]) {
        let Some(store) = self.store.as_ref().filter(|_| !tops.is_empty()) else {
            return;
        };
        let recorded = store.happened(|state| {
            tops.iter().for_each(|top| state.close_covered(top));
        });
        if let Err(error) = recorded {
            log::error!("that images which were covered are stable is not recorded yet: {error}");
        }
    }
}
