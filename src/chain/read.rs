//! Reading, with whatever it needs: metadata to load, clusters to decompress, many extents.

use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::join_all;

use super::{Chain, Layer, Source, View};
use crate::error::{Action, Error, Result};
use crate::format::{Compressed, Format, Place};
use crate::storage::{self, IoBufs, Purpose};

/// Extents of one request that are read at the same time.
const PARALLEL: usize = 16;

/// Where bytes were found, with metadata loaded.
pub(super) enum Found {
    /// In storage, or nowhere.
    Plain(Source),
    /// Compressed, in this layer.
    Compressed(usize, Compressed),
}

impl View {
    /// Reads `bufs.len()` bytes at `offset` of the disk.
    ///
    /// # Errors
    /// When a layer cannot be read or is corrupt; the contents of `bufs` are undefined then.
    pub async fn read(self: Rc<Self>, offset: u64, bufs: IoBufs) -> Result<()> {
        if self.chain.top().copy_on_read && !self.chain.top().read_only {
            // What cannot be kept is still read: a full disk must not fail a guest's read.
            if let Err(error) = self.populate(offset, bufs.len() as u64).await {
                log::warn!("copy-on-read: {error}");
            }
        }
        self.chain.read_from(0, offset, &bufs, Purpose::Data).await
    }
}

impl Chain {
    /// Reads what the layers from `first` on down hold at `offset`.
    pub(super) async fn read_from(
        &self,
        first: usize,
        offset: u64,
        bufs: &IoBufs,
        purpose: Purpose,
    ) -> Result<()> {
        let mut done = 0;
        while done < bufs.len() {
            let mut batch = Vec::with_capacity(PARALLEL);
            while done < bufs.len() && batch.len() < PARALLEL {
                let rest = (bufs.len() - done) as u64;
                let (found, len) = self.locate(first, offset + done as u64, rest).await?;
                batch.push((found, bufs.slice(done, len as usize)));
                done += len as usize;
            }
            // All of them, also when one has failed: the others are on their way into memory that is
            // the guest's again when it has been told.
            let fetched = join_all(
                batch
                    .into_iter()
                    .map(|(found, bufs)| self.fetch(found, bufs, purpose)),
            );
            fetched.await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    /// Finds who supplies the bytes from `offset` on, loading metadata as needed.
    pub(super) async fn locate(&self, first: usize, offset: u64, len: u64) -> Result<(Found, u64)> {
        self.locate_above(first, self.layers.len(), offset, len)
            .await
    }

    /// As [`Chain::locate`], looking at the layers `first..end` only.
    pub(super) async fn locate_above(
        &self,
        first: usize,
        end: usize,
        offset: u64,
        len: u64,
    ) -> Result<(Found, u64)> {
        let mut len = len;
        for (index, layer) in self.layers.iter().enumerate().take(end).skip(first) {
            let extent = layer.map_loaded(offset, len).await?;
            len = extent.len;
            let found = match extent.place {
                Place::Data(offset) => Found::Plain(Source::Storage {
                    layer: index,
                    offset,
                }),
                Place::Zero => Found::Plain(Source::Zero),
                Place::Compressed(compressed) => Found::Compressed(index, compressed),
                Place::Below => continue,
                Place::Unknown => return Err(layer.unknown(offset)),
            };
            return Ok((found, len));
        }
        Ok((Found::Plain(Source::Zero), len))
    }

    /// Brings the bytes of one extent into `bufs`.
    async fn fetch(&self, found: Found, bufs: IoBufs, purpose: Purpose) -> Result<()> {
        match found {
            Found::Plain(Source::Zero) => {
                bufs.zero();
                Ok(())
            }
            Found::Plain(Source::Storage { layer, offset }) => {
                let layer = self.layer(layer)?;
                layer
                    .fetch(offset, &bufs, purpose)
                    .await
                    .map_err(|error| layer.io_error_of(Action::Read, purpose, offset, &error))
            }
            Found::Compressed(layer, compressed) => {
                let layer = self.layer(layer)?;
                let Format::Qcow2(qcow2) = &layer.format else {
                    return Err(layer.unknown(compressed.offset));
                };
                let cluster = qcow2.decompress(compressed).await?;
                bufs.copy_from(cluster.get(compressed.within as usize..).unwrap_or(&[]));
                Ok(())
            }
        }
    }

    pub(super) fn layer(&self, index: usize) -> Result<&Arc<Layer>> {
        self.layers
            .get(index)
            .ok_or_else(|| Error::Invalid(format!("the chain has no layer {index}")))
    }
}

impl Layer {
    /// Reads at an offset of the storage. The bytes of a raw disk that its device does not have any
    /// more are an error, not zeros: a job would write these down for good.
    async fn fetch(&self, offset: u64, bufs: &IoBufs, purpose: Purpose) -> std::io::Result<()> {
        if matches!(self.format, Format::Raw(_))
            && let Some(end) = self.storage.capacity().await?
            && offset + bufs.len() as u64 > end
        {
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        storage::io::read(purpose.on(&*self.storage), bufs, offset).await
    }

    /// Says where the bytes from `offset` on are, with metadata loaded as needed.
    ///
    /// # Errors
    /// When metadata cannot be read or contradicts the format.
    pub async fn map_loaded(&self, offset: u64, len: u64) -> Result<crate::format::Extent> {
        loop {
            let extent = self.format.map(offset, len);
            if extent.place != Place::Unknown {
                return Ok(extent);
            }
            // Boxed: it is rare, and every future that looks at the mapping would have room for it.
            Box::pin(self.format.load(offset)).await?;
        }
    }

    pub(super) fn unknown(&self, offset: u64) -> Error {
        Error::corrupt(
            self.storage.name(),
            format!("no mapping at guest offset {offset:#x}"),
        )
    }
}
