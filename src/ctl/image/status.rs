//! Where the bytes of a disk are, as QEMU's tools tell it.

use crate::chain::{Chain, Layer};
use crate::error::Result;
use crate::format::{Format, Place};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

/// What is known of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeStatus {
    /// The layer that decides, 0 being the top.
    pub depth: usize,
    /// That layer says so itself; otherwise nothing lies below it.
    pub present: bool,
    /// There are bytes to be read.
    pub data: bool,
    /// It reads as zeros.
    pub zero: bool,
    /// It is compressed.
    pub compressed: bool,
    /// Where it is, or has its place, in the layer's file.
    pub offset: Option<u64>,
    /// How many bytes.
    pub len: u64,
}

impl RangeStatus {
    fn zeros(depth: usize, len: u64) -> Self {
        Self {
            depth,
            present: false,
            data: false,
            zero: true,
            compressed: false,
            offset: None,
            len,
        }
    }
}

/// Tells the status of the ranges of a disk.
pub struct Mapper {
    chain: Arc<Chain>,
    /// For each layer: whether the file system is asked about holes under its data.
    holes: Vec<bool>,
}

impl Mapper {
    /// For the disk that `chain` is.
    pub async fn new(chain: Arc<Chain>) -> Result<Self> {
        let mut holes = Vec::new();
        for layer in chain.layers() {
            holes.push(match &layer.format {
                Format::Raw(_) => true,
                Format::Qcow2(image) => {
                    let file = std::fs::metadata(image.storage().name());
                    let allocated = file.map_or(u64::MAX / 2, |file| file.blocks() * 512);
                    image.looks_preallocated(allocated).await?
                }
                Format::Qed(_) => false,
            });
        }
        Ok(Self { chain, holes })
    }

    /// The disk.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// The status of a range from `offset` on, which lies within the disk, at most `len` bytes.
    pub async fn status(&self, offset: u64, len: u64) -> Result<RangeStatus> {
        let layers = self.chain.layers();
        let mut len = len;
        for (depth, layer) in layers.iter().enumerate() {
            let extent = layer.map_loaded(offset, len).await?;
            len = extent.len;
            if extent.place != Place::Below {
                return Ok(self.here(depth, layer, extent.place, offset, len).await);
            }
            let more = layers
                .get(depth + 1)
                .is_some_and(|below| offset < below.format.size());
            if !more {
                let (offset, len) = kept(layer, offset, len);
                return Ok(RangeStatus {
                    offset,
                    ..RangeStatus::zeros(depth, len)
                });
            }
        }
        Ok(RangeStatus::zeros(layers.len(), len))
    }

    /// The status of what layer `depth` has itself.
    async fn here(
        &self,
        depth: usize,
        layer: &Layer,
        place: Place,
        offset: u64,
        len: u64,
    ) -> RangeStatus {
        let zeros = RangeStatus {
            present: true,
            ..RangeStatus::zeros(depth, len)
        };
        let data = RangeStatus {
            data: true,
            zero: false,
            ..zeros
        };
        match place {
            Place::Data(host) => {
                let (hole, len) = if self.holes.get(depth) == Some(&true) {
                    hole(layer, host, len).await
                } else {
                    (false, len)
                };
                let raw = matches!(layer.format, Format::Raw(_));
                RangeStatus {
                    data: !(hole && raw),
                    zero: hole,
                    offset: Some(host),
                    len,
                    ..data
                }
            }
            Place::Compressed(_) => RangeStatus {
                compressed: true,
                ..data
            },
            Place::Zero | Place::Below | Place::Unknown => {
                let (offset, len) = kept(layer, offset, len);
                RangeStatus {
                    offset,
                    len,
                    ..zeros
                }
            }
        }
    }
}

fn kept(layer: &Layer, offset: u64, len: u64) -> (Option<u64>, u64) {
    match &layer.format {
        Format::Qcow2(image) => image.kept_place(offset, len),
        Format::Raw(_) | Format::Qed(_) => (None, len),
    }
}

/// Whether the layer's file has a hole at `offset`, and how far that goes on.
async fn hole(layer: &Layer, offset: u64, len: u64) -> (bool, u64) {
    match layer.storage.next_data(offset).await {
        None => (true, len),
        Some((start, _)) if start > offset => (true, len.min(start - offset)),
        Some((_, end)) => (false, len.min(end.saturating_sub(offset).max(1))),
    }
}
