//! Compressed clusters under many requests at once, of which several want the same cluster: one of
//! them decompresses it for all.
//!
//! What would be caught: data of another cluster, a request that is never answered, a damaged
//! cluster that takes others with it.

mod common;

use common::Res;
use common::daemon::{Program, Setup};
use common::frontend::{IOERR, OK, Op};
use common::images;
use common::rng::Rng;
use common::stamp::SECTOR;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const DISK: usize = 8 << 20;
const CLUSTER: usize = 65536;
/// Bytes of a request.
const LEN: usize = 4096;
const DEPTH: usize = 64;
const REQUESTS: u64 = 3000;

/// Half of each sector can be compressed.
fn contents() -> Vec<u8> {
    let mut rng = Rng::new(7);
    let mut bytes = vec![0; DISK];
    for (number, sector) in bytes.chunks_mut(SECTOR).enumerate() {
        let (random, same) = sector.split_at_mut(SECTOR / 2);
        for word in random.chunks_mut(8) {
            word.copy_from_slice(&rng.next().to_le_bytes());
        }
        same.fill(number as u8);
    }
    bytes
}

/// An image with these contents, all of it compressed.
fn image(dir: &Path, contents: &[u8], kind: &str) -> Res<PathBuf> {
    let (raw, image) = (dir.join("disk.raw"), dir.join("disk.qcow2"));
    fs::write(&raw, contents)?;
    let option = format!("compression_type={kind}");
    let words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &option];
    images::qemu_img(&[&words[..], &[images::text(&raw)?, images::text(&image)?]].concat())?;
    Ok(image)
}

/// Reads at random, `DEPTH` at a time, and compares. The clusters that were not read, or wrongly.
fn read_all(dir: &Path, image: &Path, contents: &[u8]) -> Res<BTreeSet<usize>> {
    let mut setup = Setup::new(dir, &[(image.to_path_buf(), "qcow2")]);
    setup.qmp = None;
    let mut daemon = setup.start(&Program::under_test(), dir, None)?;
    let mut frontend = daemon.connect(&setup.socket, 1, 256, DEPTH * LEN)?;
    let queue = frontend.queues.first_mut().ok_or("no queue")?;
    let mut rng = Rng::new(1);
    let mut places = [0; DEPTH];
    let mut free: Vec<usize> = (0..DEPTH).collect();
    let (mut sent, mut answered, mut failed) = (0, 0, BTreeSet::new());
    while answered < REQUESTS {
        while sent < REQUESTS
            && let Some(slot) = free.pop()
        {
            // Every other request goes where one before it went, or near.
            if sent % 2 == 0 {
                places[slot] = rng.below((DISK / LEN) as u64) as usize * LEN;
            } else {
                let near = places[(slot + 1) % DEPTH] / CLUSTER * CLUSTER;
                places[slot] = near + rng.below((CLUSTER / LEN) as u64) as usize * LEN;
            }
            let op_data = [(slot * LEN, LEN)];
            let op = Op::read((places[slot] / SECTOR) as u64, &op_data);
            queue.submit(&op, slot as u64)?;
            sent += 1;
        }
        queue.kick()?;
        if queue.arm() {
            queue.wait()?;
        }
        queue.disarm()?;
        while let Some(done) = queue.pop()? {
            let slot = done.token as usize;
            let place = places[slot];
            let mut bytes = vec![0; LEN];
            frontend.memory.read(slot * LEN, &mut bytes);
            // Damage that still can be decompressed shows in the data: there is no checksum.
            match done.status {
                OK if bytes == contents[place..place + LEN] => {}
                OK | IOERR => {
                    failed.insert(place / CLUSTER);
                }
                status => return Err(format!("status {status} at {place:#x}").into()),
            }
            free.push(slot);
            answered += 1;
        }
    }
    Ok(failed)
}

#[test]
fn clusters_are_read_side_by_side() -> Res<()> {
    let contents = contents();
    for kind in ["zlib", "zstd"] {
        let dir = tempfile::tempdir()?;
        let image = image(dir.path(), &contents, kind)?;
        let failed = read_all(dir.path(), &image, &contents)?;
        assert!(failed.is_empty(), "{kind}: clusters {failed:?} are wrong");
    }
    Ok(())
}

#[test]
fn a_damaged_cluster_fails_alone() -> Res<()> {
    let contents = contents();
    for kind in ["zlib", "zstd"] {
        let dir = tempfile::tempdir()?;
        let image = image(dir.path(), &contents, kind)?;
        let file = File::options().write(true).open(&image)?;
        // Within compressed data: the tables are at the file's ends.
        file.write_all_at(&[0xff; 20000], fs::metadata(&image)?.len() / 2)?;
        let failed = read_all(dir.path(), &image, &contents)?;
        assert!((1..=3).contains(&failed.len()), "{kind}: {failed:?}");
    }
    Ok(())
}
