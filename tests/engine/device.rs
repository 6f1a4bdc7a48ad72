//! Images on real block devices: loop devices, which need root. Without them these tests say so
//! and do nothing.
//!
//! What would be caught: a device that counts as full before QEMU's tools find it full; anything
//! behind its end; clusters of it that are taken for zeros; blocks of 4 KiB of which a part is
//! written; tools that take a device for a file; an image that QEMU made and we cannot go on with,
//! or the other way round.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::model::seed;
use crate::random::{SIZE, workload_of};
use crate::support::*;

const MIB: u64 = 1 << 20;

/// A loop device; it goes with the test.
struct Device {
    path: PathBuf,
    /// The file under it.
    file: PathBuf,
}

impl Device {
    /// A device of `len` bytes in blocks of `block`, on which there was something before. `None`:
    /// there are none here.
    fn new(dir: &tempfile::TempDir, name: &str, len: u64, block: u32) -> Option<Self> {
        let file = in_dir(dir, name);
        std::fs::write(&file, vec![0xd5; len as usize]).unwrap();
        let block = block.to_string();
        let made = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &block])
            .arg(&file)
            .output();
        let path = match made {
            Ok(output) if output.status.success() => {
                String::from_utf8(output.stdout).unwrap().trim().to_owned()
            }
            other => {
                println!("no loop device, so that nothing is tested: {other:?}");
                return None;
            }
        };
        Some(Self {
            path: path.into(),
            file,
        })
    }

    fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Makes it as long as `len` bytes.
    fn set_len(&self, len: u64) {
        let file = std::fs::OpenOptions::new().write(true).open(&self.file);
        file.unwrap().set_len(len).unwrap();
        run("losetup", &["--set-capacity", self.name()]);
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}

/// Bytes that are written at a time.
const STEP: u64 = 64 << 10;

/// Writes to an image with `qemu-io` until there is no space: how many bytes it has.
fn filled_by_qemu(path: &Path, size: u64) -> u64 {
    let commands: Vec<String> = (0..size)
        .step_by(STEP as usize)
        .map(|at| format!("write -P 7 {at} {STEP}"))
        .collect();
    let mut words = vec!["-f", "qcow2"];
    for command in &commands {
        words.extend(["-c", command]);
    }
    words.push(path.to_str().unwrap());
    let output = output("qemu-io", &words);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let written = text
        .lines()
        .filter(|line| line.starts_with("wrote"))
        .count();
    written as u64 * STEP
}

fn options(direct: bool, path: &Path) -> serde_json::Value {
    let name = path.to_str().unwrap();
    json!({
        "file": {"driver": "host_device", "filename": name, "cache": {"direct": direct}},
    })
}

/// Fills a device as QEMU does, and goes on from there.
fn filled(create_options: &str, direct: bool) {
    const LEN: u64 = 64 * MIB;
    const DISK: u64 = 96 * MIB;
    let dir = tempfile::tempdir().unwrap();
    let (Some(theirs), Some(ours)) = (
        Device::new(&dir, "theirs", LEN, 512),
        Device::new(&dir, "ours", LEN, 512),
    ) else {
        return;
    };
    create(&theirs.path, create_options, DISK);
    let by_qemu = filled_by_qemu(&theirs.path, DISK);
    assert!(
        by_qemu > LEN / 2,
        "{create_options}: qemu-io wrote {by_qemu}"
    );

    // Made by our tool, filled by us.
    let stratactl = env!("CARGO_BIN_EXE_stratactl");
    let size = DISK.to_string();
    let words = ["image", "create", "-q", "-f", "qcow2", "-o", create_options];
    run(stratactl, &[&words[..], &[ours.name(), &size]].concat());
    let disk = Disk::open(&ours.path, "qcow2", options(direct, &ours.path));
    let mut by_us = 0;
    let full = loop {
        match disk.try_write(by_us, &[7; STEP as usize]) {
            Ok(()) => by_us += STEP,
            Err(error) => break error,
        }
    };
    assert_eq!(full.errno(), libc::ENOSPC, "{full}");
    assert!(
        by_us + STEP >= by_qemu,
        "{create_options}: {by_us}, QEMU {by_qemu}"
    );
    // What needs no space goes on.
    disk.try_write(4096, &[9; 4096]).unwrap();
    disk.close();
    check(&ours.path, false);
    let mut expected = vec![7; by_us as usize];
    expected[4096..8192].fill(9);
    let reads = |expected: &[u8], what: &str| {
        let disk = Disk::open(&ours.path, "qcow2", json!({"read-only": true}));
        let seen = disk.read(0, expected.len());
        assert!(seen == expected, "{create_options}, {what}");
        disk.close();
    };
    reads(&expected, "filled");

    // QEMU goes on with it, and we with what QEMU made. It wants the clusters of a write in a row.
    let mut words = vec!["-f", "qcow2", "-d", "unmap", "-c", "discard 8M 4M"];
    let starts = (8 * MIB..8 * MIB + STEP).step_by(4096);
    let commands: Vec<String> = starts.map(|at| format!("write -P 3 {at} 4k")).collect();
    words.extend(commands.iter().flat_map(|command| ["-c", command]));
    words.push(ours.name());
    run("qemu-io", &words);
    check(&ours.path, false);
    expected[8 * MIB as usize..12 * MIB as usize].fill(0);
    expected[8 * MIB as usize..][..STEP as usize].fill(3);
    reads(&expected, "gone on with by QEMU");
    let disk = Disk::open(&ours.path, "qcow2", options(direct, &ours.path));
    for at in (9 * MIB..11 * MIB).step_by(STEP as usize) {
        disk.try_write(at, &[5; STEP as usize]).unwrap();
    }
    disk.close();
    expected[9 * MIB as usize..11 * MIB as usize].fill(5);
    check(&ours.path, false);
    reads(&expected, "gone on with by us");

    // A longer device.
    ours.set_len(LEN + 8 * MIB);
    let disk = Disk::open(&ours.path, "qcow2", options(direct, &ours.path));
    // Of the write that failed some clusters may be there.
    for at in (by_us..by_us + 6 * MIB).step_by(STEP as usize) {
        disk.try_write(at, &[4; STEP as usize]).unwrap();
        expected.extend([4; STEP as usize]);
    }
    disk.close();
    check(&ours.path, false);
    reads(&expected, "on a longer device");
    let told = output(stratactl, &["image", "check", ours.name()]);
    assert_eq!(told.status.code(), Some(0), "{told:?}");

    // The one that QEMU has filled: what is there is written, the next write has no space or is
    // written as well.
    let disk = Disk::open(&theirs.path, "qcow2", options(direct, &theirs.path));
    disk.try_write(0, &[8; 65536]).unwrap();
    let mut at = by_qemu;
    let full = loop {
        match disk.try_write(at, &[8; STEP as usize]) {
            Ok(()) => at += STEP,
            Err(error) => break error,
        }
    };
    assert_eq!(full.errno(), libc::ENOSPC, "{full}");
    assert!(at < LEN);
    disk.close();
    let output = output("qemu-img", &["check", "-f", "qcow2", theirs.name()]);
    assert!(matches!(output.status.code(), Some(0 | 3)), "{output:?}");
}

