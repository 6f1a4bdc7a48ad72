//! A tap: what a guest writes goes to a second disk as well, as it is written.
//!
//! It is an attribute of a chain. With one, every write, write-zeroes and discard is a task: the
//! guest's bytes are copied once, into a buffer of ours (a guest may change its own in flight), and
//! both disks get that copy.
//!
//! ## What keeps both the same
//!
//! Two writes of the same bytes that are in flight together may reach one disk in this order and the
//! other one in that. So each holds exactly its own bytes until both disks have them, and a job that
//! copies holds what it copies in the same way. Holds are had in the order in which they were asked
//! for: neither a guest nor a job is passed over for ever. Nobody who has a hold waits for another
//! one, so nobody waits in a circle.
//!
//! The guest hears of its own disk alone. What the second one fails to take is noted as *dirty*, and
//! the job copies it again; what the guest's disk fails to take is noted as well, since the second
//! one may have it.
//!
//! ## How it ends
//!
//! ```text
//!   Mirroring ── begin_turn ──► Turning ── end_turn(true) ──► Turned
//!       ▲                          │
//!       └───── end_turn(false) ────┘
//! ```
//!
//! In *Mirroring* the guest's disk counts. A job that is to leave the guest on the second disk begins
//! the turn, which is refused while anything is dirty; makes the second disk stable; records that it
//! counts; looks once more whether anything has become dirty, and publishes the chain in which it is
//! the guest's. While it does so, a request that the second disk has failed waits: it was carried out
//! if the turn is called off, and it has failed if the turn comes about. In *Turned* the second disk
//! counts.
//!
//! Requests that began before that chain was published go to both until they end, also afterwards.
//! Nobody has to order them and later requests for the same bytes: they are in flight together, as
//! the guest sees it, so any order between them is right; and who was told that a write has completed
//! finds it on the second disk, where it was written before that was told. Nothing is copied by then,
//! so nothing old is written over what is new. The guest's disk before matters to nobody: those who
//! still read it do so for requests that began before.

use std::collections::BTreeMap;
use std::ops::{Deref, Range};
use std::sync::Arc;

use futures_util::future::join;

use super::read::Found;
use super::{Layer, Root, Source, View};
use crate::error::Result;
use crate::format::Format;
use crate::storage::{IoBufs, ScratchBuf};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Event, EventListener, Mutex};

#[cfg(debug_assertions)]
use crate::planted::{Fault, is_planted};
pub use hold::Hold;
use hold::Holds;

mod hold;
#[cfg(test)]
mod tests;

/// Bytes of a write that are copied, and held, at a time.
const WRITE_AT_ONCE: u64 = 1 << 20;
/// Bytes that are zeroed or discarded, and held, at a time.
const CLEAR_AT_ONCE: u64 = 64 << 20;

/// Which of both disks counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest's.
    Mirroring,
    /// It is being decided.
    Turning,
    /// The second one.
    Turned,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// Turns that have been decided.
    turns: u64,
    /// What may differ: start → end.
    dirty: BTreeMap<u64, u64>,
    /// Why the second disk could not be made stable.
    unstable: Option<Failure>,
}

/// Why the second disk could not be made stable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The system's error number.
    pub errno: i32,
    /// What failed, and where.
    pub text: String,
}

/// The second disk of a chain.
#[derive(Debug)]
pub struct Tap {
    target: Arc<Root>,
    holds: Arc<Holds>,
    state: Mutex<State>,
    /// Something is dirty or has failed, the turn was decided, or the last chain is gone.
    changed: Event,
    /// Chains that have it.
    chains: AtomicUsize,
}

impl Tap {
    /// A tap whose second disk is the one at `target`.
    #[must_use]
    pub fn new(target: Arc<Root>) -> Arc<Self> {
        Arc::new(Self {
            target,
            holds: Arc::default(),
            state: Mutex::new(State {
                phase: Phase::Mirroring,
                turns: 0,
                dirty: BTreeMap::new(),
                unstable: None,
            }),
            changed: Event::new(),
            chains: AtomicUsize::new(0),
        })
    }

    /// Waits until no chain has it, and so no request: nothing more will come to the second disk.
    pub async fn unused(&self) {
        loop {
            let listener = self.changed.listen();
            if self.chains.load(Ordering::SeqCst) == 0 {
                return;
            }
            listener.await;
        }
    }

    /// The second disk.
    #[must_use]
    pub fn target(&self) -> &Arc<Root> {
        &self.target
    }

    /// Holds exactly the bytes of `range`, when those who have asked before have let go of them.
    pub async fn hold(&self, range: Range<u64>) -> Hold {
        self.holds.hold(range).await
    }

