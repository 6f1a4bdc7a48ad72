//! Reading compressed clusters.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Qcow2;
use super::header::Compression;
use crate::error::{Action, Error, Result};
use crate::format::Compressed;
use crate::storage;

/// Clusters kept after decompression: guests read a cluster in several requests.
const KEPT: usize = 16;

/// A small cache of decompressed clusters, the latest last.
#[derive(Debug, Default)]
pub struct Cache(Mutex<VecDeque<(u64, Arc<[u8]>)>>);

impl Cache {
    fn get(&self, offset: u64) -> Option<Arc<[u8]>> {
        let cache = self.0.lock();
        cache
            .iter()
            .find(|(at, _)| *at == offset)
            .map(|(_, cluster)| cluster.clone())
    }

    fn insert(&self, offset: u64, cluster: &Arc<[u8]>) {
        let mut cache = self.0.lock();
        if cache.len() >= KEPT {
            cache.pop_front();
        }
        cache.push_back((offset, cluster.clone()));
    }

    /// Forgets everything: compressed clusters have been freed.
    pub(super) fn clear(&self) {
        self.0.lock().clear();
    }
}

impl Qcow2 {
    /// The contents of the cluster that `compressed` is in.
    ///
    /// # Errors
    /// When it cannot be read, or is damaged.
    pub async fn decompress(&self, compressed: Compressed) -> Result<Arc<[u8]>> {
        if let Some(cluster) = self.decompressed.get(compressed.offset) {
            return Ok(cluster);
        }
        let bytes =
            storage::io::read_buf(&*self.storage, compressed.offset, compressed.len as usize)
                .await
                .map_err(|error| self.io_error(Action::Read, compressed.offset, &error))?;
        let compression = self.header.lock().compression;
        let mut cluster = vec![0; self.cluster_size() as usize];
        inflate(compression, &bytes, &mut cluster).map_err(|what| {
            Error::corrupt(
                self.storage.name(),
                format!("compressed cluster at {:#x}: {what}", compressed.offset),
            )
        })?;
        let cluster: Arc<[u8]> = cluster.into();
        self.decompressed.insert(compressed.offset, &cluster);
        Ok(cluster)
    }
}

/// Decompresses one whole cluster; what follows it in `bytes` is somebody else's.
fn inflate(
    compression: Compression,
    bytes: &[u8],
    cluster: &mut [u8],
) -> std::result::Result<(), String> {
    let produced = match compression {
        Compression::Zlib => {
            let mut state = flate2::Decompress::new(false);
            state
                .decompress(bytes, cluster, flate2::FlushDecompress::Finish)
                .map_err(|error| error.to_string())?;
            state.total_out()
        }
        Compression::Zstd => inflate_zstd(bytes, cluster)?,
    };
    if produced == cluster.len() as u64 {
        return Ok(());
    }
    Err(format!(
        "{produced} bytes after decompression (expected {})",
        cluster.len()
    ))
}

fn inflate_zstd(bytes: &[u8], cluster: &mut [u8]) -> std::result::Result<u64, String> {
    use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

    let mut decoder = Decoder::new().map_err(|error| error.to_string())?;
    let mut input = InBuffer::around(bytes);
    let len = cluster.len();
    let mut output = OutBuffer::around(cluster);
    while output.pos() < len {
        let before = (input.pos(), output.pos());
        decoder
            .run(&mut input, &mut output)
            .map_err(|error| error.to_string())?;
        if (input.pos(), output.pos()) == before {
            break;
        }
    }
    Ok(output.pos() as u64)
}
