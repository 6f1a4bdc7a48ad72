//! Changing the header.
//!
//! A change is a list of patches, written in order with a barrier after each. What the header in
//! force refers to is touched by the last patch alone, and that is one sector, which a disk writes
//! as a whole.

use super::super::journal::{self, Mark};
use super::super::numbers::{be32, be64, put};
use super::{
    Backing, BitmapDirectory, EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_END, EXT_FEATURE_NAMES,
    Extension, Header, MAX_BACKING_NAME, SECTOR,
};
use crate::error::Result;

/// What takes the place of a removed extension of the same length: unknown to everybody, and
/// unknown extensions are ignored by the specification.
const EXT_FILLER: u32 = 0x5354_5241;

/// Whole sectors to be written to the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Position in the file.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Where the header says that the image's tables are: all that it takes for another mapping, other
/// refcounts and other snapshots to be in force at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// The active L1 table, whose length stays.
    pub l1_offset: u64,
    /// The refcount table, whose length stays.
    pub reftable_offset: u64,
    /// The snapshot table; 0: there is none.
    pub snapshots_offset: u64,
    /// Snapshots in it.
    pub snapshots: u32,
}

impl Header {
    /// Where the tables are.
    #[must_use]
    pub fn places(&self) -> Places {
        Places {
            l1_offset: self.l1_offset,
            reftable_offset: self.reftable_offset,
            snapshots_offset: self.snapshots_offset,
            snapshots: self.snapshots,
        }
    }

    /// The first sector with tables in other places.
    #[must_use]
    pub fn with_places(&self, places: Places) -> Patch {
        self.first_sector(|sector| {
            put(sector, 40, &places.l1_offset.to_be_bytes());
            put(sector, 48, &places.reftable_offset.to_be_bytes());
            put(sector, 60, &places.snapshots.to_be_bytes());
            put(sector, 64, &places.snapshots_offset.to_be_bytes());
        })
    }

    /// The changes, in order and with a barrier between them, that give the image another
    /// backing file or none. What the present header refers to is touched by the last change
    /// alone, and that is one sector: a cut leaves the old header or the new one.
    ///
    /// # Errors
    /// When there is no room for the name.
    pub fn plan_backing(&self, backing: Option<&Backing>) -> Result<Vec<Patch>> {
        let mut sector = self.whole();
        let mut patches = Vec::new();
        self.place_backing_format(&mut sector, backing.and_then(|b| b.format.as_deref()))?;
        let (at, len) = match backing {
            None => (0, 0),
            Some(Backing { name, .. }) => {
                let at = self.room_for_name(&sector, name.len())?;
                patches.extend(place_name(&mut sector, at, name));
                (at as u64, name.len() as u32)
            }
        };
        put(&mut sector, 8, &at.to_be_bytes());
        put(&mut sector, 16, &len.to_be_bytes());
        sector.truncate(SECTOR);
        patches.push(Patch {
            offset: 0,
            bytes: sector,
        });
        Ok(patches)
    }

    /// Changes the backing-format extension within the first sector of `bytes`.
    fn place_backing_format(&self, bytes: &mut [u8], format: Option<&str>) -> Result<()> {
        let old = self
            .extensions
            .iter()
            .position(|e| e.kind == EXT_BACKING_FORMAT);
        let mut extensions = self.extensions.clone();
        match (old, format) {
            (None, None) => return Ok(()),
            (Some(index), None) => {
                if let Some(extension) = extensions.get_mut(index) {
                    extension.kind = EXT_FILLER;
                    extension.data.fill(0);
                }
            }
            (Some(index), Some(format)) => {
                if let Some(extension) = extensions.get_mut(index) {
                    extension.data = format.as_bytes().to_vec();
                }
            }
            (None, Some(format)) => {
                let filler = extensions.iter_mut().find(|e| {
                    e.kind == EXT_FILLER && e.padded_len() == 8 + format.len().next_multiple_of(8)
                });
                let new = Extension {
                    kind: EXT_BACKING_FORMAT,
                    data: format.as_bytes().to_vec(),
                };
                match filler {
                    Some(filler) => *filler = new,
                    None => extensions.insert(0, new),
                }
            }
        }
        let layout =
            |list: &[Extension]| -> Vec<usize> { list.iter().map(Extension::padded_len).collect() };
        if layout(&extensions) != layout(&self.extensions) {
            // Everything behind it moves.
            give_room(&mut extensions);
        }
        self.write_extensions(bytes, &extensions)
    }