    /// What hears of new dirty ranges, of failures and of turns: look after it was made.
    #[must_use]
    pub fn changes(&self) -> EventListener {
        self.changed.listen()
    }

    /// Takes a dirty range, of at most `most` bytes, to be copied; the first from the start.
    #[must_use]
    pub fn take_dirty(&self, most: u64) -> Option<Range<u64>> {
        let mut state = self.state.lock();
        let (start, end) = state.dirty.pop_first()?;
        let cut = end.min(start.saturating_add(most.max(1)));
        if cut < end {
            state.dirty.insert(cut, end);
        }
        Some(start..cut)
    }

    /// How many bytes are dirty.
    #[must_use]
    pub fn dirty(&self) -> u64 {
        let state = self.state.lock();
        state.dirty.iter().map(|(start, end)| end - start).sum()
    }

    /// Notes that both disks may differ in `range`.
    pub fn mark(&self, range: Range<u64>) {
        self.note(|state| state.mark(range));
    }

    /// Why the second disk could not be made stable for the guest, if that has happened.
    #[must_use]
    pub fn failure(&self) -> Option<Failure> {
        self.state.lock().unstable.clone()
    }

    /// From now on requests that the second disk fails wait for [`Tap::end_turn`]. False: something is
    /// dirty or has failed.
    #[must_use]
    pub fn begin_turn(&self) -> bool {
        let mut state = self.state.lock();
        let clean = state.is_clean();
        if clean {
            state.phase = Phase::Turning;
        }
        clean
    }

    /// Whether nothing is dirty and nothing has failed.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.state.lock().is_clean()
    }

    /// From now on the second disk counts, if it has `turned`; otherwise the guest's own does as before.
    pub fn end_turn(&self, turned: bool) {
        {
            let mut state = self.state.lock();
            state.turns += 1;
            state.phase = match turned {
                true => Phase::Turned,
                false => Phase::Mirroring,
            };
        }
        self.changed.notify(usize::MAX);
    }

    /// Makes both disks stable.
    pub(super) async fn flush(&self, top: &Layer) -> Result<()> {
        let target = self.target.chain();
        let (own, second) = join(top.flush(), Box::pin(target.flush())).await;
        let Err(error) = second else {
            return match self.state.lock().phase {
                Phase::Turned => Ok(()),
                Phase::Mirroring | Phase::Turning => own,
            };
        };
        let failure = Failure {
            errno: error.errno(),
            text: error.to_string(),
        };
        log::warn!("the copy of what the guest writes: {failure:?}");
        let noted = self.note(|state| {
            state.unstable.get_or_insert(failure);
        });
        match self.counts(noted).await {
            true => Err(error),
            false => own,
        }
    }

    /// Notes a failure of the second disk.
    fn note(&self, change: impl FnOnce(&mut State)) -> Noted {
        let noted = {
            let mut state = self.state.lock();
            change(&mut state);
            Noted {
                phase: state.phase,
                turns: state.turns,
            }
        };
        self.changed.notify(usize::MAX);
        noted
    }

    /// Whether the second disk counts for a failure that was noted. Noted before a turn began, it has been
    /// seen to before that one could begin.
    async fn counts(&self, noted: Noted) -> bool {
        if noted.phase != Phase::Turning {
            return noted.phase == Phase::Turned;
        }
        loop {
            let listener = self.changed.listen();
            let (turns, phase) = {
                let state = self.state.lock();
                (state.turns, state.phase)
            };
            if turns > noted.turns {
                // Those that were decided since had this one's range copied.
                return turns == noted.turns + 1 && phase == Phase::Turned;
            }
            listener.await;
        }
    }

    /// What the guest hears of a change of `range` that both disks were asked to make. Its hold was
    /// kept until both had answered.
    #[doc(hidden)]
    pub async fn settle(&self, hold: Hold, own: Result<()>, second: Result<()>) -> Result<()> {
        if own.is_ok() && second.is_ok() {
            return Ok(());
        }
        if let Err(error) = &second {
            log::warn!("the copy of what the guest writes: {error}");
        }
        // Before anybody else can have the range.
        let noted = self.note(|state| state.mark(hold.range().clone()));
        drop(hold);
        match (own, second) {
            // The guest's disk has it.
            (Ok(()), second) => match self.counts(noted).await {
                true => second,
                false => Ok(()),
            },
            (Err(_), Ok(())) if noted.phase == Phase::Turned => Ok(()),
            (own, _) => own,
        }
    }
}

/// A chain's share of a tap.
#[derive(Debug)]
pub(super) struct InUse(Arc<Tap>);

impl InUse {
    pub(super) fn new(tap: Arc<Tap>) -> Self {
        tap.chains.fetch_add(1, Ordering::SeqCst);
        Self(tap)
    }
}

