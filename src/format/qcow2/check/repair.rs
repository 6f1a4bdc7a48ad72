//! Repair, in an order that may be cut at any write.
//!
//! 0. A length of the disk's L1 table that cannot be right is corrected in the header, and the
//!    image looked at anew: what is behind the table is not to be taken for its entries.
//! 1. What shares a cluster with metadata is copied to the end of the file, where nothing points
//!    yet. Refcounts that are too low are raised, or new refcount structures take the place of
//!    unusable ones by one write of the header. Barrier: from here on nothing that is in use can
//!    be taken for free.
//! 2. Entries of L1 and L2 tables that make no sense are replaced. Barrier.
//! 3. Copied flags are set right by the references that were counted. Barrier.
//! 4. Refcounts that are too high are lowered. Barrier.
//! 5. If another check finds no contradiction, the dirty and the corrupt bit are cleared.
//!
//! Refcounts are lowered only when all references are known: where a table cannot be read as
//! what it is to be, what it referred to stays in use.

use super::super::header::{INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY, SECTOR};
use super::super::l2::{COPIED, OFFSET, Words};
use super::super::refcount;
use super::compare::geometry;
use super::entries::{self, L1_RESERVED};
use super::image::Image;
use super::scan::{Area, Scan};
use super::separate::{self, Moves};
use super::{Repair, Summary, rebuild};
use crate::error::Result;

/// What lies beneath one contradiction may show only when that is gone.
const ROUNDS: usize = 4;

/// Repairs what `found` has found in `image`.
pub async fn run(image: Image<'_>, found: Scan, what: Repair) -> Result<Summary> {
    let before = found.summary;
    let storage = image.storage;
    match what {
        Repair::All => all(image, found).await?,
        Repair::Leaks => leaks(&image, found).await?,
    }
    let image = Image::open(storage).await?;
    let after = Scan::run(&image, &mut |_| ()).await?.summary;
    if after.corruptions == 0 {
        clear_bits(&image).await?;
    }
    Ok(Summary {
        corruptions_fixed: before.corruptions.saturating_sub(after.corruptions),
        leaks_fixed: before.leaks.saturating_sub(after.leaks),
        ..after
    })
}

async fn all(mut image: Image<'_>, mut scan: Scan) -> Result<()> {
    let storage = image.storage;
    for _ in 0..ROUNDS {
        if scan.summary.is_clean() {
            return Ok(());
        }
        if let Some(entries) = right_l1_size(&image, &scan) {
            let header = &image.header;
            let patch = header.with_size(header.size, header.l1_offset, entries);
            image.write(patch.offset, &patch.bytes).await?;
            image.barrier().await?;
            image = Image::open(storage).await?;
            scan = Scan::run(&image, &mut |_| ()).await?;
            continue;
        }
        let moves = separate::run(&image, &mut scan).await?;
        for (start, count, times) in std::mem::take(&mut scan.latent) {
            for cluster in start..start + count {
                scan.references.add(cluster, times);
            }
        }
        if scan.rebuild {
            rebuild::run(&mut image, &mut scan).await?;
        } else {
            write_refcounts(&image, &mut scan, u64::max).await?;
        }
        image.barrier().await?;
        let rebuilt = scan.rebuild;
        if mend(&image, &scan, &moves).await? || rebuilt {
            image.barrier().await?;
            image = Image::open(storage).await?;
            scan = Scan::run(&image, &mut |_| ()).await?;
            if scan.damage > 0 {
                continue;
            }
        }
        return settle(&image, &mut scan).await;
    }
    settle(&image, &mut scan).await
}

/// How many entries the disk's L1 table has, if the header says more and they cannot be its own:
/// in clusters that the disk does not need, behind the end of the file or on top of something else.
fn right_l1_size(image: &Image<'_>, scan: &Scan) -> Option<u32> {
    let header = &image.header;
    let needed = image.shape.l1_entries(header.size).max(1);
    let at = |entries: u64| header.l1_offset.saturating_add(entries * 8);
    let rest = at(needed).next_multiple_of(image.cluster_size());
    let len = at(header.l1_size.into()).saturating_sub(rest);
    let wrong = image.leaves_file(rest, len)
        || image
            .clusters_of(rest, len)
            .any(|cluster| scan.overlaps.contains_key(&cluster));
    u32::try_from(needed).ok().filter(|_| wrong)
}

