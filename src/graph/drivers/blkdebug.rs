//! `blkdebug`: the bytes of another node, with operations that fail by rules.
//!
//! It has no disk of its own format: over a file it wraps the file's storage, over an image the disk
//! in there, and jobs that are about the image go to the image's own node.

use std::io;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::LocalBoxFuture;

use super::{layer, raw};
use crate::error::{Error, Result, errno_text};
use crate::format::{Format, Raw};
use crate::graph::descent::Descent;
use crate::graph::driver::Driver;
use crate::graph::opening::{OpenNode, Opened, Opening, storage_len};
use crate::graph::{Demand, Graph, Node, Role};
use crate::options::{BlkdebugOptions, BlockdevOptions, parse_blkdebug_config};
use crate::storage::blkdebug::rules::Rules;
use crate::storage::blkdebug::{Blkdebug, Settings};
use crate::storage::{Storage, opener};

/// The longest file of rules that is read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

impl Driver for BlkdebugOptions {
    /// It only passes on bytes, and minds no changes of them.
    fn demand(&self, own: Demand, _role: Role) -> Demand {
        own
    }
}

impl OpenNode for BlkdebugOptions {
    fn open<'a>(
        &'a self,
        opening: &'a Opening<'_>,
        name: &'a str,
        options: &'a BlockdevOptions,
        descent: &'a mut Descent,
    ) -> LocalBoxFuture<'a, Result<Node>> {
        Box::pin(async move {
            let mut settings = self.settings.clone();
            if let Some(path) = &self.config {
                settings.rules = read_config(path).await?.before(settings.rules);
            }
            let below = opening.open_ref(&self.image, descent).await?;
            let below = opening.node(&below)?;
            let bytes = opening.bytes(&below)?;
            check_size(&*bytes, &settings).await?;
            let storage: Arc<dyn Storage> = Arc::new(Blkdebug::new(bytes, &settings));
            // What a file's last sector lacks reads as zeros.
            let size = storage_len(&*storage).await?.next_multiple_of(512);
            let layer = layer(name, options, (Format::Raw(Raw::new(size)), storage));
            let node = Node::new(options.clone(), layer, below.filename.clone());
            Ok(node.over(Role::Image, Some(&below.name)))
        })
    }

    fn reopen<'a>(
        &'a self,
        graph: &'a Graph,
        node: &'a Node,
    ) -> LocalBoxFuture<'a, Result<Opened>> {
        Box::pin(raw::reopen(graph, node))
    }
}

/// Refuses blocks that reach past the end of what has its length for good.
async fn check_size(bytes: &dyn Storage, settings: &Settings) -> Result<()> {
    let capacity = bytes.capacity().await;
    let capacity = capacity.map_err(|error| Error::Invalid(error.to_string()))?;
    match (capacity, settings.align) {
        (Some(size), Some(align)) if !size.is_multiple_of(align) => Err(Error::Invalid(format!(
            "{}: Cannot meet constraints with align {align}: the size of {size} bytes is not a \
             multiple of it",
            bytes.name()
        ))),
        _ => Ok(()),
    }
}

/// The rules in the file `path`.
async fn read_config(path: &Path) -> Result<Rules> {
    let file = path.to_owned();
    let text = opener::outside(move || {
        let metadata = std::fs::metadata(&file)?;
        // To open another special file may do something, or wait for ever.
        if !metadata.is_file() || metadata.len() > MAX_CONFIG {
            let text = format!("not a file of at most {MAX_CONFIG} bytes");
            return Err(io::Error::other(text));
        }
        std::fs::read_to_string(&file)
    });
    let text = text.await.map_err(|error| {
        let text = match error.raw_os_error() {
            Some(errno) => errno_text(errno),
            None => error.to_string(),
        };
        let path = path.display();
        Error::Invalid(format!(
            "Could not read blkdebug config file '{path}': {text}"
        ))
    })?;
    parse_blkdebug_config(&text)
        .map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))
}
