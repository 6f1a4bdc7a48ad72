//! The proof that a repair leaves the disk as it was.
//!
//! The mapping of the disk before the repair is compared with the one after it, entry by entry, in
//! the way in which the most tolerant reader takes them: what a strict one refuses may be lost to
//! it, but not to a user who knows what to do. Bytes are compared only where an entry points
//! elsewhere, or where the repair writes.

use std::ops::Range;

use super::super::l2::{Descriptor, OFFSET, State};
use super::super::words::Words;
use super::entries;
use super::image::Image;
use crate::error::Result;
use crate::storage::AlignedBuf;

/// What a unit of the disk (a cluster, or a subcluster) reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// What lies below this layer.
    Below,
    /// Zeros.
    Zeros,
    /// Bytes of the image file, or of the data file.
    At(u64),
    /// Compressed bytes of the image file: offset and length.
    Compressed(u64, u64),
}

/// The first offset of the disk, if there is any, that could be read before, and reads
/// differently afterwards.
pub async fn difference(before: &Image<'_>, after: &Image<'_>) -> Result<Option<u64>> {
    let (old, new) = (&before.header, &after.header);
    let same_shape = old.size == new.size
        && old.cluster_bits == new.cluster_bits
        && old.version == new.version
        && before.shape.extended == after.shape.extended
        && before.shape.data_file == after.shape.data_file
        && old.backing == new.backing;
    if !same_shape {
        return Ok(Some(0));
    }
    let proof = Proof {
        before,
        after,
        written: after.to_be_written(),
    };
    if proof.written.is_empty() {
        return Ok(None);
    }
    let count = before.shape.l1_entries(old.size);
    let old = before.table(old.l1_offset, count).await?;
    let new = after.table(new.l1_offset, count).await?;
    let step = before.cluster_size() / before.shape.entry_bytes() * before.cluster_size();
    for (index, (&old, &new)) in old.iter().zip(&new).enumerate() {
        if old == 0 && new == 0 {
            continue;
        }
        let start = index as u64 * step;
        if let Some(offset) = proof.table(start, old & OFFSET, new & OFFSET).await? {
            return Ok(Some(offset));
        }
    }
    Ok(None)
}

struct Proof<'a, 's> {
    before: &'a Image<'s>,
    after: &'a Image<'s>,
    /// In ascending order.
    written: Vec<Range<u64>>,
}

impl Proof<'_, '_> {
    /// Compares the part of the disk from `start` on that two L2 tables map.
    async fn table(&self, start: u64, old: u64, new: u64) -> Result<Option<u64>> {
        let image = self.before;
        if !image.is_aligned(old) {
            // It could not be read.
            return Ok(None);
        }
        if !image.is_aligned(new) {
            return Ok(Some(start));
        }
        let unchanged = old == new && !self.writes(old, image.cluster_size());
        let old = read_table(self.before, old).await?;
        let changed = match unchanged {
            true => None,
            false => Some(read_table(self.after, new).await?),
        };
        let new = changed.as_ref().unwrap_or(&old);
        let pairs = entries::entries(image.shape, &old).zip(entries::entries(image.shape, new));
        for (index, (old, new)) in pairs.enumerate() {
            let at = start + index as u64 * image.cluster_size();
            if at >= image.header.size {
                break;
            }
            if old == Words::default() && new == old {
                continue;
            }
            if let Some(unit) = self.entry(old, new).await? {
                return Ok(Some(at + (unit << image.shape.unit_bits())));
            }
        }
        Ok(None)
    }

    /// The first unit of a cluster that reads differently.
    async fn entry(&self, old: Words, new: Words) -> Result<Option<u64>> {
        if !self.is_readable(old) {
            return Ok(None);
        }
        let shape = self.before.shape;
        for unit in 0..shape.units() {
            let sources = (
                source(shape.state(old, unit)),
                source(shape.state(new, unit)),
            );
            if !self.is_readable(new) || !self.same(sources.0, sources.1).await? {
                return Ok(Some(unit));
            }
        }
        Ok(None)
    }

    fn is_readable(&self, words: Words) -> bool {
        let shape = self.before.shape;
        match shape.descriptor(words.descriptor) {
            Descriptor::Host(host) => self.before.is_aligned(host.offset),
            Descriptor::Compressed { .. } => !shape.data_file,
            Descriptor::Zero(_) | Descriptor::None => true,
        }
    }

    async fn same(&self, old: Source, new: Source) -> Result<bool> {
        let unit = 1u64 << self.before.shape.unit_bits();
        if self.before.shape.data_file {
            // The repair does not touch that file.
            return Ok(old == new);
        }
        match (old, new) {
            (Source::At(at), _) if old == new && !self.writes(at, unit) => Ok(true),
            (Source::Compressed(at, len), _) if old == new && !self.writes(at, len) => Ok(true),
            (Source::At(_) | Source::Zeros, Source::At(_) | Source::Zeros) => {
                let old = bytes(self.before, old, unit).await?;
                Ok(*old == *bytes(self.after, new, unit).await?)
            }
            (Source::Compressed(_, one), Source::Compressed(_, other)) if one == other => {
                let old = bytes(self.before, old, one).await?;
                Ok(*old == *bytes(self.after, new, one).await?)
            }
            _ => Ok(old == new && old == Source::Below),
        }
    }

    /// Whether the repair writes to a range.
    fn writes(&self, offset: u64, len: u64) -> bool {
        let next = self.written.partition_point(|range| range.end <= offset);
        let next = self.written.get(next);
        next.is_some_and(|range| range.start < offset.saturating_add(len))
    }
}

fn source(state: State) -> Source {
    match state {
        State::Unallocated => Source::Below,
        State::Zero => Source::Zeros,
        State::Data(host) => Source::At(host.offset),
        State::Compressed { offset, len } => Source::Compressed(offset, len.into()),
    }
}

/// An L2 table; what is nowhere maps nothing.
async fn read_table(image: &Image<'_>, offset: u64) -> Result<AlignedBuf> {
    let len = image.cluster_size();
    if offset == 0 || offset >= image.len {
        return Ok(AlignedBuf::zeroed(len as usize));
    }
    image.read(offset, len as usize).await
}

async fn bytes(image: &Image<'_>, source: Source, len: u64) -> Result<AlignedBuf> {
    match source {
        Source::At(offset) | Source::Compressed(offset, _) if offset < image.len => {
            image.read(offset, len as usize).await
        }
        _ => Ok(AlignedBuf::zeroed(len as usize)),
    }
}
