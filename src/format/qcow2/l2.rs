//! L2 entries and the slices they are cached in.
//!
//! Source: QEMU's `docs/interop/qcow2`, sections "Cluster mapping", "Standard cluster
//! descriptor" and "Extended L2 entries". An entry is one word, or two where clusters have
//! subclusters: [`Words`] holds both kinds. Slices are read without a lock: words are atomic, the
//! directory holds atomic pointers to slices, and entries of two words are guarded by a sequence
//! count, since both must come from the same instant.

use std::ops::Range;

use super::journal::Recorded;
use super::words::Words;
use crate::format::Compressed;
use crate::sync::{
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
    spin_loop,
};

/// The refcount of what the entry points at is exactly one.
pub const COPIED: u64 = 1 << 63;
/// The entry is of a compressed cluster.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros; there is no such flag where there are subclusters.
pub(super) const ZERO: u64 = 1;
/// The host offset in an L1 or L2 entry.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Subclusters of a cluster, where it has any.
pub const SUBCLUSTERS: u32 = 32;
/// In the second word: every subcluster reads as zeros.
const ALL_ZERO: u64 = 0xffff_ffff << 32;
/// In the second word: every subcluster is in the host cluster.
const ALL_DATA: u64 = 0xffff_ffff;

/// What an entry means depends on the image.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Entries have a bitmap of subclusters.
    pub extended: bool,
    /// Host offsets are in a data file, where 0 is an offset like others.
    pub data_file: bool,
    /// 2 or 3.
    pub version: u32,
}

/// What a cluster descriptor says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptor {
    /// No host cluster, and no zero flag.
    None,
    /// The zero flag; a host cluster may be kept for later.
    Zero(Option<Host>),
    /// A host cluster.
    Host(Host),
    /// Compressed.
    Compressed {
        /// Host offset of the first byte.
        offset: u64,
        /// Bytes at most.
        len: u32,
    },
}

/// A host cluster that an entry points at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its offset.
    pub offset: u64,
    /// Nobody else refers to it: it may be written in place.
    pub owned: bool,
}

/// What is known of one unit: a cluster, or a subcluster where there are any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not in this layer.
    Unallocated,
    /// All zeros.
    Zero,
    /// In the file; the offset is the unit's own.
    Data(Host),
    /// In a compressed cluster.
    Compressed {
        /// Host offset of the first byte.
        offset: u64,
        /// Bytes at most.
        len: u32,
    },
}

impl Shape {
    /// Units in a cluster.
    #[must_use]
    pub fn units(self) -> u64 {
        if self.extended { SUBCLUSTERS.into() } else { 1 }
    }

    /// Logarithm of a unit's size in bytes.
    #[must_use]
    pub fn unit_bits(self) -> u32 {
        if self.extended {
            self.cluster_bits - SUBCLUSTERS.trailing_zeros()
        } else {
            self.cluster_bits
        }
    }

