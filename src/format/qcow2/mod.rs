//! The qcow2 engine.
//!
//! * [`header`]: the header, and changes to it that a cut cannot tear;
//! * [`l2`]: mapping entries, cached in slices of 4 KiB that are read without a lock;
//! * [`refcount`]: the allocator, an in-memory step;
//! * [`metadata`]: which clusters are the image's own, so that no guest data goes there;
//! * `bitmaps`: the persistent bitmaps of others, which writing makes out of date;
//! * [`claims`]: who changes the mapping of which clusters right now;
//! * `update`: allocating, linking, zeroing and unmapping clusters;
//! * `reserve`: space behind the end of the file, ahead of the writes;
//! * `flush`: what reaches the disk in which order;
//! * [`create`]: making images;
//! * `resize`: another size, and space allocated ahead;
//! * `inspect`: what tools tell of an image;
//! * `compress`: reading compressed clusters.
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
pub mod header;
mod inspect;
pub mod l2;
pub mod metadata;
pub mod refcount;
mod reserve;
mod resize;
pub mod snapshots;
mod update;

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::directory::Directory;
use super::{Extent, Place};
use crate::error::{Action, Error, Result};
use crate::storage::{self, Storage};
use crate::sync::{
    self, Event, Mutex,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use claims::Claims;
use header::Header;
use l2::{Descriptor, Shape, Slice, State, Words};
use refcount::{Allocator, Geometry, SLICE_BYTES};

pub use header::Backing;
pub use refcount::Allocation;
pub use resize::{Preallocation, write_zeros};
pub use update::{Clear, Target};

/// Bytes of metadata kept in memory at most, unless an option says otherwise.
pub const DEFAULT_CACHE_BYTES: u64 = 32 << 20;
/// The part of them that is for refcounts, which only those who allocate and free need.
const REFCOUNT_PART: u64 = 8;
/// Changed slices that are gathered at most before they are written without being asked.
const DIRTY_LIMIT: usize = 2048;

/// How to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

impl Default for Options {
    fn default() -> Self {
        Self {
            writable: false,
            discard: false,
            cache_bytes: DEFAULT_CACHE_BYTES,
            size: None,
        }
    }
}

/// Host clusters that no mapping refers to any longer: first byte and length.
type Freed = Vec<(u64, u64)>;

/// Everything that changes, but for the entries themselves.
#[derive(Debug)]
struct Meta {
    allocator: Allocator,
    dirty_l1: BTreeSet<usize>,
    dirty_slices: BTreeSet<u64>,
    /// Slices that a flush is writing: not to be forgotten before it is done.
    writing: HashSet<u64>,
    /// Slices in memory, in the order in which the eviction hand visits them.
    loaded: VecDeque<u64>,
    /// Unmapped since the last flush began.
    unmapped: Freed,
    /// What could not be released yet, since its refcounts could not be read.
    unreleased: Freed,
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
    size: u64,
    l1: Box<[AtomicU64]>,
    directory: Directory<Slice>,
    meta: Mutex<Meta>,
    /// Guest clusters whose mapping is being changed.
    claims: Claims,
    /// L1 entries for which a table is being allocated.
    l1_claims: Claims,
    loading: Mutex<HashMap<Loading, Arc<Event>>>,
    flushing: flush::Flushing,
    /// Freed clusters whose grace period is over.
    released: Arc<Mutex<Freed>>,
    /// Grace periods that have not ended.
    retiring: Arc<AtomicUsize>,
    decompressed: compress::Cache,
    reservation: reserve::Reservation,
}

/// A file of its own for guest data: each cluster lies at its guest offset.
#[derive(Debug)]
struct DataFile {
    storage: Arc<dyn Storage>,
    /// By itself it is a raw image of the disk, and stays one.
    raw: bool,
}

/// What is being loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Loading {
    Mapping(u64),
    Refcounts(u64),
}

impl Qcow2 {
    /// Opens the image in `storage`, which holds its guest data as well.
    ///
    /// # Errors
    /// When it is not a qcow2 image, contradicts the specification or needs a feature that is
    /// not there. Nothing has been written then.
    pub async fn open(storage: Arc<dyn Storage>, options: Options) -> Result<Self> {
        Self::open_with_data(storage, None, options).await
    }

