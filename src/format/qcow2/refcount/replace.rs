//! Other refcounts in place of all that there are: those of an image that gets or loses a snapshot.

use std::ops::Range;

use super::Allocator;

impl Allocator {
    /// Takes the refcounts of other blocks, which are stable and which the header names. None has been
    /// changed since the present ones were written. The clusters in `freed`, ranges in order, have lost
    /// their last reference by that, and are nobody's until they are [given](Self::give).
    pub(in super::super) fn replace(&mut self, table: Vec<u64>, freed: &[Range<u64>]) {
        debug_assert!(self.dirty_slices.is_empty() && self.dirty_table.is_empty());
        self.table = table;
        self.slices.clear();
        self.loaded.clear();
        self.part = None;
        self.metadata.remove_all(freed);
        let freed = freed.iter().map(|range| (range.start, range.end));
        self.withheld.extend(freed);
    }

    /// The clusters of a range that was freed may be used again.
    pub(in super::super) fn give(&mut self, range: &Range<u64>) {
        if self.withheld.remove(&range.start).is_some() {
            self.add_free(range.start, range.end - range.start);
        }
    }

    /// A cluster is never handed out, whatever its refcount.
    pub(in super::super) fn withhold(&mut self, cluster: u64) {
        self.withheld.insert(cluster, cluster + 1);
    }

    pub(in super::super) fn is_withheld(&self, cluster: u64) -> bool {
        let mut before = self.withheld.range(..=cluster);
        before.next_back().is_some_and(|(_, end)| cluster < *end)
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a cluster that is handed out while its space is being given back, or
    //! never; refcounts of before that are still believed.

    use super::super::{Clusters, Geometry, Kind, put};
    use super::*;

    #[test]
    fn what_is_withheld_is_never_handed_out() {
        let geometry = Geometry {
            cluster_bits: 9,
            refcount_order: 4,
        };
        // One cluster each time, and as many as there are; with the second block not there yet.
        for wanted in [1, 300] {
            let mut allocator =
                Allocator::new(geometry, vec![1 << 9, 0], Clusters::default(), 10, true);
            allocator.insert_slice(0, vec![0; 512].into());
            let withheld = [10, 12, 13, 256, 260];
            for cluster in withheld {
                allocator.withhold(cluster);
            }
            let mut seen = std::collections::BTreeSet::new();
            while seen.len() < 300 {
                let place = allocator.allocate(wanted).unwrap();
                let first = place.offset >> 9;
                for cluster in first..first + place.clusters {
                    assert!(!withheld.contains(&cluster), "{cluster} of {wanted}");
                    assert!(seen.insert(cluster), "{cluster} twice");
                }
            }
        }
    }

    #[test]
    fn what_was_freed_is_handed_out_once_it_is_given() {
        let geometry = Geometry {
            cluster_bits: 9,
            refcount_order: 4,
        };
        let refcounts = |used: &[u64]| {
            let mut bytes = vec![0; 512];
            used.iter()
                .for_each(|&cluster| put(&mut bytes, 4, cluster as usize, 1));
            bytes.into_boxed_slice()
        };
        let all: Vec<u64> = (0..10).collect();
        let mut metadata = Clusters::default();
        metadata.add(7, Kind::L2);
        let mut allocator = Allocator::new(geometry, vec![1 << 9], metadata, 10, true);
        allocator.insert_slice(0, refcounts(&all));
        // Clusters 4, 5 and 7 go, and the block moves to cluster 9.
        let freed = [4..6, 7..8];
        allocator.replace(vec![9 << 9], &freed);
        assert_eq!(allocator.refcount(4), Err(super::super::Need::Slice(0)));
        allocator.insert_slice(0, refcounts(&[0, 1, 2, 3, 6, 8, 9]));
        let first = allocator.allocate(1).unwrap();
        assert_eq!(first.offset >> 9, 10, "what is withheld is not handed out");
        allocator.give(&freed[1]);
        allocator.give(&freed[0]);
        let mut given: Vec<u64> = (0..3)
            .map(|_| allocator.allocate(1).unwrap().offset >> 9)
            .collect();
        given.sort_unstable();
        assert_eq!(given, [4, 5, 7]);
        assert_eq!(allocator.allocate(1).unwrap().offset >> 9, 11);
    }
}
