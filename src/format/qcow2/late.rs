//! Writes on their way to where the image will not look for them: into layers below it, which a guest
//! began before the image was put on top of its disk, and in place, which it began before a snapshot
//! came to share the clusters.
//!
//! Such a write lands in the old top at any time. Copying its cluster up before that would hide it:
//! the guest would be told that it is done, and read what was there before. So those who copy from
//! below wait for it; a request that only reads, or replaces whole clusters, does not, since the guest has
//! both on their way at once and may find either. The same holds for a cluster that is copied within
//! the image, since a snapshot has it as well.
//!
//! Invariant: all writes into layers below are here before the first request can copy anything into
//! the image; after that there are only ever fewer. Those in place are here before the snapshot takes
//! effect, as long as which nobody has a claim: who finds none in its way under its claim needs not
//! look again. A task's write in place is here from before it looks at the mapping; a queue hands its
//! own over ([`chain::turn`](crate::chain::turn)). The lock orders a task's look and the snapshot
//! ([`Late::divide`]): no barrier is between the write's coming here and that look.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::sync::{
    Event, EventListener, Mutex,
    atomic::{AtomicUsize, Ordering},
};

/// All late writes below an image.
#[derive(Debug, Default)]
pub struct Late {
    /// How many there are. Nearly always none, which is seen without the lock.
    count: AtomicUsize,
    writes: Mutex<Writes>,
}

#[derive(Debug, Default)]
struct Writes {
    next: u64,
    /// By number; what each writes, and who waits for it.
    list: BTreeMap<u64, (Range<u64>, Arc<Event>)>,
}

/// A write that is on its way. It has ended when this is dropped.
#[derive(Debug)]
#[must_use = "the write counts as ended when this is dropped"]
pub struct LateWrite {
    late: Arc<Late>,
    number: u64,
}

impl Late {
    /// Adds a write to `range` of the disk.
    pub fn add(self: &Arc<Self>, range: Range<u64>) -> LateWrite {
        let mut writes = self.writes.lock();
        let number = writes.next;
        writes.next += 1;
        writes.list.insert(number, (range, Arc::new(Event::new())));
        self.count.fetch_add(1, Ordering::SeqCst);
        LateWrite {
            late: self.clone(),
            number,
        }
    }

    /// Hears of the end of one that touches any of `ranges`. `None`: there is none.
    #[must_use]
    pub fn in_the_way(&self, ranges: &[Range<u64>]) -> Option<EventListener> {
        if self.count.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let writes = self.writes.lock();
        let meets = |write: &Range<u64>| {
            // What is empty meets nothing, wherever it is.
            let meet = |range: &Range<u64>| {
                !range.is_empty() && write.start < range.end && range.start < write.end
            };
            ranges.iter().any(meet)
        };
        let found = writes.list.values().find(|(write, _)| meets(write));
        found.map(|(_, event)| event.listen())
    }

    /// Divides the writes by a mapping that the caller has just put in force: who adds one from now on
    /// finds that mapping, and who makes use of it, once the caller lets him, finds those that were
    /// added before.
    pub fn divide(&self) {
        drop(self.writes.lock());
    }

    /// Waits until those have ended that are there now.
    pub async fn those_there_end(&self) {
        let next = self.writes.lock().next;
        loop {
            let first = {
                let writes = self.writes.lock();
                let first = writes.list.first_key_value();
                first
                    .filter(|(number, _)| **number < next)
                    .map(|(_, (_, event))| event.listen())
            };
            match first {
                Some(ended) => ended.await,
                None => return,
            }
        }
    }

    /// Waits until none touches `range`.
    pub async fn wait(&self, range: Range<u64>) {
        while let Some(listener) = self.in_the_way(std::slice::from_ref(&range)) {
            listener.await;
        }
    }
}

impl LateWrite {
    /// Whether it is one of `late`.
    #[must_use]
    pub fn is_of(&self, late: &Arc<Late>) -> bool {
        Arc::ptr_eq(&self.late, late)
    }
}

impl Drop for LateWrite {
    fn drop(&mut self) {
        let removed = self.late.writes.lock().list.remove(&self.number);
        self.late.count.fetch_sub(1, Ordering::SeqCst);
        if let Some((_, event)) = removed {
            event.notify(usize::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::single_range_in_vec_init)]
    //! What would be caught: a copy that does not wait for a write in its way, waits for one that is
    //! not, or is never woken; a write that hides another one of the same range.

    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;
    use crate::reactor::Reactor;

    #[test]
    fn who_copies_waits_for_the_writes_in_its_way_alone() {
        let reactor = Reactor::for_this_thread().unwrap();
        let late = Arc::new(Late::default());
        let (one, twin) = (late.add(10..20), late.add(10..20));
        let other = late.add(40..50);
        let found = |ranges: &[Range<u64>]| late.in_the_way(ranges).is_some();
        assert!(found(&[19..20]) && found(&[0..11]) && found(&[0..5, 45..46]));
        assert!(!found(&[0..10, 20..40]) && !found(&[50..60]) && !found(&[15..15]));
        let passed = Rc::new(Cell::new(0));
        for range in [0..12, 0..30, 20..40] {
            let (late, passed) = (late.clone(), passed.clone());
            reactor.spawn(async move {
                late.wait(range).await;
                passed.set(passed.get() + 1);
            });
        }
        let turn = |wanted: u32| {
            for _ in 0..10 {
                reactor.turn();
            }
            assert_eq!(passed.get(), wanted);
        };
        turn(1);
        drop(one);
        turn(1);
        drop(twin);
        turn(3);
        assert!(found(&[0..u64::MAX]));
        assert!(other.is_of(&late));
        drop(other);
        assert!(!found(&[0..u64::MAX]));
    }

    #[test]
    fn those_that_come_later_are_not_waited_for() {
        let reactor = Reactor::for_this_thread().unwrap();
        let late = Arc::new(Late::default());
        let before = late.add(10..20);
        let ended = Rc::new(Cell::new(false));
        reactor.spawn({
            let (late, ended) = (late.clone(), ended.clone());
            async move {
                late.those_there_end().await;
                ended.set(true);
            }
        });
        for _ in 0..10 {
            reactor.turn();
        }
        let _after = late.add(10..20);
        assert!(!ended.get());
        drop(before);
        while reactor.tasks() > 0 {
            assert!(reactor.turn(), "it waits for a later one");
        }
        assert!(ended.get());
    }
}
