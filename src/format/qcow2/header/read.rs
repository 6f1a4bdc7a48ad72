//! Reading an image's header from its storage.

use super::Header;
use crate::error::Result;
use crate::storage::{self, Purpose, Storage};

/// Reads and parses the header of the image in `storage`.
///
/// # Errors
/// When it is not a qcow2 image, or one that needs a feature that is not there.
pub async fn read_header(storage: &dyn Storage) -> Result<Header> {
    Header::parse(read_first_cluster(storage).await?, storage.name())
}

/// As [`read_header`], but of encrypted images too: to tell what they are.
///
/// # Errors
/// As for [`read_header`].
pub async fn describe_header(storage: &dyn Storage) -> Result<Header> {
    Header::describe(read_first_cluster(storage).await?, storage.name())
}

/// What the header says is mostly in its first bytes; the whole cluster is read only where it is
/// not, so that a chain of many layers opens with one short read for each.
async fn read_first_cluster(storage: &dyn Storage) -> Result<Vec<u8>> {
    let start = storage::io::fetch(Purpose::Header.on(storage), 0, 4096).await?;
    let cluster = 1 << super::cluster_bits(&start, storage.name())?;
    let mut first = start.to_vec();
    if cluster > first.len() && !super::is_whole(&first) {
        let rest = storage::io::fetch(
            Purpose::Header.on(storage),
            first.len() as u64,
            cluster - first.len(),
        )
        .await?;
        first.extend_from_slice(&rest);
    }
    first.truncate(cluster);
    Ok(first)
}
