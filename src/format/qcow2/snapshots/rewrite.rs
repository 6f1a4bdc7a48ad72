//! An image's tables on their way to new places.

use std::ops::Range;

use futures_util::future::join_all;

use super::super::Qcow2;
use super::super::header::Places as Named;
use super::super::l2::OFFSET;
use super::super::metadata;
use super::super::numbers::{be64, put, words};
use super::super::words::Words;
use super::change::{Draft, Places, Prepared, Wanted};
use super::counts::Counts;
use super::frozen::Frozen;
use super::table::Entries;
use crate::error::{Error, Result};
use crate::storage::{self, AlignedBuf, Purpose};

/// L2 tables that are read together.
const TOGETHER: usize = 16;

/// Tables that are being written.
pub(super) struct Rewrite<'a> {
    pub image: &'a Qcow2,
    pub counts: Counts<'a>,
    pub places: &'a mut Places,
    /// The L1 table as it is to be.
    pub l1: Vec<u64>,
}

/// All that the header is to name.
pub(super) struct Written {
    named: Named,
    l1: Vec<u64>,
    table: Vec<u64>,
    freed: Vec<Range<u64>>,
    entries: Entries,
}

impl Written {
    /// With the places, which are taken now.
    pub fn draft(self, frozen: Frozen, places: Places) -> Draft {
        Draft {
            frozen,
            places,
            named: self.named,
            l1: self.l1,
            table: self.table,
            freed: self.freed,
            listed: self.entries.snapshots,
        }
    }
}

impl Frozen {
    /// Writes the tables that `write` makes of the present ones beside these, and has the header name
    /// them.
    pub async fn rewrite(
        self,
        l1s: usize,
        entries: Entries,
        write: impl AsyncFnOnce(Rewrite<'_>, Entries) -> Result<Written>,
    ) -> Result<Prepared> {
        let image = self.image.clone();
        let wanted = Wanted::of(&image, l1s, &entries)?;
        let mut places = Places::allocate(&image, &wanted).await?;
        let written = match self.settle().await {
            Ok(()) => write(Rewrite::of(&image, &mut places), entries).await,
            Err(error) => Err(error),
        };
        match written {
            Ok(written) => written.draft(self, places).name().await,
            Err(error) => {
                places.give_up(&image).await;
                Err(error)
            }
        }
    }
}

impl<'a> Rewrite<'a> {
    /// Of an image whose metadata stands still.
    pub fn of(image: &'a Qcow2, places: &'a mut Places) -> Self {
        Self {
            image,
            counts: Counts::of(image),
            places,
            l1: (0..image.l1_len())
                .map(|index| image.l1_entry(index))
                .collect(),
        }
    }

    /// Writes an L2 table to a new place, which is the image's alone.
    pub async fn put_table(&mut self, bytes: &[u8]) -> Result<u64> {
        let place = self.places.tables.pop();
        let place = place.ok_or_else(|| Error::Invalid("there are more L2 tables now".into()))?;
        let offset = place << self.image.cluster_bits;
        self.image.write_at(offset, bytes, Purpose::L2Table).await?;
        Ok(offset)
    }

    /// Writes an L1 table to a new place. `None`: it has no entries, and needs none.
    pub async fn put_l1(&mut self, entries: &[u64]) -> Result<Option<u64>> {
        let Some(place) = self.places.l1s.pop() else {
            return Ok(None);
        };
        self.put_words(place, entries, Purpose::L1Table).await?;
        Ok(Some(place))
    }

    async fn put_words(&self, offset: u64, entries: &[u64], purpose: Purpose) -> Result<()> {
        let mut bytes: Vec<u8> = entries.iter().flat_map(|word| word.to_be_bytes()).collect();
        let clusters = (bytes.len() as u64).next_multiple_of(self.image.cluster_size());
        bytes.resize(clusters as usize, 0);
        self.image.write_at(offset, &bytes, purpose).await
    }

