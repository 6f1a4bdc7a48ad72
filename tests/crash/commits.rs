//! A commit of the layer that guests write, while they do: at every power cut and every kill the layer
//! over the base reads as it may, and from the turn on so does the base alone.
//!
//! What would be caught: a base that changes where nothing hides it; a copy that goes over what a guest
//! has written since; a flush that leaves one of both images out; a guest that is put on a base which
//! lacks what was flushed, or what was told to be done; a base that fails and takes a guest's write with
//! it.

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use stratablk::chain::{Chain, Layer, Root, Tap, View};
use stratablk::error::Result;
use stratablk::format::qcow2;
use stratablk::format::{Format, Qcow2};
use stratablk::reactor::{Reactor, yield_now};

use crate::disk::{Below, Disk, Recipe, read_all};
use crate::judge::Judge;
use crate::landing::{Start, visit_kills};
use crate::machine::{Counted, Fault, Machine};
use crate::qcow2::Image;
use crate::states::{State, visit};
use crate::workload::Work;
use crate::{alone, number_from, seed, together};

/// The file that is committed into.
const BASE: usize = 1;
/// Bytes that the job copies at once.
const PIECE: u64 = 24 << 10;

/// The job.
struct Commit {
    work: Rc<Work>,
    tap: Arc<Tap>,
    /// The base, and what is under it.
    base: Vec<Arc<Layer>>,
    /// When the base came to count, by the machine's log.
    turned: Cell<Option<usize>>,
    /// The base fails now and then.
    may_fail: bool,
}

impl Commit {
    async fn copy(&self, range: Range<u64>) -> Result<()> {
        let target = View::of(self.tap.target().chain());
        let hold = self.tap.hold(range.clone()).await;
        let source = View::of(self.work.chain.borrow().clone());
        let part = (range.start, range.end - range.start);
        source.copy_onto(1, &target, part, Some(hold)).await?;
        Ok(())
    }

    /// Copies until nothing is dirty.
    async fn clean(&self) {
        while let Some(range) = self.tap.take_dirty(PIECE) {
            if self.copy(range.clone()).await.is_err() {
                self.tap.mark(range);
            }
        }
    }

    async fn run(&self, machine: &Machine) {
        let size = self.work.chain.borrow().size();
        for at in (0..size).step_by(PIECE as usize) {
            let range = at..size.min(at + PIECE);
            if self.copy(range.clone()).await.is_err() {
                self.tap.mark(range);
            }
        }
        loop {
            self.clean().await;
            if self.tap.failure().is_some() {
                return;
            }
            if !self.tap.begin_turn() {
                continue;
            }
            let stable = self.tap.target().chain().flush().await.is_ok();
            // While it is recorded.
            for _ in 0..60 {
                yield_now().await;
            }
            let turned = stable && self.tap.is_clean();
            if turned {
                if self.may_fail {
                    // From here on the base's failures are the guests'.
                    self.work.strict.set(false);
                }
                self.turned.set(Some(machine.now()));
                let chain = Chain::new(self.base.clone()).unwrap();
                *self.work.chain.borrow_mut() = Arc::new(chain);
            }
            self.tap.end_turn(turned);
            if turned || !stable {
                return;
            }
        }
    }
}

/// The base as it is on a machine, open for writing, and what is under it.
fn base(reactor: &Reactor, machine: &Machine, below: &[Arc<Layer>]) -> Vec<Arc<Layer>> {
    let mut layers = below.to_vec();
    let first = &layers[0];
    let format = match &first.format {
        Format::Qcow2(_) => {
            let options = qcow2::Options {
                writable: true,
                discard: true,
                ..qcow2::Options::default()
            };
            let image = reactor.block_on(Qcow2::open(machine.file(BASE), options));
            Format::Qcow2(Arc::new(image.unwrap()))
        }
        other => other.clone(),
    };
    layers[0] = Arc::new(Layer {
        format,
        read_only: false,
        ..(**first).clone()
    });
    layers
}

/// Whether the base alone reads as it may after a cut at which it counts.
fn base_is_right(judge: &Judge<'_>, state: &State) {
    let machine = Machine::new(&state.files);
    let _together = together();
    let opened = judge.reactor.block_on(judge.disk.open(&machine, false));
    let chain = Chain::new(opened.unwrap().chain.layers()[1..].to_vec());
    let seen = read_all(&judge.reactor, &Arc::new(chain.unwrap())).unwrap();
    let settled = judge.settled(state);
    for (sector, stamp) in seen.into_iter().enumerate() {
        let allowed = judge.history.after_cut(sector, settled, state.cut);
        assert!(
            stamp.is_some_and(|stamp| allowed.contains(&stamp)),
            "{}: sector {sector} of the base reads as {stamp:x?}, allowed are {allowed:x?}",
            judge.context(state)
        );
    }
}

