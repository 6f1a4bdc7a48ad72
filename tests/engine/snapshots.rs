//! The table of internal snapshots.
//!
//! What would be caught: fields misread, tables believed that claim too much.

use serde_json::{Value, json};
use stratablk::format::qcow2::{self, snapshots};
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
