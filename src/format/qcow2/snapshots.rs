//! Internal snapshots: reading their table.
//!
//! Source: QEMU's `docs/interop/qcow2`, section "Snapshots". The image is opened and written
//! without this table, since refcounts and copied flags say what snapshots share with it; the
//! table is for those who list them, and for the check, which follows every L1 table.

use super::header::Header;
use super::numbers::be;
use crate::error::{Error, Result};
use crate::storage::{self, AlignedBuf, Purpose, Storage};

/// QEMU's limits.
const MAX_SNAPSHOTS: u32 = 65536;
const MAX_TABLE: u64 = 64 << 20;
const MAX_EXTRA: usize = 1024;
/// The L1 table of a snapshot is limited like the active one.
pub(super) const MAX_L1_ENTRIES: u32 = (32 << 20) / 8;

/// Bytes of the fixed part of an entry.
const FIXED: usize = 40;
/// Extra data that version 3 demands: the large VM state size and the disk size.
const EXTRA_V3: usize = 16;

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its unique identifier: a number as text, by custom.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Where its L1 table is.
    pub l1_offset: u64,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// When it was taken: seconds since 1970.
    pub date_seconds: u32,
    /// When it was taken: the part of a second, in nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of the saved state of the VM; 0: of the disk alone.
    pub vm_state_size: u64,
    /// Size of the disk in bytes.
    pub disk_size: u64,
    /// Instructions that the guest had executed, where they are counted.
    pub instructions: Option<u64>,
    /// It lacks extra data that version 3 demands.
    pub(super) incomplete: bool,
    /// The disk size is its own, not the image's for want of one.
    pub(super) sized: bool,
    /// Where its entry is in the file.
    pub(super) at: u64,
}

/// The table as a whole.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// In the order of the table.
    pub snapshots: Vec<Snapshot>,
    /// Bytes of the table.
    pub len: u64,
}

/// The internal snapshots of the image in `storage`, whose header this is, in the table's order.
///
/// # Errors
/// When the table cannot be read, or contradicts the specification.
pub async fn list(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>> {
    let fetch =
        async |offset, len| storage::io::fetch(Purpose::Snapshots.on(storage), offset, len).await;
    Ok(read(fetch, storage.name(), header).await?.snapshots)
}

/// Reads the table of the image `file`, whose bytes `fetch` gives by offset and length.
pub(super) async fn read(
    fetch: impl AsyncFn(u64, usize) -> Result<AlignedBuf>,
    file: &str,
    header: &Header,
) -> Result<Table> {
    if header.snapshots == 0 {
        return Ok(Table::default());
    }
    let damaged = |what: String| Error::corrupt(file, what);
    if header.snapshots > MAX_SNAPSHOTS {
        return Err(damaged(format!(
            "{} snapshots (expected at most {MAX_SNAPSHOTS})",
            header.snapshots
        )));
    }
    let start = header.snapshots_offset;
    if start == 0 || !start.is_multiple_of(1 << header.cluster_bits) || start >> 56 != 0 {
        return Err(damaged(format!(
            "snapshot table at offset {start:#x} (expected a multiple of the cluster size)"
        )));
    }
    let mut table = Table::default();
    for index in 0..header.snapshots {
        let at = table.len.next_multiple_of(8);
        let fixed = fetch(start + at, FIXED).await?;
        let sizes = Sizes::of(&fixed);
        if sizes.extra > MAX_EXTRA {
            return Err(damaged(format!(
                "snapshot table entry {index} has {} bytes of extra data (expected at most \
                 {MAX_EXTRA})",
                sizes.extra
            )));
        }
        table.len = at + (FIXED + sizes.variable()) as u64;
        if table.len > MAX_TABLE {
            return Err(damaged(format!(
                "the snapshot table has more than {MAX_TABLE} bytes at entry {index}"
            )));
        }
        let variable = fetch(start + at + FIXED as u64, sizes.variable()).await?;
        let snapshot = Snapshot {
            at: start + at,
            ..parse(&fixed, &variable, sizes, header)
        };
        table.snapshots.push(snapshot);
    }
    Ok(table)
}

/// Lengths of the parts of an entry that vary.
#[derive(Clone, Copy)]
struct Sizes {
    extra: usize,
    id: usize,
    name: usize,
}

impl Sizes {
    fn of(fixed: &[u8]) -> Self {
        Self {
            extra: be(fixed, 36, 4) as usize,
            id: be(fixed, 12, 2) as usize,
            name: be(fixed, 14, 2) as usize,
        }
    }

    fn variable(self) -> usize {
        self.extra + self.id + self.name
    }
}

fn parse(fixed: &[u8], variable: &[u8], sizes: Sizes, header: &Header) -> Snapshot {
    let (extra, names) = variable.split_at_checked(sizes.extra).unwrap_or_default();
    let (id, name) = names.split_at_checked(sizes.id).unwrap_or_default();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let large = |at: usize| (extra.len() >= at + 8).then(|| be(extra, at, 8));
    Snapshot {
        id: text(id),
        name: text(name),
        l1_offset: be(fixed, 0, 8),
        l1_entries: be(fixed, 8, 4) as u32,
        date_seconds: be(fixed, 16, 4) as u32,
        date_nanoseconds: be(fixed, 20, 4) as u32,
        vm_clock: be(fixed, 24, 8),
        vm_state_size: large(0).unwrap_or_else(|| be(fixed, 32, 4)),
        disk_size: large(8).unwrap_or(header.size),
        // All ones: they are not counted.
        instructions: large(16).filter(|&count| count != u64::MAX),
        incomplete: header.version >= 3 && extra.len() < EXTRA_V3,
        sized: large(8).is_some(),
        at: 0,
    }
}
