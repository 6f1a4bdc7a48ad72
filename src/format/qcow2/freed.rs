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
//! All of them together are bounded ([`Qcow2::may_free`]): beyond that, discards leave their
//! clusters where they are. Space that is compressed or shared with a snapshot cannot be kept for
//! the guest cluster that lets go of it; but each guest cluster does so once, and what it gets then
//! is its own, so that a file never gets longer than what it held before, the disk and the bound.

use std::time::Duration;

use super::l2::Words;
use super::{Freed, Meta, Qcow2};
use crate::reactor::Reactor;
use crate::storage;
use crate::sync::atomic::Ordering;

/// How often the end of grace periods is waited for when an image is closed, and for how long.
const GRACE_LOOKS: u32 = 500;
const GRACE_LOOK: Duration = Duration::from_millis(2);

/// Bytes that may wait to be freed in any case.
const LEAST_WAITING: u64 = 16 << 20;
/// A larger disk may have this part of it wait.
const WAITING_PART: u64 = 8;
/// So much of what waits, at most, waits for a flush that nobody asks for.
const MOST_UNFLUSHED: u64 = 64 << 20;

impl Qcow2 {
    /// Bytes of host clusters that may wait to be freed.
    fn most_waiting(&self) -> u64 {
        LEAST_WAITING.max(self.size / WAITING_PART)
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
        let retiring = self.retiring.load(Ordering::SeqCst);
        waiting.saturating_sub(retiring) > MOST_UNFLUSHED.min(self.most_waiting() / 2)
    }

    /// Lets clusters wait for those who may have seen them: the mapping without them is stable.
    pub(super) fn retire(&self, freed: Freed) {
        if freed.is_empty() {
            return;
        }
        let (released, retiring) = (self.released.clone(), self.retiring.clone());
        let bytes = freed.iter().map(|(_, len)| len).sum();
        retiring.fetch_add(bytes, Ordering::SeqCst);
        self.users.retire(move || {
            released.lock().extend(freed);
            retiring.fetch_sub(bytes, Ordering::SeqCst);
        });
    }

    /// Waits until nobody can see freed clusters any more, so that they are not lost to the image.
    /// A request that takes very long costs no more than the clusters.
    pub(super) async fn await_grace(&self) {
        let Some(reactor) = Reactor::current() else {
            return;
        };
        for _ in 0..GRACE_LOOKS {
            if self.retiring.load(Ordering::SeqCst) == 0 {
                return;
            }
            reactor.sleep(GRACE_LOOK).await;
        }
        log::warn!(
            "{}: closed while others are still busy: some free clusters stay counted",
            self.storage.name()
        );
    }

    /// Takes the references off clusters that nobody can see any more. The caller holds the flush
    /// lock.
    pub(super) async fn release_freed(&self) {
        let mut freed = std::mem::take(&mut self.meta.lock().unreleased);
        freed.append(&mut self.released.lock());
        for (offset, len) in freed {
            let first = offset >> self.cluster_bits;
            for cluster in first..first + (len >> self.cluster_bits) {
                if self.options.discard {
                    self.discard_last(cluster).await;
                }
                let waiting = &self.flushing.waiting;
                waiting.fetch_sub(self.cluster_size(), Ordering::Relaxed);
                self.release(cluster).await;
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
        if let Err(error) = storage::io::discard(&*self.storage, offset, self.cluster_size()).await
        {
            log::warn!(
                "{}: discarding a freed cluster: {error}",
                self.storage.name()
            );
        }
    }
}
