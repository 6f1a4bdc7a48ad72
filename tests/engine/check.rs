//! The check and the repair of images, against those of `qemu-img`.
//!
//! What would be caught: references that are not counted or counted twice, for any width of
//! refcounts and any kind of entry; damage that is not seen, or seen where there is none; a
//! repair that leaves errors, changes what the guest reads, or that a kill in the middle makes
//! worse than none.

use std::path::Path;

use serde_json::{Value, json};
use stratablk::error::Result;
use stratablk::format::qcow2::check::{self, Repair, Summary};
use stratablk::reactor::Reactor;
use stratablk::storage::memory::MemoryStorage;

use crate::damage::{self, Content, SHAPES, Tables};
use crate::model::seed;
use crate::support::*;

const SIZE: u64 = 8 << 20;

/// The verdict of `qemu-img check`, whatever it is, and its numbers.
fn qemus(path: &Path) -> (i32, Value) {
    let args = [
        "check",
        "-f",
        "qcow2",
        "--output=json",
        path.to_str().unwrap(),
    ];
    let output = output("qemu-img", &args);
    let value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output.status.code().unwrap(), value)
}

/// Our check of an image in memory: the summary and what was found.
pub fn ours(bytes: &[u8]) -> (Result<Summary>, Vec<String>) {
    let storage = MemoryStorage::new(bytes.to_vec());
    let mut found = Vec::new();
    let reactor = Reactor::for_this_thread().unwrap();
    let mut report = |finding: check::Finding| found.push(finding.to_string());
    let summary = reactor.block_on(check::check(&storage, &mut report));
    (summary, found)
}

pub fn repaired(bytes: &[u8], what: Repair) -> (Summary, Vec<u8>) {
    let storage = MemoryStorage::new(bytes.to_vec());
    let reactor = Reactor::for_this_thread().unwrap();
    let summary = reactor
        .block_on(check::repair(&storage, what, &mut |_| ()))
        .unwrap();
    (summary, storage.snapshot())
}

fn verdict(summary: &Summary) -> i32 {
    match (summary.corruptions, summary.leaks) {
        (0, 0) => 0,
        (0, _) => 3,
        _ => 2,
    }
}

fn numbers(summary: &Summary) -> Value {
    json!({
        "total-clusters": summary.total_clusters,
        "allocated-clusters": summary.allocated_clusters,
        "fragmented-clusters": summary.fragmented_clusters,
        "compressed-clusters": summary.compressed_clusters,
        "image-end-offset": summary.image_end,
        "corruptions": summary.corruptions,
        "leaks": summary.leaks,
    })
}

/// `qemu-img`'s numbers that ours have, too; it leaves out those that are 0.
fn same_numbers(theirs: &Value, ours: &Value) -> Value {
    let numbers = ours.as_object().unwrap().keys().map(|key| {
        let number = theirs.get(key).cloned().unwrap_or(json!(0));
        (key.clone(), number)
    });
    numbers.collect::<serde_json::Map<_, _>>().into()
}

fn judged_alike(path: &Path, context: &str) {
    let (code, theirs) = qemus(path);
    let (summary, found) = ours(&std::fs::read(path).unwrap());
    let summary = summary.unwrap_or_else(|error| panic!("{context}: {error}; qemu-img: {code}"));
    let numbers = numbers(&summary);
    assert_eq!(
        (verdict(&summary), &numbers),
        (code, &same_numbers(&theirs, &numbers)),
        "{context}: {found:#?}"
    );
}

#[test]
fn images_of_all_shapes_are_judged_alike() {
    let seed = seed();
    println!("seed {seed}");
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    for (options, content) in SHAPES {
        damage::make(&path, options, content, SIZE, seed);
        judged_alike(&path, &format!("seed {seed}: {options}"));
    }
    let data = in_dir(&dir, "data.raw");
    let options = format!("data_file={}", data.display());
    damage::make(&path, &options, Content::PLAIN, SIZE, seed);
    judged_alike(&path, &format!("seed {seed}: {options}"));
}

#[test]
fn damage_is_judged_alike() {
    let first = seed();
    println!("seed {first}");
    let dir = tempfile::tempdir().unwrap();
    let (path, damaged) = (in_dir(&dir, "image.qcow2"), in_dir(&dir, "damaged.qcow2"));
    for (number, (options, content)) in SHAPES.into_iter().enumerate() {
        damage::make(&path, options, content, SIZE, first);
        let bytes = std::fs::read(&path).unwrap();
        for round in 0..8 {
            let seed = first.wrapping_add(100 * number as u64 + round);
            let mut tables = Tables::of(bytes.clone(), seed);
            for _ in 0..=round {
                match round % 4 {
                    0 => tables.damage_refcount(),
                    1 => tables.damage_flag(),
                    _ => tables.damage_l2(),
                }
            }
            std::fs::write(&damaged, &tables.bytes).unwrap();
            judged_alike(&damaged, &format!("seed {seed}: {options} round {round}"));
        }
    }
}

