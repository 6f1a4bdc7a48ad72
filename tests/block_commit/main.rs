//! `block-commit`, from the control socket to the files, under a guest that goes on.
//!
//! What would be caught: a disk that reads differently during or after a commit; bytes of a layer that
//! are not in the base when the job's end is told; an image that still names a layer that is gone; a
//! base that is too short, or whose own end comes to light; events, answers and error texts that are
//! not QEMU's; a job that a killed daemon's next process forgets.

#[path = "../common/mod.rs"]
mod common;

mod active;
mod between;
mod odd;
mod read_only;
mod refused;
mod scene;
