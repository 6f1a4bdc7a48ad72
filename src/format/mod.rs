//! Formats: how a layer lays out guest data in its storage.
//!
//! The mapping core is synchronous: [`Format::map`] says where a range's bytes are, or that
//! metadata must be loaded first ([`Format::load`]), and never waits.

pub mod directory;
pub mod growing;
pub mod probe;
pub mod qcow2;
pub mod qed;
pub mod raw;

use std::sync::Arc;

use crate::error::Result;

use qcow2::Backing;
pub use qcow2::Qcow2;
pub use qed::Qed;
pub use raw::Raw;

/// Where the bytes of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the layer's storage from this offset on.
    Data(u64),
    /// Nowhere: they read as zeros, whatever lies below.
    Zero,
    /// Not in this layer: the layer below supplies them, zeros if there is none.
    Below,
    /// In a compressed cluster.
    Compressed(Compressed),
    /// Unknown before [`Format::load`] has been called for the extent's first byte.
    Unknown,
}

/// A compressed cluster: where its bytes are in the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// Offset of the compressed bytes.
    pub offset: u64,
    /// How many bytes there are at most (the format counts in sectors).
    pub len: u32,
    /// Position of the wanted byte in the decompressed cluster.
    pub within: u32,
}

/// A prefix of a mapped range whose bytes are in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where.
    pub place: Place,
    /// How many bytes; at least one, at most what was asked for.
    pub len: u64,
}

/// The formats that a layer can have.
#[derive(Debug, Clone)]
pub enum Format {
    /// Guest bytes as they are.
    Raw(Raw),
    /// QEMU's copy-on-write format.
    Qcow2(Arc<Qcow2>),
    /// QEMU's enhanced disk, read-only.
    Qed(Arc<Qed>),
}

impl Format {
    /// The format's name in options and in image headers.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Raw(_) => "raw",
            Self::Qcow2(_) => "qcow2",
            Self::Qed(_) => "qed",
        }
    }

    /// Size of the disk that the guest sees, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Qcow2(qcow2) => qcow2.size(),
            Self::Qed(qed) => qed.size(),
        }
    }

    /// Where the data ends: the size, except while that is being changed. What is above it is zeros for
    /// who has to write a unit as a whole, and what is below it has to stay, shown or not.
    #[must_use]
    pub fn data_end(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Qcow2(qcow2) => qcow2.named_size(),
            Self::Qed(qed) => qed.size(),
        }
    }

    /// Where the mapping ends: the size, except while that is being changed, and longer then.
    #[must_use]
    pub fn mapped_end(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Qcow2(qcow2) => qcow2.mapped_end(),
            Self::Qed(qed) => qed.size(),
        }
    }

    /// The unit of allocation in bytes: 1 for a format without one.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        match self {
            Self::Raw(_) => 1,
            Self::Qcow2(qcow2) => qcow2.cluster_size(),
            Self::Qed(qed) => qed.cluster_size(),
        }
    }

    /// The least that is allocated, copied or cleared, in bytes: a cluster, or a subcluster where
    /// there are any; 1 for a format without.
    #[must_use]
    pub fn unit_size(&self) -> u64 {
        match self {
            Self::Raw(_) => 1,
            Self::Qcow2(qcow2) => qcow2.unit_size(),
            Self::Qed(qed) => qed.cluster_size(),
        }
    }

    /// The backing file that the image's header names.
    #[must_use]
    pub fn backing(&self) -> Option<Backing> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(qcow2) => qcow2.backing(),
            Self::Qed(qed) => qed.backing().cloned(),
        }
    }

    /// Where the bytes from `offset` on are. Past the layer's end they are zero: the layers
    /// below are not looked at there.
    #[must_use]
    pub fn map(&self, offset: u64, len: u64) -> Extent {
        // What kind it is is looked at once: this is done for each layer.
        let within = |end: u64| (offset < end).then(|| len.min(end - offset));
        let found = match self {
            Self::Raw(raw) => within(raw.size()).map(|len| raw.map(offset, len)),
            Self::Qcow2(qcow2) => within(qcow2.mapped_end()).map(|len| qcow2.map(offset, len)),
            Self::Qed(qed) => within(qed.size()).map(|len| qed.map(offset, len)),
        };
        found.unwrap_or(Extent {
            place: Place::Zero,
            len,
        })
    }

    /// Where the bytes from `offset` on may be overwritten in place: storage offset and length.
    /// `None`: the write must allocate, copy or load metadata.
    #[must_use]
    pub fn map_write(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        match self {
            Self::Raw(raw) => raw.map_write(offset, len),
            Self::Qcow2(qcow2) => qcow2.map_write(offset, len),
            Self::Qed(_) => None,
        }
    }

    /// Loads the metadata that [`Format::map`] needs for the byte at `offset`.
    ///
    /// # Errors
    /// When it cannot be read or contradicts the format.
    pub async fn load(&self, offset: u64) -> Result<()> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Qcow2(qcow2) => qcow2.load(offset).await,
            Self::Qed(qed) => qed.load(offset).await,
        }
    }
}
