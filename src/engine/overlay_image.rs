//! Images that are put on top of others: how they are made and opened, and what they must be like.

use std::path::{Path, PathBuf};

use super::{Served, on_this_thread};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::format::qcow2::Backing;
use crate::format::qcow2::create::{CreateOptions, create};
use crate::graph::{Node, State, layer_options};
use crate::options::{BackingRef, BlockdevOptions, Driver};
use crate::storage::{Access, FileStorage, MadeFile, OpenFlags, Storage, io};

/// Makes an empty image over node `below`.
pub(super) fn make(state: &State, below: &Node, format: &str, path: &Path) -> Result<MadeFile> {
    match format {
        "qcow2" => {}
        "raw" | "file" | "host_device" => {
            return Err(Error::Invalid(format!(
                "Backing file not supported for file format '{format}'"
            )));
        }
        "qed" => {
            return Err(Error::Invalid(
                "Format driver 'qed' does not support image creation (expected qcow2)".into(),
            ));
        }
        _ => return Err(Error::Invalid(format!("Unknown file format '{format}'"))),
    }
    let wanted = CreateOptions {
        backing: Some(Backing {
            name: state.header_name(&below.name)?,
            format: Some(below.format_name().to_owned()),
        }),
        ..CreateOptions::new(below.layer.format.size())
    };
    let failed = |error: std::io::Error| {
        let text = match error.raw_os_error() {
            Some(errno) => crate::error::errno_text(errno),
            None => error.to_string(),
        };
        Error::Invalid(format!("Could not create '{}': {text}", path.display()))
    };
    on_this_thread(|reactor| {
        reactor.block_on(async {
            let mut file = MadeFile::make(path).await.map_err(failed)?;
            let flags = OpenFlags {
                writable: true,
                ..OpenFlags::default()
            };
            let storage = FileStorage::open_outside(path, flags)
                .await
                .map_err(failed)?;
            storage.set_access(Access::Write).await.map_err(failed)?;
            let len = storage.len().await.map_err(failed)?;
            file.begin_to_write(len).map_err(failed)?;
            create(&storage, &wanted).await?;
            file.settle().await.map_err(failed)?;
            Ok(file)
        })
    })
}

/// Makes an image stable that is in `files`, with their places in the folders.
pub(super) async fn settle(image: &Node, files: impl Iterator<Item = &PathBuf>) -> Result<()> {
    let failed = |error: std::io::Error| {
        Error::Invalid(format!(
            "node '{}' cannot be made stable: {error} (it is to be there after a cut of the power)",
            image.name
        ))
    };
    for storage in image.layer.storages() {
        io::sync_shared(storage).await.map_err(failed)?;
    }
    for file in files {
        MadeFile::settle_place(file).await.map_err(failed)?;
    }
    Ok(())
}

/// Refuses an image that cannot take all that the guest of an export may write.
pub(super) fn check_fits(served: &Served, image: &Node) -> Result<()> {
    let align = image.layer.storage.limits().offset_align;
    let block = u64::from(served.export.block_size());
    if served.options.writable && align > block {
        return Err(Error::Invalid(format!(
            "node '{}' is in a file of which {align} bytes are written at least, and the guest of \
             export '{}' writes blocks of {block} (expected cache.direct=off, or an export with \
             logical-block-size={align})",
            image.name, served.options.id
        )));
    }
    let size = image.layer.format.size();
    let before = served.export.root().map_or(0, |root| root.chain().size());
    if size < before {
        return Err(Error::Invalid(format!(
            "node '{}' has {size} bytes, and the disk of export '{}', which its guest is using, has \
             {before} (expected as many, or more)",
            image.name, served.options.id
        )));
    }
    if matches!(image.layer.format, Format::Qed(_)) {
        let text = format!("node '{}': QED images are only read", image.name);
        return Err(Error::Invalid(text));
    }
    Ok(())
}

/// The options of the node for a new image in `path`, on top of node `below`.
pub(super) fn overlay_options(
    below: &Node,
    format: &str,
    path: &Path,
    name: Option<&str>,
) -> Result<BlockdevOptions> {
    let above = &below.options;
    let common = BlockdevOptions {
        node_name: name.map(str::to_owned),
        read_only: above.read_only,
        auto_read_only: above.auto_read_only,
        discard: above.discard,
        cache: above.cache,
        ..BlockdevOptions::new(above.driver.clone())
    };
    let known = layer_options(common, path, Some(format));
    let mut options = known.map_err(|_| Error::Invalid(format!("Unknown driver '{format}'")))?;
    match &mut options.driver {
        Driver::Qcow2(qcow2) => qcow2.backing = BackingRef::None,
        Driver::Qed(qed) => qed.backing = BackingRef::None,
        _ => {}
    }
    Ok(options)
}

/// The path that a client means.
pub(super) fn local_file(name: &str) -> Result<PathBuf> {
    let plain = name.strip_prefix("file:").unwrap_or(name);
    let protocol = plain.split_once(':').map(|(protocol, _)| protocol);
    match protocol {
        Some(protocol) if !protocol.contains('/') && plain == name => Err(Error::Invalid(format!(
            "Unknown protocol '{protocol}' (expected the path of a local file)"
        ))),
        _ => {
            let path = Path::new(plain);
            Ok(std::path::absolute(path).unwrap_or_else(|_| path.to_owned()))
        }
    }
}
