//! Writing that needs more than a store in place: allocation, copy-on-write, zeroes, discards.
//!
//! Invariant: while the mapping of a cluster is changed, whoever changes it holds a claim on it.
//! The data of a new cluster is written before the cluster is linked, so no reader ever sees it
//! half filled.

use std::rc::Rc;
use std::sync::Arc;

use super::{Layer, View};
use crate::error::{Action, Error, Result};
use crate::format::qcow2::{Allocation, Clear};
use crate::format::{Format, Place, Qcow2};
use crate::storage::{self, AlignedBuf, IoBufs};

/// Guest bytes allocated at a time: bounds the buffers and lets others have the clusters.
const ALLOCATE_AT_ONCE: u64 = 2 << 20;
/// Guest bytes whose mapping is cleared at a time.
const CLEAR_AT_ONCE: u64 = 64 << 20;
/// Zeros are written from a buffer of this size where they cannot be recorded.
const ZERO_CHUNK: u64 = 256 << 10;

impl View {
    /// Writes `bufs` at `offset` of the disk.
    ///
    /// # Errors
    /// When the top layer is read-only or cannot be written.
    pub async fn write(self: Rc<Self>, offset: u64, bufs: IoBufs) -> Result<()> {
        let top = self.writable_top()?;
        match &top.format {
            Format::Raw(raw) => top.store(raw.start() + offset, &bufs).await,
            Format::Qcow2(qcow2) => self.write_qcow2(top, qcow2, offset, &bufs).await,
        }
    }

    /// Makes `[offset, offset + len)` read as zeros; with `unmap` its space may be given back.
    ///
    /// # Errors
    /// As for [`View::write`].
    pub async fn write_zeroes(self: Rc<Self>, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let top = self.writable_top()?;
        match &top.format {
            Format::Raw(raw) => {
                let at = raw.start() + offset;
                storage::io::zero(&*top.storage, at, len, unmap && top.discard)
                    .await
                    .map_err(|error| top.io_error(Action::Write, at, &error))
            }
            Format::Qcow2(qcow2) => self.zero_qcow2(top, qcow2, offset, len, unmap).await,
        }
    }

    /// Tells the layer that the guest needs `[offset, offset + len)` no longer.
    ///
    /// # Errors
    /// As for [`View::write`].
    pub async fn discard(self: Rc<Self>, offset: u64, len: u64) -> Result<()> {
        let top = self.writable_top()?;
        if !top.discard {
            return Ok(());
        }
        match &top.format {
            Format::Raw(raw) => {
                let at = raw.start() + offset;
                storage::io::discard(&*top.storage, at, len)
                    .await
                    .map_err(|error| top.io_error(Action::Write, at, &error))
            }
            Format::Qcow2(qcow2) => self.discard_qcow2(top, qcow2, offset, len).await,
        }
    }

    fn writable_top(&self) -> Result<&Arc<Layer>> {
        let top = self.chain.top();
        if top.read_only {
            return Err(Error::Invalid(format!("node '{}' is read-only", top.name)));
        }
        Ok(top)
    }

    async fn write_qcow2(
        &self,
        top: &Layer,
        qcow2: &Qcow2,
        offset: u64,
        bufs: &IoBufs,
    ) -> Result<()> {
        let len = bufs.len() as u64;
        let mut done = 0;
        while done < len {
            let at = offset + done;
            if let Some((host, now)) = top.format.map_write(at, len - done) {
                top.store(host, &bufs.slice(done as usize, now as usize))
                    .await?;
                done += now;
                continue;
            }
            // Loads what is missing: perhaps it can be written in place after all.
            let extent = top.map_loaded(at, len - done).await?;
            if matches!(extent.place, Place::Data(_)) && top.format.map_write(at, 1).is_some() {
                continue;
            }
            let now = allocation_step(qcow2, at, extent.len.min(len - done));
            let now = self
                .write_new(top, qcow2, at, &bufs.slice(done as usize, now as usize))
                .await?;
            done += now;
        }
        Ok(())
    }

