//! Another set of tables for an image: written beside the present ones, named by one sector of the
//! header, and then in force in memory.
//!
//! ```text
//!   Places::allocate ─▶ Draft (written) ─▶ Draft::name ─▶ Prepared ─┬─▶ take_effect ─▶ Rest::finish
//!                                                                   ├─▶ take_back
//!                                                                   └─▶ dropped: as take_back, by the next flush
//! ```

use std::ops::Range;
use std::sync::Arc;

use super::super::header::{Header, Places as Named};
use super::super::l2::OFFSET;
use super::super::metadata::Kind;
use super::super::refcount::Allocation;
use super::super::{Freed, Qcow2};
use super::Snapshot;
use super::frozen::Frozen;
use super::table::Entries;
use crate::error::{Error, Result};
use crate::storage::{self, Purpose};
use crate::sync::atomic::Ordering;

/// Clusters that were allocated for new tables.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// All of them: first byte and length.
    all: Freed,
    /// Single clusters, each for an L2 table.
    pub tables: Vec<u64>,
    /// Single clusters, each for a refcount block.
    pub blocks: Vec<u64>,
    /// Where L1 tables go.
    pub l1s: Vec<u64>,
    /// Where the refcount table goes.
    pub reftable: u64,
    /// Where the snapshot table goes.
    pub snapshots: u64,
}

/// What there is to be written beside refcounts.
pub(super) struct Wanted {
    /// L2 tables, at most.
    pub tables: usize,
    /// L1 tables.
    pub l1s: usize,
    /// Bytes of the snapshot table.
    pub snapshots: u64,
}

impl Wanted {
    /// For an image whose tables may all have to move, and that has these snapshots then.
    pub fn of(image: &Qcow2, l1s: usize, entries: &Entries) -> Result<Self> {
        let tables = (0..image.l1_len()).filter(|&index| image.l1_entry(index) & OFFSET != 0);
        Ok(Self {
            tables: tables.count(),
            l1s,
            snapshots: entries.to_bytes(image.storage.name())?.len() as u64,
        })
    }
}

impl Places {
    /// Allocates what is wanted, and what all refcount blocks and their table need.
    pub async fn allocate(image: &Qcow2, wanted: &Wanted) -> Result<Self> {
        let mut places = Self::default();
        match places.fill(image, wanted).await {
            Ok(()) => Ok(places),
            Err(error) => {
                places.give_up(image).await;
                Err(error)
            }
        }
    }

    async fn fill(&mut self, image: &Qcow2, wanted: &Wanted) -> Result<()> {
        while self.tables.len() < wanted.tables {
            let more = self.some(image, wanted.tables - self.tables.len()).await?;
            self.tables.extend(more);
        }
        let clusters = |bytes: u64| bytes.div_ceil(image.cluster_size());
        let l1 = clusters(image.l1_len() * 8);
        while self.l1s.len() < wanted.l1s && l1 > 0 {
            let place = self.contiguous(image, l1, Kind::L1).await?;
            self.l1s.push(place);
        }
        let snapshots = clusters(wanted.snapshots);
        if snapshots > 0 {
            self.snapshots = self
                .contiguous(image, snapshots, Kind::SnapshotTable)
                .await?;
        }
        // These count themselves, so that there may be more of them when they are there.
        let mut reftable_len = 0;
        loop {
            let len = u64::from(image.header().reftable_clusters);
            if len != reftable_len {
                // A place for a shorter one is not lost: blocks may go there.
                let old = self.reftable >> image.cluster_bits;
                self.blocks.extend(old..old + reftable_len);
                let place = self.contiguous(image, len, Kind::RefcountTable).await?;
                (self.reftable, reftable_len) = (place, len);
                continue;
            }
            let blocks = {
                let meta = image.meta.lock();
                let table = meta.allocator.table().iter();
                table.filter(|entry| **entry != 0).count()
            };
            if self.blocks.len() >= blocks {
                return Ok(());
            }
            let more = self.some(image, blocks - self.blocks.len()).await?;
            self.blocks.extend(more);
        }
    }

