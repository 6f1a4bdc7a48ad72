//! Random operations, many in flight, on images of many shapes, against the model; with copies
//! from below as a stream makes them. What would be caught: lost and torn writes, copy-on-write
//! that takes a neighbour's bytes, mappings that differ from `qemu-img`'s understanding, streams
//! that overwrite the guest, leaked clusters after a clean close.

use std::rc::Rc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use stratablk::chain::Span;

use crate::model::{Kind, Model, SECTOR, operate, seed};
use crate::support::*;

pub const SIZE: usize = 8 << 20;

/// Patterned bytes with whole areas of zeros.
fn pattern(rng: &mut StdRng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for area in bytes.chunks_mut(48 << 10) {
        if rng.random_bool(0.6) {
            let value: u8 = rng.random_range(1..=255);
            area.fill(value);
        }
    }
    bytes
}

/// Runs `count` operations with `depth` in flight.
pub fn workload(
    disk: Disk,
    bytes: Vec<u8>,
    count: usize,
    seed: u64,
    stream: bool,
) -> (Disk, Vec<u8>) {
    workload_of(disk, bytes, count, seed, stream, 1)
}

/// As [`workload`], of a guest whose blocks have `grain` sectors.
pub fn workload_of(
    disk: Disk,
    bytes: Vec<u8>,
    count: usize,
    seed: u64,
    stream: bool,
    grain: usize,
) -> (Disk, Vec<u8>) {
    let model = Model::new(bytes, seed);
    model.borrow_mut().grain = grain;
    let disk = Rc::new(disk);
    let mut rng = StdRng::seed_from_u64(seed ^ 1);
    let reactor = disk.reactor.clone();
    for round in 0..count / 32 {
        for _ in 0..32 {
            let kind = match rng.random_range(0..20) {
                0..7 => Kind::Write,
                7..14 => Kind::Read,
                14 => Kind::Zero,
                15 => Kind::Unmap,
                16..18 => Kind::Discard,
                _ => Kind::Flush,
            };
            let (disk, model) = (disk.clone(), model.clone());
            reactor.spawn(async move { operate(&disk, &model, kind, seed).await });
        }
        if stream && round % 4 == 0 {
            let disk = disk.clone();
            let offset = rng.random_range(0..SIZE as u64);
            reactor.spawn(async move {
                let end = disk.root.chain().layers().len();
                let len = (512 << 10).min(disk.size() - offset);
                let span = Span::new(0, end).compressed(round % 8 == 0);
                disk.view().copy(span, offset, len).await.unwrap();
            });
        }
        while reactor.tasks() > 0 {
            if !reactor.turn() {
                reactor.wait(None);
            }
        }
    }
    let disk = Rc::into_inner(disk).unwrap();
    let whole = disk.read(0, disk.size() as usize);
    let mut model = model.borrow_mut();
    model.verify(0, &whole, seed);
    let bytes = model.bytes.clone();
    (disk, bytes)
}

fn standalone(options: &str, size: usize) {
    let seed = seed();
    println!("seed {seed}");
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, options, size as u64);
    let disk = Disk::open(&path, "qcow2", json!({}));
    let (disk, bytes) = workload(disk, vec![0; size], 2000, seed, false);
    disk.close();
    check(&path, false);
    compare(&path, "qcow2", &bytes);
}

#[test]
fn standalone_images_of_every_shape() {
    for (version, cluster, width) in [
        ("1.1", "512", 16),
        ("0.10", "4k", 16),
        ("0.10", "64k", 16),
        ("1.1", "4k", 1),
        ("1.1", "512", 64),
        ("1.1", "64k", 64),
        ("1.1", "2M", 1),
        ("1.1", "64k", 8),
    ] {
        println!("compat={version},cluster_size={cluster},refcount_bits={width}");
        let options = format!("compat={version},cluster_size={cluster},refcount_bits={width}");
        standalone(&options, SIZE + 3 * SECTOR);
    }
    standalone("extended_l2=on,cluster_size=16k", SIZE + 3 * SECTOR);
    standalone("extended_l2=on,cluster_size=128k", SIZE + 3 * SECTOR);
}

