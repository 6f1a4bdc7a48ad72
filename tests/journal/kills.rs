//! The journal: a process is killed at a random store to the journal or operation on the storage,
//! and the next one goes on with what is left, several times over.
//!
//! What would be caught: a completed write, zeroing or discard that is lost; a change without a
//! record, or with one that comes after somebody could rely on it; clusters handed out twice; an
//! adopted state that QEMU's check finds wrong, also after the next flush; a log that runs over
//! itself; a flush that takes records away which the disk does not have; a kill while the next
//! process starts that changes something; a journal adopted by another image, an older copy, after
//! a power cut or when somebody else has written; an image with a live journal that is read or
//! written as though there were none; a mark that a clean close leaves behind.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stratablk::chain::{Chain, Layer, Span, View};
use stratablk::error::Result;
use stratablk::format::qcow2::journal::Folder;
use stratablk::format::{Format, Qcow2, Raw, qcow2};
use stratablk::reactor::{Reactor, Token};
use stratablk::shared_memory::Gate;
use stratablk::storage::memory::MemoryStorage;
use stratablk::storage::{
    AlignedBuf, Answer, IoBufs, Limits, Op, Storage, Submission, Syncs, at_once,
};

use crate::model::{SECTOR, seed};
use crate::support::*;

const SIZE: usize = 4 << 20;

/// How long a process lives: so many stores and operations.
#[derive(Debug)]
struct Life(AtomicU64);

impl Life {
    fn new(steps: u64) -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(steps)))
    }

    fn step(&self) -> bool {
        self.0
            .try_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            })
            .is_ok()
    }

    fn is_over(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

impl Gate for Life {
    fn is_open(&self) -> bool {
        self.step()
    }
}

/// Storage as a process has it: when that is dead nothing reaches it any more.
#[derive(Debug)]
struct Mortal {
    inner: Arc<MemoryStorage>,
    life: Arc<Life>,
}

impl Storage for Mortal {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        // What the dead read, nobody knows.
        let changes = !matches!(op, Op::Read { .. } | Op::Sync);
        if changes && !self.life.step() {
            return Submission::Ready(Err(std::io::Error::from_raw_os_error(libc::EIO)));
        }
        // SAFETY: passed on to the caller.
        unsafe { self.inner.submit(reactor, op, token) }
    }

    fn len(&self) -> Answer<'_, std::io::Result<u64>> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Answer<'_, std::io::Result<()>> {
        if !self.life.step() {
            return at_once(Err(std::io::Error::from_raw_os_error(libc::EIO)));
        }
        self.inner.set_len(len)
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn name(&self) -> &str {
        "image"
    }

    fn outlives_process(&self) -> bool {
        true
    }

    fn writable(&self) -> bool {
        true
    }

    fn syncs(&self) -> Option<&Arc<Syncs>> {
        self.inner.syncs()
    }
}

/// A folder for journals, and for `qemu-img`.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// An image that `qemu-img` makes in memory.
fn made(dir: &Path, options: &str, size: usize) -> Arc<MemoryStorage> {
    let path = dir.join("made.qcow2");
    create(&path, options, size as u64);
    Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()))
}

/// The stores of an image and of what lies beside it, which outlive processes.
struct Place {
    dir: tempfile::TempDir,
    image: Arc<MemoryStorage>,
    data: Option<Arc<MemoryStorage>>,
    below: Option<Arc<MemoryStorage>>,
    cache_bytes: u64,
}

impl Place {
    fn new(options: &str) -> Self {
        let dir = folder();
        let image = made(dir.path(), options, SIZE);
        Self {
            dir,
            image,
            data: None,
            below: None,
            cache_bytes: qcow2::DEFAULT_CACHE_BYTES,
        }
    }

    fn journals(&self) -> Vec<std::path::PathBuf> {
        let files = std::fs::read_dir(self.dir.path()).unwrap();
        let paths = files.map(|entry| entry.unwrap().path());
        paths
            .filter(|path| path.extension().is_some_and(|it| it == "journal"))
            .collect()
    }

    fn options(&self, folder: Option<Arc<Folder>>) -> qcow2::Options {
        qcow2::Options {
            writable: true,
            discard: true,
            cache_bytes: self.cache_bytes,
            journal: folder,
            ..Default::default()
        }
    }

