//! `resize`. What would be caught: data lost or brought to light, a new part that does not read as
//! zeros, clusters leaked or still in use above the new end, an L1 table that was not moved, a
//! file that stays as long as it was.

use super::bitmaps::{AUTO, Bitmap, IN_USE, bitmaps, resized};
use super::tools::{Dir, errors, rng};
use rand::Rng;
use std::os::unix::fs::MetadataExt;

const MIB: u64 = 1 << 20;

/// Compares an image with what it should read as, and has it checked.
fn reads(dir: &Dir, file: &str, expected: &[u8]) {
    dir.check(file);
    assert!(
        dir.read("qcow2", file) == expected,
        "{file} reads differently"
    );
}

#[test]
fn images_grow_and_shrink() {
    let mut rng = rng();
    for options in [
        "compat=1.1",
        "compat=0.10,cluster_size=4k",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=2M",
        "extended_l2=on,cluster_size=16k",
        "data_file=d.raw",
        "data_file=d.raw,data_file_raw=on",
    ] {
        println!("{options}");
        let dir = Dir::new();
        dir.qemu(&["create", "-q", "-f", "qcow2", "-o", options, "image", "5M"]);
        let mut size = 5 * MIB;
        for _ in 0..6 {
            dir.scribble("qcow2", "image", size, &mut rng);
            let mut bytes = dir.read("qcow2", "image");
            // Not at cluster boundaries.
            size = rng.random_range(1..16 * MIB / 512) * 512;
            dir.ctl(&["resize", "--shrink", "image", &size.to_string()]);
            bytes.resize(size as usize, 0);
            reads(&dir, "image", &bytes);
        }
        if options.starts_with("data_file") {
            let data = std::fs::metadata(dir.path("d.raw")).unwrap().len();
            assert_eq!(data, size);
        }
    }
}

#[test]
fn a_small_l1_table_is_moved() {
    let mut rng = rng();
    let dir = Dir::new();
    let options = "cluster_size=512,refcount_bits=64";
    dir.qemu(&["create", "-q", "-f", "qcow2", "-o", options, "image", "1M"]);
    dir.scribble("qcow2", "image", MIB, &mut rng);
    let before = dir.read("qcow2", "image");
    // 64 Ki entries: a table of 1024 clusters, with refcount blocks of 64.
    dir.ctl(&["resize", "image", "2G"]);
    dir.check("image");
    dir.io(
        "qcow2",
        "image",
        &["write -q -P 9 2147418112 64k".to_owned()],
    );
    dir.check("image");
    dir.ctl(&["resize", "--shrink", "image", "1M"]);
    reads(&dir, "image", &before);
}

/// The part that an overlay gets must not show what a longer backing file has there.
#[test]
fn a_longer_backing_file_stays_hidden() {
    let mut rng = rng();
    for options in [
        "compat=1.1",
        "compat=0.10",
        "extended_l2=on",
        "cluster_size=2M",
    ] {
        let dir = Dir::new();
        dir.qemu(&["create", "-q", "-f", "raw", "base.raw", "8M"]);
        dir.io("raw", "base.raw", &["write -q -P 7 0 8M".to_owned()]);
        let args = [
            "create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw",
        ];
        dir.qemu(&[&args[..], &["image", "3001k"]].concat());
        dir.scribble("qcow2", "image", 3000 << 10, &mut rng);
        let mut bytes = dir.read("qcow2", "image");
        dir.ctl(&["resize", "image", "+4M"]);
        bytes.resize(bytes.len() + 4 * MIB as usize, 0);
        reads(&dir, "image", &bytes);
        dir.ctl(&["resize", "--shrink", "image", "-5M"]);
        bytes.truncate(bytes.len() - 5 * MIB as usize);
        reads(&dir, "image", &bytes);
        dir.ctl(&["resize", "image", "9M"]);
        bytes.resize(9 * MIB as usize, 0);
        reads(&dir, "image", &bytes);
    }
}

