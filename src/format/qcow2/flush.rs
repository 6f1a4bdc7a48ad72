//! What reaches the disk, and in which order.
//!
//! ```text
//!   header ──► refcount table ──► refcount blocks       (how many refer to each cluster)
//!     └──────► L1 table ──► L2 tables ──► data clusters
//! ```
//!
//! Invariant: on stable storage, nothing points at what is not there. A flush takes a snapshot
//! of all changed metadata at one instant (an entry in it points at data already written, and
//! its reference is in the snapshot too) and writes it in phases with a barrier between:
//!
//! 1. refcount blocks; the barrier makes the data stable as well;
//! 2. the refcount table, if there are new blocks;
//! 3. L2 tables;
//! 4. the L1 table, if there are new L2 tables.
//!
//! References are taken off only when the mapping without them is stable: see `freed`.

use std::collections::BTreeSet;

use futures_util::future::join_all;

use super::header::{Backing, Patch, Places, SECTOR};
use super::refcount::Need;
use super::{Freed, Meta, Qcow2};
use crate::error::{Action, Error, Result};
use crate::planted::{Fault, is_planted};
use crate::storage::{self, AlignedBuf, Purpose, Syncs};
use crate::sync::{
    AsyncMutex, AsyncMutexGuard,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

/// Writes of one phase that are in flight together.
const PARALLEL: usize = 32;
/// Adjacent pieces are written together up to this size.
const MERGE: usize = 1 << 20;

/// Who flushes, and who waits for it. On cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Flushing {
    lock: AsyncMutex<()>,
    /// Flushes that have begun.
    begun: AtomicU64,
    /// The latest one that succeeded.
    succeeded: AtomicU64,
    /// A change of the header has failed: the disk may have it all the same.
    header_unsure: AtomicBool,
    /// Bytes of host clusters that wait to be freed; added to under the lock of the metadata.
    pub(super) waiting: AtomicU64,
    /// Bytes of host clusters that have waited and been freed.
    pub(super) freed: AtomicU64,
    /// Somebody flushes because the journal is half full.
    relieving: AtomicBool,
}

/// The flush of a journal that is half full, until this is dropped.
#[derive(Debug)]
pub(super) struct Relieving<'a>(&'a AtomicBool);

impl Flushing {
    /// Undertakes to flush for a journal that is half full. `None`: somebody else does.
    pub(super) fn try_relieve(&self) -> Option<Relieving<'_>> {
        let busy = self.relieving.swap(true, Ordering::AcqRel);
        (!busy).then(|| Relieving(&self.relieving))
    }
}

impl Drop for Relieving<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// A piece of metadata on its way to the file.
type Piece = (u64, Vec<u8>);

/// All changed metadata at one instant.
#[derive(Debug, Default)]
struct Snapshot {
    refcounts: Vec<Piece>,
    reftable: Vec<Piece>,
    reftable_entries: BTreeSet<usize>,
    l2: Vec<Piece>,
    l2_slices: BTreeSet<u64>,
    l1: Vec<Piece>,
    l1_entries: BTreeSet<usize>,
    unmapped: Freed,
    /// The journal's end at that instant.
    tail: Option<u64>,
}

impl Qcow2 {
    /// Makes everything stable whose write had completed when this was called.
    ///
    /// Those that come while a flush is under way share the next one.
    ///
    /// # Errors
    /// What the storage reports. Changed metadata stays in memory and is written again later.
    pub async fn flush(&self) -> Result<()> {
        let arrived = self.flushing.begun.load(Ordering::SeqCst);
        let _turn = self.flush_turn().await;
        if self.flushing.succeeded.load(Ordering::SeqCst) > arrived {
            return Ok(());
        }
        let number = self.flushing.begun.fetch_add(1, Ordering::SeqCst) + 1;
        self.write_back().await?;
        self.flushing.succeeded.store(number, Ordering::SeqCst);
        Ok(())
    }

