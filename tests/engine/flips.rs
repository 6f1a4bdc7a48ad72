//! Every single bit of an image's metadata flipped, one at a time: the check, then the repair.
//!
//! What would be caught: a repair that changes what the disk reads as, in the end or when it is cut at
//! one of its writes, that writes on top of what something else holds, or makes of a damaged image one
//! that nothing opens; one that writes although it gives up; damage that the check does not see and
//! `qemu-img check` does.
//!
//! By default each image has some of its bits flipped, and `qemu-img` judges a few.
//! `STRATABLK_FLIPS=all` flips every bit with `qemu-img` beside, `STRATABLK_FLIPS_KIND=N` those of one
//! image; the verdicts that differ go to the file `STRATABLK_FLIPS_LOG`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stratablk::chain::{Chain, Layer, View};
use stratablk::format::qcow2::check::{self, Finding, Repair, Summary};
use stratablk::format::{Format, Qcow2, qcow2};
use stratablk::reactor::Reactor;
use stratablk::storage::memory::{MemoryStorage, Step};
use stratablk::storage::{AlignedBuf, IoBufs, Storage};

use crate::damage::Tables;
use crate::model::seed;
use crate::support::*;

/// More of a disk than this is not read, whatever its header says.
const READ: u64 = 1 << 20;

/// Options of an image, bytes of its disk, and whether it has snapshots and bitmaps.
const KINDS: [(&str, u64, bool, bool); 9] = [
    ("cluster_size=512", 256 << 10, true, true),
    ("cluster_size=1k,refcount_bits=8", 512 << 10, true, false),
    ("cluster_size=4k", 1 << 20, true, true),
    ("cluster_size=4k", 1 << 20, false, false),
    ("cluster_size=4k,refcount_bits=1", 1 << 20, false, true),
    ("cluster_size=4k,refcount_bits=64", 1 << 20, true, true),
    ("compat=0.10,cluster_size=4k", 1 << 20, true, false),
    ("cluster_size=16k,extended_l2=on", 1 << 20, true, true),
    ("cluster_size=64k", 1 << 20, true, true),
];

/// What is flipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Structure {
    Header,
    L1,
    RefcountTable,
    SnapshotTable,
    SnapshotL1,
    BitmapDirectory,
}

/// An image of data, with snapshots between which some of it was written again.
fn make(path: &Path, options: &str, size: u64, snapshots: bool, bitmaps: bool, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    create(path, options, size);
    let image = path.to_str().unwrap();
    let mut write = |value: u8| {
        let mut args = vec!["-f".to_owned(), "qcow2".to_owned()];
        for piece in 0..6 {
            let start = rng.random_range(0..size / 4096) * 4096;
            let len = (rng.random_range(1..=8) * 4096).min(size - start);
            let value = value + piece;
            args.push("-c".to_owned());
            args.push(format!("write -q -P {value} {start} {len}"));
        }
        args.push(image.to_owned());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        run("qemu-io", &args);
    };
    write(1);
    write(7);
    if bitmaps {
        run("qemu-img", &["bitmap", "--add", "-g", "4k", image, "b0"]);
        run(
            "qemu-img",
            &["bitmap", "--add", "-g", "64k", image, "other"],
        );
    }
    for (name, value) in [("one", 20), ("second", 40)] {
        if snapshots {
            run("qemu-img", &["snapshot", "-c", name, image]);
        }
        write(value);
    }
}

/// What a structure has in the image: first byte and bytes.
fn places(bytes: &[u8]) -> Vec<(Structure, u64, u64)> {
    let tables = Tables::of(bytes.to_vec(), 0);
    let half = |at: u64| tables.word(at) >> 32;
    let mut places = vec![
        (Structure::L1, tables.word(40), half(36) * 8),
        // Those in use, and two that are not.
        (
            Structure::RefcountTable,
            tables.word(48),
            tables.reftable().len() as u64 * 8 + 16,
        ),
    ];
    let fixed = if tables.version == 3 { half(100) } else { 72 };
    places.push((Structure::Header, 0, fixed));
    if tables.version == 3 {
        let mut header = fixed;
        // The extensions; of the names of the features only where they are.
        loop {
            let (kind, len) = (half(header), half(header + 4));
            let meaning = if kind == 0x6803_f857 { 8 } else { 8 + len };
            places.push((Structure::Header, header, meaning));
            if kind == 0x2385_2875 {
                let (len, at) = (tables.word(header + 16), tables.word(header + 24));
                places.push((Structure::BitmapDirectory, at, len));
            }
            header += 8 + len.next_multiple_of(8);
            if kind == 0 {
                break;
            }
        }
    }
    let start = tables.word(64);
    let mut at = start;
    for _ in 0..half(60) {
        places.push((Structure::SnapshotL1, tables.word(at), half(at + 8) * 8));
        let names = tables.word(at + 8);
        let (id, name) = (names >> 16 & 0xffff, names & 0xffff);
        at = (at + 40 + half(at + 36) + id + name).next_multiple_of(8);
    }
    places.push((Structure::SnapshotTable, start, at - start));
    places
}