    /// Opens the image in `storage`; `data` is its data file, which it has if its header says so.
    ///
    /// # Errors
    /// As for [`Qcow2::open`].
    pub async fn open_with_data(
        storage: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        options: Options,
    ) -> Result<Self> {
        let mut header = read_header(&*storage).await?;
        let data = check_data_file(&header, &*storage, data)?;
        check_writable(&header, &*storage, data.as_ref(), options)?;
        header.check_refcount_table()?;
        if options.writable && header.incompatible & header::INCOMPATIBLE_DIRTY != 0 {
            check::repair_dirty(&*storage).await?;
            header = read_header(&*storage).await?;
        }
        let cluster = 1u64 << header.cluster_bits;
        let l1 = read_table(&*storage, header.l1_offset, u64::from(header.l1_size)).await?;
        let table = if options.writable {
            let entries = u64::from(header.reftable_clusters) * cluster / 8;
            read_table(&*storage, header.reftable_offset, entries).await?
        } else {
            // Whoever only reads does not ask who refers to what.
            Vec::new()
        };
        metadata::check_tables(&header, &l1, &table, storage.name())?;
        let len = storage
            .len()
            .map_err(|e| Error::io(Action::Read, storage.name(), 0, &e))?;
        let end = len.div_ceil(cluster).max(1);
        let metadata = if options.writable {
            metadata::Clusters::new(&header, &l1, &table, end, storage.name())?
        } else {
            metadata::Clusters::default()
        };
        let geometry = Geometry {
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
        };
        let allocator = Allocator::new(
            geometry,
            table,
            metadata,
            end,
            storage.limits().zero_past_end,
        );
        let shape = shape(&header);
        let size = options.size.unwrap_or(header.size);
        if resize::l1_entries(shape, size) > l1.len() as u64 {
            return Err(Error::Invalid(format!(
                "{}: the L1 table has {} entries, too few for a disk of {size} bytes",
                storage.name(),
                l1.len()
            )));
        }
        let slices = size.div_ceil(cluster).div_ceil(slice_entries(shape));
        let image = Self {
            options,
            data,
            shape,
            cluster_bits: header.cluster_bits,
            size: size.next_multiple_of(header::SECTOR as u64),
            l1: l1.into_iter().map(AtomicU64::new).collect(),
            directory: Directory::new(slices),
            meta: Mutex::new(Meta {
                allocator,
                dirty_l1: BTreeSet::new(),
                dirty_slices: BTreeSet::new(),
                writing: HashSet::new(),
                loaded: VecDeque::new(),
                unmapped: Vec::new(),
                unreleased: Vec::new(),
            }),
            claims: Claims::default(),
            l1_claims: Claims::default(),
            loading: Mutex::default(),
            flushing: flush::Flushing::default(),
            released: Arc::default(),
            retiring: Arc::default(),
            decompressed: compress::Cache::default(),
            reservation: reserve::Reservation::new(len),
            header: Mutex::new(header),
            storage,
        };
        if options.writable {
            image.invalidate_bitmaps().await?;
            image.find_end().await?;
        }
        Ok(image)
    }

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

