//! Storage that cannot become longer, as a block device: what is free in it is found to the last
//! cluster before it counts as full.

use super::{Allocator, Need, get};

/// What lies before a cluster, as far as a slice of the refcounts tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// This is the end of what is in use.
    Used(u64),
    /// Nothing is in use from this cluster on.
    Free(u64),
    /// No block covers anything from this cluster on.
    Uncovered(u64),
}

impl Allocator {
    /// Says that the storage has `clusters` whole clusters and cannot become longer.
    pub fn set_limit(&mut self, clusters: u64) {
        self.limit = clusters;
        self.lower_frontier(clusters);
    }

    /// Says that the storage has `clusters` whole clusters by now. False: no more than before.
    pub fn raise_limit(&mut self, clusters: u64) -> bool {
        let more = clusters > self.limit;
        if more {
            self.limit = clusters;
        }
        more
    }

    /// Looks for the end of what is in use, down from cluster `end`, which is above 0.
    ///
    /// # Errors
    /// [`Need::Slice`].
    pub fn look_down(&self, end: u64) -> Result<Look, Need> {
        let (no, per_slice) = (self.slice_of(end - 1), self.geometry.per_slice());
        if self.slice_offset(no).is_none() {
            let per_block = self.geometry.per_block();
            return Ok(Look::Uncovered((end - 1) / per_block * per_block));
        }
        let slice = self.slices.get(&no).ok_or(Need::Slice(no))?;
        let (first, order) = (no * per_slice, self.geometry.refcount_order);
        let used = |cluster: &u64| get(slice, order, (cluster - first) as usize) > 0;
        Ok(match (first..end).rev().find(used) {
            Some(cluster) => Look::Used(cluster + 1),
            None => Look::Free(first),
        })
    }

    /// Finds more that is free, when `free` is empty and nothing is left behind the frontier.
    /// False: there is nothing. An image that can become longer is not searched.
    pub(super) fn find_more(&mut self) -> Result<bool, Need> {
        let bounded = self.limit != u64::MAX;
        if !bounded && self.growth().is_some() {
            return Ok(false);
        }
        while self.free.is_empty() && !self.unseen.is_empty() {
            self.look_for_free()?;
        }
        if self.free.is_empty() && bounded {
            self.open_holes(false);
        }
        Ok(!self.free.is_empty())
    }

    /// Finds everything that is free before the frontier.
    pub(super) fn find_all(&mut self) -> Result<(), Need> {
        while !self.unseen.is_empty() {
            self.look_for_free()?;
        }
        self.open_holes(true);
        Ok(())
    }

    /// Frees the clusters that missing blocks would cover, since nothing refers to them: of `all`, or
    /// of one after the other until something is free.
    fn open_holes(&mut self, all: bool) {
        let per_block = self.geometry.per_block();
        let end = self.frontier.min(self.limit);
        let missing = self.table.iter().zip((0..end).step_by(per_block as usize));
        let missing = missing.filter(|(entry, _)| **entry == 0);
        let starts: Vec<u64> = missing.map(|(_, start)| start).collect();
        for start in starts {
            self.open_hole(start, end.min(start + per_block));
            if !all && !self.free.is_empty() {
                break;
            }
        }
    }

