//! The process that comes after a kill, and its own end: it is killed as well, at any instant from
//! its first read on, or the machine stops, before its first flush or behind it.
//!
//! What was certain after the first end stays so, and what the second process has done is judged
//! like what the first has.

use rand::rngs::StdRng;
use stratablk::reactor::Reactor;

use crate::alone;
use crate::history::History;
use crate::journals::is_named;
use crate::judge::Judge;
use crate::landing::{Start, visit_kills};
use crate::machine::{Effect, Event, Machine};
use crate::number_from;
use crate::states::{State, visit_from};
use crate::workload::Work;

/// Guests of the second process, and how many operations each does before a flush and behind it.
const GUESTS: usize = 3;
const OPERATIONS: usize = 4;
/// States judged by default of each of its ends.
const STATES: usize = 16;
/// The first stamp that it writes.
const STAMP: u32 = 0x2000_0000;

impl Judge<'_> {
    /// Lets the next process work on what a kill has left of `log`, and judges its ends.
    pub fn succeed(&self, state: &State, log: &[Event], rng: &mut StdRng) {
        let history = self.history.after_kill(self.settled(state), state.cut);
        let machine = Machine::after_kill(state, log);
        let from = machine.now();
        let second = Judge {
            seed: self.seed,
            disk: self.disk,
            reactor: Reactor::for_this_thread().unwrap(),
            history: second_life(self, state, &machine, history, rng),
            start: self.start,
        };
        let log = machine.log();
        let budget = number_from("STRATABLK_CRASH_STATES").map_or(STATES, |n| n.min(10 * STATES));
        let start = Start { from, ..self.start };
        visit_kills(start, &log, budget, rng, |state, _| {
            second.judge(&state, false, false);
        });
        if self.disk.recipe.used == 0 {
            visit_from(from, &self.disk.files, &log, budget, rng, |state, _| {
                second.judge(&state, false, false);
            });
        }
    }
}

/// The second process works until the end of its log; returns what is known then.
fn second_life(
    judge: &Judge<'_>,
    state: &State,
    machine: &Machine,
    history: History,
    rng: &mut StdRng,
) -> History {
    let _alone = alone();
    let (reactor, disk) = (&judge.reactor, judge.disk);
    let context = judge.context(state);
    let opened = reactor.block_on(disk.open(machine, true));
    let opened = opened.unwrap_or_else(|error| panic!("{context}: {error}"));
    if is_named(&state.files[0]) {
        // Another kill would find what this one has found.
        let from = state.cut + state.landings.len();
        let log = machine.log();
        // A barrier for what the first one may have written is no change.
        let changes: Vec<_> = (log[from..].iter())
            .filter(|event| match event {
                Event::Issued { effect, .. } => *effect != Effect::Sync,
                Event::Done { .. } => false,
                _ => true,
            })
            .collect();
        assert!(
            changes.is_empty(),
            "{context}: adopting changes {changes:?}"
        );
    }
    let clock = machine.clone();
    let clock = Box::new(move || clock.now());
    let work = Work::new(opened.chain, disk.first.clone(), judge.seed, clock);
    work.adopt(&disk.recipe);
    work.stamp_from(STAMP);
    work.strict.set(disk.recipe.storage.device.is_none());
    *work.history.borrow_mut() = history;
    for flush in [true, false] {
        for _ in 0..GUESTS {
            work.spawn_guest(reactor, OPERATIONS);
        }
        machine.run(reactor, rng);
        if flush {
            reactor.block_on(work.flush());
        }
    }
    work.history.take()
}
