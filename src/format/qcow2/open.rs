//! From a file to an image: what is looked at, and refused, before anything is written.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;

use super::claims::Claims;
use super::header::{self, Header, read::read_header};
use super::journal::Adoption;
use super::numbers::words;
use super::refcount::{Allocator, Geometry};
use super::slice_entries;
use super::soundness::Soundness;
use super::{
    DataFile, Meta, Options, Qcow2, Sizes, check, compress, flush, metadata, reserve, snapshots,
};
use crate::error::{Action, Error, Result};
use crate::format::directory::Directory;
use crate::storage::{self, Purpose, Storage, Target};
use crate::sync::{Mutex, atomic::AtomicU64};

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
        let header = read_header(&*storage).await?;
        Self::open_parsed(storage, data, header, options).await
    }

    /// As [`Qcow2::open_with_data`], with the header that was just read from `storage`.
    ///
    /// # Errors
    /// As for [`Qcow2::open`].
    pub async fn open_parsed(
        storage: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        mut header: Header,
        options: Options,
    ) -> Result<Self> {
        let data = check_data_file(&header, &*storage, data)?;
        check_writable(&header, &*storage, data.as_ref(), &options)?;
        header.check_refcount_table()?;
        // Before anything is written, or relied on.
        let mut adoption = {
            let data = data.as_ref().map(|data| &*data.storage);
            Adoption::find(&header, (&*storage, data), &options)?
        };
        if options.writable && header.incompatible & header::INCOMPATIBLE_DIRTY != 0 {
            check::repair_dirty(&*storage).await?;
            header = read_header(&*storage).await?;
        }
        let cluster = 1u64 << header.cluster_bits;
        let mut l1 = read_table(
            Purpose::L1Table.on(&*storage),
            header.l1_offset,
            u64::from(header.l1_size),
        )
        .await?;
        let mut table = if options.writable {
            let entries = u64::from(header.reftable_clusters) * cluster / 8;
            read_table(
                Purpose::RefcountTable.on(&*storage),
                header.reftable_offset,
                entries,
            )
            .await?
        } else {
            // Readers do not need refcounts.
            Vec::new()
        };
        let len = storage
            .len()
            .await
            .map_err(|error| Error::io(Action::Read, storage.name(), 0, &error))?;
        let end = len.div_ceil(cluster).max(1);
        let tables = (&mut *l1, &mut *table);
        let end = adoption.put_over(&header, &*storage, tables, end).await?;
        metadata::check_tables(&header, &l1, &table, storage.name())?;
        let metadata = if options.writable {
            metadata::Clusters::new(&header, &l1, &table, end, storage.name())?
        } else {
            metadata::Clusters::default()
        };
        let geometry = Geometry {
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
        };
        let mut allocator = Allocator::new(
            geometry,
            table,
            metadata,
            end,
            storage.limits().zero_past_end,
        );
        let capacity = storage
            .capacity()
            .await
            .map_err(|error| Error::io(Action::Read, storage.name(), 0, &error))?;
        if let Some(capacity) = capacity {
            allocator.set_limit(capacity / cluster);
        }
        let snapshots = snapshots::list_if_sound(&*storage, &header).await;
        let shape = header.shape();
        let size = options.size.unwrap_or(header.size);
        if shape.l1_entries(size) > l1.len() as u64 {
            return Err(Error::Invalid(format!(
                "{}: the L1 table has {} entries, too few for a disk of {size} bytes",
                storage.name(),
                l1.len()
            )));
        }
        let slices = size.div_ceil(cluster).div_ceil(slice_entries(shape));
        let soundness = Soundness::new(options.writable, options.reporter.clone());
        allocator.set_soundness(soundness.clone(), storage.name());
        let image = Self {
            soundness,
            options,
            data,
            shape,
            cluster_bits: header.cluster_bits,
            sizes: Sizes::new(
                size.next_multiple_of(header::SECTOR as u64),
                header.size.next_multiple_of(header::SECTOR as u64),
            ),
            l1: l1.into_iter().map(AtomicU64::new).collect(),
            directory: Directory::new(slices),
            meta: Mutex::new(Meta {
                allocator,
                dirty_l1: BTreeSet::new(),
                dirty_slices: BTreeSet::new(),
                adopted: BTreeMap::new(),
                writing: HashSet::new(),
                loaded: VecDeque::new(),
                unmapped: Vec::new(),
                unreleased: Vec::new(),
                still: false,
                withdrawn: None,
            }),
            claims: Claims::default(),
            l1_claims: Claims::default(),
            loading: Mutex::default(),
            flushing: flush::Flushing::default(),
            retired: Arc::default(),
            users: Arc::default(),
            decompressed: compress::Cache::default(),
            reservation: reserve::Reservation::new(len),
            overlays: Arc::default(),
            late: Arc::default(),
            snapshots: Mutex::new(snapshots.into()),
            header: Mutex::new(header),
            storage,
        };
        let adopted = adoption.is_live();
        if image.options.writable {
            image.adopt_refcounts(&adoption).await?;
            let journaled = adopted || image.options.journal.is_some();
            image.invalidate_bitmaps(journaled).await?;
            image.find_end().await?;
        }
        image.adopt_mapping(adoption)?;
        if image.options.writable
            && !adopted
            && let Some(folder) = image.options.journal.clone()
        {
            image.begin_journal(&folder).await?;
        }
        Ok(image)
    }
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
    options: &Options,
) -> Result<()> {
    for storage in [Some(storage), data.map(|data| &*data.storage)]
        .into_iter()
        .flatten()
    {
        if storage.limits().offset_align > 1 << header.shape().unit_bits() {
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
pub(super) async fn read_table(from: Target<'_>, offset: u64, entries: u64) -> Result<Vec<u64>> {
    let bytes = storage::io::fetch(from, offset, (entries * 8) as usize).await?;
    Ok(words(&bytes).collect())
}
