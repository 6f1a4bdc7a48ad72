//! Another size, and space allocated ahead.
//!
//! An image grows in steps, each of which leaves a sound image of the old size: a longer L1 table
//! ([`Qcow2::reserve_mapping`]); the new part made what it is to be, on the image opened as though
//! it had the new size already; last the header's size ([`Qcow2::set_size`]). It shrinks the other
//! way round: first nothing is mapped above the new end ([`Qcow2::unmap_above`]), then the header.

use super::bitmaps::InForce;
use super::header::{BitmapDirectory, MAX_L1_ENTRIES};
use super::l2::{self, COPIED};
use super::metadata::Kind;
use super::refcount::Allocation;
use super::words::Words;
use super::{Qcow2, header};
use crate::error::{Action, Error, Result};
use crate::storage::{self, AlignedBuf, Purpose};
use crate::sync::atomic::{AtomicU64, Ordering};

/// Bytes of the disk that get their place at a time.
const STEP: u64 = 64 << 20;
/// Zeros are written from a buffer of this size.
const ZERO_CHUNK: u64 = 1 << 20;

/// What is allocated before it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The mapping: clusters have their place, and the file has holes there.
    Metadata,
    /// The mapping, and space in the file system.
    Falloc,
    /// The mapping, and zeros written to it.
    Full,
}

impl Qcow2 {
    /// Makes the L1 table long enough for a disk of `size` bytes. The new table is stable before
    /// the header names it, and the old one is freed after that. Others may use the image meanwhile.
    ///
    /// # Errors
    /// When the format has no room for such a disk, or metadata cannot be read or written.
    pub async fn reserve_mapping(&self, size: u64) -> Result<()> {
        let entries = self.shape.l1_entries(size);
        self.check_mapping(size)?;
        if entries > self.header().l1_size.into() {
            let clusters = (entries * 8).div_ceil(self.cluster_size());
            let place = self.allocate_table(clusters, Kind::L1).await?;
            let moved = self.move_l1(&place, entries as u32).await;
            // Where that has failed the header on the disk may name either, until the next flush
            // has restored the old one. That is also who frees this.
            let unused = match &moved {
                Ok(old) => *old,
                Err(_) => (place.offset, clusters << self.cluster_bits),
            };
            let unused = Some(unused).filter(|(_, len)| *len > 0);
            self.note_unmapped(&mut self.meta.lock(), unused);
            moved?;
        }
        self.l1.grow(entries as usize, || AtomicU64::new(0));
        let clusters = size.div_ceil(self.cluster_size());
        self.directory.grow(clusters.div_ceil(self.slice_entries()));
        Ok(())
    }

