//! Host clusters on their way from the mapping that lost them to those who get them next.
//!
//! ```text
//!   unmapped ─ flush ─► retiring ─ grace period ─► released ─ next flush ─► free
//! ```
//!
//! A flush makes the mapping without them stable; the grace period is that of the requests, of all
//! chains with this image, that may have seen the old mapping; the next flush gives their space
//! back to the file system and takes the references off. What could not be read or written goes
//! the same way again.
//!
//! Who finds no room while some of it is on this way may wait for it ([`Qcow2::await_room`]), if no
//! view of his own is what the grace period waits for.
//!
//! All of them together are bounded ([`Qcow2::may_free`]): beyond that, discards leave their
//! clusters where they are. Space that is compressed or shared with a snapshot cannot be kept for
//! the guest cluster that lets go of it; but each guest cluster does so once, and what it gets then
//! is its own, so that a file never gets longer than what it held before, the disk and the bound.
//!
//! # Zeros that keep their host cluster
//!
//! A cluster that is cleared and kept reads as zeros by its entry, and the next write goes to the
//! same host cluster (`kept_host`), without a grace period. Meanwhile a write that began before the
//! clearing may still be on its way there, in place: it holds no claim. That is safe, because:
//!
//! * The host cluster does not change its owner. A late write lands in the guest bytes that it was
//!   meant for, or is hidden by the zero entry. When the cluster is given up after all, it goes the
//!   way above, and the grace period waits for that write like for any other request.
//! * A write that is late has not completed. So the guest has asked for it, the clearing and the new
//!   write at the same time, and each sector may be what any of them leaves. A write that completed
//!   before the clearing began has landed before.
//! * Nobody relies on the host cluster being zeros. A new write of a part of a unit writes the rest
//!   of it, too (`Target::fresh` is false), before the entry says that there is data; what had not
//!   been flushed when the host goes down is zeros, the old bytes or the new ones.
//! * Readers with the old mapping are as late as such a write, and may see any of the three.
//!
//! The first and the third point are what a change here must keep: no host cluster may go from one
//! guest cluster to another without its grace period, and the same place must not be linked before
//! all of a unit is written.

use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::future::{self, Either};

use super::words::Words;
use super::{Freed, Meta, Qcow2};
use crate::error::Result;
use crate::reactor::Reactor;
use crate::storage::{self, Purpose};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Event, Mutex};

/// How long the end of grace periods is waited for when an image is closed.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);

/// Flushes that take a cluster all the way: one makes the mapping without it stable, the next
/// takes its reference off.
pub(super) const FLUSHES_TO_FREE: u32 = 2;
/// Flushes for one wait for room: where they free nothing, some metadata cannot be read.
const MOST_FLUSHES: u32 = 2 * FLUSHES_TO_FREE;

/// Bytes that may wait to be freed in any case.
const LEAST_WAITING: u64 = 16 << 20;
/// A larger disk may have this part of it wait.
const WAITING_PART: u64 = 8;
/// So much of what waits, at most, waits for a flush that nobody asks for.
const MOST_UNFLUSHED: u64 = 64 << 20;

/// Clusters that no stable mapping refers to.
#[derive(Debug, Default)]
pub(super) struct Retired {
    /// Bytes of those whose grace period has not ended.
    retiring: AtomicU64,
    /// Those whose grace period is over.
    released: Mutex<Freed>,
    /// A grace period has ended.
    ended: Event,
}

impl Retired {
    /// Whether the next flush can free some.
    pub(super) fn has_released(&self) -> bool {
        !self.released.lock().is_empty()
    }

    /// Bytes of those that requests may still use.
    fn retiring(&self) -> u64 {
        self.retiring.load(Ordering::SeqCst)
    }

    fn release(&self, freed: Freed, bytes: u64) {
        self.released.lock().extend(freed);
        self.retiring.fetch_sub(bytes, Ordering::SeqCst);
        self.ended.notify(usize::MAX);
    }

    /// Waits until `enough` holds, which the end of a grace period alone can bring about. False: it
    /// did not by `deadline`.
    async fn wait(&self, deadline: Instant, enough: impl Fn(&Self) -> bool) -> bool {
        let Some(reactor) = Reactor::current() else {
            return enough(self);
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let mut late = pin!(reactor.sleep(left));
        loop {
            let ended = pin!(self.ended.listen());
            if enough(self) {
                return true;
            }
            if let Either::Right(_) = future::select(ended, late.as_mut()).await {
                return enough(self);
            }
        }
    }
}

impl Qcow2 {
    /// Bytes of host clusters that may wait to be freed.
    fn most_waiting(&self) -> u64 {
        LEAST_WAITING.max(self.size() / WAITING_PART)
    }

    /// Notes clusters that no mapping refers to any longer.
    pub(super) fn note_unmapped(
        &self,
        meta: &mut Meta,
        freed: impl IntoIterator<Item = (u64, u64)>,
    ) {
        for (offset, len) in freed {
            self.flushing.waiting.fetch_add(len, Ordering::Relaxed);
            meta.unmapped.push((offset, len));
        }
    }

    /// Whether a guest may replace an entry by another one that does without its host cluster.
    /// False: too much waits to be freed already, and the host cluster can be kept. The caller
    /// holds the lock of the metadata.
    pub(super) fn may_free(&self, old: Words, new: Words) -> bool {
        let own = |words| self.shape.host(words).filter(|host| host.owned);
        if self.data.is_some() || own(old).is_none() || own(old) == own(new) {
            return true;
        }
        let waiting = self.flushing.waiting.load(Ordering::Relaxed);
        waiting + self.cluster_size() <= self.most_waiting()
    }