    /// Writes into clusters that must be allocated. Returns how much of `bufs` was written: 0
    /// when the clusters have been allocated by somebody else meanwhile.
    async fn write_new(
        &self,
        top: &Layer,
        qcow2: &Qcow2,
        offset: u64,
        bufs: &IoBufs,
    ) -> Result<u64> {
        let len = bufs.len() as u64;
        let _claim = qcow2.claim(offset, len).await;
        let extent = top.map_loaded(offset, len).await?;
        if top.format.map_write(offset, 1).is_some() {
            return Ok(0);
        }
        let len = len.min(extent.len);
        let cluster_size = qcow2.cluster_size();
        let first = offset / cluster_size;
        let wanted = (offset + len).div_ceil(cluster_size) - first;
        let allocation = qcow2.allocate(wanted).await?;
        let end = (first + allocation.clusters) * cluster_size;
        let len = len.min(end - offset);
        let result = self
            .fill(top, allocation, offset, &bufs.slice(0, len as usize))
            .await;
        if let Err(error) = result {
            qcow2.abandon(allocation).await;
            return Err(error);
        }
        qcow2.link(first, allocation).await?;
        Ok(len)
    }

    /// Writes `bufs` into newly allocated clusters, with what was there before around it.
    async fn fill(
        &self,
        top: &Layer,
        allocation: Allocation,
        offset: u64,
        bufs: &IoBufs,
    ) -> Result<()> {
        let cluster_size = top.format.cluster_size();
        let before = offset % cluster_size;
        let end = offset + bufs.len() as u64;
        let after = end.next_multiple_of(cluster_size) - end;
        let head = self.old_bytes(allocation, offset - before, before).await?;
        let tail = self.old_bytes(allocation, end, after).await?;
        let mut all = IoBufs::empty();
        let mut at = allocation.offset;
        match &head {
            // SAFETY: `head` outlives the write below.
            Some(head) => all.append(&unsafe { IoBufs::of(head, 0, head.len()) }),
            None => at += before,
        }
        all.append(bufs);
        if let Some(tail) = &tail {
            // SAFETY: `tail` outlives the write below.
            all.append(&unsafe { IoBufs::of(tail, 0, tail.len()) });
        }
        top.store(at, &all).await
    }

    /// What a part of a cluster held so far; `None`: zeros, and so does its new place.
    async fn old_bytes(
        &self,
        allocation: Allocation,
        offset: u64,
        len: u64,
    ) -> Result<Option<AlignedBuf>> {
        if len == 0 {
            return Ok(None);
        }
        let size = self.chain.size();
        let within = len.min(size.saturating_sub(offset));
        if allocation.fresh && self.chain.is_zero(0, offset, within).await? {
            return Ok(None);
        }
        let buffer = AlignedBuf::zeroed(len as usize);
        // SAFETY: `buffer` outlives the read.
        let bufs = unsafe { IoBufs::of(&buffer, 0, within as usize) };
        self.chain.read_from(0, offset, &bufs).await?;
        Ok(Some(buffer))
    }

    async fn zero_qcow2(
        &self,
        top: &Layer,
        qcow2: &Qcow2,
        offset: u64,
        len: u64,
        unmap: bool,
    ) -> Result<()> {
        let (first, whole_end) = whole_clusters(qcow2, offset, len, self.chain.size());
        if first >= whole_end {
            return self.write_zero_bytes(top, qcow2, offset, len).await;
        }
        let cluster_size = qcow2.cluster_size();
        let (start, end) = (
            first * cluster_size,
            (whole_end * cluster_size).min(offset + len),
        );
        self.write_zero_bytes(top, qcow2, offset, start - offset)
            .await?;
        self.write_zero_bytes(top, qcow2, end, offset + len - end)
            .await?;
        let how = match (
            qcow2.has_zero_clusters(),
            self.has_below(),
            unmap && top.discard,
        ) {
            (true, _, true) => Clear::Zero,
            (true, _, false) => Clear::ZeroKeep,
            // Without the zero flag an unallocated cluster is zero if nothing lies below.
            (false, false, _) => Clear::Unmap,
            (false, true, _) => return self.write_zero_bytes(top, qcow2, start, end - start).await,
        };
        self.clear_clusters(top, qcow2, first, whole_end, how).await
    }

