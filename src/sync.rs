//! The primitives that the concurrent core is built on: claims, grace periods, the chain's root,
//! the cache of mapping slices and what is written back of it.
//!
//! They have one door so that a model checker can take their place: the package in `tests/model/package`
//! compiles the same sources with primitives of the checker's, and tries their interleavings.

pub use arc_swap::{ArcSwap, ArcSwapOption, Guard};
pub use async_lock::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard};
pub use event_listener::{Event, EventListener};
pub use parking_lot::Mutex;
pub use std::hint::spin_loop;
pub use std::sync::atomic;
