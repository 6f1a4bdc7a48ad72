//! The allocator: refcounts in memory, and which host clusters are free.
//!
//! It is an in-memory step under the image's metadata lock: where a refcount slice is not in
//! memory it says so ([`Need`]) and the caller, who may wait, loads it and asks again.
//!
//! Invariants:
//! * a cluster is handed out only when its refcount is 0, and has refcount 1 from then on;
//! * what is in `free` has refcount 0, and no request and no stable mapping refers to it;
//! * while a freed cluster is punched it has its last reference and is not in `free`, and no part
//!   of it is handed out;
//! * nothing from `limit` on is handed out or free: a block device ends there;
//! * from `virgin_from` on nothing has ever been written: those clusters read as zeros.

mod exact;
mod growth;
mod limit;
mod replace;

pub use limit::Look;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::journal::Log;
use super::metadata::{Clusters, Kind};
use super::soundness::{Fault, Soundness};

/// Bytes of metadata that are loaded and written at a time.
pub const SLICE_BYTES: u64 = 4096;

/// Clean slices that are always kept: more than an allocation needs at the same time.
const KEPT_CLEAN: usize = 8;

/// What the allocator lacks.
#[derive(Debug, PartialEq, Eq)]
pub enum Need {
    /// This slice of the refcounts must be loaded.
    Slice(u64),
    /// The refcount table must become longer.
    Table,
    /// A replacement of the table that is under way must end first.
    Turn,
    /// There is no free cluster, and the storage cannot become longer.
    Full,
    /// There is no room left: this has grown as far as the format goes.
    Limit(&'static str),
    /// The image contradicts itself.
    Corrupt(String),
}

/// Newly allocated host clusters, contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Host offset in bytes.
    pub offset: u64,
    /// How many clusters.
    pub clusters: u64,
    /// Nothing was ever written there: it reads as zeros.
    pub fresh: bool,
}

/// Sizes that follow from the header.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Logarithm of the refcount width in bits.
    pub refcount_order: u32,
}

impl Geometry {
    fn slice_bytes(self) -> u64 {
        SLICE_BYTES.min(1 << self.cluster_bits)
    }

    fn per_slice(self) -> u64 {
        (self.slice_bytes() * 8) >> self.refcount_order
    }

    /// Clusters that one refcount block covers.
    #[must_use]
    pub fn per_block(self) -> u64 {
        (8u64 << self.cluster_bits) >> self.refcount_order
    }

    /// The largest refcount.
    #[must_use]
    pub fn max_refcount(self) -> u64 {
        u64::MAX >> (64 - (1u64 << self.refcount_order))
    }

    fn slices_per_block(self) -> u64 {
        self.per_block() / self.per_slice()
    }
}

/// The refcounts of an image.
#[derive(Debug)]
pub struct Allocator {
    geometry: Geometry,
    /// Host offset of each refcount block, 0: none.
    table: Vec<u64>,
    slices: HashMap<u64, Box<[u8]>>,
    /// The slices in memory, the longest there first.
    loaded: VecDeque<u64>,
    dirty_slices: BTreeSet<u64>,
    /// Slices that a flush is writing: not to be forgotten before it is done.
    writing: BTreeSet<u64>,
    dirty_table: BTreeSet<usize>,
    /// Runs of free clusters, start → length.
    free: BTreeMap<u64, u64>,
    /// Where allocation goes on when `free` is empty.
    frontier: u64,
    virgin_from: u64,
    /// The table is being replaced: no new refcount blocks meanwhile.
    frozen: bool,
    /// Clusters of the storage, if it cannot become longer; else `u64::MAX`.
    limit: u64,
    /// Clusters that have not been looked at since the image was opened: some may be free.
    unseen: Vec<Range<u64>>,
    /// Start → end of clusters without a reference that wait until their space has been given back.
    withheld: BTreeMap<u64, u64>,
    /// Where the next compressed cluster goes, in a host cluster that others share.
    part: Option<Range<u64>>,
    /// The image's own clusters, which are never handed out, whatever their refcount.
    metadata: Clusters,
    /// Of the image, and the file's name.
    soundness: Option<(Arc<Soundness>, String)>,
    /// The image's journal, which has the changes of refcounts in order with all others.
    log: Log,
}

