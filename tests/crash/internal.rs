//! Internal snapshots that are taken and deleted while guests write: power cuts, kills and faults at
//! every operation.
//!
//! What would be caught: a cut that leaves neither the snapshots of before nor those of after; counts
//! or copied flags that do not agree, at any instant; a snapshot that a write after its instant gets
//! into, or one that completed before it does not; a write in place that is lost since its cluster was
//! copied before it landed; a copy that waits for itself; clusters that leak, or are handed out while
//! a snapshot has them; a snapshot that failed and changed something.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stratablk::chain::View;
use stratablk::format::Qcow2;
use stratablk::reactor::{Reactor, yield_now};
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::disk::{Below, Disk, Opened, Recipe, read_all};
use crate::history::{History, SECTOR, fill, stamp_of};
use crate::landing::{Start, visit_kills};
use crate::machine::{Counted, Fault, Machine, Traits};
use crate::qcow2::{Image, Sector};
use crate::states::{End, State, visit};
use crate::support::run;
use crate::workload::Work;
use crate::{alone, number_from, seed};

/// States judged by default of each disk: after power cuts, and after kills.
const STATES: usize = 1200;
const KILLS: usize = 300;
/// Of these, so many are shown to `qemu-img check`, and used.
const SAMPLES: usize = 25;

/// A snapshot's instant.
#[derive(Clone, Debug)]
struct Taken {
    name: String,
    /// Notes and operations of the history by then, and the time.
    notes: usize,
    operations: usize,
    at: usize,
    /// When it was answered.
    answered: usize,
}

/// A change of the list.
#[derive(Clone, Debug)]
struct Step {
    began: usize,
    answered: usize,
    /// The names from then on.
    names: Vec<String>,
}

/// Takes and deletes snapshots.
struct Snapshots {
    work: Rc<Work>,
    image: Arc<Qcow2>,
    taken: RefCell<Vec<Taken>>,
    steps: RefCell<Vec<Step>>,
    failed: Cell<usize>,
    strict: Cell<bool>,
    rng: RefCell<StdRng>,
}

impl Snapshots {
    fn new(work: &Rc<Work>, image: &Arc<Qcow2>, seed: u64) -> Rc<Self> {
        Rc::new(Self {
            work: work.clone(),
            image: image.clone(),
            taken: RefCell::default(),
            steps: RefCell::new(vec![Step {
                began: 0,
                answered: 0,
                names: Vec::new(),
            }]),
            failed: Cell::default(),
            strict: Cell::new(true),
            rng: RefCell::new(StdRng::seed_from_u64(seed)),
        })
    }

    fn names(&self) -> Vec<String> {
        self.steps.borrow().last().unwrap().names.clone()
    }

    fn begin(&self, names: Vec<String>) {
        let began = self.work.now();
        self.steps.borrow_mut().push(Step {
            began,
            answered: usize::MAX,
            names,
        });
    }

    fn end(&self, result: stratablk::error::Result<()>, before: Vec<String>) {
        if let Err(error) = result {
            assert!(!self.strict.get(), "{error}");
            self.failed.set(self.failed.get() + 1);
            let began = self.work.now();
            self.steps.borrow_mut().push(Step {
                began,
                answered: usize::MAX,
                names: before,
            });
        }
        let now = self.work.now();
        self.steps.borrow_mut().last_mut().unwrap().answered = now;
    }

