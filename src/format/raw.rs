//! The raw format: the guest's bytes as they are.

use super::{Extent, Place};

/// A raw layer.
#[derive(Debug, Clone, Copy)]
pub struct Raw {
    size: u64,
    /// Where the disk begins in the storage.
    start: u64,
}

impl Raw {
    /// A disk of `size` bytes that begins at `start` of its storage.
    #[must_use]
    pub fn new(start: u64, size: u64) -> Self {
        Self { size, start }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Where the disk begins in its storage.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn map(&self, offset: u64, len: u64) -> Extent {
        Extent {
            place: Place::Data(self.start + offset),
            len,
        }
    }

    pub(super) fn map_write(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        (offset < self.size).then(|| (self.start + offset, len.min(self.size - offset)))
    }
}
