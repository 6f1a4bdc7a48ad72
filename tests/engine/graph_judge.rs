//! Random graphs, copy-on-read filters anywhere in them, served by this engine and by a running
//! `qemu-storage-daemon`: the same guest gets the same bytes from both, and each goes on with the
//! files that the other one has left.
//!
//! What would be caught: a filter that changes what is read, copies at another place or copies into
//! a layer that is only read; a window, a disk in a disk or a data file that is taken otherwise than
//! QEMU takes it; an image that QEMU cannot go on with; a discard that brings a base to light.
//!
//! What a sector holds after a discard is the device's choice until it is written: here it is zeros
//! or what it was before, and of QEMU nothing is asked.
//!
//! `STRATABLK_GRAPHS` says how many graphs; a seed makes one of them.

use std::cell::RefCell;
use std::rc::Rc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::graph_maker::{Maker, open};
use crate::model::{SECTOR, seed};
use crate::nbd::{Client, Server};
use crate::support::*;

/// Graphs of a run that is to take seconds.
const GRAPHS: u64 = 6;
/// Graphs that one daemon serves.
const TOGETHER: usize = 3;
/// Times that a graph is opened by each.
const SESSIONS: u64 = 3;
/// Operations of a session, in rounds of so many at a time.
const ROUNDS: usize = 6;
const AT_ONCE: usize = 16;

/// What a guest does with the sectors from `start` on.
struct Step {
    start: usize,
    len: usize,
    work: Work,
}

enum Work {
    Read,
    Write(Vec<u8>),
    Zero(bool),
    Discard,
    Flush,
}

impl Step {
    fn offset(&self) -> u64 {
        (self.start * SECTOR) as u64
    }

    fn bytes(&self) -> usize {
        self.len * SECTOR
    }
}

/// Operations of which none meets another one.
fn round(rng: &mut StdRng, sectors: usize) -> Vec<Step> {
    let mut busy = vec![false; sectors];
    let mut steps = Vec::new();
    while steps.len() < AT_ONCE {
        let start = rng.random_range(0..sectors);
        let len = rng.random_range(1..=(sectors / 20)).min(sectors - start);
        if busy[start..start + len].contains(&true) {
            continue;
        }
        busy[start..start + len].fill(true);
        let work = match rng.random_range(0..20) {
            0..7 => {
                let mut data = vec![0; len * SECTOR];
                data.chunks_mut(SECTOR)
                    .for_each(|sector| sector.fill(rng.random()));
                Work::Write(data)
            }
            7..12 => Work::Read,
            12..14 => Work::Zero(false),
            14..16 => Work::Zero(true),
            16..19 => Work::Discard,
            _ => Work::Flush,
        };
        steps.push(Step { start, len, work });
    }
    steps
}

/// What a disk is to hold.
#[derive(Clone)]
struct Expected {
    bytes: Vec<u8>,
    discarded: Vec<bool>,
}

impl Expected {
    fn follow(&mut self, step: &Step) {
        let at = step.start * SECTOR..(step.start + step.len) * SECTOR;
        match &step.work {
            Work::Write(data) => self.bytes[at].copy_from_slice(data),
            Work::Zero(_) => self.bytes[at].fill(0),
            Work::Read | Work::Discard | Work::Flush => {}
        }
        if !matches!(step.work, Work::Read | Work::Flush) {
            let discarded = matches!(step.work, Work::Discard);
            self.discarded[step.start..step.start + step.len].fill(discarded);
        }
    }

    /// Compares what was read from sector `start` on; `strictly`: discarded sectors, too.
    fn compare(&self, start: usize, seen: &[u8], strictly: bool, what: &str) {
        for (index, seen) in seen.chunks(SECTOR).enumerate() {
            let sector = start + index;
            let bytes = &self.bytes[sector * SECTOR..][..SECTOR];
            let is_free = self.discarded[sector] && (!strictly || seen.iter().all(|&b| b == 0));
            assert!(
                seen == bytes || is_free,
                "{what}: sector {sector} (discarded: {}): expected {:?}, read {:?}",
                self.discarded[sector],
                &bytes[..4],
                &seen[..4]
            );
        }
    }

