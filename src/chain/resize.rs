//! Changing the size of an image on top of a chain.
//!
//! A cut at any instant leaves an image of the old size or of the new one, and what both have
//! reads the same. What is new reads as zeros, even where the layers below are longer.
//!
//! [`grow`] and [`shrink`] are for an image that no guest uses. While guests use it, a disk changes
//! its size as it changes its layers: by another chain. To grow, [`begin_growing`] lets the mapping
//! reach further than the disk; no request goes there until [`finish_growing`] has made that stable
//! and a chain of the new size has been published. To shrink, a chain of the new size is published,
//! requests of older ones end, and then [`shrink_in_use`] lets go of what is above.

use std::rc::Rc;
use std::sync::Arc;

use super::{Chain, Layer, View, with_room};
use crate::error::{Action, Error, Result};
use crate::format::qcow2::bitmaps::InForce;
use crate::format::qcow2::{self, Preallocation};
use crate::format::{Format, Qcow2};
use crate::storage::{self, Purpose, Storage};

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
        Preallocation::Falloc => {
            storage::io::zero(Purpose::Space.on(storage), from, len, false).await
        }
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
            .await
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
    let below = chain.layers().get(1).map_or(0, |layer| layer.format.size());
    let has_flag = matches!(&chain.top().format, Format::Qcow2(top) if top.has_zero_clusters());
    let end = match below > old && has_flag {
        true => chain.size(),
        // Without a flag for zeros there is nothing to record behind the end of what lies below.
        false => old.max(below).next_multiple_of(chain.cluster_size()),
    };
    let end = end.min(chain.size());
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
            .await
            .map_err(|error| Error::io(Action::Write, data.name(), size, &error))?;
    }
    Ok(())
}

/// Makes the L1 table of the image on top long enough for a disk of `size` bytes, and lets the
/// mapping reach there. The disk has its old size.
///
/// # Errors
/// When the format has no room for that, or metadata cannot be read or written; nothing has changed.
pub async fn begin_growing(image: &Qcow2, size: u64) -> Result<()> {
    image.reserve_mapping(size).await?;
    image.stretch(size);
    Ok(())
}

/// Makes what is above the `old` size of the image on top of `chain` read as zeros, and the header
/// name the new `size`, where [`begin_growing`] has let the mapping reach. Chains that are composed
/// from then on have it. No request is on its way that takes the old end for that of the mapping.
///
/// # Errors
/// When something cannot be read or written. All is as before [`begin_growing`] then, but that the
/// L1 table is longer.
pub async fn finish_growing(chain: &Chain, image: &Qcow2, (old, size): (u64, u64)) -> Result<()> {
    let data = data_file(image);
    let data_len = match &data {
        Some(data) => Some(data.len().await.map_err(|error| failed(&**data, &error))?),
        None => None,
    };
    let grown = async {
        if let (Some(data), Some(len)) = (&data, data_len) {
            // What it has behind the old end is left from a larger size: the new part reads as zeros.
            if len > old {
                let cut = data.set_len(old).await;
                cut.map_err(|error| failed(&**data, &error))?;
            }
            let set = data.set_len(size).await;
            set.map_err(|error| failed(&**data, &error))?;
        }
        // Who set the size by hand may have left mappings there, or who shrank it and was killed.
        image.unmap_above(old).await?;
        clear_new(Chain::new(chain.layers().to_vec())?.whole(), old).await?;
        // Bitmaps are out of date, since the image is open for writing.
        image.set_size(size, &InForce::new()).await
    };
    let grown = grown.await;
    if grown.is_ok() {
        image.show(size);
        return Ok(());
    }
    // With a flush, behind which the disk has the old header.
    let back = async {
        image.unmap_above(old).await?;
        if let (Some(data), Some(len)) = (&data, data_len) {
            let set = data.set_len(len).await;
            set.map_err(|error| failed(&**data, &error))?;
        }
        Ok::<_, Error>(())
    };
    if let Err(error) = back.await {
        let file = image.storage().name();
        log::warn!("{file}: freeing what was allocated in vain: {error}");
    }
    image.settle_size();
    grown
}

/// Makes the header of an image name the smaller `size` that all chains of its disk have by now, and
/// lets go of what is above.
///
/// # Errors
/// When the header cannot be written: it has its old size then, and nothing is lost.
pub async fn shrink_in_use(image: &Qcow2, size: u64) -> Result<()> {
    image.set_size(size, &InForce::new()).await?;
    image.show(size);
    // What stays above it is in nobody's way, and is looked at when it grows again.
    let cut = async {
        image.unmap_above(size).await?;
        match data_file(image) {
            Some(data) => {
                let cut = data.set_len(size).await;
                cut.map_err(|error| failed(&*data, &error))
            }
            None => Ok(()),
        }
    };
    if let Err(error) = cut.await {
        let file = image.storage().name();
        log::warn!("{file}: what is above the new end keeps its space: {error}");
    }
    image.settle_size();
    Ok(())
}

fn failed(storage: &dyn Storage, error: &std::io::Error) -> Error {
    Error::io(Action::Write, storage.name(), 0, error)
}

fn data_file(image: &Qcow2) -> Option<Arc<dyn Storage>> {
    image
        .header()
        .has_data_file()
        .then(|| image.data_storage().clone())
}
