//! What images take on the disk: asked for each query, and not waited for long. A file system that
//! hangs must not hold up queries, which are about other disks as well.

use std::collections::HashMap;
use std::pin::pin;
use std::time::Duration;

use futures_util::future::{self, Either, join_all};
use parking_lot::Mutex;

use super::on_this_thread;
use crate::graph::Node;

/// How long all files together are waited for.
const PATIENCE: Duration = Duration::from_millis(50);

/// The sizes as they were last known, by the names of nodes.
#[derive(Debug, Default)]
pub struct Sizes(Mutex<HashMap<String, u64>>);

impl Sizes {
    /// What each of `nodes` takes on the disk, in bytes: as it was before where its file does not
    /// answer; 0 where it is not known.
    #[must_use]
    pub fn of(&self, nodes: &[Node]) -> HashMap<String, u64> {
        let asked = on_this_thread(|reactor| {
            reactor.block_on(async {
                let mut late = pin!(reactor.sleep(PATIENCE));
                let sizes = nodes.iter().map(|node| async move {
                    let storages = node.layer.storages();
                    let allocated = storages.first()?.allocated().await.ok()?;
                    Some((node.name.clone(), allocated))
                });
                // Each is noted as it comes: one that hangs hides no other.
                let noted = sizes.map(|size| async {
                    if let Some((name, size)) = size.await {
                        self.0.lock().insert(name, size);
                    }
                });
                match future::select(join_all(noted), &mut late).await {
                    Either::Left(_) => {}
                    Either::Right(_) => log::debug!("a file does not say what it takes"),
                }
            });
            Ok(())
        });
        if let Err(error) = asked {
            log::warn!("the sizes of images: {error}");
        }
        let mut known = self.0.lock();
        known.retain(|name, _| nodes.iter().any(|node| node.name == *name));
        known.clone()
    }
}