#[test]
fn a_device_is_filled_as_qemu_fills_it() {
    filled("cluster_size=4k", true);
    filled("cluster_size=64k", false);
}

#[test]
fn a_device_whose_refcount_table_grows() {
    filled("cluster_size=512,refcount_bits=64", false);
}

/// Random operations against the model, on blocks of 4 KiB.
#[test]
fn random_operations_on_large_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let seed = seed();
    println!("seed {seed}");
    for create_options in ["cluster_size=4k", "cluster_size=64k,refcount_bits=1"] {
        let Some(device) = Device::new(&dir, "large", 24 * MIB, 4096) else {
            return;
        };
        create(&device.path, create_options, SIZE as u64);
        let disk = Disk::open(&device.path, "qcow2", options(true, &device.path));
        let align = disk.root.chain().limits().offset_align;
        assert_eq!(align, 4096, "the blocks of the device");
        let (disk, bytes) = workload_of(disk, vec![0; SIZE], 800, seed, false, 8);
        disk.close();
        check(&device.path, false);
        let disk = Disk::open(&device.path, "qcow2", json!({"read-only": true}));
        assert!(disk.read(0, SIZE) == bytes, "{create_options}, seed {seed}");
        disk.close();
    }
}

#[test]
fn tools_take_a_device_for_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let Some(device) = Device::new(&dir, "tools", 16 * MIB, 512) else {
        return;
    };
    let stratactl = |words: &[&str]| {
        let words = [&["image"], words, &[device.name()]].concat();
        output(env!("CARGO_BIN_EXE_stratactl"), &words)
    };
    let fine = |words: &[&str]| {
        let output = stratactl(words);
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.lines().last().unwrap_or_default();
        assert!(output.status.success(), "{words:?}: {last}");
    };
    let image = |args: &[&str]| {
        let words = [&["image"], args].concat();
        run(env!("CARGO_BIN_EXE_stratactl"), &words)
    };
    // Preallocated, made larger, smaller.
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k,preallocation=full",
    ];
    image(&[&create[..], &[device.name(), "4M"]].concat());
    check(&device.path, false);
    let command = "write -q -P 6 0 4M";
    run("qemu-io", &["-f", "qcow2", "-c", command, device.name()]);
    image(&["resize", "--preallocation", "metadata", device.name(), "8M"]);
    check(&device.path, false);
    let mut expected = vec![6; 4 << 20];
    expected.resize(8 << 20, 0);
    compare(&device.path, &dir, &expected);
    image(&["resize", "--shrink", device.name(), "2M"]);
    check(&device.path, false);
    compare(&device.path, &dir, &expected[..2 << 20]);
    // More than there is.
    let resize = [
        "image",
        "resize",
        "--preallocation",
        "full",
        device.name(),
        "32M",
    ];
    let output = output(env!("CARGO_BIN_EXE_stratactl"), &resize);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("No space left on device"), "{text}");
    check(&device.path, false);
    compare(&device.path, &dir, &expected[..2 << 20]);
    fine(&["check"]);

    // A broken refcount table is rebuilt in what is free.
    let mut bytes = std::fs::read(&device.path).unwrap();
    let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap());
    bytes[table..table + 8].copy_from_slice(&(block + 512).to_be_bytes());
    std::fs::write(&device.path, &bytes[..1 << 20]).unwrap();
    fine(&["check", "--repair", "all"]);
    check(&device.path, false);
    compare(&device.path, &dir, &expected[..2 << 20]);

    device.set_len(256 << 10);
    let create = ["image", "create", "-f", "qcow2", device.name(), "8M"];
    let words = [&create[..], &["-o", "cluster_size=128k"]].concat();
    let output = self::output(env!("CARGO_BIN_EXE_stratactl"), &words);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("has no room for the tables"), "{text}");
    let header = &std::fs::read(&device.path).unwrap()[..4];
    assert_eq!(header, b"QFI\xfb", "what was there is gone");
}

fn compare(device: &Path, dir: &tempfile::TempDir, expected: &[u8]) {
    let raw = in_dir(dir, "expected.raw");
    std::fs::write(&raw, expected).unwrap();
    let (device, raw) = (device.to_str().unwrap(), raw.to_str().unwrap());
    run(
        "qemu-img",
        &["compare", "-f", "qcow2", "-F", "raw", device, raw],
    );
}