impl Allocator {
    /// The allocator of an image whose file has `end` clusters; with `zero_past_end`, what lies
    /// behind them reads as zeros.
    #[must_use]
    pub fn new(
        geometry: Geometry,
        table: Vec<u64>,
        metadata: Clusters,
        end: u64,
        zero_past_end: bool,
    ) -> Self {
        Self {
            geometry,
            table,
            slices: HashMap::new(),
            loaded: VecDeque::new(),
            dirty_slices: BTreeSet::new(),
            writing: BTreeSet::new(),
            dirty_table: BTreeSet::new(),
            free: BTreeMap::new(),
            frontier: end,
            virgin_from: if zero_past_end { end } else { u64::MAX },
            frozen: false,
            limit: u64::MAX,
            unseen: std::iter::once(0..end).collect(),
            withheld: BTreeMap::new(),
            part: None,
            metadata,
            soundness: None,
            log: Log::default(),
        }
    }

    /// From now on changes are recorded in `log`.
    pub(super) fn set_log(&mut self, log: Log) {
        self.log = log;
    }

    /// The journal of the image's changes.
    pub(super) fn log(&self) -> &Log {
        &self.log
    }

    /// The journal of the image's changes, to record one.
    pub(super) fn log_mut(&mut self) -> &mut Log {
        &mut self.log
    }

    /// The image's own clusters.
    #[must_use]
    pub fn metadata(&self) -> &Clusters {
        &self.metadata
    }

    /// Whom it tells of contradictions: those of the image in this file.
    pub(super) fn set_soundness(&mut self, soundness: Arc<Soundness>, file: &str) {
        self.soundness = Some((soundness, file.to_owned()));
    }

    /// An allocated cluster has become metadata.
    pub fn add_metadata(&mut self, cluster: u64, kind: Kind) {
        self.metadata.add(cluster, kind);
    }

    /// Where the refcounts of slice `no` are in the file; `None`: their block does not exist.
    #[must_use]
    pub fn slice_offset(&self, no: u64) -> Option<u64> {
        let per_block = self.geometry.slices_per_block();
        let block = *self.table.get((no / per_block) as usize)?;
        (block != 0).then(|| block + no % per_block * self.geometry.slice_bytes())
    }

    /// Bytes of a slice.
    #[must_use]
    pub fn slice_bytes(&self) -> usize {
        self.geometry.slice_bytes() as usize
    }

    /// Takes a loaded slice.
    pub fn insert_slice(&mut self, no: u64, bytes: Box<[u8]>) {
        if let Entry::Vacant(place) = self.slices.entry(no) {
            place.insert(bytes);
            self.loaded.push_back(no);
        }
    }

    /// The slice that covers `cluster`.
    #[must_use]
    pub fn slice_of(&self, cluster: u64) -> u64 {
        cluster / self.geometry.per_slice()
    }

    /// A cluster's refcount; `None`: its block does not exist, so nothing refers to it.
    ///
    /// # Errors
    /// [`Need::Slice`].
    pub fn refcount(&self, cluster: u64) -> Result<Option<u64>, Need> {
        let no = self.slice_of(cluster);
        if self.slice_offset(no).is_none() {
            return Ok(None);
        }
        let slice = self.slices.get(&no).ok_or(Need::Slice(no))?;
        let index = (cluster % self.geometry.per_slice()) as usize;
        Ok(Some(get(slice, self.geometry.refcount_order, index)))
    }

    fn set(&mut self, cluster: u64, value: u64) -> Result<(), Need> {
        self.set_run(cluster..cluster + 1, value)
    }

