//! In-flight state per cluster: who changes the mapping of which clusters right now.
//!
//! A request that allocates, copies, zeroes or discards clusters claims them first; one that meets
//! a claim waits for those clusters alone. Invariant: claims never overlap. A claim is taken for
//! all its clusters at once, so two that overlap cannot wait for one another. Nobody waits for a
//! claim while it has one, so all of them can be [closed](Claims::close) for a while.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::sync::{Event, EventListener, Mutex};

/// All claims of an image (or of its L1 table). On cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Claims(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    /// Start → end of the claimed range, and who waits for it.
    ranges: BTreeMap<u64, (u64, Arc<Event>)>,
    /// Nobody may claim anything; who waits for the end of that.
    closed: Option<Arc<Event>>,
}

/// A claimed range; it is given back when this is dropped.
#[derive(Debug)]
#[must_use = "the clusters are free again when this is dropped"]
pub struct Claim<'a> {
    claims: &'a Claims,
    range: Range<u64>,
}

/// Nobody has a claim, and nobody gets one until this is dropped.
#[derive(Debug)]
#[must_use = "claims are open again when this is dropped"]
pub struct Closed<'a>(&'a Claims);

impl Claims {
    /// Lets nobody claim anything, and waits until those that have claims have given them back.
    pub async fn close(&self) -> Closed<'_> {
        let closed = loop {
            match self.try_close() {
                Ok(closed) => break closed,
                Err(listener) => listener.await,
            }
        };
        while let Some(listener) = self.any() {
            listener.await;
        }
        closed
    }

    /// Whether nobody gets a claim now.
    pub fn are_closed(&self) -> bool {
        self.0.lock().closed.is_some()
    }

    fn try_close(&self) -> Result<Closed<'_>, EventListener> {
        let mut held = self.0.lock();
        if let Some(event) = &held.closed {
            return Err(event.listen());
        }
        held.closed = Some(Arc::new(Event::new()));
        Ok(Closed(self))
    }

    /// Hears of the end of some claim. `None`: there is none.
    fn any(&self) -> Option<EventListener> {
        let held = self.0.lock();
        held.ranges.values().next().map(|(_, event)| event.listen())
    }

    /// Lets claims be taken again that were [kept closed](Closed::keep).
    pub fn open(&self) {
        let closed = self.0.lock().closed.take();
        if let Some(event) = closed {
            event.notify(usize::MAX);
        }
    }

    /// Claims `range`, when nobody else has any of it.
    pub async fn claim(&self, range: Range<u64>) -> Claim<'_> {
        loop {
            match self.try_claim(&range) {
                Ok(claim) => return claim,
                Err(listener) => listener.await,
            }
        }
    }

    fn try_claim(&self, range: &Range<u64>) -> Result<Claim<'_>, EventListener> {
        let Held { ranges, closed } = &mut *self.0.lock();
        if let Some(event) = closed {
            return Err(event.listen());
        }
        if let Some((_, (end, event))) = ranges.range(..range.end).next_back()
            && *end > range.start
        {
            return Err(event.listen());
        }
        ranges.insert(range.start, (range.end, Arc::new(Event::new())));
        Ok(Claim {
            claims: self,
            range: range.clone(),
        })
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.0.lock().ranges.is_empty()
    }
}

impl Closed<'_> {
    /// Claims stay closed until [`Claims::open`].
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let removed = self.claims.0.lock().ranges.remove(&self.range.start);
        if let Some((_, event)) = removed {
            event.notify(usize::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: overlapping claims, a waiter that is never woken, one that waits
    //! for clusters it does not touch; a claim while all are closed, closed claims that never open
    //! again.

    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;
    use crate::reactor::{Reactor, yield_now};

    #[test]
    fn overlapping_claims_exclude_each_other_and_others_do_not_wait() {
        let reactor = Reactor::for_this_thread().unwrap();
        let claims = Rc::new(Claims::default());
        let holders: Rc<RefCell<Vec<Range<u64>>>> = Rc::default();
        for i in 0..200u64 {
            let (claims, holders) = (claims.clone(), holders.clone());
            reactor.spawn(async move {
                let range = (i * 7 % 20)..(i * 7 % 20 + 1 + i % 5);
                let claim = claims.claim(range.clone()).await;
                {
                    let mut holders = holders.borrow_mut();
                    let free = |h: &Range<u64>| h.end <= range.start || range.end <= h.start;
                    assert!(holders.iter().all(free), "{range:?} while {holders:?}");
                    holders.push(range.clone());
                }
                yield_now().await;
                holders.borrow_mut().retain(|h| *h != range);
                drop(claim);
            });
        }
        while reactor.tasks() > 0 {
            assert!(reactor.turn(), "a waiter was never woken");
        }
        assert!(claims.is_empty());
    }

    #[test]
    fn nobody_claims_anything_while_claims_are_closed() {
        let reactor = Reactor::for_this_thread().unwrap();
        let claims = Rc::new(Claims::default());
        let closers = Rc::new(std::cell::Cell::new(0));
        let seen = Rc::new(std::cell::Cell::new(0));
        for i in 0..100u64 {
            let (claims, closers, seen) = (claims.clone(), closers.clone(), seen.clone());
            reactor.spawn(async move {
                if i % 10 == 3 {
                    let closed = claims.close().await;
                    assert!(claims.is_empty());
                    closers.set(closers.get() + 1);
                    yield_now().await;
                    assert!(claims.is_empty());
                    closers.set(closers.get() - 1);
                    match i {
                        13 => {
                            closed.keep();
                            claims.open();
                        }
                        // Given up while it waits.
                        23 => drop((closed, claims.close())),
                        _ => drop(closed),
                    }
                } else {
                    let claim = claims.claim(i..i + 2).await;
                    assert_eq!(closers.get(), 0);
                    yield_now().await;
                    assert_eq!(closers.get(), 0);
                    drop(claim);
                    seen.set(seen.get() + 1);
                }
            });
        }
        while reactor.tasks() > 0 {
            assert!(reactor.turn(), "a waiter was never woken");
        }
        assert_eq!(seen.get(), 90);
    }
}