    /// Writes the rest: the L1 table, the snapshot table, the refcounts. What the header named before
    /// and names no longer is freed; the L1 table only if it `is_free`.
    pub async fn finish(mut self, entries: Entries, is_free: bool) -> Result<Written> {
        let image = self.image;
        let header = image.header();
        let l1 = self.l1.clone();
        let l1_offset = self.put_l1(&l1).await?.unwrap_or(header.l1_offset);
        if is_free && l1_offset != header.l1_offset {
            let len = u64::from(header.l1_size) * 8;
            self.counts.take_all(header.l1_offset, len).await?;
        }
        let mut bytes = entries.to_bytes(image.storage.name())?;
        let len = (bytes.len() as u64).next_multiple_of(image.cluster_size());
        bytes.resize(len as usize, 0);
        let snapshots_offset = self.places.snapshots;
        if len > 0 {
            image
                .write_at(snapshots_offset, &bytes, Purpose::Snapshots)
                .await?;
        }
        if header.snapshots > 0 {
            self.counts
                .take_all(header.snapshots_offset, entries.len)
                .await?;
        }
        let reftable_len = u64::from(header.reftable_clusters) << image.cluster_bits;
        self.counts
            .take_all(header.reftable_offset, reftable_len)
            .await?;
        let table = self.counts.write(&mut self.places.blocks).await?;
        let reftable_offset = self.places.reftable;
        self.put_words(reftable_offset, &table, Purpose::RefcountTable)
            .await?;
        Ok(Written {
            named: Named {
                l1_offset,
                reftable_offset,
                snapshots_offset,
                snapshots: entries.snapshots.len() as u32,
            },
            l1: self.l1,
            table,
            freed: self.counts.freed(),
            entries,
        })
    }
}

impl Qcow2 {
    /// Gives `visit` each L2 table that `l1` names, with its index.
    pub(super) async fn each_table(
        &self,
        l1: &[u64],
        mut visit: impl AsyncFnMut(usize, AlignedBuf) -> Result<()>,
    ) -> Result<()> {
        metadata::check_tables(&self.header(), l1, &[], self.storage.name())?;
        let named: Vec<(usize, u64)> = l1
            .iter()
            .map(|entry| entry & OFFSET)
            .enumerate()
            .filter(|(_, offset)| *offset != 0)
            .collect();
        for some in named.chunks(TOGETHER) {
            let from = Purpose::L2Table.on(&*self.storage);
            let len = self.cluster_size() as usize;
            let read = some.iter().map(async |&(index, offset)| {
                let bytes = storage::io::fetch(from, offset, len).await;
                bytes.map(|bytes| (index, bytes))
            });
            for table in join_all(read).await {
                let (index, bytes) = table?;
                visit(index, bytes).await?;
            }
        }
        Ok(())
    }

    /// The entries of an L2 table, each with where it is in it.
    pub(super) fn entries_of(&self, table: &[u8]) -> Vec<(usize, Words)> {
        let len = self.shape.entry_bytes() as usize;
        let entries = table.chunks_exact(len).enumerate();
        let entries = entries.map(|(index, bytes)| {
            let bitmap = if self.shape.extended {
                be64(bytes, 8)
            } else {
                0
            };
            let descriptor = be64(bytes, 0);
            (index * len, Words { descriptor, bitmap })
        });
        entries.collect()
    }

    /// The host clusters that an entry refers to.
    ///
    /// # Errors
    /// When it is none that an image may have.
    pub(super) fn hosts_of(&self, words: Words) -> Result<Range<u64>> {
        if let Some(what) = self.shape.fault(words) {
            return Err(Error::corrupt(self.storage.name(), what));
        }
        let extent = self.shape.extent(words).unwrap_or(0..0);
        Ok(self.shape.clusters(&extent))
    }

    /// Reads an L1 table that is not the active one.
    pub(super) async fn read_l1(&self, offset: u64, entries: u32) -> Result<Vec<u64>> {
        if entries > super::MAX_L1_ENTRIES || !offset.is_multiple_of(self.cluster_size()) {
            return Err(Error::corrupt(
                self.storage.name(),
                format!(
                    "a snapshot has an L1 table of {entries} entries at {offset:#x} (expected at \
                     most {}, at a multiple of the cluster size)",
                    super::MAX_L1_ENTRIES
                ),
            ));
        }
        let from = Purpose::L1Table.on(&*self.storage);
        let bytes = storage::io::fetch(from, offset, entries as usize * 8).await?;
        Ok(words(&bytes).collect())
    }
}

/// Sets the descriptor of an entry of an L2 table.
pub(super) fn set_descriptor(table: &mut [u8], at: usize, descriptor: u64) {
    put(table, at, &descriptor.to_be_bytes());
}
