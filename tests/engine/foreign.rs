//! Containers of other programs, without a named format.
//!
//! What would be caught: a container that a guest may write as if it were a raw disk, or that
//! shines through an overlay, and one that is refused although its bytes were asked for.

use std::path::{Path, PathBuf};

use serde_json::json;
use stratablk::chain::View;
use stratablk::format::Format;
use stratablk::format::qcow2::Backing;
use stratablk::graph::Graph;
use stratablk::options::{AutoOptions, BlockRef, BlockdevOptions, Dialect, Driver};
use stratablk::reactor::Reactor;

use crate::support::*;

/// Every container that QEMU makes, and some that it only reads: the name that errors have for it,
/// and its file.
fn containers(dir: &tempfile::TempDir) -> Vec<(&'static str, PathBuf)> {
    let mut made = Vec::new();
    for (name, format, options) in [
        ("VMDK", "vmdk", "subformat=monolithicSparse"),
        ("VMDK", "vmdk", "subformat=streamOptimized"),
        ("VMDK", "vmdk", "subformat=monolithicFlat"),
        ("VHD", "vpc", "subformat=dynamic"),
        ("VHD", "vpc", "subformat=fixed"),
        ("VHDX", "vhdx", ""),
        ("VDI", "vdi", ""),
        ("Parallels", "parallels", ""),
        ("qcow version 1", "qcow", ""),
    ] {
        let path = in_dir(dir, &format!("{}.{format}", made.len()));
        let mut args = vec!["create", "-q", "-f", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([path.to_str().unwrap(), "4M"]);
        run("qemu-img", &args);
        made.push((name, path));
    }
    let padded = |bytes: &[u8]| {
        let mut padded = bytes.to_vec();
        padded.resize(64 << 10, 1);
        padded
    };
    let mut dmg = padded(b"");
    let end = dmg.len() - 512;
    dmg[end..end + 4].copy_from_slice(b"koly");
    for (name, bytes) in [
        // QEMU takes seconds for the key of one.
        ("LUKS", padded(b"LUKS\xba\xbe\0\x01aes\0")),
        ("LUKS", padded(b"LUKS\xba\xbe\0\x02\0\0")),
        ("Bochs", padded(b"Bochs Virtual HD Image\0")),
        (
            "cloop",
            padded(b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0\n"),
        ),
        ("DMG", dmg),
    ] {
        let path = in_dir(dir, name);
        std::fs::write(&path, bytes).unwrap();
        made.push((name, path));
    }
    made
}

/// A node whose format is to be found out.
fn probed(path: &Path) -> BlockdevOptions {
    let raw = json!({"driver": "raw", "node-name": "top",
        "file": {"driver": "file", "filename": path.to_str().unwrap()}});
    let mut options = BlockdevOptions::from_value(&raw, Dialect::Json).unwrap();
    if let Driver::Raw(raw) = options.driver {
        let file: BlockRef = raw.file;
        let copy_on_read = false;
        options.driver = Driver::Auto(AutoOptions { file, copy_on_read });
    }
    options
}

#[test]
fn containers_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let reactor = Reactor::for_this_thread().unwrap();
    for (name, path) in containers(&dir) {
        let before = std::fs::read(&path).unwrap();
        let what = path.display().to_string();
        let refused = |options: &BlockdevOptions| {
            let graph = Graph::default();
            let error = reactor.block_on(graph.open(options)).expect_err(&what);
            let text = error.to_string();
            let helps = text.contains("qemu-img convert") && text.contains("'raw'");
            assert!(
                text.contains(&format!("a {name} image")) && helps,
                "{what}: {text}"
            );
            assert!(text.contains(&what), "{what}: {text}");
            assert!(graph.nodes().is_empty());
        };
        refused(&probed(&path));
        // As a backing file whose format is not recorded.
        let overlay = in_dir(&dir, "overlay");
        create(&overlay, "cluster_size=4k", 4 << 20);
        let disk = Disk::open(&overlay, "qcow2", json!({}));
        let Format::Qcow2(image) = disk.root.chain().top().format.clone() else {
            panic!("not a qcow2 image");
        };
        let backing = Backing {
            name: what.clone(),
            format: None,
        };
        reactor.block_on(image.set_backing(Some(&backing))).unwrap();
        drop(image);
        disk.close();
        refused(&probed(&overlay));
        // With the format named the bytes are served.
        let disk = Disk::open(&path, "raw", json!({}));
        let len = before.len().min(4096);
        assert!(disk.read(0, len)[..] == before[..len], "{what}");
        disk.close();
        assert!(
            std::fs::read(&path).unwrap() == before,
            "{what} was changed"
        );
    }
}

/// Disks of guests, and files that are too short for anything.
#[test]
fn what_looks_like_nothing_is_raw() {
    let dir = tempfile::tempdir().unwrap();
    let reactor = Reactor::for_this_thread().unwrap();
    let path = in_dir(&dir, "disk");
    let mut iso = vec![0; 64 << 10];
    iso[32_769..32_774].copy_from_slice(b"CD001");
    let mut partitions = vec![0; 64 << 10];
    partitions[510..512].copy_from_slice(b"\x55\xaa");
    for bytes in [vec![], vec![1], vec![0; 700], iso, partitions] {
        std::fs::write(&path, &bytes).unwrap();
        let graph = Graph::default();
        let name = reactor.block_on(graph.open(&probed(&path))).unwrap();
        let chain = graph.root(&name).unwrap().chain();
        assert_eq!(chain.top().format.name(), "raw");
        assert_eq!(chain.size(), (bytes.len() as u64).next_multiple_of(512));
        drop(View::of(chain));
    }
}
