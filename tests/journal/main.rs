//! The journal: what completed outlives the process.
//!
//! * [`kills`]: processes killed at any step, one after the other, over one image;
//! * [`refusals`]: images that do not go with their journal.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

// Stores are cut in debug builds alone.
#[cfg(debug_assertions)]
mod kills;
#[allow(dead_code)]
#[path = "../engine/model.rs"]
mod model;
mod refusals;
#[allow(dead_code)]
#[path = "../engine/support.rs"]
mod support;
