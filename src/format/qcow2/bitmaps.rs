//! Persistent bitmaps: those of others, which are not maintained here.
//!
//! Source: QEMU's `docs/interop/qcow2`, sections "Bitmaps extension" and "Bitmaps". A bitmap that
//! tracks writes (flag *auto*) is out of date as soon as we write. The specification has a flag
//! for that, *in use*: such a bitmap is not to be relied on, but the others stay what they are,
//! and its clusters stay accounted for.

mod resize;

use super::Qcow2;
use super::header::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, BITMAPS_EXT_LENGTH, EXT_BITMAPS, Header,
};
use super::journal;
use super::numbers::{be, be32, be64};
use crate::error::{Error, Result};
use crate::storage::{self, Purpose, Storage};

pub use resize::{InForce, check_resize};

/// It was not saved, and may be out of date.
pub const IN_USE: u32 = 1;
/// It is to record all writes.
pub const AUTO: u32 = 1 << 1;
/// It may be used by who does not know its extra data.
const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;

/// QEMU's limits.
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY: u64 = 64 << 20;
/// On the bytes of a bitmap.
const MAX_BYTES: u64 = 512 << 20;
const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
const MAX_NAME: usize = 1023;
/// On the logarithm of the bytes that a bit stands for.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// The one kind of bitmap there is: of what was written.
const DIRTY_TRACKING: u8 = 1;
const FIXED: usize = 24;

/// In an entry of a bitmap's table: where the bits are. 0: nowhere, and all are alike.
pub const DATA_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// In an entry without data: all bits are set.
const ONES: u64 = 1;
/// In an entry: what must be 0.
const RESERVED: u64 = 0xff00_0000_0000_01fe;

/// An entry of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// [`IN_USE`], [`AUTO`] and others.
    pub flags: u32,
    /// Logarithm of the bytes that one bit stands for.
    pub granularity_bits: u8,
    /// Where its table is.
    pub table_offset: u64,
    /// Entries of its table.
    pub table_entries: u32,
    /// Where the entry is in the directory.
    at: usize,
    /// It has extra data that must be understood.
    foreign: bool,
    /// It has extra data.
    extra: bool,
    /// [`DIRTY_TRACKING`], if it can be used.
    kind: u8,
    /// Bytes of the name as it is written.
    name_len: usize,
}

impl Bitmap {
    /// What QEMU refuses to open the image for; `None`: nothing.
    #[must_use]
    pub fn objection(&self, header: &Header) -> Option<String> {
        let (bits, entries) = (self.granularity_bits, self.table_entries);
        let wanted = self.entries(header, header.size);
        let text = if self.extra {
            "extra data, which nobody understands".to_owned()
        } else if self.kind != DIRTY_TRACKING {
            format!("type {} (expected {DIRTY_TRACKING})", self.kind)
        } else if self.flags & !(IN_USE | AUTO) != 0 {
            format!(
                "flags {:#x} (expected none but {:#x})",
                self.flags,
                IN_USE | AUTO
            )
        } else if !GRANULARITY_BITS.contains(&bits) {
            format!("a granularity of 2^{bits} bytes (expected {GRANULARITY_BITS:?})")
        } else if self.name_len > MAX_NAME {
            format!(
                "a name of {} bytes (expected at most {MAX_NAME})",
                self.name_len
            )
        } else if entries == 0
            || entries > MAX_TABLE_ENTRIES
            || self.table_offset == 0
            || !self.has_table(header.cluster_bits)
        {
            format!("a table of {entries} entries at {:#x}", self.table_offset)
        } else if self.flags & IN_USE == 0 && u64::from(entries) != wanted {
            format!("a table of {entries} entries (expected {wanted})")
        } else {
            return None;
        };
        Some(format!("bitmap '{}' has {text}", self.name))
    }

    /// Whether its table can be where the entry says, and within QEMU's limit.
    #[must_use]
    pub fn has_table(&self, cluster_bits: u32) -> bool {
        self.table_offset.is_multiple_of(1 << cluster_bits)
            && self.table_offset >> 56 == 0
            && u64::from(self.table_entries) << cluster_bits <= MAX_BYTES
    }
}

/// Whether an entry of a bitmap's table says something that it may.
#[must_use]
pub fn possible_entry(entry: u64, cluster_bits: u32) -> bool {
    let data = entry & DATA_OFFSET;
    entry & RESERVED == 0
        && (data == 0 || entry & ONES == 0)
        && data.is_multiple_of(1 << cluster_bits)
}

/// Takes the directory apart; `None`: it contradicts the specification.
fn parse(directory: &[u8], count: u32) -> Option<Vec<Bitmap>> {
    let mut bitmaps = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let entry = directory.get(at..)?;
        let fixed = entry.get(..FIXED)?;
        let name_len = be(fixed, 18, 2) as usize;
        let extra = be(fixed, 20, 4) as usize;
        let name_at = FIXED.checked_add(extra)?;
        let name = entry.get(name_at..name_at.checked_add(name_len)?)?;
        let flags = be32(fixed, 12);
        bitmaps.push(Bitmap {
            name: String::from_utf8_lossy(name).into_owned(),
            flags,
            granularity_bits: *fixed.get(17)?,
            table_offset: be64(fixed, 0),
            table_entries: be32(fixed, 8),
            at,
            foreign: extra > 0 && flags & EXTRA_DATA_COMPATIBLE == 0,
            extra: extra > 0,
            kind: *fixed.get(16)?,
            name_len,
        });
        at += (name_at + name_len).next_multiple_of(8);
    }
    Some(bitmaps)
}

