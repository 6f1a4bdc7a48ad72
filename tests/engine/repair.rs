//! Repair that is cut short, and the images that are repaired when they are opened.
//!
//! What would be caught: refcounts lowered before others are raised, entries that point at what
//! is not stable yet, a header that names refcounts before they are there, flags that promise too
//! much; an image written although its refcounts are not to be relied on; damaged tables that
//! make the check panic, run for ever or take all memory.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use stratablk::format::qcow2::check::{self, Repair};
use stratablk::reactor::Reactor;
use stratablk::storage::memory::{MemoryStorage, Step};

use crate::check::{contents, ours, repaired};
use crate::damage::{self, COPIED, Content, OFFSET, Tables};
use crate::model::{SECTOR, seed};
use crate::random::workload;
use crate::support::*;

const SIZE: u64 = 8 << 20;

/// The clusters whose refcounts are too low: data there may be overwritten.
fn in_danger(bytes: &[u8]) -> BTreeSet<u64> {
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<u64>().ok());
    let (summary, found) = ours(bytes);
    summary.unwrap();
    found
        .iter()
        .filter_map(|line| {
            let mut words = line.strip_prefix("ERROR cluster ")?.split([' ', '=']);
            let cluster = number(words.next())?;
            (words.next() == Some("refcount")).then_some(cluster)
        })
        .collect()
}

fn apply(bytes: &mut Vec<u8>, offset: u64, new: &[u8]) {
    let end = offset as usize + new.len();
    bytes.resize(bytes.len().max(end), 0);
    bytes[offset as usize..end].copy_from_slice(new);
}

/// The image as a cut after `steps` leaves it: what is behind the last barrier as a whole, of
/// the rest some sectors.
pub fn cut(start: &[u8], steps: &[Step], rng: &mut StdRng) -> Vec<u8> {
    let stable = steps.iter().rposition(|step| *step == Step::Sync);
    let mut bytes = start.to_vec();
    for (index, step) in steps.iter().enumerate() {
        let Step::Write { offset, bytes: new } = step else {
            continue;
        };
        if stable.is_some_and(|stable| index < stable) {
            apply(&mut bytes, *offset, new);
            continue;
        }
        for (sector, new) in new.chunks(SECTOR).enumerate() {
            if rng.random() {
                apply(&mut bytes, offset + (sector * SECTOR) as u64, new);
            }
        }
    }
    bytes
}

fn cut_everywhere(path: &Path, bytes: &[u8], context: &str, rng: &mut StdRng) {
    std::fs::write(path, bytes).unwrap();
    let (before, danger) = (contents(path, None), in_danger(bytes));
    let storage = MemoryStorage::new(bytes.to_vec());
    storage.record();
    let reactor = Reactor::for_this_thread().unwrap();
    reactor
        .block_on(check::repair(&storage, Repair::All, &mut |_| ()))
        .unwrap();
    let steps = storage.take_log();
    for count in 0..steps.len() {
        let context = format!("{context}, cut after {count} of {} steps", steps.len());
        let left = cut(bytes, &steps[..count], rng);
        let new: Vec<_> = in_danger(&left).difference(&danger).copied().collect();
        assert!(
            new.is_empty(),
            "{context}: clusters {new:?} may be overwritten"
        );
        let (summary, after) = repaired(&left, Repair::All);
        if before.is_none() {
            continue;
        }
        for image in [&left, &after] {
            std::fs::write(path, image).unwrap();
            assert!(
                contents(path, None) == before,
                "{context}: it reads differently"
            );
        }
        assert_eq!(summary.corruptions, 0, "{context}");
        check(path, false);
    }
}

