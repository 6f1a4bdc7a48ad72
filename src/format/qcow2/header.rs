//! The qcow2 header: parsing it, and (`edit`) changing it so that a cut at any instant leaves
//! either the old or the new one.
//!
//! Source: QEMU's `docs/interop/qcow2`, sections "Header" and "Header extensions".

mod edit;
pub mod read;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;

use super::journal::{self, Mark};
use super::l2::Shape;
use super::numbers::{be32, be64};
use crate::error::{Error, Result};

pub use edit::{Patch, Places};

/// "QFI\xfb".
pub const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a sector: what a disk writes as a whole.
pub const SECTOR: usize = 512;

const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;
/// Header extension: the last one.
pub(super) const EXT_END: u32 = 0;
/// Header extension: the backing file's format.
pub(super) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Header extension: what the feature bits are called.
pub(super) const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Header extension: where the directory of the persistent bitmaps is.
pub(super) const EXT_BITMAPS: u32 = 0x2385_2875;
/// Header extension: where the LUKS header is.
pub(super) const EXT_CRYPTO_HEADER: u32 = 0x0537_be77;
/// Header extension: the data file's name.
pub(super) const EXT_DATA_FILE: u32 = 0x4441_5441;

/// Incompatible feature: refcounts may be out of date.
pub const INCOMPATIBLE_DIRTY: u64 = 1;
/// Incompatible feature: something is wrong in the image; it must not be written.
pub const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
/// Incompatible feature: guest data is in a file of its own.
pub const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
/// Incompatible feature: the header says how clusters are compressed.
pub const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
/// Incompatible feature: L2 entries with a bitmap of 32 subclusters.
pub const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const SUPPORTED: u64 = INCOMPATIBLE_DIRTY
    | INCOMPATIBLE_CORRUPT
    | INCOMPATIBLE_DATA_FILE
    | INCOMPATIBLE_COMPRESSION
    | INCOMPATIBLE_EXTENDED_L2;

/// Compatible feature: a writer may leave refcounts behind, and says so with the dirty bit.
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;

/// Autoclear feature: the persistent bitmaps are consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear feature: the data file is by itself a raw image of the disk.
pub const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;

/// Smallest cluster of an image with subclusters: 32 sectors.
const MIN_EXTENDED_BITS: u32 = 14;

/// Limits on what an image may make us allocate; they are QEMU's.
pub(super) const MAX_L1_ENTRIES: u64 = (32 << 20) / 8;
pub(super) const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Longest name of a backing file in bytes.
pub(super) const MAX_BACKING_NAME: usize = 1023;
/// Bytes of the bitmaps extension.
pub(super) const BITMAPS_EXT_LENGTH: usize = 24;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// AES-CBC, an old and weak kind.
    Aes,
    /// LUKS version 1.
    Luks,
}

/// A header extension as it stands in the image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Extension {
    kind: u32,
    data: Vec<u8>,
}

impl Extension {
    fn padded_len(&self) -> usize {
        8 + self.data.len().next_multiple_of(8)
    }
}

/// The backing file as the header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The file name, as written.
    pub name: String,
    /// The format, where it is recorded.
    pub format: Option<String>,
}

/// Where the directory of the persistent bitmaps is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapDirectory {
    /// How many bitmaps there are.
    pub count: u32,
    /// Bytes of the directory.
    pub len: u64,
    /// Where it is.
    pub offset: u64,
}

/// A parsed header.
#[derive(Clone, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The backing file.
    pub backing: Option<Backing>,
    /// Logarithm of the cluster size.
    pub cluster_bits: u32,
    /// The disk's size in bytes.
    pub size: u64,
    /// Entries of the L1 table.
    pub l1_size: u32,
    /// Where the L1 table is.
    pub l1_offset: u64,
    /// Where the refcount table is.
    pub reftable_offset: u64,
    /// How many clusters it has.
    pub reftable_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where their table is.
    pub snapshots_offset: u64,
    /// The file that holds the guest's data, as written, where the image itself does not.
    pub data_file: Option<String>,
    /// The persistent bitmaps, whether or not they are consistent.
    pub bitmaps: Option<BitmapDirectory>,
    /// The journal that has what completed and was not flushed.
    pub journal: Option<Mark>,
    /// Feature bits.
    pub incompatible: u64,
    /// Feature bits.
    pub compatible: u64,
    /// Feature bits that a writer who does not know them clears.
    pub autoclear: u64,
    /// Logarithm of the refcount width in bits.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// How guest data is encrypted. Such an image can be described, and not opened.
    pub encryption: Option<Encryption>,
    /// The first cluster as read, without the zeros at its end: changes are made to a copy of it.
    raw: Vec<u8>,
    header_length: usize,
    extensions: Vec<Extension>,
    /// The length that the end of the extensions claims leaves the header.
    overlong_end: bool,
    file: String,
}

