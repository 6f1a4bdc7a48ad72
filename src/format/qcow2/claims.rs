//! In-flight state per cluster: who changes the mapping of which clusters right now.
//!
//! A request that allocates, copies, zeroes or discards clusters claims them first; one that meets
//! a claim waits for those clusters alone. Invariant: claims never overlap. A claim is taken for
//! all its clusters at once, so two that overlap cannot wait for one another.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::sync::{Event, EventListener, Mutex};

/// All claims of an image (or of its L1 table). On cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Claims {
    /// Start → end of the claimed range, and who waits for it.
    ranges: Mutex<BTreeMap<u64, (u64, Arc<Event>)>>,
}

/// A claimed range; it is given back when this is dropped.
#[derive(Debug)]
#[must_use = "the clusters are free again when this is dropped"]
pub struct Claim<'a> {
    claims: &'a Claims,
    range: Range<u64>,
}

impl Claims {
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
        let mut ranges = self.ranges.lock();
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
        self.ranges.lock().is_empty()
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let removed = self.claims.ranges.lock().remove(&self.range.start);
        if let Some((_, event)) = removed {
            event.notify(usize::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: overlapping claims, a waiter that is never woken, one that waits
    //! for clusters it does not touch.

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
}
