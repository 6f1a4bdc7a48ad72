//! Recipes: a seed, damage to it, and operations.
//!
//! Whole files that a fuzzer has mutated are mostly refused at once. A recipe names a seed by
//! number and says which of its fields change, where "where" is a table and an index rather than
//! an offset, so that a mutation of the recipe is mostly a meaningful mutation of the image.
//!
//! ```text
//! recipe    = seed:1 flags:1 count:1 damage*count operation*
//! damage    = region:1 index:2 how:1 value:2..8
//! operation = kind:1 offset:2 length:1
//! ```
//!
//! Missing bytes are 0, so every input is a recipe.

use super::image::{Files, cluster_size};
use super::seeds::{self, Seed};
use super::storage::SparseStorage;

/// Takes an input apart.
#[derive(Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    /// The next `N` bytes, with zeros behind the end.
    pub fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = self.0.len().min(N);
        let (now, rest) = self.0.split_at(count);
        bytes[..count].copy_from_slice(now);
        self.0 = rest;
        bytes
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    /// The next two bytes.
    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A part of an image worth damaging: offset and length.
type Region = (u64, u64);

fn be64(storage: &SparseStorage, at: u64) -> u64 {
    let bytes = storage.bytes(at, 8);
    bytes.try_into().map_or(0, u64::from_be_bytes)
}

fn le64(storage: &SparseStorage, at: u64) -> u64 {
    be64(storage, at).swap_bytes()
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The regions of a qcow2 seed.
#[must_use]
pub fn qcow2_regions(seed: &Seed, storage: &SparseStorage) -> Vec<Region> {
    let cluster = cluster_size(&seed.bytes);
    let (l1, refcounts) = (be64(storage, 40), be64(storage, 48));
    let mut regions = vec![
        (0, 112),
        (100, 412),
        (l1, 64),
        (refcounts, 64),
        (be64(storage, refcounts) & OFFSET, cluster),
        (be64(storage, 64), 256),
        (0, seed.bytes.len() as u64),
    ];
    for index in 0..8 {
        let table = be64(storage, l1 + index * 8) & OFFSET;
        if table != 0 {
            // Twice: this is where most is to be found.
            regions.extend([(table, cluster), (table, cluster.min(512))]);
        }
    }
    // The bitmaps extension: in all seeds that have one it says where the directory is.
    let header = storage.bytes(0, 512);
    if let Some(at) = header
        .windows(4)
        .position(|w| w == 0x2385_2875_u32.to_be_bytes())
    {
        regions.push((be64(storage, at as u64 + 24), 128));
    }
    regions
}

/// The regions of a QED seed.
#[must_use]
pub fn qed_regions(seed: &Seed, storage: &SparseStorage) -> Vec<Region> {
    let l1 = le64(storage, 40);
    let table = le64(storage, l1);
    vec![
        (0, 64),
        (0, 64),
        (l1, 64),
        (table, 1024),
        (0, seed.bytes.len() as u64),
    ]
}

/// The seed, the flags and the damaged image that a recipe begins with.
pub fn damaged(input: &mut Input<'_>) -> (&'static Seed, u8, Files) {
    let all = seeds::qcow2();
    let seed = &all[usize::from(input.byte()) % all.len()];
    let flags = input.byte();
    let align = if flags & 2 == 0 { 1 } else { 512 };
    let files = Files::new(seed.bytes.clone(), align);
    let regions = qcow2_regions(seed, &files.image);
    let cluster = cluster_size(&seed.bytes);
    damage(input, &files.image, &regions, cluster, false);
    (seed, flags, files)
}

/// Damages the image as `input` says. Returns how often.
pub fn damage(
    input: &mut Input<'_>,
    storage: &SparseStorage,
    regions: &[Region],
    cluster: u64,
    little: bool,
) -> u8 {
    let count = input.byte() % 16;
    for _ in 0..count {
        let (start, len) = regions[usize::from(input.byte()) % regions.len()];
        let index = u64::from(input.word());
        let how = input.byte();
        let word = start + index * 8 % len.max(8) / 8 * 8;
        let order = |value: u64| {
            if little {
                value.to_le_bytes()
            } else {
                value.to_be_bytes()
            }
        };
        match how % 8 {
            // A byte.
            0 => storage.patch(start + index % len.max(1), &[input.byte()]),
            // A bit.
            1 => {
                let at = start + index % len.max(1);
                let old = storage.bytes(at, 1).first().copied().unwrap_or(0);
                storage.patch(at, &[old ^ 1 << (input.byte() % 8)]);
            }
            // The offset of a cluster, with the flags of an L1 or L2 entry.
            2 | 3 => {
                let flags = u64::from(how >> 6) << 62 | u64::from(how >> 5 & 1);
                let value = (u64::from(input.word()) * cluster) | flags;
                storage.patch(word, &order(value));
            }
            // Anything.
            4 => storage.patch(word, &input.take::<8>()),
            // A word from elsewhere in the region.
            5 => {
                let from = start + u64::from(input.word()) * 8 % len.max(8) / 8 * 8;
                storage.patch(word, &storage.bytes(from, 8));
            }
            // A small number, of 4 bytes or 8.
            6 => storage.patch(word, &order(input.word().into())),
            _ => {
                let value = u32::from(input.word()).to_be_bytes();
                storage.patch(start + index * 4 % len.max(4) / 4 * 4, &value);
            }
        }
    }
    count
}
