//! Writing that needs more than a store in place: allocation, copy-on-write, zeroes, discards.
//!
//! What has begun is carried out, whether or not it is waited for: a write that is on its way keeps
//! its claim and its view, so that nobody overtakes it or uses its cluster for something else.
//!
//! Invariant: a claim on a cluster is held while its mapping is changed.
//! The data of a new cluster is written before the cluster is linked, so no reader ever sees it
//! half filled.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::join;

use super::{Layer, View};
use crate::error::{Action, Error, Result};
use crate::format::qcow2::{Clear, Target};
use crate::format::{Format, Place, Qcow2};
use crate::planted::{Fault, is_planted};
use crate::reactor::carry_out;
use crate::storage::{self, AlignedBuf, IoBufs, Purpose, ScratchBuf};

/// Guest bytes allocated at a time: bounds the buffers and lets others have the clusters.
const ALLOCATE_AT_ONCE: u64 = 2 << 20;
/// Guest bytes whose mapping is cleared at a time.
const CLEAR_AT_ONCE: u64 = 64 << 20;
/// New data up to this length is read over where both sides of it must be read.
const READ_THROUGH: usize = 32 << 10;
/// Zeros are written from a buffer of this size where they cannot be recorded.
const ZERO_CHUNK: u64 = 256 << 10;

impl View {
    /// Writes `bufs` at `offset` of the disk.
    ///
    /// # Errors
    /// When the top layer is read-only or cannot be written.
    pub async fn write(self: Rc<Self>, offset: u64, bufs: IoBufs) -> Result<()> {
        self.chain.note_write(offset, bufs.len() as u64);
        carry_out(async move {
            match &self.chain.tap {
                None => self.write_top(offset, bufs).await,
                Some(tap) => Box::pin(self.write_tapped(tap, offset, bufs)).await,
            }
        })
        .await
    }

    pub(super) async fn write_top(&self, offset: u64, bufs: IoBufs) -> Result<()> {
        let top = self.writable_top()?;
        match &top.format {
            Format::Raw(_) => top.store(offset, &bufs, Purpose::Data).await,
            Format::Qcow2(qcow2) => self.write_qcow2(top, qcow2, offset, &bufs).await,
            Format::Qed(_) => Err(top.not_writable()),
        }
    }

    /// Makes `[offset, offset + len)` read as zeros; with `unmap` its space may be given back.
    ///
    /// # Errors
    /// As for [`View::write`].
    pub async fn write_zeroes(self: Rc<Self>, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.chain.note_write(offset, len);
        carry_out(async move {
            match &self.chain.tap {
                None => self.zero_top(offset, len, unmap).await,
                Some(tap) => Box::pin(self.zero_tapped(tap, offset, len, unmap)).await,
            }
        })
        .await
    }

    pub(super) async fn zero_top(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let top = self.writable_top()?;
        match &top.format {
            Format::Raw(_) => {
                top.whole_blocks(offset, len)?;
                let to = Purpose::Data.on(&*top.storage);
                storage::io::zero(to, offset, len, unmap && top.discard)
                    .await
                    .map_err(|error| top.io_error(Action::Write, offset, &error))
            }
            Format::Qcow2(qcow2) => self.zero_qcow2(top, qcow2, offset, len, unmap).await,
            Format::Qed(_) => Err(top.not_writable()),
        }
    }

    /// Tells the layer that the guest needs `[offset, offset + len)` no longer.
    ///
    /// # Errors
    /// As for [`View::write`].
    pub async fn discard(self: Rc<Self>, offset: u64, len: u64) -> Result<()> {
        if self.chain.top().discard {
            self.chain.note_write(offset, len);
        }
        carry_out(async move {
            match &self.chain.tap {
                None => self.discard_top(offset, len).await,
                Some(tap) => Box::pin(self.discard_tapped(tap, offset, len)).await,
            }
        })
        .await
    }