    fn open(&self, reactor: &Reactor, life: &Arc<Life>) -> Result<Process> {
        let folder = Folder::open(self.dir.path(), Some(256 << 10))?;
        folder.set_gate(life.clone());
        let mortal = |inner: &Arc<MemoryStorage>| -> Arc<dyn Storage> {
            Arc::new(Mortal {
                inner: inner.clone(),
                life: life.clone(),
            })
        };
        let (storage, data) = (mortal(&self.image), self.data.as_ref().map(mortal));
        let options = self.options(Some(folder));
        let image = reactor.block_on(Qcow2::open_with_data(storage, data, options))?;
        let image = Arc::new(image);
        let layer = |name: &str, format, storage| {
            Arc::new(Layer {
                name: name.into(),
                format,
                storage,
                read_only: name != "top",
                discard: true,
                copy_on_read: false,
            })
        };
        let storage = image.data_storage().clone();
        let mut layers = vec![layer("top", Format::Qcow2(image.clone()), storage)];
        if let Some(below) = &self.below {
            let format = Format::Raw(Raw::new(SIZE as u64));
            layers.push(layer("below", format, below.clone()));
        }
        Ok(Process {
            image,
            chain: Arc::new(Chain::new(layers).unwrap()),
        })
    }

    /// What `qemu-img` says of the image as it is.
    fn check(&self, leaks_allowed: bool) {
        let path = self.dir.path().join("checked.qcow2");
        std::fs::write(&path, self.image.snapshot()).unwrap();
        check(&path, leaks_allowed);
    }
}

/// A process that has the image.
struct Process {
    image: Arc<Qcow2>,
    chain: Arc<Chain>,
}

impl Process {
    fn write(&self, reactor: &Reactor, at: usize, bytes: &[u8]) -> Result<()> {
        let buffer = AlignedBuf::copy_of(bytes);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, bytes.len()) };
        reactor.block_on(View::of(self.chain.clone()).write(at as u64, bufs))
    }

    fn read(&self, reactor: &Reactor) -> Vec<u8> {
        self.read_some(reactor, 0, SIZE)
    }

    fn read_some(&self, reactor: &Reactor, at: usize, len: usize) -> Vec<u8> {
        let buffer = AlignedBuf::zeroed(len);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
        let read = View::of(self.chain.clone()).read(at as u64, bufs);
        reactor.block_on(read).unwrap();
        buffer.to_vec()
    }
}

/// What each sector may hold: what completed last, and what was begun since.
struct Model {
    sectors: Vec<Vec<Vec<u8>>>,
    stamp: u32,
}

impl Model {
    fn new(bytes: &[u8]) -> Self {
        Self {
            sectors: bytes.chunks(SECTOR).map(|it| vec![it.to_vec()]).collect(),
            stamp: 0,
        }
    }

    /// An operation that is to leave `new` there has begun, and has ended as `done` says.
    fn note(&mut self, start: usize, new: &[u8], done: bool) {
        for (sector, bytes) in self.sectors[start..].iter_mut().zip(new.chunks(SECTOR)) {
            if done {
                sector.clear();
            }
            sector.push(bytes.to_vec());
        }
    }

    /// What is read after an end is what there is from now on.
    fn settle(&mut self, bytes: &[u8], context: &str) {
        for (at, (sector, got)) in self
            .sectors
            .iter_mut()
            .zip(bytes.chunks(SECTOR))
            .enumerate()
        {
            assert!(
                sector.iter().any(|may| may == got),
                "{context}: sector {at} reads {:?}, expected {:?}",
                &got[..8],
                sector.iter().map(|may| &may[..8]).collect::<Vec<_>>()
            );
            *sector = vec![got.to_vec()];
        }
    }

    fn fill(&mut self, sectors: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(sectors * SECTOR);
        for _ in 0..sectors {
            self.stamp += 1;
            bytes.extend(self.stamp.to_le_bytes().repeat(SECTOR / 4));
        }
        bytes
    }
}

/// One operation of a guest or a job. What ends after the process's life has not completed.
fn operate(
    (process, life): (&Process, &Life),
    place: &Place,
    reactor: &Reactor,
    model: &mut Model,
    rng: &mut StdRng,
) -> Result<()> {
    let done = |result: &Result<()>| result.is_ok() && !life.is_over();
    let all = SIZE / SECTOR;
    let longest = *[8, 64, 300].get(rng.random_range(0..3)).unwrap();
    let len = rng.random_range(1..=longest);
    let start = rng.random_range(0..all - len);
    let (at, bytes) = ((start * SECTOR) as u64, (len * SECTOR) as u64);
    let view = View::of(process.chain.clone());
    match rng.random_range(0..20) {
        0..10 => {
            let data = model.fill(len);
            let result = process.write(reactor, start * SECTOR, &data);
            model.note(start, &data, done(&result));
            result
        }
        10..13 => {
            let unmap = rng.random_bool(0.5);
            let result = reactor.block_on(view.write_zeroes(at, bytes, unmap));
            model.note(start, &vec![0; len * SECTOR], done(&result));
            result
        }
        13..16 => {
            let result = reactor.block_on(view.discard(at, bytes));
            // What is left is the device's choice, but it stays.
            let below = place.below.as_ref().map(|below| below.snapshot());
            for sector in start..start + len {
                let range = sector * SECTOR..(sector + 1) * SECTOR;
                let may = &mut model.sectors[sector];
                may.push(vec![0; SECTOR]);
                if let Some(below) = &below {
                    may.push(below[range].to_vec());
                }
            }
            if done(&result) {
                let now = process.read_some(reactor, start * SECTOR, len * SECTOR);
                for (may, bytes) in model.sectors[start..].iter_mut().zip(now.chunks(SECTOR)) {
                    *may = vec![bytes.to_vec()];
                }
            }
            result
        }
        16..18 if place.below.is_some() => {
            let span = Span::new(0, 2).compressed(rng.random_bool(0.5));
            reactor.block_on(view.copy(span, at, bytes)).map(drop)
        }
        _ => reactor.block_on(process.chain.flush()),
    }
}

