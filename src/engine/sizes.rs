//! What images take on the disk: asked for each query, and not waited for long. A file system that
//! hangs must not hold up queries, which are about other disks as well.

use std::pin::pin;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{join_all, select};

use super::on_this_thread;
use crate::graph::Node;

/// How long all files together are waited for.
const PATIENCE: Duration = Duration::from_millis(50);

/// What each of `nodes` takes on the disk, in bytes: as it was before where its file does not
/// answer in time. The answer is the next query's then.
#[must_use]
pub fn of(nodes: &[Node]) -> Vec<u64> {
    let mut asked = pin!(join_all(nodes.iter().map(async |node| {
        let storages = node.layer.storages();
        if let Some(storage) = storages.first()
            && let Err(error) = storage.allocated().await
        {
            log::debug!("{}: what it takes: {error}", storage.name());
        }
    })));
    // Files in memory answer at once.
    if asked.as_mut().now_or_never().is_none() {
        let waited = on_this_thread(|reactor| {
            let late = pin!(reactor.sleep(PATIENCE));
            reactor.block_on(select(asked, late));
            Ok(())
        });
        if let Err(error) = waited {
            log::warn!("the sizes of images: {error}");
        }
    }
    let known = |node: &Node| Some(node.layer.storages().first()?.allocated_before());
    nodes.iter().map(|node| known(node).unwrap_or(0)).collect()
}
