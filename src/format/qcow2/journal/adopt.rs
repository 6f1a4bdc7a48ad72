//! The next process's part: the journal is put over what the disk has, in memory.
//!
//! It takes two looks at the records. The first one, before there is an image, checks each of them
//! and finds which count: those of a table come to nothing where a later record says that the table
//! is new. It gives the L1 and the refcount table their last entries, so that what looks at these
//! next (what is metadata, where the file ends) sees them as they were. The second one, with the
//! image, sets refcounts in order, and checks the last of each entry of the mapping as entries are
//! checked that come from the disk. Those are put over a slice when it is loaded, by a request or by
//! the next flush: a full journal may name more slices than a disk reads in the time that a guest
//! is to wait at most.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;

use super::super::header::Header;
use super::super::l2::{self, Slice};
use super::super::refcount::Geometry;
use super::super::words::Words;
use super::super::{Meta, Options, Qcow2};
use super::file::{Folder, Identity};
use super::ids;
use super::log::{Log, Ring};
use super::mark::Mark;
use super::record::{self, Record};
use super::verdict::{Verdict, live, refused};
use crate::error::{Action, Error, Result};
use crate::storage::{Purpose, Storage};

/// Slices that are loaded together.
const PARALLEL: usize = 64;

/// What an image has for a journal when it is opened.
#[derive(Debug, Default)]
pub(in super::super) struct Adoption {
    found: Option<Found>,
}

/// A journal that is live, checked as far as it can be without the image.
#[derive(Debug)]
struct Found {
    ring: Ring,
    file: String,
    records: Vec<Record>,
    /// By index in the L1 table: the last record of it.
    tables: BTreeMap<u64, usize>,
    /// By index in the refcount table: the last record of it.
    blocks: BTreeMap<u64, usize>,
    /// Behind the last host cluster that has a reference, or is a block.
    end: u64,
}

impl Adoption {
    /// Looks for the journal of the image in `storage`, and says whether the image can be opened.
    ///
    /// # Errors
    /// When the journal is live and cannot be adopted, or somebody has written the image meanwhile;
    /// says what to do.
    pub(in super::super) fn find(
        header: &Header,
        (storage, data): (&dyn Storage, Option<&dyn Storage>),
        options: &Options,
    ) -> Result<Self> {
        let name = storage.name();
        let mark = match Verdict::of(header, options.journal.as_deref())? {
            Verdict::None => return Ok(Self::default()),
            Verdict::Void => {
                if options.writable {
                    log::info!(
                        "{name}: the machine has been started anew since the image was in use: \
                         what was flushed counts"
                    );
                }
                return Ok(Self::default());
            }
            Verdict::Foreign if options.writable => {
                return Err(refused(
                    name,
                    "another program has written the image after the process that had it was \
                     killed; writes that had completed and were not flushed are lost",
                ));
            }
            Verdict::Foreign => return Ok(Self::default()),
            Verdict::Live(mark) => mark,
        };
        if options.ignore_journal && !options.writable {
            return Ok(Self::default());
        }
        let Some(folder) = &options.journal else {
            return Err(live(name));
        };
        if !outlives_process(storage, data) {
            return Err(refused(
                name,
                "it has a journal, and the disk that it is in does not keep what has not been \
                 flushed when the process is killed (expected a file)",
            ));
        }
        let ring = folder
            .find(&mark, identity(storage), options.writable)
            .map_err(|error| match error {
                Error::Busy(what) => Error::Busy(format!("{name}: {what}")),
                error => refused(name, &error.to_string()),
            })?
            .ok_or_else(|| {
                let path = folder.file(mark.nonce);
                let what = format!(
                    "the process that had the image was killed, and its journal {} is not there",
                    path.display()
                );
                refused(name, &what)
            })?;
        let found = Found::read(ring, header, mark).map_err(|what| refused(name, &what))?;
        Ok(Self { found: Some(found) })
    }

    /// Whether there is something to adopt.
    pub(in super::super) fn is_live(&self) -> bool {
        self.found.is_some()
    }

