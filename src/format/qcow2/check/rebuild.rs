//! New refcount structures, where those of the image cannot be used.
//!
//! They are written behind the end of the file, and the header is made to name them by one write
//! of a sector: a cut leaves the old ones or the new ones. What the old ones took is free then.

use std::collections::BTreeSet;

use super::super::refcount;
use super::compare::geometry;
use super::counts::CHUNK;
use super::image::Image;
use super::scan::{Scan, reftable_range};
use crate::error::{Error, Result};

/// QEMU's limit on the bytes of a refcount table.
const MAX_TABLE: u64 = 8 << 20;

/// Where the new structures are: the blocks, then the table.
struct Plan {
    /// First cluster.
    start: u64,
    /// Numbers of the blocks that are needed.
    blocks: BTreeSet<u64>,
    /// Clusters of the table.
    table: u64,
}

impl Plan {
    fn end(&self) -> u64 {
        self.start + self.blocks.len() as u64 + self.table
    }
}

/// Writes new refcount structures with the references that `scan` has counted, and makes the
/// header name them.
pub fn run(image: &mut Image<'_>, scan: &mut Scan) -> Result<()> {
    forget_old(image, scan);
    let plan = plan(image, scan)?;
    for cluster in plan.start..plan.end() {
        scan.references.add(cluster, 1);
    }
    scan.end = plan.end();
    let bits = image.header.cluster_bits;
    let mut table = vec![0; (plan.table << bits >> 3) as usize];
    for (place, &index) in plan.blocks.iter().enumerate() {
        let offset = (plan.start + place as u64) << bits;
        let bytes = block(image, scan, index);
        image.write(offset, &bytes);
        if let Some(entry) = table.get_mut(index as usize) {
            *entry = offset;
        }
    }
    let offset = (plan.start + plan.blocks.len() as u64) << bits;
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    image.write(offset, &bytes);
    image.barrier();
    let patch = image.header.with_reftable(offset, plan.table as u32);
    image.write(patch.offset, &patch.bytes);
    image.barrier();
    image.header = image.header.patched(&[patch])?;
    scan.reftable = table;
    Ok(())
}

/// Takes off the references to the old structures.
fn forget_old(image: &Image<'_>, scan: &mut Scan) {
    if let Some((offset, len)) = reftable_range(image)
        && !image.leaves_file(offset, len)
    {
        for cluster in image.clusters_of(offset, len) {
            scan.references.subtract(cluster, 1);
        }
    }
    for &entry in &scan.reftable {
        let counted = image.is_aligned(entry) && image.cluster_of(entry) < image.clusters();
        if entry != 0 && counted {
            scan.references.subtract(image.cluster_of(entry), 1);
        }
    }
}

fn plan(image: &Image<'_>, scan: &Scan) -> Result<Plan> {
    let per_block = geometry(image).per_block();
    let mut plan = Plan {
        start: scan.end,
        blocks: used_blocks(image, scan),
        table: 1,
    };
    // What holds refcounts needs some itself.
    loop {
        let end = plan.end();
        let own = plan.start / per_block..(end - 1) / per_block + 1;
        let table = (end.div_ceil(per_block) * 8).div_ceil(image.cluster_size());
        plan.table = plan.table.max(table);
        plan.blocks.extend(own);
        if plan.table << image.header.cluster_bits > MAX_TABLE {
            return Err(Error::unsupported(
                image.storage.name(),
                "the file is too large for its refcounts to be rebuilt",
            ));
        }
        if plan.end() == end {
            return Ok(plan);
        }
    }
}

/// Numbers of the blocks in which there are references.
fn used_blocks(image: &Image<'_>, scan: &Scan) -> BTreeSet<u64> {
    let per_block = geometry(image).per_block();
    let mut blocks = BTreeSet::new();
    let mut at = 0;
    loop {
        let references = scan.references.next(at);
        let next = references.into_iter().chain(scan.stored.next(at)).min();
        let Some(start) = next.filter(|&start| start < scan.end) else {
            return blocks;
        };
        at = (start / CHUNK + 1) * CHUNK;
        for cluster in start..at.min(scan.end) {
            if value(image, scan, cluster) > 0 {
                blocks.insert(cluster / per_block);
            }
        }
    }
}

/// The refcount that a cluster is to have. Where references may be missing, none is lowered.
fn value(image: &Image<'_>, scan: &Scan, cluster: u64) -> u64 {
    let wanted = scan.wanted(image, cluster);
    if scan.hidden {
        return wanted
            .max(scan.stored.get(cluster))
            .min(geometry(image).max_refcount());
    }
    wanted
}

fn block(image: &Image<'_>, scan: &mut Scan, index: u64) -> Vec<u8> {
    let geometry = geometry(image);
    let mut bytes = vec![0; image.cluster_size() as usize];
    for place in 0..geometry.per_block() {
        let cluster = index * geometry.per_block() + place;
        let value = value(image, scan, cluster);
        if value > 0 {
            refcount::put(&mut bytes, geometry.refcount_order, place as usize, value);
        }
        if value != scan.stored.get(cluster) {
            scan.stored.set(cluster, value);
        }
    }
    bytes
}
