//! One L2 entry: what is wrong with it, what it refers to, and what it should be instead.
//!
//! The judgement is the same for the check and for the repair. An entry is replaced only where
//! what the guest reads stays the same, or could not be read at all.

use std::fmt;

use super::super::l2::{COMPRESSED, COPIED, Descriptor, OFFSET, Shape, ZERO};
use super::super::words::Words;

/// Bits of a standard cluster descriptor that must be 0. Bit 0 is the zero flag.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits of an L1 entry that must be 0.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// In a bitmap of subclusters: the data bits.
const DATA_BITS: u64 = 0xffff_ffff;

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Bits are set that must not be.
    Reserved,
    /// A compressed cluster is never written in place.
    CopiedCompressed,
    /// Compressed clusters are not in data files.
    CompressedInDataFile,
    /// Compressed clusters have no subclusters.
    CompressedWithBitmap,
    /// Subclusters that are both data and zeros.
    Conflict,
    /// Subclusters with data, but no cluster to hold it.
    DataNowhere,
    /// The host cluster begins inside a cluster.
    Misaligned,
    /// The host cluster lies behind the end of the file.
    PastEnd,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reserved => "has reserved bits set",
            Self::CopiedCompressed => "is compressed and has the copied flag",
            Self::CompressedInDataFile => "is compressed, but the image has a data file",
            Self::CompressedWithBitmap => "is compressed and has a bitmap of subclusters",
            Self::Conflict => "has subclusters that are both data and zeros",
            Self::DataNowhere => "has subclusters with data, but no host cluster",
            Self::Misaligned => "points inside a cluster",
            Self::PastEnd => "points past the end of the file",
        })
    }
}

/// What an entry refers to in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nothing.
    None,
    /// A cluster at this offset; it may be in a data file.
    Cluster(u64),
    /// Compressed bytes: offset and length.
    Compressed(u64, u64),
}

/// The judgement.
#[derive(Debug)]
pub struct Entry {
    /// What it refers to.
    pub target: Target,
    /// The target is in the image file and counts as referred to.
    pub counts: bool,
    /// What is wrong.
    pub faults: Vec<Fault>,
}

/// Judges an entry; `past_end` tells of a range whether it lies behind the end of the file.
pub fn judge(shape: Shape, words: Words, past_end: impl Fn(u64, u64) -> bool) -> Entry {
    let mut entry = Entry {
        target: target(shape, words),
        counts: false,
        faults: Vec::new(),
    };
    if words.descriptor & COMPRESSED == 0 && words.descriptor & RESERVED != 0 {
        entry.faults.push(Fault::Reserved);
    }
    match entry.target {
        Target::Compressed(offset, len) => {
            if words.descriptor & COPIED != 0 {
                entry.faults.push(Fault::CopiedCompressed);
            }
            if shape.data_file {
                entry.faults.push(Fault::CompressedInDataFile);
            } else if words.bitmap != 0 {
                entry.faults.push(Fault::CompressedWithBitmap);
            } else if past_end(offset, len) {
                entry.faults.push(Fault::PastEnd);
            } else {
                entry.counts = true;
            }
        }
        Target::Cluster(offset) => {
            let cluster = 1u64 << shape.cluster_bits;
            if words.bitmap >> 32 & words.bitmap != 0 {
                entry.faults.push(Fault::Conflict);
                return entry;
            }
            if !offset.is_multiple_of(cluster) {
                entry.faults.push(Fault::Misaligned);
            }
            if shape.data_file {
                return entry;
            }
            if past_end(offset, cluster) {
                entry.faults.push(Fault::PastEnd);
            } else {
                entry.counts = true;
            }
        }
        Target::None if words.bitmap & DATA_BITS != 0 => entry.faults.push(Fault::DataNowhere),
        Target::None => {}
    }
    entry
}

fn target(shape: Shape, words: Words) -> Target {
    match shape.descriptor(words.descriptor) {
        Descriptor::Compressed { offset, len } => Target::Compressed(offset, len.into()),
        Descriptor::Host(host) => Target::Cluster(host.offset),
        // A data file has no cluster to keep for zeros at offset 0: the flag has the last word.
        Descriptor::Zero(Some(host)) if host.offset != 0 => Target::Cluster(host.offset),
        Descriptor::Zero(_) | Descriptor::None => Target::None,
    }
}