    /// Checks the records against the image's tables, and gives these their last entries. `table` is
    /// empty where the image is only read. Returns the end, in clusters, of what the file of `end`
    /// clusters is to hold.
    ///
    /// # Errors
    /// At the first record that contradicts the image.
    pub(in super::super) async fn put_over(
        &mut self,
        header: &Header,
        storage: &dyn Storage,
        (l1, table): (&mut [u64], &mut [u64]),
        end: u64,
    ) -> Result<u64> {
        let Some(found) = &mut self.found else {
            return Ok(end);
        };
        let len = storage
            .len()
            .await
            .map_err(|error| Error::io(Action::Read, storage.name(), 0, &error))?;
        found
            .put_over(header, l1, table, len)
            .map_err(|what| refused(storage.name(), &what))?;
        Ok(end.max(found.end))
    }
}

impl Found {
    fn read(ring: Ring, header: &Header, mark: Mark) -> std::result::Result<Self, String> {
        let file = ring.path().display().to_string();
        let words = ring.words();
        if ring.is_lost() {
            return Err(format!("{file}: it was cut short"));
        }
        let (head, tail) = (ring.head(), ring.tail());
        if mark.flushed < head {
            return Err(format!(
                "the image is older than its journal {file}: position {} (expected at least \
                 {head}): it has been restored from a copy",
                mark.flushed
            ));
        }
        if mark.flushed > tail {
            return Err(format!(
                "the image is newer than its journal {file}: position {} (expected at most {tail})",
                mark.flushed
            ));
        }
        let records = record::parse(&words, head, ring.seed(), header.shape().extended)
            .map_err(|what| format!("{file}: {what}"))?;
        Ok(Self {
            ring,
            file,
            records,
            tables: BTreeMap::new(),
            blocks: BTreeMap::new(),
            end: 0,
        })
    }

    fn put_over(
        &mut self,
        header: &Header,
        l1: &mut [u64],
        table: &mut [u64],
        len: u64,
    ) -> std::result::Result<(), String> {
        let bounds = Bounds::new(header, l1.len(), table.len(), len);
        for (at, record) in self.records.iter().enumerate() {
            if let Some(what) = bounds.fault(record) {
                return Err(format!("{}: record {at}: {what}", self.file));
            }
            match *record {
                Record::L1 { index, value } => {
                    self.tables.insert(index, at);
                    put(l1, index, value);
                }
                Record::Block { index, offset } => {
                    self.blocks.insert(index, at);
                    self.end = self.end.max((offset >> header.cluster_bits) + 1);
                    put(table, index, offset);
                }
                Record::Refcounts {
                    first,
                    count,
                    value,
                } if value > 0 => self.end = self.end.max(first + count),
                Record::Mapping { .. } | Record::Refcounts { .. } => {}
            }
        }
        // What is in force belongs to tables that are there.
        let per_table = bounds.per_table;
        for (at, record) in self.records.iter().enumerate() {
            let lacking = match record {
                Record::Mapping { first, entries } => (*first..*first + entries.len() as u64)
                    .map(|cluster| cluster / per_table)
                    .find(|index| {
                        let entry = l1.get(*index as usize).copied().unwrap_or_default();
                        let owned = entry & l2::COPIED != 0 && entry & l2::OFFSET != 0;
                        !owned && !is_void(&self.tables, *index, at)
                    })
                    .map(|index| format!("L2 table {index} is not there, or not the image's own")),
                Record::Refcounts { first, count, .. } if !table.is_empty() => {
                    let per_block = bounds.geometry.per_block();
                    (first / per_block..=(first + count - 1) / per_block)
                        .find(|index| {
                            table.get(*index as usize) == Some(&0)
                                && !is_void(&self.blocks, *index, at)
                        })
                        .map(|index| format!("refcount block {index} is not there"))
                }
                _ => None,
            };
            if let Some(what) = lacking {
                return Err(format!("{}: record {at}: {what}", self.file));
            }
        }
        Ok(())
    }
}

/// Whether record number `at` of a table's contents was before the table became a new one.
fn is_void(last: &BTreeMap<u64, usize>, index: u64, at: usize) -> bool {
    last.get(&index).is_some_and(|new| *new > at)
}

fn put(table: &mut [u64], index: u64, value: u64) {
    if let Some(entry) = table.get_mut(index as usize) {
        *entry = value;
    }
}

