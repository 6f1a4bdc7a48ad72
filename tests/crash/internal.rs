//! Internal snapshots that are taken and deleted while guests write: power cuts, kills and faults at
//! every operation.
//!
//! What would be caught: a cut that leaves neither the snapshots of before nor those of after; counts
//! or copied flags that do not agree, at any instant; a snapshot that a write after its instant gets
//! into, or one that completed before it does not; a write in place that is lost since its cluster was
//! copied before it landed; a copy that waits for itself; clusters that leak, or are handed out while
//! a snapshot has them; a snapshot that failed and changed something.

mod in_order;
mod taken;

use std::rc::Rc;
use std::time::SystemTime;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stratablk::reactor::Reactor;

use crate::disk::{Below, Disk, Opened, Recipe, read_all};
use crate::history::{SECTOR, stamp_of};
use crate::landing::{Start, visit_kills};
use crate::machine::{Counted, Fault, Machine, Traits};
use crate::qcow2::Image;
use crate::states::{State, visit};
use crate::support::run;
use crate::workload::Work;
use crate::{alone, number_from, seed};
use taken::{Known, Snapshots};

/// States judged by default of each disk: after power cuts, and after kills.
const STATES: usize = 1200;
const KILLS: usize = 300;
/// Of these, so many are shown to `qemu-img check`, and used.
const SAMPLES: usize = 25;

struct Bench {
    seed: u64,
    disk: Disk,
    reactor: Reactor,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(recipe: Recipe) -> Self {
        let seed = seed();
        println!("STRATABLK_SEED={seed}: {recipe:?}");
        let dir = tempfile::tempdir().unwrap();
        Self {
            seed,
            disk: Disk::make(dir.path(), recipe),
            reactor: Reactor::for_this_thread().unwrap(),
            dir,
        }
    }

    fn work(&self, machine: &Machine) -> (Rc<Work>, Rc<Snapshots>) {
        let opened = self.reactor.block_on(self.disk.open(machine, true));
        let Opened { image, chain } = opened.unwrap();
        let clock = machine.clone();
        let clock = Box::new(move || clock.now());
        let work = Work::new(chain, self.disk.first.clone(), self.seed, clock);
        work.adopt(&self.disk.recipe);
        let snapshots = Snapshots::new(&work, &image, self.seed);
        (work, snapshots)
    }

    fn files(&self, machine: &Machine) -> Vec<Vec<u8>> {
        (0..self.disk.files.len())
            .map(|i| machine.bytes(i))
            .collect()
    }

    fn context(&self, state: &State) -> String {
        format!(
            "STRATABLK_SEED={}: {:?}: {:?} after event {}, kept {:?}",
            self.seed, self.disk.recipe, state.end, state.cut, state.kept
        )
    }

