//! Exports whose workers admit no requests, for the moment of a turning switch
//! ([`chain::turn`](crate::chain::turn)).

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Export;
use super::queue::Orders;
use crate::chain::turn::Turn;
use crate::error::{Error, Result};

/// How long workers may take to answer. They wait for no I/O before they do; but they share
/// processors, and guests wait meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// Exports that are held. They go on when this is dropped.
#[must_use = "the exports go on when this is dropped"]
pub struct Held {
    workers: Vec<(Orders, Arc<Turn>)>,
    switched: bool,
}

impl Held {
    /// Holds exports, each for the switch of its own disk, until none of them admits requests and
    /// all have handed over what they have begun.
    ///
    /// # Errors
    /// When a worker does not answer: they go on then.
    pub fn all(exports: &[(Arc<Export>, Arc<Turn>)]) -> Result<Self> {
        let mut held = Self {
            workers: Vec::new(),
            switched: false,
        };
        let mut answers = Vec::new();
        for (export, turn) in exports {
            for orders in &export.orders {
                answers.push((export, orders.hold(turn)));
                held.workers.push((orders.clone(), turn.clone()));
            }
        }
        let deadline = Instant::now() + PATIENCE;
        for (export, answer) in answers {
            // One that has ended has nothing on its way.
            if answer.wait_until(deadline).is_none() {
                return Err(Error::Invalid(format!(
                    "export '{}': a queue does not come to a point between two requests within \
                     {} s (the memory of its guest may not answer); nothing was changed",
                    export.id(),
                    PATIENCE.as_secs()
                )));
            }
        }
        Ok(held)
    }

    /// The chains have been switched: lets the exports go on with the new ones.
    pub fn switched(mut self) {
        self.switched = true;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for (orders, turn) in &self.workers {
            orders.go_on(turn, self.switched);
        }
    }
}