    /// Waits for the flush that is under way, and keeps others from beginning.
    pub(super) async fn flush_turn(&self) -> AsyncMutexGuard<'_, ()> {
        self.flushing.lock.lock().await
    }

    /// Flushes, and releases what waits to be released: before the image is closed.
    ///
    /// # Errors
    /// What the storage reports.
    pub async fn close(&self) -> Result<()> {
        if !self.options.writable {
            return Ok(());
        }
        let flushed = self.flush().await;
        // If nobody has come to it yet, or it has failed.
        self.mark_corrupt().await?;
        flushed?;
        self.await_grace().await;
        while self.retired.has_released() && !self.soundness.is_corrupt() {
            self.flush().await?;
            self.await_grace().await;
        }
        if !self.soundness.is_corrupt() {
            self.give_back().await;
        }
        self.end_journal().await
    }

    /// Takes the journal out of the header, since everything is stable, and removes it. What
    /// somebody changes afterwards is not recorded, and lost if nobody flushes it.
    pub(super) async fn end_journal(&self) -> Result<()> {
        if !self.meta.lock().allocator.log().records() {
            return Ok(());
        }
        let _turn = self.flush_turn().await;
        while !self.meta.lock().allocator.log().is_empty() {
            self.write_back().await?;
        }
        let patches = self.header().plan_journal(None)?;
        self.patch_header(&patches).await?;
        self.meta.lock().allocator.log_mut().end();
        Ok(())
    }

    /// The body of a flush. The caller holds the flush lock.
    pub(super) async fn write_back(&self) -> Result<()> {
        // Where no barrier can succeed any more, nothing is written that waits for one.
        Syncs::of(&self.storage)
            .check()
            .map_err(|error| self.io_error(Action::Flush, 0, &error))?;
        self.restore_header().await?;
        self.load_adopted().await?;
        if !self.is_still() {
            self.release_freed().await;
        }
        let mut snapshot = self.take_snapshot()?;
        // The tables that these changes are of may have come back since a moment ago.
        let result = match self.restore_header().await {
            Ok(()) => {
                self.note_flushed(&mut snapshot);
                self.write_snapshot(&snapshot).await
            }
            failed => failed,
        };
        self.settle(&mut snapshot, result.is_ok());
        result
    }

    fn take_snapshot(&self) -> Result<Snapshot> {
        let mut meta = self.meta.lock();
        self.put_places_back(&mut meta)?;
        let (reftable_offset, l1_offset) = {
            let header = self.header.lock();
            (header.reftable_offset, header.l1_offset)
        };
        let l1_entries = std::mem::take(&mut meta.dirty_l1);
        let l2_slices = std::mem::take(&mut meta.dirty_slices);
        let reftable_entries = meta.allocator.take_dirty_table();
        let l2 = l2_slices
            .iter()
            .filter_map(|&number| {
                let slice = self.slice(number)?;
                Some((self.slice_offset(number)?, slice.as_ref()?.to_bytes()))
            })
            .collect();
        meta.writing.extend(&l2_slices);
        Ok(Snapshot {
            refcounts: meta
                .allocator
                .take_dirty_slices()
                .into_iter()
                .map(|(_, offset, bytes)| (offset, bytes.into_vec()))
                .collect(),
            reftable: self.table_sectors(reftable_offset, &reftable_entries, |index| {
                meta.allocator.table().get(index).copied()
            }),
            l1: self.table_sectors(l1_offset, &l1_entries, |index| {
                self.l1
                    .get(index)
                    .map(|entry| entry.load(Ordering::Relaxed))
            }),
            unmapped: std::mem::take(&mut meta.unmapped),
            tail: meta
                .allocator
                .log()
                .tail()
                .filter(|_| !meta.allocator.log().is_empty()),
            reftable_entries,
            l2,
            l2_slices,
            l1_entries,
        })
    }

    /// Has the header say, with the refcounts, how far the journal is written when this flush has
    /// succeeded: the head moves there after that. An image that says less than the head is an older
    /// one that was put back.
    fn note_flushed(&self, snapshot: &mut Snapshot) {
        let Some(tail) = snapshot.tail else { return };
        if let Some(patch) = self.header.lock().with_flushed(tail) {
            snapshot.refcounts.push((patch.offset, patch.bytes));
        }
    }

    /// The sectors of a table in which `changed` entries are.
    fn table_sectors(
        &self,
        table: u64,
        changed: &BTreeSet<usize>,
        entry: impl Fn(usize) -> Option<u64>,
    ) -> Vec<Piece> {
        let unit = (self.storage.limits().offset_align as usize).max(SECTOR);
        let sectors: BTreeSet<usize> = changed.iter().map(|index| index * 8 / unit).collect();
        sectors
            .into_iter()
            .map(|sector| {
                let first = sector * unit / 8;
                let words = (first..first + unit / 8).map(|index| entry(index).unwrap_or(0));
                let bytes = words.flat_map(u64::to_be_bytes).collect();
                (table + (sector * unit) as u64, bytes)
            })
            .collect()
    }

    async fn write_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        if let Some(data) = &self.data {
            storage::io::sync_shared(&data.storage)
                .await
                .map_err(|error| Error::io(Action::Flush, data.storage.name(), 0, &error))?;
        }
        self.write_pieces(&snapshot.refcounts, Purpose::RefcountBlock)
            .await?;
        self.barrier().await?;
        if !snapshot.reftable.is_empty() {
            self.write_pieces(&snapshot.reftable, Purpose::RefcountTable)
                .await?;
            self.barrier().await?;
        }
        if !snapshot.l2.is_empty() {
            self.write_pieces(&snapshot.l2, Purpose::L2Table).await?;
            self.barrier().await?;
        }
        if !snapshot.l1.is_empty() {
            self.write_pieces(&snapshot.l1, Purpose::L1Table).await?;
            self.barrier().await?;
        }
        Ok(())
    }

    /// Puts what a flush took where it belongs now.
    fn settle(&self, snapshot: &mut Snapshot, success: bool) {
        let unmapped = std::mem::take(&mut snapshot.unmapped);
        {
            let mut meta = self.meta.lock();
            meta.allocator.written(&snapshot.reftable_entries, success);
            for number in &snapshot.l2_slices {
                meta.writing.remove(number);
            }
            if !success {
                meta.dirty_slices.append(&mut snapshot.l2_slices);
                meta.dirty_l1.append(&mut snapshot.l1_entries);
                meta.unmapped.extend(unmapped);
                return;
            }
            if let Some(tail) = snapshot.tail {
                meta.allocator.log_mut().advance(tail);
            }
        }
        self.retire(unmapped);
    }

    pub(super) async fn barrier(&self) -> Result<()> {
        storage::io::sync_shared(&self.storage)
            .await
            .map_err(|error| self.io_error(Action::Flush, 0, &error))
    }

    async fn write_pieces(&self, pieces: &[Piece], purpose: Purpose) -> Result<()> {
        let merged = merge(pieces);
        for batch in merged.chunks(PARALLEL) {
            // All of them, also when one has failed: the next flush writes to the same places, and
            // must not be overtaken.
            let written = join_all(
                batch
                    .iter()
                    .map(|(offset, bytes)| self.write_at(*offset, bytes, purpose)),
            );
            written.await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    pub(super) async fn write_at(&self, offset: u64, bytes: &[u8], purpose: Purpose) -> Result<()> {
        let to = purpose.on(&*self.storage);
        storage::io::write_buf(to, offset, &AlignedBuf::copy_of(bytes))
            .await
            .map_err(|error| {
                let file = self.storage.name();
                Error::io_of(Action::Write, purpose.words(), file, offset, &error)
            })
    }

    /// Makes the header name another backing file, or none. When this returns, everything that
    /// was written before and the new header are stable.
    ///
    /// # Errors
    /// When the header has no room or cannot be written; the old one stands then.
    pub async fn set_backing(&self, backing: Option<&Backing>) -> Result<()> {
        if !self.options.writable {
            return Err(Error::Invalid("Block node is read-only".into()));
        }
        self.check_sound()?;
        let _turn = self.flush_turn().await;
        if !is_planted(Fault::HeaderEarly) {
            self.write_back().await?;
        }
        let patches = self.header().plan_backing(backing)?;
        self.patch_header(&patches).await
    }

    /// Writes header patches, a barrier after each.
    ///
    /// When that fails, the disk may have the old header or the new one. The old one is in force,
    /// and is written again by the next flush, before anything that the new one names is used for
    /// something else.
    pub(super) async fn patch_header(&self, patches: &[Patch]) -> Result<()> {
        let patched = self.header().patched(patches)?;
        self.flushing.header_unsure.store(true, Ordering::SeqCst);
        self.write_patches(patches).await?;
        self.flushing.header_unsure.store(false, Ordering::SeqCst);
        *self.header.lock() = patched;
        Ok(())
    }

    async fn write_patches(&self, patches: &[Patch]) -> Result<()> {
        for patch in patches {
            self.write_at(patch.offset, &patch.bytes, Purpose::Header)
                .await?;
            self.barrier().await?;
        }
        Ok(())
    }

    /// Has the header name `before` again: what it names now never was in force, and is `unused`. The
    /// next flush writes that, before anything else. To be called while the metadata stands still.
    pub(super) fn withdraw_places(&self, before: Places, unused: Freed) {
        let mut meta = self.meta.lock();
        meta.withdrawn = Some(before);
        self.note_unmapped(&mut meta, unused);
    }

    /// Puts the header in force that names what it named before, where that has been withdrawn. The
    /// disk does not have it yet. The caller holds the flush lock.
    fn put_places_back(&self, meta: &mut Meta) -> Result<()> {
        if let Some(before) = meta.withdrawn {
            let header = self.header();
            let header = header.patched(&[header.with_places(before)])?;
            self.flushing.header_unsure.store(true, Ordering::SeqCst);
            *self.header.lock() = header;
            meta.withdrawn = None;
        }
        Ok(())
    }

    /// Whether the disk may have another header than the one in force, or that one names what never was
    /// in force.
    pub(super) fn is_header_unsure(&self, meta: &Meta) -> bool {
        meta.withdrawn.is_some() || self.flushing.header_unsure.load(Ordering::SeqCst)
    }

    /// Makes the disk have the header that is in force. The caller holds the flush lock.
    pub(super) async fn restore_header(&self) -> Result<()> {
        self.put_places_back(&mut self.meta.lock())?;
        if self.flushing.header_unsure.load(Ordering::SeqCst) {
            self.write_patches(&[self.header().first()]).await?;
            self.flushing.header_unsure.store(false, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Replaces the refcount table by a longer one, unless it has more than `len` entries by now.
    ///
    /// When this fails half-way, the header on the disk may name either table. Both are right
    /// until the next flush restores the old one: they name the same blocks, and no further one
    /// comes before a replacement succeeds.
    ///
    /// `Err` within: it cannot become longer.
    pub(super) async fn grow_reftable(&self, len: usize) -> Result<std::result::Result<(), Need>> {
        let _turn = self.flush_turn().await;
        let growth = {
            let mut meta = self.meta.lock();
            if meta.allocator.table().len() > len {
                return Ok(Ok(()));
            }
            meta.allocator.plan_growth()
        };
        let growth = match growth {
            Ok(growth) => growth,
            Err(_) if self.has_more_room().await => return Ok(Ok(())),
            Err(need) => return Ok(Err(need)),
        };
        let mut thaw = Thaw(Some(self));
        let bytes = self.meta.lock().allocator.growth_blocks(&growth);
        let (start, blocks, clusters) = (growth.start, growth.blocks, growth.clusters);
        let table = growth
            .table
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect::<Vec<_>>();
        let result = self
            .install_reftable(start, blocks, clusters, &bytes, &table)
            .await;
        thaw.0 = None;
        let mut meta = self.meta.lock();
        match result {
            Ok(old) => {
                meta.allocator.adopt(growth);
                self.note_unmapped(&mut meta, [old]);
                Ok(Ok(()))
            }
            Err(error) => {
                meta.allocator.abandon_growth();
                Err(error)
            }
        }
    }

    /// Returns where the old table was.
    async fn install_reftable(
        &self,
        start: u64,
        blocks: u64,
        clusters: u64,
        block_bytes: &[u8],
        table: &[u8],
    ) -> Result<(u64, u64)> {
        // Every block that the new table names must be stable before the table.
        self.write_back().await?;
        let offset = (start + blocks) << self.cluster_bits;
        self.write_at(
            start << self.cluster_bits,
            block_bytes,
            Purpose::RefcountBlock,
        )
        .await?;
        self.write_at(offset, table, Purpose::RefcountTable).await?;
        self.barrier().await?;
        let header = self.header();
        let old = (
            header.reftable_offset,
            u64::from(header.reftable_clusters) << self.cluster_bits,
        );
        self.patch_header(&[header.with_reftable(offset, clusters as u32)])
            .await?;
        Ok(old)
    }
}

/// Gives up a growth of the refcount table whose task has been dropped: others would wait for its
/// end for ever.
struct Thaw<'a>(Option<&'a Qcow2>);

impl Drop for Thaw<'_> {
    fn drop(&mut self) {
        if let Some(image) = self.0 {
            image.meta.lock().allocator.abandon_growth();
        }
    }
}

/// Joins pieces that follow one another.
fn merge(pieces: &[Piece]) -> Vec<Piece> {
    let mut sorted: Vec<&Piece> = pieces.iter().collect();
    sorted.sort_unstable_by_key(|(offset, _)| *offset);
    let mut merged: Vec<Piece> = Vec::new();
    for (offset, bytes) in sorted {
        match merged.last_mut() {
            Some((at, all)) if *at + all.len() as u64 == *offset && all.len() < MERGE => {
                all.extend_from_slice(bytes);
            }
            _ => merged.push((*offset, bytes.clone())),
        }
    }
    merged
}
