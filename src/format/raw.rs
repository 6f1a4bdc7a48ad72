//! The raw format: the guest's bytes as they are.

use super::{Extent, Place};

/// A raw layer: all of its storage.
#[derive(Debug, Clone, Copy)]
pub struct Raw {
    size: u64,
}

impl Raw {
    /// A disk of `size` bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { size }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn map(&self, offset: u64, len: u64) -> Extent {
        Extent {
            place: Place::Data(offset),
            len,
        }
    }

    pub(super) fn map_write(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        (offset < self.size).then(|| (offset, len.min(self.size - offset)))
    }
}