fn commit(seed: u64, recipe: Recipe, fault: Option<Fault>) {
    println!("STRATABLK_SEED={seed}: {recipe:?}, {fault:?}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::make(dir.path(), recipe);
    let reactor = Reactor::for_this_thread().unwrap();
    let machine = disk.machine();
    let start = machine.left();
    let (history, turned) = {
        let _alone = alone();
        let opened = reactor.block_on(disk.open(&machine, true)).unwrap();
        let layers = opened.chain.layers();
        let base = base(&reactor, &machine, &layers[1..]);
        let tap = Tap::new(Root::new(Chain::new(base.clone()).unwrap()));
        let mut all = vec![layers[0].clone()];
        all.extend(base.clone());
        let chain = Chain::with_tap(all, Some(tap.clone())).unwrap();
        let clock = machine.clone();
        let work = Work::new(
            Arc::new(chain),
            disk.first.clone(),
            seed,
            Box::new(move || clock.now()),
        );
        work.adopt(&recipe);
        // As long as the layer counts, the base's failures are no guest's.
        work.strict.set(true);
        machine.fail(fault);
        let job = Rc::new(Commit {
            work: work.clone(),
            tap,
            base,
            turned: Cell::new(None),
            may_fail: fault.is_some(),
        });
        for _ in 0..4 {
            work.spawn_guest(&reactor, 40);
        }
        let (running, clock) = (job.clone(), machine.clone());
        reactor.spawn(async move { running.run(&clock).await });
        machine.run(&reactor, &mut rng);
        machine.fail(None);
        assert_eq!(reactor.tasks(), 0);
        work.strict.set(true);
        reactor.block_on(work.flush());
        let turned = job.turned.get();
        assert!(fault.is_some() || turned.is_some(), "it has no end");
        let everything = read_all(&reactor, &work.chain.borrow()).unwrap();
        let history = work.history.borrow().clone();
        for (sector, stamp) in everything.into_iter().enumerate() {
            let allowed = history.visible(sector);
            assert!(
                stamp.is_some_and(|stamp| allowed.contains(&stamp)),
                "seed {seed}: sector {sector} reads {stamp:x?}, allowed are {allowed:x?}"
            );
        }
        (history, turned)
    };
    let log = machine.log();
    let judge = Judge {
        seed,
        disk: &disk,
        reactor,
        history,
        start: Start {
            files: &start.0,
            journals: None,
            made: 0,
            from: 0,
        },
    };
    let right = |state: &State| {
        if turned.is_some_and(|at| state.cut >= at) {
            base_is_right(&judge, state);
        } else {
            judge.judge(state, false, false);
        }
        if recipe.below == Below::Qcow2 {
            let image = Image::new(&state.files[BASE]).and_then(|image| image.check());
            assert!(image.is_ok(), "{}: {image:?}", judge.context(state));
        }
    };
    let given = number_from("STRATABLK_CRASH_STATES");
    let budget = given.unwrap_or(recipe.states);
    let (total, judged) = visit(&disk.files, &log, budget, &mut rng, |state, _| {
        right(&state)
    });
    println!("{} events, {judged} of {total} states", log.len());
    assert!(judged * 2 > budget.min(total), "{judged} of {total} states");
    let budget = given.unwrap_or(recipe.kills);
    let (total, judged) = visit_kills(judge.start, &log, budget, &mut rng, |state, _| {
        right(&state)
    });
    println!("{judged} of {total} states after a kill");
    assert!(judged * 2 > budget.min(total), "{judged} of {total} states");
}

const RECIPE: Recipe = Recipe {
    below: Below::Raw,
    states: 600,
    kills: 200,
    ..Recipe::new("cluster_size=4k", 512)
};

#[test]
fn into_a_raw_base() {
    commit(seed(), RECIPE, None);
}

#[test]
fn into_an_image() {
    let recipe = Recipe {
        below: Below::Qcow2,
        ..RECIPE
    };
    commit(seed(), recipe, None);
}

#[test]
fn of_subclusters() {
    let recipe = Recipe {
        options: "cluster_size=16k,extended_l2=on",
        ..RECIPE
    };
    commit(seed(), recipe, None);
}

#[test]
fn of_version_2() {
    let recipe = Recipe {
        options: "cluster_size=4k,compat=0.10",
        ..RECIPE
    };
    commit(seed(), recipe, None);
}

#[test]
fn into_a_base_that_fails() {
    for from in [0, 10, 25, 45] {
        // Reads of the base are guests' own, and are not to fail.
        let fault = Fault {
            file: BASE,
            of: Counted::Changes,
            from,
            until: from + 20,
            errno: libc::EIO,
        };
        let recipe = Recipe {
            states: 200,
            kills: 100,
            ..RECIPE
        };
        commit(seed(), recipe, Some(fault));
    }
}
