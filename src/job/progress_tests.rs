//! What jobs tell of the bytes that they have to copy.

use std::time::{Duration, Instant};

use super::testing::*;
use super::*;

fn spec() -> JobSpec {
    JobSpec::stream("j")
}

/// Would catch progress that counts what is only passed over, or zeros, as work; that is not all of
/// it in the end; and one that is told as final while a part of the device is still unknown.
#[test]
fn progress_is_told_in_bytes_to_copy() {
    // 1 GiB, so that it has several windows: 3 MiB of data, 40 MiB of zeros, the rest is there.
    let data = (0..16).chain(5000..5016).chain(16368..16384);
    let disk = Disk::with_zeroes(64 * KIB, 16384, data, 6000..6640);
    let bench = Bench::new();
    disk.set_gate(true);
    let job = bench.start(spec(), &disk);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !job.info().progress.all_seen {
        assert!(Instant::now() < deadline, "{:?}", job.info());
        std::thread::yield_now();
    }
    let progress = job.info().progress;
    assert_eq!((progress.copied, progress.to_copy), (0, 3 * MIB));
    disk.set_gate(false);
    let mut last = 0;
    loop {
        let Progress {
            copied, to_copy, ..
        } = job.info().progress;
        assert!(copied >= last && copied <= to_copy && to_copy == 3 * MIB);
        last = copied;
        if bench.manager.job("j").is_none() {
            break;
        }
    }
    let progress = job.info().progress;
    assert_eq!((progress.copied, progress.to_copy), (3 * MIB, 3 * MIB));
}

/// Would catch a cluster that counts several times, since it is copied in several pieces and moves
/// with the first of them.
#[test]
fn a_large_cluster_is_counted_once() {
    let bench = Bench::new();
    let disk = Disk::with_clusters(2 * MIB, 64, 8..24);
    let job = bench.start(
        JobSpec {
            speed: MIB,
            ..spec()
        },
        &disk,
    );
    let mut told = Vec::new();
    while bench.manager.job("j").is_some() {
        told.push(job.info().progress);
    }
    for progress in told.iter().filter(|progress| progress.all_seen) {
        assert!(
            progress.to_copy == 32 * MIB && progress.copied <= 32 * MIB,
            "{progress:?}"
        );
    }
    assert_eq!(job.info().progress.copied, 32 * MIB);
}

/// Would catch work that is still counted as left although a guest has done it meanwhile, ahead of
/// the copies.
#[test]
fn what_guests_write_is_left_no_longer() {
    let bench = Bench::new();
    let disk = Disk::new(4096, 0..4096);
    disk.set_gate(true);
    let job = bench.start(spec(), &disk);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !job.info().progress.all_seen {
        assert!(Instant::now() < deadline, "{:?}", job.info());
        std::thread::yield_now();
    }
    assert_eq!(job.info().progress.to_copy, 256 * MIB);
    disk.needed.lock().retain(|cluster| *cluster < 2048);
    disk.set_gate(false);
    bench.until("null");
    let progress = job.info().progress;
    assert!(progress.copied == progress.to_copy && progress.copied <= 128 * MIB);
}

/// Would catch a survey that goes on while its job is paused: by then nobody may use the layers.
#[test]
fn a_paused_job_looks_at_nothing() {
    let bench = Bench::new();
    let disk = Disk::new(1 << 20, 0..1 << 20);
    disk.set_gate(true);
    let job = bench.start(spec(), &disk);
    job.pause().unwrap();
    disk.set_gate(false);
    bench.until("paused");
    let looks = *disk.looks.lock();
    let progress = job.info().progress;
    for _ in 0..1000 {
        std::thread::yield_now();
    }
    assert_eq!(*disk.looks.lock(), looks);
    assert_eq!(job.info().progress, progress);
    job.cancel().unwrap();
    bench.until("null");
}
