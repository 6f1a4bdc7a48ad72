//! The ring: records are appended under the lock of an image's metadata, one at a time.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use super::super::words::Words;
use super::record::{self, FIXED, HEAD, Kind, MOST};
use crate::planted::{Fault, is_planted};
use crate::shared_memory::SharedMemory;

/// Where the words are, in bytes of the file.
pub(super) const RING: usize = 4096;
/// Where the position is from which on the next process needs the records.
pub(super) const HEAD_AT: usize = 512;
/// Where the position is behind the last whole record.
pub(super) const TAIL_AT: usize = 1024;

/// Words that a step may append, made without giving up the lock: the refcount blocks that a
/// table of the greatest size needs, or the entries of a slice.
const STEP: u64 = 4096;
/// The part of the ring that is for the references which flushes take off.
const RESERVE_PART: u64 = 8;
/// The least ring: [`STEP`], the reserve, and as much again.
pub(super) const LEAST_WORDS: u64 = 8 * STEP;

/// Whether a change may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Admission {
    /// There is room for the largest step.
    Granted,
    /// A flush must make room first.
    Full,
    /// The memory has been taken away.
    Lost,
}

/// Says that a change of the mapping has been recorded, or that nobody keeps a record: what is
/// given to [`Slice::set`](super::super::l2::Slice::set).
#[derive(Debug)]
pub struct Recorded(());

impl Recorded {
    /// Of an entry that belongs to no image: for tests of slices alone.
    #[doc(hidden)]
    #[must_use]
    pub fn of_no_image() -> Self {
        Self(())
    }

    /// Of an entry that comes out of a journal, for a slice that nobody sees yet.
    pub(super) fn adopted() -> Self {
        Self(())
    }
}

/// The journal of an image, as those who change the image's metadata see it. Without one it
/// records nothing, and has room for everything.
#[derive(Debug, Default)]
pub(in super::super) struct Log(Option<Box<Ring>>);

/// A journal that is open.
#[derive(Debug)]
pub(super) struct Ring {
    memory: SharedMemory,
    /// Has the lock by which the journal is ours.
    _file: File,
    path: PathBuf,
    /// Words, less one; a power of two of them.
    mask: u64,
    /// Words in use with which there is still room for the largest step, and the reserve.
    admitted: u64,
    head: u64,
    tail: u64,
    seed: u64,
    /// A record was longer than what was left. Nothing was stored: it counts as lost memory.
    overrun: bool,
}

impl Ring {
    /// The ring in `memory`, of which the file's header has been checked.
    pub(super) fn new(
        memory: SharedMemory,
        file: File,
        path: PathBuf,
        words: u64,
        seed: u64,
    ) -> Self {
        Self {
            mask: words - 1,
            admitted: words.saturating_sub(STEP + words / RESERVE_PART),
            head: memory.load(HEAD_AT, Ordering::Acquire),
            tail: memory.load(TAIL_AT, Ordering::Acquire),
            memory,
            _file: file,
            path,
            seed,
            overrun: false,
        }
    }

    pub(super) fn head(&self) -> u64 {
        self.head
    }

    pub(super) fn tail(&self) -> u64 {
        self.tail
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    pub(super) fn path(&self) -> &std::path::Path {
        &self.path
    }

    pub(super) fn is_lost(&self) -> bool {
        self.overrun || self.memory.is_lost()
    }

    /// All words from the head on.
    pub(super) fn words(&self) -> Vec<u64> {
        (self.head..self.tail)
            .map(|position| self.memory.load(self.place(position), Ordering::Relaxed))
            .collect()
    }

    fn place(&self, position: u64) -> usize {
        RING + (position & self.mask) as usize * 8
    }

    fn put(&self, position: u64, word: u64) {
        self.memory
            .store(self.place(position), word, Ordering::Relaxed);
    }

    fn used(&self) -> u64 {
        self.tail - self.head
    }

    fn room(&self) -> u64 {
        self.mask + 1 - self.used()
    }

    /// Begins a record of `len` words: its first word, and the state of its checksum.
    fn begin(&mut self, kind: Kind, count: u64, len: u64) -> Option<(u64, u64)> {
        if len > self.room() {
            // Who changes something has looked, and lost memory ends changes.
            debug_assert!(self.is_lost(), "{len} words in {}", self.room());
            self.overrun = true;
            return None;
        }
        let first = record::first_word(kind, count);
        Some((first, record::mix(record::mix(self.seed, self.tail), first)))
    }

    /// The record is whole: it counts from here on, and all that went before it.
    fn commit(&mut self, first: u64, state: u64, len: u64) {
        self.put(self.tail, first | record::finish(state));
        self.tail += len;
        self.memory.store(TAIL_AT, self.tail, Ordering::Release);
    }

    fn fixed(&mut self, kind: Kind, count: u64, one: u64, two: u64) {
        let Some((first, state)) = self.begin(kind, count, FIXED) else {
            return;
        };
        self.put(self.tail + 1, one);
        self.put(self.tail + 2, two);
        self.commit(first, record::mix(record::mix(state, one), two), FIXED);
    }

    fn mapping(&mut self, cluster: u64, entries: &[(Words, Words)], extended: bool) {
        let count = entries.len() as u64;
        let len = HEAD + if extended { 2 * count } else { count };
        let Some((first, state)) = self.begin(Kind::Mapping, count, len) else {
            return;
        };
        let mut at = self.tail + 1;
        let mut state = record::mix(state, cluster);
        self.put(at, cluster);
        for (_, new) in entries {
            at += 1;
            self.put(at, new.descriptor);
            state = record::mix(state, new.descriptor);
            if extended {
                at += 1;
                self.put(at, new.bitmap);
                state = record::mix(state, new.bitmap);
            }
        }
        self.commit(first, state, len);
    }
}

impl Log {
    /// A log that records.
    pub(super) fn of(ring: Ring) -> Self {
        Self(Some(Box::new(ring)))
    }