impl Deref for InUse {
    type Target = Tap;

    fn deref(&self) -> &Tap {
        &self.0
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.chains.fetch_sub(1, Ordering::SeqCst);
        self.0.changed.notify(usize::MAX);
    }
}

/// How it stood when a failure was noted.
#[derive(Clone, Copy, Debug)]
struct Noted {
    phase: Phase,
    turns: u64,
}

impl State {
    fn is_clean(&self) -> bool {
        self.dirty.is_empty() && self.unstable.is_none()
    }

    fn mark(&mut self, mut range: Range<u64>) {
        // What it touches becomes a part of it.
        while let Some((&start, &end)) = self.dirty.range(..=range.end).next_back()
            && end >= range.start
        {
            self.dirty.remove(&start);
            range = range.start.min(start)..range.end.max(end);
        }
        if range.start < range.end {
            self.dirty.insert(range.start, range.end);
        }
    }
}

impl View {
    /// As [`View::write`], to both disks.
    pub(super) async fn write_tapped(&self, tap: &Tap, offset: u64, bufs: IoBufs) -> Result<()> {
        self.writable_top()?;
        for (start, len) in pieces(bufs.len() as u64, WRITE_AT_ONCE) {
            let at = offset + start;
            let hold = tap.hold(at..at + len).await;
            let mut copy = ScratchBuf::new(len as usize);
            bufs.slice(start as usize, len as usize).copy_to(&mut copy);
            // SAFETY: nobody changes the buffer any more.
            let copy = unsafe { IoBufs::of(&copy, 0, copy.len()) };
            let second = View::of(tap.target.chain());
            let own = self.write_top(at, copy.clone());
            #[cfg(debug_assertions)]
            let (at, copy) = match is_planted(Fault::TapRounded) {
                true => whole_blocks(at, copy),
                false => (at, copy),
            };
            let (own, second) = join(own, second.write(at, copy)).await;
            tap.settle(hold, own, second).await?;
        }
        Ok(())
    }

    /// As [`View::write_zeroes`], of both disks.
    pub(super) async fn zero_tapped(
        &self,
        tap: &Tap,
        offset: u64,
        len: u64,
        unmap: bool,
    ) -> Result<()> {
        self.writable_top()?;
        for (start, len) in pieces(len, CLEAR_AT_ONCE) {
            let at = offset + start;
            let hold = tap.hold(at..at + len).await;
            let second = View::of(tap.target.chain());
            let own = self.zero_top(at, len, unmap);
            let (own, second) = join(own, second.write_zeroes(at, len, unmap)).await;
            tap.settle(hold, own, second).await?;
        }
        Ok(())
    }

    /// As [`View::discard`], of both disks. What a discard leaves is the guest's disk's to decide: the
    /// second one then has zeros where that one has.
    pub(super) async fn discard_tapped(&self, tap: &Tap, offset: u64, len: u64) -> Result<()> {
        let top = self.writable_top()?;
        if !top.discard {
            return Ok(());
        }
        if matches!(top.format, Format::Raw(_)) {
            // A device need not say what it has after a discard.
            return self.zero_tapped(tap, offset, len, true).await;
        }
        for (start, len) in pieces(len, CLEAR_AT_ONCE) {
            let at = offset + start;
            let hold = tap.hold(at..at + len).await;
            let own = self.discard_top(at, len).await;
            let second = self.zero_alike(tap, at, len).await;
            tap.settle(hold, own, second).await?;
        }
        Ok(())
    }

    /// Makes zeros on the second disk where this one says that it has them.
    async fn zero_alike(&self, tap: &Tap, offset: u64, len: u64) -> Result<()> {
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let (found, now) = self.chain.locate(0, at, len - done).await?;
            if matches!(found, Found::Plain(Source::Zero)) {
                let second = View::of(tap.target.chain());
                second.write_zeroes(at, now, true).await?;
            }
            done += now;
        }
        Ok(())
    }
}

/// A planted fault: what is left of a write without the ends that fill no block. All of it, if it has
/// no whole one.
#[cfg(debug_assertions)]
fn whole_blocks(at: u64, bufs: IoBufs) -> (u64, IoBufs) {
    const BLOCK: u64 = 4096;
    let (start, end) = (
        at.next_multiple_of(BLOCK),
        (at + bufs.len() as u64) / BLOCK * BLOCK,
    );
    match start < end {
        true => (
            start,
            bufs.slice((start - at) as usize, (end - start) as usize),
        ),
        false => (at, bufs),
    }
}

/// A range of `len` bytes in pieces of at most `most`: start and length.
fn pieces(len: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len.div_ceil(most)).map(move |index| {
        let start = index * most;
        (start, most.min(len - start))
    })
}