    /// Up to `wanted` single clusters.
    async fn some(&mut self, image: &Qcow2, wanted: usize) -> Result<Range<u64>> {
        let Allocation {
            offset, clusters, ..
        } = image.allocate(wanted as u64).await?;
        self.all.push((offset, clusters << image.cluster_bits));
        let first = offset >> image.cluster_bits;
        Ok(first..first + clusters)
    }

    /// Contiguous clusters for a table.
    async fn contiguous(&mut self, image: &Qcow2, clusters: u64, kind: Kind) -> Result<u64> {
        let place = image.allocate_table(clusters, kind).await?;
        self.all
            .push((place.offset, clusters << image.cluster_bits));
        Ok(place.offset)
    }

    /// Gives everything back: no header has ever named any of it.
    pub async fn give_up(self, image: &Qcow2) {
        for (offset, len) in self.all {
            let first = offset >> image.cluster_bits;
            for cluster in first..first + (len >> image.cluster_bits) {
                image.release(cluster).await;
            }
        }
    }
}

/// New tables, which are written.
pub(super) struct Draft {
    pub frozen: Frozen,
    pub places: Places,
    /// Where the header is to say that the tables are.
    pub named: Named,
    /// The L1 table's entries.
    pub l1: Vec<u64>,
    /// The refcount table.
    pub table: Vec<u64>,
    /// Clusters without a reference from then on.
    pub freed: Vec<Range<u64>>,
    /// The snapshots.
    pub listed: Vec<Snapshot>,
}

impl Draft {
    /// Makes the tables stable, and then has the header name them. The image goes on with the old ones
    /// in memory.
    pub async fn name(self) -> Result<Prepared> {
        let image = self.frozen.image.clone();
        if let Err(error) = image.barrier().await {
            self.places.give_up(&image).await;
            return Err(error);
        }
        let turn = image.flush_turn().await;
        let sound = self.frozen.check().and_then(|()| image.check_sound());
        if let Err(error) = sound {
            drop(turn);
            self.places.give_up(&image).await;
            return Err(error);
        }
        let header = image.header();
        if let Err(error) = image.patch_header(&[header.with_places(self.named)]).await {
            // The disk may have it: they are free when the old header is known to be there.
            image.note_unmapped(&mut image.meta.lock(), self.places.all);
            return Err(error);
        }
        drop(turn);
        let Places {
            all,
            tables,
            blocks,
            ..
        } = self.places;
        Ok(Prepared {
            undo: Undo {
                frozen: self.frozen,
                named: Some((header.places(), all)),
            },
            tables: Tables {
                l1: self.l1,
                refcounts: self.table,
                freed: self.freed,
                listed: self.listed,
            },
            spare: tables.into_iter().chain(blocks).collect(),
        })
    }
}

/// New tables that the header names, and that are not in force yet. Dropped, they never were.
#[must_use = "the header names tables that are not in force"]
#[derive(Debug)]
pub struct Prepared {
    tables: Tables,
    /// What was allocated in vain.
    spare: Vec<u64>,
    undo: Undo,
}

impl Prepared {
    /// The image.
    #[must_use]
    pub fn image(&self) -> &Arc<Qcow2> {
        &self.undo.frozen.image
    }

    /// Puts the new tables in force: the instant of a snapshot. From here on every write to a cluster
    /// that it has goes elsewhere.
    pub fn take_effect(self) -> Rest {
        let Self {
            tables,
            spare,
            mut undo,
        } = self;
        undo.named = None;
        let image = undo.frozen.image.clone();
        let freed = tables.put_in_force(&image);
        drop(undo);
        Rest {
            image,
            freed,
            spare,
        }
    }

    /// Leaves the image as it was before.
    pub async fn take_back(self) {
        let Self { mut undo, .. } = self;
        let image = undo.frozen.image.clone();
        let turn = image.flush_turn().await;
        undo.withdraw();
        if let Err(error) = image.restore_header().await {
            log::error!("a snapshot that is taken back stays in the header for now: {error}");
        }
        drop(turn);
    }
}

/// The way back from a header that names new tables, and metadata that stands still until this is
/// dropped.
#[derive(Debug)]
struct Undo {
    frozen: Frozen,
    /// What the header named before, and what is free when it does so again. `None`: there is no way
    /// back.
    named: Option<(Named, Freed)>,
}

