//! L2 entries and the slices they are cached in.
//!
//! Source: QEMU's `docs/interop/qcow2`, section "Cluster mapping". Slices are read without a
//! lock: each entry is an atomic word, and the directory holds atomic pointers to slices.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::format::Compressed;

/// The refcount of what the entry points at is exactly one.
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// The host offset in an L1 or L2 entry.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Not in this layer.
    Unallocated,
    /// All zeros; a host cluster may be kept for later.
    Zero(Option<u64>),
    /// In the host cluster at this offset. `copied`: nobody else refers to it.
    Data {
        /// Host offset.
        offset: u64,
        /// Whether it may be written in place.
        copied: bool,
    },
    /// Compressed.
    Compressed {
        /// Host offset of the first byte.
        offset: u64,
        /// Bytes at most.
        len: u32,
    },
}

impl Entry {
    /// Decodes a word.
    #[must_use]
    pub fn decode(word: u64, cluster_bits: u32) -> Self {
        if word & COMPRESSED != 0 {
            let shift = 62 - (cluster_bits - 8);
            let descriptor = word & (COMPRESSED - 1);
            let offset = descriptor & ((1 << shift) - 1);
            let sectors = (descriptor >> shift) + 1;
            return Self::Compressed {
                offset,
                len: (sectors * 512 - offset % 512) as u32,
            };
        }
        let offset = word & OFFSET;
        if word & ZERO != 0 {
            return Self::Zero((offset != 0).then_some(offset));
        }
        match offset {
            0 => Self::Unallocated,
            offset => Self::Data {
                offset,
                copied: word & COPIED != 0,
            },
        }
    }

    /// The word for a data cluster of ours.
    #[must_use]
    pub fn data(offset: u64) -> u64 {
        offset | COPIED
    }

    /// The word for a cluster of zeros; `host` keeps its cluster.
    #[must_use]
    pub fn zero(host: Option<u64>) -> u64 {
        host.map_or(ZERO, |offset| offset | COPIED | ZERO)
    }

    /// Says what is wrong with a word that comes from an image.
    #[must_use]
    pub fn fault(word: u64, cluster_bits: u32, version: u32) -> Option<String> {
        let cluster = 1u64 << cluster_bits;
        match Self::decode(word, cluster_bits) {
            Self::Data { offset, .. } | Self::Zero(Some(offset)) if offset % cluster != 0 => {
                Some(format!(
                    "L2 entry {word:#018x} points at {offset:#x} (expected a multiple of the \
                     cluster size)"
                ))
            }
            Self::Zero(_) if version < 3 => Some(format!(
                "L2 entry {word:#018x} has the zero flag (expected in version 3)"
            )),
            Self::Compressed { offset: 0, .. } => Some(format!(
                "L2 entry {word:#018x}: a compressed cluster in the header"
            )),
            _ => None,
        }
    }

    /// The compressed cluster, with the position of the wanted byte in it.
    #[must_use]
    pub fn compressed(offset: u64, len: u32, within: u64) -> Compressed {
        Compressed {
            offset,
            len,
            within: within as u32,
        }
    }
}

/// A part of an L2 table in memory.
#[derive(Debug)]
pub struct Slice {
    entries: Box<[AtomicU64]>,
    /// Used since the eviction hand last came by.
    referenced: AtomicBool,
}

impl Slice {
    /// From the bytes of the file.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let entries = bytes
            .chunks_exact(8)
            .map(|word| AtomicU64::new(word.try_into().map_or(0, u64::from_be_bytes)))
            .collect();
        Self {
            entries,
            referenced: AtomicBool::new(true),
        }
    }

    /// As it goes to the file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.entries
            .iter()
            .flat_map(|e| e.load(Ordering::Relaxed).to_be_bytes())
            .collect()
    }

    /// Entry `index`; 0 past the end.
    #[must_use]
    pub fn get(&self, index: usize) -> u64 {
        self.entries
            .get(index)
            .map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// Sets entry `index`; returns what it was.
    pub fn set(&self, index: usize, word: u64) -> u64 {
        self.entries
            .get(index)
            .map_or(0, |entry| entry.swap(word, Ordering::AcqRel))
    }

    /// Every word.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        self.entries
            .iter()
            .map(|entry| entry.load(Ordering::Relaxed))
    }

    /// Notes a use; writes the flag only when it changes, so that readers share the line.
    pub fn touch(&self) {
        if !self.referenced.load(Ordering::Relaxed) {
            self.referenced.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it was used since the last call.
    pub fn take_referenced(&self) -> bool {
        self.referenced.swap(false, Ordering::Relaxed)
    }
}