    /// Whether there is a journal.
    pub(in super::super) fn records(&self) -> bool {
        self.0.is_some()
    }

    /// Whether a step of any kind may be made, under the lock that is held.
    pub(in super::super) fn admission(&self) -> Admission {
        match &self.0 {
            None => Admission::Granted,
            Some(ring) if ring.is_lost() => Admission::Lost,
            Some(ring) if ring.used() > ring.admitted => Admission::Full,
            Some(_) => Admission::Granted,
        }
    }

    /// Whether a flush may take one more reference off. Where the memory is lost it may: nothing
    /// that the next process finds says otherwise.
    pub(in super::super) fn admits_release(&self) -> bool {
        let room = |ring: &Ring| ring.is_lost() || ring.room() >= FIXED;
        self.0.as_deref().is_none_or(room)
    }

    /// Whether it is time for a flush.
    pub(in super::super) fn is_half_full(&self) -> bool {
        let full = |ring: &Ring| ring.used() > ring.mask / 2;
        self.0.as_deref().is_some_and(full)
    }

    pub(in super::super) fn is_lost(&self) -> bool {
        self.0.as_deref().is_some_and(Ring::is_lost)
    }

    /// The position behind the last record; `None`: there is no journal.
    pub(in super::super) fn tail(&self) -> Option<u64> {
        self.0.as_deref().map(Ring::tail)
    }

    /// Whether nothing was recorded since the head was moved.
    pub(in super::super) fn is_empty(&self) -> bool {
        self.0.as_deref().is_none_or(|ring| ring.used() == 0)
    }

    /// Everything that was recorded before `position` is stable.
    pub(in super::super) fn advance(&mut self, position: u64) {
        if let Some(ring) = &mut self.0 {
            debug_assert!((ring.head..=ring.tail).contains(&position));
            ring.head = position;
            ring.memory.store(HEAD_AT, position, Ordering::Release);
        }
    }

    /// Ends the journal: the image's header names it no longer.
    pub(in super::super) fn end(&mut self) {
        if let Some(ring) = self.0.take() {
            super::ids::remove(&ring.path);
        }
    }

    /// Records the entries of guest clusters from `cluster` on: old and new ones.
    #[inline]
    pub(in super::super) fn mapping(
        &mut self,
        cluster: u64,
        entries: &[(Words, Words)],
        extended: bool,
    ) -> Recorded {
        if let Some(ring) = &mut self.0
            && !(is_planted(Fault::JournalDropped) && cluster.is_multiple_of(2))
        {
            ring.mapping(cluster, entries, extended);
        }
        Recorded(())
    }

    /// Records the refcount of `count` clusters from `cluster` on.
    #[inline]
    pub(in super::super) fn refcounts(&mut self, mut cluster: u64, mut count: u64, value: u64) {
        let Some(ring) = &mut self.0 else { return };
        while count > 0 {
            let now = count.min(MOST);
            ring.fixed(Kind::Refcounts, now, cluster, value);
            cluster += now;
            count -= now;
        }
    }

    /// Records an L1 entry. The table that it points at has the contents that the disk has.
    pub(in super::super) fn l1(&mut self, index: u64, value: u64) {
        if let Some(ring) = &mut self.0 {
            ring.fixed(Kind::L1, 1, index, value);
        }
    }

    /// Records a new refcount block, full of zeros.
    pub(in super::super) fn block(&mut self, index: u64, offset: u64) {
        if let Some(ring) = &mut self.0 {
            ring.fixed(Kind::Block, 1, index, offset);
        }
    }
}