/// What another program left in the rest of the last cluster.
#[test]
fn old_contents_of_the_last_cluster_stay_hidden() {
    for options in ["compat=1.1", "extended_l2=on", "compat=0.10"] {
        for compressed in [false, true] {
            let dir = Dir::new();
            dir.qemu(&["create", "-q", "-f", "raw", "base.raw", "2M"]);
            dir.io("raw", "base.raw", &["write -q -P 7 0 2M".to_owned()]);
            let mut args = vec!["convert", "-O", "qcow2", "-o", options, "base.raw", "image"];
            if compressed {
                args.insert(1, "-c");
            }
            dir.qemu(&args);
            dir.qemu(&["resize", "-q", "--shrink", "image", "1000k"]);
            dir.ctl(&["resize", "image", "2M"]);
            let mut bytes = vec![7; 1000 << 10];
            bytes.resize(2 * MIB as usize, 0);
            reads(&dir, "image", &bytes);
        }
    }
}

/// An image whose size was changed by hand has mappings above its end.
#[test]
fn what_is_mapped_above_the_end_stays_hidden() {
    for options in ["compat=1.1", "extended_l2=on", "cluster_size=512"] {
        let dir = Dir::new();
        dir.qemu(&["create", "-q", "-f", "qcow2", "-o", options, "image", "5M"]);
        dir.io("qcow2", "image", &["write -q -P 7 0 5M".to_owned()]);
        patch(&dir, "image", 24, &(MIB + 512).to_be_bytes());
        dir.ctl(&["resize", "image", "4M"]);
        let mut bytes = vec![7; MIB as usize + 512];
        bytes.resize(4 * MIB as usize, 0);
        reads(&dir, "image", &bytes);
    }
}

#[test]
fn space_is_allocated_ahead() {
    for (mode, present, blocks) in [
        ("metadata", true, 0),
        ("falloc", true, 8192),
        ("full", true, 8192),
    ] {
        for options in ["compat=1.1", "extended_l2=on", "data_file=d.raw"] {
            let dir = Dir::new();
            dir.qemu(&["create", "-q", "-f", "qcow2", "-o", options, "image", "1M"]);
            dir.ctl(&["resize", "--preallocation", mode, "image", "5M"]);
            reads(&dir, "image", &vec![0; 5 * MIB as usize]);
            let map = dir.qemu_json(&["map", "--output=json", "image"]);
            let last = map.as_array().unwrap().last().unwrap().clone();
            let end = last["start"].as_u64().unwrap() + last["length"].as_u64().unwrap();
            assert_eq!(end, 5 * MIB);
            assert_eq!(last["offset"].is_u64(), present, "{options} {mode}: {map}");
            let data = if options.starts_with("data") {
                "d.raw"
            } else {
                "image"
            };
            let file = std::fs::metadata(dir.path(data)).unwrap();
            assert!(
                file.blocks() >= blocks,
                "{options} {mode}: {}",
                file.blocks()
            );
        }
    }
    let dir = Dir::new();
    dir.ctl(&["create", "disk.raw", "1M"]);
    dir.ctl(&[
        "resize",
        "-f",
        "raw",
        "--preallocation",
        "full",
        "disk.raw",
        "+1M",
    ]);
    let file = std::fs::metadata(dir.path("disk.raw")).unwrap();
    assert_eq!((file.len(), file.blocks() >= 2048), (2 * MIB, true));
}

#[test]
fn a_smaller_image_has_a_smaller_file() {
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "qcow2", "image", "8M"]);
    dir.io("qcow2", "image", &["write -q -P 3 0 8M".to_owned()]);
    dir.ctl(&["resize", "--shrink", "image", "1M"]);
    reads(&dir, "image", &vec![3; MIB as usize]);
    let file = std::fs::metadata(dir.path("image")).unwrap();
    assert!(file.len() < 2 * MIB, "{} bytes", file.len());
}

