//! Making images.
//!
//! ```text
//!   header | refcount table | refcount blocks | L1 table
//! ```
//!
//! The header comes last, when all that it names is stable: an image whose making was cut short
//! has no magic number, and nobody takes it for a whole one. Preallocation is done afterwards, on
//! the open image (`resize`).
//!
//! Source: QEMU's `docs/interop/qcow2`.

use super::header::{
    self, AUTOCLEAR_DATA_FILE_RAW, Backing, COMPATIBLE_LAZY_REFCOUNTS, Compression,
    INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2,
};
use super::l2::Shape;
use super::numbers::put;
use super::refcount;
use crate::error::{Action, Error, Result};
use crate::storage::{self, AlignedBuf, Purpose, Storage};

/// Bytes of a version 3 header: the compression type, padded to a multiple of 8.
const V3_LENGTH: usize = 112;

/// The feature names, so that programs which do not know a feature can name it: kind
/// (0 incompatible, 1 compatible, 2 autoclear), bit, name.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];
/// Bytes of a row of the feature name table.
const FEATURE_ROW: usize = 48;

/// What an image is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the disk in bytes; it is rounded up to whole sectors.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bytes of a cluster: a power of two.
    pub cluster_size: u64,
    /// Width of a refcount: a power of two.
    pub refcount_bits: u64,
    /// Writers may put off refcount updates.
    pub lazy_refcounts: bool,
    /// L2 entries have a bitmap of 32 subclusters.
    pub extended_l2: bool,
    /// How clusters are compressed that will be.
    pub compression: Compression,
    /// The backing file.
    pub backing: Option<Backing>,
    /// The file that holds guest data, as the header is to name it.
    pub data_file: Option<String>,
    /// The data file by itself is a raw image of the disk.
    pub data_file_raw: bool,
}

impl CreateOptions {
    /// An image of `size` bytes, all else as `qemu-img` has it without options.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: 3,
            cluster_size: 64 << 10,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            data_file_raw: false,
        }
    }

    fn shape(&self) -> Shape {
        Shape {
            cluster_bits: self.cluster_size.trailing_zeros(),
            extended: self.extended_l2,
            data_file: self.data_file.is_some(),
            version: self.version,
        }
    }

    fn l1_entries(&self) -> u64 {
        // A disk of no size has a table all the same, since a header must name one.
        self.shape().l1_entries(self.size).max(1)
    }

    /// Finds what the format forbids.
    ///
    /// # Errors
    /// Says which option, and what was expected.
    pub fn check(&self) -> Result<()> {
        let invalid = |text: String| Err(Error::Invalid(text));
        let cluster = self.cluster_size;
        if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
            return invalid(format!(
                "cluster_size: {cluster} (expected a power of two from 512 to 2M)"
            ));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return invalid(format!(
                "refcount_bits: {} (expected 1, 2, 4, 8, 16, 32 or 64)",
                self.refcount_bits
            ));
        }
        if self.version < 3
            && let Some(what) = self.needs_version_3()
        {
            return invalid(format!("{what} (expected with compat=v3, not v2)"));
        }
        if self.extended_l2 && cluster < 16 << 10 {
            return invalid(format!(
                "extended_l2: clusters of {cluster} bytes are too small for it (expected \
                 cluster_size=16k or more)"
            ));
        }
        if self.data_file_raw && self.data_file.is_none() {
            return invalid(
                "data_file_raw: there is no data file (expected data_file=NAME)".into(),
            );
        }
        if self.data_file_raw && self.backing.is_some() {
            return invalid(
                "data_file_raw: a raw data file holds the whole disk (expected no backing file)"
                    .into(),
            );
        }
        if self.size > 1 << 62 || self.l1_entries() > header::MAX_L1_ENTRIES {
            let most = header::MAX_L1_ENTRIES * (cluster / self.shape().entry_bytes()) * cluster;
            return invalid(format!(
                "size: {} bytes is too large for clusters of {cluster} bytes (expected at most \
                 {most}; try a larger cluster_size)",
                self.size
            ));
        }
        header_cluster(self, &Layout::of(self)).map(drop)
    }

    fn needs_version_3(&self) -> Option<&'static str> {
        if self.lazy_refcounts {
            Some("lazy_refcounts=on")
        } else if self.refcount_bits != 16 {
            Some("refcount_bits other than 16")
        } else if self.extended_l2 {
            Some("extended_l2=on")
        } else if self.data_file.is_some() {
            Some("data_file")
        } else if self.compression != Compression::Zlib {
            Some("compression_type other than zlib")
        } else {
            None
        }
    }
}