    async fn take(&self, count: usize) {
        let before = self.names();
        let first = self.taken.borrow().len();
        let new: Vec<_> = (first..first + count).map(|n| format!("s{n}")).collect();
        let names = before.iter().chain(&new).cloned().collect();
        self.begin(names);
        let prepared = self.image.take_snapshots(&new, SystemTime::now()).await;
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return self.end(Err(error), before),
        };
        if self.rng.borrow_mut().random_bool(0.2) {
            // Something else of the transaction has failed.
            yield_now().await;
            let lost = self.rng.borrow_mut().random_bool(0.5);
            match lost {
                false => prepared.take_back().await,
                true => {
                    // The next flush takes it back.
                    drop(prepared);
                    for _ in 0..3 {
                        yield_now().await;
                    }
                    let _ = self.image.flush().await;
                }
            }
            let began = self.work.now();
            let (answered, names) = (usize::MAX, before.clone());
            self.steps.borrow_mut().push(Step {
                began,
                answered,
                names,
            });
            return self.end(Ok(()), before);
        }
        let (notes, operations) = {
            let history = self.work.history.borrow();
            (history.notes(), history.operations())
        };
        let at = self.work.now();
        let rest = prepared.take_effect();
        for name in new {
            self.taken.borrow_mut().push(Taken {
                name,
                notes,
                operations,
                at,
                answered: usize::MAX,
            });
        }
        self.image.late().those_there_end().await;
        let finished = rest.finish().await;
        let fine = finished.is_ok();
        // It was taken all the same.
        let names = self.names();
        self.end(finished, names);
        let now = self.work.now();
        if fine {
            let mut taken = self.taken.borrow_mut();
            let new = taken.iter_mut().skip(first);
            new.for_each(|taken| taken.answered = now);
        }
    }

    async fn delete(&self, index: usize) {
        let before = self.names();
        let mut names = before.clone();
        let name = names.remove(index);
        self.begin(names);
        let snapshots = self.image.snapshots();
        let which = snapshots.iter().find(|snapshot| snapshot.name == name);
        match self.image.delete_snapshot(which.unwrap()).await {
            Err(error) => self.end(Err(error), before),
            Ok(prepared) => {
                let finished = prepared.take_effect().finish().await;
                let names = self.names();
                self.end(finished, names);
            }
        }
    }

    async fn change(&self) {
        let names = self.names();
        let (delete, count, index) = {
            let mut rng = self.rng.borrow_mut();
            let delete = !names.is_empty() && rng.random_bool(0.4);
            let count = 1 + usize::from(rng.random_bool(0.2));
            (delete, count, rng.random_range(0..names.len().max(1)))
        };
        match delete {
            true => self.delete(index).await,
            false => self.take(count).await,
        }
    }

    fn spawn(self: &Rc<Self>, reactor: &Reactor, changes: usize) {
        let snapshots = self.clone();
        reactor.spawn(async move {
            for _ in 0..changes {
                let turns = snapshots.rng.borrow_mut().random_range(0..40);
                for _ in 0..turns {
                    yield_now().await;
                }
                snapshots.change().await;
            }
        });
    }

    fn known(&self) -> Known {
        Known {
            history: self.work.history.borrow().clone(),
            taken: self.taken.borrow().clone(),
            steps: self.steps.borrow().clone(),
        }
    }
}

/// What an image is compared with.
struct Known {
    history: History,
    taken: Vec<Taken>,
    steps: Vec<Step>,
}

impl Known {
    /// The lists that there may be when everything ends at `cut`.
    fn lists(&self, cut: usize) -> Vec<&Vec<String>> {
        let certain = self.steps.iter().rposition(|step| step.answered <= cut);
        let steps = self.steps.iter().skip(certain.unwrap_or(0));
        let steps = steps.filter(|step| step.began <= cut);
        steps.map(|step| &step.names).collect()
    }

    /// What a sector of a snapshot may hold.
    fn allowed(&self, name: &str, sector: usize, state: &State) -> Vec<u32> {
        let certain = match state.end {
            End::Kill => self.history.notes_at(state.cut),
            End::PowerCut => self.history.stable_at(state.cut),
        };
        match self.taken.iter().find(|taken| taken.name == name) {
            None => self.history.after_cut(sector, certain, state.cut),
            Some(taken) => {
                let certain = match taken.answered <= state.cut {
                    true => taken.notes,
                    false => certain.min(taken.notes),
                };
                let cut = taken.at.min(state.cut);
                let operations = taken.operations;
                self.history.at_instant(sector, certain, cut, operations)
            }
        }
    }

    /// Fails unless the snapshots in the image are those that there may be, with what they may hold.
    fn check(&self, disk: &Disk, state: &State) -> Result<u64, String> {
        let file = &state.files[0];
        let image = Image::new(file)?;
        let leaks = image.check()?;
        let names = image.names()?;
        let lists = self.lists(state.cut);
        if !lists.contains(&&names) {
            return Err(format!("snapshots {names:?}, there may be {lists:?}"));
        }
        for (name, root) in names.iter().zip(image.snapshots()?) {
            for sector in 0..disk.first.len() {
                let stamp = match image.find(root, sector as u64)? {
                    Sector::Host(at) => {
                        let bytes = file.get(at as usize..at as usize + SECTOR);
                        bytes.and_then(stamp_of)
                    }
                    Sector::Zero => Some(0),
                    Sector::Below => Some(disk.under[sector]),
                };
                let allowed = self.allowed(name, sector, state);
                if !stamp.is_some_and(|stamp| allowed.contains(&stamp)) {
                    return Err(format!(
                        "sector {sector} of snapshot {name} is {stamp:x?}, may be {allowed:x?}"
                    ));
                }
            }
        }
        Ok(leaks)
    }
}

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

/// A disk with its operations pending; of these the one issued last ends first.
struct Slow {
    bench: Bench,
    machine: Machine,
    work: Rc<Work>,
    snapshots: Rc<Snapshots>,
}

