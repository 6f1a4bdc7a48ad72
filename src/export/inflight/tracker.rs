//! The part of a region that belongs to one split queue.

use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use super::Refusal;
use super::layout::{SPLIT_HEADER, SPLIT_RECORD};
use crate::shared_memory::crash::CrashByte;
use crate::shared_memory::{Record, Records, SharedMemory};

// Of the header.
const FEATURES: usize = 0;
pub(super) const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
// Of a record.
/// The mark, and how often the process has crashed with the request under way. The latter has the
/// first byte of what the specification calls padding, and is cleared with the mark.
const MARK: usize = 0;
/// Beside the number of crashes: the request was taken over, and has not been begun with since then.
/// A crash is none of its doing.
const LEFT: u8 = 0x80;
const MOST_CRASHES: u8 = LEFT - 1;
const NEXT: usize = 6;
const COUNTER: usize = 8;
/// In the padding of the first record: the process that had the region last has crashed.
const CRASHED: usize = 2;
/// Next to it: whether the guest has a write cache, [`CACHE_OFF`] or [`CACHE_ON`].
pub(super) const CACHE: usize = SPLIT_HEADER + 3;
pub(super) const CACHE_OFF: u8 = 1;
pub(super) const CACHE_ON: u8 = 2;

/// The version that a region in use has.
pub(super) const IN_USE: u16 = 1;
/// A chain that was taken and not answered.
const IN_FLIGHT: u8 = 1;

type State<'a> = Record<'a, SPLIT_RECORD>;

/// What a successor must know of the ring.
#[derive(Clone, Copy, Debug)]
pub struct RingState {
    /// Its entries, a power of two.
    pub size: u16,
    /// Its used index.
    pub used: u16,
    /// The next available index, as the front-end says.
    pub base: u16,
}

/// A request to be carried out again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Again {
    /// The head of its chain.
    pub head: u16,
    /// How often the process has crashed while it was under way. Then it is to be carried out alone,
    /// so that the one of its kind that is to blame is found.
    pub crashes: u8,
}

/// The region of one queue, as it was found.
#[derive(Debug)]
pub struct QueueRegion {
    header: Records<SPLIT_HEADER>,
    states: Records<SPLIT_RECORD>,
    /// Descriptors, as the front-end says.
    size: u16,
    /// Where it begins in the memory.
    at: usize,
}

impl QueueRegion {
    pub(super) fn new(memory: &Arc<SharedMemory>, at: usize, size: u16) -> Option<Self> {
        Some(Self {
            header: memory.records(at, 1)?,
            states: memory.records(at + SPLIT_HEADER, usize::from(size))?,
            size,
            at,
        })
    }

    /// Takes over what is in flight: first what was under way at a crash, the least to be suspected
    /// before the others, then all else in the order in which it was taken. Without a predecessor the
    /// region is made ready.
    ///
    /// # Errors
    /// When it contradicts itself or the ring. Nothing has been changed then.
    pub fn recover(self, ring: RingState) -> Result<(Tracker, Vec<Again>), Refusal> {
        if ring.size > self.size {
            return Err(Refusal::RingSize {
                ring: ring.size,
                region: self.size,
            });
        }
        let version = self.header(|h| h.load::<u16, VERSION>(Ordering::Acquire));
        let features = self.header(|h| h.load::<u64, FEATURES>(Ordering::Relaxed));
        match version {
            0 => {
                self.begin(ring)?;
                Ok((self.into_tracker(0), Vec::new()))
            }
            IN_USE if features == 0 => self.take_over(ring),
            _ => Err(Refusal::Version { version, features }),
        }
    }

    /// Readies a fresh region.
    fn begin(&self, RingState { used, base, .. }: RingState) -> Result<(), Refusal> {
        if base != used {
            return Err(Refusal::Base { base, used });
        }
        for head in 0..self.size {
            self.state(head, |state| {
                // What is known of the write cache stays.
                state.store::<u16, MARK>(0, Ordering::Relaxed);
                state.store::<u8, CRASHED>(0, Ordering::Relaxed);
            });
        }
        self.header(|header| {
            header.store::<u64, FEATURES>(0, Ordering::Relaxed);
            header.store::<u16, DESC_NUM>(self.size, Ordering::Relaxed);
            header.store::<u16, LAST_BATCH_HEAD>(0, Ordering::Relaxed);
            header.store::<u16, USED_IDX>(used, Ordering::Relaxed);
            // Last: only now it is in use.
            header.store::<u16, VERSION>(IN_USE, Ordering::Release);
        });
        Ok(())
    }

