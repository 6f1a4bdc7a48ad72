//! Storage that fails, at every single operation: alone, and from there on until it is healed.
//!
//! What would be caught: an error that reaches the wrong request or none, a wrong error number,
//! clusters mapped without data, references without an owner, a full disk that stays full, a lost
//! waiter; a flush that succeeds after one that failed, where the kernel has dropped what both were
//! to make stable.

use std::rc::Rc;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use stratablk::chain::{Chain, Layer};
use stratablk::format::{Format, Raw};
use stratablk::reactor::Reactor;
use stratablk::storage::fault::FaultStorage;
use stratablk::storage::memory::MemoryStorage;
use stratablk::storage::{Storage, Syncs, Window};

use crate::disk::{Below, Disk, Recipe, read_all};
use crate::judge::Judge;
use crate::landing::Start;
use crate::machine::Counted::{self, Changes, Reads};
use crate::machine::{Fault, Machine};
use crate::qcow2::Image;
use crate::states::{Kept, State};
use crate::workload::{Kind, Work};
use crate::{alone, seed};

/// Guests at a time, and how many operations each does.
const GUESTS: usize = 4;
const OPERATIONS: usize = 24;
/// Of so many runs one is shown to `qemu-img check`.
const QEMU: usize = 40;

pub struct Bench {
    pub dir: tempfile::TempDir,
    pub disk: Disk,
    stream: bool,
    pub reactor: Reactor,
    pub seed: u64,
    runs: usize,
    /// Requests that failed, in all runs.
    failures: usize,
}

impl Bench {
    pub fn work(&self, machine: &Machine, chain: Arc<Chain>) -> Rc<Work> {
        let clock = machine.clone();
        let first = self.disk.first.clone();
        Work::new(chain, first, self.seed, Box::new(move || clock.now()))
    }

    /// Works on storage that does not fail.
    pub fn run_well(&mut self) {
        self.run(Fault {
            file: 0,
            of: Reads,
            from: usize::MAX,
            until: usize::MAX,
            errno: 0,
        });
    }

    /// Works with the fault, then without it; returns how many operations counted for it.
    fn run(&mut self, fault: Fault) -> usize {
        self.runs += 1;
        let _alone = alone();
        let context = format!(
            "STRATABLK_SEED={}: {:?}: {fault:?}",
            self.seed, self.disk.recipe
        );
        let mut rng = StdRng::seed_from_u64(self.seed);
        let machine = Machine::new(&self.disk.files);
        let opened = self
            .reactor
            .block_on(self.disk.open(&machine, true))
            .unwrap();
        let work = self.work(&machine, opened.chain.clone());
        work.strict.set(false);
        machine.fail(Some(fault));
        work.compress.set(self.disk.recipe.compress);
        work.grain.set(self.disk.recipe.grain());
        self.spawn(&work, self.stream);
        machine.run(&self.reactor, &mut rng);
        let (counted, failed) = machine.counted();
        machine.fail(None);
        let failures = work.failures.borrow().clone();
        for (kind, errno) in &failures {
            assert_eq!(*errno, fault.errno, "{context}: {kind:?}");
        }
        if fault.until == fault.from.saturating_add(1) {
            assert!(failures.len() <= failed, "{context}: {failures:?}");
        }
        self.failures += failures.len();
        // Healed: everything succeeds.
        work.strict.set(true);
        self.spawn(&work, false);
        machine.run(&self.reactor, &mut rng);
        self.reactor.block_on(work.flush());
        self.reactor.block_on(opened.image.close()).unwrap();
        let chain = work.chain.borrow().clone();
        self.compare(&work, &chain, &context);
        let files: Vec<_> = (0..self.disk.files.len())
            .map(|i| machine.bytes(i))
            .collect();
        let reopened = Machine::new(&files);
        let reopened = self
            .reactor
            .block_on(self.disk.open(&reopened, false))
            .unwrap();
        self.compare(&work, &reopened.chain, &context);
        match Image::new(&files[0]).and_then(|image| image.check()) {
            Ok(0) => {}
            other => panic!("{context}: {other:?} (clusters leaked, or what is wrong)"),
        }
        if self.runs.is_multiple_of(QEMU) {
            self.disk.qemu_check(&files).unwrap();
        }
        counted
    }