impl Slow {
    fn new() -> Self {
        let bench = Bench::new(recipe("cluster_size=4k"));
        let machine = Machine::new(&bench.disk.files);
        let (work, snapshots) = bench.work(&machine);
        machine.hold(true);
        Self {
            bench,
            machine,
            work,
            snapshots,
        }
    }

    fn settle(&self) {
        while self.bench.reactor.turn() {}
    }

    /// Begins something, which goes on until it waits.
    fn start(&self, what: impl Future<Output = ()> + 'static) -> Rc<Cell<bool>> {
        let done = Rc::new(Cell::new(false));
        let ended = done.clone();
        self.bench.reactor.spawn(async move {
            what.await;
            ended.set(true);
        });
        self.settle();
        done
    }

    fn write(&self, sector: usize, stamp: u32) -> Rc<Cell<bool>> {
        let view = View::of(self.work.chain.borrow().clone());
        self.start(async move {
            let mut buffer = AlignedBuf::zeroed(SECTOR);
            fill(&mut buffer, stamp);
            // SAFETY: `buffer` outlives the operation.
            let bufs = unsafe { IoBufs::of(&buffer, 0, SECTOR) };
            view.write((sector * SECTOR) as u64, bufs).await.unwrap();
        })
    }

    /// Takes a snapshot; says when its instant has come.
    fn take(&self) -> Rc<Cell<bool>> {
        let image = self.snapshots.image.clone();
        let instant = Rc::new(Cell::new(false));
        let come = instant.clone();
        self.start(async move {
            let names = ["one".to_owned()];
            let prepared = image.take_snapshots(&names, SystemTime::UNIX_EPOCH).await;
            let rest = prepared.unwrap().take_effect();
            come.set(true);
            image.late().those_there_end().await;
            rest.finish().await.unwrap();
        });
        instant
    }

    /// Lets operations end, the last one first, until `done`; the first one of all stays if it can.
    fn until(&self, done: &Cell<bool>) {
        while !done.get() {
            let any = self.machine.finish_in_order(&self.bench.reactor, true);
            assert!(any, "it waits for nothing");
            self.settle();
        }
    }

    /// Ends everything; returns the disk's stamps, and those of the snapshot.
    fn end(self) -> (Vec<Option<u32>>, Vec<Option<u32>>) {
        while self.machine.finish_in_order(&self.bench.reactor, true) {
            self.settle();
        }
        assert_eq!(self.bench.reactor.tasks(), 0);
        self.machine.hold(false);
        let chain = self.work.chain.borrow().clone();
        let seen = read_all(&self.bench.reactor, &chain).unwrap();
        let closed = self.bench.reactor.block_on(self.snapshots.image.close());
        closed.unwrap();
        let bytes = self.machine.bytes(0);
        let image = Image::new(&bytes).unwrap();
        assert_eq!(image.check(), Ok(0));
        let root = image.snapshots().unwrap()[0];
        let stamp = |sector: usize| match image.find(root, sector as u64).unwrap() {
            Sector::Host(at) => stamp_of(&bytes[at as usize..at as usize + SECTOR]),
            Sector::Zero | Sector::Below => Some(0),
        };
        (seen, (0..self.bench.disk.first.len()).map(stamp).collect())
    }
}

/// What would be caught: a mapping of before the instant that comes into memory after it, by which
/// a write goes to the snapshot.
#[test]
fn a_table_that_is_read_while_it_moves() {
    let slow = Slow::new();
    let first = slow.bench.disk.first.clone();
    // The mapping is not in memory: it waits for that.
    let read = slow.write(8, 71);
    let instant = slow.take();
    slow.until(&instant);
    assert!(!read.get(), "the table has been read before it moved");
    slow.until(&read);
    let again = slow.write(9, 72);
    slow.until(&again);
    let (seen, taken) = slow.end();
    assert_eq!((seen[8], seen[9]), (Some(71), Some(72)));
    let expected: Vec<_> = first.into_iter().map(Some).collect();
    assert!(taken == expected, "the snapshot has been written to");
}

/// What would be caught: a write in place that lands in the snapshot alone, since its cluster has been
/// copied before.
#[test]
fn a_write_in_place_that_lands_after_the_instant() {
    let slow = Slow::new();
    let loaded = slow.write(0, 70);
    slow.until(&loaded);
    let early = slow.write(8, 71);
    let instant = slow.take();
    slow.until(&instant);
    assert!(!early.get(), "it has landed before the instant");
    let late = slow.write(9, 72);
    slow.until(&late);
    assert!(early.get(), "nobody has waited for it");
    let first = slow.bench.disk.first.clone();
    let (seen, taken) = slow.end();
    assert_eq!((seen[8], seen[9]), (Some(71), Some(72)));
    assert_eq!((taken[0], taken[8]), (Some(70), Some(71)));
    assert_eq!(taken[9], Some(first[9]), "the snapshot has been written to");
}
