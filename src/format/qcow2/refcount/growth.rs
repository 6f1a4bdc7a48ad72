//! A longer refcount table in place of one that is full.

use super::{Allocator, Kind, Need, put};
use crate::format::qcow2::header::MAX_REFTABLE_BYTES;

const LONGEST: &str = "the refcount table has the 8 MiB that the format allows (copy it into an \
    image with larger clusters, or with fewer refcount_bits)";
const OCCUPIED: &str = "the refcount table cannot become longer, since the image refers to clusters \
    behind its end where that would go (repair it with 'stratactl image check --repair all' when it is \
    not in use)";

/// A longer refcount table that is to be.
#[derive(Debug)]
pub struct Growth {
    /// First cluster of the new blocks; the table follows them.
    pub start: u64,
    /// New refcount blocks.
    pub blocks: u64,
    /// Clusters of the new table.
    pub clusters: u64,
    /// The new table.
    pub table: Vec<u64>,
}

impl Allocator {
    /// Plans a longer table, and keeps others from adding blocks until [`Allocator::adopt`].
    ///
    /// The new table and the blocks that cover it stand together where no block covers anything
    /// yet, so that nothing else changes.
    ///
    /// # Errors
    /// [`Need::Limit`]: the format has no longer one; [`Need::Full`]: there is no room for it.
    pub fn plan_growth(&mut self) -> Result<Growth, Need> {
        let per_cluster = (1u64 << self.geometry.cluster_bits) / 8;
        let start = self.table.len() as u64 * self.geometry.per_block();
        let Some((blocks, clusters)) = self.growth() else {
            return Err(Need::Limit(match self.longer() {
                Some(_) => OCCUPIED,
                None => LONGEST,
            }));
        };
        if start + blocks + clusters > self.limit {
            return Err(Need::Full);
        }
        self.frozen = true;
        let mut table = self.table.clone();
        table.extend((0..blocks).map(|i| (start + i) << self.geometry.cluster_bits));
        table.resize((clusters * per_cluster) as usize, 0);
        Ok(Growth {
            start,
            blocks,
            clusters,
            table,
        })
    }

    /// The blocks and the clusters of a longer table that can be had. `None`: there is none, or
    /// something is where it would go that is left alone.
    pub(super) fn growth(&self) -> Option<(u64, u64)> {
        let start = self.table.len() as u64 * self.geometry.per_block();
        self.longer().filter(|(blocks, clusters)| {
            let mut place = start..start + blocks + clusters;
            !place.any(|cluster| self.is_kept(cluster))
        })
    }

    /// The blocks and the clusters of a longer table: half as long again, if the limit allows it.
    /// `None`: there is no table that has room for the blocks that it needs itself.
    fn longer(&self) -> Option<(u64, u64)> {
        let per_block = self.geometry.per_block();
        let per_cluster = (1u64 << self.geometry.cluster_bits) / 8;
        let most = MAX_REFTABLE_BYTES / 8;
        // More would never be used.
        let useful = most.min(self.limit.div_ceil(per_block));
        let old = self.table.len() as u64;
        let sizes = (1..).map(|blocks| {
            let wanted = (old + old / 2 + blocks + 1).min(useful);
            (blocks, wanted.max(old + blocks).div_ceil(per_cluster))
        });
        let mut possible = sizes.take_while(|(blocks, _)| old + blocks <= most);
        possible.find(|(blocks, clusters)| blocks * per_block >= blocks + clusters)
    }

    /// The refcount blocks of a growth, as they go to the disk.
    #[must_use]
    pub fn growth_blocks(&self, growth: &Growth) -> Vec<u8> {
        let mut bytes = vec![0; (growth.blocks << self.geometry.cluster_bits) as usize];
        for index in 0..growth.blocks + growth.clusters {
            put(&mut bytes, self.geometry.refcount_order, index as usize, 1);
        }
        bytes
    }

    /// Takes the new table, which is stable and named by the header.
    pub fn adopt(&mut self, growth: Growth) {
        let skipped = self.frontier..growth.start;
        self.table = growth.table;
        for index in 0..growth.blocks {
            self.metadata.add(growth.start + index, Kind::RefcountBlock);
        }
        for index in growth.blocks..growth.blocks + growth.clusters {
            self.metadata.add(growth.start + index, Kind::RefcountTable);
        }
        self.frontier = growth.start + growth.blocks + growth.clusters;
        if self.virgin_from != u64::MAX {
            self.virgin_from = self.virgin_from.max(self.frontier);
        }
        self.frozen = false;
        // Between the old end and the new table there may be clusters that a block covers.
        self.look_later(skipped);
    }

    /// Gives up a growth that failed.
    pub fn abandon_growth(&mut self) {
        self.frozen = false;
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a table or a block over clusters that an entry points at, or that hold
    //! metadata though nothing counts them; free clusters that are not found, since the table is
    //! thought to become longer.

    use super::super::{Clusters, Geometry};
    use super::*;

    /// All of the table's two blocks but cluster 70 is in use. The first one is in cluster 1.
    fn full() -> Allocator {
        let geometry = Geometry {
            cluster_bits: 9,
            refcount_order: 6,
        };
        let table = vec![1 << 9, 64 << 9];
        let mut allocator = Allocator::new(geometry, table, Clusters::default(), 128, true);
        for block in 0..2 {
            allocator.insert_slice(block, vec![0; 512].into_boxed_slice());
        }
        for cluster in (0..128).filter(|cluster| *cluster != 70) {
            allocator.set(cluster, 1).unwrap();
        }
        allocator
    }

    #[test]
    fn a_longer_table_goes_nowhere_where_something_is_left_alone() {
        let mut allocator = full();
        allocator.unseen.clear();
        let growth = allocator.plan_growth().unwrap();
        let place = growth.start..growth.start + growth.blocks + growth.clusters;
        assert_eq!(place.start, 128);
        for cluster in place.start - 1..=place.end {
            for metadata in [false, true] {
                let mut allocator = full();
                match metadata {
                    true => allocator.add_metadata(cluster, Kind::L2),
                    false => allocator.withhold(cluster),
                }
                let planned = allocator.plan_growth();
                assert_eq!(planned.is_err(), place.contains(&cluster), "{cluster}");
                if let Err(need) = planned {
                    assert_eq!(need, Need::Limit(OCCUPIED));
                    // What is free is found all the same.
                    assert_eq!(allocator.allocate(1).unwrap().offset >> 9, 70);
                    assert_eq!(allocator.allocate(1), Err(Need::Table));
                }
            }
        }
    }
}
