//! Internal snapshots: their table, and how they come and go.
//!
//! Source: QEMU's `docs/interop/qcow2`, section "Snapshots". The image is opened and written
//! without this table, since refcounts and copied flags say what snapshots share with it; the
//! table is for those who list them, and for the check, which follows every L1 table.
//!
//! # Taking and deleting, while guests write
//!
//! Another snapshot means other refcounts of all clusters, and other copied flags in the mapping,
//! which have to agree on the disk at any instant. So nothing is changed where it is:
//!
//! ```text
//!   flush ─▶ claims closed ─▶ what is left flushed ─▶ new tables written, stable
//!        ─▶ header: one sector, stable ─▶ in force in memory: the instant ─▶ claims open
//!        ─▶ old tables freed
//! ```
//!
//! New refcount blocks and a new refcount table, L2 tables with other flags, an L1 table and a snapshot
//! table go to free clusters, and one sector of the header names all of them. A cut or a kill leaves
//! the old image or the new one; what was allocated in vain is lost until a check. The snapshot keeps
//! the L1 table and the L2 tables that the image had, and the image gets copies. An L2 table none of
//! whose entries may be written in place is shared instead.
//!
//! Who prepares a snapshot and lets go of it, by an error or a panic, leaves a header that names tables
//! which are not in force. The next flush puts that right before it writes anything else, and until then
//! the journal takes no record.
//!
//! While claims are closed nobody has a claim ([`Claims::close`](super::claims::Claims::close)):
//! writes that allocate, discards and the copies of jobs wait, and the metadata stands still
//! (`frozen`). Reads go on, writes in place too, up to the instant. A write in place that is on its way at
//! the instant may land in the snapshot or not, as the guest has no answer to it; whoever copies its
//! cluster waits for it ([`late`](super::late)).
//!
//! * `table`: the snapshot table as it is to be;
//! * `counts`: the refcounts as they are to be;
//! * `frozen`: metadata that stands still;
//! * [`change`]: new tables, and how they come in force or go again;
//! * `rewrite`: the tables in their new places;
//! * `take`, `delete`: what a snapshot adds and takes away.

pub mod change;
mod counts;
mod delete;
mod frozen;
mod rewrite;
mod table;
mod take;

use super::header::Header;
use super::numbers::be;
use crate::error::{Error, Result};
use crate::storage::{self, AlignedBuf, Purpose, Storage};

/// QEMU's limits.
pub(super) const MAX_SNAPSHOTS: u32 = 65536;
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

/// As [`list`], for one who opens the image and does without them.
pub(super) async fn list_if_sound(storage: &dyn Storage, header: &Header) -> Vec<Snapshot> {
    list(storage, header).await.unwrap_or_else(|error| {
        log::warn!("the image's snapshots are not listed: {error}");
        Vec::new()
    })
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