    pub(super) async fn discard_top(&self, offset: u64, len: u64) -> Result<()> {
        let top = self.writable_top()?;
        if !top.discard {
            return Ok(());
        }
        match &top.format {
            Format::Raw(_) => storage::io::discard(Purpose::Discard.on(&*top.storage), offset, len)
                .await
                .map_err(|error| top.io_error(Action::Write, offset, &error)),
            Format::Qcow2(qcow2) => self.discard_qcow2(top, qcow2, offset, len).await,
            Format::Qed(_) => Err(top.not_writable()),
        }
    }

    pub(super) fn writable_top(&self) -> Result<&Arc<Layer>> {
        let top = self.chain.top();
        if top.read_only {
            return Err(top.not_writable());
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
            if let Some((_, now)) = top.format.map_write(at, len - done) {
                // A snapshot may come to share the cluster while this is on its way.
                let _landing = qcow2.late().add(at..at + now);
                let Some((host, now)) = top.format.map_write(at, now) else {
                    continue;
                };
                let part = bufs.slice(done as usize, now as usize);
                top.store(host, &part, Purpose::Data).await?;
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
    /// when the clusters have been allocated by somebody else meanwhile, or what is to be copied
    /// had to be waited for.
    async fn write_new(
        &self,
        top: &Layer,
        qcow2: &Qcow2,
        offset: u64,
        bufs: &IoBufs,
    ) -> Result<u64> {
        let len = bufs.len() as u64;
        let claim = qcow2.claim(offset, len).await;
        let extent = top.map_loaded(offset, len).await?;
        if top.format.map_write(offset, 1).is_some() {
            return Ok(0);
        }
        let target = qcow2.target(offset, len.min(extent.len)).await?;
        let len = len.min(extent.len).min(target.end - offset);
        let around = [target.start..offset, offset + len..target.end];
        if let Some(ended) = qcow2.late().in_the_way(&around) {
            // Without the claim: who replaces whole clusters need not wait.
            Box::pin(qcow2.abandon(target)).await;
            drop(claim);
            ended.await;
            return Ok(0);
        }
        let part = bufs.slice(0, len as usize);
        let result = self.fill(0, target, offset, &part, Purpose::Data).await;
        if let Err(error) = result {
            Box::pin(qcow2.abandon(target)).await;
            return Err(error);
        }
        qcow2.link(target).await?;
        Ok(len)
    }

    /// Writes `bufs` into its new place in a layer, with what was there before around it.
    pub(super) async fn fill(
        &self,
        layer: usize,
        target: Target,
        offset: u64,
        bufs: &IoBufs,
        purpose: Purpose,
    ) -> Result<()> {
        let end = offset + bufs.len() as u64;
        // The bytes to be read; what is fresh and was zero needs neither a read nor a write.
        let fresh = target.fresh;
        let head = self.to_copy(layer, fresh, target.start..offset).await?;
        let tail = self.to_copy(layer, fresh, end..target.end).await?;
        let to = self.chain.layer(layer)?;
        let at = target.host + (head.start - target.start);
        if head.is_empty() && tail.is_empty() {
            return to.store(at, bufs, purpose).await;
        }
        // Apart: it is much, and most futures of writes need no room for it.
        let parts = (head, bufs, tail);
        Box::pin(self.fill_around(layer, to, at, parts)).await
    }

    /// Writes new data at `at`, between what a layer's disk holds before and behind it.
    async fn fill_around(
        &self,
        layer: usize,
        to: &Layer,
        at: u64,
        (head, bufs, tail): (Range<u64>, &IoBufs, Range<u64>),
    ) -> Result<()> {
        // Lists are let go of before their buffers, which are used again if nobody has them.
        if !head.is_empty() && !tail.is_empty() && bufs.len() <= READ_THROUGH {
            // One read in place of two.
            let old = self.old_bytes(layer, head.start..tail.end).await?;
            let first = (head.end - head.start) as usize;
            let last = (tail.start - head.start) as usize;
            // SAFETY: nobody changes the buffer.
            let part = |start, len| unsafe { IoBufs::of(&old, start, len) };
            let (head, tail) = (part(0, first), part(last, old.len() - last));
            let all = IoBufs::joined(&[head, bufs.clone(), tail]);
            return to.store(at, &all, Purpose::CopyOnWrite).await;
        }
        // Both to their end: what one uses is not left behind where the other fails.
        let (head, tail) = join(self.old_bytes(layer, head), self.old_bytes(layer, tail)).await;
        let (head, tail) = (head?, tail?);
        // SAFETY: nobody changes the buffers.
        let whole = |buffer: &ScratchBuf| unsafe { IoBufs::of(buffer, 0, buffer.len()) };
        let all = IoBufs::joined(&[whole(&head), bufs.clone(), whole(&tail)]);
        to.store(at, &all, Purpose::CopyOnWrite).await
    }

    /// What of a part around new data must be copied: all of it, or nothing (an empty range at its
    /// end) where its new place reads as zeros and so did it.
    async fn to_copy(&self, layer: usize, fresh: bool, part: Range<u64>) -> Result<Range<u64>> {
        let to = self.chain.layer(layer)?;
        let within = part
            .end
            .min(to.format.data_end())
            .saturating_sub(part.start);
        // Whole blocks are written: where the disk ends within one, the rest goes with it.
        let block = to.storage.limits().offset_align.max(1);
        let apart = part.start.is_multiple_of(block) && part.end.is_multiple_of(block);
        let nothing = part.is_empty()
            || (fresh && apart && self.chain.is_zero(layer, part.start, within).await?);
        Ok(if nothing { part.end..part.end } else { part })
    }

    /// What a part of the disk holds so far, seen from a layer; zeros past the layer's end.
    async fn old_bytes(&self, layer: usize, part: Range<u64>) -> Result<ScratchBuf> {
        let mut buffer = ScratchBuf::new((part.end - part.start) as usize);
        let end = self.chain.layer(layer)?.format.data_end();
        let within = part.end.min(end).saturating_sub(part.start) as usize;
        if let Some(past) = buffer.get_mut(within..) {
            past.fill(0);
        }
        // SAFETY: `buffer` outlives the read.
        let bufs = unsafe { IoBufs::of(&buffer, 0, within) };
        self.chain
            .read_from(layer, part.start, &bufs, Purpose::CopyOnWrite)
            .await?;
        Ok(buffer)
    }

    async fn zero_qcow2(
        &self,
        top: &Layer,
        qcow2: &Qcow2,
        offset: u64,
        len: u64,
        unmap: bool,
    ) -> Result<()> {
        let (start, end) = whole_units(qcow2, offset, len, self.chain.mapped_end);
        if start >= end {
            return self.write_zero_bytes(top, qcow2, offset, len).await;
        }
        self.write_zero_bytes(top, qcow2, offset, start - offset)
            .await?;
        self.write_zero_bytes(top, qcow2, end, offset + len - end)
            .await?;
        let how = match (
            qcow2.has_zero_clusters(),
            qcow2.is_overlay(),
            unmap && top.discard,
        ) {
            (true, _, true) => Clear::Zero,
            (true, _, false) => Clear::ZeroKeep,
            // Without the zero flag an unallocated cluster is zero if nothing lies below, for any
            // request: those of older chains, too.
            (false, false, _) => Clear::Unmap,
            (false, true, _) => return self.write_zero_bytes(top, qcow2, start, end - start).await,
        };
        self.clear_units(top, qcow2, start..end, how, true).await
    }

    async fn discard_qcow2(&self, top: &Layer, qcow2: &Qcow2, offset: u64, len: u64) -> Result<()> {
        let (start, end) = whole_units(qcow2, offset, len, self.chain.mapped_end);
        if start >= end {
            return Ok(());
        }
        let how = match (qcow2.has_zero_clusters(), qcow2.is_overlay()) {
            (_, false) => Clear::Unmap,
            (true, true) if is_planted(Fault::DiscardUnmaps) => Clear::Unmap,
            (true, true) => Clear::Zero,
            // What lies below would come to light.
            (false, true) => return Ok(()),
        };
        self.clear_units(top, qcow2, start..end, how, false).await
    }

    /// Clears whole units, skipping what needs no change, and claiming no more than an extent at
    /// a time. Of a compressed cluster that is cut, the part is written as zeros. What the image
    /// will not clear now is written as zeros if it `must` read so, and left as it is otherwise.
    async fn clear_units(
        &self,
        top: &Layer,
        qcow2: &Qcow2,
        Range { start, end }: Range<u64>,
        how: Clear,
        must: bool,
    ) -> Result<()> {
        let cluster_size = qcow2.cluster_size();
        let mut at = start;
        while at < end {
            let claim = qcow2.claim(at, (end - at).min(CLEAR_AT_ONCE)).await;
            let extent = top.map_loaded(at, end - at).await?;
            let len = extent.len.min(CLEAR_AT_ONCE);
            let needless = match extent.place {
                Place::Below => !qcow2.is_overlay(),
                Place::Zero => how != Clear::Unmap && how != Clear::Zero,
                _ => false,
            };
            // Where the disk ends its last cluster does.
            let all = match at + len >= self.chain.mapped_end {
                true => (at + len).next_multiple_of(cluster_size) - at,
                false => len,
            };
            let cut = !(at.is_multiple_of(cluster_size) && all.is_multiple_of(cluster_size));
            if !needless && cut && matches!(extent.place, Place::Compressed(_)) {
                drop(claim);
                self.write_zero_bytes(top, qcow2, at, len).await?;
            } else if !needless {
                let cleared = qcow2.clear(at, all, how).await?;
                drop(claim);
                if must && cleared < len {
                    self.write_zero_bytes(top, qcow2, at + cleared, len - cleared)
                        .await?;
                }
            }
            at += if needless { extent.len } else { len };
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
}

impl Layer {
    fn not_writable(&self) -> Error {
        Error::Invalid(format!("node '{}' is read-only", self.name))
    }

    /// Refuses a range of the storage that is not whole blocks: the rest of its blocks would have
    /// to be read and written back, over what others write there meanwhile. Guests are told the
    /// size of the blocks, and keep to it.
    fn whole_blocks(&self, at: u64, len: u64) -> Result<()> {
        let block = self.storage.limits().offset_align.max(1);
        if at.is_multiple_of(block) && len.is_multiple_of(block) {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{}: write of {len} bytes at offset {at}: not whole blocks (expected multiples of \
             {block}, or cache.direct=off)",
            self.storage.name()
        )))
    }

    /// Writes at an offset of the storage.
    pub(super) async fn store(&self, at: u64, bufs: &IoBufs, purpose: Purpose) -> Result<()> {
        self.whole_blocks(at, bufs.len() as u64)?;
        storage::io::write(purpose.on(&*self.storage), bufs, at)
            .await
            .map_err(|error| self.io_error_of(Action::Write, purpose, at, &error))
    }
}

/// How much of a write to allocate at once: up to a cluster boundary.
fn allocation_step(qcow2: &Qcow2, offset: u64, len: u64) -> u64 {
    let cluster_size = qcow2.cluster_size();
    let limit = ALLOCATE_AT_ONCE.max(cluster_size);
    let end = (offset + limit) / cluster_size * cluster_size;
    len.min(end.saturating_sub(offset).max(1))
}

/// The part of a range that is whole units, start and end. The disk's last unit counts as whole
/// when the range reaches the disk's end.
fn whole_units(qcow2: &Qcow2, offset: u64, len: u64, disk_end: u64) -> (u64, u64) {
    let unit = qcow2.unit_size();
    let end = offset + len;
    let last = if end >= disk_end {
        end
    } else {
        end / unit * unit
    };
    (offset.next_multiple_of(unit), last)
}
