//! What the front-end tests and the comparison bench share: starting a back-end, driving it as a
//! vhost-user-blk front-end without a guest, talking QMP to it, and asking `qemu-img` for its
//! opinion. The back-end is a parameter, so that everything here also runs against
//! `qemu-storage-daemon`, the reference.

// Every test crate compiles this module and uses its own part of it.
#![allow(dead_code)]

pub mod daemon;
pub mod frontend;
pub mod images;
pub mod memory;
pub mod qmp;
pub mod rng;
pub mod skips;
pub mod slow;
pub mod stamp;
pub mod tracked;

/// The result of a step that may fail for a reason worth reading.
pub type Res<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;