/// Whether `bytes`, the start of a file, are a qcow2 header's.
#[must_use]
pub fn probe(bytes: &[u8]) -> bool {
    be32(bytes, 0) == MAGIC && be32(bytes, 4) >= 2
}

/// The cluster size that the first bytes of an image claim: how much to read to parse it.
///
/// # Errors
/// When this is no qcow2 image that can be opened.
pub fn cluster_bits(bytes: &[u8], file: &str) -> Result<u32> {
    if be32(bytes, 0) != MAGIC {
        return Err(Error::unsupported(file, "Image is not in qcow2 format"));
    }
    let version = be32(bytes, 4);
    if !(2..=3).contains(&version) {
        return Err(Error::unsupported(
            file,
            format!("Unsupported qcow2 version {version} (expected 2 or 3)"),
        ));
    }
    let bits = be32(bytes, 20);
    if !(9..=21).contains(&bits) {
        return Err(Error::corrupt(
            file,
            format!("Unsupported cluster size: 2^{bits} (expected 2^9 to 2^21)"),
        ));
    }
    Ok(bits)
}

/// Whether all that a header says is within `bytes`, the start of its cluster: the fields, the
/// extensions up to their end mark, and the backing file's name.
#[must_use]
pub fn is_whole(bytes: &[u8]) -> bool {
    let name_at = be64(bytes, 8) as usize;
    let name_end = name_at.saturating_add(be32(bytes, 16) as usize);
    let limit = match name_at {
        0 => bytes.len(),
        _ => name_at,
    };
    let mut at = match be32(bytes, 4) {
        2 => V2_LENGTH,
        _ => be32(bytes, 100) as usize,
    };
    // An extension is read to its end, and one that leaves the header is an error to report.
    while at.saturating_add(8) <= limit && be32(bytes, at) != EXT_END {
        at = at.saturating_add(8 + (be32(bytes, at + 4) as usize).next_multiple_of(8));
    }
    name_end <= bytes.len() && at.saturating_add(8) <= bytes.len()
}

impl Header {
    /// Parses the first cluster of an image, or as much of it as [`is_whole`].
    ///
    /// # Errors
    /// When it contradicts the specification, or needs a feature that is not supported.
    pub fn parse(raw: Vec<u8>, file: &str) -> Result<Self> {
        let header = Self::describe(raw, file)?;
        match header.encryption {
            None => Ok(header),
            Some(Encryption::Aes) => {
                Err(header.unsupported("AES-encrypted images are not supported"))
            }
            Some(Encryption::Luks) => {
                Err(header.unsupported("LUKS-encrypted images are not supported"))
            }
        }
    }

    /// As [`Header::parse`], but of encrypted images too: to tell what they are.
    ///
    /// # Errors
    /// As for [`Header::parse`].
    pub fn describe(raw: Vec<u8>, file: &str) -> Result<Self> {
        let cluster_bits = cluster_bits(&raw, file)?;
        let version = be32(&raw, 4);
        let header_length = match version {
            2 => V2_LENGTH,
            _ => be32(&raw, 100) as usize,
        };
        if version == 3 && (header_length < V3_LENGTH || header_length > raw.len()) {
            return Err(Error::corrupt(
                file,
                format!("header length {header_length} (expected {V3_LENGTH} to the cluster size)"),
            ));
        }
        let v3 = |at: usize| if version == 3 { be64(&raw, at) } else { 0 };
        let mut header = Self {
            version,
            backing: None,
            cluster_bits,
            size: be64(&raw, 24),
            l1_size: be32(&raw, 36),
            l1_offset: be64(&raw, 40),
            reftable_offset: be64(&raw, 48),
            reftable_clusters: be32(&raw, 56),
            snapshots: be32(&raw, 60),
            snapshots_offset: be64(&raw, 64),
            data_file: None,
            bitmaps: None,
            journal: None,
            incompatible: v3(72),
            compatible: v3(80),
            autoclear: v3(88),
            refcount_order: if version == 3 { be32(&raw, 96) } else { 4 },
            compression: Compression::Zlib,
            encryption: None,
            header_length,
            extensions: Vec::new(),
            overlong_end: false,
            file: file.to_owned(),
            raw,
        };
        header.parse_extensions()?;
        header.check_features()?;
        header.check_geometry()?;
        header.parse_backing()?;
        header.parse_data_file()?;
        header.parse_bitmaps()?;
        header.journal = header.extension(journal::EXTENSION).and_then(Mark::parse);
        let used = header.raw.iter().rposition(|&byte| byte != 0);
        header.raw.truncate(used.map_or(0, |last| last + 1));
        header.raw.shrink_to_fit();
        Ok(header)
    }

    /// The first cluster.
    fn whole(&self) -> Vec<u8> {
        let mut raw = self.raw.clone();
        raw.resize(1 << self.cluster_bits, 0);
        raw
    }