    async fn discard_qcow2(&self, top: &Layer, qcow2: &Qcow2, offset: u64, len: u64) -> Result<()> {
        let (first, end) = whole_clusters(qcow2, offset, len, self.chain.size());
        if first >= end {
            return Ok(());
        }
        let how = match (qcow2.has_zero_clusters(), self.has_below()) {
            (_, false) => Clear::Unmap,
            (true, true) => Clear::Zero,
            // What lies below would come to light.
            (false, true) => return Ok(()),
        };
        self.clear_clusters(top, qcow2, first, end, how).await
    }

    /// Clears whole clusters, skipping what needs no change, and claiming no more than an
    /// extent at a time.
    async fn clear_clusters(
        &self,
        top: &Layer,
        qcow2: &Qcow2,
        first: u64,
        end: u64,
        how: Clear,
    ) -> Result<()> {
        let cluster_size = qcow2.cluster_size();
        let mut cluster = first;
        while cluster < end {
            let offset = cluster * cluster_size;
            let bytes = (end - cluster) * cluster_size;
            let _claim = qcow2.claim(offset, bytes.min(CLEAR_AT_ONCE)).await;
            let extent = top.map_loaded(offset, bytes).await?;
            let needless = match extent.place {
                Place::Below => !self.has_below(),
                Place::Zero => how != Clear::Unmap && how != Clear::Zero,
                _ => false,
            };
            if needless {
                cluster += extent.len.div_ceil(cluster_size);
                continue;
            }
            let count = extent.len.min(CLEAR_AT_ONCE).div_ceil(cluster_size);
            qcow2.clear(cluster, count, how).await?;
            cluster += count;
        }
        Ok(())
    }

    /// Writes zeros as data, where there are not zeros already.
    async fn write_zero_bytes(
        &self,
        top: &Layer,
        qcow2: &Qcow2,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let mut done = 0;
        let mut zeros = None;
        while done < len {
            let at = offset + done;
            let now = (len - done).min(ZERO_CHUNK);
            if !self.chain.is_zero(0, at, now).await? {
                let zeros =
                    zeros.get_or_insert_with(|| AlignedBuf::zeroed(len.min(ZERO_CHUNK) as usize));
                // SAFETY: `zeros` outlives the write.
                let bufs = unsafe { IoBufs::of(zeros, 0, now as usize) };
                self.write_qcow2(top, qcow2, at, &bufs).await?;
            }
            done += now;
        }
        Ok(())
    }

    fn has_below(&self) -> bool {
        self.chain.layers().len() > 1
    }
}

impl Layer {
    /// Writes at an offset of the storage.
    pub(super) async fn store(&self, at: u64, bufs: &IoBufs) -> Result<()> {
        storage::io::write(&*self.storage, bufs, at)
            .await
            .map_err(|error| self.io_error(Action::Write, at, &error))
    }
}

/// How much of a write to allocate at once: up to a cluster boundary.
fn allocation_step(qcow2: &Qcow2, offset: u64, len: u64) -> u64 {
    let cluster_size = qcow2.cluster_size();
    let limit = ALLOCATE_AT_ONCE.max(cluster_size);
    let end = (offset + limit) / cluster_size * cluster_size;
    len.min(end.saturating_sub(offset).max(1))
}

/// The clusters that lie within the range as a whole, first and end. The disk's last cluster
/// counts as whole when the range reaches the disk's end.
fn whole_clusters(qcow2: &Qcow2, offset: u64, len: u64, size: u64) -> (u64, u64) {
    let cluster_size = qcow2.cluster_size();
    let end = offset + len;
    let last = if end >= size {
        end.div_ceil(cluster_size)
    } else {
        end / cluster_size
    };
    (offset.div_ceil(cluster_size), last)
}
