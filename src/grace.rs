//! Grace periods: when is nobody left who may still use what was taken away?
//!
//! A freed cluster must not be used again while a request that saw the old mapping is in flight.
//! Requests hold the *era* in which they began; what is freed is retired into the current era,
//! and a new one begins. When the last holder of an era and of all eras before it is gone, what
//! was retired into it is handed back.
//!
//! Holding an era costs the data path a count that only its own thread touches: each thread
//! keeps one reference ([`EraCache`]) and requests share it. A thread with nothing in flight
//! lets go of it, so that idle threads hold nothing up.
//!
//! Each chain has eras of its own ([`Grace`]), so that a request that hangs holds up no more than
//! the images of its disk. An image knows the chains that it is in ([`Users`]), and what it frees
//! waits for the requests of all of them. Invariant: a chain is among the users of its images
//! before anybody can look at a mapping through it, and until its last request has ended.

use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{ArcSwap, Event, Mutex};

/// What to do when the grace period is over.
type Release = Box<dyn FnOnce() + Send>;

/// A stretch of time between two retirements.
pub struct Era {
    retired: Mutex<Vec<Release>>,
    /// Keeps the next era, and so everything retired later, from ending before this one.
    next: OnceLock<Arc<Era>>,
}

impl Era {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            retired: Mutex::new(Vec::new()),
            next: OnceLock::new(),
        })
    }
}

impl std::fmt::Debug for Era {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Era")
    }
}

impl Drop for Era {
    fn drop(&mut self) {
        for release in std::mem::take(&mut *self.retired.lock()) {
            release();
        }
        // A long run of eras that end together is taken apart in a loop, not by recursion.
        let mut next = self.next.take();
        while let Some(era) = next {
            next = Arc::into_inner(era).and_then(|mut era| {
                for release in std::mem::take(&mut *era.retired.lock()) {
                    release();
                }
                era.next.take()
            });
        }
    }
}

/// The eras of a chain, one after another. On a cache line of their own: every request looks at
/// them.
#[derive(Debug)]
#[repr(align(128))]
pub struct Grace {
    current: ArcSwap<Era>,
    turning: Mutex<()>,
    /// What is written goes to another disk as well.
    tapped: bool,
    /// The chain is gone.
    over: AtomicBool,
    ended: Event,
}

impl Default for Grace {
    fn default() -> Self {
        Self::new(false)
    }
}

impl Grace {
    /// Those of a new chain, whose writes go to another disk as well if it is `tapped`.
    #[must_use]
    pub fn new(tapped: bool) -> Self {
        Self {
            current: ArcSwap::new(Era::new()),
            turning: Mutex::new(()),
            tapped,
            over: AtomicBool::new(false),
            ended: Event::new(),
        }
    }

    /// The chain is gone, and with it every request that has it or is about to enter an era.
    pub fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.ended.notify(usize::MAX);
    }

    /// Whether the chain is gone.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Waits until the chain is gone. Requests that have taken it and not entered an era yet are waited
    /// for as well, unlike by [`Grace::retire`].
    pub async fn ended(&self) {
        loop {
            let listener = self.ended.listen();
            if self.over.load(Ordering::SeqCst) {
                return;
            }
            listener.await;
        }
    }

    /// The current era. Its holder may use what is retired from now on.
    #[must_use]
    pub fn enter(&self) -> Arc<Era> {
        self.current.load_full()
    }

    /// Calls `release` when everybody who is in an era now has left it.
    pub fn retire(&self, release: impl FnOnce() + Send + 'static) {
        let turning = self.turning.lock();
        let old = self.current.load_full();
        let next = Era::new();
        old.retired.lock().push(Box::new(release));
        // Set before the swap: no one can leave the old era without passing the duty on.
        let _ = old.next.set(next.clone());
        self.current.store(next);
        drop(turning);
        // Outside the lock: the last reference may be ours, and releases run then.
        drop(old);
    }

    fn is_current(&self, era: &Arc<Era>) -> bool {
        Arc::ptr_eq(&self.current.load(), era)
    }
}

/// The chains whose requests may still use what an image frees.
#[derive(Debug, Default)]
pub struct Users(Mutex<Vec<Arc<Grace>>>);

impl Users {
    /// From now on requests of this chain are waited for.
    pub fn add(&self, chain: &Arc<Grace>) {
        self.0.lock().push(chain.clone());
    }

    /// No request of this chain is left, and none will come.
    pub fn remove(&self, chain: &Arc<Grace>) {
        let mut chains = self.0.lock();
        if let Some(index) = chains.iter().position(|other| Arc::ptr_eq(other, chain)) {
            chains.swap_remove(index);
        }
    }

    /// The chains whose writes go to no other disk.
    #[must_use]
    pub fn untapped(&self) -> Vec<Arc<Grace>> {
        let chains = self.0.lock();
        chains
            .iter()
            .filter(|chain| !chain.tapped)
            .cloned()
            .collect()
    }

