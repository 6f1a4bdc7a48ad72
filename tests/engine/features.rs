//! Features that few images have: internal snapshots, data files, persistent bitmaps, damage.
//!
//! What would be caught: a write through to a snapshot's clusters, a shared L2 table changed in
//! place, a raw data file that differs from the disk, bitmaps that claim to be up to date after
//! writes they did not see, guest data over the image's own tables.

use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::json;
use stratablk::chain::Span;

use crate::model::{SECTOR, seed};
use crate::random::{SIZE, workload};
use crate::support::*;

fn qemu_io(path: &Path, command: &str) {
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", command, path.to_str().unwrap()],
    );
}

fn qemu_img(args: &[&str], path: &Path) -> String {
    let args: Vec<&str> = args
        .iter()
        .copied()
        .chain([path.to_str().unwrap()])
        .collect();
    run("qemu-img", &args)
}

fn with_snapshots(options: &str) {
    let seed = seed();
    println!("seed {seed}: {options}");
    let dir = tempfile::tempdir().unwrap();
    let (path, kept) = (in_dir(&dir, "image.qcow2"), in_dir(&dir, "kept.raw"));
    create(&path, options, SIZE as u64);
    let mut bytes = vec![0; SIZE];
    for (value, start, len) in [(1, 0, 3 << 20), (2, 5 << 20, 1 << 20)] {
        qemu_io(&path, &format!("write -q -P {value} {start} {len}"));
        bytes[start..start + len].fill(value);
    }
    let before = bytes.clone();
    qemu_img(&["snapshot", "-c", "one"], &path);
    let disk = Disk::open(&path, "qcow2", json!({}));
    let (disk, bytes) = workload(disk, bytes, 1000, seed, false);
    disk.close();
    check(&path, false);
    compare(&path, "qcow2", &bytes);
    qemu_img(&["snapshot", "-c", "two"], &path);
    let disk = Disk::open(&path, "qcow2", json!({}));
    let (disk, bytes) = workload(disk, bytes, 500, seed ^ 9, false);
    disk.close();
    check(&path, false);
    compare(&path, "qcow2", &bytes);
    let (from, to) = (path.to_str().unwrap(), kept.to_str().unwrap());
    run("qemu-img", &["convert", "-l", "one", "-O", "raw", from, to]);
    assert!(
        std::fs::read(&kept).unwrap() == before,
        "the snapshot was changed"
    );
    // Without the snapshots everything is ours again, and nothing is left over.
    qemu_img(&["snapshot", "-d", "one"], &path);
    qemu_img(&["snapshot", "-d", "two"], &path);
    let disk = Disk::open(&path, "qcow2", json!({}));
    let (disk, bytes) = workload(disk, bytes, 500, seed ^ 5, false);
    disk.close();
    check(&path, false);
    compare(&path, "qcow2", &bytes);
}

#[test]
fn snapshots_stay_as_they_were() {
    with_snapshots("cluster_size=4k");
    with_snapshots("cluster_size=64k,compat=0.10");
    with_snapshots("cluster_size=16k,extended_l2=on");
    with_snapshots("cluster_size=512,refcount_bits=64");
}

fn with_data_file(raw: bool, more: &str) {
    let seed = seed();
    println!("seed {seed}: raw {raw} {more}");
    let dir = tempfile::tempdir().unwrap();
    let (path, data) = (in_dir(&dir, "image.qcow2"), in_dir(&dir, "data.raw"));
    let raw_option = if raw { "on" } else { "off" };
    let options = format!(
        "data_file={},data_file_raw={raw_option}{more}",
        data.display()
    );
    create(&path, &options, SIZE as u64);
    let mut bytes = vec![0; SIZE];
    qemu_io(&path, "write -q -P 3 1M 1M");
    bytes[1 << 20..2 << 20].fill(3);
    let disk = Disk::open(&path, "qcow2", json!({}));
    let (disk, bytes) = workload(disk, bytes, 2000, seed, false);
    disk.close();
    check(&path, false);
    compare(&path, "qcow2", &bytes);
    if raw {
        let mut alone = std::fs::read(&data).unwrap();
        alone.resize(SIZE, 0);
        assert!(
            alone == bytes,
            "seed {seed}: the data file is no raw image of the disk"
        );
    }
}

#[test]
fn data_files_hold_the_guests_data() {
    with_data_file(false, "");
    with_data_file(true, "");
    with_data_file(true, ",cluster_size=16k,extended_l2=on");
}

