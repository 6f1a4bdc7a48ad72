//! The qcow2 engine.
//!
//! * [`header`]: the header, and changes to it that a cut cannot tear;
//! * `open`: from a file to an image;
//! * `mapping`: where guest data is, without waiting;
//! * `loading`: metadata on its way into memory and out of it;
//! * [`l2`]: mapping entries, cached in slices of 4 KiB that are read without a lock;
//! * [`refcount`]: the allocator, an in-memory step;
//! * [`metadata`]: which clusters are the image's own, so that no guest data goes there;
//! * `bitmaps`: the persistent bitmaps of others, which writing makes out of date;
//! * [`claims`]: who changes the mapping of which clusters right now;
//! * [`late`]: writes on their way into layers below the image;
//! * `update`: allocating, linking, zeroing and unmapping clusters;
//! * `reserve`: space behind the end of the file, ahead of the writes;
//! * `flush`: what reaches the disk in which order;
//! * `freed`: clusters that wait to be free;
//! * [`journal`]: what completed and is not flushed, for the next process;
//! * [`create`]: making images;
//! * `resize`: another size, and space allocated ahead;
//! * `inspect`: what tools tell of an image;
//! * [`luks`]: what is told of an encrypted image;
//! * `compress`: compressed clusters;
//! * [`soundness`]: images that contradict themselves while they are open;
//! * [`snapshots`]: internal snapshots: their table, and how they come and go;
//! * [`check`]: consistency check and repair;
//! * `numbers`: big-endian numbers.
//!
//! All changes to the metadata are made under one lock ([`Meta`]) that is held for memory
//! operations only. An L2 entry is set when its data has been written, so a snapshot of the
//! metadata under the lock is a state that may reach the disk, in the order that `flush` keeps.

pub mod bitmaps;
pub mod check;
pub mod claims;
mod compress;
pub mod create;
mod flush;
mod freed;
pub mod header;
mod inflate;
mod inspect;
pub mod journal;
pub mod l2;
pub mod late;
mod loading;
pub mod luks;
mod mapping;
pub mod metadata;
mod numbers;
mod open;
pub mod refcount;
mod reserve;
mod resize;
pub mod snapshots;
pub mod soundness;
mod tables;
mod update;
pub mod words;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::directory::Directory;
use super::growing::Growing;
use crate::error::{Action, Error};
use crate::grace::Users;
use crate::storage::Storage;
use crate::sync::{
    Event, Mutex,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use claims::Claims;
use header::Header;
use l2::{Shape, Slice};
use late::Late;
use loading::Loading;
use refcount::{Allocator, SLICE_BYTES};
use snapshots::Snapshot;
use soundness::Soundness;
use words::Words;

pub use header::Backing;
pub use header::read::{describe_header, read_header};
pub use inspect::format_specific;
pub use refcount::Allocation;
pub use resize::{Preallocation, write_zeros};
pub use update::{Clear, Target};

/// Bytes of metadata kept in memory at most, unless an option says otherwise.
pub const DEFAULT_CACHE_BYTES: u64 = 32 << 20;

/// How to open an image.
#[derive(Clone, Debug)]
pub struct Options {
    /// It will be written.
    pub writable: bool,
    /// Space of freed clusters is given back to the file system.
    pub discard: bool,
    /// Bytes of metadata to keep in memory at most.
    pub cache_bytes: u64,
    /// Treat the disk as one of this size, whatever the header says: to prepare an image before
    /// its header names the new size. The L1 table must be long enough.
    pub size: Option<u64>,
    /// Where the journal of an image that is written is kept, and where that of one is whose process
    /// was killed.
    pub journal: Option<Arc<journal::Folder>>,
    /// Read the image as its last flush left it, even if a journal has what completed since.
    pub ignore_journal: bool,
    /// Who is told when the image contradicts itself.
    pub reporter: Option<soundness::Reporter>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            writable: false,
            discard: false,
            cache_bytes: DEFAULT_CACHE_BYTES,
            size: None,
            journal: None,
            ignore_journal: false,
            reporter: None,
        }
    }
}

/// Host clusters that no mapping refers to any longer: first byte and length.
type Freed = Vec<(u64, u64)>;