#[test]
fn a_repair_may_be_cut_at_any_write() {
    let first = seed();
    println!("seed {first}");
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    for (number, (options, content)) in [
        ("compat=1.1,cluster_size=4k", Content::ALL),
        ("cluster_size=16k,extended_l2=on", Content::ALL),
        ("cluster_size=1k,refcount_bits=2", Content::PLAIN),
    ]
    .into_iter()
    .enumerate()
    {
        damage::make(&path, options, content, SIZE, first);
        let bytes = std::fs::read(&path).unwrap();
        for round in 0..4 {
            let seed = first.wrapping_add(100 * number as u64 + round);
            let mut tables = Tables::of(bytes.clone(), seed);
            for _ in 0..3 {
                tables.damage_refcount();
                tables.damage_flag();
            }
            if round % 2 == 1 {
                tables.damage_l2();
                tables.damage_overlap();
            }
            if round >= 2 {
                tables.damage_reftable();
            }
            let context = format!("seed {seed}: {options} round {round}");
            let mut rng = StdRng::seed_from_u64(seed);
            cut_everywhere(&path, &tables.bytes, &context, &mut rng);
        }
    }
}

/// An image that a writer with lazy refcounts was killed on.
fn make_dirty(path: &Path) {
    create(path, "lazy_refcounts=on,cluster_size=4k", SIZE);
    let writes = ["-c", "write -q -P 7 0 1M", "-c", "flush", "-c", "abort"];
    let args: Vec<&str> = ["-f", "qcow2"].into_iter().chain(writes).collect();
    let args: Vec<&str> = args.into_iter().chain([path.to_str().unwrap()]).collect();
    output("qemu-io", &args);
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(Tables::of(bytes.clone(), 0).word(72), 1, "it is not dirty");
    assert!(!in_danger(&bytes).is_empty(), "its refcounts are right");
}

#[test]
fn a_dirty_image_is_repaired_before_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    make_dirty(&path);
    let before = std::fs::read(&path).unwrap();
    let disk = Disk::open(&path, "qcow2", json!({"read-only": true}));
    assert!(disk.read(0, 1 << 20).iter().all(|&byte| byte == 7));
    disk.close();
    assert!(std::fs::read(&path).unwrap() == before, "a reader wrote");
    let disk = Disk::open(&path, "qcow2", json!({}));
    let mut bytes = vec![0; SIZE as usize];
    bytes[..1 << 20].fill(7);
    let (disk, bytes) = workload(disk, bytes, 300, seed(), false);
    disk.close();
    check(&path, false);
    compare(&path, "qcow2", &bytes);
    let tables = Tables::of(std::fs::read(&path).unwrap(), 0);
    assert_eq!(tables.word(72), 0, "the dirty bit");
    assert_eq!(tables.word(80), 1, "lazy refcounts are still on");
}

/// Makes a cluster of the guest's count twice in an image of clusters of 4 KiB, as though somebody
/// else had referred to it.
fn count_twice(tables: &mut Tables) {
    let at = tables.l2()[5];
    let entry = tables.word(at);
    tables.put(at, entry & !COPIED);
    let block = tables.word(tables.word(48));
    let place = (block + (entry & OFFSET) / 4096 * 2) as usize;
    tables.bytes[place..place + 2].copy_from_slice(&2u16.to_be_bytes());
}

/// What would be caught: a dirty bit that is gone before the refcounts and flags are right, those
/// that are too low and those that are too high.
#[test]
fn an_image_is_dirty_until_its_refcounts_are_stable() {
    let seed = seed();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    make_dirty(&path);
    let mut tables = Tables::of(std::fs::read(&path).unwrap(), seed);
    count_twice(&mut tables);
    let start = tables.bytes;
    let storage = Arc::new(MemoryStorage::new(start.clone()));
    storage.record();
    open_memory(&Reactor::for_this_thread().unwrap(), &storage);
    let steps = storage.take_log();
    let mut clean = 0;
    for count in (0..=steps.len()).flat_map(|count| [count; 16]) {
        let left = cut(&start, &steps[..count], &mut rng);
        if Tables::of(left.clone(), 0).word(72) & 1 == 0 {
            clean += 1;
            let (summary, found) = ours(&left);
            let damage = summary.unwrap().corruptions;
            assert_eq!(damage, 0, "cut after {count} of {}: {found:?}", steps.len());
        }
    }
    assert!(clean > 0, "it stays dirty");
}

