//! What an operation on storage is for.
//!
//! It goes with the operation down to the storage. Storage may decide by it: that of the tests fails or
//! hangs for the loads of mapping tables alone, for example. Errors name it. With the kind of the
//! operation it says all: a read for [`Purpose::L2Table`] is the load of one.

use super::Storage;

/// What an operation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Bytes of a disk, for who uses the disk: a guest, a tool.
    Data,
    /// Bytes of a disk that who uses it gives back.
    Discard,
    /// Bytes of a disk around those that are written into a new cluster, with the write of all of
    /// them.
    CopyOnWrite,
    /// A copy from the layers below: a job's, or copy-on-read.
    Copy,
    /// A compressed cluster.
    Compressed,
    /// A header, what lies beside it, and what tells formats.
    Header,
    /// The L1 table.
    L1Table,
    /// An L2 table.
    L2Table,
    /// The refcount table.
    RefcountTable,
    /// Refcounts.
    RefcountBlock,
    /// The table of the snapshots.
    Snapshots,
    /// A persistent bitmap, or the directory of them.
    Bitmap,
    /// Clusters and space that nobody uses: reserved, given back, or filled ahead.
    Space,
    /// Making stable what was written.
    Flush,
    /// The check of an image, and its repair.
    Check,
    /// Nothing of these.
    Other,
}

impl Purpose {
    /// An operation on `storage` for it.
    pub fn on(self, storage: &dyn Storage) -> Target<'_> {
        Target {
            storage,
            purpose: self,
        }
    }

    /// What errors say that was read or written, behind the verb. Nothing where the place says it.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::CopyOnWrite => " for copy-on-write",
            Self::Compressed => " of a compressed cluster",
            Self::Header => " of the header",
            Self::L1Table => " of the L1 table",
            Self::L2Table => " of an L2 table",
            Self::RefcountTable => " of the refcount table",
            Self::RefcountBlock => " of refcounts",
            Self::Snapshots => " of the snapshot table",
            Self::Bitmap => " of a bitmap",
            Self::Data
            | Self::Discard
            | Self::Copy
            | Self::Space
            | Self::Flush
            | Self::Check
            | Self::Other => "",
        }
    }
}

/// A storage, and what operations on it are for.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The storage.
    pub storage: &'a dyn Storage,
    /// What for.
    pub purpose: Purpose,
}

impl<'a, S: Storage> From<&'a S> for Target<'a> {
    fn from(storage: &'a S) -> Self {
        Purpose::Other.on(storage)
    }
}

impl<'a> From<&'a dyn Storage> for Target<'a> {
    fn from(storage: &'a dyn Storage) -> Self {
        Purpose::Other.on(storage)
    }
}
