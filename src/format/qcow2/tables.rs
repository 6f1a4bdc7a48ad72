//! L2 tables: made where there is none, and copied where a snapshot has the same one.

use super::header::SECTOR;
use super::l2;
use super::metadata::Kind;
use super::refcount::Allocation;
use super::{Meta, Qcow2};
use crate::error::{Action, Result};
use crate::storage::{self, Purpose};
use crate::sync::atomic::Ordering;

impl Qcow2 {
    /// Makes sure that the L2 table of a guest cluster exists and its slice is in memory.
    ///
    /// # Errors
    /// When metadata cannot be read or written.
    pub(super) async fn prepare(&self, cluster: u64) -> Result<()> {
        let index = cluster / self.table_entries();
        if !self.owns_table(index) {
            Box::pin(self.make_table(index)).await?;
        }
        let number = self.place(cluster).0;
        while self.slice(number).is_none() {
            Box::pin(self.load_slice(number)).await?;
        }
        Ok(())
    }

    async fn make_table(&self, index: u64) -> Result<()> {
        let _claim = self.l1_claims.claim(index..index + 1).await;
        if self.owns_table(index) {
            return Ok(());
        }
        let old = self.l1_entry(index) & l2::OFFSET;
        let table = self.allocate(1).await?;
        // Stable before the L1 entry, like everything that is written before a flush begins.
        let written = match old {
            0 => self.clear_table(&table).await,
            old => self.copy_table(old, table.offset).await,
        };
        if let Err(error) = written {
            self.give_up(table).await;
            return Err(error);
        }
        let linked = self.change(|meta| {
            self.set_l1(meta, index, table.offset | l2::COPIED);
            meta.allocator
                .add_metadata(table.offset >> self.cluster_bits, Kind::L2);
            if old != 0 {
                self.note_unmapped(meta, [(old, self.cluster_size())]);
            }
        });
        let linked = linked.await;
        if linked.is_err() {
            self.give_up(table).await;
        }
        linked
    }

    /// Sets an L1 entry: the one place that does. What the table is to hold has been written.
    pub(super) fn set_l1(&self, meta: &mut Meta, index: u64, value: u64) {
        if let Some(entry) = self.l1.get(index as usize) {
            meta.allocator.log_mut().l1(index, value);
            entry.store(value, Ordering::Release);
            meta.dirty_l1.insert(index as usize);
        }
    }

    /// Makes a new table read as zeros.
    async fn clear_table(&self, table: &Allocation) -> Result<()> {
        if !table.fresh {
            let to = Purpose::L2Table.on(&*self.storage);
            storage::io::zero(to, table.offset, self.cluster_size(), false)
                .await
                .map_err(|error| self.io_error(Action::Write, table.offset, &error))?;
        }
        self.reach(table.offset).await
    }

    /// Sees to it that the file reaches over a cluster behind its end. An L1 entry may be stable
    /// before anything has been written to its table, and must not point out of the file then.
    async fn reach(&self, offset: u64) -> Result<()> {
        let last = self.storage.limits().offset_align.max(SECTOR as u64);
        let at = offset + self.cluster_size() - last;
        let len = self.storage.len().await;
        if len.is_ok_and(|len| len >= at + last) {
            return Ok(());
        }
        self.write_at(at, &vec![0; last as usize], Purpose::L2Table)
            .await
    }

    /// Copies a table that a snapshot refers to as well. Nobody changes it: it is not ours.
    async fn copy_table(&self, from: u64, to: u64) -> Result<()> {
        let len = self.cluster_size() as usize;
        let image = Purpose::L2Table.on(&*self.storage);
        let bytes = storage::io::fetch(image, from, len).await?;
        storage::io::write_buf(image, to, &bytes)
            .await
            .map_err(|error| self.io_error(Action::Write, to, &error))
    }

    /// Whether there is an L2 table that is nobody else's.
    fn owns_table(&self, index: u64) -> bool {
        let entry = self.l1_entry(index);
        entry & l2::OFFSET != 0 && entry & l2::COPIED != 0
    }
}
