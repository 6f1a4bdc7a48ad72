//! `info` and `map`. What would be caught: a key that is missing or has another value than
//! `qemu-img` gives it, a range that is told wrong, an image in use that cannot be looked at, one
//! that is looked at though its contents change.

use super::tools::{Dir, errors, rng};
use serde_json::Value;
use std::path::Path;
use stratablk::reactor::Reactor;
use stratablk::storage::OpenFlags;
use stratablk::storage::{Access, FileStorage, Storage};

fn same_info(dir: &Dir, args: &[&str]) {
    let theirs = dir.qemu_json(&[&["info", "--output=json"], args].concat());
    let ours = dir.ctl_json(&[&["info"], args].concat());
    assert_eq!(ours, theirs, "{args:?}");
}

fn same_map(dir: &Dir, args: &[&str]) {
    let theirs = dir.qemu_json(&[&["map", "--output=json"], args].concat());
    let ours = dir.ctl_json(&[&["map"], args].concat());
    let lines = |value: &Value| {
        let lines: Vec<String> = value
            .as_array()
            .unwrap()
            .iter()
            .map(Value::to_string)
            .collect();
        lines.join("\n")
    };
    assert_eq!(
        ours,
        theirs,
        "{args:?}:\n{}\n{}",
        lines(&ours),
        lines(&theirs)
    );
}

const SHAPES: [&str; 10] = [
    "compat=1.1",
    "compat=0.10",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=2M",
    "extended_l2=on",
    "extended_l2=on,preallocation=metadata",
    "preallocation=metadata",
    "preallocation=falloc,lazy_refcounts=on",
    "data_file=d.raw,data_file_raw=on",
    "data_file=d.raw",
];

#[test]
fn every_kind_of_image_is_told_as_qemu_img_does() {
    let mut rng = rng();
    for options in SHAPES {
        println!("{options}");
        let dir = Dir::new();
        dir.qemu(&["create", "-q", "-f", "qcow2", "-o", options, "image", "5M"]);
        same_info(&dir, &["image"]);
        same_map(&dir, &["image"]);
        dir.scribble("qcow2", "image", 5 << 20, &mut rng);
        same_info(&dir, &["image"]);
        same_info(&dir, &["-f", "raw", "image"]);
        same_map(&dir, &["image"]);
    }
}

#[test]
fn chains_are_told_down_to_the_last_layer() {
    let mut rng = rng();
    for options in [
        "compat=1.1",
        "extended_l2=on",
        "compat=0.10,cluster_size=4k",
    ] {
        let dir = Dir::new();
        std::fs::create_dir(dir.path("below")).unwrap();
        dir.qemu(&["create", "-q", "-f", "raw", "below/base.raw", "3M"]);
        dir.scribble("raw", "below/base.raw", 3 << 20, &mut rng);
        let make = |name, below, format, size| {
            let args = [
                "create", "-q", "-f", "qcow2", "-o", options, "-b", below, "-F", format,
            ];
            dir.qemu(&[&args[..], &[name, size]].concat());
        };
        make("below/middle", "base.raw", "raw", "4M");
        dir.scribble("qcow2", "below/middle", 4 << 20, &mut rng);
        make("top", "below/middle", "qcow2", "6M");
        dir.scribble("qcow2", "top", 6 << 20, &mut rng);
        same_info(&dir, &["top"]);
        same_info(&dir, &["--backing-chain", "top"]);
        same_map(&dir, &["top"]);
        let text = dir.ctl(&["map", "top"]);
        assert!(text.contains("top"), "{text}");
        let text = dir.ctl(&["info", "below/middle"]);
        let named = "backing file: base.raw (actual path: below/base.raw)\n";
        assert!(text.contains(named), "{text}");
    }
}

#[test]
fn backing_files_named_in_json_are_told() {
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "raw", "base.raw", "1M"]);
    dir.qemu(&["create", "-q", "-f", "qcow2", "middle", "2M"]);
    for (name, format, json) in [
        (
            "one",
            "qcow2",
            r#"{"driver":"qcow2","file":{"driver":"file","filename":"middle"}}"#,
        ),
        (
            "two",
            "raw",
            r#"{"driver":"raw","file.driver":"file","file.filename":"base.raw"}"#,
        ),
        ("three", "raw", r#"{"driver":"file","filename":"base.raw"}"#),
    ] {
        let json = format!("json:{json}");
        let args = [
            "create", "-q", "-f", "qcow2", "-u", "-F", format, "-b", &json, name, "2M",
        ];
        dir.qemu(&args);
        same_info(&dir, &[name]);
        if name != "three" {
            same_info(&dir, &["--backing-chain", name]);
        }
    }
    // QEMU describes the protocol node itself there.
    let chain = dir.ctl(&["info", "--backing-chain", "three"]);
    assert!(chain.contains("image: base.raw"), "{chain}");
}

#[test]
fn compressed_clusters_and_other_formats_are_told() {
    let mut rng = rng();
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "raw", "base.raw", "3M"]);
    dir.scribble("raw", "base.raw", 3 << 20, &mut rng);
    same_info(&dir, &["base.raw"]);
    same_map(&dir, &["-f", "raw", "base.raw"]);
    dir.qemu(&["convert", "-c", "-O", "qcow2", "base.raw", "packed"]);
    same_info(&dir, &["packed"]);
    same_map(&dir, &["packed"]);
    dir.qemu(&["convert", "-O", "qed", "base.raw", "disk.qed"]);
    same_info(&dir, &["disk.qed"]);
    same_map(&dir, &["disk.qed"]);
}