    /// Sets refcounts: the one place that does, but for new blocks, which are zeros.
    fn set_run(&mut self, clusters: Range<u64>, value: u64) -> Result<(), Need> {
        let (first, count) = (clusters.start, clusters.end - clusters.start);
        for cluster in clusters {
            let no = self.slice_of(cluster);
            let slice = self.slices.get_mut(&no).ok_or(Need::Slice(no))?;
            let index = (cluster % self.geometry.per_slice()) as usize;
            put(slice, self.geometry.refcount_order, index, value);
            self.dirty_slices.insert(no);
        }
        // Nobody sees refcounts without the lock that is held.
        self.log.refcounts(first, count, value);
        Ok(())
    }

    /// Allocates up to `wanted` contiguous clusters, at least one.
    ///
    /// # Errors
    /// What must be done first; nothing has been allocated then.
    pub fn allocate(&mut self, wanted: u64) -> Result<Allocation, Need> {
        // One slice at a time, so that nobody waits for all of them.
        if self.free.is_empty() {
            self.look_for_free()?;
        }
        loop {
            while let Some((&start, &len)) = self.free.first_key_value() {
                let range = start..start + len.min(wanted);
                if let Some(allocation) = self.take(range, wanted)? {
                    return Ok(allocation);
                }
            }
            match self.append(wanted) {
                Err(Need::Full | Need::Table) if self.find_more()? => {}
                other => return other,
            }
        }
    }

    /// Allocates `len` bytes for a compressed cluster, less than a cluster: in the host cluster that
    /// the last ones went to, if there is room, with one more reference to it.
    ///
    /// # Errors
    /// As for [`Allocator::allocate`].
    pub fn allocate_part(&mut self, len: u64) -> Result<u64, Need> {
        let bits = self.geometry.cluster_bits;
        if let Some(part) = self
            .part
            .clone()
            .filter(|part| part.end - part.start >= len)
        {
            let cluster = part.start >> bits;
            let count = self.refcount(cluster)?.unwrap_or(0);
            if count > 0 && count < self.geometry.max_refcount() {
                self.set(cluster, count + 1)?;
                self.part = Some(part.start + len..part.end);
                return Ok(part.start);
            }
        }
        let start = self.allocate(1)?.offset;
        self.part = Some(start + len..start + (1 << bits));
        Ok(start)
    }

    /// Finds what is free in the next slice of the clusters that the file had when it was opened.
    fn look_for_free(&mut self) -> Result<(), Need> {
        let per_slice = self.geometry.per_slice();
        let after = |cluster: u64| (cluster / per_slice + 1) * per_slice;
        while let Some(Range { start, end }) = self.unseen.last().cloned() {
            let stop = end.min(after(start));
            // Without a block there is no telling, and none is made for what lies before the end
            // as long as there is room elsewhere.
            let covered = self.slice_offset(self.slice_of(start)).is_some();
            let looked_at = if covered { start..stop } else { stop..stop };
            for cluster in looked_at {
                if self.refcount(cluster)? == Some(0)
                    && self.may_use(cluster)
                    && !self.is_free(cluster)
                {
                    self.add_free(cluster, 1);
                }
            }
            match self.unseen.last_mut() {
                Some(last) if stop < end => last.start = stop,
                _ => drop(self.unseen.pop()),
            }
            if covered {
                break;
            }
        }
        Ok(())
    }

    /// Notes clusters before the frontier that may be free.
    fn look_later(&mut self, clusters: Range<u64>) {
        if clusters.is_empty() {
            return;
        }
        match self.unseen.last_mut() {
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => self.unseen.push(clusters),
        }
    }

    fn is_free(&self, cluster: u64) -> bool {
        self.free
            .range(..=cluster)
            .next_back()
            .is_some_and(|(start, len)| cluster < start + len)
    }