#[test]
fn a_dirty_image_with_other_damage_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    make_dirty(&path);
    let mut tables = Tables::of(std::fs::read(&path).unwrap(), 0);
    let at = tables.l2()[3];
    tables.put(at, tables.word(at) | 512);
    std::fs::write(&path, &tables.bytes).unwrap();
    let error = Disk::try_open(&path, "qcow2", json!({})).err().unwrap();
    let text = error.to_string();
    assert!(
        text.contains("stratactl image check --repair all"),
        "{text}"
    );
    assert!(
        tables.bytes == std::fs::read(&path).unwrap(),
        "it was written to"
    );
}

#[test]
fn the_corrupt_bit_goes_with_the_corruption() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    damage::make(&path, "cluster_size=4k", Content::PLAIN, SIZE, seed());
    let mut tables = Tables::of(std::fs::read(&path).unwrap(), 0);
    tables.put(72, 2);
    // Misaligned data cannot be repaired: the bit stays. Once it is gone, so is the bit.
    let at = tables.l2()[0];
    let good = tables.word(at);
    tables.put(at, (1 << 16) | 512);
    let (summary, bytes) = repaired(&tables.bytes, Repair::All);
    assert!(summary.corruptions > 0, "{summary:?}");
    assert_eq!(Tables::of(bytes, 0).word(72), 2);
    tables.put(at, good);
    let (summary, bytes) = repaired(&tables.bytes, Repair::All);
    assert!(summary.is_clean(), "{summary:?}");
    assert_eq!(Tables::of(bytes, 0).word(72), 0);
}

#[test]
fn leaks_are_freed_and_nothing_else_is_touched() {
    let seed = seed();
    println!("seed {seed}");
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    damage::make(&path, "cluster_size=4k", Content::ALL, SIZE, seed);
    let bytes = std::fs::read(&path).unwrap();
    let mut tables = Tables::of(bytes.clone(), seed);
    // With a host cluster of their own: others take nothing with them.
    let own = |at: &u64| tables.word(*at) & COPIED != 0;
    let entries: Vec<u64> = tables.l2().into_iter().rev().filter(own).take(20).collect();
    for at in entries {
        tables.put(at, 0);
    }
    let (found, _) = ours(&tables.bytes);
    assert!(found.unwrap().leaks > 0);
    std::fs::write(&path, &tables.bytes).unwrap();
    let before = contents(&path, None).unwrap();
    let (summary, bytes) = repaired(&tables.bytes, Repair::Leaks);
    assert!(summary.is_clean() && summary.leaks_fixed > 0, "{summary:?}");
    std::fs::write(&path, &bytes).unwrap();
    check(&path, false);
    assert!(contents(&path, None).unwrap() == before);
    assert_eq!(tables.bytes.len(), bytes.len());
    // Too few counted references are not its business.
    let refcounts = tables.word(tables.word(48));
    tables.put(refcounts, 0);
    let (summary, _) = repaired(&tables.bytes, Repair::Leaks);
    assert!(summary.corruptions >= 4, "{summary:?}");
}

#[test]
fn no_damage_makes_the_check_fail_in_a_bad_way() {
    let first = seed();
    println!("seed {first}");
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    damage::make(&path, "cluster_size=1k", Content::ALL, 4 << 20, first);
    let bytes = std::fs::read(&path).unwrap();
    let reactor = Reactor::for_this_thread().unwrap();
    for round in 0..200 {
        let seed = first.wrapping_add(round);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut damaged = bytes.clone();
        for _ in 0..rng.random_range(1..40) {
            // The header, or a word anywhere.
            let at = match rng.random_range(0..3) {
                0 => rng.random_range(8..104),
                _ => rng.random_range(0..damaged.len() / 8) * 8,
            };
            let word = match rng.random_range(0..4) {
                0 => rng.random(),
                1 => rng.random_range(0..damaged.len() as u64) & !511,
                2 => 1 << rng.random_range(0..64),
                _ => u64::MAX,
            };
            for (at, byte) in (at..).zip(word.to_be_bytes()) {
                if let Some(place) = damaged.get_mut(at) {
                    *place = byte;
                }
            }
        }
        println!("seed {seed}");
        let storage = MemoryStorage::new(damaged);
        let _ = reactor.block_on(check::check(&storage, &mut |_| ()));
        let _ = reactor.block_on(check::repair(&storage, Repair::All, &mut |_| ()));
        assert!(storage.snapshot().len() < 64 << 20, "the image has grown");
    }
}
