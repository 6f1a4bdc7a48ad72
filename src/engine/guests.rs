//! What a job sees of the guests: whether they ask for something, and whether it stands in the way
//! of the threads that serve them.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Exports;
use crate::job::source::{self, GuestLoad};
use crate::sched;

/// A guest without a request for so long is idle.
const QUIET: Duration = Duration::from_millis(20);

/// How often it is looked whether the threads of guests wait: a look opens files.
const LOOK: Duration = Duration::from_millis(5);

/// A part of the time that these threads may wait, in all, without the job's giving way.
const WAITING: u32 = 32;

/// The guests, as a job's thread sees them.
pub struct Guests {
    exports: Arc<Exports>,
    /// Their requests up to the last look.
    requests: Cell<u64>,
    /// When a look last found new ones.
    active: Cell<Option<Instant>>,
    /// How long their threads had waited at the last look.
    looked: Cell<Look>,
}

impl Guests {
    /// Those of `exports`.
    pub fn new(exports: Arc<Exports>) -> Self {
        Self {
            requests: Cell::new(exports.requests()),
            active: Cell::new(None),
            looked: Cell::new(Look::new(Instant::now(), exports.waited())),
            exports,
        }
    }

    /// Whether there were requests of late.
    fn are_active(&self) -> bool {
        let requests = self.exports.requests();
        if self.requests.replace(requests) != requests {
            self.active.set(Some(Instant::now()));
            return true;
        }
        self.active.get().is_some_and(|at| at.elapsed() < QUIET)
    }

    fn wait(&self) -> bool {
        let now = Instant::now();
        let mut look = self.looked.get();
        if look.is_old(now) {
            look = look.next(now, self.exports.waited());
            self.looked.set(look);
        }
        look.waiting
    }
}

impl source::Guests for Guests {
    fn load(&self) -> GuestLoad {
        if !self.are_active() {
            GuestLoad::Idle
        } else if self.wait() {
            GuestLoad::CpuContended
        } else {
            GuestLoad::Active
        }
    }

    /// Lets the threads of guests run, where they wait for a processor.
    ///
    /// The scheduler would share the processor evenly as well, but in portions of some
    /// milliseconds, and a guest that asks in the wrong one waits for all of it. A thread that yields
    /// has its turn again when the others' slices are over, which are short. Unlike a guest's thread,
    /// the job yields where slices cannot be set as well: it is the job that is late then.
    fn give_way(&self) {
        if self.load() == GuestLoad::CpuContended {
            sched::give_turn();
        }
    }
}

/// What a look at the threads of guests found.
#[derive(Clone, Copy, Debug)]
struct Look {
    at: Instant,
    /// How long they had waited by then, since they began.
    waited: Duration,
    /// They waited much between the look before and this one.
    waiting: bool,
}

impl Look {
    /// The first: nothing is known of the time before.
    fn new(at: Instant, waited: Duration) -> Self {
        Self {
            at,
            waited,
            waiting: false,
        }
    }

    fn is_old(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) >= LOOK
    }

    /// The next one, which found that they have `waited` so long by now. That may be less than
    /// before, when an export has gone.
    fn next(&self, now: Instant, waited: Duration) -> Self {
        let elapsed = now.saturating_duration_since(self.at);
        Self {
            at: now,
            waited,
            waiting: waited.saturating_sub(self.waited) > elapsed / WAITING,
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a job that never gives way, or always.

    use super::source::Guests as _;
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_job_gives_way_only_while_threads_of_guests_wait() {
        let start = Instant::now();
        let first = Look::new(start, 70 * MS);
        assert!(
            !first.waiting,
            "what they waited before is none of its doing"
        );
        assert!(!first.is_old(start + 4 * MS) && first.is_old(start + 5 * MS));

        let busy = first.next(start + 8 * MS, 71 * MS);
        assert!(busy.waiting, "an eighth of the time");
        assert!(!busy.is_old(start + 12 * MS));
        let quiet = busy.next(start + 72 * MS, 72 * MS);
        assert!(!quiet.waiting, "a sixty-fourth of it");
        assert!(quiet.next(start + 80 * MS, 75 * MS).waiting);
    }

    #[test]
    fn an_export_that_goes_takes_its_waiting_with_it() {
        let start = Instant::now();
        let before = Look::new(start, 1000 * MS);
        let after = before.next(start + 8 * MS, 10 * MS);
        assert!(!after.waiting);
        assert!(after.next(start + 16 * MS, 14 * MS).waiting);
    }

    /// The guests of no export, active and waiting as told: that holds, since it was found out
    /// later than any test asks.
    fn guests(active: bool, waiting: bool) -> Guests {
        let later = Instant::now() + 1000 * LOOK;
        let guests = Guests::new(Arc::default());
        guests.active.set(active.then_some(later));
        let look = Look::new(later, Duration::ZERO);
        guests.looked.set(Look { waiting, ..look });
        guests
    }

    #[test]
    fn threads_that_wait_count_while_guests_ask_for_something() {
        for (active, waiting, load) in [
            (false, false, GuestLoad::Idle),
            (false, true, GuestLoad::Idle),
            (true, false, GuestLoad::Active),
            (true, true, GuestLoad::CpuContended),
        ] {
            assert_eq!(guests(active, waiting).load(), load);
        }
    }
}
