//! What images take on the disk: asked for each query, and not waited for long. A file system that
//! hangs must not hold up queries, which are about other disks as well.

use std::pin::pin;
use std::time::Duration;

use futures_util::future::{join_all, select};

use super::on_this_thread;
use crate::graph::Node;

/// How long all files together are waited for.
const PATIENCE: Duration = Duration::from_millis(50);

/// What each of `nodes` takes on the disk, in bytes: as it was before where its file does not
/// answer in time. The answer is the next query's then.
#[must_use]
pub fn of(nodes: &[Node]) -> Vec<u64> {
    let asked = on_this_thread(|reactor| {
        reactor.block_on(async {
            let asked = nodes.iter().map(async |node| {
                let storages = node.layer.storages();
                if let Some(storage) = storages.first()
                    && let Err(error) = storage.allocated().await
                {
                    log::debug!("{}: what it takes: {error}", storage.name());
                }
            });
            let late = pin!(reactor.sleep(PATIENCE));
            select(join_all(asked), late).await;
        });
        Ok(())
    });
    if let Err(error) = asked {
        log::warn!("the sizes of images: {error}");
    }
    let known = |node: &Node| Some(node.layer.storages().first()?.allocated_before());
    nodes.iter().map(|node| known(node).unwrap_or(0)).collect()
}