/// What QEMU refuses to open an image for in the extension that names the directory, or in the
/// directory as a whole; `None`: nothing. `bitmaps` are those of the directory.
pub fn directory_objection(header: &Header, bitmaps: &[Bitmap]) -> Option<String> {
    let directory = header.bitmaps?;
    let extension = header.extension(EXT_BITMAPS).unwrap_or_default();
    let entry = |bitmap: &Bitmap| {
        let extra = bitmap.name_len + FIXED;
        extra.next_multiple_of(8) as u64
    };
    let same = |pair: &[&str]| matches!(pair, [a, b] if a == b);
    let mut names: Vec<&str> = bitmaps.iter().map(|bitmap| &*bitmap.name).collect();
    names.sort_unstable();
    if extension.len() != BITMAPS_EXT_LENGTH || be32(extension, 4) != 0 {
        return Some("the bitmaps extension is damaged".to_owned());
    }
    if directory.count == 0
        || directory.offset == 0
        || !directory.offset.is_multiple_of(1 << header.cluster_bits)
    {
        return Some(format!(
            "a directory of {} bitmaps at {:#x}",
            directory.count, directory.offset
        ));
    }
    if bitmaps.iter().all(|bitmap| !bitmap.extra)
        && bitmaps.iter().map(entry).sum::<u64>() != directory.len
    {
        return Some(format!(
            "the bitmap directory has {} bytes, which its entries do not fill",
            directory.len
        ));
    }
    names
        .windows(2)
        .any(same)
        .then(|| "two bitmaps have the same name".to_owned())
}

async fn read_directory(storage: &dyn Storage, header: &Header) -> Result<Option<Vec<u8>>> {
    let Some(directory) = header.bitmaps else {
        return Ok(None);
    };
    if header.autoclear & AUTOCLEAR_BITMAPS == 0
        || directory.count > MAX_BITMAPS
        || directory.len > MAX_DIRECTORY
    {
        return Ok(None);
    }
    let bytes = storage::io::fetch(
        Purpose::Bitmap.on(storage),
        directory.offset,
        directory.len as usize,
    )
    .await?;
    Ok(Some(bytes.to_vec()))
}

/// The bitmaps of an image; none where they are inconsistent as a whole.
///
/// # Errors
/// When the directory cannot be read, or contradicts the specification.
pub async fn list(storage: &dyn Storage, header: &Header) -> Result<Vec<Bitmap>> {
    let Some(directory) = read_directory(storage, header).await? else {
        return Ok(Vec::new());
    };
    parse(&directory, header.bitmaps.map_or(0, |d| d.count))
        .ok_or_else(|| Error::corrupt(storage.name(), "the bitmap directory is damaged"))
}

impl Qcow2 {
    /// Marks the bitmaps that track writes as out of date, and clears the autoclear bits that
    /// stand for what is not maintained here. Stable when this returns. `journaled`: the image has a
    /// journal, or is about to.
    ///
    /// # Errors
    /// When the directory or the header cannot be read or written.
    pub(super) async fn invalidate_bitmaps(&self, journaled: bool) -> Result<()> {
        let header = self.header();
        let mut keep = header.autoclear & AUTOCLEAR_DATA_FILE_RAW;
        if journaled {
            keep |= journal::AUTOCLEAR;
        }
        if header.bitmaps.is_some() {
            // A process that was killed may have marked them, and its mark may be in the page cache
            // alone: it would be taken for what a power cut leaves.
            self.barrier().await?;
        }
        if let Some(mut directory) = read_directory(&*self.storage, &header).await? {
            let count = header.bitmaps.map_or(0, |d| d.count);
            match parse(&directory, count) {
                Some(bitmaps) if bitmaps.iter().all(|bitmap| !bitmap.foreign) => {
                    keep |= AUTOCLEAR_BITMAPS;
                    self.mark_in_use(&header, &bitmaps, &mut directory).await?;
                }
                // Nothing in it can be relied on.
                _ => log::warn!(
                    "{}: the persistent bitmaps are invalid from now on",
                    self.storage.name()
                ),
            }
        }
        if header.version < 3 || header.autoclear & !keep == 0 {
            return Ok(());
        }
        self.patch_header(&[header.with_autoclear(header.autoclear & keep)])
            .await
    }

    async fn mark_in_use(
        &self,
        header: &Header,
        bitmaps: &[Bitmap],
        directory: &mut [u8],
    ) -> Result<()> {
        let mut changed = false;
        for bitmap in bitmaps {
            if bitmap.flags & AUTO == 0 || bitmap.flags & IN_USE != 0 {
                continue;
            }
            let flags = (bitmap.flags | IN_USE).to_be_bytes();
            if let Some(place) = directory.get_mut(bitmap.at + 12..bitmap.at + 16) {
                place.copy_from_slice(&flags);
                changed = true;
            }
        }
        if !changed {
            return Ok(());
        }
        let offset = header.bitmaps.map_or(0, |d| d.offset);
        self.write_at(offset, directory, Purpose::Bitmap).await?;
        self.barrier().await
    }
}
