//! Which host clusters hold the image's own metadata.
//!
//! In a damaged image a mapping may point at the header or a table, or a refcount may say that a
//! table's cluster is free. Writing there would destroy more than was lost, so mapping and
//! allocating for writing ask here first.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use super::header::Header;
use super::l2;
use crate::error::{Error, Result};

/// What a cluster holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The header.
    Header,
    /// The L1 table.
    L1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    SnapshotTable,
    /// The directory of the persistent bitmaps.
    BitmapDirectory,
    /// The table or the bits of a persistent bitmap.
    Bitmap,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "the header",
            Self::L1 => "the L1 table",
            Self::L2 => "an L2 table",
            Self::RefcountTable => "the refcount table",
            Self::RefcountBlock => "a refcount block",
            Self::SnapshotTable => "the snapshot table",
            Self::BitmapDirectory => "the bitmap directory",
            Self::Bitmap => "a bitmap",
        })
    }
}

/// The metadata clusters of an image that is written.
#[derive(Debug, Default)]
pub struct Clusters {
    kinds: HashMap<u64, Kind>,
    /// Clusters of the file when it was opened.
    end: u64,
}

impl Clusters {
    /// Those of an image with this header and these tables, in a file of `end` clusters.
    ///
    /// # Errors
    /// When two of them lie on top of one another, or one behind the end of the file.
    pub fn new(
        header: &Header,
        l1: &[u64],
        reftable: &[u64],
        end: u64,
        file: &str,
    ) -> Result<Self> {
        let bits = header.cluster_bits;
        let mut all = Self {
            kinds: HashMap::new(),
            end,
        };
        let range = |offset: u64, bytes: u64| {
            let first = offset >> bits;
            first..first + bytes.div_ceil(1 << bits)
        };
        let reftable_bytes = u64::from(header.reftable_clusters) << bits;
        let directory = header.bitmaps.filter(|_| header.autoclear & 1 != 0);
        if let Some(directory) = directory
            && !directory.offset.is_multiple_of(1 << bits)
        {
            return Err(Error::corrupt(
                file,
                format!(
                    "the bitmap directory is at {:#x} (expected a multiple of the cluster size)",
                    directory.offset
                ),
            ));
        }
        let areas = [
            (Kind::Header, range(0, 1)),
            (Kind::L1, range(header.l1_offset, l1.len() as u64 * 8)),
            (
                Kind::RefcountTable,
                range(header.reftable_offset, reftable_bytes),
            ),
            (
                Kind::BitmapDirectory,
                directory.map_or(0..0, |d| range(d.offset, d.len.min(64 << 20))),
            ),
        ];
        for (kind, clusters) in areas {
            for cluster in clusters {
                all.insert(cluster, kind, file)?;
            }
        }
        for (kind, entries) in [(Kind::L2, l1), (Kind::RefcountBlock, reftable)] {
            for entry in entries {
                let offset = entry & l2::OFFSET;
                if offset != 0 {
                    all.insert(offset >> bits, kind, file)?;
                }
            }
        }
        Ok(all)
    }

    fn insert(&mut self, cluster: u64, kind: Kind, file: &str) -> Result<()> {
        if cluster >= self.end {
            // QEMU's check calls it an error as well. Others may write to the file's end.
            return Err(Error::corrupt(
                file,
                format!(
                    "cluster {cluster} is to hold {kind}, but is behind the end of the file \
                     (expected one below {})",
                    self.end
                ),
            ));
        }
        match self.kinds.insert(cluster, kind) {
            None => Ok(()),
            Some(other) => Err(Error::corrupt(
                file,
                format!("cluster {cluster} is to hold both {other} and {kind}"),
            )),
        }
    }

    /// What `cluster` holds, if it is metadata.
    #[must_use]
    pub fn what(&self, cluster: u64) -> Option<Kind> {
        self.kinds.get(&cluster).copied()
    }

    /// The end of the last one.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.kinds.keys().max().map_or(0, |last| last + 1)
    }

    /// A cluster has become metadata.
    pub fn add(&mut self, cluster: u64, kind: Kind) {
        self.kinds.insert(cluster, kind);
    }

    /// Clusters in these ranges, which are in order, are free.
    pub fn remove_all(&mut self, ranges: &[Range<u64>]) {
        self.kinds.retain(|cluster, _| {
            let next = ranges.partition_point(|range| range.end <= *cluster);
            ranges.get(next).is_none_or(|range| *cluster < range.start)
        });
    }

    /// A cluster is free.
    pub fn remove(&mut self, cluster: u64) {
        self.kinds.remove(&cluster);
    }
}

/// Checks that the entries of the L1 and the refcount table are cluster offsets.
///
/// # Errors
/// Names the first one that is not.
pub fn check_tables(header: &Header, l1: &[u64], reftable: &[u64], file: &str) -> Result<()> {
    let cluster = 1u64 << header.cluster_bits;
    for (index, &entry) in l1.iter().enumerate() {
        if !(entry & l2::OFFSET).is_multiple_of(cluster) {
            return Err(Error::corrupt(
                file,
                format!("L1 entry {index}: {entry:#018x} is no multiple of the cluster size"),
            ));
        }
    }
    for (index, &entry) in reftable.iter().enumerate() {
        if !entry.is_multiple_of(cluster) || entry >> 56 != 0 {
            return Err(Error::corrupt(
                file,
                format!("refcount table entry {index}: {entry:#x} is no cluster"),
            ));
        }
    }
    Ok(())
}