    /// Changes the bitmaps extension within the first sector of `bytes`.
    fn place_bitmaps(&self, bytes: &mut [u8], directory: BitmapDirectory) -> Result<()> {
        let mut extensions = self.extensions.clone();
        for extension in extensions.iter_mut().filter(|e| e.kind == EXT_BITMAPS) {
            put(&mut extension.data, 0, &directory.count.to_be_bytes());
            put(&mut extension.data, 8, &directory.len.to_be_bytes());
            put(&mut extension.data, 16, &directory.offset.to_be_bytes());
        }
        let before = bytes.to_vec();
        if self.write_extensions(bytes, &extensions).is_ok() {
            return Ok(());
        }
        bytes.copy_from_slice(&before);
        give_room(&mut extensions);
        self.write_extensions(bytes, &extensions)
    }

    /// The changes that make the header name a journal, and set the autoclear bit that says so, or
    /// take both away. As with [`Header::plan_backing`], the last one is one sector.
    ///
    /// # Errors
    /// When there is no room.
    pub fn plan_journal(&self, mark: Option<Mark>) -> Result<Vec<Patch>> {
        let mut extensions = self.extensions.clone();
        extensions.retain(|extension| extension.kind != journal::EXTENSION);
        extensions.extend(mark.map(|mark| Extension {
            kind: journal::EXTENSION,
            data: mark.to_bytes(),
        }));
        let fits = self.plan_extensions(&extensions, mark.is_some());
        fits.or_else(|_| {
            give_room(&mut extensions);
            self.plan_extensions(&extensions, mark.is_some())
        })
    }

    /// The changes to other extensions, with the backing file's name out of their way.
    fn plan_extensions(&self, extensions: &[Extension], journaled: bool) -> Result<Vec<Patch>> {
        let mut bytes = self.whole();
        let padded = |list: &[Extension]| list.iter().map(Extension::padded_len).sum::<usize>();
        let end = |list: &[Extension]| self.header_length + padded(list) + 8;
        // What was there goes, unless it is the name.
        let name = self.backing.as_ref().map(|backing| &*backing.name);
        let name_at = be64(&self.raw, 8) as usize;
        let old_end = end(&self.extensions);
        let stop = if name.is_some() {
            name_at.min(old_end)
        } else {
            old_end
        };
        if let Some(rest) = bytes.get_mut(end(extensions)..stop.min(SECTOR)) {
            rest.fill(0);
        }
        self.write_extensions(&mut bytes, extensions)?;
        let mut patches = Vec::new();
        if let Some(name) = name
            && name_at < end(extensions)
        {
            let at = self.room_for_name(&bytes, name.len())?;
            patches.extend(place_name(&mut bytes, at, name));
            put(&mut bytes, 8, &(at as u64).to_be_bytes());
        }
        let autoclear = match journaled {
            true => self.autoclear | journal::AUTOCLEAR,
            false => self.autoclear & !journal::AUTOCLEAR,
        };
        put(&mut bytes, 88, &autoclear.to_be_bytes());
        bytes.truncate(SECTOR);
        patches.push(Patch { offset: 0, bytes });
        Ok(patches)
    }

    /// The first sector, naming another position of the journal, which the header has from now on.
    /// `None`: there is no journal.
    pub fn with_flushed(&mut self, flushed: u64) -> Option<Patch> {
        let mark = Mark {
            flushed,
            ..self.journal?
        };
        let mut at = self.header_length;
        for extension in &mut self.extensions {
            if extension.kind == journal::EXTENSION {
                extension.data = mark.to_bytes();
                let end = at + 8 + extension.data.len();
                // Zeros at its end are not kept.
                self.raw.resize(self.raw.len().max(end), 0);
                put(&mut self.raw, at + 8, &extension.data);
                self.journal = Some(mark);
                break;
            }
            at += extension.padded_len();
        }
        let mut bytes = self.raw.clone();
        bytes.resize(SECTOR, 0);
        Some(Patch { offset: 0, bytes })
    }

    fn write_extensions(&self, bytes: &mut [u8], extensions: &[Extension]) -> Result<()> {
        let before = bytes.to_vec();
        let mut at = self.header_length;
        for extension in extensions {
            put(bytes, at, &extension.kind.to_be_bytes());
            put(bytes, at + 4, &(extension.data.len() as u32).to_be_bytes());
            let padded = extension.padded_len() - 8;
            if let Some(area) = bytes.get_mut(at + 8..at + 8 + padded) {
                area.fill(0);
            }
            put(bytes, at + 8, &extension.data);
            at += extension.padded_len();
        }
        put(bytes, at, &[0; 8]);
        let same_behind = bytes.get(SECTOR..) == before.get(SECTOR..);
        let fits = extensions == self.extensions.as_slice() || at + 8 <= SECTOR || same_behind;
        if fits && same_behind {
            return Ok(());
        }
        Err(self.unsupported("the header has no room to change its extensions in one sector"))
    }

