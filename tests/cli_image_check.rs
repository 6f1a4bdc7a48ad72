//! `stratactl image check` beside `qemu-img check`.
//!
//! What would be caught: exit codes and numbers that differ from those that scripts know, a
//! repair that is not one, an image in use that is looked at or changed.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use stratablk::reactor::Reactor;
use stratablk::storage::OpenFlags;
use stratablk::storage::{Access, FileStorage, Storage};

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap()
}

/// `stratactl image check ARGS IMAGE`: exit code, output and messages.
fn check(args: &[&str], image: &Path) -> (i32, String, String) {
    let start = ["image", "check", image.to_str().unwrap()];
    let args = [&start, args].concat();
    let output = run(env!("CARGO_BIN_EXE_stratactl"), &args);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code().unwrap(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// An image with 1 MiB of data.
fn image(dir: &tempfile::TempDir) -> PathBuf {
    let path = dir.path().join("image.qcow2");
    let name = path.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", name, "16M"]);
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -q -P 5 0 1M", name],
    );
    path
}

/// Sets the refcounts of two clusters of the data, and of one that is free.
fn damage(path: &Path, used: u16, free: u16) {
    let mut bytes = std::fs::read(path).unwrap();
    // 64 KiB clusters of metadata: header, refcount table, refcount block, L1 and L2 table.
    for (cluster, refcount) in [(6, used), (7, used), (21, free)] {
        let at = (2 << 16) + cluster * 2;
        bytes[at..at + 2].copy_from_slice(&refcount.to_be_bytes());
    }
    bytes.resize(22 << 16, 0);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn verdicts_and_numbers_are_qemus() {
    let dir = tempfile::tempdir().unwrap();
    for (used, free, expected) in [(1, 0, 0), (1, 1, 3), (0, 0, 2), (0, 1, 2)] {
        let path = image(&dir);
        damage(&path, used, free);
        let (code, out, messages) = check(&["--json"], &path);
        assert_eq!(code, expected, "{out}{messages}");
        let ours: Value = serde_json::from_str(&out).unwrap();
        let args = ["check", "--output=json", path.to_str().unwrap()];
        let theirs = run("qemu-img", &args);
        assert_eq!(theirs.status.code(), Some(expected));
        let theirs: Value = serde_json::from_slice(&theirs.stdout).unwrap();
        assert_eq!(ours, theirs);
        assert_eq!(messages.is_empty(), expected == 0, "{messages}");
    }
}

#[test]
fn what_is_repaired_is_what_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir);
    damage(&path, 0, 1);
    let (code, out, _) = check(&["--repair", "leaks"], &path);
    assert_eq!(code, 2, "{out}");
    assert!(
        out.contains("Repaired: 0 corruptions, 1 leaked clusters."),
        "{out}"
    );
    let (code, out, messages) = check(&["-r", "all", "--json"], &path);
    assert_eq!(code, 0, "{out}{messages}");
    assert!(
        messages.contains("ERROR cluster 6 refcount=0 reference=1"),
        "{messages}"
    );
    let fixed: Value = serde_json::from_str(&out).unwrap();
    assert!(fixed["corruptions-fixed"].as_u64() > Some(1), "{out}");
    let (code, out, _) = check(&[], &path);
    assert_eq!(
        (code, out.contains("No errors were found")),
        (0, true),
        "{out}"
    );
    assert!(
        out.contains("16/256 = 6.25% allocated, 0.00% fragmented"),
        "{out}"
    );
    assert!(
        run("qemu-img", &["check", path.to_str().unwrap()])
            .status
            .success()
    );
}

#[test]
fn what_cannot_be_checked_has_codes_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir);
    let raw = dir.path().join("disk.raw");
    std::fs::write(&raw, [0; 4096]).unwrap();
    assert_eq!(check(&[], &raw).0, 63);
    assert_eq!(check(&["-f", "raw"], &path).0, 63);
    let (code, _, messages) = check(&["-f", "qcow2"], &raw);
    assert!(
        code == 1 && messages.contains("not in qcow2 format"),
        "{messages}"
    );
    let (code, _, messages) = check(&[], &dir.path().join("nowhere"));
    assert!(code == 1 && messages.contains("No such file"), "{messages}");
}

