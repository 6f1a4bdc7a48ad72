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
mod free;
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
use super::soundness::Soundness;

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
