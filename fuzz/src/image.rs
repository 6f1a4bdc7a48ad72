//! Opening the images of recipes.

use std::sync::Arc;

use stratablk::chain::{Chain, Layer, View};
use stratablk::error::Result;
use stratablk::format::qcow2::journal::Folder;
use stratablk::format::{Format, Qcow2, Raw, qcow2};
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs, Storage};

use super::seeds;
use super::storage::SparseStorage;

/// Disks up to this size are read and compared as a whole.
pub const WHOLE: u64 = 1 << 20;

/// The cluster size that a qcow2 header claims, in bytes.
#[must_use]
pub fn cluster_size(header: &[u8]) -> u64 {
    let bits = header.get(20..24).and_then(|b| b.try_into().ok());
    1 << bits.map_or(0, u32::from_be_bytes).clamp(9, 21)
}

/// How to open an image.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    pub writable: bool,
    pub discard: bool,
    pub copy_on_read: bool,
    /// Copies from below are compressed.
    pub compress: bool,
    /// Keep as little metadata in memory as there can be.
    pub small_cache: bool,
}

/// An image with what belongs to it.
#[derive(Debug)]
pub struct Files {
    pub image: Arc<SparseStorage>,
    data: Arc<SparseStorage>,
    below: Arc<SparseStorage>,
}

impl Files {
    /// An image that holds `bytes`; all files ask for offsets aligned to `align`.
    #[must_use]
    pub fn new(bytes: Arc<[u8]>, align: u64) -> Self {
        let cluster = cluster_size(&bytes);
        let below = || Arc::new(SparseStorage::new(seeds::below(), cluster, align));
        Self {
            image: Arc::new(SparseStorage::new(bytes, cluster, align)),
            data: below(),
            below: below(),
        }
    }

    /// A layer for what is under the image.
    #[must_use]
    pub fn backing_layer(&self) -> Arc<Layer> {
        let size = seeds::below().len() as u64;
        Arc::new(Layer {
            name: "below".into(),
            format: Format::Raw(Raw::new(size)),
            storage: self.below.clone(),
            read_only: true,
            discard: false,
            copy_on_read: false,
        })
    }

    /// Opens the image, with a layer under it if it names one.
    ///
    /// # Errors
    /// What the engine says of it.
    pub async fn open(&self, how: How) -> Result<(Arc<Qcow2>, Arc<Chain>)> {
        self.open_journaled(how, None).await
    }

    /// As [`Files::open`], with a folder for its journal.
    ///
    /// # Errors
    /// What the engine says of it.
    pub async fn open_journaled(
        &self,
        how: How,
        journal: Option<Arc<Folder>>,
    ) -> Result<(Arc<Qcow2>, Arc<Chain>)> {
        let storage = self.image.clone() as Arc<dyn Storage>;
        let header = qcow2::read_header(&*storage).await?;
        let data = header
            .has_data_file()
            .then(|| self.data.clone() as Arc<dyn Storage>);
        let options = qcow2::Options {
            writable: how.writable,
            discard: how.discard,
            cache_bytes: if how.small_cache { 0 } else { 1 << 20 },
            journal,
            ..qcow2::Options::default()
        };
        let image = Arc::new(Qcow2::open_with_data(storage, data, options).await?);
        let top = Layer {
            name: "top".into(),
            format: Format::Qcow2(image.clone()),
            storage: image.data_storage().clone(),
            read_only: !how.writable,
            discard: how.discard,
            copy_on_read: how.copy_on_read,
        };
        let mut layers = vec![Arc::new(top)];
        if image.backing().is_some() {
            layers.push(self.backing_layer());
        }
        Ok((image, Arc::new(Chain::new(layers)?)))
    }
}

/// The reactor of this thread. Nothing here waits: all storage is in memory.
#[must_use]
pub fn reactor() -> Reactor {
    Reactor::for_this_thread().expect("io_uring is needed")
}

/// Reads a part of a disk.
///
/// # Errors
/// What the engine says.
pub async fn read(chain: &Arc<Chain>, offset: u64, len: usize) -> Result<Vec<u8>> {
    let buffer = AlignedBuf::zeroed(len);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
    View::of(chain.clone()).read(offset, bufs).await?;
    Ok(buffer.to_vec())
}

/// Writes a part of a disk.
///
/// # Errors
/// What the engine says.
pub async fn write(chain: &Arc<Chain>, offset: u64, bytes: &[u8]) -> Result<()> {
    let buffer = AlignedBuf::copy_of(bytes);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, bytes.len()) };
    View::of(chain.clone()).write(offset, bufs).await
}
