//! The qcow2 engine (interface; the body follows).

use std::sync::Arc;

use super::{Compressed, Extent, Place};
use crate::error::Result;

/// A qcow2 layer.
#[derive(Debug)]
pub struct Qcow2 {}

impl Qcow2 {
    pub(super) fn size(&self) -> u64 {
        0
    }
    /// Cluster size.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        65536
    }
    pub(super) fn map(&self, _offset: u64, len: u64) -> Extent {
        Extent {
            place: Place::Below,
            len,
        }
    }
    pub(super) fn map_write(&self, _offset: u64, _len: u64) -> Option<(u64, u64)> {
        None
    }
    pub(super) async fn load(&self, _offset: u64) -> Result<()> {
        Ok(())
    }
    /// Flush.
    /// # Errors
    /// Any.
    pub async fn flush(&self) -> Result<()> {
        Ok(())
    }
    /// Decompress.
    /// # Errors
    /// Any.
    pub async fn decompress(&self, _c: Compressed) -> Result<Arc<[u8]>> {
        Ok(Arc::new([]))
    }
}
