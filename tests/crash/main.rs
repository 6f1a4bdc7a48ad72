//! What is left when the machine stops, the process is killed or the storage fails: at every
//! single operation, with many in flight.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/bitmaps.rs"]
mod bitmaps;
mod blocks;
mod commits;
mod cuts;
mod data_file;
mod device;
mod disk;
mod faults;
mod freed;
mod held;
mod history;
mod internal;
mod journals;
mod judge;
mod kill;
mod killed;
mod landing;
mod machine;
mod neighbour;
mod punch;
mod qcow2;
mod raw;
mod resize;
mod room;
mod short;
mod slices;
mod slow;
mod states;
mod successor;
#[allow(dead_code)]
#[path = "../engine/support.rs"]
mod support;
mod turns;
mod variants;
mod workload;

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// What is to come out the same with the same seed runs while no other test of the process does.
static TURN: RwLock<()> = RwLock::new(());

/// Until this is dropped, no other test uses an image.
fn alone() -> RwLockWriteGuard<'static, ()> {
    TURN.write()
}

/// Until this is dropped, no other test is [`alone`].
fn together() -> RwLockReadGuard<'static, ()> {
    TURN.read()
}

fn number_from(variable: &str) -> Option<usize> {
    std::env::var(variable).ok()?.parse().ok()
}

/// The seed of this run: `STRATABLK_SEED` repeats one.
fn seed() -> u64 {
    number_from("STRATABLK_SEED").map_or_else(rand::random, |seed| seed as u64)
}
