//! Power cuts, by recording: every write and barrier of a workload is logged; then the image is
//! rebuilt as a cut at some instant may leave it (what was behind the last barrier, whole; of the
//! later writes any subset of sectors, in any order), judged by `qemu-img check` and read back.
//!
//! What would be caught: a pointer that reaches the disk before what it points at, references
//! taken off too early, clusters used again too early, flushed data lost, a torn header, a
//! stream whose base is let go of before the copy is stable.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use stratablk::chain::{Chain, Layer, Span, View};
use stratablk::format::{Format, Qcow2, Raw, qcow2};
use stratablk::reactor::Reactor;
use stratablk::storage::memory::{MemoryStorage, Step};
use stratablk::storage::{AlignedBuf, IoBufs, Storage};

use crate::model::{SECTOR, seed};
use crate::support::*;

const SIZE: usize = 2 << 20;
const SECTORS: usize = SIZE / SECTOR;

/// What happened to a sector, and when.
#[derive(Clone, Copy)]
enum Change {
    Write(u32),
    Discard,
}

struct Entry {
    /// Steps in the log when the operation began.
    began: usize,
    /// The operation's number.
    number: usize,
    change: Change,
}

struct Run {
    reactor: Reactor,
    top: Arc<MemoryStorage>,
    chain: Arc<Chain>,
    history: Vec<Vec<Entry>>,
    /// Log length and number of the last operation, at the end of each flush.
    flushes: Vec<(usize, usize)>,
    number: usize,
    stamp: u32,
    base: Vec<u8>,
}

fn stamp_sector(stamp: u32) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    sector
        .chunks_mut(4)
        .for_each(|chunk| chunk.copy_from_slice(&stamp.to_le_bytes()));
    sector
}

fn layer(name: &str, format: Format, storage: Arc<dyn Storage>, read_only: bool) -> Arc<Layer> {
    Arc::new(Layer {
        name: name.into(),
        format,
        storage,
        read_only,
        discard: true,
        copy_on_read: false,
    })
}

fn open(reactor: &Reactor, top: Arc<MemoryStorage>, base: &[u8], writable: bool) -> Arc<Chain> {
    let options = qcow2::Options {
        writable,
        discard: true,
        ..Default::default()
    };
    let image = reactor.block_on(Qcow2::open(top.clone(), options)).unwrap();
    let has_backing = image.backing().is_some();
    let mut layers = vec![layer("top", Format::Qcow2(Arc::new(image)), top, !writable)];
    if has_backing {
        let storage = Arc::new(MemoryStorage::new(base.to_vec()));
        layers.push(layer(
            "base",
            Format::Raw(Raw::new(SIZE as u64)),
            storage,
            true,
        ));
    }
    Arc::new(Chain::new(layers).unwrap())
}

impl Run {
    fn new(dir: &Path, options: &str, with_base: bool) -> Self {
        let path = dir.join("start.qcow2");
        let mut base = vec![0; SIZE];
        if with_base {
            for sector in (0..SECTORS).filter(|sector| sector / 40 % 3 != 0) {
                let stamp = stamp_sector(0x8000_0000 + sector as u32);
                base[sector * SECTOR..][..SECTOR].copy_from_slice(&stamp);
            }
            std::fs::write(dir.join("base.raw"), &base).unwrap();
            create_over(&path, options, &dir.join("base.raw"), "raw");
        } else {
            create(&path, options, SIZE as u64);
        }
        let reactor = Reactor::for_this_thread().unwrap();
        let top = Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()));
        let chain = open(&reactor, top.clone(), &base, true);
        let history = (0..SECTORS)
            .map(|sector| {
                let first: [u8; 4] = base[sector * SECTOR..][..4].try_into().unwrap();
                let change = Change::Write(u32::from_le_bytes(first));
                vec![Entry {
                    began: 0,
                    number: 0,
                    change,
                }]
            })
            .collect();
        Self {
            reactor,
            top,
            chain,
            history,
            flushes: vec![(0, 0)],
            number: 0,
            stamp: 0,
            base,
        }
    }

    fn step(&mut self, rng: &mut StdRng) {
        self.number += 1;
        let began = self.top.steps();
        let view = View::of(self.chain.clone());
        let start = rng.random_range(0..SECTORS);
        let len = rng.random_range(1..=64).min(SECTORS - start);
        let (offset, bytes) = ((start * SECTOR) as u64, len * SECTOR);
        match rng.random_range(0..12) {
            0..6 => {
                let mut buffer = AlignedBuf::zeroed(bytes);
                for (index, sector) in buffer.chunks_mut(SECTOR).enumerate() {
                    self.stamp += 1;
                    sector.copy_from_slice(&stamp_sector(self.stamp));
                    let change = Change::Write(self.stamp);
                    self.history[start + index].push(Entry {
                        began,
                        number: self.number,
                        change,
                    });
                }
                // SAFETY: `buffer` outlives the operation.
                let bufs = unsafe { IoBufs::of(&buffer, 0, bytes) };
                self.reactor.block_on(view.write(offset, bufs)).unwrap();
            }
            6 => {
                self.note(start, len, began, Change::Write(0));
                let unmap = rng.random();
                self.reactor
                    .block_on(view.write_zeroes(offset, bytes as u64, unmap))
                    .unwrap();
            }
            7..9 => {
                self.note(start, len, began, Change::Discard);
                self.reactor
                    .block_on(view.discard(offset, bytes as u64))
                    .unwrap();
            }
            9 => {
                let end = self.chain.layers().len();
                self.reactor
                    .block_on(view.copy(Span::new(0, end), offset, bytes as u64))
                    .unwrap();
            }
            _ => self.flush(),
        }
    }

    fn note(&mut self, start: usize, len: usize, began: usize, change: Change) {
        let number = self.number;
        for sector in &mut self.history[start..start + len] {
            sector.push(Entry {
                began,
                number,
                change,
            });
        }
    }

    fn flush(&mut self) {
        self.reactor.block_on(self.chain.flush()).unwrap();
        self.flushes.push((self.top.steps(), self.number));
    }

    /// What a sector may hold after a cut when `cut` steps had been issued.
    fn allowed(&self, sector: usize, cut: usize) -> Vec<u32> {
        let flushed = self
            .flushes
            .iter()
            .rfind(|(steps, _)| *steps <= cut)
            .map_or(0, |f| f.1);
        let mut allowed = Vec::new();
        for entry in &self.history[sector] {
            if entry.number > flushed && entry.began > cut {
                break;
            }
            match entry.change {
                Change::Write(stamp) if entry.number <= flushed => allowed = vec![stamp],
                Change::Write(stamp) => allowed.push(stamp),
                Change::Discard => allowed.push(0),
            }
        }
        allowed
    }

    fn judge(&self, dir: &Path, bytes: Vec<u8>, cut: usize, seed: u64) {
        let path = dir.join("cut.qcow2");
        std::fs::write(&path, &bytes).unwrap();
        check(&path, true);
        let top = Arc::new(MemoryStorage::new(bytes));
        let view = View::of(open(&self.reactor, top, &self.base, false));
        let buffer = AlignedBuf::zeroed(SIZE);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, SIZE) };
        self.reactor
            .block_on(Rc::clone(&view).read(0, bufs))
            .unwrap();
        for (sector, got) in buffer.chunks(SECTOR).enumerate() {
            let allowed = self.allowed(sector, cut);
            let fine = allowed.iter().any(|&stamp| got == stamp_sector(stamp));
            assert!(
                fine,
                "seed {seed}, cut after step {cut}: sector {sector} reads {:x?}, allowed stamps \
                 {allowed:x?}",
                &got[..8]
            );
        }
    }
}

