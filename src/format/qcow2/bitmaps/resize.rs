//! Bitmaps for a disk of another size.
//!
//! A bitmap is as long as its disk, and QEMU refuses an image in which one that can be relied on
//! is not. So the tables and the directory are written anew for the new size, in another place,
//! and the header gets them in the same step as the size: a cut leaves the old size with the old
//! bitmaps, or the new one with the new ones. Bits of what both sizes have stay what they are, and
//! those of what is new are clear.

use std::collections::BTreeSet;

use super::super::header::{BitmapDirectory, Header};
use super::super::metadata::Kind;
use super::super::numbers::{put, words};
use super::super::{Freed, Qcow2};
use super::{
    AUTO, Bitmap, DATA_OFFSET, IN_USE, MAX_BYTES, list, parse, possible_entry, read_directory,
};
use crate::error::{Error, Result};
use crate::storage::{self, Purpose, Storage};

/// Which bitmaps track writes and have seen all of them: where their entries are in the directory.
///
/// Opening an image for writing marks such bitmaps as out of date. Who then writes nothing that a
/// guest would see may take that back.
pub type InForce = BTreeSet<usize>;

/// What [`Qcow2::set_size`] puts into the header, and what it frees afterwards.
#[derive(Debug, Default)]
pub(in super::super) struct Moved {
    pub(in super::super) directory: Option<BitmapDirectory>,
    /// Where they were.
    pub(in super::super) old: Freed,
    /// Where they are.
    pub(in super::super) new: Freed,
}

/// Looks whether the bitmaps of an image can be made ones of a disk of `size` bytes, and which
/// track writes and are up to date.
///
/// # Errors
/// When a bitmap would be too large or is damaged, the header has no room, or the image cannot be
/// read.
pub async fn check_resize(storage: &dyn Storage, header: &Header, size: u64) -> Result<InForce> {
    let bitmaps = list(storage, header).await?;
    let Some(directory) = header.bitmaps.filter(|_| !bitmaps.is_empty()) else {
        return Ok(InForce::new());
    };
    let elsewhere = BitmapDirectory {
        offset: u64::MAX,
        ..directory
    };
    header.plan_size(size, Some(elsewhere))?;
    for bitmap in bitmaps.iter().filter(|bitmap| bitmap.flags & IN_USE == 0) {
        bitmap.check(storage, header)?;
        let bytes = bitmap
            .entries(header, size)
            .saturating_mul(1 << header.cluster_bits);
        if bytes == 0 || bytes > MAX_BYTES {
            return Err(Error::Invalid(format!(
                "{}: bitmap '{}' cannot be one of {size} bytes: it would have {bytes} bytes \
                 (expected 1 to {MAX_BYTES}); remove it first ('qemu-img bitmap --remove')",
                storage.name(),
                bitmap.name
            )));
        }
    }
    let in_force = |bitmap: &&Bitmap| bitmap.flags & (AUTO | IN_USE) == AUTO;
    Ok(bitmaps.iter().filter(in_force).map(|b| b.at).collect())
}

impl Bitmap {
    /// Bits that stand for a disk of `size` bytes.
    fn bits(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.granularity_bits.min(63))
    }

    /// Entries of the table for a disk of `size` bytes.
    pub(super) fn entries(&self, header: &Header, size: u64) -> u64 {
        self.bits(size).div_ceil(8 << header.cluster_bits)
    }

    /// What is not looked at when an image is opened.
    fn check(&self, storage: &dyn Storage, header: &Header) -> Result<()> {
        let wanted = self.entries(header, header.size);
        if u64::from(self.table_entries) == wanted && self.has_table(header.cluster_bits) {
            return Ok(());
        }
        Err(Error::corrupt(
            storage.name(),
            format!(
                "bitmap '{}' has a table of {} entries at {:#x} (expected {wanted}, at a multiple \
                 of the cluster size, for at most {MAX_BYTES} bytes): look at it with 'stratactl \
                 image check'",
                self.name, self.table_entries, self.table_offset
            ),
        ))
    }
}

impl Qcow2 {
    /// Writes the bitmaps for a disk of `size` bytes beside the present ones; the header does not
    /// name them yet. Those that are `in_force` are made so again.
    ///
    /// # Errors
    /// When there is no space, or metadata cannot be read or written. What was allocated is free
    /// with the next flush.
    pub(in super::super) async fn bitmaps_for(
        &self,
        size: u64,
        in_force: &InForce,
    ) -> Result<Moved> {
        let mut moved = Moved::default();
        let result = self.write_bitmaps(size, in_force, &mut moved).await;
        if result.is_err() {
            self.note_unmapped(&mut self.meta.lock(), std::mem::take(&mut moved.new));
        }
        result.map(|()| moved)
    }

