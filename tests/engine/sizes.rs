//! Images that are made, cut at every write: rebuilt as a power cut may leave them, judged by
//! `qemu-img check` and read back.
//!
//! What would be caught: a half-made image that is taken for a whole one, a header that names a
//! table which is not there yet.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use stratablk::chain::{Chain, Layer, View};
use stratablk::format::qcow2::create::{CreateOptions, create};
use stratablk::format::qcow2::{self, header};
use stratablk::format::{Format, Qcow2, Raw};
use stratablk::reactor::Reactor;
use stratablk::storage::memory::{MemoryStorage, Step};
use stratablk::storage::{AlignedBuf, IoBufs, Storage};

use crate::model::seed;
use crate::powercut::{apply, torn};
use crate::support::{check, in_dir};

/// Cuts of a recording.
const CUTS: usize = 60;

/// The images that a cut at each step may leave: a stable part, and some of the sectors after it.
fn cuts(start: &[u8], log: &[Step], rng: &mut StdRng) -> Vec<(usize, Vec<u8>)> {
    let mut images = Vec::new();
    let mut instants: Vec<usize> = (0..log.len()).collect();
    instants.shuffle(rng);
    // Of a short one, each several times, with other sectors.
    instants = instants.into_iter().cycle().take(CUTS).collect();
    instants.push(log.len());
    for cut in instants {
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
        let kept = rng.random_range(0..=later.len());
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
        let mut whole = 0;
        for (cut, image) in cuts(&start, &storage.take_log(), &mut rng) {
            if !header::probe(&image) || image == start {
                continue;
            }
            whole += 1;
            let path = in_dir(&dir, "made");
            std::fs::write(&path, &image).unwrap();
            check(&path, false);
            let storage = Arc::new(MemoryStorage::new(image));
            let chain = open(&reactor, &storage, None, false);
            assert_eq!(chain.size(), 40 << 20, "seed {seed}, cut {cut}");
            assert!(read(&reactor, &chain).iter().all(|&byte| byte == 0));
        }
        assert!(whole > 0, "not even the last cut has an image");
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
        let raw = Format::Raw(Raw::new(0, base.len() as u64));
        let storage = Arc::new(MemoryStorage::new(base.to_vec()));
        layers.push(layer("base", raw, storage));
    }
    Arc::new(Chain::new(layers).unwrap())
}

fn read(reactor: &Reactor, chain: &Arc<Chain>) -> Vec<u8> {
    let buffer = AlignedBuf::zeroed(chain.size() as usize);
    // SAFETY: `buffer` outlives the read.
    let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
    let view = View::of(chain.clone());
    reactor.block_on(view.read(0, bufs)).unwrap();
    buffer.to_vec()
}
