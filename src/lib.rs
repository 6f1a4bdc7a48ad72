//! A vhost-user-blk backend that serves layered disk images.

pub mod control;
pub mod job;