/// What records may say in an image.
struct Bounds<'a> {
    header: &'a Header,
    geometry: Geometry,
    guest_clusters: u64,
    per_table: u64,
    l1_entries: u64,
    /// 0: the image is only read, and nobody looks at refcounts.
    table_entries: u64,
    /// Bytes of the file.
    len: u64,
}

impl<'a> Bounds<'a> {
    fn new(header: &'a Header, l1_entries: usize, table_entries: usize, len: u64) -> Self {
        let cluster = 1u64 << header.cluster_bits;
        let per_table = cluster / header.shape().entry_bytes();
        Self {
            header,
            geometry: Geometry {
                cluster_bits: header.cluster_bits,
                refcount_order: header.refcount_order,
            },
            // A change of the size clears what is above the smaller one, before the header names the
            // larger one and behind its naming the smaller one.
            guest_clusters: (l1_entries as u64).saturating_mul(per_table),
            per_table,
            l1_entries: l1_entries as u64,
            table_entries: table_entries as u64,
            len,
        }
    }

    /// What is wrong with a record, as far as can be told from itself.
    fn fault(&self, record: &Record) -> Option<String> {
        let cluster = 1u64 << self.header.cluster_bits;
        let is_place =
            |offset: u64| offset != 0 && offset.is_multiple_of(cluster) && offset >> 56 == 0;
        match record {
            Record::Mapping { first, entries } => {
                let end = first.checked_add(entries.len() as u64);
                if entries.is_empty() || end.is_none_or(|end| end > self.guest_clusters) {
                    return Some(format!(
                        "{} L2 entries from guest cluster {first} on (expected at most {})",
                        entries.len(),
                        self.guest_clusters
                    ));
                }
                entries.iter().find_map(|words| self.fault_of_entry(*words))
            }
            Record::Refcounts {
                first,
                count,
                value,
            } => {
                let most = self.geometry.max_refcount();
                let end = first.checked_add(*count);
                let covered = self.table_entries * self.geometry.per_block();
                let outside = end.is_none_or(|end| self.table_entries > 0 && end > covered);
                (*count == 0 || outside || *value > most).then(|| {
                    format!(
                        "refcount {value} of {count} clusters from {first} on (expected at most \
                         {most}, below cluster {covered})"
                    )
                })
            }
            Record::L1 { index, value } => {
                let offset = value & l2::OFFSET;
                let entry = *value == 0 || (is_place(offset) && *value == offset | l2::COPIED);
                let inside = *value == 0
                    || offset
                        .checked_add(cluster)
                        .is_some_and(|end| end <= self.len);
                (*index >= self.l1_entries || !entry || !inside)
                    .then(|| format!("L1 entry {index}: {value:#018x}"))
            }
            Record::Block { index, offset } => {
                let outside = self.table_entries > 0 && *index >= self.table_entries;
                (outside || !is_place(*offset))
                    .then(|| format!("refcount block {index} at {offset:#x}"))
            }
        }
    }

    /// What is wrong with an entry: its data was written before it was recorded.
    fn fault_of_entry(&self, words: Words) -> Option<String> {
        let shape = self.header.shape();
        if let Some(what) = shape.fault(words) {
            return Some(what);
        }
        let offset = shape.extent(words)?.start;
        (!shape.data_file && offset >= self.len).then(|| {
            format!(
                "L2 entry {:#018x} points at {offset:#x}, behind the end of the file ({:#x})",
                words.descriptor, self.len
            )
        })
    }
}

