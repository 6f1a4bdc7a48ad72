//! The consistency check of images, and their repair.
//!
//! The check counts the references to every host cluster (header, L1 tables of the disk and of
//! its snapshots, L2 tables, data, compressed clusters, refcount structures, snapshot table,
//! bitmaps) and compares them with the refcounts in the image. It judges as `qemu-img check`
//! does: too few counted references are *corruptions*, since the next allocation may destroy
//! what is there; too many are *leaks*, which only waste space.
//!
//! * `image`: reading and writing the tables of the image;
//! * `counts`: a number for each host cluster;
//! * `entries`: what is wrong with an L2 entry, and what it should be;
//! * `scan`: counting the references, in memory that grows with what the file really holds;
//! * `compare`: the refcounts and copied flags in the image against them;
//! * `plan`: what a repair is going to write, before any of it reaches the file;
//! * `trust`: what is not believed, and when nothing is repaired at all;
//! * `separate`: giving those a cluster of their own that share one with metadata;
//! * `rebuild`: new refcount structures in place of unusable ones;
//! * `disk`: the proof that the disk reads the same afterwards;
//! * `repair`: all of it in an order that may be cut at any write.

mod compare;
mod counts;
mod disk;
mod entries;
mod image;
mod plan;
mod rebuild;
mod repair;
mod scan;
mod separate;
mod trust;

use std::fmt;

use crate::error::{Error, Result};
use crate::storage::Storage;

use image::Image;
use scan::Scan;

/// What kind of thing was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The image contradicts itself: data is lost, or may be.
    Corruption,
    /// Space is lost.
    Leak,
    /// Nothing is repaired, and why.
    Refusal,
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Of which kind.
    pub severity: Severity,
    /// What, and where.
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.severity {
            Severity::Corruption => write!(f, "ERROR {}", self.what),
            Severity::Leak => write!(f, "Leaked {}", self.what),
            Severity::Refusal => write!(f, "Nothing is repaired: {}", self.what),
        }
    }
}

/// Who is told what is found.
pub type Report<'a> = dyn FnMut(Finding) + 'a;

/// The outcome of a check. The numbers are those of `qemu-img check`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Those that are in the image.
    pub allocated_clusters: u64,
    /// Those that do not follow the one before them; compressed ones never do.
    pub fragmented_clusters: u64,
    /// Compressed ones.
    pub compressed_clusters: u64,
    /// Where the last cluster in use ends, in bytes.
    pub image_end: u64,
    /// Contradictions that are there.
    pub corruptions: u64,
    /// Leaked clusters that are there.
    pub leaks: u64,
    /// Contradictions that a repair has removed.
    pub corruptions_fixed: u64,
    /// Leaked clusters that a repair has freed.
    pub leaks_fixed: u64,
}

impl Summary {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0
    }
}

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Free leaked clusters.
    Leaks,
    /// Everything that can be.
    All,
}

/// Checks the image in `storage`. Nothing is written.
///
/// # Errors
/// When it cannot be read, or its header or its snapshot table cannot be made sense of.
pub async fn check(storage: &dyn Storage, report: &mut Report<'_>) -> Result<Summary> {
    let image = Image::open(storage).await?;
    Ok(Scan::run(&image, report).await?.summary)
}

/// Checks the image in `storage` and repairs what is found. The dirty and the corrupt bit are
/// cleared if no contradiction is left. Killed at any write, it leaves an image that is no worse
/// than before. What the disk reads as stays the same; where that cannot be had, or it cannot be
/// told what is right, nothing is written.
///
/// What is found is told to `report` before anything is written. The summary is that of another
/// check after the repair, with what was fixed.
///
/// # Errors
/// When the image cannot be read or written, or its header or its snapshot table cannot be made
/// sense of.
pub async fn repair(
    storage: &dyn Storage,
    what: Repair,
    report: &mut Report<'_>,
) -> Result<Summary> {
    let image = Image::open(storage).await?;
    let found = Scan::run(&image, report).await?;
    repair::run(image, found, what, report).await
}

/// Repairs an image that a writer with lazy refcounts has left, so that it can be written:
/// refcounts and copied flags alone may be wrong in it.
///
/// # Errors
/// When anything else is wrong, or it cannot be read or written.
pub(super) async fn repair_dirty(storage: &dyn Storage) -> Result<()> {
    let image = Image::open(storage).await?;
    let found = Scan::run(&image, &mut |finding| log::debug!("{finding}")).await?;
    let refused = || {
        Error::unsupported(
            storage.name(),
            "the image was not closed and is damaged besides: it cannot be written (see \
             'stratactl image check', and repair it with 'stratactl image check --repair all')",
        )
    };
    if found.damage > 0 {
        return Err(refused());
    }
    let (corruptions, leaks) = (found.summary.corruptions, found.summary.leaks);
    let report = &mut |finding| log::warn!("{}: {finding}", storage.name());
    let after = repair::run(image, found, Repair::All, report).await?;
    if after.corruptions > 0 {
        return Err(refused());
    }
    log::info!(
        "{}: the image was not closed: {corruptions} refcounts or flags put right, {leaks} leaked \
         clusters freed",
        storage.name()
    );
    Ok(())
}
