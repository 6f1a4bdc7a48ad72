//! Space behind the end of the file, reserved ahead of the writes.
//!
//! A direct write that makes a file longer holds up all others to it; one into space that is
//! there already does not. So the file grows in steps, ahead of the allocator. What was reserved
//! and not used is given back when the image is closed; after a kill the next to open the image
//! finds the true end by the refcounts.

use super::Qcow2;
use super::refcount::Allocation;
use crate::error::Result;
use crate::storage;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The first step in bytes; each is an eighth of the file, between these two.
const LEAST: u64 = 1 << 20;
/// The largest step in bytes.
const MOST: u64 = 64 << 20;
/// The largest step in clusters: so many refcounts are looked at to find the end again.
const MOST_CLUSTERS: u64 = 4096;

/// How far the file reaches. On cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
pub struct Reservation {
    end: AtomicU64,
    busy: AtomicBool,
    /// It makes writes cheaper here.
    useful: AtomicBool,
    /// There is something to give back.
    used: AtomicBool,
}

impl Reservation {
    /// Nothing is reserved in a file of `len` bytes.
    pub(super) fn new(len: u64) -> Self {
        Self {
            end: AtomicU64::new(len),
            busy: AtomicBool::new(false),
            useful: AtomicBool::new(true),
            used: AtomicBool::new(false),
        }
    }
}

impl Qcow2 {
    fn step(&self, end: u64) -> u64 {
        let most = MOST.min(MOST_CLUSTERS << self.cluster_bits);
        (end / 8).clamp(LEAST.min(most), most)
    }

    /// Reserves the next step when `allocation` comes near the end of what is reserved. One task
    /// does it; the others go on meanwhile.
    pub(super) async fn reserve_ahead(&self, allocation: &Allocation) {
        let reservation = &self.reservation;
        let end = reservation.end.load(Ordering::Relaxed);
        let used = allocation.offset + (allocation.clusters << self.cluster_bits);
        let step = self.step(end);
        if used + step / 2 < end
            || !reservation.useful.load(Ordering::Relaxed)
            || reservation.busy.swap(true, Ordering::Acquire)
        {
            return;
        }
        let start = end.max(used);
        if storage::io::reserve(&*self.storage, start, step).await {
            reservation.end.store(start + step, Ordering::Relaxed);
            reservation.used.store(true, Ordering::Relaxed);
        } else {
            reservation.useful.store(false, Ordering::Relaxed);
        }
        reservation.busy.store(false, Ordering::Release);
    }

    /// Gives back what was reserved and not used.
    pub(super) async fn give_back(&self) {
        if !self.reservation.used.swap(false, Ordering::Relaxed) {
            return;
        }
        let first = self.meta.lock().allocator.frontier();
        let end = first << self.cluster_bits;
        let Ok(len) = self.storage.len() else { return };
        // An image made by others may have clusters in use behind the end of its file.
        for cluster in first..len.div_ceil(self.cluster_size()) {
            if self.refcount(cluster).await != Some(0) {
                return;
            }
        }
        if len > end
            && let Err(error) = self.storage.set_len(end)
        {
            log::warn!(
                "{}: giving back reserved space: {error}",
                self.storage.name()
            );
        }
        self.reservation.end.store(end, Ordering::Relaxed);
    }

    /// Finds the end of what is in use, which may lie before the end of the file.
    pub(super) async fn find_end(&self) -> Result<()> {
        let end = self.meta.lock().allocator.frontier();
        let mut used = end;
        while used > 1 && end - used < MOST_CLUSTERS {
            let known = self.meta.lock().allocator.metadata().what(used - 1);
            match self.refcount(used - 1).await {
                // Metadata stay where they are, whatever their refcount.
                Some(0) if known.is_none() => used -= 1,
                _ => break,
            }
        }
        if used < end {
            self.meta.lock().allocator.lower_frontier(used);
            // Left by somebody who was killed.
            self.reservation.used.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}