#[test]
fn a_data_file_that_is_missing_or_too_much_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (path, data) = (in_dir(&dir, "image.qcow2"), in_dir(&dir, "data.raw"));
    create(&path, &format!("data_file={}", data.display()), 1 << 20);
    std::fs::remove_file(&data).unwrap();
    let text = |result: stratablk::error::Result<Disk>| result.err().unwrap().to_string();
    let error = text(Disk::try_open(&path, "qcow2", json!({})));
    assert!(
        error.contains("data file") && error.contains("data.raw"),
        "{error}"
    );
    std::fs::write(&data, vec![0; SECTOR]).unwrap();
    create(&path, "compat=1.1", 1 << 20);
    let more = json!({"data-file": {"driver": "file", "filename": data.to_str().unwrap()}});
    let error = text(Disk::try_open(&path, "qcow2", more));
    assert!(error.contains("'data-file' can only be set"), "{error}");
}

#[test]
fn bitmaps_that_track_writes_are_marked_and_others_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "compat=1.1", SIZE as u64);
    let image = path.to_str().unwrap();
    run("qemu-img", &["bitmap", "--add", image, "tracking"]);
    run(
        "qemu-img",
        &["bitmap", "--add", "--disable", image, "frozen"],
    );
    let disk = Disk::open(&path, "qcow2", json!({}));
    let (disk, bytes) = workload(disk, vec![0; SIZE], 200, seed(), false);
    disk.close();
    check(&path, false);
    compare(&path, "qcow2", &bytes);
    let info: serde_json::Value =
        serde_json::from_str(&qemu_img(&["info", "--output=json"], &path)).unwrap();
    let bitmaps = info["format-specific"]["data"]["bitmaps"]
        .as_array()
        .unwrap();
    let flags = |name: &str| {
        let bitmap = bitmaps
            .iter()
            .find(|bitmap| bitmap["name"] == name)
            .unwrap();
        bitmap["flags"].as_array().unwrap().clone()
    };
    assert!(flags("tracking").contains(&json!("in-use")), "{bitmaps:?}");
    assert!(flags("frozen").is_empty(), "{bitmaps:?}");
}

/// Word `index` of the table whose offset is at `field` in the header.
fn table_word(image: &std::fs::File, field: u64, index: u64) -> u64 {
    let mut word = [0; 8];
    image.read_exact_at(&mut word, field).unwrap();
    let table = u64::from_be_bytes(word);
    image.read_exact_at(&mut word, table + index * 8).unwrap();
    u64::from_be_bytes(word) & 0x00ff_ffff_ffff_fe00
}

#[test]
fn the_images_own_tables_are_never_given_to_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "cluster_size=4k", SIZE as u64);
    qemu_io(&path, "write -q -P 3 0 1M");
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let table = table_word(&file, 40, 0);
    // The L2 table's refcount becomes 0: it looks free.
    let block = table_word(&file, 48, 0);
    file.write_all_at(&[0, 0], block + table / 4096 * 2)
        .unwrap();
    let disk = Disk::open(&path, "qcow2", json!({}));
    let (disk, bytes) = workload(
        disk,
        {
            let mut bytes = vec![0; SIZE];
            bytes[..1 << 20].fill(3);
            bytes
        },
        500,
        seed(),
        false,
    );
    drop(disk);
    assert!(bytes.len() == SIZE);
    // A guest cluster is mapped to the L1 table.
    let mut l1 = [0; 8];
    file.read_exact_at(&mut l1, 40).unwrap();
    create(&path, "cluster_size=4k", SIZE as u64);
    qemu_io(&path, "write -q -P 3 0 1M");
    let table = table_word(&file, 40, 0);
    let l1 = u64::from_be_bytes(l1);
    file.write_all_at(&(l1 | 1 << 63).to_be_bytes(), table)
        .unwrap();
    let before = std::fs::read(&path).unwrap();
    let disk = Disk::open(&path, "qcow2", json!({}));
    let error = disk.try_write(0, &[9; 512]).unwrap_err().to_string();
    assert!(error.contains("L1 table"), "{error}");
    assert!(before == std::fs::read(&path).unwrap(), "it was written to");
}

/// What would be caught: a table misread, zeros taken for holes, a backing file not followed.
#[test]
fn qed_images_are_read_and_streamed_from() {
    let dir = tempfile::tempdir().unwrap();
    let (base, qed, top) = (
        in_dir(&dir, "base.raw"),
        in_dir(&dir, "middle.qed"),
        in_dir(&dir, "top.qcow2"),
    );
    let mut bytes = vec![7; SIZE];
    std::fs::write(&base, &bytes).unwrap();
    let (from, middle) = (base.to_str().unwrap(), qed.to_str().unwrap());
    let options = "cluster_size=4096";
    run(
        "qemu-img",
        &[
            "create", "-q", "-f", "qed", "-b", from, "-F", "raw", "-o", options, middle,
        ],
    );
    for (command, value, start, len) in [
        ("write -q -P 1", 1, 512, 70_000),
        ("write -q -P 2", 2, 3 << 20, 1 << 20),
        ("write -q -z", 0, 5 << 20, 1 << 20),
    ] {
        let command = format!("{command} {start} {len}");
        run("qemu-io", &["-f", "qed", "-c", &command, middle]);
        bytes[start..start + len].fill(value);
    }
    let disk = Disk::open(&qed, "qed", json!({"read-only": true}));
    assert!(disk.read(0, SIZE) == bytes, "as the top layer");
    drop(disk);
    let error = Disk::try_open(&qed, "qed", json!({})).err().unwrap();
    assert!(error.to_string().contains("only read"), "{error}");
    create_over(&top, "", &qed, "qed");
    let disk = Disk::open(&top, "qcow2", json!({}));
    assert_eq!(disk.root.chain().layers().len(), 3);
    let (disk, bytes) = workload(disk, bytes, 500, seed(), true);
    disk.close();
    check(&top, false);
    compare(&top, "qcow2", &bytes);
}

