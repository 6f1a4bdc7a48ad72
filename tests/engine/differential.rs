//! The same operations on two copies of an image, through us and through `qemu-io`; then
//! `qemu-img` compares what the disks hold and what the mapping says, cluster by cluster.
//!
//! What would be caught: a write, a write of zeroes or a discard that has another outcome than
//! QEMU's, in data or in where the data is: copied or left below, compressed or not, data where
//! zeros were asked for; and images that QEMU finds wrong afterwards.
//!
//! The images are a covering set: every pair of two features' values is in at least one of them.
//! `STRATABLK_SEED` repeats a run; `STRATABLK_ROUNDS` (1) makes longer ones, each round with
//! other operations and another covering set. A failure prints the seed and the operations, as
//! `qemu-io` takes them.
//!
//! Where the specification leaves a choice, the two may differ, and the test looks away:
//! * A discarded cluster: QEMU gives it the zero flag, we take it out of the mapping if nothing
//!   lies below. It reads as zeros for both, and is compared as such.
//! * Of a discard that cuts a cluster QEMU leaves out the parts, and we leave out parts of
//!   subclusters. A discard may do that: both then write to those parts.
//! * Zeroes that cut a (sub)cluster: QEMU may give all of it the zero flag when the rest reads as
//!   zeros, we leave it alone or write zeros as data. Only the data are compared there, until the
//!   unit is written as a whole.
//! * Zeroes over a backing file in version 2, which has no zero flag: QEMU writes zeros as data,
//!   we leave alone what reads as zeros already.
//! * A cluster with subclusters that a snapshot shares: QEMU copies from the first allocated
//!   subcluster to the last, we copy all of it; and what is made zeros in it may be before or
//!   after the copy.
//! * A cluster of a raw data file that is cleared: QEMU gives it the zero flag, we leave it mapped
//!   to the file, which has the zeros.
//! * Zeroes that cut a compressed cluster at subclusters: QEMU writes all of them as data, we
//!   write those in that cluster.

use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stratablk::chain::View;

use crate::model::{SECTOR, seed};
use crate::support::*;

const OPERATIONS: usize = 48;

/// The features of an image, each an index into the values below.
type Shape = [usize; 10];

const VERSION: usize = 0;
const CLUSTER: usize = 1;
const WIDTH: usize = 2;
const EXTENDED: usize = 3;
const COMPRESSED: usize = 4;
const BACKING: usize = 5;
const DATA_FILE: usize = 6;
const SNAPSHOT: usize = 7;
const LAZY: usize = 8;
const PREALLOCATION: usize = 9;

/// How many values each feature has.
const VALUES: Shape = [2, 4, 3, 2, 3, 5, 3, 2, 2, 2];

const VERSIONS: [&str; 2] = ["0.10", "1.1"];
const CLUSTERS: [(&str, usize); 4] = [
    ("512", 512),
    ("4k", 4 << 10),
    ("64k", 64 << 10),
    ("2M", 2 << 20),
];
const WIDTHS: [u32; 3] = [16, 1, 64];
const COMPRESSIONS: [&str; 3] = ["", "zlib", "zstd"];
/// None, raw, qcow2, shorter than the overlay, longer.
const BACKINGS: [&str; 5] = ["", "raw", "qcow2", "raw", "qcow2"];
/// Bytes of the backing file beside the overlay's size.
const BACKING_SIZES: [i64; 5] = [0, 0, 0, -300_000, 300_032];

/// Whether QEMU makes such images.
fn exists(shape: &Shape) -> bool {
    let new = shape[VERSION] == 1;
    let old_can = shape[WIDTH] == 0
        && shape[EXTENDED] == 0
        && shape[COMPRESSED] < 2
        && shape[DATA_FILE] == 0
        && shape[LAZY] == 0;
    let subclusters = shape[EXTENDED] == 0 || shape[CLUSTER] >= 2;
    // A refcount of one bit has no room for a snapshot's reference.
    let snapshot = shape[SNAPSHOT] == 0 || (shape[WIDTH] != 1 && shape[DATA_FILE] == 0);
    // QEMU compresses into clusters that are not allocated.
    let compressed = shape[COMPRESSED] == 0 || (shape[DATA_FILE] == 0 && shape[PREALLOCATION] == 0);
    let raw_data = shape[DATA_FILE] != 2 || shape[BACKING] == 0;
    let preallocated = shape[PREALLOCATION] == 0 || shape[BACKING] == 0 || shape[EXTENDED] == 1;
    (new || old_can) && subclusters && snapshot && compressed && raw_data && preallocated
}

fn pairs(shape: &Shape) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    let shape = *shape;
    (0..shape.len()).flat_map(move |a| (0..a).map(move |b| (a, shape[a], b, shape[b])))
}

