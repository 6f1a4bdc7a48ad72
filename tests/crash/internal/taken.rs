//! Snapshots that are taken and deleted at random, and what each may hold.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stratablk::format::Qcow2;
use stratablk::reactor::{Reactor, yield_now};

use crate::disk::Disk;
use crate::history::{History, SECTOR, stamp_of};
use crate::qcow2::{Image, Sector};
use crate::states::{End, State};
use crate::workload::Work;

/// A snapshot's instant.
#[derive(Clone, Debug)]
pub(super) struct Taken {
    pub(super) name: String,
    /// Notes and operations of the history by then, and the time.
    pub(super) notes: usize,
    pub(super) operations: usize,
    pub(super) at: usize,
    /// When it was answered.
    pub(super) answered: usize,
}

/// A change of the list.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) began: usize,
    pub(super) answered: usize,
    /// The names from then on.
    pub(super) names: Vec<String>,
}

/// Takes and deletes snapshots.
pub(super) struct Snapshots {
    pub(super) work: Rc<Work>,
    pub(super) image: Arc<Qcow2>,
    pub(super) taken: RefCell<Vec<Taken>>,
    pub(super) steps: RefCell<Vec<Step>>,
    pub(super) failed: Cell<usize>,
    pub(super) strict: Cell<bool>,
    pub(super) rng: RefCell<StdRng>,
}

impl Snapshots {
    pub(super) fn new(work: &Rc<Work>, image: &Arc<Qcow2>, seed: u64) -> Rc<Self> {
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

    pub(super) fn names(&self) -> Vec<String> {
        self.steps.borrow().last().unwrap().names.clone()
    }

    pub(super) fn begin(&self, names: Vec<String>) {
        let began = self.work.now();
        self.steps.borrow_mut().push(Step {
            began,
            answered: usize::MAX,
            names,
        });
    }

    pub(super) fn end(&self, result: stratablk::error::Result<()>, before: Vec<String>) {
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

    pub(super) async fn take(&self, count: usize) {
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

    pub(super) async fn delete(&self, index: usize) {
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

    pub(super) async fn change(&self) {
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

    pub(super) fn spawn(self: &Rc<Self>, reactor: &Reactor, changes: usize) {
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

    pub(super) fn known(&self) -> Known {
        Known {
            history: self.work.history.borrow().clone(),
            taken: self.taken.borrow().clone(),
            steps: self.steps.borrow().clone(),
        }
    }
}

/// What an image is compared with.
pub(super) struct Known {
    pub(super) history: History,
    pub(super) taken: Vec<Taken>,
    pub(super) steps: Vec<Step>,
}

impl Known {
    /// The lists that there may be when everything ends at `cut`.
    pub(super) fn lists(&self, cut: usize) -> Vec<&Vec<String>> {
        let certain = self.steps.iter().rposition(|step| step.answered <= cut);
        let steps = self.steps.iter().skip(certain.unwrap_or(0));
        let steps = steps.filter(|step| step.began <= cut);
        steps.map(|step| &step.names).collect()
    }

    /// What a sector of a snapshot may hold.
    pub(super) fn allowed(&self, name: &str, sector: usize, state: &State) -> Vec<u32> {
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
    pub(super) fn check(&self, disk: &Disk, state: &State) -> Result<u64, String> {
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
