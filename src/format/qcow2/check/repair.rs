//! Repair, in an order that may be cut at any write.
//!
//! **A repair never changes what the disk reads as.** It is made up as a whole before anything is
//! written ([`plan`](super::plan)), and given up if it cannot tell what is right
//! ([`trust`](super::trust)), if the disk would read differently ([`disk`](super::disk)), or if the
//! image would be no better. A table is written to only where it lies on nothing else.
//!
//! 0. A length of an L1 table that cannot be right is corrected in the header or in the snapshot's
//!    entry, and the image looked at anew: what is behind the table is not to be taken for its
//!    entries.
//! 1. What shares a cluster with metadata is copied to the end of the file, where nothing points
//!    yet. Refcounts that are too low are raised, or new refcount structures take the place of
//!    unusable ones by one write of the header. Barrier: from here on nothing that is in use can
//!    be taken for free.
//! 2. Entries that are to point at such copies are written, and the image is looked at anew: what is
//!    left where the disk read may be written to from then on. When there are none, entries of L1
//!    and L2 tables that make no sense are replaced. Barrier.
//! 3. Copied flags are set right by the references that were counted. Barrier.
//! 4. Refcounts that are too high are lowered. Barrier.
//! 5. If another check finds no contradiction, the dirty and the corrupt bit are cleared.
//!
//! Refcounts are lowered only when all references are known: where a table cannot be read as
//! what it is to be, what it referred to stays in use.

use std::collections::BTreeSet;

use super::super::header::{INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY, SECTOR};
use super::super::l2::{COPIED, OFFSET};
use super::super::numbers::{put, words};
use super::super::refcount;
use super::super::words::Words;
use super::compare::geometry;
use super::entries::{self, L1_RESERVED};
use super::image::Image;
use super::scan::{Scan, nameless_snapshots};
use super::separate::{self, Moves};
use super::{Finding, Repair, Report, Severity, Summary, disk, rebuild, trust};
use crate::error::Result;

/// What lies beneath one contradiction may show only when that is gone.
const ROUNDS: usize = 8;

/// Repairs what `found` has found in `image`, as far as that leaves what the disk reads as alone.
/// Why it does not is told to `report`.
pub async fn run(
    image: Image<'_>,
    found: Scan,
    what: Repair,
    report: &mut Report<'_>,
) -> Result<Summary> {
    let before = found.summary;
    let mut refuse = |what: String| {
        report(Finding {
            severity: Severity::Refusal,
            what,
        });
        Ok(before)
    };
    let original = Image::open(image.storage).await?;
    let image = match what {
        Repair::All => all(image, found).await?,
        Repair::Leaks => Ok(leaks(image, found).await?),
    };
    let image = match image {
        Ok(image) => image.planned().await?,
        Err(doubt) => return refuse(doubt),
    };
    let after = Scan::run(&image, &mut |_| ()).await?.summary;
    if after.corruptions == 0 {
        clear_bits(&image);
    } else if (after.corruptions, after.leaks) >= (before.corruptions, before.leaks) {
        return match what {
            Repair::All => refuse("nothing of what was found can be put right".to_owned()),
            Repair::Leaks => Ok(before),
        };
    }
    if let Some(offset) = disk::difference(&original, &image).await? {
        return refuse(format!(
            "the disk would read differently at {offset:#x} (it can be copied with 'qemu-img \
             convert')"
        ));
    }
    image.carry_out().await?;
    Ok(Summary {
        corruptions_fixed: before.corruptions.saturating_sub(after.corruptions),
        leaks_fixed: before.leaks.saturating_sub(after.leaks),
        ..after
    })
}

/// The image with the plan, or why it cannot be told what is right.
type Planned<'a> = std::result::Result<Image<'a>, String>;