    /// Calls `release` when everybody who is in an era of any of the chains now has left it.
    pub fn retire(&self, release: impl FnOnce() + Send + 'static) {
        let last = Arc::new(Last(Mutex::new(Some(Box::new(release)))));
        let chains = self.0.lock().clone();
        for chain in chains {
            let share = last.clone();
            chain.retire(move || drop(share));
        }
    }
}

/// What the last of several grace periods does.
struct Last(Mutex<Option<Release>>);

impl Drop for Last {
    fn drop(&mut self) {
        let release = self.0.lock().take();
        if let Some(release) = release {
            release();
        }
    }
}

/// The one reference that a thread has to an era.
#[derive(Debug)]
struct Held(Arc<Era>);

/// A request's share of its thread's reference to an era: it stays on the thread, and sharing
/// it costs no atomic operation.
#[derive(Clone, Debug)]
pub struct LocalEra(Rc<Held>);

impl LocalEra {
    /// A reference of its own, for a task that is no queue worker's.
    #[must_use]
    pub fn enter(grace: &Grace) -> Self {
        Self(Rc::new(Held(grace.enter())))
    }

    /// Whether both share one reference.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

/// A thread's own reference to the current era.
#[derive(Debug, Default)]
pub struct EraCache {
    era: Option<LocalEra>,
}

impl EraCache {
    /// The current era, as a reference whose count no other thread touches.
    pub fn enter(&mut self, grace: &Grace) -> LocalEra {
        match &self.era {
            Some(era) if grace.is_current(&era.0.0) => era.clone(),
            _ => {
                let era = LocalEra::enter(grace);
                self.era = Some(era.clone());
                era
            }
        }
    }

    /// Lets go, since nothing is in flight on this thread.
    pub fn leave(&mut self) {
        self.era = None;
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a release that comes too early, out of order, or never; one that
    //! waits for a chain that has nothing to do with it, or for one of two that have.

    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn counter() -> (Arc<AtomicUsize>, impl Fn(&Grace)) {
        let count = Arc::new(AtomicUsize::new(0));
        let retire = {
            let count = count.clone();
            move |grace: &Grace| {
                let count = count.clone();
                grace.retire(move || {
                    count.fetch_add(1, Ordering::SeqCst);
                });
            }
        };
        (count, retire)
    }

    #[test]
    fn nothing_is_released_before_the_holder_leaves() {
        let grace = Grace::default();
        let (count, retire) = counter();
        let era = grace.enter();
        retire(&grace);
        assert_eq!(count.load(Ordering::SeqCst), 0);
        drop(era);
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_later_retirement_waits_for_an_older_holder() {
        let grace = Grace::default();
        let (count, retire) = counter();
        let old = grace.enter();
        retire(&grace);
        let middle = grace.enter();
        retire(&grace);
        drop(middle);
        assert_eq!(
            count.load(Ordering::SeqCst),
            0,
            "the oldest holder saw both"
        );
        drop(old);
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn without_holders_it_is_released_at_once_and_long_runs_do_not_recurse() {
        let grace = Grace::default();
        let (count, retire) = counter();
        retire(&grace);
        assert_eq!(count.load(Ordering::SeqCst), 1);
        let old = grace.enter();
        for _ in 0..200_000 {
            retire(&grace);
        }
        drop(old);
        assert_eq!(count.load(Ordering::SeqCst), 200_001);
    }

    #[test]
    fn all_users_are_waited_for_and_nobody_else() {
        let chains: [Arc<Grace>; 3] = Default::default();
        let users = Users::default();
        users.add(&chains[0]);
        users.add(&chains[1]);
        let (count, _) = counter();
        let retire = || {
            let count = count.clone();
            users.retire(move || {
                count.fetch_add(1, Ordering::SeqCst);
            });
        };
        let stranger = chains[2].enter();
        retire();
        assert_eq!(count.load(Ordering::SeqCst), 1, "nobody uses it");
        for (round, (first, last)) in [(0, 1), (1, 0)].into_iter().enumerate() {
            let (first, last) = (chains[first].enter(), chains[last].enter());
            retire();
            drop(first);
            assert_eq!(count.load(Ordering::SeqCst), 1 + round, "another uses it");
            drop(last);
            assert_eq!(count.load(Ordering::SeqCst), 2 + round);
        }
        // One that has left is waited for no longer; nor does the other one leave with it.
        let (first, second) = (chains[0].enter(), chains[1].enter());
        users.remove(&chains[0]);
        retire();
        drop(first);
        assert_eq!(count.load(Ordering::SeqCst), 3);
        drop(second);
        assert_eq!(count.load(Ordering::SeqCst), 4);
        users.remove(&chains[1]);
        retire();
        assert_eq!(count.load(Ordering::SeqCst), 5, "it has no users");
        drop(stranger);
    }

    #[test]
    fn an_idle_thread_holds_nothing_up() {
        let grace = Grace::default();
        let (count, retire) = counter();
        let mut cache = EraCache::default();
        let request = cache.enter(&grace);
        retire(&grace);
        drop(request);
        assert_eq!(count.load(Ordering::SeqCst), 0);
        cache.leave();
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }
}