/// Everything that changes, but for the entries themselves.
///
/// On cache lines of its own, as all of an image that allocations and flushes write: requests for
/// mapped clusters look at what lies beside it.
#[derive(Debug)]
#[repr(align(128))]
struct Meta {
    allocator: Allocator,
    dirty_l1: BTreeSet<usize>,
    dirty_slices: BTreeSet<u64>,
    /// What a journal says of slices that have not been loaded since it was taken over: their
    /// entries, by index.
    adopted: BTreeMap<u64, BTreeMap<usize, Words>>,
    /// Slices that a flush is writing: not to be forgotten before it is done.
    writing: HashSet<u64>,
    /// Slices in memory, in the order in which the eviction hand visits them.
    loaded: VecDeque<u64>,
    /// Unmapped since the last flush began.
    unmapped: Freed,
    /// What could not be released yet, since its refcounts could not be read.
    unreleased: Freed,
    /// Nothing changes until a snapshot has been taken or deleted: nobody has a claim, and nothing is
    /// freed.
    still: bool,
    /// The header names tables that never were in force: where it is to say that they are.
    withdrawn: Option<header::Places>,
}

/// A qcow2 layer.
#[derive(Debug)]
pub struct Qcow2 {
    storage: Arc<dyn Storage>,
    /// Where guest data is, if not in `storage`.
    data: Option<DataFile>,
    header: Mutex<Header>,
    options: Options,
    shape: Shape,
    cluster_bits: u32,
    sizes: Sizes,
    soundness: Arc<Soundness>,
    l1: Growing<AtomicU64>,
    directory: Directory<Slice>,
    meta: Mutex<Meta>,
    /// Guest clusters whose mapping is being changed.
    claims: Claims,
    /// L1 entries for which a table is being allocated.
    l1_claims: Claims,
    loading: Mutex<HashMap<Loading, Arc<Event>>>,
    flushing: flush::Flushing,
    /// Freed clusters that wait for the requests, or have waited.
    retired: Arc<freed::Retired>,
    /// The chains that it is in: whose requests freed clusters wait for.
    users: Arc<Users>,
    decompressed: compress::Cache,
    reservation: reserve::Reservation,
    /// Chains that live in which layers lie below this image.
    overlays: Arc<AtomicUsize>,
    /// Writes on their way into those layers, and in place.
    late: Arc<Late>,
    /// Its internal snapshots.
    snapshots: Mutex<Arc<[Snapshot]>>,
}

/// How long the disk is, in bytes. All are the same, except while the size is being changed.
///
/// Apart from the model checker: nobody acts on their order.
#[derive(Debug)]
struct Sizes {
    /// What disks that are composed from now on show.
    shown: std::sync::atomic::AtomicU64,
    /// What the header names: above that there is nothing.
    named: std::sync::atomic::AtomicU64,
    /// Where the mapping ends.
    mapped: std::sync::atomic::AtomicU64,
}

impl Sizes {
    fn new(size: u64, named: u64) -> Self {
        Self {
            shown: size.into(),
            named: named.into(),
            mapped: size.into(),
        }
    }
}

/// A file of its own for guest data: each cluster lies at its guest offset.
#[derive(Debug)]
struct DataFile {
    storage: Arc<dyn Storage>,
    /// By itself it is a raw image of the disk, and stays one.
    raw: bool,
}

impl Qcow2 {
    /// The backing file that the header names.
    #[must_use]
    pub fn backing(&self) -> Option<Backing> {
        self.header.lock().backing.clone()
    }

    /// The header as it is in the file.
    #[must_use]
    pub fn header(&self) -> Header {
        self.header.lock().clone()
    }

    /// Size of a cluster in bytes.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Size of a unit in bytes, which is the least that can be allocated, copied or cleared: a
    /// cluster, or a subcluster where there are any.
    #[must_use]
    pub fn unit_size(&self) -> u64 {
        1 << self.shape.unit_bits()
    }

    /// Whether a cluster can be recorded as zeros (version 3).
    #[must_use]
    pub fn has_zero_clusters(&self) -> bool {
        self.shape.version >= 3
    }

    /// Notes a chain in which layers lie below this image.
    pub(crate) fn begin_overlay(&self) {
        self.overlays.fetch_add(1, Ordering::SeqCst);
    }