    /// Guests and snapshots; then the machine stops at every instant, and the process is killed.
    fn cuts(&self, operations: usize, changes: usize) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let machine = self.disk.machine();
        let left = machine.left();
        let known = {
            let _alone = alone();
            let (work, snapshots) = self.work(&machine);
            for _ in 0..5 {
                work.spawn_guest(&self.reactor, operations / 5);
            }
            snapshots.spawn(&self.reactor, changes);
            machine.run(&self.reactor, &mut rng);
            assert!(work.failures.borrow().is_empty());
            self.reactor.block_on(work.flush());
            snapshots.known()
        };
        assert!(!known.taken.is_empty(), "no snapshot was taken");
        let log = machine.log();
        let judge = |state: State, rng: &mut StdRng, share: f64| {
            self.judge(&known, &state, rng.random_bool(share));
        };
        let budget = number_from("STRATABLK_CRASH_STATES");
        let (states, kills) = (budget.unwrap_or(STATES), budget.unwrap_or(KILLS));
        let share = |budget: usize| match std::env::var_os("STRATABLK_CRASH_QEMU") {
            Some(_) => 1.0,
            None => (SAMPLES as f64 / budget as f64).min(1.0),
        };
        let cuts = visit(&self.disk.files, &log, states, &mut rng, |state, rng| {
            judge(state, rng, share(states));
        });
        let start = Start {
            files: &left.0,
            journals: left.1.as_ref(),
            made: 0,
            from: 0,
        };
        let killed = visit_kills(start, &log, kills, &mut rng, |state, rng| {
            judge(state, rng, share(kills));
        });
        println!("{} events, cuts {cuts:?}, kills {killed:?}", log.len());
        self.finally(&known, &machine);
    }

    fn judge(&self, known: &Known, state: &State, thorough: bool) {
        let checked = known.check(&self.disk, state);
        checked.unwrap_or_else(|what| panic!("{}: {what}", self.context(state)));
        if !thorough {
            return;
        }
        let checked = self.disk.qemu_check(&state.files);
        checked.unwrap_or_else(|what| panic!("{}: {what}", self.context(state)));
        if self.disk.recipe.journaled {
            return;
        }
        // It can be used: snapshots go, another one comes and goes, and nothing leaks by that.
        let leaks = Image::new(&state.files[0]).unwrap().check().unwrap();
        let _alone = alone();
        let machine = Machine::new(&state.files);
        let (work, snapshots) = self.work(&machine);
        let names = Image::new(&state.files[0]).unwrap().names().unwrap();
        snapshots.begin(names.clone());
        snapshots.end(Ok(()), names.clone());
        let chain = work.chain.borrow().clone();
        let seen = read_all(&self.reactor, &chain).unwrap();
        self.reactor.block_on(async {
            for _ in 0..names.len() {
                snapshots.delete(0).await;
            }
            let name = ["again".to_owned()];
            let taken = snapshots.image.take_snapshots(&name, SystemTime::now());
            taken.await.unwrap().take_effect().finish().await.unwrap();
            snapshots.begin(name.to_vec());
            snapshots.delete(0).await;
        });
        assert_eq!(read_all(&self.reactor, &chain).unwrap(), seen);
        self.reactor.block_on(snapshots.image.close()).unwrap();
        let files = self.files(&machine);
        let checked = Image::new(&files[0]).and_then(|image| image.check());
        assert!(
            checked.as_ref().is_ok_and(|left| *left <= leaks),
            "{}: {checked:?}, {leaks} before",
            self.context(state)
        );
        self.disk.qemu_check(&files).unwrap();
    }

    /// QEMU's tools read the snapshots as well.
    fn finally(&self, known: &Known, machine: &Machine) {
        let files = self.files(machine);
        let state = State::after_cut(usize::MAX, crate::states::Kept::All, files.clone());
        self.disk.qemu_check(&files).unwrap();
        let path = self.disk.top();
        for name in &known.steps.last().unwrap().names {
            let raw = self.dir.path().join("snapshot.raw");
            let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
            let option = format!("snapshot.name={name}");
            run(
                "qemu-img",
                &["convert", "-l", &option, "-O", "raw", from, to],
            );
            let bytes = std::fs::read(&raw).unwrap();
            for (sector, bytes) in bytes.chunks(SECTOR).enumerate() {
                let allowed = known.allowed(name, sector, &state);
                let stamp = stamp_of(bytes);
                assert!(
                    stamp.is_some_and(|stamp| allowed.contains(&stamp)),
                    "STRATABLK_SEED={}: sector {sector} of {name}: {stamp:x?}, may be {allowed:x?}",
                    self.seed
                );
            }
        }
    }

    /// Every operation of some kind fails, alone or from there on until the storage is healed.
    fn faults(&self, of: Counted, step: usize) {
        let (mut from, mut failed) = (0, 0);
        loop {
            for until in [from + 1, usize::MAX] {
                let fault = Fault {
                    file: 0,
                    of,
                    from,
                    until,
                    errno: libc::EIO,
                };
                let (counted, failures) = self.run_with(fault);
                failed += failures;
                if counted <= from {
                    assert!(from > 0);
                    assert!(failed > 0, "no fault of {of:?} has met a snapshot");
                    return;
                }
            }
            from += step;
        }
    }

    /// Works with a fault, and then without. Returns how many operations counted for it, and how many
    /// snapshots were not taken or deleted as they should.
    fn run_with(&self, fault: Fault) -> (usize, usize) {
        let context = format!("STRATABLK_SEED={}: {fault:?}", self.seed);
        let _alone = alone();
        let mut rng = StdRng::seed_from_u64(self.seed);
        let machine = Machine::new(&self.disk.files);
        let (work, snapshots) = self.work(&machine);
        work.strict.set(false);
        snapshots.strict.set(false);
        machine.fail(Some(fault));
        work.spawn_guest(&self.reactor, 12);
        work.spawn_guest(&self.reactor, 12);
        snapshots.spawn(&self.reactor, 4);
        machine.run(&self.reactor, &mut rng);
        let (counted, _) = machine.counted();
        machine.fail(None);
        work.strict.set(true);
        snapshots.strict.set(true);
        work.spawn_guest(&self.reactor, 8);
        snapshots.spawn(&self.reactor, 2);
        machine.run(&self.reactor, &mut rng);
        self.reactor.block_on(work.flush());
        let listed: Vec<_> = snapshots
            .image
            .snapshots()
            .iter()
            .map(|s| s.name.clone())
            .collect();
        self.reactor.block_on(snapshots.image.close()).unwrap();
        let files = self.files(&machine);
        let state = State::after_cut(usize::MAX, crate::states::Kept::All, files);
        let known = snapshots.known();
        let names = Image::new(&state.files[0]).unwrap().names().unwrap();
        assert_eq!(names, listed, "{context}");
        // One whose instant has come and which could not be made stable is there all the same.
        assert_eq!(known.steps.last().unwrap().names, names, "{context}");
        match known.check(&self.disk, &state) {
            Ok(0) => {}
            other => panic!("{context}: {other:?} (clusters leaked, or what is wrong)"),
        }
        let chain = work.chain.borrow().clone();
        let history = work.history.borrow();
        for (sector, stamp) in read_all(&self.reactor, &chain)
            .unwrap()
            .into_iter()
            .enumerate()
        {
            let allowed = history.visible(sector);
            assert!(
                stamp.is_some_and(|stamp| allowed.contains(&stamp)),
                "{context}: sector {sector}: {stamp:x?}, may be {allowed:x?}"
            );
        }
        (counted, snapshots.failed.get())
    }
}

