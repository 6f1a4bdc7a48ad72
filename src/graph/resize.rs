//! Changing the size of a node's image that no guest uses.

use std::sync::Arc;

use super::{Demand, Graph, Holder, Request, Rights, drivers};
use crate::chain::Layer;
use crate::chain::resize::{Resize, grow, preallocate_raw, shrink};
use crate::error::{Action, Error, Result};
use crate::format::qcow2::Preallocation;
use crate::format::qcow2::bitmaps::{InForce, check_resize};
use crate::format::{Format, Qcow2, Raw};

impl Graph {
    /// Changes the size of node `name`'s image, which is made writable for that. The node itself
    /// has its old size until it is opened anew. Returns the new size in bytes.
    ///
    /// # Errors
    /// When the format or the image forbids it (the image has not been changed then), or the
    /// image cannot be read or written.
    pub async fn resize(&self, name: &str, wanted: Resize) -> Result<u64> {
        let node = self.node(name)?;
        let layer = node.layer.clone();
        // A raw file has the size that it is given, as with 'qemu-img': rounded up, a file that
        // is to become shorter could become longer.
        let size = match layer.format {
            Format::Raw(_) => wanted.size,
            Format::Qcow2(_) | Format::Qed(_) => wanted.size.next_multiple_of(512),
        };
        let wanted = Resize { size, ..wanted };
        let old = layer.format.size();
        let file = layer.storage.name();
        if wanted.size < old && !wanted.shrink {
            return Err(Error::Invalid(format!(
                "{file}: {} bytes are fewer than the {old} that the image has, and what is above \
                 would be lost (expected a larger size, or 'shrink')",
                wanted.size
            )));
        }
        if wanted.size <= old && wanted.preallocation != Preallocation::Off {
            return Err(Error::Invalid(format!(
                "{file}: preallocation is for growing (expected a size above {old} bytes)"
            )));
        }
        let below = self.root(name)?.chain().layers().len() > 1;
        let mut in_force = InForce::new();
        if let Format::Qcow2(image) = &layer.format {
            in_force = check_qcow2(image, wanted, below).await?;
        } else if wanted.preallocation == Preallocation::Metadata {
            return Err(Error::Invalid(format!(
                "{file}: a raw image has no metadata to preallocate (expected off, falloc or full)"
            )));
        }
        if let (Format::Raw(_), Some(disk)) =
            (&layer.format, self.state().disks_under(&node).first())
        {
            return Err(Error::Invalid(format!(
                "{file}: the image is in the disk of node '{}', which has its size for good \
                 (expected a resize of that node)",
                disk.name
            )));
        }
        // Others that write meanwhile would go on with the old size.
        let demand = Demand {
            does: Rights::READ | Rights::WRITE | Rights::RESIZE,
            tolerates: Rights::READ | Rights::WRITE_UNCHANGED,
        };
        let request = Request::new(Holder::Tool).with(name, "root", demand);
        let _grant = self.access(request).await?;
        let chain = self.root(name)?.chain();
        match &chain.top().format {
            Format::Raw(_) => resize_raw(chain.top(), wanted).await,
            Format::Qcow2(_) if wanted.size >= old => grow(&chain, wanted, &in_force).await,
            Format::Qcow2(_) => shrink(&chain, wanted.size, &in_force).await,
            Format::Qed(_) => Err(Error::unsupported(file, "QED images are only read")),
        }?;
        Ok(size)
    }
}

impl Graph {
    /// Makes the image of node `name` at least as long as `size` bytes, for one who has a grant for
    /// writing and resizing it. The node has the new size then, and what is new reads as zeros.
    ///
    /// # Errors
    /// When the format or the image forbids it, or it cannot be written: it has its old size then.
    pub async fn grow(&self, name: &str, size: u64) -> Result<()> {
        let node = self.image_node(name)?;
        let _turn = self.turn(&node).await?;
        let node = self.node(&node.name)?;
        let layer = &node.layer;
        let wanted = Resize {
            size,
            ..Resize::default()
        };
        let old = layer.format.size();
        if size <= old {
            return Ok(());
        }
        let file = layer.storage.name();
        let (grown, opened) = match &layer.format {
            Format::Raw(_) => {
                let file_len = layer.storage.len().await;
                let file_len =
                    file_len.map_err(|error| Error::io(Action::Read, file, 0, &error))?;
                // The disk of a file that ends within a sector ends with it.
                if file_len.next_multiple_of(512) != old.next_multiple_of(512)
                    || !self.state().disks_under(&node).is_empty()
                {
                    return Err(Error::Invalid(format!(
                        "{file}: node '{name}' is a part of it, of {old} bytes for good (expected a \
                         base of at least {size} bytes)"
                    )));
                }
                resize_raw(layer, wanted).await?;
                let format = Format::Raw(Raw::new(size));
                (Ok(()), (format, layer.storage.clone()))
            }
            Format::Qcow2(image) => {
                let in_force = check_qcow2(image, wanted, true).await?;
                let chain = self.root(&node.name)?.chain();
                let grown = grow(&chain, wanted, &in_force).await;
                // It was closed for that, whatever came of it.
                let driver = drivers::of(&node.options.driver);
                (grown, driver.reopen(self, &node).await?)
            }
            Format::Qed(_) => return Err(Error::unsupported(file, "QED images are only read")),
        };
        let (format, storage) = opened;
        let layer = Layer {
            format,
            storage,
            ..(**layer).clone()
        };
        self.replace_layer(&node.name, Arc::new(layer))?;
        grown
    }
}

/// What QEMU refuses too, before anything is changed. Returns the bitmaps that are in force.
async fn check_qcow2(image: &Qcow2, wanted: Resize, below: bool) -> Result<InForce> {
    let header = image.header();
    let refused = |what: &str| Err(Error::unsupported(image.storage().name(), what));
    if header.snapshots > 0 && header.version < 3 {
        // Snapshots of version 2 do not record the size of their disk.
        return refused("a version 2 image with internal snapshots cannot be resized");
    }
    if wanted.preallocation != Preallocation::Off && below && !header.has_subclusters() {
        return refused(
            "clusters allocated ahead would hide the backing file (expected no preallocation, or \
             an image with extended_l2=on)",
        );
    }
    check_resize(&**image.storage(), &header, wanted.size).await
}

async fn resize_raw(layer: &Layer, wanted: Resize) -> Result<()> {
    let storage = &*layer.storage;
    let failed = |error| Error::io(Action::Write, storage.name(), wanted.size, &error);
    let old = storage.len().await.map_err(failed)?;
    if storage.capacity().await.map_err(failed)?.is_some() && wanted.size != old {
        return Err(Error::Invalid(format!(
            "{}: a block device of {old} bytes cannot be resized here (expected a change of the \
             device itself)",
            storage.name()
        )));
    }
    storage.set_len(wanted.size).await.map_err(failed)?;
    preallocate_raw(storage, old, wanted.size, wanted.preallocation)
        .await
        .map_err(failed)?;
    layer.flush().await
}