fn overlay(options: &str, compress: bool, stream: bool, copy_on_read: bool) {
    let seed = seed();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let (raw, base, middle, top) = (
        in_dir(&dir, "base.raw"),
        in_dir(&dir, "base.qcow2"),
        in_dir(&dir, "middle.qcow2"),
        in_dir(&dir, "top.qcow2"),
    );
    // The base is shorter than the disk: what lies past its end is zero.
    let mut bytes = pattern(&mut rng, SIZE - (1 << 20));
    std::fs::write(&raw, &bytes).unwrap();
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
    if compress {
        args.extend(["-c", "-o", "cluster_size=16k,compression_type=zstd"]);
    }
    args.extend([raw.to_str().unwrap(), base.to_str().unwrap()]);
    run("qemu-img", &args);
    create_over(&middle, "cluster_size=4k", &base, "qcow2");
    bytes.resize(SIZE, 0);
    run(
        "qemu-img",
        &["resize", "-q", middle.to_str().unwrap(), &SIZE.to_string()],
    );
    for _ in 0..20 {
        let (start, len) = (
            rng.random_range(0..SIZE / SECTOR - 64),
            rng.random_range(1..64),
        );
        let (at, len) = (start * SECTOR, len * SECTOR);
        let write = format!("write -q -P 77 {at} {len}");
        run(
            "qemu-io",
            &["-f", "qcow2", "-c", &write, middle.to_str().unwrap()],
        );
        bytes[at..at + len].fill(77);
    }
    create_over(&top, options, &middle, "qcow2");
    let disk = Disk::open(&top, "qcow2", json!({"copy-on-read": copy_on_read}));
    assert_eq!(disk.root.chain().layers().len(), 3);
    let (disk, bytes) = workload(disk, bytes, 2000, seed, stream);
    disk.close();
    check(&top, false);
    compare(&top, "qcow2", &bytes);
}

#[test]
fn overlays() {
    overlay("", false, false, false);
    overlay("compat=0.10", true, false, false);
    overlay("cluster_size=4k", true, false, true);
    overlay("cluster_size=2M", false, false, false);
    overlay("extended_l2=on,cluster_size=32k", true, false, false);
    overlay("extended_l2=on,cluster_size=2M", false, false, true);
}

#[test]
fn overlays_while_streaming() {
    for options in [
        "",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "compression_type=zstd,cluster_size=16k",
        "refcount_bits=1",
    ] {
        overlay(options, true, true, false);
    }
}

#[test]
fn whole_stream_stands_alone() {
    let seed = seed();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (in_dir(&dir, "base.raw"), in_dir(&dir, "top.qcow2"));
    let bytes = pattern(&mut rng, SIZE);
    std::fs::write(&base, &bytes).unwrap();
    create_over(&top, "", &base, "raw");
    let disk = Disk::open(&top, "qcow2", json!({}));
    let (disk, bytes) = workload(disk, bytes, 500, seed, false);
    let size = disk.size();
    disk.reactor.block_on(async {
        let mut at = 0;
        while at < size {
            let now = (size - at).min(512 << 10);
            disk.view().copy(Span::new(0, 2), at, now).await.unwrap();
            at += now;
        }
        let chain = disk.root.chain();
        let stratablk::format::Format::Qcow2(image) = &chain.top().format else {
            panic!()
        };
        image.set_backing(None).await.unwrap();
    });
    disk.graph.set_backing(&disk.name, None).unwrap();
    assert_eq!(disk.root.chain().layers().len(), 1);
    disk.close();
    std::fs::remove_file(&base).unwrap();
    check(&top, false);
    compare(&top, "qcow2", &bytes);
}

#[test]
fn the_image_is_locked_against_qemu_and_theirs_against_us() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "compat=1.1", 1 << 20);
    let disk = Disk::open(&path, "qcow2", json!({}));
    let theirs = output(
        "qemu-io",
        &["-f", "qcow2", "-c", "write 0 512", path.to_str().unwrap()],
    );
    assert!(!theirs.status.success(), "qemu-io wrote to an image in use");
    assert!(String::from_utf8_lossy(&theirs.stderr).contains("lock"));
    let second = Disk::try_open(&path, "qcow2", json!({}));
    assert!(
        second
            .err()
            .unwrap()
            .to_string()
            .contains("Is another process using the image")
    );
    disk.close();
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write 0 512", path.to_str().unwrap()],
    );
}