impl Undo {
    fn withdraw(&mut self) {
        if let Some((before, unused)) = self.named.take() {
            self.frozen.image.withdraw_places(before, unused);
        }
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        // Before anybody changes anything.
        self.withdraw();
    }
}

/// What the tables say that the header names.
#[derive(Debug)]
struct Tables {
    l1: Vec<u64>,
    /// The refcount table.
    refcounts: Vec<u64>,
    freed: Vec<Range<u64>>,
    listed: Vec<Snapshot>,
}

impl Tables {
    /// Has the image go on with them. Returns the clusters that have no reference any more.
    fn put_in_force(self, image: &Qcow2) -> Vec<Range<u64>> {
        {
            let mut meta = image.meta.lock();
            let slices = image.table_entries() / image.slice_entries();
            let mut moved = vec![false; self.l1.len()];
            for ((entry, new), moved) in image.l1.iter().zip(&self.l1).zip(&mut moved) {
                let old = entry.swap(*new, Ordering::AcqRel);
                *moved = old & OFFSET != new & OFFSET;
                if *moved && new & OFFSET != 0 {
                    let cluster = (new & OFFSET) >> image.cluster_bits;
                    meta.allocator.add_metadata(cluster, Kind::L2);
                }
            }
            // What their entries say of who may write in place is no longer so.
            meta.loaded.retain(|&number| {
                let stays = !moved.get((number / slices) as usize).is_some_and(|is| *is);
                if !stays {
                    image.directory.set(number, None);
                }
                stays
            });
            meta.allocator.replace(self.refcounts, &self.freed);
            let offsets = meta.allocator.table().to_vec();
            for offset in offsets.into_iter().filter(|offset| *offset != 0) {
                let cluster = offset >> image.cluster_bits;
                meta.allocator.add_metadata(cluster, Kind::RefcountBlock);
            }
        }
        image.late.divide();
        image.decompressed.clear();
        *image.snapshots.lock() = self.listed.into();
        self.freed
    }
}

/// What is left to do when new tables are in force.
#[must_use = "clusters stay lost to the image"]
pub struct Rest {
    image: Arc<Qcow2>,
    freed: Vec<Range<u64>>,
    /// What was allocated in vain.
    spare: Vec<u64>,
}

impl Rest {
    /// Gives the space back of what is in use no longer, and makes everything stable that was
    /// written before.
    ///
    /// # Errors
    /// What the storage reports. What is in force stays in force.
    pub async fn finish(self) -> Result<()> {
        let given = self.give_space().await;
        self.image.flush().await.and(given)
    }

    async fn give_space(&self) -> Result<()> {
        let image = &self.image;
        // What is wrong with an image may be that this is not free.
        image.check_sound()?;
        for &cluster in &self.spare {
            image.release(cluster).await;
        }
        for range in &self.freed {
            image.check_sound()?;
            if image.options.discard {
                let start = range.start << image.cluster_bits;
                let len = (range.end - range.start) << image.cluster_bits;
                let to = Purpose::Space.on(&*image.storage);
                if let Err(error) = storage::io::discard(to, start, len).await {
                    let file = image.storage.name();
                    log::warn!("{file}: discarding what a snapshot had: {error}");
                }
            }
            image.meta.lock().allocator.give(range);
        }
        Ok(())
    }
}

impl Qcow2 {
    /// The header and the snapshots of an image that has nothing to flush: what takes time while guests
    /// go on, so that they need not wait for it.
    ///
    /// # Errors
    /// When it cannot have snapshots or is not open for writing; when it cannot be read or flushed.
    pub(super) async fn settled_snapshots(&self) -> Result<(Header, Entries)> {
        self.check_snapshots()?;
        self.flush().await?;
        let header = self.header();
        let entries = Entries::read(&*self.storage, &header).await?;
        Ok((header, entries))
    }

    fn check_snapshots(&self) -> Result<()> {
        if self.data.is_some() {
            return Err(Error::unsupported(
                self.storage.name(),
                "an image with a data file has no internal snapshots",
            ));
        }
        if !self.options.writable {
            return Err(Error::Invalid("Block node is read-only".into()));
        }
        Ok(())
    }
}
