//! Writing that needs more than a store in place.

use std::rc::Rc;

use super::View;
use crate::error::{Action, Error, Result};
use crate::format::Format;
use crate::storage::{self, IoBufs};

impl View {
    /// Writes `bufs` at `offset` of the disk.
    ///
    /// # Errors
    /// When the top layer is read-only or cannot be written.
    pub async fn write(self: Rc<Self>, offset: u64, bufs: IoBufs) -> Result<()> {
        let top = self.chain.top();
        if top.read_only {
            return Err(Error::Invalid(format!("node '{}' is read-only", top.name)));
        }
        match &top.format {
            Format::Raw(raw) => {
                let at = raw.start() + offset;
                storage::io::write(&*top.storage, &bufs, at)
                    .await
                    .map_err(|error| top.io_error(Action::Write, at, &error))
            }
            Format::Qcow2(_) => Err(Error::Invalid("not yet".into())),
        }
    }

    /// Makes `[offset, offset + len)` read as zeros; with `unmap` its space may be given back.
    ///
    /// # Errors
    /// As for [`View::write`].
    pub async fn write_zeroes(self: Rc<Self>, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let top = self.chain.top();
        if top.read_only {
            return Err(Error::Invalid(format!("node '{}' is read-only", top.name)));
        }
        match &top.format {
            Format::Raw(raw) => {
                let at = raw.start() + offset;
                storage::io::zero(&*top.storage, at, len, unmap && top.discard)
                    .await
                    .map_err(|error| top.io_error(Action::Write, at, &error))
            }
            Format::Qcow2(_) => Err(Error::Invalid("not yet".into())),
        }
    }

    /// Tells the layer that the guest needs `[offset, offset + len)` no longer.
    ///
    /// # Errors
    /// As for [`View::write`].
    pub async fn discard(self: Rc<Self>, offset: u64, len: u64) -> Result<()> {
        let top = self.chain.top();
        if top.read_only {
            return Err(Error::Invalid(format!("node '{}' is read-only", top.name)));
        }
        if !top.discard {
            return Ok(());
        }
        match &top.format {
            Format::Raw(raw) => {
                let at = raw.start() + offset;
                storage::io::discard(&*top.storage, at, len)
                    .await
                    .map_err(|error| top.io_error(Action::Write, at, &error))
            }
            Format::Qcow2(_) => Err(Error::Invalid("not yet".into())),
        }
    }
}
