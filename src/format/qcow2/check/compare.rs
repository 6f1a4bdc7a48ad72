//! The refcounts and the copied flags in the image, against the references that were counted.

use super::super::l2::{COPIED, OFFSET};
use super::super::refcount::{self, Geometry};
use super::counts::CHUNK;
use super::entries;
use super::image::Image;
use super::scan::{Area, Scan, Walk};
use super::{Finding, Severity};
use crate::error::Result;

/// The offset in an entry of the refcount table.
const BLOCK: u64 = !0x1ff;

/// The sizes that decide where a refcount is.
pub fn geometry(image: &Image<'_>) -> Geometry {
    Geometry {
        cluster_bits: image.header.cluster_bits,
        refcount_order: image.header.refcount_order,
    }
}

impl Scan {
    /// Where the refcount block number `index` is, if it is of any use.
    pub fn block(&self, image: &Image<'_>, index: u64) -> Option<u64> {
        let offset = self.reftable.get(index as usize)? & BLOCK;
        let usable = offset != 0 && image.is_aligned(offset);
        (usable && image.cluster_of(offset) < self.end).then_some(offset)
    }

    /// The references to a cluster, as far as a refcount can say it.
    pub fn wanted(&self, image: &Image<'_>, cluster: u64) -> u64 {
        self.references
            .get(cluster)
            .min(geometry(image).max_refcount())
    }
}

impl Walk<'_, '_, '_> {
    /// Compares what was counted with what the image says.
    pub(super) async fn compare(&mut self) -> Result<()> {
        self.load_refcounts().await?;
        self.compare_refcounts();
        self.compare_l1_flags().await?;
        self.compare_l2_flags().await?;
        self.overlaps();
        Ok(())
    }

    async fn load_refcounts(&mut self) -> Result<()> {
        let geometry = geometry(self.image);
        let per_block = geometry.per_block();
        for index in 0..self.scan.end.div_ceil(per_block) {
            let Some(offset) = self.scan.block(self.image, index) else {
                continue;
            };
            let block = self.image.read_cluster(offset).await?;
            if block.iter().all(|&byte| byte == 0) {
                continue;
            }
            for place in 0..per_block.min(self.scan.end - index * per_block) {
                let value = refcount::get(&block, geometry.refcount_order, place as usize);
                if value != 0 {
                    self.scan.stored.set(index * per_block + place, value);
                }
            }
        }
        Ok(())
    }

    fn compare_refcounts(&mut self) {
        let max = geometry(self.image).max_refcount();
        let mut highest = 0;
        let mut at = 0;
        loop {
            let references = self.scan.references.next(at);
            let next = references
                .into_iter()
                .chain(self.scan.stored.next(at))
                .min();
            let Some(start) = next.filter(|&start| start < self.scan.end) else {
                break;
            };
            at = ((start / CHUNK + 1) * CHUNK).min(self.scan.end);
            for cluster in start..at {
                let stored = self.scan.stored.get(cluster);
                let references = self.scan.references.get(cluster);
                if stored > 0 || references > 0 {
                    highest = cluster;
                }
                if references > max {
                    self.scan.overflow = true;
                    let what = format!(
                        "cluster {cluster} reference={references}, more than a refcount can hold"
                    );
                    self.damage(references - max, what);
                }
                if stored != references.min(max) {
                    self.compare_cluster(cluster, stored, references.min(max));
                }
            }
        }
        self.scan.summary.image_end = (highest + 1) << self.image.header.cluster_bits;
    }

    fn compare_cluster(&mut self, cluster: u64, stored: u64, references: u64) {
        let what = format!("cluster {cluster} refcount={stored} reference={references}");
        if stored > references {
            self.scan.summary.leaks += 1;
            return (self.report)(Finding {
                severity: Severity::Leak,
                what,
            });
        }
        let index = cluster / geometry(self.image).per_block();
        self.scan.rebuild |= self.scan.block(self.image, index).is_none();
        self.corruption(1, what);
    }

    async fn compare_l1_flags(&mut self) -> Result<()> {
        let header = &self.image.header;
        let (table, count) = (header.l1_offset, u64::from(header.l1_size));
        for (index, entry) in self
            .image
            .table(table, count)
            .await?
            .into_iter()
            .enumerate()
        {
            if entry & OFFSET == 0 {
                continue;
            }
            let refcount = self.stored_at(entry & OFFSET);
            if (refcount == 1) != (entry & COPIED != 0) {
                self.corruption(
                    1,
                    format!("copied flag: L1 entry {index}: {entry:#018x} refcount={refcount}"),
                );
            }
        }
        Ok(())
    }

    async fn compare_l2_flags(&mut self) -> Result<()> {
        let (cluster, shape) = (self.image.cluster_size(), self.image.shape);
        let tables: Vec<_> = self.scan.l2_tables.iter().map(|(&k, &v)| (k, v)).collect();
        for (table, uses) in tables {
            if uses.active == 0 || self.image.leaves_file(table, cluster) {
                continue;
            }
            let bytes = self.image.read_cluster(table).await?;
            for words in entries::entries(shape, &bytes) {
                let Some(offset) = entries::flagged(shape, words) else {
                    continue;
                };
                // The clusters of a data file belong to the disk alone.
                let refcount = if shape.data_file {
                    1
                } else {
                    self.stored_at(offset)
                };
                if (refcount == 1) != (words.descriptor & COPIED != 0) {
                    let entry = words.descriptor;
                    self.corruption(
                        uses.active,
                        format!("copied flag: L2 entry {entry:#018x} refcount={refcount}"),
                    );
                }
            }
        }
        Ok(())
    }

    fn stored_at(&self, offset: u64) -> u64 {
        self.scan.stored.get(self.image.cluster_of(offset))
    }

    /// Tells of metadata that shares its cluster. Most often the refcount has told of it already;
    /// where it agrees, this is all that does.
    fn overlaps(&mut self) {
        let overlaps: Vec<_> = self.scan.overlaps.iter().map(|(&k, &v)| (k, v)).collect();
        for (cluster, (one, other)) in overlaps {
            let refcount = [Area::RefcountTable, Area::RefcountBlock];
            self.scan.rebuild |= refcount.contains(&one) || refcount.contains(&other);
            let agree = self.scan.stored.get(cluster) == self.scan.references.get(cluster);
            let times = u64::from(agree);
            self.scan.damage += 1 - times;
            self.damage(
                times,
                format!("cluster {cluster} holds both {one} and {other}"),
            );
        }
    }
}