    /// Takes over what there is of discarded sectors.
    fn adopt(&mut self, seen: &[u8]) {
        for (sector, _) in self.discarded.iter().enumerate().filter(|(_, is)| **is) {
            let at = sector * SECTOR..(sector + 1) * SECTOR;
            self.bytes[at.clone()].copy_from_slice(&seen[at]);
        }
    }
}

/// What a guest of the daemon reads.
fn by_daemon(client: &mut Client, step: &Step) -> Option<Vec<u8>> {
    let (offset, len) = (step.offset(), step.bytes());
    match &step.work {
        Work::Read => return Some(client.read(offset, len)),
        Work::Write(data) => client.write(offset, data),
        Work::Zero(unmap) => client.zero(offset, len, *unmap),
        Work::Discard => client.discard(offset, len),
        Work::Flush => client.flush(),
    }
    None
}

/// What a guest of ours reads.
async fn by_us(disk: &Disk, step: &Step) -> Option<Vec<u8>> {
    let (offset, len) = (step.offset(), step.bytes());
    let buffer = match &step.work {
        Work::Write(data) => AlignedBuf::copy_of(data),
        _ => AlignedBuf::zeroed(len),
    };
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
    let view = disk.view();
    match &step.work {
        Work::Read => view.read(offset, bufs).await.unwrap(),
        Work::Write(_) => view.write(offset, bufs).await.unwrap(),
        Work::Zero(unmap) => view.write_zeroes(offset, len as u64, *unmap).await.unwrap(),
        Work::Discard => view.discard(offset, len as u64).await.unwrap(),
        Work::Flush => disk.root.chain().flush().await.unwrap(),
    }
    matches!(step.work, Work::Read).then(|| buffer.to_vec())
}

/// The node as the daemon takes it: what lies under an image is read-only there unless it is said
/// otherwise, and a filter that cannot copy is refused.
fn for_daemon(node: &Value, is_below: bool) -> Value {
    let Value::Object(map) = node else {
        return node.clone();
    };
    let mut own = map.clone();
    for (key, value) in &mut own {
        *value = for_daemon(value, is_below || key == "backing");
    }
    if is_below && node["driver"] == "copy-on-read" {
        own.insert("read-only".into(), json!(false));
    }
    Value::Object(own)
}

/// A graph twice.
struct Pair {
    seed: u64,
    rng: StdRng,
    ours: (Maker, Value),
    theirs: (Maker, Value),
    expected: Expected,
    /// The guest of this session.
    rounds: Vec<Vec<Step>>,
}

impl Pair {
    fn new(seed: u64) -> Self {
        let mut maker = Maker::new(seed);
        let (node, bytes) = maker.disk();
        println!("seed {seed}: {node}");
        let sectors = bytes.len() / SECTOR;
        Self {
            seed,
            rng: StdRng::seed_from_u64(seed ^ 1),
            theirs: maker.copied(&node),
            ours: (maker, node),
            expected: Expected {
                bytes,
                discarded: vec![false; sectors],
            },
            rounds: Vec::new(),
        }
    }

    fn name(&self) -> String {
        format!("top{}", self.seed)
    }

    fn of_daemon(&self) -> Value {
        let mut node = for_daemon(&self.theirs.1, false);
        node["node-name"] = json!(self.name());
        node
    }

    /// Has the guest at the daemon. Returns what it reads at the end.
    fn daemons_turn(&self, server: &mut Server) -> Vec<u8> {
        let what = format!("seed {}, by qemu-storage-daemon", self.seed);
        let mut client = server.connect(&self.name());
        let mut expected = self.expected.clone();
        let len = expected.bytes.len();
        assert_eq!(client.size(), len as u64, "{what}");
        expected.compare(0, &client.read(0, len), false, &what);
        for step in self.rounds.iter().flatten() {
            if let Some(seen) = by_daemon(&mut client, step) {
                expected.compare(step.start, &seen, false, &what);
            }
            expected.follow(step);
        }
        let seen = client.read(0, len);
        expected.compare(0, &seen, false, &what);
        seen
    }

