//! Decompression of clusters.
//!
//! The thread that asks does it itself. Other threads beside it were tried: the caches and the
//! memory that go from one processor to another, and the sleeps, cost half as much again, and the
//! slowest requests took three times as long. What others wait for is bounded by how few tasks the
//! executor runs before it looks at the ring again.

use std::cell::RefCell;

use zstd::zstd_safe::WriteBuf;

use super::header::Compression;

thread_local! {
    /// Making one takes as long as decompressing a cluster or two.
    static ZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// The cluster of `len` bytes that `bytes` begin with; what follows is somebody else's.
///
/// # Errors
/// When they are no such cluster: what is wrong with them.
pub(super) fn inflate(
    compression: Compression,
    bytes: &[u8],
    len: usize,
) -> Result<Vec<u8>, String> {
    let mut cluster = Vec::with_capacity(len);
    match compression {
        Compression::Zlib => inflate_zlib(bytes, &mut cluster)?,
        Compression::Zstd => inflate_zstd(bytes, &mut cluster, len)?,
    }
    // Room may be more than was asked for.
    cluster.truncate(len);
    if cluster.len() == len {
        return Ok(cluster);
    }
    Err(format!(
        "{} bytes after decompression (expected {len})",
        cluster.len()
    ))
}

fn inflate_zlib(bytes: &[u8], cluster: &mut Vec<u8>) -> Result<(), String> {
    flate2::Decompress::new(false)
        .decompress_vec(bytes, cluster, flate2::FlushDecompress::Finish)
        .map(drop)
        .map_err(|error| error.to_string())
}

fn inflate_zstd(bytes: &[u8], cluster: &mut Vec<u8>, len: usize) -> Result<(), String> {
    let (frame, mut rest) = first_frame(bytes)?;
    let mut done = decode(frame, cluster)?;
    if done >= len {
        return Ok(());
    }
    // Seldom: more frames, or one that has nothing to say.
    cluster.resize(len, 0);
    while done < len {
        let (frame, behind) = first_frame(rest)?;
        done += decode(frame, cluster.get_mut(done..).unwrap_or_default())?;
        rest = behind;
    }
    Ok(())
}

/// The frame that `bytes` begin with, and what is behind it.
fn first_frame(bytes: &[u8]) -> Result<(&[u8], &[u8]), String> {
    let size = zstd::zstd_safe::find_frame_compressed_size(bytes)
        .map_err(|code| zstd::zstd_safe::get_error_name(code).to_owned())?;
    bytes
        .split_at_checked(size)
        .filter(|(frame, _)| !frame.is_empty())
        .ok_or_else(|| "a frame without an end".to_owned())
}

/// How many bytes were in `frame`, which are at the start of `room` now.
fn decode<R: WriteBuf + ?Sized>(frame: &[u8], room: &mut R) -> Result<usize, String> {
    let decoded = ZSTD.with_borrow_mut(|state| {
        let state = match state {
            Some(state) => state,
            None => state.insert(zstd::bulk::Decompressor::new()?),
        };
        state.decompress_to_buffer(frame, room)
    });
    decoded.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    //! What would be caught: a cluster in several frames, one with something behind it, one that
    //! is cut off or too short, and a state that keeps something of an error.

    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use super::*;

    const LEN: usize = 65536;

    fn cluster() -> Vec<u8> {
        (0..LEN).map(|i| (i / 7 * 13) as u8).collect()
    }

    fn frame(bytes: &[u8]) -> Vec<u8> {
        zstd::bulk::compress(bytes, 0).unwrap()
    }

    fn zstd(bytes: &[u8]) -> Result<Vec<u8>, String> {
        inflate(Compression::Zstd, bytes, LEN)
    }

    #[test]
    fn what_follows_a_cluster_does_not_matter() {
        let cluster = cluster();
        let mut packed = frame(&cluster);
        packed.extend([0xa5; 512]);
        assert_eq!(zstd(&packed).unwrap(), cluster);
    }

    #[test]
    fn a_cluster_may_be_several_frames() {
        let cluster = cluster();
        let mut packed = frame(&cluster[..1000]);
        packed.extend(frame(&cluster[1000..]));
        packed.extend([0xa5; 512]);
        assert_eq!(zstd(&packed).unwrap(), cluster);
    }

    #[test]
    fn a_frame_may_have_nothing_for_the_disk() {
        let cluster = cluster();
        let skipped = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
        let between = [&frame(&cluster[..9]), &skipped[..], &frame(&cluster[9..])];
        for packed in [[&skipped[..], &frame(&cluster)].concat(), between.concat()] {
            assert_eq!(zstd(&packed).unwrap(), cluster);
        }
    }

    #[test]
    fn a_frame_without_a_content_size_is_read() {
        use std::io::Write;

        let cluster = cluster();
        let mut encoder = zstd::stream::Encoder::new(Vec::new(), 0).unwrap();
        encoder.write_all(&cluster).unwrap();
        assert_eq!(zstd(&encoder.finish().unwrap()).unwrap(), cluster);
    }

    #[test]
    fn damage_is_told_and_leaves_nothing() {
        let cluster = cluster();
        let packed = frame(&cluster);
        let error = zstd(&packed[..packed.len() - 9]).unwrap_err();
        assert!(!error.is_empty());
        assert!(zstd(&[0; 4096]).is_err());
        let mut damaged = packed.clone();
        damaged[20..40].fill(0xff);
        let _ = zstd(&damaged);
        let short = zstd(&frame(&cluster[..LEN - 1])).unwrap_err();
        assert!(!short.is_empty());
        assert!(zstd(&frame(&[&cluster[..], &[1]].concat())).is_err());
        assert_eq!(zstd(&packed).unwrap(), cluster);
    }
}