impl Qcow2 {
    /// Adopts the refcounts: before anybody looks at them.
    ///
    /// # Errors
    /// When some cannot be read.
    pub(in super::super) async fn adopt_refcounts(&self, adoption: &Adoption) -> Result<()> {
        let Some(found) = adoption.found.as_ref().filter(|_| self.options.writable) else {
            return Ok(());
        };
        let geometry = {
            let mut meta = self.meta.lock();
            for &index in found.blocks.keys() {
                meta.allocator.adopt_block(index as usize);
            }
            meta.dirty_l1
                .extend(found.tables.keys().map(|index| *index as usize));
            meta.allocator.geometry()
        };
        let per_block = geometry.per_block();
        let has_block = |index: u64| {
            let meta = self.meta.lock();
            let entry = meta.allocator.table().get(index as usize);
            entry.is_some_and(|&offset| offset != 0)
        };
        // In order; the parts of a run that lie in a block which came later are void.
        let mut runs = Vec::new();
        for (at, record) in found.records.iter().enumerate() {
            // The reference to the block has a record of its own, which a kill may have prevented.
            if let Record::Block { index, offset } = *record {
                let cluster = offset >> geometry.cluster_bits;
                let covered_by = cluster / per_block;
                let is_last = !is_void(&found.blocks, index, at);
                if is_last && has_block(covered_by) && !is_void(&found.blocks, covered_by, at) {
                    runs.push((cluster..cluster + 1, 1));
                }
            }
            let Record::Refcounts {
                first,
                count,
                value,
            } = *record
            else {
                continue;
            };
            let mut start = first;
            while start < first + count {
                let end = (first + count).min((start / per_block + 1) * per_block);
                if !is_void(&found.blocks, start / per_block, at) {
                    runs.push((start..end, value));
                }
                start = end;
            }
        }
        let slices: BTreeSet<u64> = {
            let meta = self.meta.lock();
            let slices = runs.iter().flat_map(|(clusters, _)| {
                meta.allocator.slice_of(clusters.start)..=meta.allocator.slice_of(clusters.end - 1)
            });
            slices.collect()
        };
        let slices: Vec<u64> = slices.into_iter().collect();
        for some in slices.chunks(PARALLEL) {
            let loaded = join_all(some.iter().map(|&number| async move {
                self.load_refcounts(number).await?;
                self.meta.lock().allocator.hold_slice(number);
                Ok::<_, Error>(())
            }));
            loaded.await.into_iter().collect::<Result<()>>()?;
        }
        let adopted = {
            let allocator = &mut self.meta.lock().allocator;
            let mut runs = runs.into_iter();
            runs.try_for_each(|(clusters, value)| allocator.adopt_refcounts(clusters, value))
        };
        match adopted {
            Ok(()) => Ok(()),
            Err(need) => Err(self.lacking(need).await),
        }
    }

    /// Adopts the mapping, when it is known what is metadata and where the file ends; and goes on
    /// with the journal, if the image is written. Nothing is loaded for that, which would take as
    /// long as the disk takes to read all that was changed: what the journal says is put over a
    /// slice when it is loaded.
    ///
    /// # Errors
    /// When an entry contradicts the image.
    pub(in super::super) fn adopt_mapping(&self, adoption: Adoption) -> Result<()> {
        let Some(found) = adoption.found else {
            return Ok(());
        };
        let per_table = self.table_entries();
        let clusters = self.size().div_ceil(self.cluster_size());
        let mut changes: BTreeMap<u64, BTreeMap<usize, Words>> = BTreeMap::new();
        for (at, record) in found.records.iter().enumerate() {
            let Record::Mapping { first, entries } = record else {
                continue;
            };
            // What is above the end has no place, and is done again when the disk grows.
            for (cluster, words) in (*first..clusters).zip(entries) {
                if !is_void(&found.tables, cluster / per_table, at) {
                    let (number, index) = self.place(cluster);
                    changes.entry(number).or_default().insert(index, *words);
                }
            }
        }
        let mut meta = self.meta.lock();
        for (number, entries) in &changes {
            for (&index, &words) in entries {
                let cluster = number * self.slice_entries() + index as u64;
                if let Some(what) = self.fault(&meta, cluster, words) {
                    let what = format!("{}: guest cluster {cluster}: {what}", found.file);
                    return Err(refused(self.storage.name(), &what));
                }
            }
        }
        meta.adopted = changes;
        if self.options.writable {
            log::info!(
                "{}: the journal has {} changes that were not flushed; they are taken over",
                self.storage.name(),
                found.records.len()
            );
            meta.allocator.set_log(Log::of(found.ring));
        }
        Ok(())
    }

    /// Puts over a slice that comes from the disk what a journal says of it. True: that is so.
    pub(in super::super) fn put_adopted(meta: &Meta, number: u64, slice: &Slice) -> bool {
        let Some(entries) = meta.adopted.get(&number) else {
            return false;
        };
        for (&index, &words) in entries {
            slice.set(index, words, &super::Recorded::adopted());
        }
        true
    }