/// Kills processes over one image, and has each of them go on.
fn killed_again_and_again(place: &Place, kills: usize, seed: u64) {
    let reactor = Reactor::for_this_thread().unwrap();
    let mut rng = StdRng::seed_from_u64(seed);
    let first = match &place.below {
        Some(below) => below.snapshot(),
        None => vec![0; SIZE],
    };
    let mut model = Model::new(&first);
    for kill in 0..kills {
        let context = format!("seed {seed}, process {kill}");
        let steps = match rng.random_range(0..4) {
            // While it starts, or little later.
            0 => rng.random_range(1..40),
            1 => rng.random_range(1..400),
            _ => rng.random_range(1..2500),
        };
        let life = Life::new(steps);
        let process = match place.open(&reactor, &life) {
            Ok(process) => process,
            Err(error) => {
                assert!(life.is_over(), "{context}: {error}");
                continue;
            }
        };
        let before = life.0.load(Ordering::SeqCst);
        let bytes = process.read(&reactor);
        assert_eq!(before, life.0.load(Ordering::SeqCst), "{context}: reading");
        model.settle(&bytes, &context);
        while !life.is_over() {
            let result = operate((&process, &life), place, &reactor, &mut model, &mut rng);
            if let Err(error) = result {
                assert!(life.is_over(), "{context}: {error}");
            }
        }
        drop(process);
        place.check(true);
    }
    let life = Life::new(u64::MAX);
    let process = place.open(&reactor, &life).unwrap();
    model.settle(&process.read(&reactor), "the last process");
    reactor.block_on(process.image.flush()).unwrap();
    place.check(true);
    model.settle(&process.read(&reactor), "flushed");
    reactor.block_on(process.image.close()).unwrap();
    assert!(process.image.header().journal.is_none());
    assert!(place.journals().is_empty(), "journals are left");
    drop(process);
    // Now without one.
    let options = qcow2::Options::default();
    let data = place.data.clone().map(|data| data as Arc<dyn Storage>);
    let image = reactor
        .block_on(Qcow2::open_with_data(place.image.clone(), data, options))
        .unwrap();
    assert!(image.header().journal.is_none());
    place.check(true);
}

/// At every store of a write for which refcount blocks are made: each covers 64 clusters, and itself.
#[test]
fn a_refcount_block_counts_itself_from_the_first() {
    let reactor = Reactor::for_this_thread().unwrap();
    let place = Place::new("cluster_size=512,refcount_bits=64");
    let first = place.image.snapshot();
    let mut blocks = 0;
    for steps in 1.. {
        let place = Place {
            dir: folder(),
            image: Arc::new(MemoryStorage::new(first.clone())),
            data: None,
            below: None,
            cache_bytes: place.cache_bytes,
        };
        let life = Life::new(u64::MAX);
        let process = place.open(&reactor, &life).unwrap();
        process.write(&reactor, 0, &[1; 20 * SECTOR]).unwrap();
        life.0.store(steps, Ordering::SeqCst);
        let result = process.write(&reactor, 32 * SECTOR, &[2; 80 * SECTOR]);
        let over = life.is_over();
        drop(process);
        let process = place.open(&reactor, &Life::new(u64::MAX)).unwrap();
        reactor.block_on(process.image.flush()).unwrap();
        drop(process);
        place.check(true);
        if !over {
            result.unwrap();
            blocks = place.image.snapshot().len() / (64 * 512);
            break;
        }
    }
    assert!(blocks > 2, "{blocks} blocks");
}

#[test]
fn what_completed_outlives_any_kill() {
    let seed = seed();
    println!("seed {seed}");
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=64",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=2M",
    ] {
        println!("{options}");
        let mut place = Place::new(options);
        killed_again_and_again(&place, 5, seed);
        place = Place::new(options);
        let mut below = vec![0; SIZE];
        for (index, sector) in below.chunks_mut(SECTOR).enumerate() {
            sector.fill((index / 24 % 5) as u8);
        }
        place.below = Some(Arc::new(MemoryStorage::new(below)));
        place.cache_bytes = 64 << 10;
        killed_again_and_again(&place, 5, seed + 1);
    }
}
