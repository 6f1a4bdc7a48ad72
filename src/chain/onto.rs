//! Copying what layers of a disk hold onto another disk: down into the base of a commit.
//!
//! The bytes go the way of a guest's writes to that disk, so its claims, its copy-on-write and its
//! grace periods hold: whole clusters are of no importance here. Only the blocks of its storage are,
//! which are written whole; of one that the layers hold in part, the rest is what the disk itself
//! reads as.
//!
//! Invariant: where a byte lies under one that the layers above hold, it may change unseen. Nothing
//! else of the target is changed, so all that goes through those layers reads the same meanwhile,
//! and wherever a copy ends.

use std::rc::Rc;

use super::copy::runs;
use super::tap::Hold;
use super::{Copied, CopyStatus, View};
use crate::error::Result;
use crate::reactor::carry_out;
use crate::storage::{IoBufs, Purpose, ScratchBuf};

/// The least stretch of zeros that is looked for in data.
const ZERO_UNIT: u64 = 4096;

impl View {
    /// Copies what the layers above `end` hold of `[offset, offset + len)` onto `target`, where it has
    /// the same place. Zeros are recorded as such. `hold` is kept until all is written.
    ///
    /// # Errors
    /// When a layer cannot be read or the target cannot be written; what was copied before stays.
    pub async fn copy_onto(
        self: &Rc<Self>,
        end: usize,
        target: &Rc<View>,
        (offset, len): (u64, u64),
        hold: Option<Hold>,
    ) -> Result<Copied> {
        let (view, target) = (self.clone(), target.clone());
        carry_out(async move {
            let copied = view.copy_range(end, &target, offset, len).await;
            drop(hold);
            copied
        })
        .await
    }

    async fn copy_range(
        &self,
        end: usize,
        target: &Rc<View>,
        offset: u64,
        len: u64,
    ) -> Result<Copied> {
        let block = target.block();
        let size = self.chain.size();
        let mut at = offset / block * block;
        let stop = (offset + len).next_multiple_of(block).min(size);
        let mut copied = Copied::default();
        while at < stop {
            let (status, now) = self.chain.status_above(end, at, stop - at, block).await?;
            match status {
                CopyStatus::Present | CopyStatus::Absent => {}
                CopyStatus::Zero => {
                    target.clone().write_zeroes(at, now, true).await?;
                    copied.zero += now;
                }
                CopyStatus::Data => {
                    let step = self.copy_data_onto(target, at, now).await?;
                    copied.data += step.data;
                    copied.zero += step.zero;
                }
            }
            at += now;
        }
        Ok(copied)
    }

    async fn copy_data_onto(&self, target: &Rc<View>, offset: u64, len: u64) -> Result<Copied> {
        let buffer = ScratchBuf::new(len as usize);
        // SAFETY: nobody looks at the buffer before the read has ended.
        let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
        self.chain
            .read_from(0, offset, &bufs, Purpose::Copy)
            .await?;
        let mut copied = Copied::default();
        let unit = target.chain.top().format.unit_size().max(ZERO_UNIT);
        for (start, end, zero) in runs(&buffer, offset, unit) {
            let (at, bytes) = (offset + start as u64, (end - start) as u64);
            if zero {
                target.clone().write_zeroes(at, bytes, true).await?;
                copied.zero += bytes;
            } else {
                // SAFETY: nobody changes the buffer any more.
                let part = unsafe { IoBufs::of(&buffer, start, end - start) };
                target.clone().write(at, part).await?;
                copied.data += bytes;
            }
        }
        Ok(copied)
    }

    /// What is written at once of its top layer's storage, in bytes.
    #[must_use]
    pub fn block(&self) -> u64 {
        self.chain.top().storage.limits().offset_align.max(1)
    }
}

#[cfg(test)]
mod tests;