/// What the disk reads as, in pieces of a cluster; `None`: the piece cannot be read, or nothing can.
fn content(bytes: &[u8]) -> Option<Vec<Option<Vec<u8>>>> {
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let reactor = Reactor::for_this_thread().unwrap();
    let image = reactor
        .block_on(Qcow2::open(storage.clone(), qcow2::Options::default()))
        .ok()?;
    let image = Arc::new(image);
    let layer = Layer {
        name: "top".into(),
        format: Format::Qcow2(image),
        storage: storage.clone() as Arc<dyn Storage>,
        read_only: true,
        discard: false,
        copy_on_read: false,
    };
    let chain = Arc::new(Chain::new(vec![Arc::new(layer)]).unwrap());
    let piece = 4096.min(chain.size());
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < chain.size().min(READ) {
        let len = piece.min(chain.size() - at) as usize;
        let buffer = AlignedBuf::zeroed(len);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
        let result = reactor.block_on(View::of(chain.clone()).read(at, bufs));
        pieces.push(result.ok().map(|()| buffer.to_vec()));
        at += len as u64;
    }
    Some(pieces)
}

/// Whether all that could be read reads the same.
fn kept(before: &Option<Vec<Option<Vec<u8>>>>, after: &Option<Vec<Option<Vec<u8>>>>) -> bool {
    let (Some(before), after) = (before, after) else {
        return true;
    };
    let Some(after) = after else { return false };
    before.len() == after.len()
        && before
            .iter()
            .zip(after)
            .all(|(before, after)| before.is_none() || before == after)
}

fn code(result: &stratablk::error::Result<Summary>) -> i32 {
    match result {
        Err(_) => 1,
        Ok(summary) if summary.corruptions > 0 => 2,
        Ok(summary) if summary.leaks > 0 => 3,
        Ok(_) => 0,
    }
}

struct Outcome {
    found: i32,
    left: i32,
    after: Vec<u8>,
    steps: Vec<Step>,
    said: Vec<String>,
}

impl Outcome {
    fn wrote(&self) -> bool {
        self.steps.iter().any(|step| *step != Step::Sync)
    }
}

/// The check, then the repair.
fn repair(damaged: &[u8]) -> Outcome {
    let reactor = Reactor::for_this_thread().unwrap();
    let storage = MemoryStorage::new(damaged.to_vec());
    let mut said = Vec::new();
    let found = code(&reactor.block_on(check::check(&storage, &mut |_| ())));
    storage.record();
    // Some have thousands to say.
    let mut report = |finding: Finding| {
        if said.len() < 4 {
            said.push(finding.to_string());
        }
    };
    let result = reactor.block_on(check::repair(&storage, Repair::All, &mut report));
    if let Err(error) = &result {
        said.push(error.to_string());
    }
    Outcome {
        found,
        left: code(&result),
        after: storage.snapshot(),
        steps: storage.take_log(),
        said,
    }
}

fn qemu_code(path: &Path) -> i32 {
    let args = ["check", "-f", "qcow2", path.to_str().unwrap()];
    output("qemu-img", &args).status.code().unwrap_or(-1)
}

fn qemu_reads(path: &Path) -> Option<Vec<u8>> {
    let raw = path.with_extension("raw");
    let args = ["convert", "-f", "qcow2", "-O", "raw"];
    let names = [path.to_str().unwrap(), raw.to_str().unwrap()];
    let info = output("qemu-img", &["info", "--output=json", names[0]]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).ok()?;
    if info["virtual-size"].as_u64()? > 64 << 20 {
        return None;
    }
    let output = output("qemu-img", &[&args[..], &names[..]].concat());
    output
        .status
        .success()
        .then(|| std::fs::read(&raw).unwrap())
}

/// How many there were of a kind.
#[derive(Default)]
struct Tally {
    flips: usize,
    clean: usize,
    repaired: usize,
    refused: usize,
    partly: usize,
    beside: usize,
    differ: BTreeMap<(i32, i32), usize>,
}

struct Flips {
    path: PathBuf,
    tallies: BTreeMap<Structure, Tally>,
    faults: Vec<String>,
    differences: Vec<String>,
    rng: StdRng,
}

