//! What the fuzz targets do with their input. `docs/testing.md` says how to run them.
//!
//! The same functions replay the corpus in `tests/fuzz_replay.rs`, without nightly and without
//! libFuzzer: so they are here, and the targets call them.

pub mod check;
pub mod image;
pub mod inflight;
pub mod journal;
pub mod options;
pub mod read;
pub mod recipe;
pub mod references;
pub mod seeds;
pub mod storage;
pub mod write;

pub use check::qcow2_check;
pub use inflight::inflight;
pub use journal::qcow2_journal;
pub use options::options;
pub use read::{qcow2_read, qed};
pub use write::{qcow2_file, qcow2_write};
