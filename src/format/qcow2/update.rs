//! Changing the mapping: allocating, linking, zeroing, unmapping.
//!
//! Callers hold a claim on the clusters whose mapping they change. The order of a write is:
//! allocate (refcounts in memory), write the data, link (entry in memory). What a flush takes in
//! between has references without a mapping, which is a leak at worst.

use super::claims::Claim;
use super::freed::FLUSHES_TO_FREE;
use super::journal::Admission;
use super::l2::{Descriptor, Slice, State};
use super::refcount::{Allocation, Allocator, Need};
use super::soundness::Fault;
use super::words::Words;
use super::{Meta, Qcow2};
use crate::error::{Action, Error, Result};
use crate::storage::{self, Purpose};

use std::cell::Cell;
use std::ops::Range;

use arrayvec::ArrayVec;

/// Entries that have a record together: old and new ones.
type Entries = ArrayVec<(Words, Words), 32>;

/// What becomes of clusters that hold nothing but zeros, or nothing of worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clear {
    /// They read as zeros; their host clusters are freed.
    Zero,
    /// They read as zeros; host clusters are kept for later writes.
    ZeroKeep,
    /// They are unallocated; host clusters are freed.
    Unmap,
}

/// Where the data of a write to units that are not allocated goes, before it is linked.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// First byte of the disk that it holds; all of them are to be written.
    pub start: u64,
    /// First byte of the disk behind it.
    pub end: u64,
    /// Where the first byte goes, in the storage of guest data.
    pub host: u64,
    /// It reads as zeros so far.
    pub fresh: bool,
    /// What was allocated for it; `None`: a host cluster that was there already.
    allocation: Option<Allocation>,
}