    pub(super) fn size(&self) -> u64 {
        self.size
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

    /// Slice number and index in it for a guest cluster.
    fn place(&self, cluster: u64) -> (u64, usize) {
        (
            cluster / self.slice_entries(),
            (cluster % self.slice_entries()) as usize,
        )
    }

    fn slice(&self, number: u64) -> Option<sync::Guard<Option<Arc<Slice>>>> {
        self.directory.get(number)
    }

    /// Where the slice's bytes are in the file; `None`: its table does not exist.
    fn slice_offset(&self, number: u64) -> Option<u64> {
        let cluster = number * self.slice_entries();
        let table = self.l1_entry(cluster / self.table_entries()) & l2::OFFSET;
        (table != 0).then(|| table + cluster % self.table_entries() * self.shape.entry_bytes())
    }

    /// See [`super::Format::map`].
    pub(super) fn map(&self, offset: u64, len: u64) -> Extent {
        let cluster = offset >> self.cluster_bits;
        let (number, index) = self.place(cluster);
        let Some(slice) = self.slice(number) else {
            return self.map_without_slice(offset, len);
        };
        let Some(slice) = slice.as_ref() else {
            return Extent {
                place: Place::Unknown,
                len,
            };
        };
        slice.touch();
        let within = offset & (self.cluster_size() - 1);
        let unit = within >> self.shape.unit_bits();
        let in_unit = offset & (self.unit_size() - 1);
        let words = slice.get(index);
        let first = self.shape.state(words, unit);
        let place = match first {
            State::Unallocated => Place::Below,
            State::Zero => Place::Zero,
            State::Data(host) => Place::Data(host.offset + in_unit),
            State::Compressed { offset, len } => {
                Place::Compressed(Shape::compressed(offset, len, within))
            }
        };
        let run = self.run(slice, index, unit, words, in_unit + len);
        Extent {
            place,
            len: len.min((run << self.shape.unit_bits()) - in_unit),
        }
    }

    /// How many units from unit `unit` of entry `index` on continue its state, which `words` has,
    /// up to `bytes` of them.
    fn run(&self, slice: &Slice, index: usize, unit: u64, words: Words, bytes: u64) -> u64 {
        let shape = self.shape;
        let first = shape.state(words, unit);
        let limit = bytes.div_ceil(self.unit_size());
        let entries = self.slice_entries();
        let mut count = shape.same(words, unit);
        let mut at = index as u64 + 1;
        while count < limit && (unit + count).is_multiple_of(shape.units()) && at < entries {
            let words = slice.get(at as usize);
            let next = shape.state(words, 0);
            let continues = match (first, next) {
                (State::Unallocated, State::Unallocated) | (State::Zero, State::Zero) => true,
                (State::Data(a), State::Data(b)) => {
                    a.offset + (count << shape.unit_bits()) == b.offset && a.owned == b.owned
                }
                _ => false,
            };
            if !continues {
                break;
            }
            count += shape.same(words, 0);
            at += 1;
        }
        count
    }

    fn map_without_slice(&self, offset: u64, len: u64) -> Extent {
        let coverage = self.table_entries() << self.cluster_bits;
        if self.l1_entry(offset / coverage) & l2::OFFSET == 0 {
            // No table, so nothing of its whole range is here.
            let len = len.min(coverage - offset % coverage);
            return Extent {
                place: Place::Below,
                len,
            };
        }
        Extent {
            place: Place::Unknown,
            len,
        }
    }

    /// See [`super::Format::map_write`].
    pub(super) fn map_write(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        if !self.options.writable || offset >= self.size {
            return None;
        }
        let (number, index) = self.place(offset >> self.cluster_bits);
        let slice = self.slice(number)?;
        let slice = slice.as_ref()?;
        slice.touch();
        let words = slice.get(index);
        let within = offset & (self.cluster_size() - 1);
        let unit = within >> self.shape.unit_bits();
        let State::Data(host) = self.shape.state(words, unit) else {
            return None;
        };
        if !host.owned {
            return None;
        }
        let in_unit = offset & (self.unit_size() - 1);
        let len = len.min(self.size - offset);
        let run = self.run(slice, index, unit, words, in_unit + len);
        Some((
            host.offset + in_unit,
            len.min((run << self.shape.unit_bits()) - in_unit),
        ))
    }

    /// See [`super::Format::load`].
    pub(super) async fn load(&self, offset: u64) -> Result<()> {
        self.load_slice(self.place(offset >> self.cluster_bits).0)
            .await
    }

    async fn load_slice(&self, number: u64) -> Result<()> {
        let Some(_guard) = self.begin_loading(Loading::Mapping(number)).await else {
            return Ok(());
        };
        if self.directory.get(number).is_some() {
            return Ok(());
        }
        let Some(offset) = self.slice_offset(number) else {
            return Ok(());
        };
        let bytes = SLICE_BYTES.min(self.cluster_size()) as usize;
        let buffer = storage::io::read_buf(&*self.storage, offset, bytes)
            .await
            .map_err(|error| Error::io(Action::Read, self.storage.name(), offset, &error))?;
        let slice = Slice::from_bytes(&buffer, self.shape.extended);
        let mut meta = self.meta.lock();
        for (index, words) in slice.entries().enumerate() {
            let cluster = number * self.slice_entries() + index as u64;
            if let Some(what) = self.fault(&meta, cluster, words) {
                let at = offset + index as u64 * self.shape.entry_bytes();
                return Err(Error::corrupt(
                    self.storage.name(),
                    format!("at {at:#x}: {what}"),
                ));
            }
        }
        if !self.directory.set(number, Some(Arc::new(slice))) {
            return Err(Error::corrupt(
                self.storage.name(),
                "mapping past the end of the disk",
            ));
        }
        meta.loaded.push_back(number);
        self.evict(&mut meta, number);
        Ok(())
    }

    /// What is wrong with the entry of a guest cluster, as far as can be told without reading on.
    fn fault(&self, meta: &Meta, cluster: u64, words: Words) -> Option<String> {
        if let Some(what) = self.shape.fault(words) {
            return Some(what);
        }
        let (offset, len) = match self.shape.descriptor(words.descriptor) {
            Descriptor::Host(host) | Descriptor::Zero(Some(host)) => {
                (host.offset, self.cluster_size())
            }
            Descriptor::Compressed { offset, len } => (offset, u64::from(len)),
            Descriptor::None | Descriptor::Zero(None) => return None,
        };
        let at = || format!("L2 entry {:#018x} points at {offset:#x}", words.descriptor);
        if let Some(data) = &self.data {
            // Writing takes a guest cluster's own place, so nobody else may be there.
            let expected = cluster << self.cluster_bits;
            return ((data.raw || self.options.writable) && offset != expected)
                .then(|| format!("{} of a data file (expected {expected:#x})", at()));
        }
        if !self.options.writable {
            return None;
        }
        let first = offset >> self.cluster_bits;
        if first >= meta.allocator.frontier() {
            // QEMU's check calls it an error as well. It would be written there, and handed out
            // to others.
            return Some(format!("{}, behind the end of the file", at()));
        }
        let last = (offset + len - 1) >> self.cluster_bits;
        let what = (first..=last).find_map(|cluster| meta.allocator.metadata().what(cluster))?;
        Some(format!("{}, where {what} is", at()))
    }

    /// Bytes of a slice, of the mapping or of the refcounts.
    fn slice_bytes(&self) -> u64 {
        SLICE_BYTES.min(self.cluster_size())
    }

    /// How many slices of the mapping may be in memory.
    fn mapping_slices(&self) -> usize {
        let bytes = self.options.cache_bytes - self.options.cache_bytes / REFCOUNT_PART;
        (bytes / self.slice_bytes()).max(8) as usize
    }

    /// How many slices of the refcounts may be in memory.
    fn refcount_slices(&self) -> usize {
        (self.options.cache_bytes / REFCOUNT_PART / self.slice_bytes()).max(4) as usize
    }

    /// How many changed slices are too many: they cannot be forgotten before they are written.
    fn dirty_limit(&self) -> usize {
        DIRTY_LIMIT.min(self.mapping_slices() / 2)
    }

    /// Forgets slices that were not used lately, down to the limit. Changed ones stay, and `keep`,
    /// which was just loaded for somebody.
    fn evict(&self, meta: &mut Meta, keep: u64) {
        let limit = self.mapping_slices();
        let mut looked_at = 0;
        while meta.loaded.len() > limit && looked_at < 2 * limit {
            looked_at += 1;
            let Some(number) = meta.loaded.pop_front() else {
                return;
            };
            let busy = meta.dirty_slices.contains(&number) || meta.writing.contains(&number);
            let referenced = self
                .directory
                .get(number)
                .is_some_and(|slice| slice.as_ref().is_some_and(|s| s.take_referenced()));
            if busy || referenced || number == keep {
                meta.loaded.push_back(number);
            } else {
                self.directory.set(number, None);
            }
        }
    }

    async fn load_refcounts(&self, number: u64) -> Result<()> {
        let Some(_guard) = self.begin_loading(Loading::Refcounts(number)).await else {
            return Ok(());
        };
        let (offset, bytes) = {
            let meta = self.meta.lock();
            (
                meta.allocator.slice_offset(number),
                meta.allocator.slice_bytes(),
            )
        };
        let Some(offset) = offset else { return Ok(()) };
        let buffer = storage::io::read_buf(&*self.storage, offset, bytes)
            .await
            .map_err(|error| Error::io(Action::Read, self.storage.name(), offset, &error))?;
        let mut meta = self.meta.lock();
        // Room is made before, so that what was just asked for stays.
        meta.allocator.trim(self.refcount_slices());
        meta.allocator
            .insert_slice(number, buffer.to_vec().into_boxed_slice());
        Ok(())
    }

    /// One task loads, the others wait for it. `None`: somebody else has just loaded it.
    async fn begin_loading(&self, what: Loading) -> Option<LoadGuard<'_>> {
        let listener = {
            let mut loading = self.loading.lock();
            match loading.get(&what) {
                Some(event) => event.listen(),
                None => {
                    loading.insert(what, Arc::new(Event::new()));
                    return Some(LoadGuard { image: self, what });
                }
            }
        };
        listener.await;
        None
    }