async fn all(mut image: Image<'_>, mut scan: Scan) -> Result<Planned<'_>> {
    for _ in 0..ROUNDS {
        if scan.summary.is_clean() {
            return Ok(Ok(image));
        }
        let patch = match trust::shorter_l1(&image, &scan).await? {
            None if nameless_snapshots(&image.header) => Some(image.header.without_snapshots()),
            patch => patch,
        };
        if let Some(patch) = patch {
            image.write(patch.offset, &patch.bytes);
            image.barrier();
            image = image.planned().await?;
            scan = Scan::run(&image, &mut |_| ()).await?;
            continue;
        }
        if let Some(doubt) = trust::doubt(&image, &scan) {
            return Ok(Err(doubt));
        }
        if image.fixed
            && scan.hidden
            && (scan.rebuild || scan.overflow || !scan.overlaps.is_empty())
        {
            // What has to be added would go behind what is in use, and there may be more.
            return Ok(Err(
                "some tables cannot be read, so that what is free on the device cannot be told \
                 (copy it to a file, and repair that)"
                    .to_owned(),
            ));
        }
        let moves = separate::run(&image, &mut scan).await?;
        for (start, count, times) in std::mem::take(&mut scan.latent) {
            for cluster in start..start + count {
                scan.references.add(cluster, times);
            }
        }
        if scan.rebuild {
            rebuild::run(&mut image, &mut scan)?;
        } else {
            write_refcounts(&image, &mut scan, u64::max).await?;
        }
        image.barrier();
        let rebuilt = scan.rebuild;
        let changed = if moves.is_empty() {
            mend(&image, &scan).await?
        } else {
            repoint(&image, &scan, &moves).await?;
            true
        };
        if changed || rebuilt {
            image.barrier();
            image = image.planned().await?;
            scan = Scan::run(&image, &mut |_| ()).await?;
            if scan.damage > 0 {
                continue;
            }
        }
        settle(&image, &mut scan).await?;
        return Ok(Ok(image));
    }
    settle(&image, &mut scan).await?;
    Ok(Ok(image))
}

/// Flags and refcounts, when the entries are what they are to be.
async fn settle(image: &Image<'_>, scan: &mut Scan) -> Result<()> {
    if scan.rebuild {
        return Ok(());
    }
    write_refcounts(image, scan, u64::max).await?;
    image.barrier();
    write_flags(image, scan, |_, _| true).await?;
    image.barrier();
    if !scan.hidden {
        write_refcounts(image, scan, |_, wanted| wanted).await?;
        image.barrier();
    }
    Ok(())
}

/// Lowers refcounts, and sets the copied flags of what belongs to the disk alone then.
async fn leaks(image: Image<'_>, mut scan: Scan) -> Result<Image<'_>> {
    let doubtful = scan.hidden || scan.rebuild || trust::doubt(&image, &scan).is_some();
    if scan.summary.leaks == 0 || doubtful {
        return Ok(image);
    }
    write_flags(&image, &scan, |stored, wanted| {
        stored > wanted && wanted == 1
    })
    .await?;
    image.barrier();
    write_refcounts(&image, &mut scan, u64::min).await?;
    image.barrier();
    Ok(image)
}

/// Makes the refcount of each cluster what `choose` makes of the stored one and the references.
async fn write_refcounts(
    image: &Image<'_>,
    scan: &mut Scan,
    choose: fn(u64, u64) -> u64,
) -> Result<()> {
    let geometry = geometry(image);
    let per_block = geometry.per_block();
    let mut at = 0;
    loop {
        let references = scan.references.next(at);
        let next = references.into_iter().chain(scan.stored.next(at)).min();
        let Some(start) = next.filter(|&start| start < scan.end) else {
            return Ok(());
        };
        let index = start / per_block;
        at = (index + 1) * per_block;
        let Some(offset) = scan.block(image, index) else {
            continue;
        };
        let old = image.read_cluster(offset).await?;
        let mut new = old.to_vec();
        for place in 0..per_block.min(scan.end - index * per_block) {
            let cluster = index * per_block + place;
            let stored = scan.stored.get(cluster);
            let value = choose(stored, scan.wanted(image, cluster));
            if value != stored {
                refcount::put(&mut new, geometry.refcount_order, place as usize, value);
                scan.stored.set(cluster, value);
            }
        }
        image.write_changed(offset, &old, &new);
    }
}

/// Makes entries point at the copies of what they point at: those of L2 tables first, since a
/// table that is copied itself is copied as it is.
async fn repoint(image: &Image<'_>, scan: &Scan, moves: &Moves) -> Result<()> {
    let tables: BTreeSet<u64> = moves.keys().map(|&(table, _)| table).collect();
    for &table in tables
        .iter()
        .filter(|table| scan.l2_tables.contains_key(table))
    {
        change_l2(image, table, |index, words| {
            let offset = moves.get(&(table, index as u64));
            offset.map_or(words, |&offset| {
                entries::with_host(image.shape, words, offset)
            })
        })
        .await?;
    }
    image.barrier();
    for &(table, count) in scan.l1_tables.keys() {
        if !tables.contains(&table) {
            continue;
        }
        change_l1(image, table, count, |index, entry| {
            let offset = moves.get(&(table, index as u64));
            offset.map_or(entry, |offset| entry & !OFFSET & !L1_RESERVED | offset)
        })
        .await?;
    }
    Ok(())
}

/// Replaces entries that make no sense. Returns whether there were any.
async fn mend(image: &Image<'_>, scan: &Scan) -> Result<bool> {
    let cluster = image.cluster_size();
    let mut changed = false;
    for &table in scan.l2_tables.keys() {
        if !scan.is_alone(image, table, cluster) || image.leaves_file(table, cluster) {
            continue;
        }
        changed |= change_l2(image, table, |_, words| {
            let judged = entries::judge(image.shape, words, |at, len| image.leaves_file(at, len));
            entries::mended(image.shape, words, &judged.faults).unwrap_or(words)
        })
        .await?;
    }
    image.barrier();
    for &(table, count) in scan.l1_tables.keys() {
        if !scan.is_alone(image, table, count * 8) {
            continue;
        }
        changed |= change_l1(image, table, count, |_, entry| {
            if entry & OFFSET == 0 || image.leaves_file(entry & OFFSET, cluster) {
                // No table, or one that reads as zeros: it maps nothing.
                return 0;
            }
            entry & !L1_RESERVED
        })
        .await?;
    }
    Ok(changed)
}

/// Sets the copied flags of the disk's entries by the references, where `which` says so of the
/// refcount and the references.
async fn write_flags(image: &Image<'_>, scan: &Scan, which: fn(u64, u64) -> bool) -> Result<()> {
    let shape = image.shape;
    // The flag that an entry for `offset` is to have; `None`: leave it.
    let flag = |offset: u64| {
        let cluster = image.cluster_of(offset);
        let wanted = scan.wanted(image, cluster);
        which(scan.stored.get(cluster), wanted).then_some(wanted == 1)
    };
    for (&table, uses) in &scan.l2_tables {
        let leaves = image.leaves_file(table, image.cluster_size());
        if uses.active == 0 || leaves || !scan.is_alone(image, table, image.cluster_size()) {
            continue;
        }
        change_l2(image, table, |_, words| {
            let wanted = match entries::flagged(shape, words) {
                Some(_) if shape.data_file => Some(true),
                Some(offset) => flag(offset),
                None => None,
            };
            wanted.map_or(words, |copied| entries::with_copied(shape, words, copied))
        })
        .await?;
    }
    let (table, count) = (image.header.l1_offset, u64::from(image.header.l1_size));
    if !scan.is_alone(image, table, count * 8) {
        return Ok(());
    }
    change_l1(image, table, count, |_, entry| match flag(entry & OFFSET) {
        Some(true) if entry & OFFSET != 0 => entry | COPIED,
        Some(false) => entry & !COPIED,
        _ => entry,
    })
    .await?;
    Ok(())
}

impl Scan {
    /// Whether the table of `len` bytes may be changed in place: it lies on nothing else, which
    /// the disk may read, or a snapshot.
    pub fn is_alone(&self, image: &Image<'_>, table: u64, len: u64) -> bool {
        let mut overlaps = self.overlaps.range(image.clusters_of(table, len));
        image.is_aligned(table) && overlaps.next().is_none()
    }
}

async fn change_l2(
    image: &Image<'_>,
    table: u64,
    change: impl Fn(usize, Words) -> Words,
) -> Result<bool> {
    let old = image.read_cluster(table).await?;
    let mut new = old.to_vec();
    for (index, words) in entries::entries(image.shape, &old).enumerate() {
        let changed = change(index, words);
        if changed != words {
            entries::put(image.shape, &mut new, index, changed);
        }
    }
    image.write_changed(table, &old, &new);
    Ok(new != old.to_vec())
}

async fn change_l1(
    image: &Image<'_>,
    table: u64,
    count: u64,
    change: impl Fn(usize, u64) -> u64,
) -> Result<bool> {
    // Whole sectors. What is behind the table in the last one stays as it is.
    let len = (count as usize * 8).next_multiple_of(SECTOR);
    let old = image.read(table, len).await?;
    let mut new = old.to_vec();
    for (index, entry) in words(&old).take(count as usize).enumerate() {
        if entry != 0 {
            let changed = change(index, entry);
            put(&mut new, index * 8, &changed.to_be_bytes());
        }
    }
    image.write_changed(table, &old, &new);
    Ok(new != old.to_vec())
}

fn clear_bits(image: &Image<'_>) {
    let header = &image.header;
    let clean = header.incompatible & !(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT);
    if header.version < 3 || clean == header.incompatible {
        return;
    }
    let patch = header.with_incompatible(clean);
    image.barrier();
    image.write(patch.offset, &patch.bytes);
    image.barrier();
}
