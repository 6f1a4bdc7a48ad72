//! Internal snapshots: their table, and how they come and go in images with all that there may be.
//!
//! What would be caught: fields misread, tables believed that claim too much; a snapshot that reads
//! otherwise than the disk did, references to compressed clusters or to clusters behind zeros that are
//! counted wrong, a snapshot of another program that is lost or changed, clusters that leak.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stratablk::format::Format;
use stratablk::format::qcow2::{self, Qcow2, snapshots};
use stratablk::reactor::Reactor;
use stratablk::storage::memory::MemoryStorage;

use crate::damage::{self, Content};
use crate::model::seed;
use crate::support::*;

#[test]
fn snapshots_are_listed_as_qemu_lists_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    damage::make(&path, "cluster_size=4k", Content::ALL, 8 << 20, seed());
    let image = path.to_str().unwrap();
    let info = run("qemu-img", &["info", "--output=json", image]);
    let info: Value = serde_json::from_str(&info).unwrap();
    let theirs = info["snapshots"].as_array().unwrap();
    let storage = MemoryStorage::new(std::fs::read(&path).unwrap());
    let reactor = Reactor::for_this_thread().unwrap();
    let header = reactor.block_on(qcow2::read_header(&storage)).unwrap();
    let ours = reactor
        .block_on(snapshots::list(&storage, &header))
        .unwrap();
    let described: Vec<Value> = ours
        .iter()
        .map(|snapshot| {
            json!({
                "id": snapshot.id,
                "name": snapshot.name,
                "vm-state-size": snapshot.vm_state_size,
                "date-sec": snapshot.date_seconds,
                "date-nsec": snapshot.date_nanoseconds,
                "vm-clock-sec": snapshot.vm_clock / 1_000_000_000,
                "vm-clock-nsec": snapshot.vm_clock % 1_000_000_000,
            })
        })
        .collect();
    let known = |theirs: &Value| {
        let mut theirs = theirs.clone();
        theirs.as_object_mut().unwrap().remove("icount");
        theirs
    };
    assert_eq!(described, theirs.iter().map(known).collect::<Vec<_>>());
    assert!(ours.iter().all(|snapshot| snapshot.disk_size == 8 << 20));
    // Tables that make no sense are named, whatever they claim.
    for (at, value, expected) in [
        (60, 70_000u32, "70000 snapshots"),
        (68, 513, "snapshot table at offset"),
        (60, 60_000, "extra data"),
    ] {
        let mut bytes = storage.snapshot();
        bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        if value == 60_000 {
            bytes[header.snapshots_offset as usize + 36] = 1;
        }
        let storage = MemoryStorage::new(bytes);
        let header = reactor.block_on(qcow2::read_header(&storage)).unwrap();
        let error = reactor.block_on(snapshots::list(&storage, &header));
        let text = error.unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
}

fn image_of(disk: &Disk) -> Arc<Qcow2> {
    match &disk.root.chain().top().format {
        Format::Qcow2(image) => image.clone(),
        _ => panic!("no qcow2 image"),
    }
}

/// What `qemu-img` reads of a snapshot.
fn contents(path: &Path, name: &str) -> Vec<u8> {
    let raw = path.with_extension("raw");
    let option = format!("snapshot.name={name}");
    let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
    run(
        "qemu-img",
        &["convert", "-l", &option, "-O", "raw", from, to],
    );
    std::fs::read(raw).unwrap()
}

fn names(image: &Qcow2) -> Vec<String> {
    let snapshots = image.snapshots();
    snapshots.iter().map(|one| one.name.clone()).collect()
}