    fn io_error(&self, action: Action, offset: u64, error: &std::io::Error) -> Error {
        Error::io(action, self.storage.name(), offset, error)
    }
}

/// Ends a load, however it ends.
struct LoadGuard<'a> {
    image: &'a Qcow2,
    what: Loading,
}

impl Drop for LoadGuard<'_> {
    fn drop(&mut self) {
        let event = self.image.loading.lock().remove(&self.what);
        if let Some(event) = event {
            event.notify(usize::MAX);
        }
    }
}

fn slice_entries(shape: Shape) -> u64 {
    SLICE_BYTES.min(1 << shape.cluster_bits) / shape.entry_bytes()
}

fn shape(header: &Header) -> Shape {
    Shape {
        cluster_bits: header.cluster_bits,
        extended: header.has_subclusters(),
        data_file: header.has_data_file(),
        version: header.version,
    }
}

/// Reads and parses the header of the image in `storage`.
///
/// # Errors
/// When it is not a qcow2 image, or one that needs a feature that is not there.
pub async fn read_header(storage: &dyn Storage) -> Result<Header> {
    Header::parse(read_first_cluster(storage).await?, storage.name())
}

/// As [`read_header`], but of encrypted images too: to tell what they are.
///
/// # Errors
/// As for [`read_header`].
pub async fn describe_header(storage: &dyn Storage) -> Result<Header> {
    Header::describe(read_first_cluster(storage).await?, storage.name())
}

