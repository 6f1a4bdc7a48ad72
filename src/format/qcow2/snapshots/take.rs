//! Taking snapshots.

use std::sync::Arc;
use std::time::SystemTime;

use super::super::Qcow2;
use super::super::l2::{COPIED, OFFSET};
use super::change::Prepared;
use super::frozen::Frozen;
use super::rewrite::{Rewrite, Written, set_descriptor};
use super::table::{self, Entries, MAX_NAME};
use crate::error::{Error, Result};

impl Qcow2 {
    /// Prepares snapshots with these names, all of the same instant, up to where they take effect.
    /// Writes that allocate wait from here on until they have, or have been taken back.
    ///
    /// # Errors
    /// When a name is taken or too long, the image cannot have snapshots, its refcounts cannot count
    /// them, there is no room, or metadata cannot be read or written. The image is as before then.
    pub async fn take_snapshots(
        self: &Arc<Self>,
        names: &[String],
        date: SystemTime,
    ) -> Result<Prepared> {
        self.told(self.prepare_taking(names, date).await)
    }

    async fn prepare_taking(
        self: &Arc<Self>,
        names: &[String],
        date: SystemTime,
    ) -> Result<Prepared> {
        let (header, mut entries) = self.settled_snapshots().await?;
        for name in names {
            check_name(&entries, name)?;
            let id = entries.next_id();
            entries.add(table::new(id, name, header.size, date));
        }
        let frozen = Frozen::of(self, &header).await?;
        let taken = names.len();
        let write = async |rewrite: Rewrite<'_>, entries: Entries| {
            self.write_taken(rewrite, entries, taken).await
        };
        frozen.rewrite(taken, entries, write).await
    }

    /// Writes the tables of an image that has `taken` more snapshots, the last ones of `entries`.
    async fn write_taken(
        &self,
        mut rewrite: Rewrite<'_>,
        mut entries: Entries,
        taken: usize,
    ) -> Result<Written> {
        let old = rewrite.l1.clone();
        self.each_table(&old, async |index, mut bytes| {
            let owned = count_entries(&mut rewrite, &mut bytes, taken as u64).await?;
            let table = old.get(index).copied().unwrap_or(0) & OFFSET;
            // The snapshots have it; the image has a copy, or has it with them.
            let (entry, more) = match owned {
                true => (rewrite.put_table(&bytes).await? | COPIED, taken - 1),
                false => (table, taken),
            };
            rewrite
                .counts
                .add_if(table >> self.cluster_bits, more as u64)
                .await?;
            if let Some(place) = rewrite.l1.get_mut(index) {
                *place = entry;
            }
            Ok(())
        })
        .await?;
        // The first one has the L1 table that the image had, and each other one a copy.
        let header = self.header();
        let mut offset = header.l1_offset;
        for index in entries.snapshots.len() - taken..entries.snapshots.len() {
            entries.place(index, offset, header.l1_size);
            if index + 1 < entries.snapshots.len() {
                offset = rewrite.put_l1(&old).await?.unwrap_or(header.l1_offset);
            }
        }
        rewrite.finish(entries, false).await
    }
}

/// Counts `more` references to all that an L2 table refers to, and takes the copied flags out of it.
/// Says whether there were any.
async fn count_entries(rewrite: &mut Rewrite<'_>, bytes: &mut [u8], more: u64) -> Result<bool> {
    let image = rewrite.image;
    let mut owned = false;
    for (at, words) in image.entries_of(bytes) {
        for cluster in image.hosts_of(words)? {
            rewrite.counts.add(cluster, more).await?;
        }
        if image.shape.host(words).is_some_and(|host| host.owned) {
            owned = true;
            set_descriptor(bytes, at, words.descriptor & !COPIED);
        }
    }
    Ok(owned)
}

fn check_name(entries: &Entries, name: &str) -> Result<()> {
    if name.is_empty() {
        return Err(Error::Invalid("Name is empty".into()));
    }
    if name.len() > MAX_NAME {
        return Err(Error::Invalid(format!(
            "the name has {} bytes (expected at most {MAX_NAME})",
            name.len()
        )));
    }
    if entries.snapshots.iter().any(|old| old.name == name) {
        return Err(Error::Invalid(format!(
            "Snapshot with name '{name}' already exists"
        )));
    }
    Ok(())
}
