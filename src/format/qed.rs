//! The QED format, read-only: QEMU's enhanced disk of 2010, a predecessor of qcow2 version 3.
//!
//! Source: QEMU's `docs/interop/qed_spec`. Little-endian; two levels of tables, no refcounts. Old
//! overlays are in it, so it can be a layer below, or be streamed into a qcow2 image; it is never
//! written. Mapping entries are cached in slices of 4 KiB, the latest up to a limit.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::directory::Directory;
use super::qcow2::Backing;
use super::{Extent, Place};
use crate::error::{Error, Result};
use crate::storage::io::fetch;
use crate::storage::{Purpose, Storage};

/// "QED\0", little-endian.
const MAGIC: u32 = 0x0044_4551;
const FEATURE_BACKING_FILE: u64 = 1;
const FEATURE_NEED_CHECK: u64 = 1 << 1;
const FEATURE_BACKING_RAW: u64 = 1 << 2;
const KNOWN: u64 = FEATURE_BACKING_FILE | FEATURE_NEED_CHECK | FEATURE_BACKING_RAW;

const HEADER_BYTES: usize = 64;
const MAX_BACKING_NAME: u32 = 1023;
const MAX_L1_ENTRIES: u64 = 1 << 22;
/// Larger disks, and offsets from 2^[`OFFSET_BITS`] on, exist in damaged images only.
const MAX_SIZE: u64 = 1 << 60;
const OFFSET_BITS: u32 = 56;
/// Entries of a slice.
const SLICE: u64 = 512;
/// Slices kept in memory.
const SLICES_KEPT: usize = 8192;
/// An entry that stands for zeros.
const ZERO: u64 = 1;