/// Shapes that have every pair of values that any image has.
fn covering_set(rng: &mut StdRng) -> Vec<Shape> {
    let mut all = Vec::new();
    let count: usize = VALUES.iter().product();
    for mut number in 0..count {
        let shape = VALUES.map(|values| {
            let value = number % values;
            number /= values;
            value
        });
        if exists(&shape) {
            all.push(shape);
        }
    }
    let mut missing: std::collections::HashSet<_> = all.iter().flat_map(pairs).collect();
    all.shuffle(rng);
    let mut chosen = Vec::new();
    while !missing.is_empty() {
        let gain = |shape: &&Shape| pairs(shape).filter(|pair| missing.contains(pair)).count();
        let best = *all.iter().max_by_key(gain).unwrap();
        for pair in pairs(&best) {
            missing.remove(&pair);
        }
        chosen.push(best);
    }
    chosen
}

fn options(shape: &Shape) -> String {
    let mut options = format!(
        "compat={},cluster_size={}",
        VERSIONS[shape[VERSION]], CLUSTERS[shape[CLUSTER]].0
    );
    if shape[VERSION] == 1 {
        options += &format!(",refcount_bits={}", WIDTHS[shape[WIDTH]]);
    }
    for (feature, option) in [
        (EXTENDED, ",extended_l2=on"),
        (LAZY, ",lazy_refcounts=on"),
        (PREALLOCATION, ",preallocation=metadata"),
    ] {
        if shape[feature] == 1 {
            options += option;
        }
    }
    if shape[COMPRESSED] == 2 {
        options += ",compression_type=zstd";
    }
    if shape[DATA_FILE] > 0 {
        let raw = if shape[DATA_FILE] == 2 { "on" } else { "off" };
        options += &format!(",data_file=made.data,data_file_raw={raw}");
    }
    options
}

/// One of the two copies.
struct Copy {
    path: PathBuf,
    data: Option<PathBuf>,
}

impl Copy {
    fn options(&self) -> String {
        let mut options = format!(
            "driver=qcow2,discard=unmap,file.driver=file,file.filename={}",
            self.path.display()
        );
        if let Some(data) = &self.data {
            options += &format!(
                ",data-file.driver=file,data-file.filename={}",
                data.display()
            );
        }
        options
    }

    fn open(&self) -> Disk {
        let more = match &self.data {
            Some(data) => {
                json!({"data-file": {"driver": "file", "filename": data.to_str().unwrap()}})
            }
            None => json!({}),
        };
        Disk::open(&self.path, "qcow2", more)
    }

    fn io(&self, commands: &[String]) {
        let options = self.options();
        let mut args = vec!["--image-opts"];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(&options);
        run("qemu-io", &args);
    }

    fn img(&self, args: &[&str]) -> String {
        let options = self.options();
        let args: Vec<&str> = args
            .iter()
            .copied()
            .chain(["--image-opts", &options])
            .collect();
        run("qemu-img", &args)
    }
}

/// A disk of a few clusters and a bit.
fn size(shape: &Shape) -> usize {
    let bulk = [1 << 20, 2 << 20, 6 << 20, 16 << 20];
    bulk[shape[CLUSTER]] + 3 * SECTOR
}

/// Runs a tool in `dir`, where relative names are looked up.
fn run_in(dir: &Path, program: &str, args: &[&str]) {
    let output = std::process::Command::new(program)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
}

