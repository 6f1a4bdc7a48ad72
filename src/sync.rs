//! The primitives that the concurrent core is built on: claims, grace periods, the chain's root,
//! the cache of mapping slices and what is written back of it.
//!
//! They have one door so that a model checker can take their place: the package in `tests/model/package`
//! compiles the same sources with primitives of the checker's, and tries their interleavings.

use std::sync::OnceLock;

pub use arc_swap::{ArcSwap, ArcSwapOption, Guard};
pub use async_lock::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard};
pub use event_listener::{Event, EventListener};
pub use parking_lot::Mutex;
pub use std::hint::spin_loop;
pub use std::sync::atomic;

/// A value that the whole process shares, made when it is first asked for.
#[derive(Debug)]
pub struct Global<T>(OnceLock<T>);

impl<T: Default> Global<T> {
    /// Nothing yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// The value.
    pub fn get(&'static self) -> &'static T {
        self.0.get_or_init(T::default)
    }
}

impl<T: Default> Default for Global<T> {
    fn default() -> Self {
        Self::new()
    }
}
