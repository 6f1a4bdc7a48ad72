//! Giving those a cluster of their own that share one with metadata, or with more than a refcount
//! can count.
//!
//! When a damaged entry points at a table, every write through it would destroy the table, and
//! every change of the table shows as data. What the entry reads as is copied behind the end of
//! the file, so that the entry can point there.

use std::collections::{HashMap, HashSet};

use super::super::l2::OFFSET;
use super::compare::geometry;
use super::entries::{self, Target};
use super::image::Image;
use super::scan::{Area, Scan, Uses};
use crate::error::Result;

/// Entries that are moved at a time.
const MAX_MOVES: usize = 65536;
/// Bytes that are moved at a time: they are in memory until the repair is carried out.
const MAX_MOVED: u64 = 256 << 20;

/// Where the entry with a number in the table at an offset is to point.
pub type Moves = HashMap<(u64, u64), u64>;

/// Copies what is shared to the end of the file, and counts the references to the copies.
/// Nothing points at them yet.
pub async fn run(image: &Image<'_>, scan: &mut Scan) -> Result<Moves> {
    let mut moves = Moves::new();
    if scan.overlaps.is_empty() && !scan.overflow {
        return Ok(moves);
    }
    let l1_tables: Vec<_> = scan.l1_tables.iter().map(|(&k, &v)| (k, v)).collect();
    for ((table, count), uses) in l1_tables {
        if scan.is_alone(image, table, count * 8) {
            l2_tables(image, scan, (table, count), uses, &mut moves).await?;
        }
    }
    let l2_tables: Vec<_> = scan.l2_tables.iter().map(|(&k, &v)| (k, v)).collect();
    for (table, uses) in l2_tables {
        let leaves = image.leaves_file(table, image.cluster_size());
        if !leaves && !image.shape.data_file && scan.is_alone(image, table, image.cluster_size()) {
            data(image, scan, table, uses, &mut moves).await?;
        }
    }
    Ok(moves)
}

/// An entry that is to point elsewhere.
struct Move {
    /// Offset of its table, and its number there.
    entry: (u64, u64),
    /// What it points at: offset and length.
    offset: u64,
    len: u64,
    /// How often its table is referred to.
    references: u64,
}

/// L2 tables that are something else as well, or that an L1 table refers to twice.
async fn l2_tables(
    image: &Image<'_>,
    scan: &mut Scan,
    (table, count): (u64, u64),
    uses: Uses,
    moves: &mut Moves,
) -> Result<()> {
    let mut seen = HashSet::new();
    for (index, entry) in image.table(table, count).await?.into_iter().enumerate() {
        let offset = entry & OFFSET;
        let cluster = image.cluster_of(offset);
        let shared = match scan.overlaps.get(&cluster) {
            Some((Area::L2, Area::L2)) => !seen.insert(cluster),
            Some((_, Area::Data)) | None => false,
            Some(_) => true,
        };
        if offset == 0 || !shared || !image.is_aligned(offset) {
            continue;
        }
        let shared = Move {
            entry: (table, index as u64),
            offset,
            len: image.cluster_size(),
            references: uses.total,
        };
        relocate(image, scan, shared, moves).await?;
    }
    Ok(())
}

/// Guest data where metadata is, or more references than a refcount can hold.
async fn data(
    image: &Image<'_>,
    scan: &mut Scan,
    table: u64,
    uses: Uses,
    moves: &mut Moves,
) -> Result<()> {
    let max = geometry(image).max_refcount();
    let bytes = image.read_cluster(table).await?;
    for (index, words) in entries::entries(image.shape, &bytes).enumerate() {
        let entry = entries::judge(image.shape, words, |at, len| image.leaves_file(at, len));
        let (offset, len) = match entry.target {
            Target::Cluster(offset) if image.is_aligned(offset) => (offset, image.cluster_size()),
            Target::Compressed(offset, len) => (offset, len),
            _ => continue,
        };
        let clusters = image.clusters_of(offset, len);
        let crowded = |cluster: &u64| scan.references.get(*cluster) > max;
        let beside = |cluster: &u64| scan.metadata.contains_key(cluster);
        let many = clusters.clone().any(|cluster| crowded(&cluster));
        if !entry.counts || !many && !clusters.clone().any(|cluster| beside(&cluster)) {
            continue;
        }
        if many {
            // So that those stay for which there is room.
            for cluster in clusters {
                scan.references.subtract(cluster, uses.total);
            }
        }
        let shared = Move {
            entry: (table, index as u64),
            offset,
            len,
            references: uses.total,
        };
        relocate(image, scan, shared, moves).await?;
    }
    Ok(())
}

/// Copies the clusters that an entry points at.
async fn relocate(
    image: &Image<'_>,
    scan: &mut Scan,
    shared: Move,
    moves: &mut Moves,
) -> Result<()> {
    let bits = image.header.cluster_bits;
    if moves.len() >= MAX_MOVES || (moves.len() as u64) << bits >= MAX_MOVED {
        return Ok(());
    }
    let clusters = image.clusters_of(shared.offset, shared.len);
    let target = scan.end;
    for cluster in clusters {
        let bytes = image.read_cluster(cluster << bits).await?;
        image.write(scan.end << bits, &bytes);
        scan.references.add(scan.end, shared.references);
        let index = scan.end / geometry(image).per_block();
        scan.end += 1;
        scan.rebuild |= scan.block(image, index).is_none();
    }
    let within = shared.offset % image.cluster_size();
    moves.insert(shared.entry, (target << bits) + within);
    Ok(())
}
