//! Images that are made, grow and shrink, cut at every write: rebuilt as a power cut may leave
//! them, judged by `qemu-img check` and read back.
//!
//! What would be caught: a half-made image that is taken for a whole one, a header that names a
//! table which is not there yet, a new size before what is new reads as zeros, clusters freed
//! before the mapping without them is stable, bitmaps that are not those of the size.

use std::path::Path;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use stratablk::chain::resize::{self, Resize};
use stratablk::chain::{Chain, Layer, View};
use stratablk::format::qcow2::create::{CreateOptions, create};
use stratablk::format::qcow2::{self, Preallocation, bitmaps::check_resize, header};
use stratablk::format::{Format, Qcow2, Raw};
use stratablk::reactor::Reactor;
use stratablk::storage::memory::{MemoryStorage, Step};
use stratablk::storage::{AlignedBuf, IoBufs, Storage};

use crate::bitmaps::{Bitmap, IN_USE, bitmaps, resized as bits_of};
use crate::model::seed;
use crate::powercut::{apply, torn};
use crate::support::{check, in_dir, run};

const BASE: usize = 6 << 20;
/// Cuts of a recording.
const CUTS: usize = 60;

/// The images that a cut at each step may leave: a stable part, and some of the sectors after it.
fn cuts(start: &[u8], log: &[Step], rng: &mut StdRng) -> Vec<(usize, Vec<u8>)> {
    let mut images = Vec::new();
    let mut instants: Vec<usize> = (0..log.len()).collect();
    instants.shuffle(rng);
    // Of a short one, each several times, with other sectors.
    instants = instants.into_iter().cycle().take(CUTS).collect();
    instants.extend([log.len(); 2]);
    for (round, cut) in instants.into_iter().enumerate() {
        let stable = log[..cut]
            .iter()
            .rposition(|step| *step == Step::Sync)
            .unwrap_or(0);
        let mut image = start.to_vec();
        log[..stable]
            .iter()
            .for_each(|step| apply(&mut image, step));
        let mut later = torn(&log[stable..cut]);
        later.shuffle(rng);
        // In the end what is stable by then, and no more.
        let kept = match round {
            ..=CUTS => rng.random_range(0..=later.len()),
            _ => 0,
        };
        later[..kept]
            .iter()
            .for_each(|step| apply(&mut image, step));
        images.push((cut, image));
    }
    images
}

#[test]
fn a_half_made_image_is_not_taken_for_a_whole_one() {
    let seed = seed();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let reactor = Reactor::for_this_thread().unwrap();
    for (cluster_size, refcount_bits) in [(512, 64), (65536, 16)] {
        let options = CreateOptions {
            cluster_size,
            refcount_bits,
            ..CreateOptions::new(40 << 20)
        };
        let old = CreateOptions::new(1 << 20);
        let storage = MemoryStorage::new(Vec::new());
        reactor.block_on(create(&storage, &old)).unwrap();
        let start = storage.snapshot();
        storage.record();
        reactor.block_on(create(&storage, &options)).unwrap();
        let log = storage.take_log();
        for (cut, image) in cuts(&start, &log, &mut rng) {
            if !header::probe(&image) || image == start {
                assert!(cut < log.len(), "made, but not stable");
                continue;
            }
            let path = in_dir(&dir, "made");
            std::fs::write(&path, &image).unwrap();
            check(&path, false);
            let storage = Arc::new(MemoryStorage::new(image));
            let chain = open(&reactor, &storage, None, false);
            assert_eq!(chain.size(), 40 << 20, "seed {seed}, cut {cut}");
            assert!(read(&reactor, &chain).iter().all(|&byte| byte == 0));
        }
    }
}

fn open(
    reactor: &Reactor,
    storage: &Arc<MemoryStorage>,
    base: Option<&[u8]>,
    writable: bool,
) -> Arc<Chain> {
    let options = qcow2::Options {
        writable,
        discard: true,
        ..Default::default()
    };
    let layer = |name: &str, format, storage: Arc<dyn Storage>| {
        Arc::new(Layer {
            name: name.into(),
            format,
            storage,
            read_only: !writable,
            discard: true,
            copy_on_read: false,
        })
    };
    let image = Qcow2::open(storage.clone(), options);
    let image = Arc::new(reactor.block_on(image).unwrap());
    let mut layers = vec![layer("top", Format::Qcow2(image), storage.clone())];
    if let Some(base) = base {
        let raw = Format::Raw(Raw::new(base.len() as u64));
        let storage = Arc::new(MemoryStorage::new(base.to_vec()));
        layers.push(layer("base", raw, storage));
    }
    Arc::new(Chain::new(layers).unwrap())
}

fn read(reactor: &Reactor, chain: &Arc<Chain>) -> Vec<u8> {
    read_at(reactor, chain, 0, chain.size() as usize)
}