    fn take_over(self, ring: RingState) -> Result<(Tracker, Vec<Again>), Refusal> {
        let found = self.header(|h| h.load::<u16, DESC_NUM>(Ordering::Relaxed));
        if found != self.size {
            return Err(Refusal::Descriptors {
                found,
                expected: self.size,
            });
        }
        let mut marked = self.marked(ring.size)?;
        let region = self.header(|h| h.load::<u16, USED_IDX>(Ordering::Relaxed));
        let apart = ring.used.wrapping_sub(region);
        if marked.is_empty() {
            // All requests had been answered. The ring may have been begun anew since then, and may
            // be another one: the last batch says nothing of it.
        } else if apart > ring.size {
            return Err(Refusal::UsedIndex {
                region,
                ring: ring.used,
                size: ring.size,
            });
        } else {
            let batch = self.last_batch(apart, ring.size)?;
            marked.retain(|request| !batch.contains(&request.head));
            for head in batch {
                self.state(head, |state| state.store::<u16, MARK>(0, Ordering::Release));
            }
        }
        if apart != 0 {
            self.header(|h| h.store::<u16, USED_IDX>(ring.used, Ordering::Release));
        }
        self.count_crash(&mut marked);
        for request in &marked {
            self.state(request.head, |state| leave(state, request.crashes));
        }
        marked.sort_unstable_by_key(|request| {
            let Marked {
                crashes,
                counter,
                head,
                ..
            } = *request;
            (crashes == 0, crashes, counter, head)
        });
        let last = marked.iter().map(|request| request.counter).max();
        let counter = last.map_or(0, |last| last.wrapping_add(1));
        let again = marked.iter().map(|request| Again {
            head: request.head,
            crashes: request.crashes,
        });
        let again = again.collect();
        Ok((self.into_tracker(counter), again))
    }

    /// The chains with a mark.
    fn marked(&self, ring: u16) -> Result<Vec<Marked>, Refusal> {
        let mut marked = Vec::new();
        for head in 0..self.size {
            let (word, counter) = self.state(head, |state| {
                let word = state.load::<u16, MARK>(Ordering::Acquire);
                (word, state.load::<u64, COUNTER>(Ordering::Relaxed))
            });
            match word.to_ne_bytes() {
                [0, _] => {}
                [IN_FLIGHT, _] if head >= ring => return Err(Refusal::Head { head, ring }),
                [IN_FLIGHT, crashes] => marked.push(Marked {
                    head,
                    left: crashes & LEFT != 0,
                    crashes: crashes & MOST_CRASHES,
                    counter,
                }),
                [mark, _] => return Err(Refusal::Mark { head, mark }),
            }
        }
        Ok(marked)
    }

