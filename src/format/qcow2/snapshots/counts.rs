//! The refcounts of an image as a snapshot makes them: those of the disk, changed in memory.
//!
//! Blocks are read when they are first looked at. Those that are changed go to other places; nothing
//! is written over what the header names.

use std::collections::BTreeMap;
use std::ops::Range;

use super::super::Qcow2;
use super::super::refcount::{Geometry, get, put};
use crate::error::{Error, Result};
use crate::storage::{self, Purpose};

/// Refcounts that stand still, and what is to become of them.
pub(super) struct Counts<'a> {
    image: &'a Qcow2,
    geometry: Geometry,
    /// Host offset of each block, 0: none.
    table: Vec<u64>,
    blocks: BTreeMap<usize, Block>,
    /// Clusters that have lost their last reference.
    freed: Vec<u64>,
}

struct Block {
    bytes: Vec<u8>,
    changed: bool,
    /// The cluster that it goes to.
    place: Option<u64>,
}

impl<'a> Counts<'a> {
    pub fn of(image: &'a Qcow2) -> Self {
        let meta = image.meta.lock();
        Self {
            image,
            geometry: meta.allocator.geometry(),
            table: meta.allocator.table().to_vec(),
            blocks: BTreeMap::new(),
            freed: Vec::new(),
        }
    }

    /// How many refer to `cluster`.
    pub async fn count(&mut self, cluster: u64) -> Result<u64> {
        let (order, per_block) = (self.geometry.refcount_order, self.geometry.per_block());
        let block = self.block(cluster).await?;
        Ok(get(&block.bytes, order, (cluster % per_block) as usize))
    }

    /// `more` refer to `cluster`, which is referred to already.
    pub async fn add(&mut self, cluster: u64, more: u64) -> Result<()> {
        let count = self.count(cluster).await?;
        if count == 0 {
            return Err(self.damaged(cluster, "has no reference, and there is one"));
        }
        let most = self.geometry.max_refcount();
        match count.checked_add(more).filter(|count| *count <= most) {
            Some(count) => self.set(cluster, count).await,
            None => Err(Error::Invalid(format!(
                "{}: cluster {cluster} has {count} references, and the image counts no more than \
                 {most} (expected an image with more refcount_bits, or fewer snapshots)",
                self.image.storage.name()
            ))),
        }
    }

    /// As [`add`](Self::add), which may be of none.
    pub async fn add_if(&mut self, cluster: u64, more: u64) -> Result<()> {
        match more {
            0 => Ok(()),
            more => self.add(cluster, more).await,
        }
    }

    /// One refers to `cluster` no longer.
    pub async fn take(&mut self, cluster: u64) -> Result<()> {
        match self.count(cluster).await? {
            0 => Err(self.damaged(cluster, "has fewer references than there are")),
            count => {
                if count == 1 {
                    self.freed.push(cluster);
                }
                self.set(cluster, count - 1).await
            }
        }
    }

    /// One refers no longer to each cluster of some bytes of the file.
    pub async fn take_all(&mut self, offset: u64, len: u64) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        for cluster in offset >> bits..(offset + len).div_ceil(1 << bits) {
            self.take(cluster).await?;
        }
        Ok(())
    }

    async fn set(&mut self, cluster: u64, count: u64) -> Result<()> {
        let (order, per_block) = (self.geometry.refcount_order, self.geometry.per_block());
        let block = self.block(cluster).await?;
        block.changed = true;
        let index = (cluster % per_block) as usize;
        put(&mut block.bytes, order, index, count);
        Ok(())
    }

    /// The block that covers `cluster`.
    async fn block(&mut self, cluster: u64) -> Result<&mut Block> {
        let index = usize::try_from(cluster / self.geometry.per_block()).unwrap_or(usize::MAX);
        if !self.blocks.contains_key(&index) {
            let offset = self.table.get(index).copied().filter(|offset| *offset != 0);
            let offset = offset.ok_or_else(|| self.damaged(cluster, "has no refcount"))?;
            let from = Purpose::RefcountBlock.on(&*self.image.storage);
            let len = self.image.cluster_size() as usize;
            let block = Block {
                bytes: storage::io::fetch(from, offset, len).await?.to_vec(),
                changed: false,
                place: None,
            };
            self.blocks.insert(index, block);
        }
        let block = self.blocks.get_mut(&index);
        block
            .ok_or_else(|| Error::corrupt(self.image.storage.name(), "a refcount block is missing"))
    }

    /// Writes the blocks that have changed to `places`, and what is left over of these stays there.
    /// Says how the table is to be, which names them.
    pub async fn write(&mut self, places: &mut Vec<u64>) -> Result<Vec<u64>> {
        let bits = self.geometry.cluster_bits;
        // A block that moves frees its old place, which changes the block that covers that.
        while let Some(index) = self.next_to_move() {
            let old = self.table.get(index).copied().unwrap_or(0);
            let place = places.pop().ok_or_else(|| {
                Error::Invalid("the refcount blocks have become more meanwhile (try again)".into())
            })?;
            if let Some(block) = self.blocks.get_mut(&index) {
                block.place = Some(place);
            }
            self.take(old >> bits).await?;
        }
        let mut table = self.table.clone();
        for (&index, block) in &self.blocks {
            let Some(place) = block.place else { continue };
            self.image
                .write_at(place << bits, &block.bytes, Purpose::RefcountBlock)
                .await?;
            if let Some(entry) = table.get_mut(index) {
                *entry = place << bits;
            }
        }
        Ok(table)
    }

    fn next_to_move(&self) -> Option<usize> {
        let mut blocks = self.blocks.iter();
        let to_move = |(_, block): &(&usize, &Block)| block.changed && block.place.is_none();
        blocks.find(to_move).map(|(index, _)| *index)
    }

    /// What has lost its last reference, as ranges of clusters in order.
    pub fn freed(mut self) -> Vec<Range<u64>> {
        self.freed.sort_unstable();
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for cluster in self.freed {
            match ranges.last_mut() {
                Some(last) if last.end == cluster => last.end += 1,
                _ => ranges.push(cluster..cluster + 1),
            }
        }
        ranges
    }

    fn damaged(&self, cluster: u64, what: &str) -> Error {
        Error::corrupt(
            self.image.storage.name(),
            format!(
                "cluster {cluster} {what}: the image is damaged (look at it with 'stratactl image \
                 check')"
            ),
        )
    }
}