fn read_at(reactor: &Reactor, chain: &Arc<Chain>, offset: u64, len: usize) -> Vec<u8> {
    let buffer = AlignedBuf::zeroed(len);
    // SAFETY: `buffer` outlives the read.
    let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
    let view = View::of(chain.clone());
    reactor.block_on(view.read(offset, bufs)).unwrap();
    buffer.to_vec()
}

fn scribble(reactor: &Reactor, chain: &Arc<Chain>, rng: &mut StdRng) {
    for _ in 0..20 {
        let size = chain.size() as usize;
        let offset = rng.random_range(0..size / 512) * 512;
        let len = (rng.random_range(1..200) * 512).min(size - offset);
        let mut buffer = AlignedBuf::zeroed(len);
        buffer.fill(rng.random());
        // SAFETY: `buffer` outlives the write.
        let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
        let write = View::of(chain.clone()).write(offset as u64, bufs);
        reactor.block_on(write).unwrap();
    }
}

fn close(reactor: &Reactor, chain: &Chain) {
    let Format::Qcow2(image) = &chain.top().format else {
        panic!("not qcow2")
    };
    reactor.block_on(image.close()).unwrap();
}

/// Adds bitmaps with some bits to an image: one that tracks writes, one that does not.
fn add_bitmaps(dir: &Path, storage: &MemoryStorage, rng: &mut StdRng) -> Arc<MemoryStorage> {
    let path = dir.join("with-bitmaps");
    let name = path.to_str().unwrap();
    std::fs::write(&path, storage.snapshot()).unwrap();
    for bitmap in ["tracking", "frozen"] {
        run("qemu-img", &["bitmap", "--add", "-g", "512", name, bitmap]);
    }
    for _ in 0..3 {
        let write = format!("write -q {}k 70k", rng.random_range(0..2000));
        run("qemu-io", &["-f", "qcow2", "-c", &write, name]);
    }
    // Up to the very end.
    run("qemu-io", &["-f", "qcow2", "-c", "write -q 3M 512", name]);
    run("qemu-img", &["bitmap", "--disable", name, "frozen"]);
    Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()))
}

/// What can be relied on has the bits that it had.
fn judge_bitmaps(image: &[u8], before: &[Bitmap], case: &Case, new: bool) {
    let after = bitmaps(image);
    assert_eq!(after.len(), before.len());
    let cluster = case.options.cluster_size;
    let old = case.options.size;
    let size = if new { case.size } else { old };
    for (before, after) in before.iter().zip(after) {
        if after.flags & IN_USE == 0 {
            let bits = bits_of(before, old, size, cluster);
            assert!(after.bits == bits, "bitmap '{}'", after.name);
        }
    }
}

/// A resize that is cut.
struct Case<'a> {
    options: &'a CreateOptions,
    size: u64,
    mode: Preallocation,
    with_base: bool,
    with_bitmaps: bool,
}

impl<'a> Case<'a> {
    fn new(options: &'a CreateOptions, size: u64) -> Self {
        Self {
            options,
            size,
            mode: Preallocation::Off,
            with_base: false,
            with_bitmaps: false,
        }
    }
}

fn resized(dir: &Path, case: &Case) {
    let (seed, options, size) = (seed(), case.options, case.size);
    println!("seed {seed}: {} to {size}, {options:?}", options.size);
    let mut rng = StdRng::seed_from_u64(seed);
    let reactor = Reactor::for_this_thread().unwrap();
    let mut base = vec![0; BASE];
    rng.fill(&mut base[..]);
    let base = case.with_base.then_some(&base[..]);
    let mut storage = Arc::new(MemoryStorage::new(Vec::new()));
    reactor.block_on(create(&*storage, options)).unwrap();
    let chain = open(&reactor, &storage, base, true);
    scribble(&reactor, &chain, &mut rng);
    close(&reactor, &chain);
    if case.with_bitmaps {
        storage = add_bitmaps(dir, &storage, &mut rng);
    }
    let before = read(&reactor, &open(&reactor, &storage, base, false));
    let tracked = bitmaps(&storage.snapshot());
    let Format::Qcow2(image) = &open(&reactor, &storage, base, false).top().format.clone() else {
        panic!("not qcow2")
    };
    let in_force = reactor
        .block_on(check_resize(&*storage, &image.header(), size))
        .unwrap();
    storage.record();
    let start = storage.snapshot();
    let chain = open(&reactor, &storage, base, true);
    if size >= options.size {
        let wanted = Resize {
            size,
            shrink: false,
            preallocation: case.mode,
        };
        reactor
            .block_on(resize::grow(&chain, wanted, &in_force))
            .unwrap();
    } else {
        reactor
            .block_on(resize::shrink(&chain, size, &in_force))
            .unwrap();
    }
    let mut after = before.clone();
    after.resize(size as usize, 0);
    let log = storage.take_log();
    let mut sizes = [0, 0];
    for (cut, image) in cuts(&start, &log, &mut rng) {
        let path = dir.join("cut");
        std::fs::write(&path, &image).unwrap();
        check(&path, cut < log.len());
        let storage = Arc::new(MemoryStorage::new(image.clone()));
        let bytes = read(&reactor, &open(&reactor, &storage, base, false));
        let new = bytes.len() as u64 == size;
        sizes[usize::from(new)] += 1;
        // Of what a smaller disk loses, nothing is promised.
        let kept = bytes.len().min(before.len()).min(size as usize);
        let fine = if new {
            bytes == after
        } else {
            bytes.len() == before.len() && bytes[..kept] == before[..kept]
        };
        assert!(fine, "seed {seed}, cut after step {cut} of {}", log.len());
        assert!(new || cut < log.len(), "seed {seed}: done, but not stable");
        judge_bitmaps(&image, &tracked, case, new);
        let in_use = bitmaps(&image).iter().any(|b| b.flags & IN_USE != 0);
        assert!(
            !in_use || cut < log.len(),
            "done, but a bitmap is not valid"
        );
    }
    assert!(
        sizes[0] > 0 && sizes[1] > 0,
        "cuts before and after the new size: {sizes:?}"
    );
}

