//! `create`. What would be caught: a header that says something else than was asked for, tables
//! without refcounts, space that is not allocated, an option that is taken without effect or
//! refused where `qemu-img` takes it, a file left behind by a command that failed.

use super::tools::{Dir, errors, rng};
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::Value;
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;

/// The options that are combined, with their values.
const CHOICES: [&[&str]; 9] = [
    &["compat=v3", "compat=0.10"],
    &[
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
    ],
    &["refcount_bits=16", "refcount_bits=1", "refcount_bits=64"],
    &["lazy_refcounts=off", "lazy_refcounts=on"],
    &["extended_l2=off", "extended_l2=on"],
    &["compression_type=zlib", "compression_type=zstd"],
    &[
        "preallocation=off",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
    ],
    &[
        "",
        "data_file=NAME.data",
        "data_file=NAME.data,data_file_raw=on",
    ],
    &["", "backing_file=base.raw,backing_fmt=raw"],
];

type Row = [usize; CHOICES.len()];

fn text(row: &Row, choice: usize) -> &'static str {
    CHOICES[choice][row[choice]]
}

/// Whether the format has this combination.
fn possible(row: &Row) -> bool {
    let new = [2, 3, 4, 5, 7].iter().any(|&choice| row[choice] != 0);
    let small = matches!(text(row, 1), "cluster_size=512" | "cluster_size=4k");
    let (extended, backing) = (row[4] == 1, row[8] == 1);
    let impossible = [
        row[0] == 1 && new,
        extended && small,
        row[7] == 2 && backing,
        row[6] != 0 && backing && !extended,
    ];
    !impossible.contains(&true)
}

/// Rows in which every possible pair of values occurs.
fn pairwise(rng: &mut StdRng) -> Vec<Row> {
    let pairs = |row: &Row| {
        let mut pairs = Vec::new();
        for a in 0..row.len() {
            for b in a + 1..row.len() {
                pairs.push((a, row[a], b, row[b]));
            }
        }
        pairs
    };
    let candidates: Vec<Row> = (0..20_000)
        .map(|_| std::array::from_fn(|choice| rng.random_range(0..CHOICES[choice].len())))
        .filter(possible)
        .collect();
    let mut open: HashSet<_> = candidates.iter().flat_map(pairs).collect();
    let mut rows = Vec::new();
    while !open.is_empty() {
        let news = |row: &&Row| pairs(row).iter().filter(|pair| open.contains(pair)).count();
        let best = *candidates.iter().take(3000).max_by_key(news).unwrap();
        let row = if news(&&best) == 0 {
            *candidates.iter().max_by_key(news).unwrap()
        } else {
            best
        };
        for pair in pairs(&row) {
            open.remove(&pair);
        }
        rows.push(row);
    }
    rows
}

/// What `qemu-img info` says, without what differs from file to file.
fn info(dir: &Dir, name: &str) -> Value {
    let file = format!("{name}.qcow2");
    let text = dir.qemu(&["info", "--output=json", &file]);
    let mut value: Value = serde_json::from_str(&text.replace(name, "NAME")).unwrap();
    let map = value.as_object_mut().unwrap();
    map.remove("children");
    map.remove("actual-size");
    value
}

#[test]
fn images_are_as_qemu_img_makes_them() {
    let mut rng = rng();
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "raw", "base.raw", "3M"]);
    dir.scribble("raw", "base.raw", 3 << 20, &mut rng);
    let rows = pairwise(&mut rng);
    println!("{} combinations", rows.len());
    for row in rows {
        let options: Vec<&str> = (0..CHOICES.len())
            .map(|choice| text(&row, choice))
            .filter(|text| !text.is_empty())
            .collect();
        let options = options.join(",");
        println!("{options}");
        let size = if row[8] == 1 { &[][..] } else { &["5M"] };
        for name in ["theirs", "ours"] {
            let (options, file) = (options.replace("NAME", name), format!("{name}.qcow2"));
            let args = ["create", "-q", "-f", "qcow2", "-o", &options, &file];
            let args = [&args[..], size].concat();
            if name == "ours" {
                dir.ctl(&args);
            } else {
                dir.qemu(&args);
            }
        }
        dir.check("ours.qcow2");
        assert_eq!(info(&dir, "ours"), info(&dir, "theirs"));
        dir.qemu(&["compare", "-q", "ours.qcow2", "theirs.qcow2"]);
        // What was allocated ahead is there, and others can work with it.
        let lines = |file| dir.qemu_json(&["map", "--output=json", file]);
        let (ours, theirs) = (lines("ours.qcow2"), lines("theirs.qcow2"));
        assert_eq!(allocated(&ours), allocated(&theirs));
        dir.scribble("qcow2", "ours.qcow2", 3 << 20, &mut rng);
        dir.check("ours.qcow2");
    }
}

