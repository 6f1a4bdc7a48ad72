//! Contiguous clusters for a table.

use super::{Allocation, Allocator, KEPT_CLEAN, Need};

impl Allocator {
    /// Allocates exactly `count` contiguous clusters, behind everything else if there is room.
    /// Refcount blocks that are lacking there are made in front of them, so that none comes to lie
    /// in their midst.
    ///
    /// # Errors
    /// What must be done first; nothing has been allocated then.
    pub fn allocate_exact(&mut self, count: u64) -> Result<Allocation, Need> {
        match self.exact_behind(count) {
            Err(need @ (Need::Full | Need::Table)) => self.exact_within(count)?.ok_or(need),
            other => other,
        }
    }

    fn exact_behind(&mut self, count: u64) -> Result<Allocation, Need> {
        loop {
            let start = self.frontier;
            match self.exact_at(start, self.limit, count)? {
                Ok(place) => {
                    self.frontier = (place.offset >> self.geometry.cluster_bits) + count;
                    return Ok(place);
                }
                Err(cluster) => {
                    self.look_later(start..cluster);
                    self.frontier = cluster + 1;
                }
            }
        }
    }

    /// Looks for a place among what is free before the frontier, where there is none behind it.
    /// A table over more slices than are sure to be in memory together is not looked for.
    fn exact_within(&mut self, count: u64) -> Result<Option<Allocation>, Need> {
        let slices = count / self.geometry.per_slice() + 2;
        if self.limit == u64::MAX || slices > KEPT_CLEAN as u64 {
            return Ok(None);
        }
        self.find_all()?;
        let mut from = 0;
        while let Some((&start, &len)) = self.free.range(from..).find(|(_, len)| **len >= count) {
            match self.exact_at(start, start + len, count) {
                Ok(Ok(place)) => {
                    let end = (place.offset >> self.geometry.cluster_bits) + count;
                    self.remove_free(start, end - start);
                    return Ok(Some(place));
                }
                Ok(Err(cluster)) => {
                    log::error!("cluster {cluster} was thought free but is not");
                    self.remove_free(start, cluster + 1 - start);
                    self.look_later(start..cluster);
                    from = cluster + 1;
                }
                Err(Need::Full) => from = start + len,
                Err(need) => return Err(need),
            }
        }
        Ok(None)
    }

    /// Allocates `count` clusters in `[start, end)`, as near to `start` as their blocks allow.
    /// `Err` within: this cluster is in use.
    fn exact_at(
        &mut self,
        start: u64,
        end: u64,
        count: u64,
    ) -> Result<Result<Allocation, u64>, Need> {
        if end.saturating_sub(start) < count {
            return Err(Need::Full);
        }
        let missing = self.missing_blocks(start, count)?;
        let first = start + missing.len() as u64;
        if end.saturating_sub(first) < count {
            return Err(Need::Full);
        }
        if let Some(cluster) = self.first_in_use(start, first + count)? {
            return Ok(Err(cluster));
        }
        for (cluster, &index) in (start..).zip(&missing) {
            // They are written whole.
            self.place_block(index, cluster, false);
        }
        self.set_run(start..first + count, 1)?;
        // Both in one, since what is behind the first is fresh if that is.
        let all = self.allocation(start, first + count - start);
        Ok(Ok(Allocation {
            offset: first << self.geometry.cluster_bits,
            clusters: count,
            fresh: all.fresh,
        }))
    }

    /// The table's indices that lack a block if `count` clusters, and those blocks, begin at
    /// `start`.
    fn missing_blocks(&self, start: u64, count: u64) -> Result<Vec<usize>, Need> {
        let per_block = self.geometry.per_block();
        let mut missing = Vec::new();
        loop {
            let last = start + missing.len() as u64 + count - 1;
            if last / per_block >= self.table.len() as u64 {
                return Err(Need::Table);
            }
            let range = (start / per_block) as usize..=(last / per_block) as usize;
            let now: Vec<usize> = range
                .filter(|&index| self.table.get(index) == Some(&0))
                .collect();
            if now.len() == missing.len() {
                break;
            }
            missing = now;
        }
        if let Some(&index) = missing.first() {
            self.may_add_block(index)?;
        }
        Ok(missing)
    }

    fn first_in_use(&self, start: u64, end: u64) -> Result<Option<u64>, Need> {
        for cluster in start..end {
            let free = match self.refcount(cluster)? {
                None => !self.is_withheld(cluster),
                Some(0) => self.may_use(cluster),
                Some(_) => false,
            };
            if !free {
                return Ok(Some(cluster));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a refcount block in the midst of a table, a table over clusters in
    //! use, clusters without a refcount, a table whose clusters are handed out again.

    use super::super::{Clusters, Geometry};
    use super::*;

    fn allocator(end: u64) -> Allocator {
        let geometry = Geometry {
            cluster_bits: 9,
            refcount_order: 4,
        };
        // 256 clusters in a block; the first one is in cluster 2.
        let mut table = vec![0; 64];
        table[0] = 2 << 9;
        let mut allocator = Allocator::new(geometry, table, Clusters::default(), end, true);
        allocator.insert_slice(0, vec![0; 512].into_boxed_slice());
        for cluster in 0..end {
            allocator.set(cluster, 1).unwrap();
        }
        allocator
    }

    #[test]
    fn a_long_table_is_contiguous_and_counted() {
        let mut allocator = allocator(200);
        let table = allocator.allocate_exact(1000).unwrap();
        assert_eq!(table.clusters, 1000);
        assert!(table.fresh);
        let first = table.offset >> 9;
        for cluster in 200..first + 1000 {
            assert_eq!(allocator.refcount(cluster), Ok(Some(1)), "{cluster}");
        }
        let blocks: Vec<u64> = (200..first).collect();
        let named = allocator.table().iter().filter(|&&entry| entry != 0);
        let named: Vec<u64> = named.map(|entry| entry >> 9).skip(1).collect();
        assert_eq!(named, blocks);
        let next = allocator.allocate(1).unwrap();
        assert_eq!(next.offset >> 9, first + 1000);
    }

    #[test]
    fn clusters_in_use_are_jumped_over() {
        let mut allocator = allocator(100);
        allocator.set(120, 1).unwrap();
        let table = allocator.allocate_exact(30).unwrap();
        assert_eq!(table.offset >> 9, 121);
    }

    #[test]
    fn a_refcount_table_that_is_too_short_is_asked_for() {
        let mut allocator = allocator(100);
        assert_eq!(allocator.allocate_exact(64 * 256), Err(Need::Table));
        assert_eq!(allocator.frontier(), 100);
    }
}