fn shapes(size: u64) -> Vec<CreateOptions> {
    let plain = CreateOptions {
        cluster_size: 4096,
        ..CreateOptions::new(size)
    };
    vec![
        CreateOptions {
            cluster_size: 512,
            refcount_bits: 64,
            ..plain.clone()
        },
        CreateOptions {
            version: 2,
            ..plain.clone()
        },
        CreateOptions {
            cluster_size: 16384,
            extended_l2: true,
            ..plain.clone()
        },
        plain,
    ]
}

#[test]
fn what_is_longer_below_is_hidden_and_no_more_than_that_is_written() {
    // Without a flag for zeros they are written as data, and who looks where at all of a disk of this
    // size does not come to an end.
    let reactor = Reactor::for_this_thread().unwrap();
    let base = vec![7; BASE];
    let options = CreateOptions {
        version: 2,
        ..CreateOptions::new(1 << 20)
    };
    let storage = Arc::new(MemoryStorage::new(Vec::new()));
    reactor.block_on(create(&*storage, &options)).unwrap();
    let chain = open(&reactor, &storage, Some(&base), true);
    const SIZE: u64 = 1 << 50;
    let wanted = Resize {
        size: SIZE,
        ..Resize::default()
    };
    let in_force = Default::default();
    let grown = resize::grow(&chain, wanted, &in_force);
    reactor.block_on(grown).unwrap();
    let chain = open(&reactor, &storage, Some(&base), false);
    assert_eq!(chain.size(), SIZE);
    let old = read_at(&reactor, &chain, 0, 1 << 20);
    assert!(old.iter().all(|&byte| byte == 7));
    for (at, len) in [(1 << 20, 8 << 20), (SIZE - (1 << 20), 1 << 20)] {
        let new = read_at(&reactor, &chain, at, len);
        assert!(new.iter().all(|&byte| byte == 0));
    }
}

#[test]
fn a_cut_while_growing_leaves_the_old_or_the_new_disk() {
    let dir = tempfile::tempdir().unwrap();
    for options in shapes((3 << 20) + 512) {
        resized(dir.path(), &Case::new(&options, 12 << 20));
        let case = Case {
            with_base: true,
            ..Case::new(&options, (5 << 20) - 512)
        };
        resized(dir.path(), &case);
    }
    let [_, _, extended, plain] = &shapes((1 << 20) + 512)[..] else {
        panic!("four shapes")
    };
    let metadata = Case {
        mode: Preallocation::Metadata,
        ..Case::new(plain, 4 << 20)
    };
    resized(dir.path(), &metadata);
    let full = Case {
        mode: Preallocation::Full,
        with_base: true,
        ..Case::new(extended, 4 << 20)
    };
    resized(dir.path(), &full);
}

#[test]
fn a_cut_while_shrinking_keeps_what_stays() {
    let dir = tempfile::tempdir().unwrap();
    for options in shapes(4 << 20) {
        resized(dir.path(), &Case::new(&options, (1 << 20) + 512));
        let case = Case {
            with_base: true,
            ..Case::new(&options, 3 << 20)
        };
        resized(dir.path(), &case);
    }
}

#[test]
fn a_cut_while_bitmaps_are_resized() {
    let dir = tempfile::tempdir().unwrap();
    for options in shapes((3 << 20) + 512) {
        if options.version < 3 {
            continue;
        }
        for size in [9 << 20, (2 << 20) + 512] {
            let case = Case {
                with_bitmaps: true,
                ..Case::new(&options, size)
            };
            resized(dir.path(), &case);
        }
    }
}