#[test]
fn snapshots_keep_what_they_had() {
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "qcow2", "image", "4M"]);
    dir.io("qcow2", "image", &["write -q -P 3 0 4M".to_owned()]);
    dir.qemu(&["snapshot", "-c", "one", "image"]);
    dir.ctl(&["resize", "--shrink", "image", "1000k"]);
    reads(&dir, "image", &vec![3; 1000 << 10]);
    dir.ctl(&["resize", "image", "6M"]);
    dir.check("image");
    let mut bytes = vec![3; 1000 << 10];
    bytes.resize(6 * MIB as usize, 0);
    reads(&dir, "image", &bytes);
    dir.qemu(&["convert", "-l", "one", "-O", "raw", "image", "kept.raw"]);
    // It is told with the size that the disk has now.
    let kept = std::fs::read(dir.path("kept.raw")).unwrap();
    assert!(kept[..4 * MIB as usize].iter().all(|&byte| byte == 3));
}

fn bitmaps_of(dir: &Dir, file: &str) -> Vec<Bitmap> {
    bitmaps(&std::fs::read(dir.path(file)).unwrap())
}

/// Changes bytes of an image.
fn patch(dir: &Dir, file: &str, at: usize, bytes: &[u8]) {
    let path = dir.path(file);
    let mut image = std::fs::read(&path).unwrap();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    std::fs::write(path, image).unwrap();
}

/// What would be caught beside: bits that are lost, or set for what nobody wrote; a bitmap of the
/// wrong length, for which QEMU refuses the image; one that has tracked everything and is out of
/// date afterwards, or the other way round; its clusters leaked.
#[test]
fn bitmaps_follow_the_size() {
    let mut rng = rng();
    for (cluster, more, granularity) in [
        (512, "", 512),
        (4096, "", 4096),
        (65536, "", 65536),
        (65536, ",data_file=d.raw", 512),
    ] {
        let options = &format!("cluster_size={cluster}{more}");
        println!("{options}");
        let dir = Dir::new();
        dir.qemu(&["create", "-q", "-f", "qcow2", "-o", options, "image", "5M"]);
        for name in ["tracking", "all", "frozen", "stale"] {
            let granularity = granularity.to_string();
            dir.qemu(&["bitmap", "--add", "-g", &granularity, "image", name]);
        }
        // All bits are set, without a cluster that says so.
        let all = &bitmaps_of(&dir, "image")[1];
        for entry in 0..all.bits.len() / 8 / cluster as usize {
            patch(&dir, "image", all.table + entry * 8 + 7, &[1]);
        }
        dir.scribble("qcow2", "image", 5 * MIB, &mut rng);
        dir.qemu(&["bitmap", "--disable", "image", "frozen"]);
        let stale = &bitmaps_of(&dir, "image")[3];
        patch(&dir, "image", stale.entry + 15, &[3]);
        let mut size = 5 * MIB;
        for _ in 0..5 {
            let before = bitmaps_of(&dir, "image");
            assert_eq!(before[0].flags, AUTO);
            assert!(before[0].bits.contains(&true), "nothing was tracked");
            let new = rng.random_range(1..16 * MIB / 512) * 512;
            println!("{size} to {new}");
            dir.ctl(&["resize", "--shrink", "image", &new.to_string()]);
            dir.check("image");
            let after = bitmaps_of(&dir, "image");
            for (before, after) in before.iter().zip(&after) {
                assert_eq!((&before.name, before.flags), (&after.name, after.flags));
                let stale = before.flags & IN_USE != 0;
                let bits = resized(before, size, new, cluster);
                assert!(stale || after.bits == bits, "'{}'", before.name);
            }
            assert_eq!(after.len(), 4);
            size = new;
            // Which QEMU takes for its own.
            dir.scribble("qcow2", "image", size, &mut rng);
        }
        for name in ["tracking", "all", "frozen", "stale"] {
            dir.qemu(&["bitmap", "--remove", "image", name]);
        }
        dir.check("image");
    }
}

/// The header of this image has no room for another place of the directory, unless it gives up
/// the names of the features.
#[test]
fn a_full_header_gives_up_the_names_of_features() {
    let dir = Dir::new();
    let name = "n".repeat(100);
    let options = format!("data_file={name}");
    dir.qemu(&["create", "-q", "-f", "qcow2", "-o", &options, "image", "1M"]);
    dir.qemu(&["bitmap", "--add", "image", "one"]);
    dir.ctl(&["resize", "image", "2M"]);
    dir.check("image");
    assert_eq!(bitmaps_of(&dir, "image").len(), 1);
    assert_eq!(dir.read("qcow2", "image").len() as u64, 2 * MIB);
}