impl Qcow2 {
    /// Claims the clusters of `[offset, offset + len)`, waiting for other claims on any of them.
    pub async fn claim(&self, offset: u64, len: u64) -> Claim<'_> {
        let start = offset >> self.cluster_bits;
        let end = (offset + len).div_ceil(self.cluster_size());
        self.claims.claim(start..end.max(start + 1)).await
    }

    /// Whether claims are not to be had for a while, since a snapshot is taken or deleted.
    pub(crate) fn claims_are_closed(&self) -> bool {
        self.claims.are_closed()
    }

    /// Finds a place for `[offset, offset + len)`, or for a part of it from `offset` on, which
    /// cannot be written in place. The caller holds the claim.
    ///
    /// Without subclusters the place has whole clusters; with them it has whole subclusters,
    /// unless the cluster was compressed or somebody else's: then its rest moves as well.
    ///
    /// # Errors
    /// When metadata cannot be read or written.
    pub async fn target(&self, offset: u64, len: u64) -> Result<Target> {
        self.check_sound()?;
        let first = offset >> self.cluster_bits;
        let last = (offset + len).div_ceil(self.cluster_size());
        self.prepare(first).await?;
        if let Some(target) = self.kept_host(offset, len) {
            return Ok(target);
        }
        let (clusters, whole) = self.replaced(first, last);
        let allocation = if self.data.is_some() {
            self.identity(first, clusters)
        } else {
            self.allocate(clusters).await?
        };
        let (start, end) = if whole {
            (
                first << self.cluster_bits,
                (first + allocation.clusters) << self.cluster_bits,
            )
        } else {
            let unit = self.unit_size();
            let end = (offset + len).next_multiple_of(unit);
            (
                offset / unit * unit,
                end.min((first + allocation.clusters) << self.cluster_bits),
            )
        };
        Ok(Target {
            start,
            end,
            host: allocation.offset + (start - (first << self.cluster_bits)),
            fresh: allocation.fresh,
            allocation: Some(allocation),
        })
    }

    /// The place in the host cluster that the cluster of `offset` has already. Writes that began
    /// before it was cleared may still land there: `freed` says why that is no harm.
    fn kept_host(&self, offset: u64, len: u64) -> Option<Target> {
        let (number, index) = self.place(offset >> self.cluster_bits);
        let slice = self.slice(number)?;
        let host = self.shape.host(slice.as_ref()?.get(index))?;
        if !host.owned {
            return None;
        }
        let unit = self.unit_size();
        let start = offset / unit * unit;
        let cluster = offset & !(self.cluster_size() - 1);
        Some(Target {
            start,
            end: (offset + len)
                .next_multiple_of(unit)
                .min(cluster + self.cluster_size()),
            host: host.offset + (start - cluster),
            fresh: false,
            allocation: None,
        })
    }

    /// How many of the clusters from `first` on need a host cluster for the same reason, and
    /// whether they are replaced as a whole.
    fn replaced(&self, first: u64, last: u64) -> (u64, bool) {
        if !self.shape.extended {
            return (last - first, true);
        }
        let (number, index) = self.place(first);
        let Some(slice) = self.slice(number) else {
            return (1, true);
        };
        let Some(slice) = slice.as_ref() else {
            return (1, true);
        };
        let bare = |at: u64| {
            let words = slice.get(index + at as usize);
            self.shape.descriptor(words.descriptor) == Descriptor::None
        };
        if !bare(0) {
            return (1, true);
        }
        let limit = (last - first).min(self.slice_entries() - index as u64);
        let count = (1..limit).take_while(|&at| bare(at)).count() as u64 + 1;
        (count, false)
    }

    /// In a data file every cluster lies at its guest offset.
    pub(super) fn identity(&self, first: u64, clusters: u64) -> Allocation {
        Allocation {
            offset: first << self.cluster_bits,
            clusters,
            // A write that was lost in a cut may have left something there.
            fresh: false,
        }
    }

    /// Allocates up to `wanted` contiguous host clusters.
    ///
    /// # Errors
    /// When metadata cannot be read or written.
    pub(super) async fn allocate(&self, wanted: u64) -> Result<Allocation> {
        let allocation = self
            .with_allocator(|allocator| allocator.allocate(wanted))
            .await?;
        if allocation.fresh {
            self.reserve_ahead(&allocation).await;
        }
        Ok(allocation)
    }

    /// Takes a step of the allocator, providing what that lacks until it is done. Clusters in their
    /// grace period are not waited for: the caller's own view may be what holds them. Who can let
    /// go of it takes [`with_room`](crate::chain::with_room).
    ///
    /// # Errors
    /// When metadata cannot be read or written, or is wrong; when there is no room.
    pub(super) async fn with_allocator<T>(
        &self,
        mut step: impl FnMut(&mut Allocator) -> std::result::Result<T, Need>,
    ) -> Result<T> {
        let mut flushes = 0;
        loop {
            let table_len = self.meta.lock().allocator.table().len();
            let need = match self.change(|meta| step(&mut meta.allocator)).await? {
                Ok(value) => return Ok(value),
                Err(Need::Slice(number)) => {
                    Box::pin(self.load_refcounts(number)).await?;
                    continue;
                }
                // If it was made longer in the meantime, that will do.
                Err(Need::Table) => match Box::pin(self.grow_reftable(table_len)).await? {
                    Ok(()) => continue,
                    Err(need) => need,
                },
                Err(need) => need,
            };
            match need {
                Need::Turn => drop(self.flush_turn().await),
                Need::Full if self.has_more_room().await => {}
                Need::Full | Need::Limit(_)
                    if flushes < FLUSHES_TO_FREE && self.flush_takes_further() =>
                {
                    Box::pin(self.flush()).await?;
                    flushes += 1;
                }
                need => return Err(Box::pin(self.lacking(need)).await),
            }
        }
    }

    /// Whether the storage has become longer than the allocator thinks: a device that an
    /// administrator has extended.
    pub(super) async fn has_more_room(&self) -> bool {
        let capacity = self.storage.capacity().await.ok().flatten().unwrap_or(0);
        let clusters = capacity >> self.cluster_bits;
        self.meta.lock().allocator.raise_limit(clusters)
    }

    /// Changes metadata, when the journal has room for the record of it: waits for a flush if not.
    /// The caller does not hold the flush lock.
    ///
    /// Flushes, loads and whatever else is rare are boxed here and in the functions around: a
    /// write's future need not be as large as theirs, and goes without them.
    ///
    /// # Errors
    /// When that flush fails, or the journal's memory is lost; nothing has been changed then.
    pub(super) async fn change<T>(&self, change: impl FnOnce(&mut Meta) -> T) -> Result<T> {
        loop {
            {
                let mut meta = self.meta.lock();
                self.check_sound()?;
                match meta.allocator.log().admission() {
                    // The disk may have a header by which the record would mean something else.
                    Admission::Granted
                        if meta.allocator.log().records() && self.is_header_unsure(&meta) => {}
                    Admission::Granted => return Ok(change(&mut meta)),
                    Admission::Lost => return Err(self.lost_journal()),
                    Admission::Full => {}
                }
            }
            Box::pin(self.flush()).await?;
        }
    }

    fn lost_journal(&self) -> Error {
        Error::Invalid(format!(
            "{}: the journal's memory has been taken away (its file was cut short): nothing is              allocated or freed any more, since a kill would lose it; flush, and open the image anew",
            self.storage.name()
        ))
    }

    /// Takes a step of the allocator, loading the refcounts that it needs; says what else it lacks.
    /// It allocates nothing.
    pub(super) async fn with_refcounts<T>(
        &self,
        mut step: impl FnMut(&mut Allocator) -> std::result::Result<T, Need>,
    ) -> Result<std::result::Result<T, Need>> {
        loop {
            let result = step(&mut self.meta.lock().allocator);
            match result {
                Err(Need::Slice(number)) => Box::pin(self.load_refcounts(number)).await?,
                other => return Ok(other),
            }
        }
    }

    pub(super) async fn lacking(&self, need: Need) -> Error {
        let what = match need {
            Need::Full => {
                let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
                let end = self.storage.len().await.unwrap_or(0);
                return self.io_error(Action::Write, end, &full);
            }
            Need::Limit(what) => return Error::full(self.storage.name(), what),
            Need::Corrupt(what) => what,
            need => format!("refcounts are lacking: {need:?}"),
        };
        Error::corrupt(self.storage.name(), what)
    }

    /// Gives back a place that is not to be linked.
    pub async fn abandon(&self, target: Target) {
        if let Some(allocation) = self.counted(target) {
            self.give_up(allocation).await;
        }
    }

    /// What was allocated for a place; nothing is in a data file, whose clusters are not counted.
    fn counted(&self, target: Target) -> Option<Allocation> {
        target.allocation.filter(|_| self.data.is_none())
    }

    pub(super) async fn give_up(&self, allocation: Allocation) {
        let first = allocation.offset >> self.cluster_bits;
        for cluster in first..first + allocation.clusters {
            self.release(cluster).await;
        }
    }

    /// Takes one reference off a host cluster. When that fails, or the journal has no room for it,
    /// the next flush tries again: this is a part of flushes, and cannot wait for one. Says whether
    /// it was taken off.
    pub(super) async fn release(&self, cluster: u64) -> bool {
        let released = self
            .with_refcounts(|allocator| {
                if !allocator.log().admits_release() {
                    return Ok(false);
                }
                allocator.release(cluster).map(|()| true)
            })
            .await;
        match released {
            Ok(Ok(true)) => return true,
            Ok(Ok(false)) => self.release_later(cluster),
            Ok(Err(need)) => {
                let error = self.lacking(need).await;
                if let Error::Corrupt { what, .. } = &error {
                    self.soundness.found(
                        self.storage.name(),
                        Fault {
                            what: what.clone(),
                            place: Some((cluster << self.cluster_bits, self.cluster_size())),
                            fatal: false,
                        },
                    );
                }
                log::error!("freeing a cluster: {error}");
            }
            Err(error) => {
                log::warn!("freeing a cluster, to be tried again: {error}");
                self.release_later(cluster);
            }
        }
        false
    }

    /// Maps what `target` holds to it, now that its data has been written.
    ///
    /// # Errors
    /// When metadata cannot be read or written: nothing is linked then, or a prefix. What is not
    /// has been given back.
    pub async fn link(&self, target: Target) -> Result<()> {
        let first = target.start & !(self.cluster_size() - 1);
        let host = target.host - (target.start - first);
        let mut at = target.start;
        let result = self
            .modify(&mut at, target.end, |cluster, units, old| {
                let offset = host + ((cluster << self.cluster_bits) - first);
                self.shape.data(offset, units, old)
            })
            .await;
        if result.is_err()
            && let Some(allocation) = self.counted(target)
        {
            let linked = (at - first)
                .div_ceil(self.cluster_size())
                .min(allocation.clusters);
            let rest = Allocation {
                offset: allocation.offset + (linked << self.cluster_bits),
                clusters: allocation.clusters - linked,
                ..allocation
            };
            Box::pin(self.give_up(rest)).await;
        }
        result
    }

    /// Clears `[offset, offset + len)`, which is whole units; the disk's end counts as the end
    /// of its last cluster. Compressed clusters are cleared as a whole or not at all.
    ///
    /// Where too much waits to be freed already, host clusters are kept: they read as zeros then,
    /// or, in version 2, as before. Returns how many bytes have been cleared: fewer than `len` in
    /// that last case alone.
    ///
    /// # Errors
    /// When metadata cannot be read or written, or the range cuts a compressed cluster; a prefix
    /// may have been cleared.
    pub async fn clear(&self, offset: u64, len: u64, how: Clear) -> Result<u64> {
        let kept_from = Cell::new(u64::MAX);
        self.clear_by(offset, len, how, |cluster, units, old, new| {
            if kept_from.get() == u64::MAX && self.may_free(old, new) {
                return new;
            }
            if self.has_zero_clusters() {
                return self.shape.zero(units, true, old);
            }
            let at = cluster << self.cluster_bits;
            kept_from.set(kept_from.get().min(at.max(offset)));
            old
        })
        .await?;
        if self.is_release_due() {
            self.flush().await?;
        }
        Ok(kept_from.get().saturating_sub(offset).min(len))
    }

    /// Clears `[offset, offset + len)`. `choose` is given a cluster, its units, its old entry and
    /// the new one, and says which one it gets.
    async fn clear_by(
        &self,
        offset: u64,
        len: u64,
        how: Clear,
        choose: impl Fn(u64, Range<u64>, Words, Words) -> Words,
    ) -> Result<()> {
        let end = if offset + len < self.mapped_end() {
            (offset + len).next_multiple_of(self.unit_size())
        } else {
            (offset + len).next_multiple_of(self.cluster_size())
        };
        self.check_sound()?;
        self.clear_data_file(offset, end, how).await?;
        let raw = self.data.as_ref().is_some_and(|data| data.raw);
        let mut at = offset;
        self.modify(&mut at, end, |cluster, units, old| {
            let new = match how {
                Clear::Unmap if raw => old,
                Clear::Zero | Clear::ZeroKeep if raw => self.shape.zero_absent(units.clone(), old),
                Clear::Unmap => self.shape.unallocated(units.clone(), old),
                Clear::Zero => self.shape.zero(units.clone(), false, old),
                Clear::ZeroKeep => self.shape.zero(units.clone(), true, old),
            };
            choose(cluster, units, old, new)
        })
        .await
    }

    /// Takes whole clusters out of the mapping, also of an image with a raw data file, and whatever
    /// waits to be freed: they are above the end that the disk is to have, where no guest writes.
    ///
    /// # Errors
    /// As for [`Qcow2::clear`].
    pub(super) async fn unmap_clusters(&self, offset: u64, len: u64) -> Result<()> {
        self.check_sound()?;
        self.clear_data_file(offset, offset + len, Clear::Unmap)
            .await?;
        let mut at = offset;
        self.modify(&mut at, offset + len, |_, units, old| {
            self.shape.unallocated(units, old)
        })
        .await
    }

    /// A data file keeps no more than the guest has: what is given back there cannot wait until
    /// the mapping is stable, since the next write goes to the same place. Whichever of the two
    /// is lost in a cut, the range reads as it was or as zeros.
    ///
    /// Writes in place hold no claim: one that found its cluster mapped may reach the data file
    /// before this, or after it, or when the mapping has been changed. A raw data file must hold
    /// what the image shows, in any of these orders. There the zeros are in the file and the
    /// mapping goes on pointing at them. Units that have no data of their own have no writes in
    /// place either. A data file that is not raw may keep what the mapping does not point at.
    async fn clear_data_file(&self, offset: u64, end: u64, how: Clear) -> Result<()> {
        let Some(data) = &self.data else {
            return Ok(());
        };
        let end = end.min(self.mapped_end());
        let unmap = how != Clear::ZeroKeep && self.options.discard;
        let result = if data.raw {
            let to = Purpose::Data.on(&*data.storage);
            storage::io::zero(to, offset, end - offset, unmap).await
        } else if unmap {
            let to = Purpose::Discard.on(&*data.storage);
            storage::io::discard(to, offset, end - offset).await
        } else {
            Ok(())
        };
        result.map_err(|error| Error::io(Action::Write, data.storage.name(), offset, &error))
    }

    /// Changes the entries of the clusters in `[at, end)`, bytes of the disk. `change` is given
    /// the cluster, its units in the range, and its old entry. `at` follows what has been done.
    pub(super) async fn modify(
        &self,
        at: &mut u64,
        end: u64,
        change: impl Fn(u64, Range<u64>, Words) -> Words,
    ) -> Result<()> {
        while *at < end {
            self.prepare(*at >> self.cluster_bits).await?;
            // It does nothing when the slice was forgotten since: that is done again then.
            self.change(|meta| self.modify_slice(meta, at, end, &change))
                .await??;
        }
        self.relieve().await
    }

    /// Changes entries within one slice, if it is in memory.
    fn modify_slice(
        &self,
        meta: &mut Meta,
        at: &mut u64,
        end: u64,
        change: &impl Fn(u64, Range<u64>, Words) -> Words,
    ) -> Result<()> {
        let (number, first) = self.place(*at >> self.cluster_bits);
        let Some(slice) = self.slice(number) else {
            return Ok(());
        };
        let Some(slice) = slice.as_ref() else {
            return Ok(());
        };
        let last = self.slice_entries() as usize;
        let mut index = first;
        while index < last && *at < end {
            let mut entries = Entries::new();
            let begin = (index, *at >> self.cluster_bits);
            let mut result = Ok(());
            while index < last && *at < end && !entries.is_full() {
                let cluster = *at >> self.cluster_bits;
                let next = end.min((cluster + 1) << self.cluster_bits);
                let units = self.units(*at, next);
                let old = slice.get(index);
                let part = units.end - units.start < self.shape.units();
                if part && matches!(self.shape.state(old, 0), State::Compressed { .. }) {
                    result = Err(Error::Invalid(format!(
                        "{}: a part of a compressed cluster cannot be changed",
                        self.storage.name()
                    )));
                    break;
                }
                let new = change(cluster, units, old);
                // Now: what is chosen next depends on what waits to be freed.
                self.unmap(meta, old, new);
                entries.push((old, new));
                *at = next;
                index += 1;
            }
            self.set_entries(meta, slice, number, begin, &entries);
            result?;
        }
        Ok(())
    }

    /// Sets entries of a slice, from `begin` on (index and guest cluster): the one place that does.
    fn set_entries(
        &self,
        meta: &mut Meta,
        slice: &Slice,
        number: u64,
        begin: (usize, u64),
        entries: &[(Words, Words)],
    ) {
        let differs = |(old, new): &(Words, Words)| old != new;
        let (Some(first), Some(last)) = (
            entries.iter().position(differs),
            entries.iter().rposition(differs),
        ) else {
            return;
        };
        let Some(changed) = entries.get(first..=last) else {
            return;
        };
        let log = meta.allocator.log_mut();
        let recorded = log.mapping(begin.1 + first as u64, changed, self.shape.extended);
        for (index, (old, new)) in (begin.0 + first..).zip(changed) {
            if new != old {
                slice.set(index, *new, &recorded);
            }
        }
        meta.dirty_slices.insert(number);
    }

    /// The units of a cluster that `[start, end)` touches, which lies within it.
    fn units(&self, start: u64, end: u64) -> Range<u64> {
        let within = start & (self.cluster_size() - 1);
        let bits = self.shape.unit_bits();
        let last = (within + (end - start)).div_ceil(1 << bits);
        within >> bits..last
    }

    /// Notes the host clusters that `old` referred to and `new` does not.
    fn unmap(&self, meta: &mut Meta, old: Words, new: Words) {
        if self.data.is_some() {
            return;
        }
        let host = |words: Words| match self.shape.descriptor(words.descriptor) {
            Descriptor::Host(host) | Descriptor::Zero(Some(host)) => {
                Some((host.offset, self.cluster_size()))
            }
            Descriptor::Compressed { offset, len } => {
                let start = offset & !(self.cluster_size() - 1);
                let end = (offset + u64::from(len)).next_multiple_of(self.cluster_size());
                Some((start, end - start))
            }
            Descriptor::None | Descriptor::Zero(None) => None,
        };
        if old == new {
            return;
        }
        let (old_host, new_host) = (host(old), host(new));
        if let Some(freed) = old_host
            && old_host != new_host
        {
            if matches!(
                self.shape.descriptor(old.descriptor),
                Descriptor::Compressed { .. }
            ) {
                self.decompressed.clear();
            }
            self.note_unmapped(meta, [freed]);
        }
    }

    /// Writes metadata back when more of it is changed than should be, or when the journal is half
    /// full: then one request does it, and the others go on as long as there is room.
    async fn relieve(&self) -> Result<()> {
        let (dirty, half_full, lost) = {
            let meta = self.meta.lock();
            let dirty = meta.dirty_slices.len() + meta.allocator.dirty();
            let log = meta.allocator.log();
            (dirty, log.is_half_full(), log.is_lost())
        };
        if lost {
            // What has just been changed may have no record.
            return Err(self.lost_journal());
        }
        if dirty > self.dirty_limit() {
            return Box::pin(self.flush()).await;
        }
        if half_full
            && !self.has_adopted()
            && let Some(_turn) = self.flushing.try_relieve()
        {
            // There is room: what has just been changed has its record, and need not be stable. A
            // failure is told by the storage, and by the next flush.
            let _ = Box::pin(self.flush()).await;
        }
        Ok(())
    }
}