/// Where the tables are, in clusters: the refcount table follows the header.
struct Layout {
    reftable: u64,
    blocks: u64,
    l1: u64,
}

impl Layout {
    fn of(options: &CreateOptions) -> Self {
        let cluster = options.cluster_size;
        let per_block = cluster * 8 / options.refcount_bits;
        let mut layout = Self {
            reftable: 1,
            blocks: 1,
            l1: (options.l1_entries() * 8).div_ceil(cluster),
        };
        // The blocks count themselves as well.
        while layout.clusters() > layout.blocks * per_block {
            layout.blocks = layout.clusters().div_ceil(per_block);
            layout.reftable = (layout.blocks * 8).div_ceil(cluster);
        }
        layout
    }

    fn first_block(&self) -> u64 {
        1 + self.reftable
    }

    fn first_l1(&self) -> u64 {
        self.first_block() + self.blocks
    }

    fn clusters(&self) -> u64 {
        self.first_l1() + self.l1
    }

    /// The refcount table and the blocks, as they go to the file.
    fn refcounts(&self, options: &CreateOptions) -> Vec<u8> {
        let cluster = options.cluster_size;
        let table: Vec<u8> = (0..self.blocks)
            .flat_map(|index| ((self.first_block() + index) * cluster).to_be_bytes())
            .collect();
        let mut blocks = vec![0; (self.blocks * cluster) as usize];
        for index in 0..self.clusters() as usize {
            refcount::put(
                &mut blocks,
                options.refcount_bits.trailing_zeros(),
                index,
                1,
            );
        }
        let mut bytes = table;
        bytes.resize((self.reftable * cluster) as usize, 0);
        bytes.append(&mut blocks);
        bytes
    }
}

/// Makes an empty image in `storage`. What was in it is lost; stable when this returns.
///
/// # Errors
/// When the format forbids the options (nothing has been written then), or `storage` cannot be
/// written.
pub async fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    options.check()?;
    let layout = Layout::of(options);
    let header = header_cluster(options, &layout)?;
    let cluster = options.cluster_size;
    let failed = |offset| move |error| Error::io(Action::Write, storage.name(), offset, &error);
    let needed = layout.clusters() * cluster;
    if let Some(capacity) = storage.capacity().await.map_err(failed(0))?
        && capacity < needed
    {
        return Err(Error::Invalid(format!(
            "{}: a device of {capacity} bytes has no room for the tables of the image (expected \
             at least {needed})",
            storage.name()
        )));
    }
    // Whatever header was here is gone for good before anything that it names is overwritten.
    storage.set_len(0).await.map_err(failed(0))?;
    if !storage.limits().zero_past_end {
        storage::io::zero(Purpose::Space.on(storage), 0, needed, false)
            .await
            .map_err(failed(0))?;
    }
    storage::io::sync(storage).await.map_err(failed(0))?;
    storage.set_len(needed).await.map_err(failed(0))?;
    let refcounts = AlignedBuf::copy_of(&layout.refcounts(options));
    storage::io::write_buf(Purpose::RefcountBlock.on(storage), cluster, &refcounts)
        .await
        .map_err(failed(cluster))?;
    storage::io::sync(storage).await.map_err(failed(0))?;
    storage::io::write_buf(
        Purpose::Header.on(storage),
        0,
        &AlignedBuf::copy_of(&header),
    )
    .await
    .map_err(failed(0))?;
    storage::io::sync(storage).await.map_err(failed(0))
}

