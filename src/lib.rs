//! A vhost-user-blk backend that serves layered disk images.
//!
//! Each floor knows only those under it: `export` and `control` at the top, then `job`,
//! [`chain`], [`format`], [`storage`] and [`reactor`].

pub mod chain;
pub mod config;
pub mod ctl;
pub mod error;
pub mod format;
pub mod grace;
pub mod reactor;
pub mod storage;