    /// Whether the format has room for a disk of `size` bytes.
    ///
    /// # Errors
    /// Says what is too large.
    pub fn check_mapping(&self, size: u64) -> Result<()> {
        if self.shape.l1_entries(size) <= MAX_L1_ENTRIES && size <= 1 << 62 {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{}: {size} bytes is too large for clusters of {} bytes (an L1 table has at most \
             {MAX_L1_ENTRIES} entries)",
            self.storage.name(),
            self.cluster_size()
        )))
    }

    /// Returns where the old table was.
    async fn move_l1(&self, place: &Allocation, entries: u32) -> Result<(u64, u64)> {
        let _turn = self.flush_turn().await;
        let bytes = loop {
            self.write_back().await?;
            if let Some(bytes) = self.stable_l1(place.clusters) {
                break bytes;
            }
        };
        self.write_at(place.offset, &bytes, Purpose::L1Table)
            .await?;
        self.barrier().await?;
        let old = self.header();
        self.patch_header(&[old.with_size(old.size, place.offset, entries)])
            .await?;
        let len = (u64::from(old.l1_size) * 8).next_multiple_of(self.cluster_size());
        Ok((old.l1_offset, len))
    }

    /// The L1 table as the disk has it, in so many clusters. `None`: it has changed since the flush,
    /// and may point at tables that are not stable.
    fn stable_l1(&self, clusters: u64) -> Option<AlignedBuf> {
        let mut bytes = AlignedBuf::zeroed((clusters << self.cluster_bits) as usize);
        let meta = self.meta.lock();
        if !meta.dirty_l1.is_empty() {
            return None;
        }
        for (word, entry) in bytes.chunks_exact_mut(8).zip(self.l1.iter()) {
            word.copy_from_slice(&entry.load(Ordering::Relaxed).to_be_bytes());
        }
        Some(bytes)
    }

    /// Lets clusters be mapped up to `size`, which the L1 table reaches. What disks show stays.
    pub(crate) fn stretch(&self, size: u64) {
        let size = size.next_multiple_of(header::SECTOR as u64);
        self.sizes.mapped.fetch_max(size, Ordering::Relaxed);
    }

    /// Disks that are composed from now on show `size` bytes, to which the mapping reaches.
    pub fn show(&self, size: u64) {
        let size = size.next_multiple_of(header::SECTOR as u64);
        self.sizes.shown.store(size, Ordering::Relaxed);
    }

    /// Lets no cluster above what the disk shows be mapped any more: no request goes there.
    pub(crate) fn settle_size(&self) {
        self.sizes.mapped.store(self.size(), Ordering::Relaxed);
    }

    /// Allocates contiguous clusters for a table.
    pub(super) async fn allocate_table(&self, clusters: u64, kind: Kind) -> Result<Allocation> {
        self.with_allocator(|allocator| {
            let place = allocator.allocate_exact(clusters)?;
            let first = place.offset >> self.cluster_bits;
            for cluster in first..first + clusters {
                allocator.add_metadata(cluster, kind);
            }
            Ok(place)
        })
        .await
    }

    /// Makes the header name another size of the disk, and bitmaps of that size; those that are
    /// `in_force` are made so again, although the image is open for writing. When this returns,
    /// everything that was written before and the new size are stable. The image itself has its old
    /// size until it is opened anew, or told to show another one.
    ///
    /// # Errors
    /// When there is no space for the bitmaps, or metadata or the header cannot be written; the
    /// old header stands then.
    pub async fn set_size(&self, size: u64, in_force: &InForce) -> Result<()> {
        let size = size.next_multiple_of(header::SECTOR as u64);
        self.check_sound()?;
        let bitmaps = self.bitmaps_for(size, in_force).await?;
        let _turn = self.flush_turn().await;
        let result = self.name_size(size, bitmaps.directory).await;
        if result.is_ok() {
            self.sizes.named.store(size, Ordering::Relaxed);
        }
        // The header on the disk may name either until the next flush has restored the old one,
        // and that is also who frees these.
        let unused = match &result {
            Ok(()) => bitmaps.old,
            Err(_) => bitmaps.new,
        };
        self.note_unmapped(&mut self.meta.lock(), unused);
        result
    }

    async fn name_size(&self, size: u64, bitmaps: Option<BitmapDirectory>) -> Result<()> {
        // The barrier in it makes the new bitmaps stable as well.
        self.write_back().await?;
        let patch = self.header().plan_size(size, bitmaps)?;
        self.patch_header(&[patch]).await
    }

    /// Unmaps every whole cluster above byte `size` of the disk, and the L2 tables that are
    /// needed no longer. Stable when this returns.
    ///
    /// # Errors
    /// When metadata cannot be read or written; a part may have been unmapped.
    pub async fn unmap_above(&self, size: u64) -> Result<()> {
        let start = size.next_multiple_of(self.cluster_size());
        let coverage = self.table_entries() << self.cluster_bits;
        let end = self.mapped_end().next_multiple_of(self.cluster_size());
        let tables = end.div_ceil(coverage);
        for index in start / coverage..tables {
            let from = start.max(index * coverage);
            let to = end.min((index + 1) * coverage);
            if from < to && self.l1_entry(index) & l2::OFFSET != 0 {
                let _claim = self.claim(from, to - from).await;
                self.unmap_clusters(from, to - from).await?;
            }
        }
        // What is still to be written of a table goes with it: where the L1 entry is gone, nobody
        // looks at the table's entries.
        for index in start.div_ceil(coverage)..tables {
            self.change(|meta| self.drop_table(meta, index)).await?;
        }
        self.flush().await
    }

    /// Takes an L2 table without entries out of the L1 table.
    fn drop_table(&self, meta: &mut super::Meta, index: u64) {
        let table = self.l1_entry(index) & l2::OFFSET;
        if table == 0 {
            return;
        }
        self.set_l1(meta, index, 0);
        self.note_unmapped(meta, [(table, self.cluster_size())]);
        let slices = self.table_entries() / self.slice_entries();
        for number in index * slices..(index + 1) * slices {
            meta.dirty_slices.remove(&number);
            meta.adopted.remove(&number);
            self.directory.set(number, None);
        }
    }

    /// Cuts the file behind the last cluster in use. Nothing may be allocated afterwards.
    ///
    /// # Errors
    /// When refcounts cannot be read, or the file cannot be cut.
    pub async fn trim_file(&self) -> Result<()> {
        let failed = |error| Error::io(Action::Write, self.storage.name(), 0, &error);
        if self.storage.capacity().await.map_err(failed)?.is_some() {
            return Ok(());
        }
        let len = self.storage.len().await.map_err(failed)?;
        let clusters = 1..len.div_ceil(self.cluster_size()).max(1);
        let end = self.end_of_use(clusters, usize::MAX).await << self.cluster_bits;
        if end < len {
            self.storage.set_len(end).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Gives the clusters of `[from, to)` that have none a place in the file; what they read as
    /// stays what it is, if nothing lies below the image or clusters have subclusters.
    ///
    /// # Errors
    /// When there is no space, or metadata cannot be read or written; a part may have been
    /// allocated.
    pub async fn preallocate(&self, from: u64, to: u64, mode: Preallocation) -> Result<()> {
        if mode == Preallocation::Off {
            return Ok(());
        }
        let end = to.div_ceil(self.cluster_size());
        let mut at = from >> self.cluster_bits;
        while at < end {
            let wanted = (end - at).min((STEP >> self.cluster_bits).max(1));
            at += self.preallocate_some(at, wanted, mode).await?;
        }
        self.cover_end().await?;
        self.flush().await
    }

    /// Up to `wanted` clusters from `first` on; returns how many are done.
    async fn preallocate_some(&self, first: u64, wanted: u64, mode: Preallocation) -> Result<u64> {
        let offset = first << self.cluster_bits;
        let _claim = self.claim(offset, wanted << self.cluster_bits).await;
        self.prepare(first).await?;
        let lacking = self.without_host(first, wanted);
        if lacking == 0 {
            return Ok(1);
        }
        let place = if self.data.is_some() {
            self.identity(first, lacking)
        } else {
            self.allocate(lacking).await?
        };
        let len = place.clusters << self.cluster_bits;
        let filled = match self.fill_place(&place, mode).await {
            // A mapping never points behind the end of the file.
            Ok(()) => self.cover_end().await,
            failed => failed,
        };
        if let Err(error) = filled {
            if self.data.is_none() {
                self.give_up(place).await;
            }
            return Err(error);
        }
        let mut at = offset;
        self.modify(&mut at, offset + len, |cluster, units, old| {
            let host = place.offset + ((cluster - first) << self.cluster_bits);
            if self.shape.extended {
                // A host cluster of which no subcluster holds anything so far.
                return Words {
                    descriptor: host | COPIED,
                    bitmap: old.bitmap & !0xffff_ffff,
                };
            }
            self.shape.data(host, units, old)
        })
        .await?;
        Ok(place.clusters)
    }

    /// How many clusters from `first` on, up to `limit`, have no host cluster; within one slice.
    fn without_host(&self, first: u64, limit: u64) -> u64 {
        let (number, index) = self.place(first);
        let Some(slice) = self.slice(number) else {
            return 0;
        };
        let Some(slice) = slice.as_ref() else {
            return 0;
        };
        let most = limit.min(self.slice_entries() - index as u64);
        (0..most)
            .take_while(|&at| {
                let words = slice.get(index + at as usize);
                self.shape.descriptor(words.descriptor) == l2::Descriptor::None
            })
            .count() as u64
    }

    /// Makes a new place read as zeros, in the way that `mode` asks for.
    async fn fill_place(&self, place: &Allocation, mode: Preallocation) -> Result<()> {
        let storage = self.data_storage();
        let space = Purpose::Space.on(&**storage);
        let len = place.clusters << self.cluster_bits;
        let result = match mode {
            Preallocation::Off => Ok(()),
            Preallocation::Metadata if place.fresh || self.data.is_some() => Ok(()),
            Preallocation::Metadata => storage::io::zero(space, place.offset, len, true).await,
            Preallocation::Falloc => storage::io::zero(space, place.offset, len, false).await,
            Preallocation::Full => write_zeros(&**storage, place.offset, len).await,
        };
        result.map_err(|error| Error::io(Action::Write, storage.name(), place.offset, &error))
    }

    /// Makes the file as long as its clusters say: nothing was written to some of them.
    async fn cover_end(&self) -> Result<()> {
        let failed = |error| Error::io(Action::Write, self.storage.name(), 0, &error);
        let end = self.meta.lock().allocator.frontier() << self.cluster_bits;
        if self.storage.len().await.map_err(failed)? < end {
            self.storage.set_len(end).await.map_err(failed)?;
        }
        Ok(())
    }
}

/// Writes zeros as data.
///
/// # Errors
/// What the storage reports.
pub async fn write_zeros(
    storage: &dyn storage::Storage,
    offset: u64,
    len: u64,
) -> std::io::Result<()> {
    let zeros = AlignedBuf::zeroed(len.min(ZERO_CHUNK) as usize);
    let mut done = 0;
    while done < len {
        let now = (len - done).min(ZERO_CHUNK);
        // SAFETY: `zeros` outlives the write.
        let bufs = unsafe { storage::IoBufs::of(&zeros, 0, now as usize) };
        storage::io::write(Purpose::Space.on(storage), &bufs, offset + done).await?;
        done += now;
    }
    Ok(())
}