/// The first cluster: header, extensions, the backing file's name.
fn header_cluster(options: &CreateOptions, layout: &Layout) -> Result<Vec<u8>> {
    let cluster = options.cluster_size as usize;
    let mut bytes = fields(options, layout);
    if let Some(format) = options.backing.as_ref().and_then(|b| b.format.as_deref()) {
        extension(&mut bytes, header::EXT_BACKING_FORMAT, format.as_bytes());
    }
    if let Some(name) = &options.data_file {
        extension(&mut bytes, header::EXT_DATA_FILE, name.as_bytes());
    }
    let name = options.backing.as_ref().map_or("", |b| &b.name);
    if bytes.len() + 8 > cluster {
        // One of them is longer than a cluster's half, which the other one seldom is.
        let format = options.backing.as_ref().and_then(|b| b.format.as_deref());
        let named = [
            (
                "data_file",
                options.data_file.as_deref().unwrap_or_default(),
            ),
            ("backing_fmt", format.unwrap_or_default()),
        ];
        let longest = named.into_iter().max_by_key(|(_, name)| name.len());
        let (option, name) = longest.unwrap_or_default();
        return Err(Error::Invalid(format!(
            "{option}: a name of {} bytes does not fit into the header of {cluster} bytes (expected \
             a shorter one, or a larger cluster_size)",
            name.len()
        )));
    }
    // The feature names are for messages alone: they give way where there is no room.
    let rest = 8 + name.len();
    let table = feature_names();
    if options.version >= 3 && bytes.len() + 8 + table.len() + rest <= cluster {
        extension(&mut bytes, header::EXT_FEATURE_NAMES, &table);
    }
    extension(&mut bytes, header::EXT_END, &[]);
    if name.len() > header::MAX_BACKING_NAME || bytes.len() + name.len() > cluster {
        return Err(Error::Invalid(format!(
            "backing_file: a name of {} bytes does not fit into the header (expected at most {}; \
             a larger cluster_size has more room)",
            name.len(),
            header::MAX_BACKING_NAME.min(cluster.saturating_sub(bytes.len())),
        )));
    }
    if !name.is_empty() {
        let at = bytes.len() as u64;
        put(&mut bytes, 8, &at.to_be_bytes());
        put(&mut bytes, 16, &(name.len() as u32).to_be_bytes());
        bytes.extend_from_slice(name.as_bytes());
    }
    bytes.resize(cluster, 0);
    Ok(bytes)
}

/// The header proper.
fn fields(options: &CreateOptions, layout: &Layout) -> Vec<u8> {
    let cluster = options.cluster_size;
    let size = options.size.next_multiple_of(header::SECTOR as u64);
    let mut bytes = vec![0; if options.version >= 3 { V3_LENGTH } else { 72 }];
    put(&mut bytes, 0, &header::MAGIC.to_be_bytes());
    put(&mut bytes, 4, &options.version.to_be_bytes());
    put(&mut bytes, 20, &cluster.trailing_zeros().to_be_bytes());
    put(&mut bytes, 24, &size.to_be_bytes());
    put(&mut bytes, 36, &(options.l1_entries() as u32).to_be_bytes());
    put(&mut bytes, 40, &(layout.first_l1() * cluster).to_be_bytes());
    put(&mut bytes, 48, &cluster.to_be_bytes());
    put(&mut bytes, 56, &(layout.reftable as u32).to_be_bytes());
    if options.version < 3 {
        return bytes;
    }
    let bit = |on: bool, bit: u64| if on { bit } else { 0 };
    let zstd = options.compression == Compression::Zstd;
    let incompatible = bit(options.data_file.is_some(), INCOMPATIBLE_DATA_FILE)
        | bit(zstd, INCOMPATIBLE_COMPRESSION)
        | bit(options.extended_l2, INCOMPATIBLE_EXTENDED_L2);
    let compatible = bit(options.lazy_refcounts, COMPATIBLE_LAZY_REFCOUNTS);
    let autoclear = bit(options.data_file_raw, AUTOCLEAR_DATA_FILE_RAW);
    put(&mut bytes, 72, &incompatible.to_be_bytes());
    put(&mut bytes, 80, &compatible.to_be_bytes());
    put(&mut bytes, 88, &autoclear.to_be_bytes());
    let order = options.refcount_bits.trailing_zeros();
    put(&mut bytes, 96, &order.to_be_bytes());
    put(&mut bytes, 100, &(V3_LENGTH as u32).to_be_bytes());
    put(&mut bytes, 104, &[u8::from(zstd)]);
    bytes
}

fn feature_names() -> Vec<u8> {
    let mut table = Vec::with_capacity(FEATURE_NAMES.len() * FEATURE_ROW);
    for (kind, bit, name) in FEATURE_NAMES {
        let end = table.len() + FEATURE_ROW;
        table.extend_from_slice(&[kind, bit]);
        table.extend_from_slice(name.as_bytes());
        table.resize(end, 0);
    }
    table
}

fn extension(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}
