//! The snapshot table as it is to be: entries that stay are kept byte for byte.

use std::time::{SystemTime, UNIX_EPOCH};

use super::super::header::Header;
use super::super::numbers::put;
use super::{FIXED, MAX_SNAPSHOTS, MAX_TABLE, Snapshot};
use crate::error::{Error, Result};
use crate::storage::{self, AlignedBuf, Purpose, Storage};

/// Bytes of a name, at most: more does not fit into what QEMU keeps of it.
pub const MAX_NAME: usize = 255;
/// Extra data: the large VM state size, the disk size, the number of instructions.
const EXTRA: usize = 24;

/// The entries of a table.
pub(super) struct Entries {
    pub snapshots: Vec<Snapshot>,
    /// Each one's bytes.
    bytes: Vec<Vec<u8>>,
    /// Bytes of the table that they come from.
    pub len: u64,
}

impl Entries {
    /// Those of an image with this header.
    pub async fn read(storage: &dyn Storage, header: &Header) -> Result<Self> {
        let from = Purpose::Snapshots.on(storage);
        let fetch = async |offset, len| storage::io::fetch(from, offset, len).await;
        let table = super::read(fetch, storage.name(), header).await?;
        let whole = match table.len {
            0 => AlignedBuf::zeroed(0),
            len => fetch(header.snapshots_offset, len as usize).await?,
        };
        let starts = table.snapshots.iter().map(|snapshot| snapshot.at);
        let starts: Vec<usize> = starts
            .map(|at| (at - header.snapshots_offset) as usize)
            .collect();
        let ends = starts.iter().skip(1).copied().chain([whole.len()]);
        let bytes = starts.iter().zip(ends);
        let bytes = bytes.map(|(&start, end)| whole.get(start..end).unwrap_or_default().to_vec());
        Ok(Self {
            bytes: bytes.collect(),
            snapshots: table.snapshots,
            len: table.len,
        })
    }

    /// The identifier of the next snapshot: one more than the largest number.
    pub fn next_id(&self) -> String {
        let numbers = self.snapshots.iter().map(|snapshot| number(&snapshot.id));
        (numbers.max().unwrap_or(0) + 1).to_string()
    }

    /// Adds one.
    pub fn add(&mut self, snapshot: Snapshot) {
        self.bytes.push(encode(&snapshot));
        self.snapshots.push(snapshot);
    }

    /// Takes out the one at `index`, which there is.
    pub fn remove(&mut self, index: usize) -> Snapshot {
        self.bytes.remove(index);
        self.snapshots.remove(index)
    }

    /// Says where the L1 table of the one at `index` is.
    pub fn place(&mut self, index: usize, offset: u64, entries: u32) {
        if let (Some(snapshot), Some(bytes)) =
            (self.snapshots.get_mut(index), self.bytes.get_mut(index))
        {
            (snapshot.l1_offset, snapshot.l1_entries) = (offset, entries);
            put(bytes, 0, &offset.to_be_bytes());
            put(bytes, 8, &entries.to_be_bytes());
        }
    }

    /// The table's bytes.
    pub fn to_bytes(&self, file: &str) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        for entry in &self.bytes {
            all.resize(all.len().next_multiple_of(8), 0);
            all.extend_from_slice(entry);
        }
        if self.snapshots.len() > MAX_SNAPSHOTS as usize || all.len() as u64 > MAX_TABLE {
            return Err(Error::Invalid(format!(
                "{file}: the table of snapshots is full (expected at most {MAX_SNAPSHOTS} \
                 snapshots and {MAX_TABLE} bytes; delete one)"
            )));
        }
        Ok(all)
    }
}

/// The number at the beginning of an identifier.
fn number(id: &str) -> u64 {
    let digits = id.find(|c: char| !c.is_ascii_digit()).unwrap_or(id.len());
    let number = id.get(..digits).unwrap_or_default().parse();
    number.unwrap_or(0).min(u64::MAX - 1)
}

/// A snapshot of the disk alone, taken at `date`, whose L1 table is yet to be said.
pub(super) fn new(id: String, name: &str, disk_size: u64, date: SystemTime) -> Snapshot {
    let date = date.duration_since(UNIX_EPOCH).unwrap_or_default();
    Snapshot {
        id,
        name: name.to_owned(),
        l1_offset: 0,
        l1_entries: 0,
        date_seconds: date.as_secs() as u32,
        date_nanoseconds: date.subsec_nanos(),
        vm_clock: 0,
        vm_state_size: 0,
        disk_size,
        instructions: None,
        incomplete: false,
        sized: true,
        at: 0,
    }
}

fn encode(snapshot: &Snapshot) -> Vec<u8> {
    let (id, name) = (snapshot.id.as_bytes(), snapshot.name.as_bytes());
    let mut bytes = vec![0; FIXED + EXTRA];
    put(&mut bytes, 0, &snapshot.l1_offset.to_be_bytes());
    put(&mut bytes, 8, &snapshot.l1_entries.to_be_bytes());
    put(&mut bytes, 12, &(id.len() as u16).to_be_bytes());
    put(&mut bytes, 14, &(name.len() as u16).to_be_bytes());
    put(&mut bytes, 16, &snapshot.date_seconds.to_be_bytes());
    put(&mut bytes, 20, &snapshot.date_nanoseconds.to_be_bytes());
    put(&mut bytes, 24, &snapshot.vm_clock.to_be_bytes());
    put(&mut bytes, 36, &(EXTRA as u32).to_be_bytes());
    put(&mut bytes, FIXED, &snapshot.vm_state_size.to_be_bytes());
    put(&mut bytes, FIXED + 8, &snapshot.disk_size.to_be_bytes());
    // Not counted.
    let instructions = snapshot.instructions.unwrap_or(u64::MAX);
    put(&mut bytes, FIXED + 16, &instructions.to_be_bytes());
    bytes.extend_from_slice(id);
    bytes.extend_from_slice(name);
    bytes
}
