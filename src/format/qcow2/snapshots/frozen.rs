//! Metadata that stands still, while guests go on reading, and writing in place.
//!
//! Invariant: from [`Frozen::settle`] on the metadata in memory is that on the disk, and stays so
//! until the end: nobody has a claim, so nothing is mapped or unmapped, and no flush frees anything.
//! Flushes only make data stable.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};

use super::super::Qcow2;
use super::super::claims::Closed;
use super::super::header::Header;
use crate::error::{Error, Result};
use crate::reactor::Reactor;

/// How long those who change the mapping are waited for. Others that are about to wait meanwhile; and
/// one that hangs, such as a copy from a layer that does not answer, must not hold them up for ever.
const PATIENCE: Duration = Duration::from_secs(10);

/// An image whose metadata stands still until this is dropped.
#[derive(Debug)]
pub(super) struct Frozen {
    pub image: Arc<Qcow2>,
}

impl Frozen {
    /// Waits until nobody changes the mapping of `image`, and lets nobody begin to. Its list of snapshots
    /// was read when it had this `header`.
    pub async fn of(image: &Arc<Qcow2>, header: &Header) -> Result<Self> {
        let closing = pin!(image.claims.close());
        let closed = match Reactor::current() {
            None => Some(closing.await),
            Some(reactor) => {
                let late = pin!(reactor.sleep(PATIENCE));
                match select(closing, late).await {
                    Either::Left((closed, _)) => Some(closed),
                    Either::Right(_) => None,
                }
            }
        };
        closed.map(Closed::keep).ok_or_else(|| {
            Error::Invalid(format!(
                "{}: a write that allocates clusters has not ended within {} s (its disk may not \
                 answer); nothing was changed",
                image.storage.name(),
                PATIENCE.as_secs()
            ))
        })?;
        let frozen = Self {
            image: image.clone(),
        };
        let listed = |header: &Header| (header.snapshots_offset, header.snapshots, header.size);
        match listed(&image.header()) == listed(header) {
            true => Ok(frozen),
            false => Err(frozen.changed()),
        }
    }

    /// Makes all metadata stable as it is now, and has it stand still.
    pub async fn settle(&self) -> Result<()> {
        let _turn = self.image.flush_turn().await;
        self.image.write_back().await?;
        self.image.meta.lock().still = true;
        self.check()
    }

    /// Refuses to go on if anything has changed.
    pub fn check(&self) -> Result<()> {
        let meta = self.image.meta.lock();
        let dirty = meta.dirty_l1.len() + meta.dirty_slices.len() + meta.allocator.dirty();
        match dirty == 0 && meta.adopted.is_empty() {
            true => Ok(()),
            false => Err(self.changed()),
        }
    }

    fn changed(&self) -> Error {
        Error::Invalid(format!(
            "{}: its metadata has changed while a snapshot was taken or deleted (try again)",
            self.image.storage.name()
        ))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.image.meta.lock().still = false;
        self.image.claims.open();
    }
}
