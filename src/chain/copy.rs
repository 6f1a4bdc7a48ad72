//! Copying from the layers below into a layer: copy-on-read and streams.

use super::View;
use crate::error::Result;

/// What a copy did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes written as data.
    pub data: u64,
    /// Bytes recorded as zeros.
    pub zero: u64,
}

impl View {
    /// Copies what the top layer lacks of `[offset, offset + len)` into it.
    pub(super) async fn populate(&self, _offset: u64, _len: u64) -> Result<Copied> {
        Ok(Copied::default())
    }
}
