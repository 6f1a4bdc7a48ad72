//! Images of every shape, made by `qemu-img` and read through us; then written by us and read
//! by `qemu-io`. What would be caught: a cluster size, refcount width, version or compression
//! whose layout we misread or miswrite.

use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

use crate::support::*;

const SIZE: usize = 5 << 20;

/// Bytes that compress, bytes that do not, and holes.
fn pattern(rng: &mut StdRng) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    for area in bytes.chunks_mut(100_000) {
        match rng.random_range(0..3) {
            0 => {}
            1 => area.fill(rng.random()),
            _ => rng.fill(area),
        }
    }
    bytes
}

fn shapes() -> Vec<(String, bool)> {
    let mut shapes = Vec::new();
    for cluster in ["512", "4k", "64k", "2M"] {
        for compressed in [false, true] {
            shapes.push((format!("compat=0.10,cluster_size={cluster}"), compressed));
            for width in [1, 16, 64] {
                let options = format!("compat=1.1,cluster_size={cluster},refcount_bits={width}");
                shapes.push((options.clone(), compressed));
                if compressed {
                    shapes.push((format!("{options},compression_type=zstd"), true));
                }
            }
        }
    }
    for cluster in ["16k", "64k", "2M"] {
        for compressed in [false, true] {
            let options = format!("extended_l2=on,cluster_size={cluster}");
            shapes.push((options, compressed));
        }
    }
    shapes
}

fn one_shape(dir: &Path, raw: &Path, bytes: &[u8], options: &str, compressed: bool) {
    println!("{options}, compressed: {compressed}");
    let path = dir.join("image.qcow2");
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
    if compressed {
        args.push("-c");
    }
    args.extend([raw.to_str().unwrap(), path.to_str().unwrap()]);
    run("qemu-img", &args);
    let disk = Disk::open(&path, "qcow2", json!({}));
    assert!(
        disk.read(0, SIZE) == bytes,
        "{options}, compressed: {compressed}: read"
    );
    // Over data, over zeros, across clusters; whatever is compressed is written over in parts.
    let mut bytes = bytes.to_vec();
    for (index, (offset, len)) in [
        (512, 1024),
        (65_536 - 512, 2048),
        (1 << 20, 300_032),
        (SIZE - 4096, 4096),
    ]
    .into_iter()
    .enumerate()
    {
        bytes[offset..offset + len].fill(0xa0 + index as u8);
        disk.try_write(offset as u64, &bytes[offset..offset + len])
            .unwrap();
    }
    assert!(
        disk.read(0, SIZE) == bytes,
        "{options}, compressed: {compressed}: read back"
    );
    disk.close();
    check(&path, false);
    compare(&path, "qcow2", &bytes);
    for (index, (offset, len)) in [(512, 1024), (1 << 20, 300_032)].into_iter().enumerate() {
        let command = format!("read -P {} {offset} {len}", 0xa0 + index * 2);
        run(
            "qemu-io",
            &["-r", "-f", "qcow2", "-c", &command, path.to_str().unwrap()],
        );
    }
}

#[test]
fn images_of_every_shape_are_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let raw = in_dir(&dir, "raw");
    let bytes = pattern(&mut StdRng::seed_from_u64(7));
    std::fs::write(&raw, &bytes).unwrap();
    for (options, compressed) in shapes() {
        one_shape(dir.path(), &raw, &bytes, &options, compressed);
    }
}

/// What would be caught: a refcount table that does not grow, or loses the old one's entries.
#[test]
fn the_refcount_table_grows() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "cluster_size=512,refcount_bits=64", 24 << 20);
    let disk = Disk::open(&path, "qcow2", json!({}));
    let before = reftable(&disk);
    let mut bytes = vec![0; 24 << 20];
    for (index, part) in bytes.chunks_mut(1 << 20).enumerate() {
        part.fill(index as u8 + 1);
        disk.try_write((index << 20) as u64, part).unwrap();
        disk.reactor.block_on(disk.root.chain().flush()).unwrap();
    }
    assert_ne!(reftable(&disk), before, "the table was to move");
    disk.close();
    check(&path, false);
    compare(&path, "qcow2", &bytes);
}

fn reftable(disk: &Disk) -> u64 {
    match &disk.root.chain().top().format {
        stratablk::format::Format::Qcow2(image) => image.header().reftable_offset,
        _ => panic!("not qcow2"),
    }
}