/// Makes an image, writes a bit of everything to it and returns two copies.
fn make(dir: &Path, shape: &Shape, rng: &mut StdRng) -> (Copy, Copy) {
    let size = size(shape);
    let format = BACKINGS[shape[BACKING]];
    let options = options(shape);
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if !format.is_empty() {
        let base = (size as i64 + BACKING_SIZES[shape[BACKING]]) as usize;
        let base_size = base.to_string();
        run_in(
            dir,
            "qemu-img",
            &["create", "-q", "-f", format, "base", &base_size],
        );
        let writes: Vec<String> = (0..6)
            .map(|value| {
                let start = rng.random_range(0..base / SECTOR) * SECTOR;
                let len = (base / 12 / SECTOR * SECTOR).min(base - start);
                format!("write -q -P {} {start} {len}", 200 + value)
            })
            .collect();
        let writes: Vec<&str> = writes.iter().flat_map(|write| ["-c", write]).collect();
        run_in(
            dir,
            "qemu-io",
            &[&["-f", format], &writes[..], &["base"]].concat(),
        );
        args.extend(["-b", "base", "-F", format]);
    }
    let size_text = size.to_string();
    args.extend(["made", &size_text]);
    run_in(dir, "qemu-img", &args);
    let cluster = CLUSTERS[shape[CLUSTER]].1;
    let mut writes = vec![format!("write -q -P 1 {} {}", size / 8, size / 8)];
    if shape[COMPRESSED] > 0 {
        let start = size / 2 / cluster * cluster;
        for index in 0..4.min((size - start) / cluster) {
            let at = start + index * cluster;
            writes.push(format!("write -q -c -P {} {at} {cluster}", 10 + index));
        }
    }
    let writes: Vec<&str> = writes.iter().flat_map(|write| ["-c", write]).collect();
    run_in(
        dir,
        "qemu-io",
        &[&["-f", "qcow2"], &writes[..], &["made"]].concat(),
    );
    if shape[SNAPSHOT] == 1 {
        run_in(dir, "qemu-img", &["snapshot", "-c", "one", "made"]);
    }
    let copy = |name: &str| {
        let path = dir.join(name);
        std::fs::copy(dir.join("made"), &path).unwrap();
        let data = (shape[DATA_FILE] > 0).then(|| dir.join(format!("{name}.data")));
        if let Some(data) = &data {
            std::fs::copy(dir.join("made.data"), data).unwrap();
        }
        Copy { path, data }
    };
    (copy("ours"), copy("theirs"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Write(u8),
    Zero,
    Unmap,
    Discard,
    Flush,
}

/// An operation, its start and its length.
type Step = (Operation, usize, usize);

fn command((operation, start, len): Step) -> String {
    match operation {
        Operation::Write(value) => format!("write -q -P {value} {start} {len}"),
        Operation::Zero => format!("write -q -z {start} {len}"),
        Operation::Unmap => format!("write -q -z -u {start} {len}"),
        Operation::Discard => format!("discard -q {start} {len}"),
        Operation::Flush => "flush".to_owned(),
    }
}

/// A range: short ones, long ones, whole clusters, the disk's end.
fn range(rng: &mut StdRng, size: usize, cluster: usize) -> (usize, usize) {
    let longest = if rng.random_bool(0.3) {
        6 * cluster
    } else {
        cluster
    };
    let (mut start, mut len) = (
        rng.random_range(0..size / SECTOR) * SECTOR,
        rng.random_range(1..=longest / SECTOR) * SECTOR,
    );
    if rng.random_bool(0.4) {
        start = start / cluster * cluster;
        len = len.next_multiple_of(cluster);
    }
    if rng.random_bool(0.1) {
        len = size;
        start = start.max(size - size / 8 / SECTOR * SECTOR);
    }
    (start, len.min(size - start))
}

fn steps(rng: &mut StdRng, size: usize, cluster: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    for index in 0..OPERATIONS {
        let (start, len) = range(rng, size, cluster);
        let value = index as u8 + 20;
        match rng.random_range(0..10) {
            0..5 => steps.push((Operation::Write(value), start, len)),
            5 => steps.push((Operation::Zero, start, len)),
            6 => steps.push((Operation::Unmap, start, len)),
            7..9 => {
                steps.push((Operation::Discard, start, len));
                // What QEMU leaves out is written.
                let (end, whole) = (start + len, start.next_multiple_of(cluster));
                let last = if end == size {
                    end
                } else {
                    end / cluster * cluster
                };
                let write = |start, end| (Operation::Write(value), start, end - start);
                if whole >= last {
                    steps.push(write(start, end));
                } else {
                    steps.extend((start < whole).then(|| write(start, whole)));
                    steps.extend((last < end).then(|| write(last, end)));
                }
            }
            _ => steps.push((Operation::Flush, 0, 0)),
        }
    }
    steps
}

fn operate(disk: &Disk, (operation, start, len): Step) {
    let view = || View::of(disk.root.chain());
    let (offset, bytes) = (start as u64, len as u64);
    let done = match operation {
        Operation::Write(value) => disk.try_write(offset, &vec![value; len]),
        Operation::Zero => disk
            .reactor
            .block_on(view().write_zeroes(offset, bytes, false)),
        Operation::Unmap => disk
            .reactor
            .block_on(view().write_zeroes(offset, bytes, true)),
        Operation::Discard => disk.reactor.block_on(view().discard(offset, bytes)),
        Operation::Flush => disk.reactor.block_on(disk.root.chain().flush()),
    };
    done.unwrap_or_else(|error| panic!("{}: {error}", command((operation, start, len))));
}

/// What is known of a unit, where there is no choice.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Zero,
    Data { depth: u64, compressed: bool },
}

/// The states of all units, by `qemu-img map`.
fn states(copy: &Copy, size: usize, unit: usize) -> Vec<State> {
    let extents: Vec<Value> =
        serde_json::from_str(&copy.img(&["map", "--output=json"])).expect("JSON");
    let mut states = vec![None; size.div_ceil(unit)];
    for extent in extents {
        let number = |key: &str| extent[key].as_u64().unwrap() as usize;
        let (start, end) = (number("start"), number("start") + number("length"));
        // Data with the zero flag are a hole of the file, not the format's business.
        let state = if extent["data"] == true {
            State::Data {
                depth: number("depth") as u64,
                compressed: extent["compressed"] == true,
            }
        } else {
            State::Zero
        };
        for place in &mut states[start / unit..end.div_ceil(unit)] {
            // Below there may be smaller units: data anywhere makes it data.
            if !matches!(place, Some(State::Data { .. })) {
                *place = Some(state.clone());
            }
        }
    }
    states.into_iter().map(Option::unwrap).collect()
}

/// The units that are to be compared by data alone.
fn choices(shape: &Shape, steps: &[Step], size: usize, unit: usize) -> Vec<bool> {
    let no_flag = shape[VERSION] == 0 && shape[BACKING] > 0;
    let shared = shape[EXTENDED] == 1 && shape[SNAPSHOT] == 1;
    let cluster = CLUSTERS[shape[CLUSTER]].1;
    let mut choices = vec![false; size.div_ceil(unit)];
    let packed = shape[EXTENDED] == 1 && shape[COMPRESSED] > 0;
    for &(operation, start, len) in steps {
        let end = start + len;
        let ragged = start % cluster != 0 || (end % cluster != 0 && end != size);
        let as_data = no_flag || (packed && ragged);
        for (index, choice) in choices.iter_mut().enumerate() {
            let (first, last) = (index * unit, ((index + 1) * unit).min(size));
            let (before, behind) = (first / cluster * cluster, last.next_multiple_of(cluster));
            let whole = start <= before && end >= behind.min(size);
            if shared && operation != Operation::Flush && start < behind && end > before && !whole {
                *choice = true;
                continue;
            }
            if start >= last || end <= first || len == 0 {
                continue;
            }
            let cut = start > first || end < last;
            match operation {
                Operation::Zero | Operation::Unmap if cut || as_data => *choice = true,
                // Nothing happens.
                Operation::Discard if no_flag => {}
                _ if !cut => *choice = false,
                _ => {}
            }
        }
    }
    choices
}

fn one_shape(shape: &Shape, rng: &mut StdRng) {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = make(dir.path(), shape, rng);
    let (size, cluster) = (size(shape), CLUSTERS[shape[CLUSTER]].1);
    let unit = if shape[EXTENDED] == 1 {
        cluster / 32
    } else {
        cluster
    };
    let steps = steps(rng, size, cluster);
    let commands: Vec<String> = steps.iter().map(|&step| command(step)).collect();
    println!("{}", commands.join("\n"));
    let disk = ours.open();
    for &step in &steps {
        operate(&disk, step);
    }
    let bytes = disk.read(0, size);
    disk.close();
    theirs.io(&commands);
    let disk = theirs.open();
    assert!(
        disk.read(0, size) == bytes,
        "we read QEMU's otherwise than ours"
    );
    disk.close();
    ours.img(&["check"]);
    let (one, other) = (ours.options(), theirs.options());
    run("qemu-img", &["compare", "--image-opts", &one, &other]);
    let choices = choices(shape, &steps, size, unit);
    let states = states(&ours, size, unit)
        .into_iter()
        .zip(states(&theirs, size, unit));
    for (index, (ours, theirs)) in states.enumerate() {
        let in_file = shape[DATA_FILE] == 2
            && theirs == State::Zero
            && matches!(ours, State::Data { depth: 0, .. });
        assert!(
            ours == theirs || choices[index] || in_file,
            "at {}: {ours:?}, QEMU's is {theirs:?}",
            index * unit
        );
    }
    if shape[DATA_FILE] == 2 {
        let mut alone = std::fs::read(ours.data.unwrap()).unwrap();
        alone.resize(size, 0);
        assert!(alone == bytes, "the data file is no raw image of the disk");
    }
}

#[test]
fn operations_have_the_same_outcome_as_in_qemu() {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    let rounds = std::env::var("STRATABLK_ROUNDS").ok();
    for _ in 0..rounds.and_then(|rounds| rounds.parse().ok()).unwrap_or(1) {
        let shapes = covering_set(&mut rng);
        println!("seed {seed}: {} images", shapes.len());
        for shape in shapes {
            println!(
                "seed {seed}: {}, backing file '{}' {:+}, compressed '{}', snapshots {}",
                options(&shape),
                BACKINGS[shape[BACKING]],
                BACKING_SIZES[shape[BACKING]],
                COMPRESSIONS[shape[COMPRESSED]],
                shape[SNAPSHOT]
            );
            one_shape(&shape, &mut rng);
        }
    }
}
