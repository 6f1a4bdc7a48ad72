//! Deleting snapshots.

use std::sync::Arc;

use super::super::Qcow2;
use super::super::l2::{COPIED, OFFSET};
use super::Snapshot;
use super::change::{Places, Prepared, Wanted};
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
        self.check_snapshots()?;
        let frozen = Frozen::of(self).await?;
        let mut entries = Entries::read(&*self.storage, &self.header()).await?;
        let old_len = entries.len;
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
        let l1 = 0..self.l1_len();
        let wanted = Wanted {
            tables: l1
                .filter(|&index| self.l1_entry(index) & OFFSET != 0)
                .count(),
            l1s: 1,
            snapshots: entries.to_bytes(self.storage.name())?.len() as u64,
        };
        let mut places = Places::allocate(self, &wanted).await?;
        let written = match frozen.settle().await {
            Ok(()) => {
                self.write_deleted(&mut places, entries, old_len, &gone)
                    .await
            }
            Err(error) => Err(error),
        };
        match written {
            Ok(written) => written.draft(frozen, places).name().await,
            Err(error) => {
                places.give_up(self).await;
                Err(error)
            }
        }
    }

    /// Writes the tables of an image without `gone`, which is no longer in `entries`.
    async fn write_deleted(
        &self,
        places: &mut Places,
        entries: Entries,
        old_len: u64,
        gone: &Snapshot,
    ) -> Result<Written> {
        let mut rewrite = Rewrite::of(self, places);
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
        rewrite.finish(entries, old_len, true).await
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