    /// False for a cluster that is withheld, and for one that holds metadata: its refcount is wrong.
    fn may_use(&self, cluster: u64) -> bool {
        if self.is_withheld(cluster) {
            return false;
        }
        let Some(what) = self.metadata.what(cluster) else {
            return true;
        };
        if let Some((soundness, file)) = &self.soundness {
            let bits = self.geometry.cluster_bits;
            soundness.found(
                file,
                Fault {
                    what: format!(
                        "cluster {cluster} has refcount 0, but {what} is there: it is left alone"
                    ),
                    place: Some((cluster << bits, 1 << bits)),
                    fatal: false,
                },
            );
        }
        false
    }

    /// Takes a run out of `free`, checking that it is. Where it has no refcount block its first
    /// cluster becomes that.
    fn take(&mut self, range: Range<u64>, wanted: u64) -> Result<Option<Allocation>, Need> {
        if self.refcount(range.start)?.is_none() {
            self.add_block(range.start)?;
            self.remove_free(range.start, 1);
            return Ok(None);
        }
        let mut count = 0;
        for cluster in range.clone() {
            match self.refcount(cluster) {
                Ok(Some(0)) => count += 1,
                // Where another block begins, or its slice is not loaded: a shorter run.
                Ok(None) | Err(Need::Slice(_)) if count > 0 => break,
                Ok(other) => {
                    log::error!("cluster {cluster} was thought free but has refcount {other:?}");
                    break;
                }
                Err(need) => return Err(need),
            }
        }
        let taken = count.max(1);
        self.remove_free(range.start, taken);
        if count == 0 {
            return Ok(None);
        }
        debug_assert!(count <= wanted);
        self.set_run(range.start..range.start + count, 1)?;
        Ok(Some(self.allocation(range.start, count)))
    }

    fn remove_free(&mut self, start: u64, count: u64) {
        if let Some(len) = self.free.remove(&start)
            && len > count
        {
            self.free.insert(start + count, len - count);
        }
    }

    fn allocation(&mut self, start: u64, clusters: u64) -> Allocation {
        let fresh = start >= self.virgin_from;
        if self.virgin_from != u64::MAX {
            self.virgin_from = self.virgin_from.max(start + clusters);
        }
        Allocation {
            offset: start << self.geometry.cluster_bits,
            clusters,
            fresh,
        }
    }

    /// Allocates behind everything else.
    fn append(&mut self, wanted: u64) -> Result<Allocation, Need> {
        loop {
            let start = self.frontier;
            if start >= self.limit {
                return Err(Need::Full);
            }
            match self.refcount(start)? {
                // It would cover itself alone.
                None if start + 1 >= self.limit => return Err(Need::Full),
                None => {
                    self.add_block(start)?;
                    self.frontier = start + 1;
                }
                Some(0) if !self.may_use(start) => self.frontier += 1,
                Some(0) => {
                    let count = self.run_of_free(start, wanted)?;
                    self.set_run(start..start + count, 1)?;
                    self.frontier = start + count;
                    return Ok(self.allocation(start, count));
                }
                Some(_) => self.frontier += 1,
            }
        }
    }

    fn run_of_free(&self, start: u64, wanted: u64) -> Result<u64, Need> {
        let mut count = 1;
        while count < wanted.min(self.limit - start) {
            match self.refcount(start + count) {
                Ok(Some(0)) if self.metadata.what(start + count).is_none() => count += 1,
                // Where the next block begins, or its slice is not loaded: a shorter run.
                Ok(_) | Err(Need::Slice(_)) => break,
                Err(other) => return Err(other),
            }
        }
        Ok(count)
    }

    /// Makes `cluster`, which has no refcount block, that block: it covers itself.
    fn add_block(&mut self, cluster: u64) -> Result<(), Need> {
        let index = (cluster / self.geometry.per_block()) as usize;
        self.may_add_block(index)?;
        let fresh = self.allocation(cluster, 1).fresh;
        self.place_block(index, cluster, fresh);
        self.set(cluster, 1)
    }