    /// Bytes of an entry.
    #[must_use]
    pub fn entry_bytes(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// L1 entries that a disk of `size` bytes needs.
    #[must_use]
    pub fn l1_entries(self, size: u64) -> u64 {
        let cluster = 1u64 << self.cluster_bits;
        size.div_ceil(cluster)
            .div_ceil(cluster / self.entry_bytes())
    }

    /// Decodes the descriptor of an entry.
    #[must_use]
    pub fn descriptor(self, word: u64) -> Descriptor {
        if word & COMPRESSED != 0 {
            let shift = 62 - (self.cluster_bits - 8);
            let field = word & (COMPRESSED - 1);
            let offset = field & ((1 << shift) - 1);
            let sectors = (field >> shift) + 1;
            return Descriptor::Compressed {
                offset,
                len: (sectors * 512 - offset % 512) as u32,
            };
        }
        let host = Host {
            offset: word & OFFSET,
            owned: word & COPIED != 0,
        };
        let exists = host.offset != 0 || (self.data_file && host.owned);
        if word & ZERO != 0 && !self.extended {
            return Descriptor::Zero(exists.then_some(host));
        }
        if exists {
            Descriptor::Host(host)
        } else {
            Descriptor::None
        }
    }

    /// The host cluster of an entry that is not compressed.
    #[must_use]
    pub fn host(self, words: Words) -> Option<Host> {
        match self.descriptor(words.descriptor) {
            Descriptor::Host(host) | Descriptor::Zero(Some(host)) => Some(host),
            _ => None,
        }
    }

    /// The bytes of the file that an entry refers to: those of a host cluster, or compressed ones.
    #[must_use]
    pub fn extent(self, words: Words) -> Option<Range<u64>> {
        match self.descriptor(words.descriptor) {
            Descriptor::Host(host) | Descriptor::Zero(Some(host)) => {
                Some(host.offset..host.offset + (1 << self.cluster_bits))
            }
            Descriptor::Compressed { offset, len } => Some(offset..offset + u64::from(len)),
            Descriptor::None | Descriptor::Zero(None) => None,
        }
    }

    /// The clusters that bytes of the file are in.
    #[must_use]
    pub fn clusters(self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start >> self.cluster_bits..bytes.end.div_ceil(1 << self.cluster_bits)
    }

    /// The state of unit `unit` of a cluster.
    #[must_use]
    pub fn state(self, words: Words, unit: u64) -> State {
        match self.descriptor(words.descriptor) {
            Descriptor::Compressed { offset, len } => State::Compressed { offset, len },
            Descriptor::Zero(_) => State::Zero,
            Descriptor::Host(host) if !self.extended => State::Data(host),
            Descriptor::None if !self.extended => State::Unallocated,
            _ if words.bitmap >> (32 + unit) & 1 == 1 => State::Zero,
            Descriptor::Host(host) if words.bitmap >> unit & 1 == 1 => State::Data(Host {
                offset: host.offset + (unit << self.unit_bits()),
                ..host
            }),
            _ => State::Unallocated,
        }
    }

    /// How many units from `unit` on, up to the cluster's end, are in the same state as it.
    #[must_use]
    pub fn same(self, words: Words, unit: u64) -> u64 {
        if !self.extended {
            return 1;
        }
        let left = u64::from(SUBCLUSTERS) - unit;
        let (data, zero) = (
            words.bitmap & ALL_DATA,
            (words.bitmap & ALL_ZERO) >> SUBCLUSTERS,
        );
        let run = match self.state(words, unit) {
            State::Compressed { .. } => return left,
            State::Zero => (zero >> unit).trailing_ones(),
            State::Data(_) => ((data & !zero) >> unit).trailing_ones(),
            State::Unallocated if self.host(words).is_none() => (zero >> unit).trailing_zeros(),
            State::Unallocated => ((data | zero) >> unit).trailing_zeros(),
        };
        u64::from(run).min(left)
    }

    /// The entry of a cluster that is owned and holds data in `units`, with what `old` says of the
    /// other units. `units` are all unless `old` has no host cluster, or the same.
    #[must_use]
    pub fn data(self, host: u64, units: Range<u64>, old: Words) -> Words {
        let descriptor = host | COPIED;
        if !self.extended {
            return Words {
                descriptor,
                bitmap: 0,
            };
        }
        let mask = unit_mask(units);
        if mask == ALL_DATA {
            return Words {
                descriptor,
                bitmap: ALL_DATA,
            };
        }
        // Bits without a host cluster, or beside a compressed one, mean nothing.
        let data = match self.host(old) {
            Some(_) => old.bitmap & ALL_DATA,
            None => 0,
        };
        let zero = match self.descriptor(old.descriptor) {
            Descriptor::Compressed { .. } => 0,
            _ => old.bitmap & ALL_ZERO,
        };
        Words {
            descriptor,
            bitmap: (data | mask) | (zero & !(mask << SUBCLUSTERS)),
        }
    }

    /// The entry of a cluster whose `units` read as zeros; `keep`: its host cluster stays.
    #[must_use]
    pub fn zero(self, units: Range<u64>, keep: bool, old: Words) -> Words {
        let kept = self.host(old).filter(|host| keep && host.owned);
        let descriptor = kept.map_or(0, |host| host.offset | COPIED);
        if !self.extended {
            return Words {
                descriptor: descriptor | ZERO,
                bitmap: 0,
            };
        }
        let mask = unit_mask(units);
        if mask == ALL_DATA {
            return Words {
                descriptor,
                bitmap: ALL_ZERO,
            };
        }
        Words {
            descriptor: old.descriptor,
            bitmap: (old.bitmap & !mask) | mask << SUBCLUSTERS,
        }
    }

    /// The entry of a cluster of which those of `units` that are not data read as zeros.
    #[must_use]
    pub fn zero_absent(self, units: Range<u64>, old: Words) -> Words {
        if !self.extended {
            return match self.state(old, 0) {
                State::Unallocated => self.zero(units, false, old),
                _ => old,
            };
        }
        let absent = unit_mask(units) & !(old.bitmap & ALL_DATA);
        Words {
            bitmap: old.bitmap | absent << SUBCLUSTERS,
            ..old
        }
    }

    /// The entry of a cluster whose `units` are not in this layer.
    #[must_use]
    pub fn unallocated(self, units: Range<u64>, old: Words) -> Words {
        let mask = unit_mask(units);
        let bitmap = old.bitmap & !(mask | mask << SUBCLUSTERS);
        if !self.extended || bitmap == 0 {
            return Words::default();
        }
        Words {
            descriptor: old.descriptor,
            bitmap,
        }
    }

    /// Whether a part of the cluster can be changed without the rest: a compressed cluster is one
    /// piece.
    #[must_use]
    pub fn divisible(self, words: Words) -> bool {
        self.extended && words.descriptor & COMPRESSED == 0
    }

    /// Says what is wrong with an entry that comes from an image.
    #[must_use]
    pub fn fault(self, words: Words) -> Option<String> {
        let word = words.descriptor;
        let cluster = 1u64 << self.cluster_bits;
        match self.descriptor(word) {
            Descriptor::Host(host) | Descriptor::Zero(Some(host)) if host.offset % cluster != 0 => {
                return Some(format!(
                    "L2 entry {word:#018x} points at {:#x} (expected a multiple of the cluster \
                     size)",
                    host.offset
                ));
            }
            Descriptor::Zero(_) if self.version < 3 => {
                return Some(format!(
                    "L2 entry {word:#018x} has the zero flag (expected in version 3)"
                ));
            }
            Descriptor::Compressed { .. } if self.data_file => {
                return Some(format!(
                    "L2 entry {word:#018x}: a compressed cluster in an image with a data file"
                ));
            }
            Descriptor::Compressed { offset: 0, .. } => {
                return Some(format!(
                    "L2 entry {word:#018x}: a compressed cluster in the header"
                ));
            }
            _ => {}
        }
        let divided = self.extended && word & COMPRESSED == 0;
        if divided && words.bitmap & (words.bitmap >> SUBCLUSTERS) & ALL_DATA != 0 {
            return Some(format!(
                "L2 entry {word:#018x}: bitmap {:#018x} has subclusters that are both data and \
                 zeros",
                words.bitmap
            ));
        }
        if divided && self.host(words).is_none() && words.bitmap & ALL_DATA != 0 {
            return Some(format!(
                "L2 entry {word:#018x}: bitmap {:#018x} has data, but there is no host cluster",
                words.bitmap
            ));
        }
        None
    }

    /// The descriptor of a compressed cluster of `len` bytes at `offset`.
    #[must_use]
    pub fn compressed_descriptor(self, offset: u64, len: u64) -> u64 {
        let shift = 62 - (self.cluster_bits - 8);
        let sectors = (offset + len - 1) / 512 - offset / 512;
        COMPRESSED | sectors << shift | offset
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

/// The bits of a range of units.
fn unit_mask(units: Range<u64>) -> u64 {
    let below = |n: u64| (1u64 << n.min(SUBCLUSTERS.into())) - 1;
    below(units.end) & !below(units.start)
}

/// A part of an L2 table in memory.
#[derive(Debug)]
pub struct Slice {
    words: Box<[AtomicU64]>,
    /// Entries have two words.
    extended: bool,
    /// Odd while an entry of two words is being changed.
    sequence: AtomicU32,
    /// Used since the eviction hand last came by.
    referenced: AtomicBool,
}

impl Slice {
    /// From the bytes of the file.
    #[must_use]
    pub fn from_bytes(bytes: &[u8], extended: bool) -> Self {
        let words = bytes
            .chunks_exact(8)
            .map(|word| AtomicU64::new(word.try_into().map_or(0, u64::from_be_bytes)))
            .collect();
        Self {
            words,
            extended,
            sequence: AtomicU32::new(0),
            referenced: AtomicBool::new(true),
        }
    }

    /// As it goes to the file. The caller keeps writers out.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words
            .iter()
            .flat_map(|word| word.load(Ordering::Relaxed).to_be_bytes())
            .collect()
    }

    fn word(&self, index: usize, order: Ordering) -> u64 {
        self.words.get(index).map_or(0, |word| word.load(order))
    }

    /// Entry `index`; an unallocated one past the end.
    #[must_use]
    pub fn get(&self, index: usize) -> Words {
        if !self.extended {
            return Words {
                descriptor: self.word(index, Ordering::Acquire),
                bitmap: 0,
            };
        }
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            let words = Words {
                descriptor: self.word(2 * index, Ordering::Relaxed),
                bitmap: self.word(2 * index + 1, Ordering::Relaxed),
            };
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == before {
                return words;
            }
            spin_loop();
        }
    }

    /// Sets entry `index`, of which there is a record. The caller keeps other writers out.
    pub fn set(&self, index: usize, words: Words, _: &Recorded) {
        let store = |at: usize, value, order| {
            if let Some(word) = self.words.get(at) {
                word.store(value, order);
            }
        };
        if !self.extended {
            store(index, words.descriptor, Ordering::Release);
            return;
        }
        let before = self.sequence.load(Ordering::Relaxed);
        self.sequence
            .store(before.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        store(2 * index, words.descriptor, Ordering::Relaxed);
        store(2 * index + 1, words.bitmap, Ordering::Relaxed);
        self.sequence
            .store(before.wrapping_add(2), Ordering::Release);
    }

    /// Every entry.
    pub fn entries(&self) -> impl Iterator<Item = Words> {
        let count = self.words.len() / if self.extended { 2 } else { 1 };
        (0..count).map(|index| self.get(index))
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