    /// Works with a fault of barriers, on files that are written through a page cache: what a
    /// barrier that failed was to make stable is lost. Returns how many operations counted.
    fn run_cached(&mut self, fault: Fault) -> usize {
        let context = format!(
            "STRATABLK_SEED={}: {:?}: {fault:?}",
            self.seed, self.disk.recipe
        );
        let alone = alone();
        let mut rng = StdRng::seed_from_u64(self.seed);
        let machine = Machine::cached(&self.disk.files);
        let opened = self
            .reactor
            .block_on(self.disk.open(&machine, true))
            .unwrap();
        let work = self.work(&machine, opened.chain.clone());
        work.strict.set(false);
        machine.fail(Some(fault));
        self.spawn(&work, self.stream);
        machine.run(&self.reactor, &mut rng);
        let (counted, failed) = machine.counted();
        machine.fail(None);
        if failed > 0 {
            for round in 0..3 {
                let flushed = self.reactor.block_on(work.flush());
                assert!(!flushed, "{context}: flush {round} after one that failed");
                let errno = work.failures.borrow().last().unwrap().1;
                assert_eq!(errno, fault.errno, "{context}");
            }
            // Nor can a job end, or the image be closed.
            let image = &opened.image;
            assert!(
                self.reactor.block_on(image.set_backing(None)).is_err(),
                "{context}"
            );
            assert!(self.reactor.block_on(image.close()).is_err(), "{context}");
            // Everything else goes on.
            work.failures.borrow_mut().clear();
            self.spawn(&work, false);
            machine.run(&self.reactor, &mut rng);
            for (kind, _) in &*work.failures.borrow() {
                assert_eq!(*kind, Kind::Flush, "{context}");
            }
        }
        // The machine stops: what flushes have promised is there.
        let files: Vec<_> = (0..self.disk.files.len())
            .map(|i| machine.stable(i))
            .collect();
        let state = State::after_cut(machine.now(), Kept::Nothing, files);
        let judge = Judge {
            seed: self.seed,
            disk: &self.disk,
            reactor: Reactor::for_this_thread().unwrap(),
            history: work.history.borrow().clone(),
            start: Start::of(&self.disk.files),
        };
        drop(alone);
        judge.judge(&state, false, false);
        // An operator takes the loss.
        if failed > 0 {
            assert!(machine.clear_sync_error(fault.file), "{context}");
            assert!(self.reactor.block_on(work.flush()), "{context}");
        }
        counted
    }

    /// Every barrier of `file` fails, one after another.
    fn every_barrier(&mut self, file: usize) {
        let fault = |from, until| Fault {
            file,
            of: Counted::Barriers,
            from,
            until,
            errno: libc::EIO,
        };
        let total = self.run_cached(fault(usize::MAX, usize::MAX));
        assert!(total > 0, "no barriers");
        for from in 0..total {
            self.run_cached(fault(from, from + 1));
        }
    }

    fn spawn(&self, work: &Rc<Work>, stream: bool) {
        for _ in 0..GUESTS {
            work.spawn_guest(&self.reactor, OPERATIONS);
        }
        if stream {
            work.spawn_copies(&self.reactor, 2);
        }
    }

    pub fn compare(&self, work: &Work, chain: &Arc<Chain>, context: &str) {
        let history = work.history.borrow();
        let seen = read_all(&self.reactor, chain).unwrap();
        for (sector, stamp) in seen.into_iter().enumerate() {
            let possible = history.visible(sector);
            assert!(
                stamp.is_some_and(|stamp| possible.contains(&stamp)),
                "{context}: sector {sector} reads {stamp:x?}, possible are {possible:x?}"
            );
        }
    }

    /// Every operation on `file` fails, one after another.
    pub fn every(&mut self, file: usize, of: Counted, errno: i32) {
        let fault = |from, until| Fault {
            file,
            of,
            from,
            until,
            errno,
        };
        let total = self.run(fault(usize::MAX, usize::MAX));
        assert!(total > 0, "{:?}: nothing to fail", self.disk.recipe);
        for from in 0..total {
            self.run(fault(from, from + 1));
            if from % 3 == 0 {
                self.run(fault(from, usize::MAX));
                self.run(fault(from, from + 9));
            }
        }
        println!("{} runs, {} requests failed", self.runs, self.failures);
        assert!(self.failures > total / 4, "{} of {total}", self.failures);
    }
}

pub fn bench(recipe: Recipe, stream: bool) -> Bench {
    let seed = seed();
    println!("STRATABLK_SEED={seed}: {recipe:?}");
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::make(dir.path(), recipe);
    Bench {
        dir,
        disk,
        stream,
        reactor: Reactor::for_this_thread().unwrap(),
        seed,
        runs: 0,
        failures: 0,
    }
}

#[test]
fn of_a_plain_image() {
    let recipe = Recipe {
        reserves: true,
        ..Recipe::new("cluster_size=4k", 1024)
    };
    bench(recipe, false).every(0, Changes, libc::ENOSPC);
}