pub fn apply(image: &mut Vec<u8>, step: &Step) {
    match step {
        Step::Write { offset, bytes } => {
            let end = *offset as usize + bytes.len();
            if image.len() < end {
                image.resize(end, 0);
            }
            image[*offset as usize..end].copy_from_slice(bytes);
        }
        Step::Zero { offset, len } => {
            let end = ((offset + len) as usize).min(image.len());
            if let Some(range) = image.get_mut(*offset as usize..end) {
                range.fill(0);
            }
        }
        Step::SetLen(len) => image.resize(*len as usize, 0),
        Step::Grow(len) => image.resize(image.len().max(*len as usize), 0),
        Step::Sync => {}
    }
}

/// Cuts steps into what a disk writes as a whole: sectors.
pub fn torn(steps: &[Step]) -> Vec<Step> {
    let mut pieces = Vec::new();
    for step in steps {
        match step {
            Step::Write { offset, bytes } => {
                for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                    let offset = offset + (index * SECTOR) as u64;
                    pieces.push(Step::Write {
                        offset,
                        bytes: sector.to_vec(),
                    });
                }
            }
            other => pieces.push(other.clone()),
        }
    }
    pieces
}

fn cuts(options: &str, with_base: bool, stream: bool, count: usize) {
    let seed = seed();
    println!("seed {seed}: {options}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let mut run = Run::new(dir.path(), options, with_base);
    let start = run.top.snapshot();
    run.top.record();
    for _ in 0..150 {
        run.step(&mut rng);
    }
    if stream {
        let end = run.chain.layers().len();
        let view = View::of(run.chain.clone());
        run.reactor
            .block_on(view.copy(Span::new(0, end), 0, SIZE as u64))
            .unwrap();
        let Format::Qcow2(image) = &run.chain.top().format else {
            panic!()
        };
        run.reactor.block_on(image.set_backing(None)).unwrap();
        run.flushes.push((run.top.steps(), run.number));
    }
    let log = run.top.take_log();
    // Each interval between barriers is met, not just the long ones.
    let syncs: Vec<usize> = log
        .iter()
        .enumerate()
        .filter(|(_, s)| **s == Step::Sync)
        .map(|(i, _)| i)
        .collect();
    for round in 0..count {
        let cut = if round % 2 == 0 && !syncs.is_empty() {
            syncs[rng.random_range(0..syncs.len())]
        } else {
            rng.random_range(0..=log.len())
        };
        let stable = syncs
            .iter()
            .rfind(|&&sync| sync < cut)
            .map_or(0, |&sync| sync);
        let mut image = start.clone();
        log[..stable]
            .iter()
            .for_each(|step| apply(&mut image, step));
        let mut later = torn(&log[stable..cut]);
        later.shuffle(&mut rng);
        let kept = rng.random_range(0..=later.len());
        later[..kept]
            .iter()
            .for_each(|step| apply(&mut image, step));
        run.judge(dir.path(), image, cut, seed);
    }
}

#[test]
fn a_cut_at_any_instant_leaves_a_sound_image() {
    cuts("cluster_size=4k", false, false, 120);
    cuts("cluster_size=512,refcount_bits=64", false, false, 120);
    cuts("cluster_size=64k,compat=0.10", false, false, 60);
}

#[test]
fn a_cut_leaves_a_sound_overlay() {
    cuts("cluster_size=4k", true, false, 120);
    cuts("cluster_size=4k,compat=0.10", true, false, 60);
}

#[test]
fn a_cut_during_the_end_of_a_stream_loses_nothing() {
    cuts("cluster_size=4k", true, true, 120);
    cuts("cluster_size=512,compat=0.10", true, true, 60);
    cuts("cluster_size=64k", true, true, 60);
}
