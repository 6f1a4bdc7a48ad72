//! Another size for a disk that a front-end is using, with the daemon and files.
//!
//! What would be caught: a front-end that is not told, or is told before it can see the new size; what
//! is new and reads as anything but zeros; a write behind the old end that fails, or is gone after a
//! kill; a request above the new end of a smaller disk that is carried out; a command that fails and
//! leaves something behind; an export that cannot get another size before it has had a client, which
//! crashes qemu-storage-daemon; another process that serves another size.

#[path = "../common/mod.rs"]
mod common;

mod exports;
mod kinds;
mod load;
mod refused;
mod scene;
