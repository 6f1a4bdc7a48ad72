//! Room for values that are not whole yet, of all clients together.
//!
//! A client may stop in the middle of a value for as long as it likes, and one value may be large.
//! That there are many clients must not multiply that. Everybody has a little of its own, so that
//! commands of the usual size go through whatever the others hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What each client may hold beside the common room.
const OWN: usize = 64 << 10;

/// The common room, in bytes.
#[derive(Debug)]
pub struct Pool {
    left: AtomicUsize,
}

impl Pool {
    /// Room for `bytes`.
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicUsize::new(bytes),
        })
    }

    /// What is left of it, in bytes.
    pub fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }
}

/// One client's part of a [`Pool`]. It is given back when this is dropped.
#[derive(Debug)]
pub(super) struct Share {
    pool: Arc<Pool>,
    taken: usize,
}

impl Share {
    pub fn of(pool: Arc<Pool>) -> Self {
        Self { pool, taken: 0 }
    }

    /// Takes or gives back what it needs to hold `bytes`. False, and no change, if there is not
    /// enough.
    pub fn set(&mut self, bytes: usize) -> bool {
        let wanted = bytes.saturating_sub(OWN);
        let change = |left: usize| (left + self.taken).checked_sub(wanted);
        let order = Ordering::Relaxed;
        let granted = self.pool.left.fetch_update(order, order, change).is_ok();
        if granted {
            self.taken = wanted;
        }
        granted
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}