/// What would be caught: clusters that QEMU cannot decompress, or that are not shared at all.
#[test]
fn a_compressed_stream_is_small_and_qemu_reads_it() {
    for options in [
        "cluster_size=64k",
        "cluster_size=64k,compression_type=zstd",
        "cluster_size=4k,compat=0.10",
        "cluster_size=64k,extended_l2=on",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (in_dir(&dir, "base.raw"), in_dir(&dir, "top.qcow2"));
        // Numbers in text: what compresses, with matches near and far.
        let text: Vec<u8> = (0u32..)
            .flat_map(|i| i.to_string().into_bytes())
            .take(SIZE)
            .collect();
        std::fs::write(&base, &text).unwrap();
        create_over(&top, options, &base, "raw");
        let disk = Disk::open(&top, "qcow2", json!({}));
        disk.reactor.block_on(async {
            for at in (0..SIZE as u64).step_by(1 << 20) {
                disk.view()
                    .copy(Span::new(0, 2).compressed(true), at, 1 << 20)
                    .await
                    .unwrap();
            }
        });
        disk.close();
        check(&top, false);
        compare(&top, "qcow2", &text);
        let size = std::fs::metadata(&top).unwrap().len();
        assert!(size < SIZE as u64 * 4 / 5, "{options}: {size} bytes");
        let disk = Disk::open(&top, "qcow2", json!({}));
        let (disk, bytes) = workload(disk, text, 300, seed(), false);
        disk.close();
        check(&top, false);
        compare(&top, "qcow2", &bytes);
    }
}

/// What would be caught: a discard or zeroes up to the disk's end that fail where the last cluster
/// is compressed and reaches behind it.
#[test]
fn the_last_cluster_is_cleared_though_the_disk_ends_within_it() {
    const SIZE: usize = 5 << 15;
    for options in ["cluster_size=64k", "cluster_size=64k,extended_l2=on"] {
        for zeroes in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (base, top) = (in_dir(&dir, "base.raw"), in_dir(&dir, "top.qcow2"));
            let mut bytes = vec![7; SIZE];
            std::fs::write(&base, &bytes).unwrap();
            let names = [base.to_str().unwrap(), top.to_str().unwrap()];
            let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
            run("qemu-img", &[&convert[..], &names[..]].concat());
            let disk = Disk::open(&top, "qcow2", json!({}));
            let (at, len) = (1 << 16, SIZE as u64 - (1 << 16));
            let cleared = disk.reactor.block_on(async {
                match zeroes {
                    true => disk.view().write_zeroes(at, len, true).await,
                    false => disk.view().discard(at, len).await,
                }
            });
            cleared.unwrap_or_else(|error| panic!("{options}, zeroes: {zeroes}: {error}"));
            disk.close();
            bytes[at as usize..].fill(0);
            check(&top, false);
            compare(&top, "qcow2", &bytes);
        }
    }
}

/// What would be caught: a copy from below that takes the place of a snapshot's cluster, and
/// shifts or loses what the cluster held.
#[test]
fn a_copy_into_a_snapshots_cluster_keeps_the_rest_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (in_dir(&dir, "base.raw"), in_dir(&dir, "top.qcow2"));
    let mut bytes: Vec<u8> = (0..1 << 20)
        .map(|i: usize| (i / SECTOR % 251) as u8)
        .collect();
    std::fs::write(&base, &bytes).unwrap();
    create_over(&path, "cluster_size=16k,extended_l2=on", &base, "raw");
    qemu_io(&path, "write -q -P 255 16384 2048");
    bytes[16384..][..2048].fill(255);
    qemu_img(&["snapshot", "-c", "one"], &path);
    for (offset, len) in [(20480, 1024), (16384, 65536)] {
        let disk = Disk::open(&path, "qcow2", json!({}));
        let view = disk.view();
        let copied = disk
            .reactor
            .block_on(view.copy(Span::new(0, 2), offset, len));
        assert!(copied.unwrap().data > 0);
        drop(view);
        disk.close();
        check(&path, false);
        compare(&path, "qcow2", &bytes);
    }
}
