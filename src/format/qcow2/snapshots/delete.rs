//! Deleting snapshots.

use std::sync::Arc;

use super::super::Qcow2;
use super::super::l2::{COPIED, OFFSET};
use super::Snapshot;
use super::change::Prepared;
use super::frozen::Frozen;
use super::rewrite::{Rewrite, Written, set_descriptor};
use super::table::Entries;
use crate::error::{Error, Result};

impl Qcow2 {
    /// Prepares that a snapshot goes, up to where that takes effect. It is told by what is listed of
    /// it. Writes that allocate wait from here on until it has, or has been taken back.
    ///
    /// # Errors
    /// When it is not there, there is no room for the new tables, or metadata cannot be read or
    /// written. The image is as before then.
    pub async fn delete_snapshot(self: &Arc<Self>, which: &Snapshot) -> Result<Prepared> {
        self.told(self.prepare_deleting(which).await)
    }

    async fn prepare_deleting(self: &Arc<Self>, which: &Snapshot) -> Result<Prepared> {
        let (header, mut entries) = self.settled_snapshots().await?;
        let same = |old: &Snapshot| old.id == which.id && old.name == which.name;
        let index = entries.snapshots.iter().position(same);
        let index = index.ok_or_else(|| {
            Error::Invalid(format!(
                "{}: there is no snapshot '{}' with id '{}' any more",
                self.storage.name(),
                which.name,
                which.id
            ))
        })?;
        let gone = entries.remove(index);
        let frozen = Frozen::of(self, &header).await?;
        let write = async |rewrite: Rewrite<'_>, entries: Entries| {
            self.write_deleted(rewrite, entries, &gone).await
        };
        frozen.rewrite(1, entries, write).await
    }

    /// Writes the tables of an image without `gone`, which is no longer in `entries`.
    async fn write_deleted(
        &self,
        mut rewrite: Rewrite<'_>,
        entries: Entries,
        gone: &Snapshot,
    ) -> Result<Written> {
        let l1 = self.read_l1(gone.l1_offset, gone.l1_entries).await?;
        self.each_table(&l1, async |index, bytes| {
            for (_, words) in self.entries_of(&bytes) {
                for cluster in self.hosts_of(words)? {
                    rewrite.counts.take(cluster).await?;
                }
            }
            let table = l1.get(index).copied().unwrap_or(0) & OFFSET;
            rewrite.counts.take(table >> self.cluster_bits).await
        })
        .await?;
        let len = u64::from(gone.l1_entries) * 8;
        rewrite.counts.take_all(gone.l1_offset, len).await?;
        // What is left may be the image's alone again.
        let old = rewrite.l1.clone();
        self.each_table(&old, async |index, mut bytes| {
            let differs = mark_owned(&mut rewrite, &mut bytes).await?;
            let table = old.get(index).copied().unwrap_or(0) & OFFSET;
            let cluster = table >> self.cluster_bits;
            let entry = if differs {
                rewrite.counts.take(cluster).await?;
                rewrite.put_table(&bytes).await? | COPIED
            } else if rewrite.counts.count(cluster).await? == 1 {
                table | COPIED
            } else {
                table
            };
            if let Some(place) = rewrite.l1.get_mut(index) {
                *place = entry;
            }
            Ok(())
        })
        .await?;
        rewrite.finish(entries, true).await
    }
}

/// Puts the copied flags into an L2 table that the refcounts call for. Says whether it has changed.
async fn mark_owned(rewrite: &mut Rewrite<'_>, bytes: &mut [u8]) -> Result<bool> {
    let image = rewrite.image;
    let mut differs = false;
    for (at, words) in image.entries_of(bytes) {
        image.hosts_of(words)?;
        let Some(host) = image.shape.host(words) else {
            continue;
        };
        let owned = rewrite
            .counts
            .count(host.offset >> image.cluster_bits)
            .await?
            == 1;
        if owned != host.owned {
            differs = true;
            set_descriptor(bytes, at, words.descriptor ^ COPIED);
        }
    }
    Ok(differs)
}