    /// Has the guest here. Returns what it reads at the end, and what it is to have read.
    fn our_turn(&mut self) -> (Vec<u8>, Expected) {
        let flattened = self.rng.random();
        let what = format!("seed {}, flattened: {flattened}", self.seed);
        let fixed = self.ours.0.fixed();
        let disk = Rc::new(open(&self.ours.1, flattened, &mut self.rng));
        let mut expected = self.expected.clone();
        let len = expected.bytes.len();
        let seen = disk.read(0, len);
        expected.compare(0, &seen, false, &what);
        expected.adopt(&seen);
        for steps in std::mem::take(&mut self.rounds) {
            let steps = Rc::new(steps);
            let seen = Rc::new(RefCell::new(vec![None; steps.len()]));
            for index in 0..steps.len() {
                let (disk, steps, seen) = (disk.clone(), steps.clone(), seen.clone());
                let reactor = disk.reactor.clone();
                reactor.spawn(async move {
                    let read = by_us(&disk, &steps[index]).await;
                    seen.borrow_mut()[index] = read;
                });
            }
            while disk.reactor.tasks() > 0 {
                if !disk.reactor.turn() {
                    disk.reactor.wait(None);
                }
            }
            for (step, seen) in steps.iter().zip(seen.take()) {
                if let Some(seen) = seen {
                    expected.compare(step.start, &seen, true, &what);
                }
                expected.follow(step);
            }
        }
        let seen = disk.read(0, len);
        expected.compare(0, &seen, true, &what);
        let Ok(disk) = Rc::try_unwrap(disk) else {
            panic!("a task has it");
        };
        disk.close();
        assert!(self.ours.0.fixed() == fixed, "{what}: a base was written");
        (seen, expected)
    }

    /// Judges the files of both, and gives each the other's.
    fn exchange(&mut self, by_daemon: &[u8], by_us: &[u8]) {
        let sides = [(&mut self.theirs, by_daemon), (&mut self.ours, by_us)];
        for ((maker, node), seen) in sides {
            let seed = self.seed;
            assert!(maker.of_qemu(node) == seen, "seed {seed}: {node}: the end");
            if node["driver"] == "copy-on-read" {
                // All of it has been read, and so copied.
                let mut alone = node["file"].clone();
                alone["backing"] = Value::Null;
                assert!(maker.of_qemu(&alone) == seen, "seed {seed}: {node}: copies");
            }
            maker.judge();
        }
        std::mem::swap(&mut self.ours, &mut self.theirs);
    }
}

#[test]
fn a_graph_is_served_as_qemu_storage_daemon_serves_it() {
    let count = std::env::var("STRATABLK_GRAPHS").ok();
    let count = count.map_or(GRAPHS, |count| count.parse().unwrap());
    let seed = seed();
    println!("STRATABLK_SEED={seed}");
    let seeds: Vec<_> = (0..count).map(|number| seed.wrapping_add(number)).collect();
    for seeds in seeds.chunks(TOGETHER) {
        let mut pairs: Vec<_> = seeds.iter().map(|&seed| Pair::new(seed)).collect();
        for _ in 0..SESSIONS {
            for pair in &mut pairs {
                let sectors = pair.expected.discarded.len();
                let rounds = (0..ROUNDS).map(|_| round(&mut pair.rng, sectors));
                pair.rounds = rounds.collect();
            }
            let dir = tempfile::tempdir().unwrap();
            let nodes: Vec<_> = pairs.iter().map(Pair::of_daemon).collect();
            let mut server = Server::start(dir.path(), &nodes);
            let turns = pairs.iter().map(|pair| pair.daemons_turn(&mut server));
            let by_daemon: Vec<_> = turns.collect();
            server.stop();
            for (pair, by_daemon) in pairs.iter_mut().zip(by_daemon) {
                let (by_us, expected) = pair.our_turn();
                pair.exchange(&by_daemon, &by_us);
                pair.expected = expected;
            }
        }
    }
}
