//! Contiguous clusters for a table.

use super::{Allocation, Allocator, Need};

impl Allocator {
    /// Allocates exactly `count` contiguous clusters behind everything else. Refcount blocks that
    /// are lacking there are made in front of them, so that none comes to lie in their midst.
    ///
    /// # Errors
    /// What must be done first; nothing has been allocated then.
    pub fn allocate_exact(&mut self, count: u64) -> Result<Allocation, Need> {
        loop {
            let start = self.frontier;
            let missing = self.missing_blocks(start, count)?;
            let first = start + missing.len() as u64;
            match self.first_in_use(start, first + count)? {
                Some(cluster) => self.frontier = cluster + 1,
                None => {
                    for (cluster, &index) in (start..).zip(&missing) {
                        // They are written whole.
                        self.place_block(index, cluster, false);
                    }
                    for cluster in start..first + count {
                        self.set(cluster, 1)?;
                    }
                    self.frontier = first + count;
                    // Both in one, since what is behind the first is fresh if that is.
                    let all = self.allocation(start, first + count - start);
                    return Ok(Allocation {
                        offset: first << self.geometry.cluster_bits,
                        clusters: count,
                        fresh: all.fresh,
                    });
                }
            }
        }
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
        if self.frozen && !missing.is_empty() {
            return Err(Need::Table);
        }
        Ok(missing)
    }

    fn first_in_use(&self, start: u64, end: u64) -> Result<Option<u64>, Need> {
        for cluster in start..end {
            let free = match self.refcount(cluster)? {
                None => true,
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