fn recipe(options: &'static str) -> Recipe {
    Recipe {
        filled: 300,
        ..Recipe::new(options, 768)
    }
}

#[test]
fn snapshots_under_guests() {
    for options in [
        "cluster_size=4k",
        "cluster_size=1k,refcount_bits=32",
        "cluster_size=4k,compat=0.10",
    ] {
        Bench::new(recipe(options)).cuts(100, 6);
    }
}

#[test]
fn subclusters() {
    Bench::new(recipe("cluster_size=16k,extended_l2=on")).cuts(100, 6);
}

#[test]
fn over_another_image_and_with_little_memory() {
    let recipe = Recipe {
        below: Below::Qcow2,
        cache_bytes: 4096,
        ..recipe("cluster_size=512,refcount_bits=64")
    };
    Bench::new(recipe).cuts(80, 5);
}

#[test]
fn a_journal() {
    let recipe = Recipe {
        journaled: true,
        ..recipe("cluster_size=4k")
    };
    Bench::new(recipe).cuts(80, 5);
}

#[test]
fn a_device() {
    let recipe = Recipe {
        storage: Traits {
            device: Some(4 << 20),
            block: 4096,
            ..Traits::FILE
        },
        ..recipe("cluster_size=4k")
    };
    Bench::new(recipe).cuts(80, 5);
}

#[test]
fn operations_that_fail() {
    let bench = Bench::new(recipe("cluster_size=4k"));
    bench.faults(Counted::Changes, 1);
    bench.faults(Counted::Reads, 1);
}