    /// The heads of the `len` chains that were answered last.
    fn last_batch(&self, len: u16, ring: u16) -> Result<Vec<u16>, Refusal> {
        let mut batch = Vec::new();
        let mut seen = vec![false; usize::from(ring)];
        let mut head = self.header(|h| h.load::<u16, LAST_BATCH_HEAD>(Ordering::Relaxed));
        for _ in 0..len {
            match seen.get_mut(usize::from(head)) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(Refusal::Batch { head }),
            }
            batch.push(head);
            head = self.state(head, |s| s.load::<u16, NEXT>(Ordering::Relaxed));
        }
        Ok(batch)
    }

    /// Counts with each request that its process has crashed with it, if it has.
    fn count_crash(&self, marked: &mut [Marked]) {
        if self.state(0, |s| s.load::<u8, CRASHED>(Ordering::Relaxed)) == 0 {
            return;
        }
        // First: who dies here counts a crash too little, and none twice.
        self.state(0, |s| s.store::<u8, CRASHED>(0, Ordering::Release));
        for request in marked.iter_mut().filter(|request| !request.left) {
            request.crashes = MOST_CRASHES.min(request.crashes + 1);
        }
    }

    fn into_tracker(self, counter: u64) -> Tracker {
        let crashed = self.at + SPLIT_HEADER + CRASHED;
        Tracker {
            crashed: CrashByte::new(self.states.memory(), crashed),
            header: self.header,
            states: self.states,
            counter,
            last: 0,
        }
    }

    /// Does something with the header, which is there since this was made.
    fn header<T: Default>(&self, with: impl FnOnce(Record<'_, SPLIT_HEADER>) -> T) -> T {
        self.header.get(0).map(with).unwrap_or_default()
    }

    fn state<T: Default>(&self, head: u16, with: impl FnOnce(State<'_>) -> T) -> T {
        self.states
            .get(usize::from(head))
            .map(with)
            .unwrap_or_default()
    }
}

#[derive(Clone, Copy)]
struct Marked {
    head: u16,
    /// Nobody has begun with it since it was taken over.
    left: bool,
    crashes: u8,
    counter: u64,
}

/// A request is taken over, and not begun with.
fn leave(state: State<'_>, crashes: u8) {
    let word = u16::from_ne_bytes([IN_FLIGHT, crashes | LEFT]);
    state.store::<u16, MARK>(word, Ordering::Release);
}

/// The region of a queue at work. Its methods are called for each chain, in this order:
/// [`Tracker::take`], [`Tracker::answer`], and for the batch [`Tracker::before_publication`] and
/// [`Tracker::after_publication`].
#[derive(Debug)]
pub struct Tracker {
    /// Tells a successor of a crash.
    crashed: Option<CrashByte>,
    header: Records<SPLIT_HEADER>,
    states: Records<SPLIT_RECORD>,
    /// Chains taken so far, which gives them an order.
    counter: u64,
    /// The chain answered last.
    last: u16,
}

impl Tracker {
    /// The calling thread carries the requests out: its crashes are for what it has begun with.
    pub fn claim(&self) {
        if let Some(byte) = &self.crashed {
            byte.claim();
        }
    }

    /// Whether some of the region was taken away.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.states.memory().is_lost()
    }

    /// Whether the process still lives; see [`SharedMemory::is_alive`].
    #[inline]
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.states.memory().is_alive()
    }

    /// A chain has been taken: from now on it is in flight. False: it is still marked, since its
    /// answer has not been shown; nothing has changed.
    #[inline]
    #[must_use]
    pub fn take(&mut self, head: u16) -> bool {
        if let Some(state) = self.states.get(usize::from(head)) {
            if state.load::<u8, MARK>(Ordering::Relaxed) != 0 {
                return false;
            }
            state.store::<u64, COUNTER>(self.counter, Ordering::Relaxed);
            let word = const { u16::from_ne_bytes([IN_FLIGHT, 0]) };
            // Release: with its place in the order.
            state.store::<u16, MARK>(word, Ordering::Release);
            self.counter = self.counter.wrapping_add(1);
            // Before anything is done for it.
            compiler_fence(Ordering::SeqCst);
        }
        true
    }

    /// A request that was taken over is begun with.
    pub fn begin(&self, Again { head, crashes }: Again) {
        if let Some(state) = self.states.get(usize::from(head)) {
            let word = u16::from_ne_bytes([IN_FLIGHT, crashes & MOST_CRASHES]);
            state.store::<u16, MARK>(word, Ordering::Release);
            // Before anything is done for it.
            compiler_fence(Ordering::SeqCst);
        }
    }

    /// The request that was begun with last is left for later.
    pub fn leave(&self, Again { head, crashes }: Again) {
        if let Some(state) = self.states.get(usize::from(head)) {
            leave(state, crashes & MOST_CRASHES);
        }
    }

    /// The chain that was taken last was not taken.
    pub fn put_back(&mut self, head: u16) {
        if let Some(state) = self.states.get(usize::from(head)) {
            state.store::<u16, MARK>(0, Ordering::Release);
        }
    }

    /// A chain has been answered, and belongs to the batch that is published next.
    #[inline]
    pub fn answer(&mut self, head: u16) {
        if let Some(state) = self.states.get(usize::from(head)) {
            state.store::<u16, NEXT>(self.last, Ordering::Relaxed);
            self.last = head;
        }
    }

    /// The used index is about to move over what was answered.
    #[inline]
    pub fn before_publication(&self) {
        if let Some(header) = self.header.get(0) {
            header.store::<u16, LAST_BATCH_HEAD>(self.last, Ordering::Release);
        }
    }

    /// The used index has moved by `count` chains, to `used`: they are not in flight any more.
    #[inline]
    pub fn after_publication(&self, count: u16, used: u16) {
        // A mark that is gone before the index has moved would be a request that nobody answers.
        compiler_fence(Ordering::SeqCst);
        let mut head = self.last;
        for _ in 0..count {
            // Whatever the front-end makes of the links, each leads to a record or to none.
            let Some(state) = self.states.get(usize::from(head)) else {
                break;
            };
            head = state.load::<u16, NEXT>(Ordering::Relaxed);
            state.store::<u16, MARK>(0, Ordering::Relaxed);
        }
        if let Some(header) = self.header.get(0) {
            // Release: the marks are gone before.
            header.store::<u16, USED_IDX>(used, Ordering::Release);
        }
    }
}