/// What the disk reads as, unless it cannot be read at all.
pub fn contents(path: &Path, snapshot: Option<&str>) -> Option<Vec<u8>> {
    let raw = path.with_extension("contents");
    let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
    args.extend(snapshot.iter().flat_map(|name| ["-l", name]));
    args.extend([path.to_str().unwrap(), raw.to_str().unwrap()]);
    let output = output("qemu-img", &args);
    output
        .status
        .success()
        .then(|| std::fs::read(&raw).unwrap())
}

#[test]
fn repaired_images_are_clean_and_read_the_same() {
    let first = seed();
    println!("seed {first}");
    let dir = tempfile::tempdir().unwrap();
    let (path, damaged) = (in_dir(&dir, "image.qcow2"), in_dir(&dir, "damaged.qcow2"));
    let (mut readable, mut refused) = (0, 0);
    for (number, (options, content)) in SHAPES.into_iter().enumerate() {
        damage::make(&path, options, content, SIZE, first);
        let bytes = std::fs::read(&path).unwrap();
        for round in 0..10 {
            let seed = first.wrapping_add(100 * number as u64 + round);
            let context = format!("seed {seed}: {options} round {round}");
            let mut tables = Tables::of(bytes.clone(), seed);
            for _ in 0..=round / 2 {
                match round % 5 {
                    0 => tables.damage_refcount(),
                    1 => tables.damage_flag(),
                    2 => tables.damage_l2(),
                    3 => tables.damage_l1(),
                    _ => tables.damage_reftable(),
                }
            }
            std::fs::write(&damaged, &tables.bytes).unwrap();
            let before = contents(&damaged, None);
            let (summary, repaired) = repaired(&tables.bytes, Repair::All);
            std::fs::write(&damaged, &repaired).unwrap();
            let (code, _) = qemus(&damaged);
            assert_eq!(code, verdict(&summary), "{context}: {summary:?}");
            if let Some(before) = before {
                if tables.maps_with_metadata() {
                    // What the disk reads as there changes with the metadata, whichever tool mends it.
                    continue;
                }
                readable += 1;
                if repaired == tables.bytes && summary.corruptions > 0 {
                    // A table of the disk and one of a snapshot are in one place: which is right
                    // cannot be told.
                    refused += 1;
                    continue;
                }
                let after = contents(&damaged, None);
                assert!(after == Some(before), "{context}: it reads differently");
                let left = ours(&repaired).1;
                if tables.maps_itself() {
                    // Every write to that table shows in the disk: it is left alone.
                    continue;
                }
                // What cannot be read, and zeros that version 2 cannot record.
                let lost = |found: &String| {
                    found.contains("inside a cluster")
                        || tables.version == 2 && found.contains("past the end")
                };
                assert!(left.iter().all(lost), "{context}: {left:#?}");
            }
        }
    }
    assert!(
        readable > 50 && refused * 10 < readable,
        "seed {first}: {readable} images could be read, {refused} repairs were refused"
    );
}

/// What would be caught: a repair that takes guest data for entries of the L1 table, because a bit of
/// the table's length has flipped, and writes to them.
#[test]
fn a_wrong_length_of_the_l1_table_costs_no_data() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "compat=1.1", SIZE);
    let image = path.to_str().unwrap();
    // Behind the table: zeros, what looks like entries with reserved bits, and an L2 table.
    let writes = [
        "write -q -P 1 0 256k",
        "write -q -P 0x42 1M 128k",
        "write -q -P 0 2M 64k",
    ];
    let args = writes.iter().flat_map(|write| ["-c", write]);
    run(
        "qemu-io",
        &["-f", "qcow2"]
            .into_iter()
            .chain(args)
            .chain([image])
            .collect::<Vec<_>>(),
    );
    let bytes = std::fs::read(&path).unwrap();
    let before = contents(&path, None).unwrap();
    // More than 2^22 are refused.
    for bit in 0..22 {
        let mut damaged = bytes.clone();
        damaged[39 - bit / 8] ^= 1 << (bit % 8);
        let length = u32::from_be_bytes(damaged[36..40].try_into().unwrap());
        if length == 0 {
            continue;
        }
        let (summary, repaired) = repaired(&damaged, Repair::All);
        assert!(summary.is_clean(), "{length} entries: {summary:?}");
        assert!(
            repaired.len() <= bytes.len() + (64 << 10),
            "{length} entries: it grew from {} to {} bytes",
            bytes.len(),
            repaired.len()
        );
        std::fs::write(&path, &repaired).unwrap();
        let after = contents(&path, None).unwrap();
        assert!(after == before, "{length} entries: it reads differently");
    }
}
