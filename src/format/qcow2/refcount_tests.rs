//! What would be caught: slices that drive one another out of memory for ever, or stay in it for
//! ever, a cluster handed out twice, refcounts written into a neighbour's bits,
//! a table growth that does not cover itself, a cluster that is shared while it is freed.

use proptest::prelude::*;

use super::*;
use crate::format::qcow2::header::MAX_REFTABLE_BYTES;

fn allocator(cluster_bits: u32, refcount_order: u32) -> Allocator {
    let geometry = Geometry {
        cluster_bits,
        refcount_order,
    };
    let entries = (1usize << cluster_bits) / 8;
    let mut table = vec![0; entries];
    // Header, table and first block are the image's first three clusters.
    table[0] = 2 << cluster_bits;
    let mut allocator = Allocator::new(geometry, table, Clusters::default(), 3, true);
    for no in 0..geometry.slices_per_block() {
        let bytes = vec![0; allocator.slice_bytes()].into_boxed_slice();
        allocator.insert_slice(no, bytes);
    }
    for cluster in 0..3 {
        allocator.set(cluster, 1).unwrap();
    }
    allocator
}

proptest! {
    #[test]
    fn refcounts_of_any_width_do_not_touch_their_neighbours(
        order in 0u32..=6, writes in prop::collection::vec((0usize..64, any::<u64>()), 1..100)
    ) {
        let mut bytes = vec![0u8; 512];
        let mut model = [0u64; 64];
        let mask = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
        for (index, value) in writes {
            put(&mut bytes, order, index, value & mask);
            model[index] = value & mask;
            for (index, expected) in model.iter().enumerate() {
                prop_assert_eq!(get(&bytes, order, index), *expected);
            }
        }
    }

    #[test]
    fn no_cluster_is_handed_out_twice(
        order in 0u32..=6, steps in prop::collection::vec((1u64..20, any::<bool>()), 1..200)
    ) {
        let mut allocator = allocator(9, order);
        let mut used: BTreeSet<u64> = (0..3).collect();
        for (wanted, release) in steps {
            if release && used.len() > 10 {
                let victim = *used.iter().nth(used.len() / 2).unwrap();
                let blocks = allocator.table().contains(&(victim << 9));
                if victim >= 3 && !blocks {
                    allocator.release(victim).unwrap();
                    used.remove(&victim);
                }
                continue;
            }
            match allocator.allocate(wanted) {
                Ok(new) => {
                    prop_assert!(new.clusters >= 1 && new.clusters <= wanted);
                    for cluster in (new.offset >> 9)..(new.offset >> 9) + new.clusters {
                        prop_assert!(used.insert(cluster), "cluster {} twice", cluster);
                        prop_assert_eq!(allocator.refcount(cluster), Ok(Some(1)));
                    }
                    for &block in allocator.table().iter().filter(|&&at| at != 0) {
                        let cluster = block >> 9;
                        prop_assert!(
                            !(new.offset >> 9..(new.offset >> 9) + new.clusters).contains(&cluster),
                            "a refcount block was handed out"
                        );
                    }
                }
                Err(Need::Table) => {
                    let growth = allocator.plan_growth().unwrap();
                    let bytes = allocator.growth_blocks(&growth);
                    let covered = growth.blocks * allocator.geometry.per_block();
                    prop_assert!(growth.blocks + growth.clusters <= covered);
                    let (start, blocks) = (growth.start, growth.blocks + growth.clusters);
                    let table = growth.table.clone();
                    allocator.adopt(growth);
                    prop_assert_eq!(allocator.table(), &table[..]);
                    let size = allocator.slice_bytes();
                    for (i, slice) in bytes.chunks(size).enumerate() {
                        let no = allocator.slice_of(start) + i as u64;
                        allocator.insert_slice(no, slice.into());
                    }
                    for cluster in start..start + blocks {
                        prop_assert_eq!(allocator.refcount(cluster), Ok(Some(1)));
                        prop_assert!(used.insert(cluster));
                    }
                }
                Err(other) => prop_assert!(false, "{other:?}"),
            }
        }
    }
}

#[test]
fn what_was_loaded_last_stays_and_the_rest_goes() {
    let mut allocator = allocator(9, 4);
    let blocks = allocator.table().len() as u64;
    for index in 1..blocks {
        allocator.table[index as usize] = (2 + index) << 9;
    }
    let zeros = || vec![0; 512].into_boxed_slice();
    // All the room there is goes to changed ones, which a failing disk keeps from being written.
    for no in 0..8 {
        allocator.insert_slice(no, zeros());
        allocator.set(no * 256 + 5, 1).unwrap();
    }
    for no in 8..blocks {
        allocator.trim(4);
        allocator.insert_slice(no, zeros());
        let present: Vec<u64> = (0..blocks)
            .filter(|no| allocator.slices.contains_key(no))
            .collect();
        let latest = (8..=no).rev().take(KEPT_CLEAN);
        assert!(
            latest.into_iter().all(|no| present.contains(&no)),
            "{no}: {present:?}"
        );
        assert!(present.len() <= 8 + KEPT_CLEAN + 1, "{no}: {present:?}");
    }
    // Written, they go as well.
    allocator.take_dirty_slices();
    allocator.written(&BTreeSet::new(), true);
    allocator.trim(4);
    assert!(allocator.slices.len() <= KEPT_CLEAN);
}