    fn parse_extensions(&mut self) -> Result<()> {
        // The extensions end where the backing file's name begins, or with the cluster.
        let name_at = be64(&self.raw, 8) as usize;
        let end = if name_at == 0 {
            self.raw.len()
        } else {
            name_at.min(self.raw.len())
        };
        let mut at = self.header_length;
        while at + 8 <= end {
            let (kind, len) = (be32(&self.raw, at), be32(&self.raw, at + 4) as usize);
            if kind == EXT_END {
                let end = if name_at == 0 {
                    1 << self.cluster_bits
                } else {
                    end
                };
                self.overlong_end = at + 8 + len > end;
                break;
            }
            let data = at
                .checked_add(8 + len)
                .filter(|&stop| stop <= end)
                .and_then(|stop| self.raw.get(at + 8..stop))
                .ok_or_else(|| {
                    self.corrupt(format!(
                        "header extension {kind:#x} of {len} bytes leaves the header"
                    ))
                })?
                .to_vec();
            at += 8 + len.next_multiple_of(8);
            self.extensions.push(Extension { kind, data });
        }
        Ok(())
    }

    fn check_features(&mut self) -> Result<()> {
        match be32(&self.raw, 32) {
            0 => {}
            1 => self.encryption = Some(Encryption::Aes),
            2 => self.encryption = Some(Encryption::Luks),
            other => {
                return Err(self.unsupported(format!("Unsupported encryption method {other}")));
            }
        }
        let unknown = self.incompatible & !SUPPORTED;
        if unknown != 0 {
            let names: Vec<String> = (0..64)
                .filter(|bit| unknown >> bit & 1 == 1)
                .map(|bit| self.feature_name(0, bit))
                .collect();
            return Err(self.unsupported(format!(
                "Unsupported qcow2 feature(s): {}",
                names.join(", ")
            )));
        }
        if self.incompatible & INCOMPATIBLE_COMPRESSION != 0 {
            self.compression = match self.raw.get(104) {
                Some(0) => Compression::Zlib,
                Some(1) if self.header_length > V3_LENGTH => Compression::Zstd,
                other => {
                    let other = other.copied().unwrap_or_default();
                    return Err(self.unsupported(format!("Unsupported compression type {other}")));
                }
            };
        }
        Ok(())
    }

    fn feature_name(&self, kind: u8, bit: u32) -> String {
        let table = self
            .extensions
            .iter()
            .filter(|e| e.kind == EXT_FEATURE_NAMES);
        table
            .flat_map(|e| e.data.chunks_exact(48))
            .find(|row| {
                row.first() == Some(&kind) && row.get(1).map(|&b| u32::from(b)) == Some(bit)
            })
            .and_then(|row| row.get(2..))
            .map(|name| {
                let name = name.split(|&b| b == 0).next().unwrap_or_default();
                String::from_utf8_lossy(name).into_owned()
            })
            .unwrap_or_else(|| format!("unknown incompatible feature bit {bit}"))
    }

    fn check_geometry(&self) -> Result<()> {
        if self.refcount_order > 6 {
            return Err(self.corrupt(format!(
                "refcount width 2^{} bits (expected at most 64)",
                self.refcount_order
            )));
        }
        let cluster = 1u64 << self.cluster_bits;
        if self.size > 1 << 62 {
            return Err(self.corrupt(format!("disk size {:#x} is too large", self.size)));
        }
        if self.has_subclusters() && self.cluster_bits < MIN_EXTENDED_BITS {
            return Err(self.corrupt(format!(
                "clusters of {cluster} bytes with extended L2 entries (expected at least {})",
                1 << MIN_EXTENDED_BITS
            )));
        }
        let needed = self.shape().l1_entries(self.size);
        if needed > MAX_L1_ENTRIES || u64::from(self.l1_size) > MAX_L1_ENTRIES {
            return Err(self.corrupt(format!(
                "L1 table of {} entries is too large (at most {MAX_L1_ENTRIES})",
                needed.max(self.l1_size.into())
            )));
        }
        if u64::from(self.l1_size) < needed {
            return Err(self.corrupt(format!(
                "L1 table is too small: {} entries (expected {needed})",
                self.l1_size
            )));
        }
        if !self.is_table_offset(self.l1_offset) {
            return Err(self.corrupt(format!(
                "L1 table at offset {:#x} (expected a multiple of the cluster size)",
                self.l1_offset
            )));
        }
        if self.l1_size > 0 && self.l1_offset == 0 {
            return Err(self.corrupt("the L1 table overlaps the header"));
        }
        Ok(())
    }

    fn is_table_offset(&self, offset: u64) -> bool {
        offset.is_multiple_of(1 << self.cluster_bits) && offset >> 56 == 0
    }

