//! What a layer and those below it hold, without reading the data.

use std::ops::Range;

use super::read::Found;
use super::{Chain, Source, Span};
use crate::error::Result;
use crate::format::{Format, Place};
use crate::storage::Storage;

/// Whether a range is to be copied by a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyStatus {
    /// The layer itself has it.
    Present,
    /// No layer above the base has it.
    Absent,
    /// The layers between say that it is zeros.
    Zero,
    /// A layer between has data.
    Data,
}

/// The layers that a copy takes from.
struct Between {
    layers: Range<usize>,
    /// The file system is asked for the holes of raw layers.
    sparse: bool,
}

impl Chain {
    /// Whether the layers from `first` on down say, without being read, that a range is zeros.
    pub(super) async fn is_zero(&self, first: usize, offset: u64, len: u64) -> Result<bool> {
        let mut done = 0;
        while done < len {
            let (found, now) = self.locate(first, offset + done, len - done).await?;
            if !matches!(found, Found::Plain(Source::Zero)) {
                return Ok(false);
            }
            done += now;
        }
        Ok(true)
    }

    /// Whether what is at `offset` is zeros without being read, and for how long that is so.
    pub(super) async fn hole(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        let (found, len) = self.locate(0, offset, len).await?;
        let Found::Plain(source) = found else {
            return Ok((false, len));
        };
        let Source::Storage { layer, offset } = source else {
            return Ok((true, len));
        };
        let layer = self.layer(layer)?;
        let Format::Raw(_) = layer.format else {
            return Ok((false, len));
        };
        let (status, len) = raw_status(&*layer.storage, offset, len).await;
        Ok((status == CopyStatus::Zero, len))
    }

    /// What a copy in `span` has to do from `offset` on, in whole clusters of its target, or
    /// subclusters where it has any.
    ///
    /// # Errors
    /// When metadata cannot be read.
    pub async fn status(&self, span: Span, offset: u64, len: u64) -> Result<(CopyStatus, u64)> {
        let target = span.target();
        let layer = self.layer(target)?;
        let cluster = layer.format.unit_size();
        let size = layer.format.data_end();
        let start = offset / cluster * cluster;
        let stop = (offset + len)
            .next_multiple_of(cluster)
            .min(size)
            .max(start + 1);
        let own = layer.map_loaded(start, stop - start).await?;
        if own.place != Place::Below {
            return Ok((CopyStatus::Present, clip(own.len, start, offset, len)));
        }
        let stop = stop.min(start + own.len);
        let between = Between {
            layers: target + 1..span.end(),
            sparse: span.is_sparse(),
        };
        let run = self.status_between(&between, start, stop, cluster).await?;
        Ok((run.0, clip(run.1, start, offset, len)))
    }

    /// What the layers above `end` hold from `offset` on, in whole blocks of `block` bytes: zeros where
    /// none has anything and there is none below. For jobs: the file system is asked for the holes of
    /// raw layers.
    ///
    /// # Errors
    /// When metadata cannot be read.
    pub async fn status_above(
        &self,
        end: usize,
        offset: u64,
        len: u64,
        block: u64,
    ) -> Result<(CopyStatus, u64)> {
        let start = offset / block * block;
        let stop = (offset + len).next_multiple_of(block).min(self.size());
        let between = Between {
            layers: 0..end,
            sparse: true,
        };
        let stop = stop.max(start + 1);
        let (status, run) = self.status_between(&between, start, stop, block).await?;
        let status = match status {
            CopyStatus::Absent if end >= self.layers().len() => CopyStatus::Zero,
            status => status,
        };
        Ok((status, clip(run, start, offset, len)))
    }

    /// The status of the clusters from `start` on that are all alike, and their length.
    async fn status_between(
        &self,
        between: &Between,
        start: u64,
        stop: u64,
        cluster: u64,
    ) -> Result<(CopyStatus, u64)> {
        let mut run: Option<CopyStatus> = None;
        let mut at = start;
        while at < stop {
            let (status, now) = self.extent_status(between, at, stop - at).await?;
            let whole = if at + now == stop {
                now
            } else {
                now / cluster * cluster
            };
            let (status, now) = if whole > 0 {
                (status, whole)
            } else {
                let stop = stop.min(at + cluster);
                (self.mixed_status(between, at, stop).await?, stop - at)
            };
            if *run.get_or_insert(status) != status {
                break;
            }
            at += now;
        }
        Ok((run.unwrap_or(CopyStatus::Absent), at - start))
    }

    /// The status of one cluster that consists of several extents.
    async fn mixed_status(&self, between: &Between, start: u64, stop: u64) -> Result<CopyStatus> {
        let mut all: Option<CopyStatus> = None;
        let mut at = start;
        while at < stop {
            let (status, now) = self.extent_status(between, at, stop - at).await?;
            all = Some(match (all, status) {
                (None, status) => status,
                (Some(a), b) if a == b => a,
                // Without a base what nobody has is zeros; with one it would have to be read.
                (
                    Some(CopyStatus::Zero | CopyStatus::Absent),
                    CopyStatus::Zero | CopyStatus::Absent,
                ) if between.layers.end >= self.layers().len() => CopyStatus::Zero,
                _ => CopyStatus::Data,
            });
            at += now;
        }
        Ok(all.unwrap_or(CopyStatus::Absent))
    }

    async fn extent_status(
        &self,
        between: &Between,
        offset: u64,
        len: u64,
    ) -> Result<(CopyStatus, u64)> {
        let mut len = len;
        let Range { start, end } = between.layers;
        for layer in self.layers().iter().take(end).skip(start) {
            let extent = layer.map_loaded(offset, len).await?;
            len = extent.len;
            match extent.place {
                Place::Below => {}
                Place::Zero => return Ok((CopyStatus::Zero, len)),
                Place::Data(at) if between.sparse && matches!(layer.format, Format::Raw(_)) => {
                    return Ok(raw_status(&*layer.storage, at, len).await);
                }
                _ => return Ok((CopyStatus::Data, len)),
            }
        }
        Ok((CopyStatus::Absent, len))
    }
}

/// What a raw layer has at `at` of its storage: the holes of a sparse file are zeros.
async fn raw_status(storage: &dyn Storage, at: u64, len: u64) -> (CopyStatus, u64) {
    match storage.next_data(at).await {
        None => (CopyStatus::Zero, len),
        Some((start, _)) if start > at => (CopyStatus::Zero, len.min(start - at)),
        Some((_, end)) => (CopyStatus::Data, len.min(end.saturating_sub(at)).max(1)),
    }
}

/// The part of a run from `start` that lies in `[offset, offset + len)`; at least one byte.
fn clip(run: u64, start: u64, offset: u64, len: u64) -> u64 {
    (start + run).saturating_sub(offset).clamp(1, len.max(1))
}