#[test]
fn an_image_in_use_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir);
    damage(&path, 1, 1);
    let flags = OpenFlags {
        writable: true,
        ..OpenFlags::default()
    };
    let user = FileStorage::open(&path, flags).unwrap();
    // A reader minds a repair, but no check.
    assert_eq!(check(&[], &path).0, 3);
    assert_eq!(check(&["-r", "all"], &path).0, 1);
    let reactor = Reactor::for_this_thread().unwrap();
    reactor.block_on(user.set_access(Access::Write)).unwrap();
    let (code, _, messages) = check(&[], &path);
    assert!(code == 1 && messages.contains("lock"), "{messages}");
    assert_eq!(check(&["-U"], &path).0, 3);
    drop(user);
    assert_eq!(check(&["-r", "all"], &path).0, 0);
}

/// What would be caught: damage that makes QEMU refuse to open the image, or that its check finds, and
/// that is called clean here; a repair that does not mend what can be mended.
#[test]
fn what_qemu_does_not_take_is_not_clean() {
    let dir = tempfile::tempdir().unwrap();
    let bitmap = |path: &Path, at: usize, bytes: &[u8]| {
        let name = path.to_str().unwrap();
        run("qemu-img", &["bitmap", "--add", name, "tracking"]);
        let mut image = std::fs::read(path).unwrap();
        let magic = 0x2385_2875_u32.to_be_bytes();
        let extension = image.windows(4).position(|word| word == magic).unwrap();
        let word = image[extension + 24..extension + 32].try_into().unwrap();
        let at = u64::from_be_bytes(word) as usize + at;
        image[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(path, image).unwrap();
    };
    let patch = |path: &Path, at: usize, bytes: &[u8]| {
        let mut image = std::fs::read(path).unwrap();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(path, image).unwrap();
    };
    // The second of two entries of the L1 table is empty.
    let l1 = (3 << 16) + 8;
    type Damage<'a> = Box<dyn Fn(&Path) + 'a>;
    let damages: [(&str, bool, Damage); 11] = [
        (
            "copied flag alone",
            true,
            Box::new(|p| patch(p, l1, &[0x80])),
        ),
        (
            "snapshots inside a cluster",
            true,
            Box::new(|p| patch(p, 70, &[2])),
        ),
        (
            "snapshots far away",
            true,
            Box::new(|p| patch(p, 64, &[0x80])),
        ),
        (
            "refcounts far away",
            true,
            Box::new(|p| patch(p, 48, &[0x20])),
        ),
        (
            "refcounts inside a cluster",
            true,
            Box::new(|p| patch(p, 54, &[2])),
        ),
        ("extra data", false, Box::new(|p| bitmap(p, 23, &[8]))),
        ("type", false, Box::new(|p| bitmap(p, 16, &[2]))),
        ("flags", false, Box::new(|p| bitmap(p, 15, &[4]))),
        ("granularity", false, Box::new(|p| bitmap(p, 17, &[8]))),
        (
            "length of the table",
            false,
            Box::new(|p| bitmap(p, 11, &[3])),
        ),
        (
            "place of the table",
            false,
            Box::new(|p| bitmap(p, 6, &[2])),
        ),
    ];
    for (what, mended, damage) in damages {
        let path = dir.path().join("large.qcow2");
        let name = path.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", name, "1G"]);
        let write = ["-f", "qcow2", "-c", "write -q -P 5 0 1M", name];
        run("qemu-io", &write);
        damage(&path);
        let theirs = || run("qemu-img", &["check", name]).status.code().unwrap();
        let (code, out, messages) = check(&[], &path);
        assert!(theirs() != 0, "{what}");
        assert_eq!(code, 2, "{what}: {out}{messages}");
        let before = std::fs::read(&path).unwrap();
        let (code, out, messages) = check(&["-r", "all"], &path);
        if mended {
            assert_eq!((code, theirs()), (0, 0), "{what}: {out}{messages}");
        } else {
            assert_eq!(code, 2, "{what}: {out}{messages}");
            assert!(std::fs::read(&path).unwrap() == before, "{what}");
        }
    }
}