/// Flags and refcounts, when the entries are what they are to be.
async fn settle(image: &Image<'_>, scan: &mut Scan) -> Result<()> {
    if scan.rebuild {
        return Ok(());
    }
    write_refcounts(image, scan, u64::max).await?;
    image.barrier().await?;
    write_flags(image, scan, |_, _| true).await?;
    image.barrier().await?;
    if !scan.hidden {
        write_refcounts(image, scan, |_, wanted| wanted).await?;
        image.barrier().await?;
    }
    Ok(())
}

/// Lowers refcounts, and sets the copied flags of what belongs to the disk alone then.
async fn leaks(image: &Image<'_>, mut scan: Scan) -> Result<()> {
    if scan.summary.leaks == 0 || scan.hidden || scan.rebuild {
        return Ok(());
    }
    write_flags(image, &scan, |stored, wanted| {
        stored > wanted && wanted == 1
    })
    .await?;
    image.barrier().await?;
    write_refcounts(image, &mut scan, u64::min).await?;
    image.barrier().await
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
        image.write_changed(offset, &old, &new).await?;
    }
}

/// Replaces entries that make no sense, and those that are to point elsewhere. Returns whether
/// there were any.
async fn mend(image: &Image<'_>, scan: &Scan, moves: &Moves) -> Result<bool> {
    let cluster = image.cluster_size();
    let mut changed = false;
    for &table in scan.l2_tables.keys() {
        if !scan.writable(image, table) || image.leaves_file(table, cluster) {
            continue;
        }
        changed |= change_l2(image, table, |index, words| {
            let judged = entries::judge(image.shape, words, |at, len| image.leaves_file(at, len));
            let mended = entries::mended(image.shape, words, &judged.faults).unwrap_or(words);
            match moves.get(&(table, index as u64)) {
                Some(&offset) => entries::with_host(image.shape, mended, offset),
                None => mended,
            }
        })
        .await?;
    }
    // Barrier: a table that is moved has been written.
    image.barrier().await?;
    for &(table, count) in scan.l1_tables.keys() {
        if !scan.writable(image, table) {
            continue;
        }
        changed |= change_l1(image, table, count, |index, entry| {
            if let Some(&offset) = moves.get(&(table, index as u64)) {
                return entry & !OFFSET & !L1_RESERVED | offset;
            }
            if image.leaves_file(entry & OFFSET, cluster) {
                // Such a table reads as zeros, and maps nothing.
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
        if uses.active == 0 || leaves || !scan.writable(image, table) {
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
    if !scan.writable(image, table) {
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
    /// Whether a mapping table may be changed in place: it is nothing else, except perhaps what
    /// the guest takes for its data.
    pub fn writable(&self, image: &Image<'_>, table: u64) -> bool {
        let overlap = self.overlaps.get(&image.cluster_of(table));
        image.is_aligned(table) && overlap.is_none_or(|&(_, other)| other == Area::Data)
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
    image.write_changed(table, &old, &new).await?;
    Ok(new != old.to_vec())
}

async fn change_l1(
    image: &Image<'_>,
    table: u64,
    count: u64,
    change: impl Fn(usize, u64) -> u64,
) -> Result<bool> {
    let old = image.table(table, count).await?;
    let new: Vec<u64> = old
        .iter()
        .enumerate()
        .map(|(index, &entry)| if entry == 0 { 0 } else { change(index, entry) })
        .collect();
    if new == old {
        return Ok(false);
    }
    // Whole sectors: behind the table there is nothing in its last cluster.
    let bytes = |words: &[u64]| {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
        bytes
    };
    image
        .write_changed(table, &bytes(&old), &bytes(&new))
        .await?;
    Ok(true)
}

async fn clear_bits(image: &Image<'_>) -> Result<()> {
    let header = &image.header;
    let clean = header.incompatible & !(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT);
    if header.version < 3 || clean == header.incompatible {
        return Ok(());
    }
    let patch = header.with_incompatible(clean);
    image.write(patch.offset, &patch.bytes).await?;
    image.barrier().await
}
