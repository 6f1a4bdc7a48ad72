//! `rebase` and `set-backing`. What would be caught: a disk that reads differently on its new
//! backing file, a copy of what is the same in both, a header that changes before the data is
//! there, a chain made into a loop.

use super::tools::{Dir, errors, rng};
use rand::Rng;
use rand::rngs::StdRng;

fn base(dir: &Dir, name: &str, sectors: u64, rng: &mut StdRng) {
    let size = (sectors * 512).to_string();
    dir.qemu(&["create", "-q", "-f", "raw", name, &size]);
    dir.scribble("raw", name, sectors * 512, rng);
}

#[test]
fn a_disk_reads_the_same_on_another_backing_file() {
    let mut rng = rng();
    for options in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on,cluster_size=16k",
        "data_file=d.raw",
    ] {
        println!("{options}");
        let dir = Dir::new();
        // Shorter and longer ones, and none.
        for name in ["a.raw", "b.raw"] {
            let sectors = rng.random_range(2000..12_000);
            base(&dir, name, sectors, &mut rng);
        }
        let args = [
            "create", "-q", "-f", "qcow2", "-o", options, "-b", "a.raw", "-F", "raw",
        ];
        dir.qemu(&[&args[..], &["image", "4000k"]].concat());
        dir.scribble("qcow2", "image", 4000 << 10, &mut rng);
        let before = dir.read("qcow2", "image");
        for name in ["b.raw", "", "a.raw", ""] {
            let args = ["rebase", "-b", name, "-F", "raw", "image"];
            dir.ctl(&args);
            dir.check("image");
            assert!(
                dir.read("qcow2", "image") == before,
                "{options}: rebased to '{name}'"
            );
            let info = dir.qemu_json(&["info", "--output=json", "image"]);
            assert_eq!(info["backing-filename"].as_str().unwrap_or(""), name);
        }
    }
}

/// Nothing is copied onto a backing file that reads the same.
#[test]
fn what_is_the_same_is_not_copied() {
    let mut rng = rng();
    let dir = Dir::new();
    base(&dir, "a.raw", 8000, &mut rng);
    dir.qemu(&["convert", "-f", "raw", "-O", "qcow2", "a.raw", "b.qcow2"]);
    let args = [
        "create", "-q", "-f", "qcow2", "-b", "a.raw", "-F", "raw", "image",
    ];
    dir.qemu(&args);
    let before = dir.read("qcow2", "image");
    let told = dir.ctl_json(&["rebase", "-b", "b.qcow2", "-F", "qcow2", "image"]);
    assert_eq!(told["copied"], 0);
    assert!(dir.read("qcow2", "image") == before);
    let told = dir.ctl_json(&["rebase", "image"]);
    assert!(told["copied"].as_u64().unwrap() > 0, "{told}");
    dir.qemu(&["rebase", "-u", "-b", "", "image"]);
    assert!(dir.read("qcow2", "image") == before);
}

#[test]
fn only_the_name_changes_without_a_look_at_the_file() {
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "qcow2", "image", "1M"]);
    for args in [
        &["set-backing", "image", "gone/base.raw", "-F", "raw"][..],
        &["rebase", "-u", "-b", "elsewhere", "-F", "qcow2", "image"],
        // The file that it names by then cannot be opened.
        &["set-backing", "image", ""],
    ] {
        dir.ctl(args);
        let name = args
            .iter()
            .find(|arg| ["gone/base.raw", "elsewhere"].contains(arg));
        let info = dir.qemu_json(&["info", "--output=json", "image"]);
        assert_eq!(info["backing-filename"].as_str(), name.copied(), "{args:?}");
    }
    dir.check("image");
}

#[test]
fn what_cannot_be_rebased_is_left_alone() {
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "qcow2", "image", "1M"]);
    dir.qemu(&["create", "-q", "-f", "raw", "disk.raw", "1M"]);
    let args = [
        "create", "-q", "-f", "qcow2", "-b", "image", "-F", "qcow2", "overlay",
    ];
    dir.qemu(&args);
    let raw_data = "data_file=d.raw,data_file_raw=on";
    dir.qemu(&["create", "-q", "-f", "qcow2", "-o", raw_data, "split", "1M"]);
    for (args, says) in [
        (&["-b", "missing", "-F", "raw", "image"][..], "No such file"),
        (&["-b", "disk.raw", "image"], "format must be named"),
        (&["-b", "overlay", "-F", "qcow2", "image"], "loop"),
        (
            &["-b", "image", "-F", "qcow2", "disk.raw", "-f", "raw"],
            "expected qcow2",
        ),
        (&["-b", "disk.raw", "-F", "raw", "split"], "raw data file"),
        (&["-b", "disk.raw", "-F", "vmdk", "image"], "expected raw"),
    ] {
        let name = args
            .iter()
            .rev()
            .find(|arg| dir.path(arg).exists())
            .unwrap();
        let before = std::fs::read(dir.path(name)).unwrap();
        let output = dir.image(&[&["rebase"], args].concat());
        assert!(!output.status.success(), "{args:?}");
        assert!(
            errors(&output).contains(says),
            "{args:?}: {}",
            errors(&output)
        );
        assert!(std::fs::read(dir.path(name)).unwrap() == before, "{args:?}");
    }
}