#[test]
fn a_cluster_that_is_about_to_be_freed_is_shared_no_more() {
    let mut allocator = allocator(12, 4);
    let first = allocator.allocate_part(512).unwrap();
    assert_eq!(allocator.allocate_part(512), Ok(first + 512));
    let cluster = first >> 12;
    assert_eq!(allocator.withdraw(cluster), Ok(false), "two refer to it");
    assert_eq!(allocator.allocate_part(512), Ok(first + 1024));
    for _ in 0..2 {
        allocator.release(cluster).unwrap();
    }
    assert_eq!(allocator.withdraw(cluster), Ok(true));
    let other = allocator.allocate_part(512).unwrap();
    assert_ne!(other >> 12, cluster);
    assert_ne!(allocator.allocate(1).unwrap().offset >> 12, cluster);
    // Withdrawing it does not close the cluster that the others go to now.
    allocator.release(cluster).unwrap();
    assert_eq!(allocator.allocate_part(512), Ok(other + 512));
    assert_eq!(allocator.allocate(1).unwrap().offset >> 12, cluster);
}

/// What would be caught: a table that nobody opens again, one that does not grow although there is
/// a longer one, an image that is full before the last free cluster is found.
#[test]
fn a_table_grows_to_the_limit_and_no_further() {
    const MOST: u64 = MAX_REFTABLE_BYTES / 8;
    for (cluster_bits, refcount_order) in [(9, 6), (9, 4), (12, 4), (16, 4), (21, 6), (21, 0)] {
        let geometry = Geometry {
            cluster_bits,
            refcount_order,
        };
        let per_cluster = (1u64 << cluster_bits) / 8;
        for clusters in [1, 2, 3, 40, 100].map(|part| (MOST / per_cluster * part / 100).max(1)) {
            let mut entries = clusters * per_cluster;
            let mut growths = 0;
            while growths < 100 {
                let table = vec![0; entries as usize];
                let end = entries * geometry.per_block();
                let mut allocator = Allocator::new(geometry, table, Clusters::default(), end, true);
                let Ok(growth) = allocator.plan_growth() else {
                    break;
                };
                let next = growth.table.len() as u64;
                assert!(
                    next > entries && next <= MOST,
                    "{entries} entries, then {next}"
                );
                assert_eq!(next, growth.clusters * per_cluster);
                assert!(
                    entries + growth.blocks <= next,
                    "its blocks have no place in it"
                );
                let covered = growth.blocks * geometry.per_block();
                assert!(growth.blocks + growth.clusters <= covered);
                entries = next;
                growths += 1;
            }
            // What is left has no room for the blocks that a longer table needs.
            let blocks = (MOST / per_cluster + 1).div_ceil(geometry.per_block() - 1);
            assert!(
                entries + blocks + 1 > MOST,
                "{entries} entries, and no more"
            );
        }
    }
}

#[test]
fn what_is_free_is_found_before_the_image_is_full() {
    let geometry = Geometry {
        cluster_bits: 9,
        refcount_order: 6,
    };
    // Two blocks are there, 64 clusters each, and the table cannot get longer.
    let mut table = vec![0; (MAX_REFTABLE_BYTES / 8) as usize];
    let end = table.len() as u64 * 64;
    (table[0], table[1]) = (2 << 9, 64 << 9);
    let mut allocator = Allocator::new(geometry, table, Clusters::default(), end, true);
    for no in 0..2 {
        allocator.insert_slice(no, vec![0; 512].into_boxed_slice());
    }
    for cluster in (0..128).filter(|cluster| *cluster != 100) {
        allocator.set(cluster, 1).unwrap();
    }
    assert_eq!(allocator.allocate(4).unwrap().offset, 100 << 9);
    assert_eq!(allocator.allocate(1), Err(Need::Table));
    assert!(matches!(allocator.plan_growth(), Err(Need::Limit(_))));
    assert!(matches!(allocator.plan_growth(), Err(Need::Limit(_))));
    // It is full for as long as nothing is freed.
    allocator.release(7).unwrap();
    assert_eq!(allocator.allocate(1).unwrap().offset, 7 << 9);
}
