//! Changing the size of an image that no guest uses.
//!
//! A cut at any instant leaves an image of the old size or of the new one, and what both have
//! reads the same. What is new reads as zeros, even where the layers below are longer.

use std::rc::Rc;
use std::sync::Arc;

use super::{Chain, Graph, Layer, View, with_room};
use crate::error::{Action, Error, Result};
use crate::format::qcow2::bitmaps::{InForce, check_resize};
use crate::format::qcow2::{self, Preallocation};
use crate::format::{Format, Qcow2};
use crate::storage::{self, Storage};

/// How to change a size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resize {
    /// The new size in bytes; that of a qcow2 image is rounded up to whole sectors.
    pub size: u64,
    /// It may become smaller, and lose what is above the new end.
    pub shrink: bool,
    /// What is allocated ahead of the new part.
    pub preallocation: Preallocation,
}

impl Graph {
    /// Changes the size of node `name`'s image, which is made writable for that. The node itself
    /// has its old size until it is opened anew. Returns the new size in bytes.
    ///
    /// # Errors
    /// When the format or the image forbids it (the image has not been changed then), or the
    /// image cannot be read or written.
    pub async fn resize(&self, name: &str, wanted: Resize) -> Result<u64> {
        let layer = self.node(name)?.layer;
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
        self.make_writable(name).await?;
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
    let old = storage.len().map_err(failed)?;
    if storage.capacity().map_err(failed)?.is_some() && wanted.size != old {
        return Err(Error::Invalid(format!(
            "{}: a block device of {old} bytes cannot be resized here (expected a change of the \
             device itself)",
            storage.name()
        )));
    }
    storage.set_len(wanted.size).map_err(failed)?;
    preallocate_raw(storage, old, wanted.size, wanted.preallocation)
        .await
        .map_err(failed)?;
    layer.flush().await
}

/// Gives `[from, to)` of a file that was made as long as that its space.
///
/// # Errors
/// What the storage reports.
pub async fn preallocate_raw(
    storage: &dyn Storage,
    from: u64,
    to: u64,
    mode: Preallocation,
) -> std::io::Result<()> {
    let len = to.saturating_sub(from);
    match mode {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => storage::io::zero(storage, from, len, false).await,
        Preallocation::Full => qcow2::write_zeros(storage, from, len).await,
    }
}

/// Makes the qcow2 image on top of `chain`, which is open for writing, larger. Bitmaps that were
/// `in_force` before it was opened so are in force again.
///
/// # Errors
/// When it cannot be read or written; it has its old size then.
pub async fn grow(chain: &Chain, wanted: Resize, in_force: &InForce) -> Result<()> {
    let size = wanted.size;
    let top = chain.top();
    let Format::Qcow2(image) = &top.format else {
        return Err(Error::Invalid("only qcow2 images grow like this".into()));
    };
    let old = chain.size();
    image.reserve_mapping(size).await?;
    image.close().await?;
    let data = data_file(image);
    if let Some(data) = &data {
        data.set_len(size)
            .map_err(|error| Error::io(Action::Write, data.name(), size, &error))?;
    }
    let options = qcow2::Options {
        writable: true,
        discard: true,
        size: Some(size),
        ..qcow2::Options::default()
    };
    let wide = Arc::new(Qcow2::open_with_data(image.storage().clone(), data, options).await?);
    let layer = Arc::new(Layer {
        format: Format::Qcow2(wide.clone()),
        discard: true,
        ..(**top).clone()
    });
    let below = chain.layers().iter().skip(1).cloned();
    let layers: Vec<_> = std::iter::once(layer).chain(below).collect();
    let grown = async {
        // Who set the size by hand may have left mappings there.
        wide.unmap_above(old).await?;
        clear_new(Chain::new(layers)?, old).await?;
        wide.preallocate(old, size, wanted.preallocation).await?;
        wide.set_size(size, in_force).await
    }
    .await;
    if grown.is_err()
        && let Err(error) = wide.unmap_above(old).await
    {
        let file = wide.storage().name();
        log::warn!("{file}: freeing what was allocated in vain: {error}");
    }
    // Also frees what was allocated in vain.
    grown.and(wide.close().await)
}

/// Makes what is above `old` read as zeros: the rest of the last cluster may hold something, and
/// the layers below may be longer.
async fn clear_new(chain: Chain, old: u64) -> Result<()> {
    let size = chain.size();
    let longer = chain
        .layers()
        .get(1)
        .is_some_and(|layer| layer.format.size() > old);
    let end = if longer {
        size
    } else {
        old.next_multiple_of(chain.cluster_size()).min(size)
    };
    if end > old {
        let chain = Arc::new(chain);
        let zero = |view: Rc<View>| view.write_zeroes(old, end - old, true);
        with_room(View::of(chain.clone()), || chain.clone(), zero).await?;
    }
    Ok(())
}

/// Makes the qcow2 image on top of `chain`, which is open for writing, smaller. Bitmaps that were
/// `in_force` before it was opened so are in force again.
///
/// # Errors
/// When it cannot be read or written. Its header has the old size or the new one then; what is
/// above the new end may be lost already.
pub async fn shrink(chain: &Chain, size: u64, in_force: &InForce) -> Result<()> {
    let Format::Qcow2(image) = &chain.top().format else {
        return Err(Error::Invalid("only qcow2 images shrink like this".into()));
    };
    image.unmap_above(size).await?;
    image.set_size(size, in_force).await?;
    image.close().await?;
    image.trim_file().await?;
    if let Some(data) = data_file(image) {
        data.set_len(size)
            .map_err(|error| Error::io(Action::Write, data.name(), size, &error))?;
    }
    Ok(())
}

fn data_file(image: &Qcow2) -> Option<Arc<dyn Storage>> {
    image
        .header()
        .has_data_file()
        .then(|| image.data_storage().clone())
}
