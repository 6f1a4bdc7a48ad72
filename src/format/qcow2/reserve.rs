//! Space behind the end of the file, reserved ahead of the writes.
//!
//! A direct write that makes a file longer holds up all others to it; one into space that is
//! there already does not. So the file grows in steps, ahead of the allocator. What was reserved
//! and not used is given back when the image is closed; after a kill the next to open the image
//! finds the true end by the refcounts.

use std::ops::Range;

use super::Qcow2;
use super::refcount::{Allocation, Look};
use crate::error::Result;
use crate::storage;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The first step in bytes; each is an eighth of the file, between these two.
const LEAST: u64 = 1 << 20;
/// The largest step in bytes.
const MOST: u64 = 64 << 20;
/// The largest step in clusters.
const MOST_CLUSTERS: u64 = 4096;
/// So many slices of the refcounts are looked at to find the end again: those of a block of 2 MiB.
const MOST_SLICES: usize = 512;

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
        let Ok(len) = self.storage.len().await else {
            return;
        };
        // An image made by others may have clusters in use behind the end of its file.
        let clusters = len.div_ceil(self.cluster_size());
        if self.end_of_use(first..clusters, usize::MAX).await > first {
            return;
        }
        if len > end
            && let Err(error) = self.storage.set_len(end).await
        {
            log::warn!(
                "{}: giving back reserved space: {error}",
                self.storage.name()
            );
        }
        self.reservation.end.store(end, Ordering::Relaxed);
    }

    /// Finds the end of what is in use, which may lie before the end of the file, and far before
    /// the end of a block device.
    pub(super) async fn find_end(&self) -> Result<()> {
        let end = self.meta.lock().allocator.frontier();
        let used = self.end_of_use(1..end, MOST_SLICES).await;
        if used < end {
            self.meta.lock().allocator.lower_frontier(used);
            // Left by somebody who was killed; a device has its length for good.
            let capacity = self.storage.capacity().await;
            let can_shrink = capacity.is_ok_and(|fixed| fixed.is_none());
            self.reservation.used.store(can_shrink, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Where what is in use ends among `clusters`: at their start, if nothing is. No more than
    /// `slices` slices of the refcounts are looked at, from the end of the last block down; where
    /// they do not tell, the end is above the true one.
    pub(super) async fn end_of_use(&self, clusters: Range<u64>, mut slices: usize) -> u64 {
        let metadata = self.meta.lock().allocator.metadata().end();
        // Metadata stay where they are, whatever their refcount.
        let first = clusters.start.max(metadata.min(clusters.end));
        let mut end = clusters.end;
        while end > first && slices > 0 {
            let look = self.with_refcounts(|allocator| allocator.look_down(end));
            match look.await {
                Ok(Ok(Look::Used(used))) => return used.max(first),
                Ok(Ok(Look::Uncovered(free))) => end = free,
                Ok(Ok(Look::Free(free))) => {
                    end = free;
                    slices -= 1;
                }
                // It cannot be told.
                Ok(Err(_)) | Err(_) => break,
            }
        }
        end.max(first)
    }
}