#[test]
fn of_metadata_that_is_not_all_in_memory() {
    let recipe = Recipe {
        cache_bytes: 4096,
        filled: 600,
        ..Recipe::new("cluster_size=512,refcount_bits=64", 2048)
    };
    let mut bench = bench(recipe, false);
    bench.every(0, Changes, libc::EIO);
    bench.every(0, Reads, libc::EIO);
}

#[test]
fn while_the_refcount_table_grows() {
    let recipe = Recipe {
        filled: 3930,
        ..Recipe::new("cluster_size=512,refcount_bits=64", 6400)
    };
    bench(recipe, false).every(0, Changes, libc::EIO);
}

#[test]
fn of_a_data_file() {
    let recipe = Recipe {
        data_file: true,
        ..Recipe::new("cluster_size=4k,data_file_raw=on", 512)
    };
    let mut bench = bench(recipe, false);
    bench.every(0, Changes, libc::EIO);
    bench.every(1, Changes, libc::ENOSPC);
    bench.every(1, Reads, libc::EIO);
}

#[test]
fn of_layers_below() {
    let recipe = Recipe {
        below: Below::Qcow2,
        ..Recipe::new("cluster_size=4k", 1024)
    };
    let mut bench = bench(recipe, true);
    bench.every(1, Reads, libc::EIO);
    bench.every(2, Reads, libc::EIO);
}

#[test]
fn of_an_overlay_with_subclusters() {
    let recipe = Recipe {
        below: Below::Raw,
        filled: 300,
        ..Recipe::new("cluster_size=16k,extended_l2=on", 1024)
    };
    let mut bench = bench(recipe, true);
    bench.every(0, Changes, libc::ENOSPC);
    bench.every(1, Reads, libc::EIO);
}

#[test]
fn of_a_compressed_stream() {
    let recipe = Recipe {
        below: Below::Raw,
        compress: true,
        ..Recipe::new("cluster_size=4k", 1024)
    };
    bench(recipe, true).every(0, Changes, libc::ENOSPC);
}

#[test]
fn of_an_image_with_a_snapshot() {
    let recipe = Recipe {
        filled: 700,
        snapshot: true,
        ..Recipe::new("cluster_size=2k", 1024)
    };
    let mut bench = bench(recipe, false);
    bench.every(0, Changes, libc::ENOSPC);
    bench.every(0, Reads, libc::EIO);
}

#[test]
fn of_barriers_with_a_page_cache() {
    bench(Recipe::new("cluster_size=4k", 1024), false).every_barrier(0);
}

#[test]
fn of_barriers_of_a_stream_with_a_page_cache() {
    let recipe = Recipe {
        below: Below::Raw,
        ..Recipe::new("cluster_size=4k", 1024)
    };
    bench(recipe, true).every_barrier(0);
}

#[test]
fn of_barriers_of_a_data_file_with_a_page_cache() {
    let recipe = Recipe {
        data_file: true,
        ..Recipe::new("cluster_size=4k", 512)
    };
    let mut bench = bench(recipe, false);
    bench.every_barrier(0);
    bench.every_barrier(1);
}

/// Storage that does not say whose syncs it has.
type Silent = FaultStorage<MemoryStorage>;

/// What would be caught: storage that is forgotten to have a page cache, a failure that one disk
/// in a file does not share with another one there, or that another file has.
#[test]
fn of_a_barrier_of_raw_disks() {
    let reactor = Reactor::for_this_thread().unwrap();
    let memory = || Arc::new(MemoryStorage::new(vec![0; 8192]));
    let storage = || Arc::new(Silent::over(memory()).with_page_cache());
    let disk = |storage: &Arc<Silent>, start: u64| {
        let window = Window::of(storage.clone(), start, Some(4096));
        let layer = Layer {
            name: "raw".into(),
            format: Format::Raw(Raw::new(4096)),
            storage: reactor.block_on(window).unwrap(),
            read_only: false,
            discard: true,
            copy_on_read: false,
        };
        Chain::new(vec![Arc::new(layer)]).unwrap()
    };
    let (file, other) = (storage(), storage());
    let disks = [disk(&file, 0), disk(&file, 4096)];
    let beside = disk(&other, 0);
    reactor.block_on(disks[0].flush()).unwrap();
    file.inner().fail_syncs(true);
    assert!(reactor.block_on(disks[0].flush()).is_err());
    file.inner().fail_syncs(false);
    for disk in &disks {
        let error = reactor.block_on(disk.flush()).unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
        assert!(error.to_string().contains("clear-sync-error"), "{error}");
    }
    reactor.block_on(beside.flush()).unwrap();
    let shared: Arc<dyn Storage> = file;
    Syncs::of(&shared).clear().unwrap();
    for disk in &disks {
        reactor.block_on(disk.flush()).unwrap();
    }
}
