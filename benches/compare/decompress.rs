//! The decompressor alone: what the crates that the daemon uses take to decompress the clusters of
//! an image, with no I/O, no queue and no front-end around them.

use crate::Options;
use crate::blocks;
use crate::common::rng::Rng;
use crate::common::{Res, daemon};
use crate::disks::Compression;
use crate::load::{Order, Shape};
use crate::samples::Floor;
use std::cell::RefCell;
use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::thread;
use std::time::Instant;

/// Bytes in a cluster of the images.
const CLUSTER: usize = 65536;

/// Measures it on the CPU of the back-ends, in the order of `shape`: a request takes one cluster, or
/// as many as are in it.
pub fn measure(
    options: &Options,
    path: &Path,
    compression: Compression,
    shape: Shape,
) -> Res<Floor> {
    let image = fs::read(path)?;
    let clusters = clusters(&image).ok_or("not all clusters of the image are compressed")?;
    let mut cluster = Vec::with_capacity(CLUSTER);
    for (i, bytes) in clusters.iter().enumerate().take(256) {
        inflate(compression, bytes, &mut cluster)?;
        blocks::verify(&cluster, (i * CLUSTER) as u64, None)?;
    }
    thread::scope(|scope| {
        let run = || {
            daemon::pin_this_thread(options.cpu_backend)?;
            run(options, &clusters, compression, shape)
        };
        // An error of the bench cannot cross threads, its text can.
        let thread = scope.spawn(move || run().map_err(|error| error.to_string()));
        let floor = thread.join().map_err(|_| "the decompressor panicked")?;
        Ok(floor?)
    })
}

fn run(
    options: &Options,
    clusters: &[&[u8]],
    compression: Compression,
    shape: Shape,
) -> Res<Floor> {
    let mut rng = Rng::new(1);
    let mut cluster = Vec::with_capacity(CLUSTER);
    let (mut requests, mut next) = (0u64, 0);
    // The other threads of the bench wait meanwhile.
    let pid = std::process::id();
    let cpu = daemon::cpu_time_of(pid)?;
    let begin = Instant::now();
    // Without I/O it hardly varies: half the time of a back-end is enough.
    while begin.elapsed() < options.measured() / 2 {
        if shape.order == Order::Random {
            next = rng.below(clusters.len() as u64) as usize;
        }
        for _ in 0..shape.len.div_ceil(CLUSTER) {
            let bytes = clusters.get(next).ok_or("the image has no clusters")?;
            inflate(compression, bytes, &mut cluster)?;
            black_box(&mut cluster);
            next = (next + 1) % clusters.len();
        }
        requests += 1;
    }
    let seconds = begin.elapsed().as_secs_f64();
    let cpu = daemon::cpu_time_of(pid)?.saturating_sub(cpu);
    Ok(Floor {
        iops: requests as f64 / seconds,
        cpu: cpu.as_secs_f64() * 1e6 / requests.max(1) as f64,
    })
}

/// Decompresses one whole cluster, by the calls that the daemon makes.
fn inflate(compression: Compression, bytes: &[u8], cluster: &mut Vec<u8>) -> Res<()> {
    thread_local! {
        static ZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> =
            const { RefCell::new(None) };
    }
    cluster.clear();
    cluster.reserve_exact(CLUSTER);
    match compression {
        Compression::Zlib => {
            let mut state = flate2::Decompress::new(false);
            state.decompress_vec(bytes, cluster, flate2::FlushDecompress::Finish)?;
        }
        Compression::Zstd => {
            let len = zstd::zstd_safe::find_frame_compressed_size(bytes)
                .map_err(zstd::zstd_safe::get_error_name)?;
            ZSTD.with_borrow_mut(|state| {
                let state = match state {
                    Some(state) => state,
                    None => state.insert(zstd::bulk::Decompressor::new()?),
                };
                state.decompress_to_buffer(&bytes[..len], cluster)
            })?;
        }
    }
    if cluster.len() != CLUSTER {
        return Err(format!("a cluster of {} bytes", cluster.len()).into());
    }
    Ok(())
}

/// The compressed clusters of a qcow2 image as `qemu-img` makes it, in the order of the disk. `None`
/// if any is not compressed: then this would not be what a back-end has to do.
fn clusters(image: &[u8]) -> Option<Vec<&[u8]>> {
    let size = word(image, 24)?;
    let l1_table = word(image, 40)? as usize;
    let cluster = |number: usize| {
        // An L2 table is a cluster of 8-byte entries.
        let (table, index) = (number / (CLUSTER / 8), number % (CLUSTER / 8));
        let l2_table = word(image, l1_table + table * 8)? as usize & 0x00ff_ffff_ffff_fe00;
        let entry = word(image, l2_table + index * 8)?;
        // The place takes 62 - (16 - 8) bits, the further sectors those up to the two flags.
        let begin = (entry & ((1 << 54) - 1)) as usize;
        let sectors = (entry >> 54 & 0xff) as usize;
        let end = (begin / 512 + 1 + sectors) * 512;
        // The file may end before the last sector does.
        let bytes = image.get(begin..end.min(image.len()))?;
        (entry >> 62 == 1).then_some(bytes)
    };
    (0..size as usize / CLUSTER).map(cluster).collect()
}

/// A number of the image.
fn word(image: &[u8], at: usize) -> Option<u64> {
    let bytes = image.get(at..at + 8)?;
    bytes.try_into().ok().map(u64::from_be_bytes)
}
