//! What tools and jobs ask of an image: nothing here is on the way of a guest's request.

use super::bitmaps::{AUTO, Bitmap, IN_USE};
use super::header::{
    Backing, COMPATIBLE_LAZY_REFCOUNTS, Compression, Header, INCOMPATIBLE_CORRUPT,
};
use super::l2::{Descriptor, Shape};
use super::open::read_table;
use super::words::Words;
use super::{Qcow2, refcount};
use crate::error::{Action, Result};
use crate::storage::{self, Purpose};
use serde_json::{Map, Value, json};

impl Qcow2 {
    /// Whether the header could name this backing file.
    ///
    /// # Errors
    /// When it has no room for the name, or names are never as long.
    pub fn check_backing(&self, backing: &Backing) -> Result<()> {
        self.header().plan_backing(Some(backing)).map(drop)
    }

    /// The place in the file that is kept for the byte at `offset`, which holds no data there,
    /// and for how many bytes, up to `len`, that goes on. The mapping has been loaded.
    #[must_use]
    pub fn kept_place(&self, offset: u64, len: u64) -> (Option<u64>, u64) {
        let (number, index) = self.place(offset >> self.cluster_bits);
        let Some(slice) = self.slice(number) else {
            return (None, len);
        };
        let Some(slice) = slice.as_ref() else {
            return (None, len);
        };
        let within = offset & (self.cluster_size() - 1);
        let first = kept(self.shape, slice.get(index));
        let mut run = self.cluster_size() - within;
        for at in index + 1..self.slice_entries() as usize {
            let continues = match (first, kept(self.shape, slice.get(at))) {
                (None, None) => true,
                (Some(first), Some(next)) => first + within + run == next,
                _ => false,
            };
            if run >= len || !continues {
                break;
            }
            run += self.cluster_size();
        }
        (first.map(|host| host + within), run.min(len))
    }

    /// Whether so much of the file is holes that its clusters seem to have been allocated ahead
    /// of any data. Then, and only then, QEMU asks the file system which clusters are holes;
    /// `allocated` is what the file takes in the file system, in bytes.
    ///
    /// # Errors
    /// When refcounts cannot be read.
    pub async fn looks_preallocated(&self, allocated: u64) -> Result<bool> {
        let len = self
            .storage
            .len()
            .await
            .map_err(|error| self.io_error(Action::Read, 0, &error))?;
        let real = allocated >> self.cluster_bits;
        let threshold = (real * 10 / 9).max(real + 2);
        let end = len.div_ceil(self.cluster_size());
        Ok(self.count_used(end, threshold).await? >= threshold)
    }

    /// How many of the first `end` clusters of the file are in use; once it is `enough`, the
    /// count ends. The refcounts are read anew: who only reads has none in memory.
    async fn count_used(&self, end: u64, enough: u64) -> Result<u64> {
        let header = self.header();
        let bytes = u64::from(header.reftable_clusters) << self.cluster_bits;
        let table = read_table(
            Purpose::RefcountTable.on(&*self.storage),
            header.reftable_offset,
            bytes / 8,
        )
        .await?;
        let per_block = (8u64 << self.cluster_bits) >> header.refcount_order;
        let mut used = 0;
        for (first, &block) in (0..end).step_by(per_block as usize).zip(&table) {
            if block == 0 {
                continue;
            }
            let bytes = storage::io::fetch(
                Purpose::RefcountBlock.on(&*self.storage),
                block,
                self.cluster_size() as usize,
            )
            .await?;
            for index in 0..per_block.min(end - first) as usize {
                used += u64::from(refcount::get(&bytes, header.refcount_order, index) > 0);
                if used >= enough {
                    return Ok(used);
                }
            }
        }
        Ok(used)
    }
}

fn kept(shape: Shape, words: Words) -> Option<u64> {
    match shape.descriptor(words.descriptor) {
        Descriptor::Host(host) | Descriptor::Zero(Some(host)) => Some(host.offset),
        Descriptor::None | Descriptor::Zero(None) | Descriptor::Compressed { .. } => None,
    }
}

/// What only qcow2 images have, as QMP describes it (`ImageInfoSpecific`); `encryption` is what is
/// told of that.
#[must_use]
pub fn format_specific(header: &Header, bitmaps: &[Bitmap], encryption: Option<Value>) -> Value {
    let mut data = Map::new();
    let mut put = |key: &str, value: Value| {
        data.insert(key.to_owned(), value);
    };
    let compression = match header.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    };
    let modern = header.version >= 3;
    put("compat", json!(if modern { "1.1" } else { "0.10" }));
    put("compression-type", json!(compression));
    if modern {
        let lazy = header.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0;
        put("lazy-refcounts", json!(lazy));
    }
    if !bitmaps.is_empty() {
        put("bitmaps", bitmaps.iter().map(bitmap).collect());
    }
    put("refcount-bits", json!(1u64 << header.refcount_order));
    if header.has_data_file() {
        if let Some(name) = &header.data_file {
            put("data-file", json!(name));
        }
        put("data-file-raw", json!(header.data_file_is_raw()));
    }
    if let Some(encryption) = encryption {
        put("encrypt", encryption);
    }
    if modern {
        let corrupt = header.incompatible & INCOMPATIBLE_CORRUPT != 0;
        put("corrupt", json!(corrupt));
        put("extended-l2", json!(header.has_subclusters()));
    }
    json!({"type": "qcow2", "data": data})
}

fn bitmap(bitmap: &Bitmap) -> Value {
    let flags = [(IN_USE, "in-use"), (AUTO, "auto")];
    let flags: Vec<&str> = flags
        .iter()
        .filter(|(flag, _)| bitmap.flags & flag != 0)
        .map(|(_, word)| *word)
        .collect();
    json!({
        "flags": flags,
        "name": bitmap.name,
        "granularity": 1u64.checked_shl(bitmap.granularity_bits.into()).unwrap_or(0),
    })
}
