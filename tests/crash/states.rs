//! Every state in which a power cut may leave a machine's files. What a kill leaves: `landing`.
//!
//! What a finished barrier covered is stable; one that failed covered nothing. Of everything else
//! that had been issued any sectors may have reached the disk, in any order. At every barrier, when
//! it is issued and when it has ended, and at every write between, these states are made: nothing
//! of what is not stable, all of it, each operation alone present, each alone missing, each torn,
//! and random subsets of sectors in random orders.

use std::collections::HashMap;

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::history::SECTOR;
use crate::journals::Left;
use crate::machine::{Effect, Event, apply};

/// What of the operations that are not stable has reached the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    Nothing,
    All,
    /// The one with this number in the log.
    Only(usize),
    Without(usize),
    /// All, but of this one only some sectors.
    Torn(usize),
    Random,
}

/// How a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The machine stops.
    PowerCut,
    /// The process is killed: the machine goes on.
    Kill,
}

/// What is left when a run has ended.
pub struct State {
    pub end: End,
    /// Events before the end.
    pub cut: usize,
    /// What became of the operations that were not stable, or under way if it is a kill.
    pub kept: Kept,
    pub files: Vec<Vec<u8>>,
    /// The journals, if there may be any.
    pub journals: Option<Left>,
    /// What happened between the kill and the next process.
    pub landings: Vec<Event>,
}

impl State {
    /// What is left after a power cut.
    pub fn after_cut(cut: usize, kept: Kept, files: Vec<Vec<u8>>) -> Self {
        Self {
            end: End::PowerCut,
            cut,
            kept,
            files,
            journals: None,
            landings: Vec::new(),
        }
    }
}

#[derive(Clone)]
struct Loose {
    id: usize,
    file: usize,
    effect: Effect,
    /// When it was done.
    done: Option<usize>,
}

struct Walker {
    stable: Vec<Vec<u8>>,
    loose: Vec<Loose>,
    /// Barriers under way, and what they cover.
    barriers: HashMap<usize, Vec<usize>>,
}

/// What of a point is to be looked at.
enum Point {
    /// Nothing new.
    Same,
    /// A write was issued: the one with this number.
    Write(usize),
    Barrier,
}

impl Walker {
    fn new(start: &[Vec<u8>]) -> Self {
        Self {
            stable: start.to_vec(),
            loose: Vec::new(),
            barriers: HashMap::new(),
        }
    }

    fn step(&mut self, now: usize, event: &Event) -> Point {
        match event {
            Event::Issued {
                id,
                file,
                effect: Effect::Sync,
            } => {
                let covered = self.loose.iter().filter(|l| l.file == *file);
                let covered = covered.filter(|l| l.done.is_some()).map(|l| l.id);
                self.barriers.insert(*id, covered.collect());
                Point::Barrier
            }
            Event::Issued { id, file, effect } => {
                self.loose.push(Loose {
                    id: *id,
                    file: *file,
                    effect: effect.clone(),
                    done: None,
                });
                Point::Write(*id)
            }
            Event::Done { id } => match self.barriers.remove(id) {
                Some(covered) => {
                    self.settle(&covered);
                    Point::Barrier
                }
                None => {
                    if let Some(loose) = self.loose.iter_mut().find(|l| l.id == *id) {
                        loose.done = Some(now);
                    }
                    Point::Same
                }
            },
            Event::Failed { id, effect } => {
                self.barriers.remove(id);
                if let Some(loose) = self.loose.iter_mut().find(|l| l.id == *id) {
                    loose.effect = effect.clone();
                    loose.done = Some(now);
                }
                Point::Same
            }
            Event::Stored(_) => Point::Same,
        }
    }

    fn settle(&mut self, covered: &[usize]) {
        let (mut stable, loose): (Vec<_>, Vec<_>) = std::mem::take(&mut self.loose)
            .into_iter()
            .partition(|l| covered.contains(&l.id));
        stable.sort_by_key(|l| l.done);
        for operation in stable {
            apply(&mut self.stable[operation.file], &operation.effect);
        }
        self.loose = loose;
    }

    /// The states at a point, apart from the random ones.
    fn states(&self, point: &Point) -> Vec<Kept> {
        let ids = || self.loose.iter().map(|l| l.id);
        match point {
            Point::Same => Vec::new(),
            Point::Write(id) => [Kept::All, Kept::Only(*id), Kept::Torn(*id)]
                .into_iter()
                .chain(ids().filter(|other| other != id).map(Kept::Without))
                .collect(),
            Point::Barrier => [Kept::Nothing, Kept::All]
                .into_iter()
                .chain(ids().map(Kept::Only))
                .chain(ids().map(Kept::Without))
                .chain(ids().map(Kept::Torn))
                .collect(),
        }
    }

