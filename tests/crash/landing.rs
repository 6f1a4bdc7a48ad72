//! Every state in which a kill of the process may leave a machine's files, and its journals.
//!
//! What was done is in the files, stable or not: the kernel has it. Of what was under way any
//! sectors may get there after the kill, in any order, but only before the *fence*: the next process
//! begins when none of it is left. A journal is as it was stored, up to the last store. These
//! states are made behind each event, stores included: nothing of what was under way lands, all of
//! it, each operation alone, each missing, each torn, and random sectors in random orders.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::journals::Left;
use crate::machine::{Effect, Event, apply};
use crate::states::{End, Kept, State, parts};

/// Random states behind an event with operations under way.
const RANDOM: usize = 2;

struct Pending {
    id: usize,
    file: usize,
    effect: Effect,
}

struct Walker {
    files: Vec<Vec<u8>>,
    journals: Option<Left>,
    pending: Vec<Pending>,
    /// A number that no operation has.
    next: usize,
    /// So many of the next events are in the files already.
    made: usize,
}

impl Walker {
    /// Goes on by an event; returns what is to be looked at behind it.
    fn step(&mut self, event: &Event) -> Vec<Kept> {
        if self.made > 0 {
            self.made -= 1;
            if let Event::Issued { id, .. } = event {
                self.next = self.next.max(id + 1);
            }
            return Vec::new();
        }
        let mut stored = false;
        match event {
            Event::Issued { id, file, effect } => {
                self.next = self.next.max(id + 1);
                // Until it has ended nothing is known of a barrier.
                if *effect == Effect::Sync {
                    return Vec::new();
                }
                self.pending.push(Pending {
                    id: *id,
                    file: *file,
                    effect: effect.clone(),
                });
            }
            Event::Done { id } => {
                if let Some(done) = self.take(*id) {
                    apply(&mut self.files[done.file], &done.effect);
                }
            }
            Event::Failed { id, effect } => {
                if let Some(failed) = self.take(*id) {
                    apply(&mut self.files[failed.file], effect);
                }
            }
            Event::Stored(store) => {
                stored = true;
                if let Some(left) = &mut self.journals {
                    store.apply(left);
                }
            }
        }
        self.states(stored)
    }

    fn take(&mut self, id: usize) -> Option<Pending> {
        let index = self.pending.iter().position(|one| one.id == id)?;
        Some(self.pending.remove(index))
    }

    /// Between two stores the files are the same: the random states are enough.
    fn states(&self, stored: bool) -> Vec<Kept> {
        if self.pending.is_empty() {
            return vec![Kept::Nothing];
        }
        let mut states = vec![Kept::Nothing, Kept::All];
        states.extend([Kept::Random; RANDOM]);
        if !stored {
            let ids = || self.pending.iter().map(|one| one.id);
            states.extend(ids().map(Kept::Torn));
            if self.pending.len() > 1 {
                states.extend(ids().map(Kept::Only));
                states.extend(ids().map(Kept::Without));
            }
        }
        states
    }

    fn build(&self, cut: usize, kept: Kept, rng: &mut StdRng) -> State {
        let mut files = self.files.clone();
        let mut landings = Vec::new();
        let mut next = self.next;
        let mut order: Vec<&Pending> = self.pending.iter().collect();
        let mut share = 0.5;
        if kept == Kept::Random {
            order.shuffle(rng);
            share = [0.1, 0.5, 0.9][rng.random_range(0..3)];
        }
        for one in order {
            let landed = match kept {
                Kept::Nothing => continue,
                Kept::Only(id) if id != one.id => continue,
                Kept::Without(id) if id == one.id => continue,
                Kept::Torn(id) if id == one.id => parts(&one.effect, share, rng),
                Kept::Random => parts(&one.effect, share, rng),
                _ => vec![one.effect.clone()],
            };
            for effect in landed {
                apply(&mut files[one.file], &effect);
                let (id, file) = (next, one.file);
                next += 1;
                landings.push(Event::Issued { id, file, effect });
                landings.push(Event::Done { id });
            }
        }
        // What has not landed never will.
        landings.extend(self.pending.iter().map(|one| Event::Failed {
            id: one.id,
            effect: Effect::Read,
        }));
        State {
            end: End::Kill,
            cut,
            kept,
            files,
            journals: self.journals.clone(),
            landings,
        }
    }
}

/// Where a log begins, and which of its events are looked at.
#[derive(Clone, Copy)]
pub struct Start<'a> {
    pub files: &'a [Vec<u8>],
    /// There may be journals, and these are there.
    pub journals: Option<&'a Left>,
    /// So many events are in the files and the journals already.
    pub made: usize,
    /// The first event behind which there is a kill.
    pub from: usize,
}

impl<'a> Start<'a> {
    /// Files without journals.
    pub fn of(files: &'a [Vec<u8>]) -> Self {
        Self {
            files,
            journals: None,
            made: 0,
            from: 0,
        }
    }

    fn walker(self) -> Walker {
        Walker {
            files: self.files.to_vec(),
            journals: self.journals.cloned(),
            pending: Vec::new(),
            next: 0,
            made: self.made,
        }
    }
}

/// Builds the states in which a kill may leave what `log` made of `start`, about `budget` of them
/// if there are more, and shows them to `judge`. Returns how many there are, and how many were
/// judged.
pub fn visit_kills(
    start: Start<'_>,
    log: &[Event],
    budget: usize,
    rng: &mut StdRng,
    mut judge: impl FnMut(State, &mut StdRng),
) -> (usize, usize) {
    let mut walker = start.walker();
    let counts = log.iter().map(|event| walker.step(event).len());
    let total: usize = counts.skip(start.from).sum();
    let share = (budget as f64 / total.max(1) as f64).min(1.0);
    let mut walker = start.walker();
    let mut judged = 0;
    for (now, event) in log.iter().enumerate() {
        let states = walker.step(event);
        if now < start.from {
            continue;
        }
        for kept in states {
            if rng.random_bool(share) {
                let state = walker.build(now + 1, kept, rng);
                judge(state, rng);
                judged += 1;
            }
        }
    }
    (total, judged)
}
