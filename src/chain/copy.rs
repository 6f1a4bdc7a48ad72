//! Copying from the layers below into a layer: copy-on-read and streams.
//!
//! Invariant: what the guest wrote is never overwritten. A copy claims the clusters it works on
//! and looks at their mapping under the claim; guests that allocate hold the same claims.

use std::ops::Range;
use std::rc::Rc;

use super::{Chain, CopyStatus, Span, View};
use crate::error::Result;
use crate::format::qcow2::Clear;
use crate::format::{Format, Qcow2};
use crate::reactor::carry_out;
use crate::storage::buffer::is_zero;
use crate::storage::{AlignedBuf, IoBufs, Purpose, ScratchBuf};

/// Bytes that copy-on-read claims and copies at a time.
const COPY_ON_READ_STEP: u64 = 512 << 10;

/// What a copy did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes written as data.
    pub data: u64,
    /// Bytes recorded as zeros.
    pub zero: u64,
}

impl Chain {
    /// Whether who copies the clusters of a range up has to wait: for writes that are on their way into
    /// layers below the top, or for a snapshot.
    fn must_wait(&self, offset: u64, len: u64) -> bool {
        match &self.top().format {
            Format::Qcow2(image) => {
                let clusters = image.clusters_of(offset..offset + len);
                image.claims_are_closed() || image.late().in_the_way(&[clusters]).is_some()
            }
            Format::Raw(_) | Format::Qed(_) => false,
        }
    }
}

impl View {
    /// Copies what the top layer lacks of `[offset, offset + len)` into it.
    pub(super) async fn populate(self: &Rc<Self>, offset: u64, len: u64) -> Result<Copied> {
        let span = Span::new(0, self.chain.layers().len());
        let mut copied = Copied::default();
        let mut done = 0;
        while done < len {
            let (at, now) = (offset + done, (len - done).min(COPY_ON_READ_STEP));
            done += now;
            if self.chain.must_wait(at, now) {
                // A read does not; what it finds is not kept.
                continue;
            }
            let step = self.copy(span, at, now).await?;
            copied.data += step.data;
            copied.zero += step.zero;
        }
        Ok(copied)
    }

    /// Copies into the span's target what it lacks of the clusters of `[offset, offset + len)` and
    /// a layer below it and above the span's end has. Clusters of zeros are recorded as such.
    ///
    /// # Errors
    /// When a layer below cannot be read or the target cannot be written; what was copied before
    /// stays.
    pub async fn copy(self: &Rc<Self>, span: Span, offset: u64, len: u64) -> Result<Copied> {
        let view = self.clone();
        carry_out(async move { view.copy_into(span, offset, len).await }).await
    }

    async fn copy_into(&self, span: Span, offset: u64, len: u64) -> Result<Copied> {
        let layer = self.chain.layer(span.target)?;
        let Format::Qcow2(qcow2) = &layer.format else {
            // A raw layer has all of its bytes: nothing ever comes from below.
            return Ok(Copied::default());
        };
        let unit = qcow2.unit_size();
        let start = offset / unit * unit;
        // To where the data ends, not the disk: a size that is about to be smaller may stay after all.
        let stop = (offset + len)
            .next_multiple_of(unit)
            .min(layer.format.data_end());
        // Before the claim, so that no guest waits with it. A place may have more than the units that
        // are copied, but no more than their clusters.
        let clusters = qcow2.clusters_of(start..stop);
        let _claim = loop {
            qcow2.late().wait(clusters.clone()).await;
            let claim = qcow2.claim(start, stop.saturating_sub(start)).await;
            // A snapshot may have come in between.
            if qcow2
                .late()
                .in_the_way(std::slice::from_ref(&clusters))
                .is_none()
            {
                break claim;
            }
        };
        let mut copied = Copied::default();
        let mut at = start;
        while at < stop {
            let (status, now) = self.chain.status(span, at, stop - at).await?;
            let step = match status {
                CopyStatus::Present | CopyStatus::Absent => Copied::default(),
                CopyStatus::Zero => self.copy_zeros(qcow2, span, at, now).await?,
                CopyStatus::Data => self.copy_data(qcow2, span, at, now).await?,
            };
            copied.data += step.data;
            copied.zero += step.zero;
            at += now;
        }
        Ok(copied)
    }

    async fn copy_zeros(&self, qcow2: &Qcow2, span: Span, offset: u64, len: u64) -> Result<Copied> {
        let unit = qcow2.unit_size();
        if qcow2.has_zero_clusters() {
            qcow2.clear(offset, len, Clear::Zero).await?;
        } else if span.end < self.chain.layers().len() {
            // The base would come to light: without the zero flag, zeros are data.
            let zeros = AlignedBuf::zeroed(len.next_multiple_of(unit) as usize);
            // SAFETY: `zeros` outlives the writes.
            let bufs = unsafe { IoBufs::of(&zeros, 0, zeros.len()) };
            self.place(span, qcow2, offset, &bufs).await?;
        }
        Ok(Copied { data: 0, zero: len })
    }

