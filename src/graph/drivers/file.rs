//! `file` and `host_device`: a file or block device of this machine.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::LocalBoxFuture;

use super::{layer, raw};
use crate::error::{Error, Result};
use crate::format::{Format, Raw};
use crate::graph::descent::Descent;
use crate::graph::driver::Driver;
use crate::graph::opening::{OpenNode, Opened, Opening, storage_len, text};
use crate::graph::{Graph, Node};
use crate::options::{BlockdevOptions, FileOptions, Locking};
use crate::storage::{FileStorage, OpenFlags, Storage, opener};

impl Driver for FileOptions {
    fn path(&self) -> Option<&Path> {
        Some(&self.filename)
    }
}

impl OpenNode for FileOptions {
    fn open<'a>(
        &'a self,
        _opening: &'a Opening<'_>,
        name: &'a str,
        options: &'a BlockdevOptions,
        descent: &'a mut Descent,
    ) -> LocalBoxFuture<'a, Result<Node>> {
        Box::pin(open(name, options, self, descent))
    }

    fn reopen<'a>(
        &'a self,
        graph: &'a Graph,
        node: &'a Node,
    ) -> LocalBoxFuture<'a, Result<Opened>> {
        Box::pin(raw::reopen(graph, node))
    }
}

fn flags(options: &BlockdevOptions, file: &FileOptions) -> OpenFlags {
    OpenFlags {
        writable: !options.read_only,
        direct: options.cache.direct,
        no_flush: options.cache.no_flush,
        no_lock: file.locking == Locking::Off,
        force_share: options.force_share,
    }
}

async fn open(
    name: &str,
    options: &BlockdevOptions,
    file: &FileOptions,
    descent: &mut Descent,
) -> Result<Node> {
    if let Ok(stat) = opener::look(&file.filename).await {
        let path = file.filename.display();
        // To open another special file may do something, or wait for ever.
        if !stat.is_file() && !stat.file_type().is_block_device() {
            return Err(Error::Invalid(format!(
                "Could not open '{path}': not a file or a block device"
            )));
        }
        descent.enter(&file.filename, &stat)?;
    }
    let flags = flags(options, file);
    let storage = match FileStorage::open_outside(&file.filename, flags).await {
        Err(error) if flags.writable && options.auto_read_only && is_denied(&error) => {
            let flags = OpenFlags {
                writable: false,
                ..flags
            };
            FileStorage::open_outside(&file.filename, flags).await
        }
        other => other,
    };
    let storage: Arc<dyn Storage> = Arc::new(storage.map_err(text)?);
    let size = storage_len(&*storage).await?.next_multiple_of(512);
    let layer = layer(name, options, (Format::Raw(Raw::new(size)), storage));
    Ok(Node::new(options.clone(), layer, file.filename.clone()))
}

fn is_denied(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
    )
}
