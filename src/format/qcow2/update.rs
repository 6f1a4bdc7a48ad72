//! Changing the mapping: allocating, linking, zeroing, unmapping.
//!
//! Callers hold a claim on the clusters whose mapping they change. The order of a write is:
//! allocate (refcounts in memory), write the data, link (entry in memory). What a flush takes in
//! between has references without a mapping, which is a leak at worst.

use super::claims::Claim;
use super::l2::{self, Entry};
use super::refcount::{Allocation, Need};
use super::{DIRTY_LIMIT, Meta, Qcow2};
use crate::error::{Error, Result};
use crate::storage;

use std::sync::atomic::Ordering;

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

impl Qcow2 {
    /// Claims the clusters of `[offset, offset + len)`, waiting for whoever has any of them.
    pub async fn claim(&self, offset: u64, len: u64) -> Claim<'_> {
        let start = offset >> self.cluster_bits;
        let end = (offset + len).div_ceil(self.cluster_size());
        self.claims.claim(start..end.max(start + 1)).await
    }

    /// Allocates up to `wanted` contiguous host clusters.
    ///
    /// # Errors
    /// When metadata cannot be read or written.
    pub async fn allocate(&self, wanted: u64) -> Result<Allocation> {
        loop {
            let (result, table_len) = {
                let mut meta = self.meta.lock();
                (
                    meta.allocator.allocate(wanted),
                    meta.allocator.table().len(),
                )
            };
            match result {
                Ok(allocation) => {
                    if allocation.fresh {
                        self.reserve_ahead(&allocation).await;
                    }
                    return Ok(allocation);
                }
                Err(need) => self.provide(need, table_len).await?,
            }
        }
    }

    async fn provide(&self, need: Need, table_len: usize) -> Result<()> {
        match need {
            Need::Slice(number) => self.load_refcounts(number).await,
            Need::Table => self.grow_reftable(table_len).await,
            Need::Corrupt(what) => Err(Error::corrupt(self.storage.name(), what)),
        }
    }

    /// Gives back clusters that were allocated and not linked.
    pub async fn abandon(&self, allocation: Allocation) {
        let first = allocation.offset >> self.cluster_bits;
        for cluster in first..first + allocation.clusters {
            self.release(cluster).await;
        }
    }

    /// How many refer to a host cluster; `None` when that cannot be found out.
    pub(super) async fn refcount(&self, cluster: u64) -> Option<u64> {
        loop {
            let refcount = self.meta.lock().allocator.refcount(cluster);
            match refcount {
                Ok(count) => return Some(count.unwrap_or(0)),
                Err(Need::Slice(number)) => self.load_refcounts(number).await.ok()?,
                Err(_) => return None,
            }
        }
    }

    /// Takes one reference off a host cluster. What fails leaks the cluster, no more.
    pub(super) async fn release(&self, cluster: u64) {
        loop {
            let released = self.meta.lock().allocator.release(cluster);
            let provided = match released {
                Ok(()) => return,
                Err(Need::Slice(number)) => self.load_refcounts(number).await,
                Err(need) => {
                    log::error!(
                        "{}: freeing cluster {cluster}: {need:?}",
                        self.storage.name()
                    );
                    return;
                }
            };
            if let Err(error) = provided {
                log::error!("freeing a cluster: {error}");
                return;
            }
        }
    }

    /// Maps guest clusters from `cluster` on to `allocation`, whose data has been written.
    ///
    /// # Errors
    /// When metadata cannot be read or written: nothing is linked then, or a prefix.
    pub async fn link(&self, cluster: u64, allocation: Allocation) -> Result<()> {
        let bits = self.cluster_bits;
        self.modify(cluster, allocation.clusters, |index, _| {
            Entry::data(allocation.offset + (index << bits))
        })
        .await
    }

    /// Clears `count` guest clusters from `cluster` on.
    ///
    /// # Errors
    /// When metadata cannot be read or written; a prefix may have been cleared.
    pub async fn clear(&self, cluster: u64, count: u64, how: Clear) -> Result<()> {
        let bits = self.cluster_bits;
        self.modify(cluster, count, |_, old| {
            match (how, Entry::decode(old, bits)) {
                (Clear::Unmap, _) => 0,
                (
                    Clear::ZeroKeep,
                    Entry::Data {
                        offset,
                        copied: true,
                    },
                ) => Entry::zero(Some(offset)),
                (Clear::ZeroKeep, Entry::Zero(Some(_))) => old,
                (Clear::Zero | Clear::ZeroKeep, _) => Entry::zero(None),
            }
        })
        .await
    }

    /// Makes sure that the L2 table of a guest cluster exists and its slice is in memory.
    ///
    /// # Errors
    /// When metadata cannot be read or written.
    async fn prepare(&self, cluster: u64) -> Result<()> {
        let index = cluster / self.table_entries();
        self.ensure_table(index).await?;
        let number = self.place(cluster).0;
        while self.slice(number).is_none() {
            self.load_slice(number).await?;
        }
        Ok(())
    }

    async fn ensure_table(&self, index: u64) -> Result<()> {
        if self.table_exists(index)? {
            return Ok(());
        }
        let _claim = self.l1_claims.claim(index..index + 1).await;
        if self.table_exists(index)? {
            return Ok(());
        }
        let table = self.allocate(1).await?;
        if !table.fresh {
            // Stable before the L1 entry, like everything that is written before a flush begins.
            let zeroed =
                storage::io::zero(&*self.storage, table.offset, self.cluster_size(), false).await;
            if let Err(error) = zeroed {
                self.abandon(table).await;
                return Err(self.io_error(crate::error::Action::Write, table.offset, &error));
            }
        }
        let mut meta = self.meta.lock();
        if let Some(entry) = self.l1.get(index as usize) {
            entry.store(table.offset | l2::COPIED, Ordering::Release);
            meta.dirty_l1.insert(index as usize);
        }
        Ok(())
    }

    fn table_exists(&self, index: u64) -> Result<bool> {
        let entry = self.l1_entry(index);
        if entry & l2::OFFSET == 0 {
            return Ok(false);
        }
        if entry & l2::COPIED == 0 {
            return Err(Error::corrupt(
                self.storage.name(),
                format!("L1 entry {index}: a shared L2 table (expected in images with snapshots)"),
            ));
        }
        Ok(true)
    }

    /// Changes the entries of `count` guest clusters from `cluster` on. `change` is given the
    /// number of the cluster within the range and its old entry.
    async fn modify(
        &self,
        cluster: u64,
        count: u64,
        change: impl Fn(u64, u64) -> u64,
    ) -> Result<()> {
        let mut done = 0;
        while done < count {
            self.prepare(cluster + done).await?;
            let mut meta = self.meta.lock();
            // `None`: forgotten since it was prepared, so that is done again.
            if let Some(now) =
                self.modify_slice(&mut meta, cluster + done, count - done, done, &change)
            {
                done += now;
            }
        }
        self.relieve().await
    }

    /// Changes entries within one slice; returns how many.
    fn modify_slice(
        &self,
        meta: &mut Meta,
        cluster: u64,
        count: u64,
        done: u64,
        change: &impl Fn(u64, u64) -> u64,
    ) -> Option<u64> {
        let (number, first) = self.place(cluster);
        let slice = self.slice(number)?;
        let slice = slice.as_ref()?;
        let now = count.min(self.slice_entries() - first as u64);
        for index in 0..now {
            let at = first + index as usize;
            let old = slice.get(at);
            let new = change(done + index, old);
            if new != old {
                slice.set(at, new);
                meta.dirty_slices.insert(number);
                self.unmap(meta, old, new);
            }
        }
        Some(now)
    }

    /// Notes the host clusters that `old` referred to and `new` does not.
    fn unmap(&self, meta: &mut Meta, old: u64, new: u64) {
        let host = |word| match Entry::decode(word, self.cluster_bits) {
            Entry::Data { offset, .. } | Entry::Zero(Some(offset)) => {
                Some((offset, self.cluster_size()))
            }
            Entry::Compressed { offset, len } => {
                let start = offset & !(self.cluster_size() - 1);
                let end = (offset + u64::from(len)).next_multiple_of(self.cluster_size());
                Some((start, end - start))
            }
            Entry::Unallocated | Entry::Zero(None) => None,
        };
        let (old_host, new_host) = (host(old), host(new));
        if let Some(freed) = old_host
            && old_host != new_host
        {
            if matches!(
                Entry::decode(old, self.cluster_bits),
                Entry::Compressed { .. }
            ) {
                self.decompressed.clear();
            }
            meta.unmapped.push(freed);
        }
    }

    /// Writes metadata back when more of it is changed than should be.
    async fn relieve(&self) -> Result<()> {
        let dirty = {
            let meta = self.meta.lock();
            meta.dirty_slices.len() + meta.allocator.dirty()
        };
        if dirty > DIRTY_LIMIT {
            return self.flush().await;
        }
        Ok(())
    }
}
