//! A longer refcount table in place of one that is full.

use super::{Allocator, Kind, Need, put};
use crate::format::qcow2::header::MAX_REFTABLE_BYTES;

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
            return Err(Need::Limit(
                "the refcount table has the 8 MiB that the format allows (copy it into an image \
                 with larger clusters, or with fewer refcount_bits)",
            ));
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

    /// The blocks and the clusters of a longer table: half as long again, if the limit allows it.
    /// `None`: there is no table that has room for the blocks that it needs itself.
    pub(super) fn growth(&self) -> Option<(u64, u64)> {
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