    /// Whether block number `index` may be made now.
    fn may_add_block(&self, index: usize) -> Result<(), Need> {
        if index >= self.table.len() {
            return Err(Need::Table);
        }
        if self.frozen {
            return Err(Need::Turn);
        }
        Ok(())
    }

    /// Makes `cluster` the block number `index`. Unless it is `fresh`, all of it is written:
    /// whatever was there must go.
    fn place_block(&mut self, index: usize, cluster: u64, fresh: bool) {
        let offset = cluster << self.geometry.cluster_bits;
        if let Some(entry) = self.table.get_mut(index) {
            *entry = offset;
        }
        self.metadata.add(cluster, Kind::RefcountBlock);
        self.log.block(index as u64, offset);
        self.insert_block(index, fresh);
    }

    /// Puts the slices of the block number `index` into memory, full of zeros.
    fn insert_block(&mut self, index: usize, fresh: bool) {
        self.dirty_table.insert(index);
        let per_block = self.geometry.slices_per_block();
        let first = index as u64 * per_block;
        for no in first..first + per_block {
            let zeros = vec![0; self.slice_bytes()].into_boxed_slice();
            if self.slices.insert(no, zeros).is_none() {
                self.loaded.push_back(no);
            }
            if !fresh {
                self.dirty_slices.insert(no);
            }
        }
    }

    /// The block number `index`, which the table names, is all zeros, whatever the disk has.
    pub(super) fn adopt_block(&mut self, index: usize) {
        self.insert_block(index, false);
    }

    /// The slice `no`, which has been loaded, is to be changed and to be written.
    pub(super) fn hold_slice(&mut self, no: u64) {
        self.dirty_slices.insert(no);
    }

    /// Gives clusters the refcount that a journal says.
    ///
    /// # Errors
    /// [`Need::Slice`].
    pub(super) fn adopt_refcounts(&mut self, clusters: Range<u64>, value: u64) -> Result<(), Need> {
        debug_assert!(!self.log.records(), "adopted refcounts are in the journal");
        self.set_run(clusters, value)
    }

    /// Sizes that follow from the header.
    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether `cluster` has one reference left, which is about to be taken off. From then on
    /// nobody gets a part of the cluster either: it is out of reach until [`Self::release`].
    ///
    /// # Errors
    /// [`Need::Slice`].
    pub fn withdraw(&mut self, cluster: u64) -> Result<bool, Need> {
        let last = self.refcount(cluster)? == Some(1);
        if last {
            self.close_part(cluster);
        }
        Ok(last)
    }

    /// No more compressed clusters go to `cluster`.
    fn close_part(&mut self, cluster: u64) {
        let at = self.part.as_ref().map(|part| part.start);
        if at.is_some_and(|at| at >> self.geometry.cluster_bits == cluster) {
            self.part = None;
        }
    }

    /// Takes one reference off `cluster`; at 0 it may be used again.
    ///
    /// # Errors
    /// [`Need::Slice`], or an image whose refcounts are wrong.
    pub fn release(&mut self, cluster: u64) -> Result<(), Need> {
        match self.refcount(cluster)? {
            None | Some(0) => Err(Need::Corrupt(format!(
                "cluster {cluster} is released but has no reference"
            ))),
            Some(count) => {
                self.set(cluster, count - 1)?;
                if count == 1 {
                    self.close_part(cluster);
                    self.metadata.remove(cluster);
                    self.add_free(cluster, 1);
                }
                Ok(())
            }
        }
    }

    fn add_free(&mut self, start: u64, len: u64) {
        let mut range = start..(start + len).min(self.limit);
        if range.is_empty() {
            return;
        }
        if let Some((&before, &count)) = self.free.range(..start).next_back()
            && before + count == start
        {
            self.free.remove(&before);
            range.start = before;
        }
        if let Some(count) = self.free.remove(&range.end) {
            range.end += count;
        }
        self.free.insert(range.start, range.end - range.start);
    }

