//! Opening damaged images and reading all that they have. Caught are panics, overflows, endless
//! loops, too much memory.

use std::sync::Arc;

use stratablk::chain::{Chain, Span};
use stratablk::format::qcow2::{Backing, bitmaps};
use stratablk::format::{Format, Place};

use super::image::{Files, How, WHOLE, reactor, read};
use super::recipe::{self, Input};
use super::seeds;

/// Extents of a disk that are looked at.
const EXTENTS: usize = 2048;

/// Follows the mapping and reads what it says: the beginning of each extent, and whole small
/// disks. Errors are right answers.
pub async fn walk(chain: &Arc<Chain>) {
    let (top, size) = (&chain.top().format, chain.size());
    let mut at = 0;
    for _ in 0..EXTENTS {
        if at >= size {
            break;
        }
        let mut extent = top.map(at, size - at);
        if extent.place == Place::Unknown {
            if top.load(at).await.is_err() {
                // What follows may be in order.
                at += top.cluster_size().max(1 << 20);
                continue;
            }
            extent = top.map(at, size - at);
        }
        assert!(extent.len > 0 && extent.len <= size - at, "{extent:?}");
        assert_ne!(extent.place, Place::Unknown, "loaded");
        if extent.place != Place::Below {
            let _ = read(chain, at, extent.len.min(512) as usize).await;
        }
        let _ = chain
            .status(Span::new(0, chain.layers().len()), at, extent.len)
            .await;
        at += extent.len;
    }
    if size <= WHOLE {
        let _ = read(chain, 0, size as usize).await;
    } else {
        let _ = read(chain, size - 4096, 4096).await;
    }
}

/// Opens an image for reading and looks at everything.
pub fn look(files: &Files, how: How) {
    reactor().block_on(async {
        let Ok((image, chain)) = files.open(how).await else {
            return;
        };
        let header = image.header();
        let _ = bitmaps::list(&*files.image, &header).await;
        for name in [None, Some("another.raw")] {
            let backing = name.map(|name| Backing {
                name: name.into(),
                format: Some("raw".into()),
            });
            if let Ok(patches) = header.plan_backing(backing.as_ref()) {
                let _ = header.patched(&patches);
            }
        }
        walk(&chain).await;
    });
}

/// The target: a recipe whose operations are ignored.
pub fn qcow2_read(data: &[u8]) {
    let mut input = Input(data);
    let (_, flags, files) = recipe::damaged(&mut input);
    let how = How {
        small_cache: flags & 8 != 0,
        ..How::default()
    };
    look(&files, how);
}

/// The target: a QED image. The first byte's highest bit tells a recipe from a whole file.
pub fn qed(data: &[u8]) {
    let mut input = Input(data);
    let number = input.byte();
    let files = if number & 0x80 != 0 {
        Files::new(input.0.into(), 1)
    } else {
        let all = seeds::qed();
        let seed = &all[usize::from(number) % all.len()];
        let files = Files::new(seed.bytes.clone(), 1);
        let regions = recipe::qed_regions(seed, &files.image);
        recipe::damage(&mut input, &files.image, &regions, 4096, true);
        files
    };
    reactor().block_on(async {
        let Ok(image) = stratablk::format::Qed::open(files.image.clone()).await else {
            return;
        };
        let below = image.backing().is_some().then(|| files.backing_layer());
        let top = stratablk::chain::Layer {
            name: "top".into(),
            format: Format::Qed(Arc::new(image)),
            storage: files.image.clone(),
            read_only: true,
            discard: false,
            copy_on_read: false,
        };
        let layers = [Arc::new(top)].into_iter().chain(below).collect();
        walk(&Arc::new(Chain::new(layers).unwrap())).await;
    });
}