    /// What is wrong in the header, though nothing here depends on it: QEMU does not open the image.
    #[must_use]
    pub fn objection(&self) -> Option<&'static str> {
        let has_kind = self.incompatible & INCOMPATIBLE_COMPRESSION != 0;
        // A shorter header has something else there.
        let kind = match self.header_length > V3_LENGTH {
            true => self.raw.get(104).copied().unwrap_or_default(),
            false => 0,
        };
        if (kind != 0) != has_kind {
            Some("the compression type and its feature bit contradict each other")
        } else if self.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0 && !self.has_data_file() {
            Some("a raw data file is announced, but there is no data file")
        } else if self.overlong_end {
            Some("the end of the extensions has a length that leaves the header")
        } else {
            None
        }
    }

    /// A writer needs refcounts; a repair makes new ones.
    ///
    /// # Errors
    /// When there is no refcount table, or none that can be where the header says.
    pub fn check_refcount_table(&self) -> Result<()> {
        if self.reftable_clusters == 0 || self.reftable_offset == 0 {
            return Err(self.corrupt("Image does not contain a reference count table"));
        }
        if !self.is_table_offset(self.reftable_offset) {
            return Err(self.corrupt(format!(
                "refcount table at offset {:#x} (expected a multiple of the cluster size)",
                self.reftable_offset
            )));
        }
        if u64::from(self.reftable_clusters) << self.cluster_bits > MAX_REFTABLE_BYTES {
            return Err(self.corrupt(format!(
                "refcount table of {} clusters is too large",
                self.reftable_clusters
            )));
        }
        Ok(())
    }

    /// The contents of a header extension.
    pub(super) fn extension(&self, kind: u32) -> Option<&[u8]> {
        let extension = self.extensions.iter().find(|e| e.kind == kind);
        extension.map(|extension| &*extension.data)
    }

    fn parse_backing(&mut self) -> Result<()> {
        let (at, len) = (be64(&self.raw, 8), be32(&self.raw, 16) as usize);
        if at == 0 {
            return Ok(());
        }
        if len > MAX_BACKING_NAME {
            return Err(self.corrupt(format!(
                "backing file name of {len} bytes (expected at most {MAX_BACKING_NAME})"
            )));
        }
        let name = usize::try_from(at)
            .ok()
            .and_then(|at| self.raw.get(at..at.checked_add(len)?))
            .ok_or_else(|| self.corrupt("the backing file name leaves the first cluster"))?;
        let format = self
            .extension(EXT_BACKING_FORMAT)
            .map(|data| String::from_utf8_lossy(data).into_owned());
        let name = String::from_utf8(name.to_vec())
            .map_err(|_| self.corrupt("the backing file name is not valid UTF-8"))?;
        self.backing = Some(Backing { name, format });
        Ok(())
    }

    fn parse_data_file(&mut self) -> Result<()> {
        if !self.has_data_file() {
            return Ok(());
        }
        self.data_file = match self.extension(EXT_DATA_FILE) {
            None => None,
            Some(name) => Some(
                String::from_utf8(name.to_vec())
                    .map_err(|_| self.corrupt("the data file's name is not valid UTF-8"))?,
            ),
        };
        Ok(())
    }

    fn parse_bitmaps(&mut self) -> Result<()> {
        let Some(data) = self.extension(EXT_BITMAPS) else {
            return Ok(());
        };
        let directory = BitmapDirectory {
            count: be32(data, 0),
            len: be64(data, 8),
            offset: be64(data, 16),
        };
        let consistent = self.autoclear & AUTOCLEAR_BITMAPS != 0;
        if consistent && data.len() < BITMAPS_EXT_LENGTH {
            return Err(self.corrupt(format!(
                "bitmaps extension of {} bytes (expected {BITMAPS_EXT_LENGTH})",
                data.len()
            )));
        }
        self.bitmaps = Some(directory);
        Ok(())
    }

    /// Whether guest data is in a file of its own.
    #[must_use]
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }

    /// Whether the data file by itself is a raw image of the disk, and is to stay one.
    #[must_use]
    pub fn data_file_is_raw(&self) -> bool {
        self.has_data_file() && self.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0
    }

    /// Whether L2 entries have a bitmap of subclusters.
    #[must_use]
    pub fn has_subclusters(&self) -> bool {
        self.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0
    }

    /// What L2 entries mean in this image.
    #[must_use]
    pub fn shape(&self) -> Shape {
        Shape {
            cluster_bits: self.cluster_bits,
            extended: self.has_subclusters(),
            data_file: self.has_data_file(),
            version: self.version,
        }
    }

    fn corrupt(&self, what: impl Into<String>) -> Error {
        Error::corrupt(&self.file, what)
    }

    pub(super) fn unsupported(&self, what: impl Into<String>) -> Error {
        Error::unsupported(&self.file, what)
    }
}