/// What the entry should be instead; `None`: nothing better is known.
pub fn mended(shape: Shape, words: Words, faults: &[Fault]) -> Option<Words> {
    let mut new = words;
    for fault in faults {
        match fault {
            Fault::Reserved => new.descriptor &= !RESERVED,
            Fault::CopiedCompressed => new.descriptor &= !COPIED,
            Fault::CompressedWithBitmap => new.bitmap = 0,
            // Who reads the entry sees zeros there, too.
            Fault::Conflict => new.bitmap &= !(new.bitmap >> 32 & DATA_BITS),
            Fault::Misaligned => new = without_kept_cluster(shape, new).unwrap_or(new),
            Fault::PastEnd => new = zeros(shape, new).unwrap_or(new),
            Fault::CompressedInDataFile | Fault::DataNowhere => {}
        }
    }
    (new != words).then_some(new)
}

/// A cluster of zeros whose host cluster is given up; `None`: there is data in it.
fn without_kept_cluster(shape: Shape, words: Words) -> Option<Words> {
    let data = if shape.extended {
        words.bitmap & DATA_BITS != 0
    } else {
        words.descriptor & ZERO == 0
    };
    (!data).then(|| zero_descriptor(shape, words.bitmap))
}

/// What lies behind the end of the file reads as zeros; `None`: that cannot be recorded.
fn zeros(shape: Shape, words: Words) -> Option<Words> {
    if words.descriptor & COMPRESSED != 0 || shape.version < 3 {
        return None;
    }
    let bitmap = words.bitmap & !DATA_BITS | (words.bitmap & DATA_BITS) << 32;
    Some(zero_descriptor(shape, bitmap))
}

fn zero_descriptor(shape: Shape, bitmap: u64) -> Words {
    Words {
        descriptor: if shape.extended { 0 } else { ZERO },
        bitmap,
    }
}

/// The entry with the copied flag as it is to be; compressed clusters and those that are nowhere
/// have none.
pub fn with_copied(shape: Shape, words: Words, copied: bool) -> Words {
    let descriptor = match target(shape, words) {
        Target::Cluster(_) if copied => words.descriptor | COPIED,
        Target::Cluster(_) => words.descriptor & !COPIED,
        _ => words.descriptor,
    };
    Words {
        descriptor,
        ..words
    }
}

/// The entry with what it points at in another place.
pub fn with_host(shape: Shape, words: Words, offset: u64) -> Words {
    let field = if words.descriptor & COMPRESSED == 0 {
        OFFSET
    } else {
        (1 << (70 - shape.cluster_bits)) - 1
    };
    Words {
        descriptor: words.descriptor & !field | offset & field,
        ..words
    }
}

/// The cluster whose refcount decides about the copied flag.
pub fn flagged(shape: Shape, words: Words) -> Option<u64> {
    match target(shape, words) {
        Target::Cluster(offset) => Some(offset),
        _ => None,
    }
}

/// The entries of an L2 table.
pub fn entries(shape: Shape, table: &[u8]) -> impl Iterator<Item = Words> {
    let bytes = shape.entry_bytes() as usize;
    let word = |bytes: &[u8], at: usize| {
        let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
        word.map_or(0, u64::from_be_bytes)
    };
    table.chunks_exact(bytes).map(move |entry| Words {
        descriptor: word(entry, 0),
        bitmap: if shape.extended { word(entry, 8) } else { 0 },
    })
}

/// Puts entry `index` into an L2 table.
pub fn put(shape: Shape, table: &mut [u8], index: usize, words: Words) {
    let at = index * shape.entry_bytes() as usize;
    if let Some(place) = table.get_mut(at..at + 8) {
        place.copy_from_slice(&words.descriptor.to_be_bytes());
    }
    if shape.extended
        && let Some(place) = table.get_mut(at + 8..at + 16)
    {
        place.copy_from_slice(&words.bitmap.to_be_bytes());
    }
}
