//! Metadata on its way into memory and out of it: slices of the mapping and of the refcounts.
//!
//! The first that needs a slice loads it; others that need it meanwhile wait for that. Misses of
//! different slices go in parallel. What is loaded is checked before anybody uses it.

use std::sync::Arc;

use super::l2::Slice;
use super::refcount::SLICE_BYTES;
use super::soundness::Fault;
use super::words::Words;
use super::{Meta, Qcow2};
use crate::error::{Error, Result};
use crate::storage::{self, Purpose};
use crate::sync::Event;

/// The part of the cache that is for refcounts, which only those who allocate and free need.
const REFCOUNT_PART: u64 = 8;
/// Changed slices that are gathered at most before they are written without being asked.
const DIRTY_LIMIT: usize = 2048;

/// What is being loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Loading {
    Mapping(u64),
    Refcounts(u64),
}

impl Qcow2 {
    /// See [`crate::format::Format::load`].
    pub(in crate::format) async fn load(&self, offset: u64) -> Result<()> {
        self.load_slice(self.place(offset >> self.cluster_bits).0)
            .await
    }

    pub(super) async fn load_slice(&self, number: u64) -> Result<()> {
        let Some(_guard) = self.begin_loading(Loading::Mapping(number)).await else {
            return Ok(());
        };
        if self.directory.get(number).is_some() {
            return Ok(());
        }
        let bytes = self.slice_bytes() as usize;
        let from = Purpose::L2Table.on(&*self.storage);
        let (offset, slice, mut meta) = loop {
            let Some(offset) = self.slice_offset(number) else {
                return Ok(());
            };
            let buffer = storage::io::fetch(from, offset, bytes).await?;
            let slice = Slice::from_bytes(&buffer, self.shape.extended);
            let meta = self.meta.lock();
            // Else the table has moved meanwhile, and is another one.
            if self.slice_offset(number) == Some(offset) {
                break (offset, slice, meta);
            }
        };
        let adopted = Self::put_adopted(&meta, number, &slice);
        if let Some((cluster, mut fault)) = self.first_fault(&meta, number, &slice) {
            if !fault.fatal {
                self.withhold_behind(&mut meta, &slice);
            }
            drop(meta);
            let at = offset + self.place(cluster).1 as u64 * self.shape.entry_bytes();
            fault.what = format!("at {at:#x}: {}", fault.what);
            let error = Error::corrupt(self.storage.name(), &*fault.what);
            self.soundness.found(self.storage.name(), fault);
            return Err(error);
        }
        if !self.directory.set(number, Some(Arc::new(slice))) {
            return Err(Error::corrupt(
                self.storage.name(),
                "mapping past the end of the disk",
            ));
        }
        if adopted {
            self.keep_adopted(&mut meta, number);
        }
        meta.loaded.push_back(number);
        self.evict(&mut meta);
        Ok(())
    }

    /// Keeps clusters that entries point at, and that nobody counts, from being handed out: a cluster of
    /// the guest's would be two of them.
    fn withhold_behind(&self, meta: &mut Meta, slice: &Slice) {
        if self.data.is_some() || !self.options.writable {
            return;
        }
        for words in slice.entries() {
            let Some(extent) = self.shape.extent(words) else {
                continue;
            };
            for cluster in self.shape.clusters(&extent) {
                if cluster >= meta.allocator.frontier() {
                    meta.allocator.withhold(cluster);
                }
            }
        }
    }

    /// The first guest cluster of a slice whose entry is wrong, and what is wrong with it. One that
    /// leaves nothing to rely on comes before all others.
    fn first_fault(&self, meta: &Meta, number: u64, slice: &Slice) -> Option<(u64, Fault)> {
        let clusters = number * self.slice_entries()..;
        let mut faults = clusters
            .zip(slice.entries())
            .filter_map(|(cluster, words)| Some((cluster, self.fault_of(meta, cluster, words)?)));
        let first = faults.next()?;
        match first.1.fatal {
            true => Some(first),
            false => Some(faults.find(|(_, fault)| fault.fatal).unwrap_or(first)),
        }
    }

    /// What is wrong with the entry of a guest cluster, as far as can be told without reading on.
    pub(super) fn fault(&self, meta: &Meta, cluster: u64, words: Words) -> Option<String> {
        Some(self.fault_of(meta, cluster, words)?.what)
    }