    fn build(&self, kept: Kept, rng: &mut StdRng) -> Vec<Vec<u8>> {
        let mut files = self.stable.clone();
        let mut order: Vec<&Loose> = self.loose.iter().collect();
        order.sort_by_key(|l| l.done.unwrap_or(usize::MAX));
        let share = [0.1, 0.5, 0.9][rng.random_range(0..3)];
        if kept == Kept::Random {
            order.shuffle(rng);
        }
        for loose in order {
            let file = &mut files[loose.file];
            match kept {
                Kept::Nothing => {}
                Kept::Only(id) if id != loose.id => {}
                Kept::Without(id) if id == loose.id => {}
                Kept::Torn(id) if id == loose.id => tear(file, &loose.effect, 0.5, rng),
                Kept::Random => tear(file, &loose.effect, share, rng),
                _ => apply(file, &loose.effect),
            }
        }
        files
    }
}

/// Applies some sectors of an operation.
fn tear(file: &mut Vec<u8>, effect: &Effect, share: f64, rng: &mut StdRng) {
    for part in parts(effect, share, rng) {
        apply(file, &part);
    }
}

/// Some sectors of an operation, each as an operation by itself.
pub fn parts(effect: &Effect, share: f64, rng: &mut StdRng) -> Vec<Effect> {
    match effect {
        Effect::Write { offset, bytes } => bytes
            .chunks(SECTOR)
            .enumerate()
            .filter(|_| rng.random_bool(share))
            .map(|(index, sector)| Effect::Write {
                offset: offset + (index * SECTOR) as u64,
                bytes: sector.to_vec(),
            })
            .collect(),
        &(Effect::Zero { offset, len } | Effect::Punch { offset, len }) => (offset..offset + len)
            .step_by(SECTOR)
            .filter(|_| rng.random_bool(share))
            .map(|at| {
                let len = (SECTOR as u64).min(offset + len - at);
                match effect {
                    Effect::Zero { .. } => Effect::Zero { offset: at, len },
                    _ => Effect::Punch { offset: at, len },
                }
            })
            .collect(),
        other if rng.random_bool(share) => vec![other.clone()],
        _ => Vec::new(),
    }
}

impl Walker {
    /// Whether it is the header that is there alone, missing or torn. All else hangs on it, and it
    /// is seldom written: these states are never left out.
    fn concerns_header(&self, kept: Kept) -> bool {
        let (Kept::Only(id) | Kept::Without(id) | Kept::Torn(id)) = kept else {
            return false;
        };
        self.loose.iter().any(|loose| {
            let first = matches!(loose.effect, Effect::Write { offset, .. } if offset < 512);
            loose.id == id && loose.file == 0 && first
        })
    }
}

/// Random states at each point that has others.
const RANDOM: usize = 2;

/// Builds the states that `log` may leave of `start`, about `budget` of them if there are more,
/// and shows them to `judge`. Returns how many there are, and how many were judged.
pub fn visit(
    start: &[Vec<u8>],
    log: &[Event],
    budget: usize,
    rng: &mut StdRng,
    judge: impl FnMut(State, &mut StdRng),
) -> (usize, usize) {
    visit_from(0, start, log, budget, rng, judge)
}

/// As [`visit`], with the states alone that come with the events from number `from` on.
pub fn visit_from(
    from: usize,
    start: &[Vec<u8>],
    log: &[Event],
    budget: usize,
    rng: &mut StdRng,
    mut judge: impl FnMut(State, &mut StdRng),
) -> (usize, usize) {
    let mut walker = Walker::new(start);
    let mut total = 0;
    for (now, event) in log.iter().enumerate() {
        let point = walker.step(now, event);
        if now >= from {
            let count = walker.states(&point).len();
            total += count + if count > 0 { RANDOM } else { 0 };
        }
    }
    let share = (budget as f64 / total as f64).min(1.0);
    let mut walker = Walker::new(start);
    let mut judged = 0;
    for (now, event) in log.iter().enumerate() {
        let point = walker.step(now, event);
        if now < from {
            continue;
        }
        let mut states = walker.states(&point);
        if !states.is_empty() {
            states.extend([Kept::Random; RANDOM]);
        }
        for kept in states {
            if walker.concerns_header(kept) || rng.random_bool(share) {
                let files = walker.build(kept, rng);
                judge(State::after_cut(now + 1, kept, files), rng);
                judged += 1;
            }
        }
    }
    (total, judged)
}
