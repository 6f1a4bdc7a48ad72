//! Compressed clusters: reading them, and writing them where a job asks for it.
//!
//! Source: QEMU's `docs/interop/qcow2`, section "Compressed Clusters Descriptor". Several of them
//! share a host cluster, which has a reference for each. Ours begin at a sector (or a block of the
//! storage), so that no two writers ever meet in one, and do not cross a host cluster's end.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Qcow2;
use super::claims::Claims;
use super::header::{Compression, SECTOR};
use super::inflate::inflate;
use super::words::Words;
use crate::error::{Action, Error, Result};
use crate::format::Compressed;
use crate::storage::{self, AlignedBuf, Purpose};
use crate::sync::Mutex;

/// Clusters kept after decompression: guests read a cluster in several requests.
const KEPT: usize = 16;

/// A small cache of decompressed clusters. On cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Cache {
    /// By place in the file, the latest last.
    clusters: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
    /// Which are being decompressed.
    in_work: Claims,
}

impl Cache {
    fn get(&self, offset: u64) -> Option<Arc<Vec<u8>>> {
        let cache = self.clusters.lock();
        cache
            .iter()
            .find(|(at, _)| *at == offset)
            .map(|(_, cluster)| cluster.clone())
    }

    fn insert(&self, offset: u64, cluster: &Arc<Vec<u8>>) {
        let mut cache = self.clusters.lock();
        if cache.len() >= KEPT {
            cache.pop_front();
        }
        cache.push_back((offset, cluster.clone()));
    }

    /// Forgets what was at `offset`: something else will be.
    fn forget(&self, offset: u64) {
        self.clusters.lock().retain(|(at, _)| *at != offset);
    }

    /// Forgets everything: compressed clusters have been freed.
    pub(super) fn clear(&self) {
        self.clusters.lock().clear();
    }
}

impl Qcow2 {
    /// The contents of the cluster that `compressed` is in.
    ///
    /// # Errors
    /// When it cannot be read, or is damaged.
    pub async fn decompress(&self, compressed: Compressed) -> Result<Arc<Vec<u8>>> {
        let (offset, len) = (compressed.offset, compressed.len as usize);
        if let Some(cluster) = self.decompressed.get(offset) {
            return Ok(cluster);
        }
        // One does it for all who want it: guests read a cluster in several requests at once.
        let _claim = self.decompressed.in_work.claim(offset..offset + 1).await;
        if let Some(cluster) = self.decompressed.get(offset) {
            return Ok(cluster);
        }
        let from = Purpose::Compressed.on(&*self.storage);
        let bytes = storage::io::borrow(from, offset, len).await?;
        let compression = self.header.lock().compression;
        let cluster = self.cluster_size() as usize;
        let cluster = inflate(compression, &bytes, cluster).map_err(|what| {
            Error::corrupt(
                self.storage.name(),
                format!("compressed cluster at {offset:#x}: {what}"),
            )
        })?;
        let cluster = Arc::new(cluster);
        self.decompressed.insert(offset, &cluster);
        Ok(cluster)
    }
}

impl Qcow2 {
    /// Writes `bytes`, a whole cluster, to the cluster at `offset` of the disk, compressed. False:
    /// that would gain nothing, or cannot be here, and nothing was written. The caller holds the
    /// claim, and the cluster is not in this layer.
    ///
    /// # Errors
    /// When it cannot be written, or metadata cannot be read.
    pub async fn write_compressed(&self, offset: u64, bytes: &[u8]) -> Result<bool> {
        let cluster = self.cluster_size();
        if self.data.is_some() || bytes.len() as u64 != cluster || !offset.is_multiple_of(cluster) {
            return Ok(false);
        }
        let compression = self.header.lock().compression;
        let Some(packed) = deflate(compression, bytes) else {
            return Ok(false);
        };
        let block = self.storage.limits().offset_align.max(SECTOR as u64);
        let room = (packed.len() as u64).next_multiple_of(block);
        if room >= cluster {
            return Ok(false);
        }
        let host = self
            .with_allocator(|allocator| allocator.allocate_part(room))
            .await?;
        self.decompressed.forget(host);
        let mut padded = AlignedBuf::zeroed(room as usize);
        if let Some(start) = padded.get_mut(..packed.len()) {
            start.copy_from_slice(&packed);
        }
        let to = Purpose::Compressed.on(&*self.storage);
        let written = storage::io::write_buf(to, host, &padded).await;
        if let Err(error) = written {
            self.release(host >> self.cluster_bits).await;
            return Err(self.io_error(Action::Write, host, &error));
        }
        let descriptor = self.shape.compressed_descriptor(host, packed.len() as u64);
        let mut at = offset;
        let words = Words {
            descriptor,
            bitmap: 0,
        };
        let linked = self.modify(&mut at, offset + cluster, |_, _, _| words);
        let linked = linked.await;
        if linked.is_err() && at == offset {
            self.release(host >> self.cluster_bits).await;
        }
        linked.map(|()| true)
    }
}

/// Compresses a cluster; `None` when it does not become smaller.
fn deflate(compression: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    let mut packed = vec![0; cluster.len()];
    let len = match compression {
        Compression::Zlib => {
            // QEMU reads with a window of 4 KiB.
            let mut state =
                flate2::Compress::new_with_window_bits(flate2::Compression::default(), false, 12);
            let status = state
                .compress(cluster, &mut packed, flate2::FlushCompress::Finish)
                .ok()?;
            if status != flate2::Status::StreamEnd {
                return None;
            }
            state.total_out() as usize
        }
        Compression::Zstd => zstd::bulk::compress_to_buffer(cluster, &mut packed[..], 0).ok()?,
    };
    packed.truncate(len);
    Some(packed)
}