#[test]
fn bitmaps_and_bits_are_told() {
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "qcow2", "image", "5M"]);
    dir.qemu(&["bitmap", "--add", "image", "one"]);
    dir.qemu(&["bitmap", "--add", "--disable", "-g", "4k", "image", "two"]);
    same_info(&dir, &["image"]);
    let text = dir.ctl(&["info", "image"]);
    assert!(text.contains("            granularity: 4096\n"), "{text}");
    // Dirty and corrupt.
    let mut bytes = std::fs::read(dir.path("image")).unwrap();
    bytes[79] |= 3;
    std::fs::write(dir.path("image"), bytes).unwrap();
    same_info(&dir, &["image"]);
}

#[test]
fn snapshots_are_listed() {
    let dir = Dir::new();
    for compat in ["0.10", "1.1"] {
        let options = format!("compat={compat}");
        dir.qemu(&["create", "-q", "-f", "qcow2", "-o", &options, "image", "5M"]);
        assert_eq!(dir.ctl(&["snapshot", "-l", "image"]), "");
        for name in ["one", "with a longer name than fits", "drei"] {
            dir.qemu(&["snapshot", "-c", name, "image"]);
        }
        same_info(&dir, &["image"]);
        // Apart from the space between columns.
        let words = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let ours = words(dir.ctl(&["snapshot", "-l", "image"]));
        assert_eq!(ours, words(dir.qemu(&["snapshot", "-l", "image"])));
        assert!(words(dir.ctl(&["info", "image"])).contains(&ours));
        let list = dir.ctl_json(&["snapshot", "-l", "image"]);
        assert_eq!(
            list,
            dir.qemu_json(&["info", "--output=json", "image"])["snapshots"]
        );
    }
    dir.qemu(&["create", "-q", "-f", "raw", "disk.raw", "1M"]);
    let output = dir.image(&["snapshot", "-l", "disk.raw"]);
    assert!(
        errors(&output).contains("expected qcow2"),
        "{}",
        errors(&output)
    );
}

#[test]
fn encryption_is_told_as_qemu_img_does() {
    for options in [
        "encrypt.format=luks,encrypt.iter-time=10",
        "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=aes-128,\
         encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
        "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-mode=ecb,cluster_size=4k",
        "encrypt.format=aes",
    ] {
        let dir = Dir::new();
        let secret = "secret,id=s,data=abc";
        let options = format!("{options},encrypt.key-secret=s");
        let args = [
            "create", "-q", "--object", secret, "-f", "qcow2", "-o", &options, "image", "1M",
        ];
        dir.qemu(&args);
        same_info(&dir, &["image"]);
        assert!(dir.ctl(&["info", "image"]).contains("encrypted: yes\n"));
    }
}

/// Without its LUKS header an image is not described as though it had one.
#[test]
fn a_damaged_luks_header_is_an_error() {
    let dir = Dir::new();
    let secret = "secret,id=s,data=abc";
    let options = "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s";
    let args = [
        "create", "-q", "--object", secret, "-f", "qcow2", "-o", options, "image", "1M",
    ];
    dir.qemu(&args);
    let whole = std::fs::read(dir.path("image")).unwrap();
    let find = |what: &[u8]| whole.windows(what.len()).position(|bytes| bytes == what);
    let (magic, pointer) = (find(b"LUKS\xba\xbe"), find(&0x0537_be77_u32.to_be_bytes()));
    for (at, bytes) in [
        (magic.unwrap() + 1, &b"X"[..]),
        (pointer.unwrap() + 8, &[0xff; 8]),
    ] {
        let mut image = whole.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(dir.path("image"), image).unwrap();
        let output = dir.image(&["info", "image"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(errors(&output).contains("LUKS"), "{}", errors(&output));
    }
}

#[test]
fn loops_and_missing_files_are_errors() {
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "qcow2", "image", "1M"]);
    dir.qemu(&["rebase", "-u", "-b", "image", "-F", "qcow2", "image"]);
    let output = dir.image(&["info", "--backing-chain", "image"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("loop"), "{}", errors(&output));
    dir.ctl(&["info", "image"]);
    let output = dir.image(&["info", "missing"]);
    assert!(errors(&output).contains("Could not open 'missing': No such file"));
}

fn in_use(path: &Path) -> FileStorage {
    let flags = OpenFlags {
        writable: true,
        ..OpenFlags::default()
    };
    let storage = FileStorage::open(path, flags).unwrap();
    let reactor = Reactor::for_this_thread().unwrap();
    reactor.block_on(storage.set_access(Access::Write)).unwrap();
    storage
}

#[test]
fn an_image_in_use_is_looked_at_and_not_changed() {
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "qcow2", "image", "1M"]);
    dir.qemu(&["create", "-q", "-f", "raw", "base.raw", "1M"]);
    let before = std::fs::read(dir.path("image")).unwrap();
    let user = in_use(&dir.path("image"));
    dir.ctl(&["info", "image"]);
    dir.ctl(&["map", "-U", "image"]);
    dir.ctl(&["compare", "-U", "image", "base.raw"]);
    for args in [
        &["map", "image"][..],
        &["compare", "image", "base.raw"],
        &["resize", "image", "2M"],
        &["rebase", "-b", "base.raw", "-F", "raw", "image"],
        &["set-backing", "-F", "raw", "image", "base.raw"],
        &["create", "-f", "qcow2", "image", "2M"],
    ] {
        let output = dir.image(args);
        let text = errors(&output);
        assert!(!output.status.success(), "{args:?}");
        assert!(
            text.contains("Is another process using the image"),
            "{args:?}: {text}"
        );
    }
    drop(user);
    assert!(std::fs::read(dir.path("image")).unwrap() == before);
}
