//! What a repair does not believe: lengths of L1 tables, and what snapshots say of themselves.
//!
//! The disk comes first. A table of a snapshot that lies on something else may be where it says, or
//! not, and a repair that takes the wrong one for true destroys the other. A length that is too large
//! is known by what the disk needs, and put right; anything else is left to who knows more.

use super::super::header::{Patch, SECTOR};
use super::super::numbers::put;
use super::super::snapshots::Snapshot;
use super::image::Image;
use super::scan::{Area, Scan};
use crate::error::Result;

/// Where the number of entries of its L1 table is in the entry of a snapshot.
const L1_ENTRIES: u64 = 8;

/// What makes an L1 table end where it can: the disk's, or else a snapshot's.
///
/// A table is too long when it has clusters that its disk does not need, behind the end of the file
/// or on top of something else.
pub async fn shorter_l1(image: &Image<'_>, scan: &Scan) -> Result<Option<Patch>> {
    let header = &image.header;
    let needed = image.shape.l1_entries(header.size).max(1);
    if let Some(entries) = shorter(image, scan, header.l1_offset, header.l1_size, needed) {
        return Ok(Some(header.with_size(
            header.size,
            header.l1_offset,
            entries,
        )));
    }
    for snapshot in &scan.snapshots {
        let (at, now) = (snapshot.l1_offset, snapshot.l1_entries);
        if !image.is_aligned(at) || at >> 56 != 0 || at == header.l1_offset {
            continue;
        }
        let needed = needed_by(image, snapshot).max(1);
        if let Some(entries) = shorter(image, scan, at, now, needed)
            && !overlaps(image, scan, snapshot.at, L1_ENTRIES + 4)
        {
            return length_of(image, snapshot, entries).await.map(Some);
        }
    }
    Ok(None)
}

/// Entries for the disk of a snapshot, and for the state of the VM behind it.
fn needed_by(image: &Image<'_>, snapshot: &Snapshot) -> u64 {
    let disk = image.shape.l1_entries(snapshot.disk_size);
    disk.saturating_add(image.shape.l1_entries(snapshot.vm_state_size))
}

fn shorter(image: &Image<'_>, scan: &Scan, offset: u64, entries: u32, needed: u64) -> Option<u32> {
    let at = |entries: u64| offset.saturating_add(entries.saturating_mul(8));
    let rest = at(needed).next_multiple_of(image.cluster_size());
    let len = at(entries.into()).saturating_sub(rest);
    let wrong = len > 0 && (image.leaves_file(rest, len) || overlaps(image, scan, rest, len));
    u32::try_from(needed).ok().filter(|_| wrong)
}

fn overlaps(image: &Image<'_>, scan: &Scan, offset: u64, len: u64) -> bool {
    let clusters = image.clusters_of(offset, len);
    scan.overlaps.range(clusters).next().is_some()
}

/// The sector of the snapshot table with another length of an L1 table.
async fn length_of(image: &Image<'_>, snapshot: &Snapshot, entries: u32) -> Result<Patch> {
    let field = snapshot.at + L1_ENTRIES;
    let offset = field / SECTOR as u64 * SECTOR as u64;
    // Entries begin at multiples of 8: the field is in one sector.
    let mut bytes = image.read(offset, SECTOR).await?.to_vec();
    put(
        &mut bytes,
        (field - offset) as usize,
        &entries.to_be_bytes(),
    );
    Ok(Patch { offset, bytes })
}

/// Why nothing is to be repaired, if that is so.
pub fn doubt(image: &Image<'_>, scan: &Scan) -> Option<String> {
    let delete = "which is right cannot be told (the disk can be copied with 'qemu-img convert')";
    let faulty = |table: u64| scan.faulty.contains(&table);
    // Data alone may lie there by mistake. With entries that make no sense, the table may as well.
    let suspect = |offset: u64, len: u64, own: Area, faulty: bool| {
        let clusters = image.clusters_of(offset, len);
        scan.overlaps.range(clusters).any(|(_, &(one, other))| {
            let other = if one == own { other } else { one };
            match other {
                Area::Data => faulty,
                Area::L2 => own != Area::L2,
                _ => true,
            }
        })
    };
    let header = &image.header;
    let active = (header.l1_offset, u64::from(header.l1_size));
    for &(table, count) in scan.l1_tables.keys().filter(|&&key| key != active) {
        if suspect(table, count * 8, Area::L1, faulty(table)) {
            return Some(format!(
                "the L1 table of a snapshot, at {table:#x}, lies on something else: {delete}"
            ));
        }
    }
    for (&table, _) in scan.l2_tables.iter().filter(|(_, uses)| uses.active == 0) {
        if suspect(table, image.cluster_size(), Area::L2, faulty(table)) {
            return Some(format!(
                "an L2 table of a snapshot, at {table:#x}, lies on something else: {delete}"
            ));
        }
    }
    let mut overlaps = scan.overlaps.iter();
    let table = overlaps.find_map(|(&cluster, &(one, other))| {
        let (own, other) = match (one, other) {
            (Area::SnapshotTable | Area::Header, other) => (one, other),
            (one, Area::SnapshotTable | Area::Header) => (other, one),
            _ => return None,
        };
        let doubtful = match own {
            // Who writes the header changes what the disk reads there.
            Area::Header => other != Area::Data || scan.rebuild,
            _ => other != Area::Data || scan.faulty_snapshots,
        };
        doubtful.then_some((cluster, own, other))
    });
    table.map(|(cluster, own, other)| {
        format!("cluster {cluster} holds {own}, and {other} as well: {delete}")
    })
}
