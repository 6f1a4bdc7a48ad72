//! Layers below whose file ends too soon: somebody has cut it off.
//!
//! What is expected is what QEMU makes of the same files: behind the end of a file are zeros, so
//! data there reads as zeros, and a table there maps nothing; only a compressed cluster cannot be
//! made out of zeros.

use std::path::Path;

use rand::SeedableRng;
use rand::rngs::StdRng;
use stratablk::chain::{Span, View};
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::alone;
use crate::disk::{Below, Disk, Opened, Recipe};
use crate::faults::{Bench, bench};
use crate::history::{SECTOR, fill, stamp_of};
use crate::machine::Machine;
use crate::qcow2::Image;
use crate::support::{output, run};

const SECTORS: usize = 1024;
/// Bytes of a cluster of the image in the middle.
const CLUSTER: usize = 64 << 10;

const OVER_QCOW2: Recipe = Recipe {
    below: Below::Qcow2,
    ..Recipe::new("cluster_size=4k", SECTORS)
};

/// What would be caught: a short file that ends a read, or brings to light what was in the buffer.
#[test]
fn a_raw_file_reads_as_zeros() {
    let recipe = Recipe {
        below: Below::Raw,
        ..Recipe::new("cluster_size=4k", SECTORS)
    };
    let mut bench = bench(recipe, true);
    bench.disk.files[1].truncate(700 * SECTOR);
    bench.disk.first[700..].fill(0);
    for round in 0..20 {
        bench.seed = bench.seed.wrapping_add(round);
        bench.run_well();
    }
}

/// What would be caught: requests that fail or read something else than zeros where data are cut
/// off, or something else than the file below where an L2 or the L1 table is; a stream that copies
/// something else than what was read before.
#[test]
fn a_qcow2_file_reads_as_zeros_or_as_what_is_below() {
    // Header, refcount table, block, L1 table, L2 table; data from cluster 5 on.
    let cuts = [
        8 * CLUSTER + 4 * SECTOR,
        6 * CLUSTER + 10 * SECTOR,
        5 * CLUSTER,
        // In the middle of the L2 table, in front of it, and in front of the L1 table.
        4 * CLUSTER + 32,
        4 * CLUSTER,
        3 * CLUSTER,
    ];
    let mut seen = Vec::new();
    for cut in cuts {
        let mut bench = bench(OVER_QCOW2, true);
        shorten(&mut bench, cut);
        bench.disk.first = as_qemu_reads(&bench);
        println!("{cut} bytes of the file are left");
        for round in 0..4 {
            bench.seed = bench.seed.wrapping_add(round);
            bench.run_well();
        }
        stream(&bench);
        seen.push(bench.disk.first);
    }
    seen.dedup();
    assert_eq!(seen.len(), 5, "the cuts have made no difference");
}

/// Cuts off the file of the image in the middle.
fn shorten(bench: &mut Bench, len: usize) {
    let file = &mut bench.disk.files[1];
    assert!(len < file.len(), "{len} bytes of {}", file.len());
    file.truncate(len);
    std::fs::write(bench.dir.path().join("middle.qcow2"), file).unwrap();
}

/// The stamps that QEMU reads.
fn as_qemu_reads(bench: &Bench) -> Vec<u32> {
    let path = |name: &str| bench.dir.path().join(name).display().to_string();
    let (top, raw) = (path("top.qcow2"), path("read.raw"));
    run("qemu-img", &["convert", "-O", "raw", &top, &raw]);
    let bytes = std::fs::read(raw).unwrap();
    bytes
        .chunks(SECTOR)
        .map(|sector| stamp_of(sector).unwrap())
        .collect()
}

/// Copies everything while guests work, and lets go of the layers below.
fn stream(bench: &Bench) {
    let mut rng = StdRng::seed_from_u64(bench.seed);
    let _alone = alone();
    let machine = Machine::new(&bench.disk.files);
    let opened = bench.reactor.block_on(bench.disk.open(&machine, true));
    let opened = opened.unwrap();
    let work = bench.work(&machine, opened.chain);
    work.spawn_stream(&bench.reactor, 2);
    work.spawn_guest(&bench.reactor, 10);
    machine.run(&bench.reactor, &mut rng);
    bench.reactor.block_on(opened.image.close()).unwrap();
    let files = [machine.bytes(0)];
    let after = Machine::new(&files);
    let reopened = bench.reactor.block_on(bench.disk.open(&after, false));
    let reopened = reopened.unwrap();
    assert_eq!(reopened.image.backing(), None);
    bench.compare(&work, &reopened.chain, "after the stream");
    assert_eq!(Image::new(&files[0]).unwrap().check(), Ok(0));
    bench.disk.qemu_check(&files).unwrap();
}