    /// What a journal says of a slice is in memory now, and is to be written. An image that is only
    /// read may forget the slice, and has it put over again.
    pub(in super::super) fn keep_adopted(&self, meta: &mut Meta, number: u64) {
        if self.options.writable {
            meta.adopted.remove(&number);
            meta.dirty_slices.insert(number);
        }
    }

    /// Whether there are slices of which a journal says something and that are not in memory. They
    /// are read before a flush writes them, which may take long: that is for a guest's flush, or for
    /// when there is no more room.
    #[cold]
    pub(in super::super) fn has_adopted(&self) -> bool {
        !self.meta.lock().adopted.is_empty()
    }

    /// Loads all slices of which a journal says something, so that a flush writes them.
    ///
    /// # Errors
    /// When one cannot be read, or contradicts the image.
    pub(in super::super) async fn load_adopted(&self) -> Result<()> {
        let numbers: Vec<u64> = self.meta.lock().adopted.keys().copied().collect();
        for some in numbers.chunks(PARALLEL) {
            let loaded = join_all(some.iter().map(|&number| self.load_one_adopted(number)));
            loaded.await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    async fn load_one_adopted(&self, number: u64) -> Result<()> {
        // Who has waited for another one to load it does not know whether that succeeded.
        while self.meta.lock().adopted.contains_key(&number) {
            if self.slice_offset(number).is_none() {
                let what =
                    format!("slice {number} of the mapping, which a journal changes, is gone");
                return Err(Error::corrupt(self.storage.name(), what));
            }
            self.load_slice(number).await?;
        }
        Ok(())
    }

    /// Begins a journal for an image that has none, and says so in its header.
    ///
    /// # Errors
    /// When there is no room for it, in the folder or in the header.
    pub(in super::super) async fn begin_journal(&self, folder: &Folder) -> Result<()> {
        if self.shape.version < 3 {
            log::warn!(
                "{}: an image of version 2 has no journal: what has not been flushed is lost when \
                 the process is killed ('qemu-img amend -o compat=1.1' makes it version 3)",
                self.storage.name()
            );
            return Ok(());
        }
        let data = self.data.as_ref().map(|data| &*data.storage);
        if !outlives_process(&*self.storage, data) {
            log::warn!(
                "{}: an image in the disk of another one has no journal: what has not been flushed \
                 is lost when the process is killed (expected a file)",
                self.storage.name()
            );
            return Ok(());
        }
        let mark = Mark {
            nonce: ids::nonce()?,
            flushed: 0,
            boot: folder.boot(),
        };
        let clusters = self.size().div_ceil(self.cluster_size());
        let patches = match self.header().plan_journal(Some(mark)) {
            Ok(patches) => patches,
            Err(error) => {
                log::warn!(
                    "{error}: it has no journal, and what has not been flushed is lost when the \
                     process is killed (a shorter name of the backing file would make room)"
                );
                return Ok(());
            }
        };
        let ring = folder.create(mark.nonce, identity(&*self.storage), clusters)?;
        let path = ring.path().to_owned();
        // The machine's end voids the journal, so that nothing waits for the disk: unless the name
        // of the backing file moves, which must be there before the header says where.
        let named = match patches.as_slice() {
            [one] => self.name_journal(one).await,
            _ => self.patch_header(&patches).await,
        };
        if let Err(error) = named {
            ids::remove(&path);
            return Err(error);
        }
        self.meta.lock().allocator.set_log(Log::of(ring));
        Ok(())
    }

    async fn name_journal(&self, patch: &super::super::header::Patch) -> Result<()> {
        let patched = self.header().patched(std::slice::from_ref(patch))?;
        self.write_at(patch.offset, &patch.bytes, Purpose::Header)
            .await?;
        *self.header.lock() = patched;
        Ok(())
    }
}

/// Which file the image is in, as far as it can be told from a copy.
fn identity(storage: &dyn Storage) -> Identity {
    storage.identity().unwrap_or_default()
}

/// Whether what completed in both files of an image outlives the process.
fn outlives_process(storage: &dyn Storage, data: Option<&dyn Storage>) -> bool {
    storage.outlives_process() && data.is_none_or(Storage::outlives_process)
}
