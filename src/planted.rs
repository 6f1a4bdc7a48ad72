//! Faults that tests plant, to see that they are found. There are none in a build without debug
//! assertions: there the question is a constant.
//!
//! `STRATABLK_PLANTED` in the environment of a debug build names the one that is planted.
//! `tests/graph_walk/planted.rs` has the table of them.

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Writes that are on their way into an image that is covered are not handed over to the new one.
    LateWrite,
    /// An image that was covered is not made stable.
    TopNotFlushed,
    /// That an image is on top is recorded nowhere.
    TopNotRecorded,
    /// What a guest writes goes to the base of a commit without the ends that fill no block of 4 KiB.
    TapRounded,
    /// The base of a commit is not made stable by the job: not what was copied, nor before guests are
    /// put on it, nor afterwards.
    BaseNotFlushed,
    /// A header names another backing file before what a stream has copied is stable.
    HeaderEarly,
    /// The journal lacks a change of the mapping now and then.
    JournalDropped,
    /// Discards unmap clusters though there is something below.
    DiscardUnmaps,
    /// A stream keeps its grant, and so the image is kept open to be written.
    GrantKept,
    /// An export that is added has no fence.
    NoFence,
    /// The header of the image over layers that were taken away still names the first of them.
    HeaderStays,
    /// What a refused transaction has opened stays.
    RefusedLeaves,
}

/// Whether the fault is planted.
#[cfg(debug_assertions)]
#[must_use]
pub fn is_planted(fault: Fault) -> bool {
    static PLANTED: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var("STRATABLK_PLANTED").ok());
    PLANTED
        .as_deref()
        .is_some_and(|planted| planted == format!("{fault:?}"))
}

/// Whether the fault is planted.
#[cfg(not(debug_assertions))]
#[inline(always)]
#[must_use]
pub const fn is_planted(_fault: Fault) -> bool {
    false
}