/// What would be caught: a compressed cluster of which a part is missing, and which reads as
/// something all the same; a request elsewhere that fails with it; clusters allocated for a write
/// or a copy that could not read it; a stream over it that succeeds.
#[test]
fn a_compressed_cluster_that_is_cut_off_fails_by_itself() {
    let mut bench = bench(OVER_QCOW2, false);
    compress(&mut bench);
    let len = bench.disk.files[1].len();
    shorten(&mut bench, len - 600);
    let _alone = alone();
    let machine = Machine::new(&bench.disk.files);
    let opened = bench.reactor.block_on(bench.disk.open(&machine, true));
    let Opened { image, chain } = opened.unwrap();
    let view = || View::of(chain.clone());
    let mut buffer = AlignedBuf::zeroed(CLUSTER);
    let mut failed = Vec::new();
    for at in (0..SECTORS * SECTOR).step_by(CLUSTER) {
        // SAFETY: `buffer` outlives the operations.
        let bufs = unsafe { IoBufs::of(&buffer, 0, CLUSTER) };
        let read = bench.reactor.block_on(view().read(at as u64, bufs));
        let by_qemu = read_by_qemu(bench.dir.path(), at);
        assert_eq!(read.is_ok(), by_qemu, "at {at}: {read:?}");
        let (view, all) = (view(), Span::new(0, 3));
        let copied = view.copy(all, at as u64, CLUSTER as u64);
        let copied = bench.reactor.block_on(copied);
        assert_eq!(copied.is_ok(), by_qemu, "at {at}: {copied:?}");
        let start = at / SECTOR;
        let expected = &bench.disk.first[start..start + CLUSTER / SECTOR];
        if let Err(error) = read {
            assert_eq!(error.errno(), libc::EIO, "{error}");
            failed.push(at);
            continue;
        }
        for (sector, &expected) in buffer.chunks(SECTOR).zip(expected) {
            assert_eq!(stamp_of(sector), Some(expected), "at {at}");
        }
    }
    assert_eq!(failed.len(), 1, "clusters that cannot be read: {failed:?}");
    // One sector needs the rest of its cluster of the top image; a whole one needs nothing.
    let at = failed[0] as u64;
    fill(&mut buffer, 0xc000_0000);
    for (at, len, fine) in [(at, SECTOR, false), (at + 4096, 4096, true)] {
        // SAFETY: as above.
        let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
        let written = bench.reactor.block_on(view().write(at, bufs));
        assert_eq!(written.is_ok(), fine, "at {at}: {written:?}");
    }
    bench.reactor.block_on(image.close()).unwrap();
    let files = [machine.bytes(0)];
    assert_eq!(Image::new(&files[0]).unwrap().check(), Ok(0));
    bench.disk.qemu_check(&files).unwrap();
}

/// Makes the image in the middle one of compressed clusters.
fn compress(bench: &mut Bench) {
    let path = |name: &str| bench.dir.path().join(name).display().to_string();
    let (middle, packed) = (path("middle.qcow2"), path("packed.qcow2"));
    let backing = format!("backing_file={},backing_fmt=raw", path("base.raw"));
    let words = ["convert", "-c", "-O", "qcow2", "-o", &backing];
    run("qemu-img", &[&words[..], &[&middle, &packed]].concat());
    std::fs::rename(packed, middle).unwrap();
    let paths = ["top.qcow2", "middle.qcow2", "base.raw"];
    let paths = paths.map(|name| bench.dir.path().join(name));
    bench.disk = Disk::at(paths.into(), bench.disk.recipe);
}

/// Whether QEMU can read a cluster.
fn read_by_qemu(dir: &Path, at: usize) -> bool {
    let read = format!("read {at} {CLUSTER}");
    let top = dir.join("top.qcow2").display().to_string();
    let words = ["-r", "-f", "qcow2", "-c", &read, &top];
    output("qemu-io", &words).status.success()
}