/// The ranges that are in the image itself.
fn allocated(map: &Value) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for entry in map.as_array().unwrap() {
        let (start, len) = (
            entry["start"].as_u64().unwrap(),
            entry["length"].as_u64().unwrap(),
        );
        if entry["depth"] != 0 || entry["offset"].is_null() {
            continue;
        }
        match ranges.last_mut() {
            Some((_, end)) if *end == start => *end += len,
            _ => ranges.push((start, start + len)),
        }
    }
    ranges
}

#[test]
fn raw_images_have_their_size_and_space() {
    let dir = Dir::new();
    for (options, blocks) in [("off", 0), ("falloc", 2048), ("full", 2048)] {
        std::fs::write(dir.path("disk.raw"), b"old contents").unwrap();
        let options = format!("preallocation={options}");
        dir.ctl(&["create", "-f", "raw", "-o", &options, "disk.raw", "1M"]);
        let file = std::fs::metadata(dir.path("disk.raw")).unwrap();
        assert_eq!(file.len(), 1 << 20);
        assert!(
            file.blocks() >= blocks,
            "{options}: {} blocks",
            file.blocks()
        );
        let bytes = std::fs::read(dir.path("disk.raw")).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 0));
    }
    dir.ctl(&["create", "odd.raw", "1000"]);
    assert_eq!(std::fs::metadata(dir.path("odd.raw")).unwrap().len(), 1024);
}

#[test]
fn what_qemu_img_refuses_is_refused_with_a_reason() {
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "raw", "base.raw", "1M"]);
    let with_options = |options| vec!["-f", "qcow2", "-o", options, "new", "1M"];
    let mut cases: Vec<Vec<&str>> = [
        "cluster_size=1000",
        "cluster_size=4M",
        "compat=0.9",
        "refcount_bits=3",
        "refcount_bits=128",
        "compat=v2,refcount_bits=8",
        "compat=0.10,lazy_refcounts=on",
        "compat=0.10,extended_l2=on",
        "compat=0.10,data_file=d",
        "compat=0.10,compression_type=zstd",
        "compression_type=lz4",
        "extended_l2=on,cluster_size=4k",
        "data_file_raw=on",
        "preallocation=some",
        "unknown=1",
        "lazy_refcounts=perhaps",
    ]
    .into_iter()
    .map(with_options)
    .collect();
    cases.extend([
        vec!["-f", "qcow2", "new"],
        vec!["-f", "qcow2", "new", "many"],
        vec!["-f", "qcow2", "new", "1000P"],
        vec!["-f", "qcow2", "-o", "cluster_size=512", "new", "1T"],
        vec!["-f", "qcow2", "-b", "missing", "-F", "raw", "new"],
        vec!["-f", "qcow2", "-b", "base.raw", "new"],
        vec!["-f", "qcow2", "-u", "-b", "missing", "-F", "raw", "new"],
        vec!["-f", "qcow2", "-u", "-b", "missing", "new", "1M"],
        vec!["-f", "raw", "-b", "base.raw", "-F", "raw", "new", "1M"],
        vec!["-f", "raw", "-o", "preallocation=metadata", "new", "1M"],
    ]);
    let over_base = ["-f", "qcow2", "-b", "base.raw", "-F", "raw", "-o"];
    for options in ["preallocation=full", "data_file=d,data_file_raw=on"] {
        cases.push(over_base.into_iter().chain([options, "new"]).collect());
    }
    for case in cases {
        let args = [&["create"], &case[..]].concat();
        let theirs = dir.qemu_img(&args);
        assert!(!theirs.status.success(), "qemu-img takes {args:?}");
        let _ = std::fs::remove_file(dir.path("new"));
        let _ = std::fs::remove_file(dir.path("d"));
        let ours = dir.image(&args);
        let text = errors(&ours);
        assert!(!ours.status.success(), "{args:?}");
        let says = ["expected", "Could not open", "must be named"];
        assert!(
            says.iter().any(|part| text.contains(part)),
            "{args:?}: {text}"
        );
        assert!(!dir.path("new").exists(), "{args:?} left a file");
        assert!(!dir.path("d").exists(), "{args:?} left a data file");
    }
}

#[test]
fn the_backing_file_is_looked_for_beside_the_image() {
    let dir = Dir::new();
    std::fs::create_dir(dir.path("images")).unwrap();
    dir.qemu(&["create", "-q", "-f", "qcow2", "images/base.qcow2", "7M"]);
    let args = ["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2"];
    dir.ctl(&[&args[..], &["images/new.qcow2"]].concat());
    let info = dir.qemu_json(&["info", "--output=json", "images/new.qcow2"]);
    assert_eq!(info["virtual-size"], 7 << 20);
    assert_eq!(info["full-backing-filename"], "images/base.qcow2");
    // Not looked at: it need not be there.
    let args = [
        "create", "-u", "-f", "qcow2", "-b", "gone", "-F", "raw", "new", "1M",
    ];
    dir.ctl(&args);
    assert_eq!(dir.ctl_json(&["info", "new"])["backing-filename"], "gone");
}
