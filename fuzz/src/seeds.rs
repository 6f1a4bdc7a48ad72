//! The seed images: `fuzz/make-seeds` makes them.

use std::io::Read;
use std::sync::{Arc, OnceLock};

/// An image of the corpus.
#[derive(Debug)]
pub struct Seed {
    /// The name of its file.
    pub name: &'static str,
    /// The image.
    pub bytes: Arc<[u8]>,
}

macro_rules! images {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!("../seeds/", $name, ".gz")) as &[u8])),*]
    };
}

fn unpack(images: &[(&'static str, &[u8])]) -> Vec<Seed> {
    images
        .iter()
        .map(|&(name, packed)| {
            let mut bytes = Vec::new();
            let mut reader = flate2::read::GzDecoder::new(packed);
            reader.read_to_end(&mut bytes).expect("a seed is damaged");
            Seed {
                name,
                bytes: bytes.into(),
            }
        })
        .collect()
}

/// The qcow2 images. Recipes name them by number: new ones go to the end.
pub fn qcow2() -> &'static [Seed] {
    static SEEDS: OnceLock<Vec<Seed>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        unpack(&images![
            "v2-4k",
            "v2-64k",
            "v3-512",
            "v3-4k",
            "v3-64k",
            "refcount-1",
            "refcount-8",
            "refcount-64",
            "lazy",
            "zero",
            "zlib-4k",
            "zstd-4k",
            "zlib-64k",
            "zstd-64k",
            "zlib-512",
            "backing-4k",
            "backing-v2",
            "snapshot",
            "bitmaps",
            "extended",
            "extended-backing",
            "extended-zlib",
            "data-file-on",
            "data-file-off",
            "dirty",
            "preallocated",
        ])
    })
}

/// The QED images.
pub fn qed() -> &'static [Seed] {
    static SEEDS: OnceLock<Vec<Seed>> = OnceLock::new();
    SEEDS.get_or_init(|| unpack(&images!["qed-4k", "qed-backing", "qed-dirty"]))
}

/// What lies below images with a backing file, and in data files before they are written: shorter
/// than the disks.
#[must_use]
pub fn below() -> Arc<[u8]> {
    static BELOW: OnceLock<Arc<[u8]>> = OnceLock::new();
    BELOW.get_or_init(|| vec![0x5a; 160 << 10].into()).clone()
}
