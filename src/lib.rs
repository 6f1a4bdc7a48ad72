//! A vhost-user-blk backend that serves layered disk images.
//!
//! Each floor knows only those under it: [`daemon`] puts together [`export`] (the data path),
//! [`control`] and [`job`] (the control path); under both are [`chain`], [`format`], [`storage`]
//! and [`reactor`]. [`state`] is what outlives the process, [`config`] is the command line, [`ctl`]
//! the control tool; both have [`options`] in common with the control socket.

// Guests, clients and images decide what comes in here: nothing of it may end the process.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable
    )
)]

pub mod chain;
pub mod config;
pub mod control;
pub mod ctl;
pub mod daemon;
pub mod engine;
pub mod error;
pub mod export;
pub mod format;
pub mod grace;
pub mod graph;
pub mod job;
pub mod options;
pub mod planted;
pub mod reactor;
pub mod sched;
pub mod shared_memory;
pub mod state;
pub mod storage;
pub mod sync;
pub mod throttle;
pub mod unix_socket;