fn come_and_go(options: &str) {
    const SIZE: usize = 4 << 20;
    let seed = seed();
    let context = format!("STRATABLK_SEED={seed}: {options}");
    println!("{context}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    damage::make(&path, options, Content::ALL, SIZE as u64, seed);
    let disk = Disk::open(&path, "qcow2", json!({}));
    let image = image_of(&disk);
    let mut now = disk.read(0, SIZE);
    let theirs = names(&image);
    drop(image);
    disk.close();
    let mut kept: Vec<(String, Vec<u8>)> = theirs
        .into_iter()
        .map(|name| (name.clone(), contents(&path, &name)))
        .collect();
    const ROUNDS: usize = 6;
    for round in 0..ROUNDS {
        // Opened anew each time, so that nothing in memory helps.
        let disk = Disk::open(&path, "qcow2", json!({}));
        let image = image_of(&disk);
        assert_eq!(
            names(&image),
            kept.iter().map(|one| one.0.clone()).collect::<Vec<_>>()
        );
        for _ in 0..rng.random_range(1..6) {
            let at = rng.random_range(0..SIZE / 512) * 512;
            let len = (rng.random_range(1..200) * 512).min(SIZE - at);
            let bytes = vec![rng.random::<u8>(); len];
            match rng.random_range(0..4) {
                0 => {
                    let zeroed = disk.view().write_zeroes(at as u64, len as u64, true);
                    disk.reactor.block_on(zeroed).unwrap();
                    now[at..at + len].fill(0);
                }
                _ => {
                    disk.try_write(at as u64, &bytes).unwrap();
                    now[at..at + len].copy_from_slice(&bytes);
                }
            }
        }
        let changed = async {
            if kept.is_empty() || rng.random_bool(0.55) {
                let new = [format!("r{round}")];
                let taken = image.take_snapshots(&new, SystemTime::now()).await.unwrap();
                let [new] = new;
                kept.push((new, now.clone()));
                taken
            } else {
                let (name, _) = kept.remove(rng.random_range(0..kept.len()));
                let snapshots = image.snapshots();
                let gone = snapshots.iter().find(|one| one.name == name).unwrap();
                image.delete_snapshot(gone).await.unwrap()
            }
        };
        let prepared = disk.reactor.block_on(changed);
        disk.reactor
            .block_on(prepared.take_effect().finish())
            .unwrap();
        assert!(disk.read(0, SIZE) == now, "{context}: round {round}");
        drop(image);
        disk.close();
        check(&path, false);
        compare(&path, "qcow2", &now);
        for (name, bytes) in &kept {
            assert!(
                contents(&path, name) == *bytes,
                "{context}: round {round}: {name}"
            );
        }
    }
}

#[test]
fn snapshots_of_all_that_an_image_may_have() {
    for options in [
        "cluster_size=4k",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=64k,compat=0.10",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=2M,lazy_refcounts=on",
    ] {
        come_and_go(options);
    }
}

#[test]
fn refcounts_that_are_too_narrow_are_refused_and_nothing_changes() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "cluster_size=4k,refcount_bits=2", 1 << 20);
    let disk = Disk::open(&path, "qcow2", json!({}));
    let image = image_of(&disk);
    disk.try_write(0, &[1; 8192]).unwrap();
    let take = |name: &str| {
        let names = [name.to_owned()];
        let taken = image.take_snapshots(&names, SystemTime::now());
        let taken = disk.reactor.block_on(taken);
        taken.map(|taken| disk.reactor.block_on(taken.take_effect().finish()).unwrap())
    };
    for name in ["one", "two"] {
        take(name).unwrap();
    }
    let error = take("three").unwrap_err().to_string();
    assert!(error.contains("more refcount_bits"), "{error}");
    for (name, text) in [("", "Name is empty"), ("one", "already exists")] {
        let error = take(name).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    assert_eq!(names(&image), ["one", "two"]);
    disk.try_write(4096, &[2; 4096]).unwrap();
    let gone = image.snapshots()[0].clone();
    let deleted = disk.reactor.block_on(image.delete_snapshot(&gone)).unwrap();
    disk.reactor
        .block_on(deleted.take_effect().finish())
        .unwrap();
    take("three").unwrap();
    drop(image);
    disk.close();
    check(&path, false);
    assert_eq!(contents(&path, "two")[4096], 1);
    assert_eq!(contents(&path, "three")[4096], 2);
}
