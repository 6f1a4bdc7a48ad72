//! The image engine against real images: `qemu-img` makes them and judges them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/bitmaps.rs"]
mod bitmaps;
mod blkdebug;
mod cancelled;
mod check;
mod compressed;
mod damage;
mod damaged;
mod device;
mod differential;
mod faults;
mod features;
mod flips;
mod foreign;
mod full;
mod graph_judge;
mod graph_maker;
mod graphs;
mod headers;
mod matrix;
mod model;
mod nbd;
mod pairs;
mod powercut;
mod purposes;
mod random;
mod refusals;
mod repair;
mod reserve;
mod sizes;
mod snapshot_changes;
mod snapshots;
mod support;
mod views;
mod writers;