    /// A chain that [`Qcow2::begin_overlay`] noted is gone, and so are its requests.
    pub(crate) fn end_overlay(&self) {
        self.overlays.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether some request may read through this image: what it lacks comes from layers below,
    /// if only for a request that began before they were taken away.
    #[must_use]
    pub fn is_overlay(&self) -> bool {
        self.overlays.load(Ordering::SeqCst) > 0
    }

    /// Where the image's metadata is, and its guest data unless it has a data file.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Where guest data is.
    #[must_use]
    pub fn data_storage(&self) -> &Arc<dyn Storage> {
        self.data
            .as_ref()
            .map_or(&self.storage, |data| &data.storage)
    }

    /// The chains that it is in.
    #[must_use]
    pub fn users(&self) -> &Users {
        &self.users
    }

    /// The bytes of all clusters that have any of `range`.
    #[must_use]
    pub fn clusters_of(&self, range: Range<u64>) -> Range<u64> {
        let cluster = self.cluster_size();
        range.start / cluster * cluster..range.end.next_multiple_of(cluster)
    }

    /// Writes on their way into layers below it, and in place.
    #[must_use]
    pub fn late(&self) -> &Arc<Late> {
        &self.late
    }

    /// The image in place of `old`, which is the same file as it was opened before: requests that
    /// still use that one are waited for.
    #[must_use]
    pub fn in_place_of(self, old: &Self) -> Self {
        Self {
            users: old.users.clone(),
            overlays: old.overlays.clone(),
            late: old.late.clone(),
            ..self
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.sizes.shown.load(Ordering::Relaxed)
    }

    pub(super) fn named_size(&self) -> u64 {
        self.sizes.named.load(Ordering::Relaxed)
    }

    pub(super) fn mapped_end(&self) -> u64 {
        self.sizes.mapped.load(Ordering::Relaxed)
    }

    /// Its internal snapshots.
    #[must_use]
    pub fn snapshots(&self) -> Arc<[Snapshot]> {
        self.snapshots.lock().clone()
    }

    /// Whether nothing of the metadata changes at present.
    fn is_still(&self) -> bool {
        self.meta.lock().still
    }

    /// Entries of the L1 table that the header names. There may be room for more in memory, where
    /// nothing is.
    fn l1_len(&self) -> u64 {
        u64::from(self.header().l1_size)
    }

    fn slice_entries(&self) -> u64 {
        slice_entries(self.shape)
    }

    /// Entries of an L2 table.
    fn table_entries(&self) -> u64 {
        self.cluster_size() / self.shape.entry_bytes()
    }

    fn l1_entry(&self, index: u64) -> u64 {
        self.l1
            .get(index as usize)
            .map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    fn io_error(&self, action: Action, offset: u64, error: &std::io::Error) -> Error {
        Error::io(action, self.storage.name(), offset, error)
    }
}

fn slice_entries(shape: Shape) -> u64 {
    SLICE_BYTES.min(1 << shape.cluster_bits) / shape.entry_bytes()
}

#[cfg(test)]
mod tests {
    //! What would be caught: allocations that take the cache line of what every request reads.

    use std::mem::offset_of;

    use super::*;

    #[test]
    fn what_changes_lies_apart_from_what_requests_read() {
        // Processors fetch lines of 64 bytes in pairs.
        const LINE: usize = 128;
        macro_rules! lines {
            ($($field:ident: $kind:ty),+ $(,)?) => {
                [$({
                    let start = offset_of!(Qcow2, $field);
                    start / LINE..(start + size_of::<$kind>()).div_ceil(LINE)
                }),+]
            };
        }
        let changed = lines!(
            meta: Mutex<Meta>,
            claims: Claims,
            l1_claims: Claims,
            flushing: flush::Flushing,
            reservation: reserve::Reservation,
            decompressed: compress::Cache,
        );
        let read = lines!(
            options: Options,
            shape: Shape,
            cluster_bits: u32,
            sizes: Sizes,
            l1: Growing<AtomicU64>,
            directory: Directory<Slice>,
        );
        for changed in &changed {
            for read in &read {
                assert!(changed.end <= read.start || read.end <= changed.start);
            }
        }
        // The count of an image's users lies before it.
        assert_eq!(align_of::<Qcow2>() % LINE, 0);
    }
}
