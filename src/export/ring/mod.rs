//! Rings: where a driver puts its requests, and a device its answers.
//!
//! - [`split`]: the split ring of virtio 1.0

pub mod split;

pub use split::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, RingAddresses, SplitRing, Table};