impl Flips {
    fn one(&mut self, bytes: &[u8], structure: Structure, bit: u64, context: &str, qemu: bool) {
        let cut = self.rng.random_ratio(1, 10);
        let mut damaged = bytes.to_vec();
        damaged[(bit / 8) as usize] ^= 1 << (bit % 8);
        let context = format!("{context}: {structure:?}, byte {} bit {}", bit / 8, bit % 8);
        let before = content(&damaged);
        let outcome = repair(&damaged);
        let tally = self.tallies.entry(structure).or_default();
        tally.flips += 1;
        match (outcome.found, outcome.left, outcome.wrote()) {
            (0, 0, _) => tally.clean += 1,
            (_, 0, _) => tally.repaired += 1,
            (_, _, false) => tally.refused += 1,
            _ => tally.partly += 1,
        }
        let mut fault = |what: &str| {
            self.faults
                .push(format!("{context}: {what}: {:?}", outcome.said))
        };
        if !kept(&before, &content(&outcome.after)) {
            fault("it reads differently after the repair");
        }
        if outcome.left == 1 && outcome.after != damaged {
            fault("the repair failed and has changed the image");
        }
        if cut {
            for count in 0..outcome.steps.len() {
                let left = crate::repair::cut(&damaged, &outcome.steps[..count], &mut self.rng);
                if !kept(&before, &content(&left)) {
                    fault(&format!("it reads differently after a cut at step {count}"));
                }
            }
        }
        if !qemu {
            return;
        }
        tally.beside += 1;
        std::fs::write(&self.path, &damaged).unwrap();
        let theirs = qemu_code(&self.path);
        if theirs != outcome.found {
            *tally.differ.entry((outcome.found, theirs)).or_default() += 1;
            self.differences.push(format!(
                "{context}: we say {}, qemu-img {theirs}: {:?}",
                outcome.found, outcome.said
            ));
        }
        if matches!(outcome.found, 0 | 3) && matches!(theirs, 1 | 2) {
            fault("qemu-img finds more");
        }
        if outcome.after == damaged {
            return;
        }
        let reads = qemu_reads(&self.path);
        std::fs::write(&self.path, &outcome.after).unwrap();
        if let Some(reads) = reads
            && qemu_reads(&self.path) != Some(reads)
        {
            fault("qemu-img reads it differently after the repair");
        }
        if outcome.left == 0 && qemu_code(&self.path) != 0 {
            fault("qemu-img finds errors after the repair");
        }
    }
}

#[test]
fn no_repair_of_a_flipped_bit_changes_the_disk() {
    let seed = seed();
    println!("seed {seed}");
    let all = std::env::var("STRATABLK_FLIPS").is_ok_and(|value| value == "all");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let image = in_dir(&dir, "image.qcow2");
    let mut flips = Flips {
        path: in_dir(&dir, "flipped.qcow2"),
        tallies: BTreeMap::new(),
        faults: Vec::new(),
        differences: Vec::new(),
        rng: StdRng::seed_from_u64(seed),
    };
    // One kind alone, by number.
    let only: Option<usize> = std::env::var("STRATABLK_FLIPS_KIND")
        .ok()
        .and_then(|number| number.parse().ok());
    for (number, (options, size, snapshots, bitmaps)) in KINDS.into_iter().enumerate() {
        if only.is_some_and(|only| only != number) {
            continue;
        }
        make(&image, options, size, snapshots, bitmaps, seed);
        let bytes = std::fs::read(&image).unwrap();
        for (structure, at, len) in places(&bytes) {
            for bit in at * 8..(at + len) * 8 {
                let chosen = match structure {
                    // Where most went wrong.
                    Structure::SnapshotTable => rng.random_ratio(1, 6),
                    _ => rng.random_ratio(1, 24),
                };
                if all || chosen {
                    let qemu = all || rng.random_ratio(1, 100);
                    flips.one(&bytes, structure, bit, options, qemu);
                }
            }
        }
    }
    for (structure, tally) in &flips.tallies {
        println!(
            "{structure:?}: {} flips: {} clean, {} repaired, {} refused, {} repaired in part; {} with \
             qemu-img, verdicts that differ (ours, qemu-img's): {:?}",
            tally.flips,
            tally.clean,
            tally.repaired,
            tally.refused,
            tally.partly,
            tally.beside,
            tally.differ
        );
    }
    if let Ok(file) = std::env::var("STRATABLK_FLIPS_LOG") {
        std::fs::write(file, flips.differences.join("\n")).unwrap();
    }
    assert!(
        flips.faults.is_empty(),
        "seed {seed}: {} faults:\n{}",
        flips.faults.len(),
        flips.faults.join("\n")
    );
}