    fn fault_of(&self, meta: &Meta, cluster: u64, words: Words) -> Option<Fault> {
        let fatal = |what| Fault {
            what,
            place: None,
            fatal: true,
        };
        if let Some(what) = self.shape.fault(words) {
            return Some(fatal(what));
        }
        let extent = self.shape.extent(words)?;
        let offset = extent.start;
        let at = || format!("L2 entry {:#018x} points at {offset:#x}", words.descriptor);
        if let Some(data) = &self.data {
            // Writing takes a guest cluster's own place, so nobody else may be there.
            let expected = cluster << self.cluster_bits;
            return ((data.raw || self.options.writable) && offset != expected)
                .then(|| fatal(format!("{} of a data file (expected {expected:#x})", at())));
        }
        if !self.options.writable {
            return None;
        }
        let clusters = self.shape.clusters(&extent);
        let frontier = meta.allocator.frontier();
        let is_behind = |cluster| cluster >= frontier || meta.allocator.is_withheld(cluster);
        if clusters.clone().any(is_behind) {
            // QEMU's check calls it an error as well. It would be written there, and handed out
            // to others. A file that was cut short says nothing against what it still has.
            return Some(Fault {
                fatal: false,
                ..fatal(format!("{}, behind the end of the file", at()))
            });
        }
        let what = |cluster| Some((cluster, meta.allocator.metadata().what(cluster)?));
        let (cluster, what) = clusters.clone().find_map(what)?;
        Some(Fault {
            place: Some((cluster << self.cluster_bits, self.cluster_size())),
            ..fatal(format!("{}, where {what} is", at()))
        })
    }

    /// Bytes of a slice, of the mapping or of the refcounts.
    pub(super) fn slice_bytes(&self) -> u64 {
        SLICE_BYTES.min(self.cluster_size())
    }

    /// How many slices of the mapping may be in memory.
    fn mapping_slices(&self) -> usize {
        let bytes = self.options.cache_bytes - self.options.cache_bytes / REFCOUNT_PART;
        (bytes / self.slice_bytes()).max(8) as usize
    }

    /// How many slices of the refcounts may be in memory.
    fn refcount_slices(&self) -> usize {
        (self.options.cache_bytes / REFCOUNT_PART / self.slice_bytes()).max(4) as usize
    }

    /// How many changed slices are too many: they cannot be forgotten before they are written.
    pub(super) fn dirty_limit(&self) -> usize {
        DIRTY_LIMIT.min(self.mapping_slices() / 2)
    }

    /// Forgets slices that were not used lately, down to the limit. Changed ones stay. The one that
    /// was just loaded comes last and counts as used, and is looked at once at most: it stays too.
    fn evict(&self, meta: &mut Meta) {
        let limit = self.mapping_slices();
        let mut looked_at = 0;
        while meta.loaded.len() > limit && looked_at < 2 * limit {
            looked_at += 1;
            let Some(number) = meta.loaded.pop_front() else {
                return;
            };
            let busy = meta.dirty_slices.contains(&number) || meta.writing.contains(&number);
            let referenced = self
                .directory
                .get(number)
                .is_some_and(|slice| slice.as_ref().is_some_and(|s| s.take_referenced()));
            if busy || referenced {
                meta.loaded.push_back(number);
            } else {
                self.directory.set(number, None);
            }
        }
    }

    pub(super) async fn load_refcounts(&self, number: u64) -> Result<()> {
        let Some(_guard) = self.begin_loading(Loading::Refcounts(number)).await else {
            return Ok(());
        };
        let from = Purpose::RefcountBlock.on(&*self.storage);
        let (buffer, mut meta) = loop {
            let (offset, bytes) = {
                let meta = self.meta.lock();
                (
                    meta.allocator.slice_offset(number),
                    meta.allocator.slice_bytes(),
                )
            };
            let Some(offset) = offset else { return Ok(()) };
            let buffer = storage::io::fetch(from, offset, bytes).await?;
            let meta = self.meta.lock();
            // Else the block has moved meanwhile, and is another one.
            if meta.allocator.slice_offset(number) == Some(offset) {
                break (buffer, meta);
            }
        };
        // Room is made before, so that what was just asked for stays.
        meta.allocator.trim(self.refcount_slices());
        meta.allocator
            .insert_slice(number, buffer.to_vec().into_boxed_slice());
        Ok(())
    }

    /// One task loads, the others wait for it. `None`: somebody else has just loaded it.
    async fn begin_loading(&self, what: Loading) -> Option<LoadGuard<'_>> {
        let listener = {
            let mut loading = self.loading.lock();
            match loading.get(&what) {
                Some(event) => event.listen(),
                None => {
                    loading.insert(what, Arc::new(Event::new()));
                    return Some(LoadGuard { image: self, what });
                }
            }
        };
        listener.await;
        None
    }
}

/// Ends a load, however it ends.
struct LoadGuard<'a> {
    image: &'a Qcow2,
    what: Loading,
}

impl Drop for LoadGuard<'_> {
    fn drop(&mut self) {
        let event = self.image.loading.lock().remove(&self.what);
        if let Some(event) = event {
            event.notify(usize::MAX);
        }
    }
}