    /// A place for a backing file name of `len` bytes that nothing refers to now, except within
    /// the first sector, which is written as a whole.
    fn room_for_name(&self, bytes: &[u8], len: usize) -> Result<usize> {
        if len > MAX_BACKING_NAME {
            return Err(self.unsupported(format!(
                "backing file name of {len} bytes (expected at most {MAX_BACKING_NAME})"
            )));
        }
        let mut end = self.header_length + 8;
        let mut at = self.header_length;
        while at + 8 <= bytes.len() && be32(bytes, at) != EXT_END {
            at += 8 + (be32(bytes, at + 4) as usize).next_multiple_of(8);
            end = at + 8;
        }
        if end + len <= SECTOR {
            return Ok(end);
        }
        let (old_at, old_len) = (be64(&self.raw, 8) as usize, be32(&self.raw, 16) as usize);
        // In sectors of its own: the old one stays whole meanwhile. Between the extensions and the
        // old name where there is room, or names that change would move on through the cluster.
        let between = end.next_multiple_of(SECTOR);
        if between + len <= old_at / SECTOR * SECTOR {
            return Ok(between);
        }
        let behind = end
            .max(old_at.saturating_add(old_len))
            .next_multiple_of(SECTOR);
        if behind + len <= bytes.len() {
            return Ok(behind);
        }
        Err(self.unsupported("the header has no room for the new backing file name"))
    }

    /// The first sector with other autoclear bits.
    #[must_use]
    pub fn with_autoclear(&self, bits: u64) -> Patch {
        self.first_sector(|sector| put(sector, 88, &bits.to_be_bytes()))
    }

    /// The first sector with other incompatible bits: dirty and corrupt are what changes.
    #[must_use]
    pub fn with_incompatible(&self, bits: u64) -> Patch {
        self.first_sector(|sector| put(sector, 72, &bits.to_be_bytes()))
    }

    /// The first sector with another disk size and L1 table.
    #[must_use]
    pub fn with_size(&self, size: u64, l1_offset: u64, l1_size: u32) -> Patch {
        self.first_sector(|sector| {
            put(sector, 24, &size.to_be_bytes());
            put(sector, 36, &l1_size.to_be_bytes());
            put(sector, 40, &l1_offset.to_be_bytes());
        })
    }

    /// The first sector with another disk size, and with another place of the bitmaps' directory
    /// if one is given.
    ///
    /// # Errors
    /// When the first sector has no room for what names the directory.
    pub fn plan_size(&self, size: u64, bitmaps: Option<BitmapDirectory>) -> Result<Patch> {
        let mut bytes = self.whole();
        if let Some(directory) = bitmaps {
            self.place_bitmaps(&mut bytes, directory)?;
        }
        put(&mut bytes, 24, &size.to_be_bytes());
        bytes.truncate(SECTOR);
        Ok(Patch { offset: 0, bytes })
    }

    /// The first sector without a snapshot table.
    #[must_use]
    pub fn without_snapshots(&self) -> Patch {
        self.first_sector(|sector| {
            put(sector, 60, &0u32.to_be_bytes());
            put(sector, 64, &0u64.to_be_bytes());
        })
    }

    /// The first sector with another refcount table.
    #[must_use]
    pub fn with_reftable(&self, offset: u64, clusters: u32) -> Patch {
        self.first_sector(|sector| {
            put(sector, 48, &offset.to_be_bytes());
            put(sector, 56, &clusters.to_be_bytes());
        })
    }

    /// The first sector as it is.
    #[must_use]
    pub fn first(&self) -> Patch {
        self.first_sector(|_| ())
    }

    fn first_sector(&self, change: impl FnOnce(&mut [u8])) -> Patch {
        let mut bytes = self.whole();
        bytes.truncate(SECTOR);
        change(&mut bytes);
        Patch { offset: 0, bytes }
    }

    /// The header after `patches` have reached the disk.
    ///
    /// # Errors
    /// When they do not make a header.
    pub fn patched(&self, patches: &[Patch]) -> Result<Self> {
        let mut raw = self.whole();
        for patch in patches {
            put(&mut raw, patch.offset as usize, &patch.bytes);
        }
        Self::parse(raw, &self.file)
    }
}

/// Puts a backing file's name at `at`. Returns the change behind the first sector, if there is one.
fn place_name(bytes: &mut [u8], at: usize, name: &str) -> Option<Patch> {
    put(bytes, at, name.as_bytes());
    let first = (at / SECTOR * SECTOR).max(SECTOR);
    let last = (at + name.len()).next_multiple_of(SECTOR);
    let behind = bytes.get(first..last).filter(|bytes| !bytes.is_empty())?;
    Some(Patch {
        offset: first as u64,
        bytes: behind.to_vec(),
    })
}

/// What names the features is for messages alone, and is given up where the rest would otherwise
/// not fit into one sector.
fn give_room(extensions: &mut Vec<Extension>) {
    extensions.retain(|e| e.kind != EXT_FEATURE_NAMES && e.kind != EXT_FILLER);
}