    async fn copy_data(&self, qcow2: &Qcow2, span: Span, offset: u64, len: u64) -> Result<Copied> {
        let unit = qcow2.unit_size();
        let mut buffer = ScratchBuf::new(len.next_multiple_of(unit) as usize);
        // What the last cluster has past the disk's end.
        if let Some(rest) = buffer.get_mut(len as usize..) {
            rest.fill(0);
        }
        // SAFETY: `buffer` outlives the read.
        let bufs = unsafe { IoBufs::of(&buffer, 0, len as usize) };
        self.chain
            .read_from(span.target + 1, offset, &bufs, Purpose::Copy)
            .await?;
        let mut copied = Copied::default();
        for (start, end, zero) in runs(&buffer, 0, unit) {
            let at = offset + start as u64;
            let bytes = (end - start) as u64;
            if zero {
                copied.zero += self.copy_zeros(qcow2, span, at, bytes).await?.zero;
                continue;
            }
            copied.data += bytes;
            if span.compress {
                self.place_compressed(span, qcow2, at, &buffer, start..end)
                    .await?;
                continue;
            }
            // SAFETY: `buffer` outlives the writes.
            let part = unsafe { IoBufs::of(&buffer, start, end - start) };
            self.place(span, qcow2, at, &part).await?;
        }
        Ok(copied)
    }

    /// Writes a part of `buffer` compressed where that gains something, otherwise as it is.
    async fn place_compressed(
        &self,
        span: Span,
        qcow2: &Qcow2,
        offset: u64,
        buffer: &AlignedBuf,
        part: Range<usize>,
    ) -> Result<()> {
        let cluster = qcow2.cluster_size();
        let mut done = 0;
        while done < part.len() {
            let at = offset + done as u64;
            let len = (cluster - at % cluster).min((part.len() - done) as u64) as usize;
            let start = part.start + done;
            let bytes = buffer.get(start..start + len).unwrap_or_default();
            if !qcow2.write_compressed(at, bytes).await? {
                // SAFETY: `buffer` outlives the writes.
                let bufs = unsafe { IoBufs::of(buffer, start, len) };
                self.place(span, qcow2, at, &bufs).await?;
            }
            done += len;
        }
        Ok(())
    }

    /// Finds a place for `bytes`, which are whole units, writes and links them. The place may have
    /// more than they need, where a cluster is replaced that is compressed or somebody else's: the
    /// rest of it moves as well.
    async fn place(&self, span: Span, qcow2: &Qcow2, offset: u64, bytes: &IoBufs) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() as u64 {
            let at = offset + done;
            let left = bytes.len() as u64 - done;
            let target = qcow2.target(at, left).await?;
            let len = left.min(target.end - at);
            let bufs = bytes.slice(done as usize, len as usize);
            let filled = self.fill(span.target, target, at, &bufs, Purpose::Copy);
            if let Err(error) = filled.await {
                qcow2.abandon(target).await;
                return Err(error);
            }
            qcow2.link(target).await?;
            done += len;
        }
        Ok(())
    }
}

/// Runs of `bytes`, which lie at `offset` of a disk, that are all zeros or all not, by units of the
/// disk: start, end, zero.
pub(super) fn runs(bytes: &[u8], offset: u64, unit: u64) -> Vec<(usize, usize, bool)> {
    let mut runs: Vec<(usize, usize, bool)> = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        let to_boundary = unit - (offset + start as u64) % unit;
        let end = bytes.len().min(start + to_boundary as usize);
        let zero = bytes.get(start..end).is_some_and(is_zero);
        match runs.last_mut() {
            Some((_, last, same)) if *same == zero => *last = end,
            _ => runs.push((start, end, zero)),
        }
        start = end;
    }
    runs
}

#[cfg(test)]
mod tests {
    //! What would be caught: data taken for zeros, zeros taken for data, runs with gaps.

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_cover_everything_and_tell_zeros(
            clusters in prop::collection::vec(any::<Option<u16>>(), 1..40)
        ) {
            let mut bytes = vec![0u8; clusters.len() * 512];
            for (index, place) in clusters.iter().enumerate() {
                if let Some(place) = place {
                    bytes[index * 512 + *place as usize % 512] = 1;
                }
            }
            let mut at = 0;
            for (start, end, zero) in runs(&bytes, 0, 512) {
                prop_assert_eq!(start, at);
                for cluster in &clusters[start / 512..end / 512] {
                    prop_assert_eq!(cluster.is_none(), zero);
                }
                at = end;
            }
            prop_assert_eq!(at, bytes.len());
        }
    }
}
