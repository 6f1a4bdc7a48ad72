//! The image under check: its header, and reading and writing its tables.
//!
//! Nothing is read by a size that the image claims: tables are read in pieces, no further than
//! the file, and holes of the file are passed over.
//!
//! What is written goes to a [`Plan`], and reads see it. The file changes with
//! [`Image::carry_out`] alone.

use super::super::header::{Header, SECTOR};
use super::super::l2::Shape;
use super::super::numbers::words;
use super::super::read_header;
use super::plan::{Plan, Step};
use crate::error::{Action, Error, Result};
use crate::storage::{self, AlignedBuf, Purpose, Storage};
use crate::sync::Mutex;

/// Bytes of a table that are read at a time.
const PIECE: u64 = 1 << 20;

/// An image and its storage.
pub struct Image<'a> {
    /// Where it is.
    pub storage: &'a dyn Storage,
    /// Its header.
    pub header: Header,
    /// What its L2 entries mean.
    pub shape: Shape,
    /// Bytes of the file, in whole sectors.
    pub len: u64,
    /// What is to be written.
    plan: Mutex<Plan>,
    /// It is on a device, which has its length whatever is in use.
    pub fixed: bool,
}

impl<'a> Image<'a> {
    /// Reads the header.
    pub async fn open(storage: &'a dyn Storage) -> Result<Self> {
        let header = read_header(storage).await?;
        if header.has_data_file() && header.data_file.is_none() {
            // QEMU has nothing to open either, and a flipped bit looks like this.
            return Err(Error::unsupported(
                storage.name(),
                "the image has its guest data in a data file, and does not name it",
            ));
        }
        let failed = |error| Error::io(Action::Read, storage.name(), 0, &error);
        let len = storage.len().await.map_err(failed)?;
        Ok(Self {
            storage,
            shape: header.shape(),
            header,
            len: len.next_multiple_of(SECTOR as u64),
            fixed: storage.capacity().await.map_err(failed)?.is_some(),
            plan: Mutex::default(),
        })
    }

    /// The image as it will be when the plan has been carried out, with that plan.
    pub async fn planned(self) -> Result<Self> {
        let first = self.read_cluster(0).await?;
        let header = Header::parse(first.to_vec(), self.storage.name())?;
        let end = self.plan.lock().end();
        Ok(Self {
            shape: header.shape(),
            header,
            len: self.len.max(end.next_multiple_of(SECTOR as u64)),
            ..self
        })
    }

    /// The bytes that are to be written: ranges in ascending order that do not touch.
    pub fn to_be_written(&self) -> Vec<std::ops::Range<u64>> {
        self.plan.lock().ranges()
    }

    /// Writes what was planned, in the order of the plan.
    pub async fn carry_out(self) -> Result<()> {
        let failed = |action, offset| {
            move |error: std::io::Error| Error::io(action, self.storage.name(), offset, &error)
        };
        let plan = std::mem::take(&mut *self.plan.lock());
        let capacity = self.storage.capacity().await;
        let capacity = capacity.map_err(failed(Action::Write, 0))?;
        if let Some(capacity) = capacity.filter(|&capacity| plan.end() > capacity) {
            let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
            return Err(failed(Action::Write, capacity)(full));
        }
        for step in plan.into_steps() {
            match step {
                Step::Write { offset, bytes } => {
                    let bytes = AlignedBuf::copy_of(&bytes);
                    storage::io::write_buf(Purpose::Check.on(self.storage), offset, &bytes)
                        .await
                        .map_err(failed(Action::Write, offset))?;
                }
                Step::Barrier => storage::io::sync(self.storage)
                    .await
                    .map_err(failed(Action::Flush, 0))?,
            }
        }
        Ok(())
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    /// Clusters of the file; the last one may be in it in part.
    pub fn clusters(&self) -> u64 {
        self.len.div_ceil(self.cluster_size())
    }

    /// The cluster that holds a byte of the file.
    pub fn cluster_of(&self, offset: u64) -> u64 {
        offset >> self.header.cluster_bits
    }

    /// The clusters that a range touches.
    pub fn clusters_of(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let first = self.cluster_of(offset);
        if len == 0 {
            return first..first;
        }
        first..self.cluster_of(offset.saturating_add(len - 1)) + 1
    }

    /// Whether a range ends a cluster or more behind the file. The last cluster need not be in
    /// it as a whole: what is not reads as zeros.
    pub fn leaves_file(&self, offset: u64, len: u64) -> bool {
        len > 0 && offset.saturating_add(len) >= self.len.saturating_add(self.cluster_size())
    }

    /// Whether `offset` is a cluster's.
    pub fn is_aligned(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.cluster_size())
    }

    /// Bytes of an L2 entry's table: a cluster.
    pub async fn read_cluster(&self, offset: u64) -> Result<AlignedBuf> {
        self.read(offset, self.cluster_size() as usize).await
    }

    /// Reads `len` bytes; those behind the end of the file are 0.
    pub async fn read(&self, offset: u64, len: usize) -> Result<AlignedBuf> {
        let mut bytes = if offset < self.len {
            storage::io::fetch(Purpose::Check.on(self.storage), offset, len).await?
        } else {
            AlignedBuf::zeroed(len)
        };
        self.plan.lock().overlay(offset, &mut bytes);
        Ok(bytes)
    }

    /// Gives the index and value of each word but 0 of a table to `each`.
    pub async fn words(
        &self,
        table: u64,
        count: u64,
        mut each: impl FnMut(u64, u64),
    ) -> Result<()> {
        let end = self.len.min(table.saturating_add(count.saturating_mul(8)));
        let mut at = table;
        while at < end {
            let data = self.storage.next_data(at).await.map(|(data, _)| data);
            let Some(data) = data.into_iter().chain(self.plan.lock().next(at)).min() else {
                return Ok(());
            };
            // A word may begin in front of the data.
            at += data.saturating_sub(at) / 8 * 8;
            if at >= end {
                return Ok(());
            }
            let len = PIECE.min((end - at).next_multiple_of(8));
            let bytes = self.read(at, len as usize).await?;
            for (index, word) in words(&bytes).enumerate().filter(|&(_, word)| word != 0) {
                let index = (at - table) / 8 + index as u64;
                if index < count {
                    each(index, word);
                }
            }
            at += len;
        }
        Ok(())
    }

    /// Reads a table that is known to be of a sane size.
    pub async fn table(&self, offset: u64, count: u64) -> Result<Vec<u64>> {
        let mut table = vec![0; count as usize];
        self.words(offset, count, |index, word| {
            if let Some(place) = table.get_mut(index as usize) {
                *place = word;
            }
        })
        .await?;
        Ok(table)
    }

    /// Plans to write `bytes`, whole sectors.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        self.plan.lock().write(offset, bytes);
    }

    /// Plans to write the sectors in which `new` differs from `old`, which is what is there.
    pub fn write_changed(&self, offset: u64, old: &[u8], new: &[u8]) {
        let sectors = old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate();
        let mut run: Option<(usize, usize)> = None;
        let mut runs = Vec::new();
        for (index, _) in sectors.filter(|(_, (old, new))| old != new) {
            match &mut run {
                Some((_, end)) if *end == index => *end += 1,
                _ => runs.extend(run.replace((index, index + 1))),
            }
        }
        runs.extend(run);
        for (start, end) in runs {
            let end = (end * SECTOR).min(new.len());
            if let Some(bytes) = new.get(start * SECTOR..end) {
                self.write(offset + (start * SECTOR) as u64, bytes);
            }
        }
    }

    /// Plans to make stable what is written before.
    pub fn barrier(&self) {
        self.plan.lock().barrier();
    }
}