    async fn write_bitmaps(&self, size: u64, in_force: &InForce, moved: &mut Moved) -> Result<()> {
        let header = self.header();
        let Some(mut bytes) = read_directory(&*self.storage, &header).await? else {
            return Ok(());
        };
        let count = header.bitmaps.map_or(0, |directory| directory.count);
        for bitmap in parse(&bytes, count).unwrap_or_default() {
            let restored = in_force.contains(&bitmap.at);
            if bitmap.flags & IN_USE != 0 && !restored {
                // Nobody relies on it, whatever its length.
                continue;
            }
            let (offset, entries) = self.write_bitmap(&bitmap, size, moved).await?;
            put(&mut bytes, bitmap.at, &offset.to_be_bytes());
            put(&mut bytes, bitmap.at + 8, &(entries as u32).to_be_bytes());
            let flags = bitmap.flags & !IN_USE;
            put(&mut bytes, bitmap.at + 12, &flags.to_be_bytes());
        }
        if let Some(old) = header.bitmaps.filter(|_| count > 0) {
            let offset = self
                .write_anew(&mut bytes, Kind::BitmapDirectory, moved)
                .await?;
            moved.free(self, old.offset, old.len);
            moved.directory = Some(BitmapDirectory { offset, ..old });
        }
        Ok(())
    }

    /// Returns where the new table is, and how many entries it has.
    async fn write_bitmap(
        &self,
        bitmap: &Bitmap,
        size: u64,
        moved: &mut Moved,
    ) -> Result<(u64, usize)> {
        let header = self.header();
        bitmap.check(&*self.storage, &header)?;
        let len = bitmap.table_entries as usize * 8;
        let bytes =
            storage::io::fetch(Purpose::Bitmap.on(&*self.storage), bitmap.table_offset, len)
                .await?;
        let mut table: Vec<u64> = words(&bytes).collect();
        if let Some(entry) = table
            .iter()
            .find(|entry| !possible_entry(**entry, self.cluster_bits))
        {
            return Err(Error::corrupt(
                self.storage.name(),
                format!("bitmap '{}': table entry {entry:#018x}", bitmap.name),
            ));
        }
        moved.free(self, bitmap.table_offset, len as u64);
        let entries = bitmap.entries(&header, size) as usize;
        for entry in table.iter().skip(entries) {
            moved.free_data(self, *entry);
        }
        table.resize(entries, 0);
        let kept = bitmap.bits(size.min(header.size));
        let per_cluster = 8 << self.cluster_bits;
        let within = kept % per_cluster;
        if let Some(entry) = table.get_mut((kept / per_cluster) as usize)
            && within > 0
        {
            *entry = self.clear_bits_from(*entry, within, moved).await?;
        }
        let mut bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let offset = self.write_anew(&mut bytes, Kind::Bitmap, moved).await?;
        Ok((offset, entries))
    }

    /// A table entry whose bits from `first` on are clear, and the others those of `entry`.
    async fn clear_bits_from(&self, entry: u64, first: u64, moved: &mut Moved) -> Result<u64> {
        if entry == 0 {
            return Ok(0);
        }
        let len = self.cluster_size() as usize;
        let mut bits = match entry & DATA_OFFSET {
            0 => vec![0xff; len],
            data => storage::io::fetch(Purpose::Bitmap.on(&*self.storage), data, len)
                .await?
                .to_vec(),
        };
        for (at, byte) in bits.iter_mut().enumerate() {
            let before = first.saturating_sub(at as u64 * 8).min(8);
            *byte &= ((1u16 << before) - 1) as u8;
        }
        let offset = self.write_anew(&mut bits, Kind::Bitmap, moved).await?;
        moved.free_data(self, entry);
        Ok(offset)
    }

    /// Writes `bytes` to clusters of their own.
    async fn write_anew(&self, bytes: &mut Vec<u8>, kind: Kind, moved: &mut Moved) -> Result<u64> {
        let clusters = (bytes.len() as u64).div_ceil(self.cluster_size());
        let place = self.allocate_table(clusters, kind).await?;
        let len = clusters << self.cluster_bits;
        moved.new.push((place.offset, len));
        bytes.resize(len as usize, 0);
        self.write_at(place.offset, bytes, Purpose::Bitmap).await?;
        Ok(place.offset)
    }
}

impl Moved {
    fn free(&mut self, image: &Qcow2, offset: u64, len: u64) {
        self.old
            .push((offset, len.next_multiple_of(image.cluster_size())));
    }

    fn free_data(&mut self, image: &Qcow2, entry: u64) {
        if entry & DATA_OFFSET != 0 {
            self.free(image, entry & DATA_OFFSET, image.cluster_size());
        }
    }
}
