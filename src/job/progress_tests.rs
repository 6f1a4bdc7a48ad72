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

/// Would catch what is to be copied growing after it was told to be all: when the survey comes to a
/// window where copies have landed already, when copies cross windows, or begin within a cluster.
#[test]
fn what_is_final_grows_no_longer() {
    let mut told_final = 0;
    let every_other = |clusters: u64| (0..clusters).step_by(2).collect::<Vec<_>>();
    for (cluster, clusters, needed) in [
        (64 * KIB, 1024, every_other(1024)),
        (64 * KIB, 4096, every_other(4096)),
        (64 * KIB, 2048, (3..2048).collect()),
        (2 * MIB, 128, every_other(128)),
        (2 * MIB, 32, (0..32).collect()),
    ] {
        for speed in [0, 512 * MIB, 16 * MIB, MIB] {
            let bench = Bench::new();
            let all = needed.len() as u64 * cluster;
            let disk = Disk::with_clusters(cluster, clusters, needed.iter().copied());
            *disk.watched.lock() = Some(bench.manager.clone());
            let job = bench.start(JobSpec { speed, ..spec() }, &disk);
            bench.until("null");
            let told = disk.told.lock();
            let mut last = u64::MAX;
            for progress in told.iter().filter(|progress| progress.all_seen) {
                let Progress {
                    copied, to_copy, ..
                } = *progress;
                assert!(
                    copied <= to_copy && to_copy <= last && to_copy == all,
                    "{cluster} {clusters} {speed}: {progress:?}, {last} before"
                );
                last = to_copy;
            }
            told_final += told.iter().filter(|progress| progress.all_seen).count();
            assert_eq!(job.info().progress.copied, all);
            *disk.watched.lock() = None;
        }
    }
    // Where copies are faster than the survey, it is final at the end alone.
    assert!(told_final > 1000, "{told_final}");
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