/// Whether `bytes`, the start of a file, are a QED header's.
#[must_use]
pub fn probe(bytes: &[u8]) -> bool {
    le32(bytes, 0) == MAGIC
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

type Slice = Box<[u64]>;

/// A QED layer.
#[derive(Debug)]
pub struct Qed {
    storage: Arc<dyn Storage>,
    cluster_bits: u32,
    /// Entries of a table.
    entries: u64,
    size: u64,
    backing: Option<Backing>,
    l1: Box<[u64]>,
    /// By number: guest cluster / [`SLICE`].
    directory: Directory<Slice>,
    loaded: Mutex<VecDeque<u64>>,
}

/// The fields of the header, checked.
struct Header {
    cluster_bits: u32,
    entries: u64,
    size: u64,
    l1_offset: u64,
    backing: Option<(u64, u32)>,
    backing_raw: bool,
}

impl Header {
    fn parse(bytes: &[u8], file: &str) -> Result<Self> {
        if !probe(bytes) {
            return Err(Error::unsupported(file, "Image is not in qed format"));
        }
        let (cluster, table) = (le32(bytes, 4), le32(bytes, 8));
        if !cluster.is_power_of_two() || !(1 << 12..=1 << 26).contains(&cluster) {
            return Err(Error::corrupt(
                file,
                format!("cluster size {cluster} (expected a power of 2 from 4096 to 67108864)"),
            ));
        }
        if !table.is_power_of_two() || table > 16 {
            return Err(Error::corrupt(
                file,
                format!("tables of {table} clusters (expected 1, 2, 4, 8 or 16)"),
            ));
        }
        let features = le64(bytes, 16);
        if features & !KNOWN != 0 {
            return Err(Error::unsupported(
                file,
                format!("Unsupported QED features: {:#x}", features & !KNOWN),
            ));
        }
        let entries = u64::from(table) * u64::from(cluster) / 8;
        let (size, l1_offset) = (le64(bytes, 48), le64(bytes, 40));
        let needed = size.div_ceil(cluster.into()).div_ceil(entries);
        if needed > entries.min(MAX_L1_ENTRIES) || size > MAX_SIZE || !size.is_multiple_of(512) {
            return Err(Error::corrupt(
                file,
                format!("disk size {size} (expected a multiple of 512 that the tables can hold)"),
            ));
        }
        if l1_offset == 0 || !is_offset(l1_offset, cluster.trailing_zeros()) {
            return Err(Error::corrupt(
                file,
                format!("L1 table at {l1_offset:#x} (expected a multiple of the cluster size)"),
            ));
        }
        let name = (u64::from(le32(bytes, 56)), le32(bytes, 60));
        let header_bytes = u64::from(le32(bytes, 12)) * u64::from(cluster);
        let has_backing = features & FEATURE_BACKING_FILE != 0;
        if has_backing && (name.1 > MAX_BACKING_NAME || name.0 + u64::from(name.1) > header_bytes) {
            return Err(Error::corrupt(
                file,
                format!(
                    "backing file name of {} bytes at {:#x} (expected at most {MAX_BACKING_NAME} \
                     within the header)",
                    name.1, name.0
                ),
            ));
        }
        Ok(Self {
            cluster_bits: cluster.trailing_zeros(),
            entries,
            size,
            l1_offset,
            backing: has_backing.then_some(name),
            backing_raw: features & FEATURE_BACKING_RAW != 0,
        })
    }
}

/// Whether `entry` may be the offset of a cluster.
fn is_offset(entry: u64, cluster_bits: u32) -> bool {
    entry.trailing_zeros() >= cluster_bits && entry >> OFFSET_BITS == 0
}

fn words(bytes: &[u8]) -> Box<[u64]> {
    bytes.chunks_exact(8).map(|word| le64(word, 0)).collect()
}

impl Qed {
    /// Opens the image in `storage` for reading.
    ///
    /// # Errors
    /// When it is not a QED image, contradicts the specification or needs an unknown feature.
    pub async fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let start = fetch(Purpose::Header.on(&*storage), 0, HEADER_BYTES).await?;
        let header = Header::parse(&start, storage.name())?;
        let backing = match header.backing {
            None => None,
            Some((offset, len)) => {
                let name = fetch(Purpose::Header.on(&*storage), offset, len as usize).await?;
                let name = String::from_utf8(name.to_vec()).map_err(|_| {
                    Error::corrupt(storage.name(), "the backing file name is not valid UTF-8")
                })?;
                let format = header.backing_raw.then(|| "raw".to_owned());
                Some(Backing { name, format })
            }
        };
        let clusters = header.size.div_ceil(1 << header.cluster_bits);
        let needed = clusters.div_ceil(header.entries);
        let from = Purpose::L1Table.on(&*storage);
        let l1 = words(&fetch(from, header.l1_offset, needed as usize * 8).await?);
        for (index, entry) in l1.iter().enumerate() {
            if !is_offset(*entry, header.cluster_bits) {
                return Err(Error::corrupt(
                    storage.name(),
                    format!("L1 entry {index}: {entry:#x} is no cluster"),
                ));
            }
        }
        Ok(Self {
            cluster_bits: header.cluster_bits,
            entries: header.entries,
            size: header.size,
            backing,
            l1,
            directory: Directory::new(clusters.div_ceil(SLICE)),
            loaded: Mutex::default(),
            storage,
        })
    }

    /// The backing file that the header names.
    #[must_use]
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Size of a cluster in bytes.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Where the table of a guest cluster is; `None`: there is none.
    fn table(&self, cluster: u64) -> Option<u64> {
        let entry = *self.l1.get((cluster / self.entries) as usize)?;
        (entry != 0).then_some(entry)
    }

    /// See [`super::Format::map`].
    pub(super) fn map(&self, offset: u64, len: u64) -> Extent {
        let cluster = offset >> self.cluster_bits;
        let within = offset & (self.cluster_size() - 1);
        if self.table(cluster).is_none() {
            let coverage = self.entries << self.cluster_bits;
            return Extent {
                place: Place::Below,
                len: len.min(coverage - offset % coverage),
            };
        }
        let slice = self.directory.get(cluster / SLICE);
        let Some(slice) = slice.as_ref().and_then(|slice| slice.as_ref()) else {
            return Extent {
                place: Place::Unknown,
                len,
            };
        };
        let index = (cluster % SLICE) as usize;
        let first = slice.get(index).copied().unwrap_or(0);
        let place = match first {
            0 => Place::Below,
            ZERO => Place::Zero,
            host => Place::Data(host + within),
        };
        let limit = (within + len).div_ceil(self.cluster_size());
        let mut run = 1;
        for &next in slice.get(index + 1..).unwrap_or_default() {
            let expected = match first {
                0 | ZERO => first,
                host => host + (run << self.cluster_bits),
            };
            if run >= limit || next != expected {
                break;
            }
            run += 1;
        }
        Extent {
            place,
            len: len.min((run << self.cluster_bits) - within),
        }
    }

    /// See [`super::Format::load`].
    pub(super) async fn load(&self, offset: u64) -> Result<()> {
        let number = (offset >> self.cluster_bits) / SLICE;
        let Some(table) = self.table(number * SLICE) else {
            return Ok(());
        };
        let at = table + number * SLICE % self.entries * 8;
        let from = Purpose::L2Table.on(&*self.storage);
        let slice = words(&fetch(from, at, SLICE as usize * 8).await?);
        let bad = slice
            .iter()
            .find(|&&entry| entry != ZERO && !is_offset(entry, self.cluster_bits));
        if let Some(entry) = bad {
            return Err(Error::corrupt(
                self.storage.name(),
                format!("L2 table at {table:#x}: {entry:#x} is no cluster"),
            ));
        }
        let mut loaded = self.loaded.lock();
        self.directory.set(number, Some(Arc::new(slice)));
        loaded.push_back(number);
        if loaded.len() > SLICES_KEPT
            && let Some(oldest) = loaded.pop_front()
            && oldest != number
        {
            self.directory.set(oldest, None);
        }
        Ok(())
    }
}
