//! What a job sees of the guests: whether they ask for something, and whether it stands in the way
//! of the threads that serve them.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Exports, process};

/// A guest without a request for so long is idle.
const QUIET: Duration = Duration::from_millis(20);

/// How often it is looked whether the threads of guests wait: a look opens files.
const LOOK: Duration = Duration::from_millis(5);

/// A part of the time that these threads may wait, in all, without the job's giving way.
const WAITING: u32 = 32;

/// The most that a job sleeps at a time: it takes no longer for a piece of its work.
const LONGEST: Duration = Duration::from_millis(2);

/// The guests, as a job's thread sees them.
pub struct Guests {
    exports: Arc<Exports>,
    /// Their requests up to the last look.
    requests: Cell<u64>,
    /// When a look last found new ones.
    active: Cell<Option<Instant>>,
    /// When it was last looked how long their threads had waited, and what was found.
    looked: Cell<(Instant, Duration)>,
    /// They waited.
    waiting: Cell<bool>,
    /// CPU time of the job's thread when it last gave way.
    used: Cell<Duration>,
}

impl Guests {
    /// Those of `exports`.
    pub fn new(exports: Arc<Exports>) -> Self {
        Self {
            requests: Cell::new(exports.requests()),
            active: Cell::new(None),
            looked: Cell::new((Instant::now(), exports.waited())),
            waiting: Cell::new(false),
            used: Cell::new(Duration::ZERO),
            exports,
        }
    }

    /// Whether there were requests of late.
    pub fn are_active(&self) -> bool {
        let requests = self.exports.requests();
        if self.requests.replace(requests) != requests {
            self.active.set(Some(Instant::now()));
            return true;
        }
        self.active.get().is_some_and(|at| at.elapsed() < QUIET)
    }

    /// Lets the threads of guests run, where they wait for a processor: the job's thread sleeps
    /// for as long as it has worked since the last time.
    ///
    /// The scheduler would share the processor evenly as well, but in portions of some
    /// milliseconds, and a guest that asks in the wrong one waits for all of it.
    pub fn give_way(&self) {
        let now = process::thread_time();
        let worked = now.saturating_sub(self.used.replace(now));
        if self.are_active() && self.wait() {
            std::thread::sleep(worked.min(LONGEST));
        }
    }

    fn wait(&self) -> bool {
        let (at, before) = self.looked.get();
        let elapsed = at.elapsed();
        if elapsed >= LOOK {
            let waited = self.exports.waited();
            self.looked.set((Instant::now(), waited));
            let waiting = waited.saturating_sub(before) > elapsed / WAITING;
            self.waiting.set(waiting);
        }
        self.waiting.get()
    }
}