    /// Where allocation goes on, and nothing behind is in use.
    #[must_use]
    pub fn frontier(&self) -> u64 {
        self.frontier
    }

    /// Lowers the frontier: the clusters from `cluster` on turned out to be free.
    pub fn lower_frontier(&mut self, cluster: u64) {
        self.frontier = self.frontier.min(cluster);
        for range in &mut self.unseen {
            range.end = range.end.min(cluster);
        }
        self.unseen.retain(|range| !range.is_empty());
    }

    /// How many slices and table entries wait to be written.
    #[must_use]
    pub fn dirty(&self) -> usize {
        self.dirty_slices.len() + self.dirty_table.len()
    }

    /// Hands out the changed slices, and forgets that they were changed.
    pub fn take_dirty_slices(&mut self) -> Vec<(u64, u64, Box<[u8]>)> {
        let dirty = std::mem::take(&mut self.dirty_slices);
        self.writing.extend(&dirty);
        dirty
            .into_iter()
            .filter_map(|no| Some((no, self.slice_offset(no)?, self.slices.get(&no)?.clone())))
            .collect()
    }

    /// Hands out the changed table entries, and forgets that they were changed.
    pub fn take_dirty_table(&mut self) -> BTreeSet<usize> {
        std::mem::take(&mut self.dirty_table)
    }

    /// Says how writing them ended. What failed is to be written again.
    pub fn written(&mut self, table: &BTreeSet<usize>, success: bool) {
        let mut slices = std::mem::take(&mut self.writing);
        if !success {
            self.dirty_slices.append(&mut slices);
            self.dirty_table.extend(table);
        }
    }

    /// The refcount table.
    #[must_use]
    pub fn table(&self) -> &[u64] {
        &self.table
    }

    /// Forgets clean slices beyond `limit`, so that memory stays bounded. The latest clean ones
    /// stay: an allocation that needs several would otherwise drive them out in turn, for ever,
    /// when changed ones take all the room.
    pub fn trim(&mut self, limit: usize) {
        let (dirty, writing, slices) = (&self.dirty_slices, &self.writing, &mut self.slices);
        let busy = |no: &u64| dirty.contains(no) || writing.contains(no);
        let clean = self.loaded.iter().filter(|no| !busy(no)).count();
        let mut excess = slices
            .len()
            .saturating_sub(limit)
            .min(clean.saturating_sub(KEPT_CLEAN));
        self.loaded.retain(|no| {
            let keep = excess == 0 || busy(no);
            if !keep {
                slices.remove(no);
                excess -= 1;
            }
            keep
        });
    }
}

/// Refcount number `index` of a block or slice; entries are big-endian, those below a byte wide
/// begin at the least significant bit.
pub(super) fn get(bytes: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let bit = index << order;
        let byte = bytes.get(bit / 8).copied().unwrap_or_default();
        return u64::from(byte >> (bit % 8)) & ((1 << (1 << order)) - 1);
    }
    let width = 1usize << (order - 3);
    let entry = bytes
        .get(index * width..(index + 1) * width)
        .unwrap_or_default();
    entry
        .iter()
        .fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Sets refcount number `index` of a block or slice.
pub(super) fn put(bytes: &mut [u8], order: u32, index: usize, value: u64) {
    if order < 3 {
        let bit = index << order;
        let mask = ((1u8 << (1 << order)) - 1) << (bit % 8);
        if let Some(byte) = bytes.get_mut(bit / 8) {
            *byte = *byte & !mask | ((value as u8) << (bit % 8)) & mask;
        }
        return;
    }
    let width = 1usize << (order - 3);
    let value = value.to_be_bytes();
    if let Some(entry) = bytes.get_mut(index * width..(index + 1) * width)
        && let Some(low) = value.get(8 - width..)
    {
        entry.copy_from_slice(low);
    }
}

#[cfg(test)]
#[path = "refcount_tests.rs"]
mod tests;