    /// Whether a flush would take so much further that it is worth while.
    pub(super) fn is_release_due(&self) -> bool {
        let waiting = self.flushing.waiting.load(Ordering::Relaxed);
        waiting.saturating_sub(self.retired.retiring())
            > MOST_UNFLUSHED.min(self.most_waiting() / 2)
    }

    /// Lets clusters wait for those who may have seen them: the mapping without them is stable.
    pub(super) fn retire(&self, freed: Freed) {
        if freed.is_empty() {
            return;
        }
        let retired = self.retired.clone();
        let bytes = freed.iter().map(|(_, len)| len).sum();
        retired.retiring.fetch_add(bytes, Ordering::SeqCst);
        self.users.retire(move || retired.release(freed, bytes));
    }

    /// Waits until nobody can see freed clusters any more, so that they are not lost to the image.
    /// A request that takes very long costs no more than the clusters.
    pub(super) async fn await_grace(&self) {
        let deadline = Instant::now() + CLOSE_PATIENCE;
        let all = |retired: &Retired| retired.retiring() == 0;
        if !self.retired.wait(deadline, all).await {
            log::warn!(
                "{}: closed while others are still busy: some free clusters stay counted",
                self.storage.name()
            );
        }
    }

    /// Bytes of host clusters that have been freed after they waited for it: more than before when
    /// there is, or was, room that there had not been.
    pub(crate) fn freed(&self) -> u64 {
        self.flushing.freed.load(Ordering::SeqCst)
    }

    /// Whether a flush takes clusters further, without the end of a request.
    pub(super) fn flush_takes_further(&self) -> bool {
        let meta = self.meta.lock();
        !meta.unmapped.is_empty() || !meta.unreleased.is_empty() || self.retired.has_released()
    }

    /// Takes clusters that wait to be freed all the way, until some have been freed since
    /// [`Qcow2::freed`] said `before`. False: none wait, or those who may still see them are not
    /// done by `deadline`.
    ///
    /// The caller has no view of a chain with this image, and no claim: the grace period would wait
    /// for the one, and those who have a view for the other.
    ///
    /// # Errors
    /// When the flush fails that would free them.
    pub(crate) async fn await_room(&self, before: u64, deadline: Instant) -> Result<bool> {
        for _ in 0..MOST_FLUSHES {
            // In this order: what waits no longer has been counted as freed before.
            let waiting = self.flushing.waiting.load(Ordering::SeqCst);
            if self.freed() != before {
                return Ok(true);
            }
            if waiting == 0 {
                return Ok(false);
            }
            let further = |retired: &Retired| retired.has_released() || retired.retiring() == 0;
            if !self.retired.wait(deadline, further).await {
                return Ok(false);
            }
            self.flush().await?;
        }
        Ok(self.freed() != before)
    }

    /// Takes the references off clusters that nobody can see any more. The caller holds the flush
    /// lock.
    pub(super) async fn release_freed(&self) {
        if self.soundness.is_corrupt() {
            // Others may have them, whatever the refcounts say.
            return;
        }
        let mut freed = std::mem::take(&mut self.meta.lock().unreleased);
        freed.append(&mut self.retired.released.lock());
        for (offset, len) in freed {
            let first = offset >> self.cluster_bits;
            let end = first + (len >> self.cluster_bits);
            for cluster in first..end {
                if !self.meta.lock().allocator.log().admits_release() {
                    // The next flush does: this one makes room for that.
                    let rest = (end - cluster) << self.cluster_bits;
                    let rest = (cluster << self.cluster_bits, rest);
                    self.retired.released.lock().push(rest);
                    break;
                }
                if self.options.discard {
                    self.discard_last(cluster).await;
                }
                if self.release(cluster).await {
                    let freed = &self.flushing.freed;
                    freed.fetch_add(self.cluster_size(), Ordering::SeqCst);
                }
                let waiting = &self.flushing.waiting;
                waiting.fetch_sub(self.cluster_size(), Ordering::SeqCst);
            }
        }
    }

    /// Has the next flush take a reference off again.
    pub(super) fn release_later(&self, cluster: u64) {
        let freed = (cluster << self.cluster_bits, self.cluster_size());
        let mut meta = self.meta.lock();
        self.flushing.waiting.fetch_add(freed.1, Ordering::Relaxed);
        meta.unreleased.push(freed);
    }

    /// Gives the space of a host cluster back to the file system, if the reference that is about
    /// to be taken off is its last: compressed clusters share theirs. It is done before, since
    /// afterwards the cluster may be somebody's; and nobody may come to share it meanwhile.
    async fn discard_last(&self, cluster: u64) {
        let withdrawn = self.with_refcounts(|allocator| allocator.withdraw(cluster));
        if !matches!(withdrawn.await, Ok(Ok(true))) {
            return;
        }
        let offset = cluster << self.cluster_bits;
        if let Err(error) = {
            let to = Purpose::Space.on(&*self.storage);
            storage::io::discard(to, offset, self.cluster_size()).await
        } {
            log::warn!(
                "{}: discarding a freed cluster: {error}",
                self.storage.name()
            );
        }
    }
}
