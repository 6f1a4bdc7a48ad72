//! A vhost-user-blk backend that serves layered disk images.