async fn read_first_cluster(storage: &dyn Storage) -> Result<Vec<u8>> {
    let io_error = |error| Error::io(Action::Read, storage.name(), 0, &error);
    let start = storage::io::read_buf(storage, 0, 4096)
        .await
        .map_err(io_error)?;
    let bits = header::cluster_bits(&start, storage.name())?;
    let first = storage::io::read_buf(storage, 0, 1 << bits)
        .await
        .map_err(io_error)?;
    Ok(first.to_vec())
}

fn check_data_file(
    header: &Header,
    storage: &dyn Storage,
    data: Option<Arc<dyn Storage>>,
) -> Result<Option<DataFile>> {
    match (header.has_data_file(), data) {
        (false, None) => Ok(None),
        (true, Some(storage)) => Ok(Some(DataFile {
            storage,
            raw: header.data_file_is_raw(),
        })),
        (true, None) => Err(Error::unsupported(
            storage.name(),
            "'data-file' is required for this image",
        )),
        (false, Some(_)) => Err(Error::unsupported(
            storage.name(),
            "'data-file' can only be set for images with an external data file",
        )),
    }
}

fn check_writable(
    header: &Header,
    storage: &dyn Storage,
    data: Option<&DataFile>,
    options: Options,
) -> Result<()> {
    for storage in [Some(storage), data.map(|data| &*data.storage)]
        .into_iter()
        .flatten()
    {
        if storage.limits().offset_align > 1 << shape(header).unit_bits() {
            return Err(Error::unsupported(
                storage.name(),
                format!(
                    "the file's blocks of {} bytes are larger than its clusters: open it without \
                     direct I/O",
                    storage.limits().offset_align
                ),
            ));
        }
    }
    if !options.writable {
        return Ok(());
    }
    if header.incompatible & header::INCOMPATIBLE_CORRUPT != 0 {
        return Err(Error::unsupported(
            storage.name(),
            "the image is marked corrupt and cannot be written: repair it with 'stratactl image \
             check --repair all'",
        ));
    }
    Ok(())
}

/// Reads a table of big-endian words.
async fn read_table(storage: &dyn Storage, offset: u64, entries: u64) -> Result<Vec<u64>> {
    let len = (entries * 8) as usize;
    let bytes = storage::io::read_buf(storage, offset, len)
        .await
        .map_err(|error| Error::io(Action::Read, storage.name(), offset, &error))?;
    Ok(bytes
        .chunks_exact(8)
        .map(|w| w.try_into().map_or(0, u64::from_be_bytes))
        .collect())
}
