//! A vhost-user-blk backend that serves layered disk images.

pub mod config;
pub mod ctl;