    fn open_hole(&mut self, mut start: u64, end: u64) {
        while start < end {
            let stop = (start..end)
                .find(|&cluster| self.is_kept(cluster))
                .unwrap_or(end);
            if start < stop && !self.is_free(start) {
                self.add_free(start, stop - start);
            }
            start = stop + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a cluster behind the end of a device, handed out or kept as free; one
    //! that nobody uses and nobody gets, between others, in front of the frontier or where there
    //! is no block; one handed out twice; a device that counts as full before it is; an end of what
    //! is in use that is wrong.

    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::{Clusters, Geometry, Kind};
    use super::*;

    /// Clusters that a block covers.
    const BLOCK: u64 = 64;

    fn geometry() -> Geometry {
        Geometry {
            cluster_bits: 9,
            refcount_order: 6,
        }
    }

    /// An allocator on a device of `limit` clusters, with a table for `entries` blocks of which
    /// those in `blocks` are there; of the clusters that they cover those in `used` are in use.
    /// What the disk holds is in the second part.
    fn device(
        limit: u64,
        entries: usize,
        blocks: &BTreeSet<u64>,
        used: &BTreeSet<u64>,
    ) -> (Allocator, BTreeSet<u64>) {
        let mut table = vec![0; entries];
        let mut in_use: BTreeSet<u64> = used
            .iter()
            .copied()
            .filter(|cluster| blocks.contains(&(cluster / BLOCK)) && *cluster < limit)
            .collect();
        // Header and table come first; a block is in the first cluster that it covers.
        in_use.extend([0, 1]);
        for &block in blocks {
            let at = (block * BLOCK).max(2);
            table[block as usize] = at << 9;
            in_use.insert(at);
        }
        let end = limit + 1;
        let mut allocator = Allocator::new(geometry(), table, Clusters::default(), end, false);
        for &block in blocks {
            allocator.insert_slice(block, vec![0; 512].into_boxed_slice());
        }
        for &cluster in &in_use {
            allocator.set(cluster, 1).unwrap();
        }
        allocator.set_limit(limit);
        let mut end = limit;
        while end > 0 {
            match allocator.look_down(end).unwrap() {
                Look::Used(used) => {
                    end = used;
                    break;
                }
                Look::Free(from) | Look::Uncovered(from) => end = from,
            }
        }
        assert_eq!(Some(end - 1), in_use.last().copied(), "the end");
        allocator.lower_frontier(end);
        (allocator, in_use)
    }

    /// Takes what the allocator gives until it is full, in pieces of `sizes` in turn.
    fn fill(allocator: &mut Allocator, sizes: &[u64], in_use: &mut BTreeSet<u64>) {
        let limit = allocator.limit;
        for &size in sizes.iter().cycle() {
            let new = match allocator.allocate(size) {
                Ok(new) => new,
                Err(Need::Table) => {
                    let Ok(growth) = allocator.plan_growth() else {
                        return;
                    };
                    let bytes = allocator.growth_blocks(&growth);
                    let start = growth.start;
                    allocator.adopt(growth);
                    for (index, slice) in (start / BLOCK..).zip(bytes.chunks(512)) {
                        allocator.insert_slice(index, slice.into());
                    }
                    continue;
                }
                Err(need) => {
                    assert_eq!(need, Need::Full);
                    return;
                }
            };
            assert!(!new.fresh, "a device holds what it held");
            for cluster in new.offset >> 9..(new.offset >> 9) + new.clusters {
                assert!(cluster < limit, "cluster {cluster} of {limit}");
                assert!(in_use.insert(cluster), "cluster {cluster} twice");
            }
        }
    }

    /// Clusters below the limit that have no refcount, and are no metadata.
    fn lost(allocator: &Allocator) -> Vec<u64> {
        let unused = |cluster: &u64| {
            allocator.refcount(*cluster).unwrap().unwrap_or(0) == 0
                && allocator.metadata.what(*cluster).is_none()
        };
        (0..allocator.limit).filter(unused).collect()
    }

    proptest! {
        #[test]
        fn a_device_is_used_to_its_last_cluster(
            limit in 3u64..700,
            blocks in prop::collection::btree_set(0u64..11, 0..8),
            used in prop::collection::btree_set(0u64..700, 0..300),
            sizes in prop::collection::vec(1u64..30, 1..5),
            exact in prop::collection::vec(1u64..20, 0..6),
            freed in 0usize..40,
        ) {
            let mut blocks: BTreeSet<u64> =
                blocks.into_iter().filter(|block| block * BLOCK < limit).collect();
            blocks.insert(0);
            let (mut allocator, mut in_use) = device(limit, 12, &blocks, &used);
            for count in exact {
                if let Ok(place) = allocator.allocate_exact(count) {
                    for cluster in place.offset >> 9..(place.offset >> 9) + place.clusters {
                        prop_assert!(cluster < limit && in_use.insert(cluster));
                    }
                }
            }
            fill(&mut allocator, &sizes, &mut in_use);
            let left = lost(&allocator);
            // A last cluster by itself has nothing to be the block for.
            prop_assert!(
                left.is_empty() || left == [limit - 1] && (limit - 1) % BLOCK == 0,
                "{left:?} of {limit} are free"
            );
            // What is freed is used again, and nothing else.
            let some: Vec<u64> = in_use.iter().copied().filter(|at| *at > 2).take(freed).collect();
            for cluster in &some {
                if !allocator.table().contains(&(cluster << 9)) {
                    allocator.release(*cluster).unwrap();
                    in_use.remove(cluster);
                }
            }
            fill(&mut allocator, &sizes, &mut in_use);
            prop_assert_eq!(lost(&allocator), left);
        }
    }

    #[test]
    fn a_table_is_put_between_others_when_nothing_is_left_behind_them() {
        let used: BTreeSet<u64> = (0..200).filter(|at| !(70..90).contains(at)).collect();
        let blocks: BTreeSet<u64> = (0..4).collect();
        let (mut allocator, _) = device(200, 4, &blocks, &used);
        assert_eq!(allocator.allocate_exact(21), Err(Need::Full));
        let place = allocator.allocate_exact(20).unwrap();
        assert_eq!(place.offset >> 9, 70);
        assert_eq!(allocator.allocate(1), Err(Need::Full));
    }

    #[test]
    fn what_a_longer_device_has_more_is_used() {
        let blocks: BTreeSet<u64> = (0..2).collect();
        let (mut allocator, mut in_use) = device(100, 4, &blocks, &BTreeSet::new());
        fill(&mut allocator, &[7], &mut in_use);
        assert!(!allocator.raise_limit(100));
        assert!(allocator.raise_limit(150));
        fill(&mut allocator, &[7], &mut in_use);
        assert!(lost(&allocator).is_empty());
    }

    #[test]
    fn what_is_freed_behind_the_end_is_not_kept() {
        let blocks: BTreeSet<u64> = (0..2).collect();
        let used: BTreeSet<u64> = (0..128).collect();
        let (mut allocator, mut in_use) = device(128, 4, &blocks, &used);
        // The device has become smaller.
        allocator.set_limit(100);
        for cluster in 90..110 {
            allocator.release(cluster).unwrap();
            in_use.remove(&cluster);
        }
        fill(&mut allocator, &[4], &mut in_use);
        assert!(in_use.contains(&99) && !in_use.contains(&100));
    }

    #[test]
    fn metadata_without_a_refcount_stay_where_they_are() {
        let (mut allocator, mut in_use) = device(192, 3, &[0, 2].into(), &[130].into());
        allocator.add_metadata(70, Kind::L2);
        fill(&mut allocator, &[50], &mut in_use);
        assert!(!in_use.contains(&70));
        assert!(lost(&allocator).is_empty());
    }
}
