//! Replays the corpus of the fuzzers: every input through the function of its target, without
//! nightly and without libFuzzer.
//!
//! What would be caught: a find that comes back (panics, overflows, endless loops, writes far
//! behind the end of an image, disks that do not hold what was written, refcounts that are wrong
//! afterwards, requests in flight that are lost or done twice), and seeds that no longer open.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::indexing_slicing)]

#[allow(missing_docs, dead_code)]
#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

/// Nobody asks for more at once: it is what QEMU reads of an image at most, with room for the
/// vector that it becomes.
const LARGEST_ALLOCATION: usize = 256 << 20;

/// Ends the process when more memory is asked for at once than any image is worth.
struct Bounded;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > LARGEST_ALLOCATION {
            return std::ptr::null_mut();
        }
        // SAFETY: passed on to the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() > LARGEST_ALLOCATION {
            return std::ptr::null_mut();
        }
        // SAFETY: passed on to the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The input that a failure is about.
struct Named(String);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the input is {}", self.0);
        }
    }
}

/// One at a time: requests in flight anywhere in the process hold up freed clusters, and an image
/// that is closed meanwhile keeps theirs as leaks.
static TURN: Mutex<()> = Mutex::new(());

fn replay(target: &str, run: fn(&[u8])) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    for file in files {
        let _named = Named(file.display().to_string());
        run(&std::fs::read(&file).unwrap());
    }
}

#[test]
fn qcow2_images_are_read() {
    replay("qcow2_read", fuzz::qcow2_read);
}

#[test]
fn qcow2_images_are_written() {
    replay("qcow2_write", fuzz::qcow2_write);
}

/// The corpus, and random recipes; a failure names the seed.
#[test]
fn damaged_images_are_checked_and_repaired() {
    replay("qcow2_check", fuzz::qcow2_check);
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let first = std::env::var("STRATABLK_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(rand::random::<u64>);
    for seed in (0..400).map(|round| first.wrapping_add(round)) {
        let _named = Named(format!("random, STRATABLK_SEED={seed}"));
        let mut recipe = vec![0; 60];
        StdRng::seed_from_u64(seed).fill_bytes(&mut recipe);
        fuzz::qcow2_check(&recipe);
    }
}

#[test]
fn whole_files_are_read_and_written() {
    replay("qcow2_file", fuzz::qcow2_file);
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for seed in fuzz::seeds::qcow2() {
        let _named = Named(seed.name.to_owned());
        fuzz::qcow2_file(&seed.bytes);
    }
}

/// The corpus, and random records; a failure names the seed.
#[test]
fn journals_are_adopted_or_refused() {
    replay("qcow2_journal", fuzz::qcow2_journal);
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let first = std::env::var("STRATABLK_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(rand::random::<u64>);
    for seed in (0..200).map(|round| first.wrapping_add(round)) {
        let _named = Named(format!("random, STRATABLK_SEED={seed}"));
        let mut rng = StdRng::seed_from_u64(seed);
        let mut records = vec![0; 1 + 13 * rng.random_range(0..12)];
        rng.fill_bytes(&mut records);
        // Mostly within small tables.
        records
            .iter_mut()
            .skip(3)
            .step_by(13)
            .for_each(|byte| *byte = 0);
        fuzz::qcow2_journal(&records);
    }
}

#[test]
fn qed_images_are_read() {
    replay("qed", fuzz::qed);
}

#[test]
fn options_are_parsed() {
    replay("options", fuzz::options);
}

/// The corpus, and random damage to it; a failure names the seed.
#[test]
fn inflight_regions_are_taken_over() {
    replay("inflight", fuzz::inflight);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/inflight");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let first = std::env::var("STRATABLK_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(rand::random::<u64>);
    for seed in (0..2000).map(|round| first.wrapping_add(round)) {
        let _named = Named(format!("random, STRATABLK_SEED={seed}"));
        let mut random = StdRng::seed_from_u64(seed);
        let file = &files[random.next_u32() as usize % files.len()];
        let mut bytes = std::fs::read(file).unwrap();
        for _ in 0..random.next_u32() % 6 {
            let at = random.next_u32() as usize % bytes.len();
            bytes[at] = [0, 1, 2, 0xff, random.next_u32() as u8][random.next_u32() as usize % 5];
        }
        fuzz::inflight(&bytes);
    }
}

/// What would be caught: seeds that a fuzzer turns over in vain, since they are refused.
#[test]
fn seeds_open_for_writing() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let reactor = fuzz::image::reactor();
    for seed in fuzz::seeds::qcow2() {
        let files = fuzz::image::Files::new(seed.bytes.clone(), 1);
        let report = fuzz::references::check(&files.image).unwrap();
        let how = fuzz::image::How {
            writable: true,
            ..Default::default()
        };
        let opened = reactor.block_on(files.open(how));
        opened.unwrap_or_else(|error| panic!("{}: {error}", seed.name));
        let report = if seed.name == "dirty" {
            assert!(!report.errors.is_empty(), "not dirty: {report:?}");
            // It has been repaired by opening it.
            fuzz::references::check(&files.image).unwrap()
        } else {
            report
        };
        assert!(
            report.errors.is_empty() && report.leaks == 0,
            "{}: {report:?}",
            seed.name
        );
    }
}
