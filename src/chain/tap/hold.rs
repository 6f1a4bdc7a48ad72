//! Holds: who has which bytes of two disks that are to stay the same.
//!
//! Ranges are exact, and had in the order in which they were asked for: a request waits for those
//! before it that overlap, whether they have what they asked for or wait themselves. So a copy of a
//! long range has its turn among guests that write there without end. One that gives up waiting
//! leaves the queue.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::sync::{Event, EventListener, Mutex};

/// All holds, by the order in which they were asked for.
#[derive(Debug, Default)]
pub(super) struct Holds {
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    asked: BTreeMap<u64, (Range<u64>, Arc<Event>)>,
}

/// A range that is held, or waited for; it is let go of when this is dropped.
#[derive(Debug)]
#[must_use = "the range is let go of when this is dropped"]
pub struct Hold {
    holds: Arc<Holds>,
    number: u64,
    range: Range<u64>,
}

impl Holds {
    /// Holds `range`, when all who asked before for a part of it have let go.
    pub(super) async fn hold(self: &Arc<Self>, range: Range<u64>) -> Hold {
        let hold = self.ask(range);
        while let Some(listener) = self.before(&hold) {
            listener.await;
        }
        hold
    }

    fn ask(self: &Arc<Self>, range: Range<u64>) -> Hold {
        let mut queue = self.queue.lock();
        let number = queue.next;
        queue.next += 1;
        let entry = (range.clone(), Arc::new(Event::new()));
        queue.asked.insert(number, entry);
        Hold {
            holds: self.clone(),
            number,
            range,
        }
    }

    /// Hears of the end of one that `hold` has to wait for.
    fn before(&self, hold: &Hold) -> Option<EventListener> {
        let queue = self.queue.lock();
        let mut earlier = queue.asked.range(..hold.number);
        let overlaps =
            |range: &Range<u64>| range.start < hold.range.end && hold.range.start < range.end;
        let (_, (_, event)) = earlier.find(|(_, (range, _))| overlaps(range))?;
        Some(event.listen())
    }
}

impl Hold {
    /// What is held.
    #[must_use]
    pub fn range(&self) -> &Range<u64> {
        &self.range
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let gone = self.holds.queue.lock().asked.remove(&self.number);
        if let Some((_, event)) = gone {
            event.notify(usize::MAX);
        }
    }
}
