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

/// The files of a folder, and what links lead to: names, and contents of those that are there.
fn files(dir: &Dir) -> Vec<(String, Option<Vec<u8>>)> {
    let mut files: Vec<_> = std::fs::read_dir(dir.path(""))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, std::fs::read(entry.path()).ok())
        })
        .collect();
    files.sort();
    files
}

#[test]
fn a_link_that_leads_nowhere_gets_its_target() {
    let dir = Dir::new();
    std::fs::create_dir(dir.path("store")).unwrap();
    for format in ["raw", "qcow2"] {
        let link = |name: &str, target: &str| {
            std::os::unix::fs::symlink(target, dir.path(name)).unwrap();
        };
        link("ours", "middle");
        link("middle", "store/ours");
        link("theirs", "store/theirs");
        dir.qemu(&["create", "-q", "-f", format, "theirs", "1M"]);
        dir.ctl(&["create", "-f", format, "ours", "1M"]);
        for name in ["ours", "middle", "theirs"] {
            let kind = std::fs::symlink_metadata(dir.path(name)).unwrap();
            assert!(kind.is_symlink(), "{format}: {name} is no link any more");
            std::fs::remove_file(dir.path(name)).unwrap();
        }
        for name in ["store/ours", "store/theirs"] {
            assert_eq!(dir.read(format, name).len(), 1 << 20, "{format} {name}");
            std::fs::remove_file(dir.path(name)).unwrap();
        }
        // What a failure leaves: the link, and nothing where it leads.
        link("ours", "store/ours");
        let output = dir.image(&[
            "create",
            "-f",
            "qcow2",
            "-o",
            "data_file=no/where",
            "ours",
            "1M",
        ]);
        assert!(!output.status.success());
        assert!(std::fs::symlink_metadata(dir.path("ours")).is_ok());
        assert!(!dir.path("store/ours").exists(), "{}", errors(&output));
        std::fs::remove_file(dir.path("ours")).unwrap();
    }
}

/// What would be caught: a file emptied before the command is known to be possible, an error that
/// names the wrong option, a file left behind.
#[test]
fn a_failed_create_leaves_what_was_there() {
    let dir = Dir::new();
    let long = "n".repeat(400);
    dir.qemu(&["create", "-q", "-f", "qcow2", "image", "1M"]);
    dir.qemu(&["create", "-q", "-f", "qcow2", "base", "1M"]);
    std::fs::write(dir.path("data"), vec![7; 100_000]).unwrap();
    std::fs::write(dir.path("disk.raw"), vec![8; 100_000]).unwrap();
    std::fs::hard_link(dir.path("data"), dir.path("other")).unwrap();
    let small = "cluster_size=512,data_file=data";
    let long_data = format!("cluster_size=512,data_file={long}");
    let both = format!("cluster_size=512,data_file=data,backing_fmt=raw,backing_file={long}");
    let format = format!("cluster_size=512,data_file=data,backing_file=base,backing_fmt={long}");
    let mut cases: Vec<(Vec<&str>, &str)> = Vec::new();
    for name in ["image", "new"] {
        let mut case = |options: &[&'static str], o: &str, size: &'static str, says| {
            let o: &str = Box::leak(o.to_owned().into_boxed_str());
            let start = ["create", "-f", "qcow2"];
            let mut args: Vec<&str> = [&start[..], options, &["-o", o]].concat();
            args.extend([name, size]);
            cases.push((args, says));
        };
        case(&["-u"], &both, "1M", "backing_file");
        case(&["-u"], &format, "1M", "backing_fmt");
        case(&[], &long_data, "1M", "data_file");
        case(&[], small, "4E", "too large");
        case(&[], "data_file=no/where", "1M", "no/where");
        case(
            &["-u"],
            "data_file=data,backing_file=data,backing_fmt=raw",
            "1M",
            "data_file",
        );
        case(
            &["-u"],
            "data_file=data,backing_file=other,backing_fmt=raw",
            "1M",
            "data_file",
        );
        case(
            &[],
            "data_file=data,backing_file=missing,backing_fmt=raw",
            "1M",
            "missing",
        );
        case(
            &[],
            "data_file=data,preallocation=full,backing_file=base,backing_fmt=qcow2",
            "1M",
            "preallocation",
        );
    }
    cases.push((
        vec![
            "create",
            "-f",
            "qcow2",
            "-o",
            "data_file=image",
            "image",
            "1M",
        ],
        "data_file",
    ));
    cases.push((
        vec![
            "create",
            "-f",
            "qcow2",
            "-o",
            "data_file=./new",
            "new",
            "1M",
        ],
        "data_file",
    ));
    // Some file systems have files of that size.
    let probe = std::fs::File::create(dir.path("probe")).unwrap();
    if probe.set_len(1 << 62).is_err() {
        cases.push((vec!["create", "-f", "raw", "disk.raw", "4E"], "disk.raw"));
    }
    let before = files(&dir);
    for (args, says) in cases {
        let output = dir.image(&args);
        assert!(!output.status.success(), "{args:?}");
        let text = errors(&output);
        assert!(text.contains(says), "{args:?}: {text}");
        let after = files(&dir);
        let names = |files: &[(String, Option<Vec<u8>>)]| -> Vec<String> {
            files.iter().map(|(name, _)| name.clone()).collect()
        };
        assert_eq!(names(&before), names(&after), "{args:?}");
        assert!(before == after, "{args:?}: a file was changed");
    }
}