#[test]
fn what_cannot_be_resized_is_left_alone() {
    let dir = Dir::new();
    let refused = |args: &[&str], says: &str| {
        let file = dir.path(args[0]);
        let before = std::fs::read(&file).unwrap();
        let output = dir.image(&[&["resize"], args].concat());
        assert!(!output.status.success(), "{args:?}");
        assert!(
            errors(&output).contains(says),
            "{args:?}: {}",
            errors(&output)
        );
        assert!(
            std::fs::read(&file).unwrap() == before,
            "{args:?}: the file was changed"
        );
    };
    dir.qemu(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        "old",
        "1M",
    ]);
    dir.qemu(&["snapshot", "-c", "one", "old"]);
    refused(&["old", "2M"], "snapshots");
    dir.qemu(&["create", "-q", "-f", "qcow2", "tracked", "1M"]);
    dir.qemu(&["bitmap", "--add", "-g", "512", "tracked", "one"]);
    refused(&["tracked", "3T"], "bitmap 'one'");
    refused(&["tracked", "0", "--shrink"], "bitmap 'one'");
    // As many entries as such bits need, which is more than a bitmap may have.
    dir.qemu(&["create", "-q", "-f", "qcow2", "huge", "8T"]);
    dir.qemu(&["bitmap", "--add", "-g", "1M", "huge", "one"]);
    let entry = bitmaps_of(&dir, "huge")[0].entry;
    patch(&dir, "huge", entry + 8, &32768u32.to_be_bytes());
    patch(&dir, "huge", entry + 17, &[9]);
    refused(&["huge", "1M", "--shrink"], "bitmap 'one'");
    dir.qemu(&["create", "-q", "-f", "qcow2", "image", "1M"]);
    refused(&["image", "512k"], "shrink");
    refused(
        &["image", "512k", "--shrink", "--preallocation", "full"],
        "growing",
    );
    refused(&["image", "3E"], "too large");
    refused(&["image", "2X"], "expected");
    refused(&["image", "-2M"], "expected");
    dir.qemu(&["create", "-q", "-f", "raw", "disk.raw", "1M"]);
    refused(
        &["disk.raw", "2M", "-f", "raw", "--preallocation", "metadata"],
        "expected off",
    );
    let args = [
        "create", "-q", "-f", "qcow2", "-b", "image", "-F", "qcow2", "overlay",
    ];
    dir.qemu(&args);
    refused(
        &["overlay", "2M", "--preallocation", "falloc"],
        "extended_l2=on",
    );
}

/// What would be caught: a raw file that becomes longer where it was to become shorter, since sizes
/// are rounded up; one that is not as long as it is said to be.
#[test]
fn raw_files_get_the_size_that_qemu_gives_them() {
    let dir = Dir::new();
    let bytes: Vec<u8> = (0..1000u32).map(|n| n as u8 | 1).collect();
    for shrink in [true, false] {
        for size in [
            "900", "512", "1", "1000", "1010", "1024", "1500", "4096", "+100", "+0", "-100",
        ] {
            let file = |name| {
                std::fs::write(dir.path(name), &bytes).unwrap();
            };
            file("ours.raw");
            file("theirs.raw");
            let flags: &[&str] = if shrink { &["--shrink"] } else { &[] };
            let ours = dir.image(&[&["resize", "-f", "raw"], flags, &["ours.raw", size]].concat());
            let their = ["resize", "-f", "raw"];
            let theirs = dir.qemu_img(&[&their, flags, &["theirs.raw", "--", size]].concat());
            let context = format!("{size}, shrink {shrink}: {}", errors(&ours));
            assert_eq!(ours.status.success(), theirs.status.success(), "{context}");
            let read = |name| std::fs::read(dir.path(name)).unwrap();
            assert!(read("ours.raw") == read("theirs.raw"), "{context}");
        }
    }
    std::fs::write(dir.path("disk.raw"), &bytes).unwrap();
    let told = dir.ctl_json(&["resize", "-f", "raw", "--shrink", "disk.raw", "900"]);
    assert_eq!(told["virtual-size"], 900);
}
