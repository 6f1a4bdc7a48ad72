//! The data: every 4 KiB block says where it belongs, so that a back-end which returns the wrong
//! bytes, or drops writes, cannot win.

use crate::common::Res;
use crate::common::rng::mix;
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Bytes in a block.
pub const BLOCK: usize = 4096;

/// The tag of what the images hold at first.
pub const ORIGINAL: u64 = 0;

/// The tag of what the images for compression hold.
const COMPRESSIBLE: u64 = u64::MAX;

/// Bytes that are random in a row, and then bytes of the pattern, in a compressible block.
const RUN: usize = 64;

/// Fills a block as it lies in the images at first: incompressible, each block different.
pub fn fill_original(block: &mut [u8], offset: u64) {
    let mut state = mix(offset + 1);
    for word in block.chunks_exact_mut(8) {
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        word.copy_from_slice(&state.to_le_bytes());
    }
    stamp(block, offset, ORIGINAL);
}

/// Fills a block as it lies in the images for compression: half of it as above, in short runs, half
/// the same pattern over and over, so that it compresses to about half.
pub fn fill_compressible(block: &mut [u8], offset: u64) {
    fill_original(block, offset);
    let pattern: [u8; RUN] = std::array::from_fn(|i| i as u8);
    for run in block.chunks_exact_mut(RUN).skip(1).step_by(2) {
        run.copy_from_slice(&pattern);
    }
    stamp(block, offset, COMPRESSIBLE);
}

/// Fills a block as a load with `tag` writes it. All but the header is the same for every offset,
/// so that the load has next to nothing to do for each write.
pub fn fill_written(block: &mut [u8], offset: u64, tag: u64) {
    fill_original(block, u64::MAX - tag - 1);
    stamp(block, offset, tag);
}

fn stamp(block: &mut [u8], offset: u64, tag: u64) {
    block
        .iter_mut()
        .zip(header(offset, tag))
        .for_each(|(byte, h)| *byte = h);
}

/// The first bytes of a block.
pub fn header(offset: u64, tag: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes
        .iter_mut()
        .zip(offset.to_le_bytes().into_iter().chain(tag.to_le_bytes()))
        .for_each(|(byte, value)| {
            *byte = value;
        });
    bytes
}

/// Checks blocks read from `offset`; with `tag`, that this load wrote them.
pub fn verify(data: &[u8], offset: u64, tag: Option<u64>) -> Res<()> {
    for (i, block) in data.chunks_exact(BLOCK).enumerate() {
        let at = offset + (i * BLOCK) as u64;
        let found = block
            .get(8..16)
            .and_then(|b| b.try_into().ok())
            .map(u64::from_le_bytes);
        let found = found.unwrap_or_default();
        let mut expected = [0; BLOCK];
        match found {
            ORIGINAL => fill_original(&mut expected, at),
            COMPRESSIBLE => fill_compressible(&mut expected, at),
            tag => fill_written(&mut expected, at, tag),
        }
        if block != expected || tag.is_some_and(|tag| tag != found) {
            return Err(format!("wrong data at {at:#x}: {:02x?}…", &block[..16]).into());
        }
    }
    Ok(())
}

/// Writes a raw image of `len` bytes, whole, with blocks from `fill`, and makes it stable, so that no
/// write-back of it lands in a measurement.
pub fn write_image(path: &Path, len: u64, fill: fn(&mut [u8], u64)) -> Res<()> {
    let mut file = File::create(path)?;
    let mut piece = vec![0; 1 << 20];
    for start in (0..len).step_by(piece.len()) {
        for (i, block) in piece.chunks_exact_mut(BLOCK).enumerate() {
            fill(block, start + (i * BLOCK) as u64);
        }
        file.write_all(&piece)?;
    }
    file.sync_all()?;
    Ok(())
}
