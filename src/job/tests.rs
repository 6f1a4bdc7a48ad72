//! Jobs from their making to their end: states, events, verbs, errors, speed.

use std::time::Duration;

use super::handle::HoldsNodes;
use super::source::GuestLoad;
use super::testing::*;
use super::*;
use crate::graph::Busy;

fn spec() -> JobSpec {
    JobSpec::stream("j")
}

/// Would catch states or events missing, doubled, or in another order than QEMU's.
#[test]
fn success_goes_through_all_states() {
    let bench = Bench::new();
    let disk = Disk::new(100, [3, 4, 5, 50, 99]);
    bench.start(spec(), &disk);
    let events = bench.until("null");
    let wanted = [
        "created",
        "running",
        "waiting",
        "pending",
        "BLOCK_JOB_COMPLETED",
        "concluded",
        "null",
    ];
    assert_eq!(events, wanted);
    assert!(disk.needed.lock().is_empty());
    assert!(*disk.finished.lock());
    assert!(bench.manager.list().is_empty());
}

/// Would catch copies of what needs none, and copies that are too large.
#[test]
fn only_what_needs_it_is_copied() {
    let bench = Bench::new();
    let disk = Disk::new(64, 8..40);
    bench.start(spec(), &disk);
    bench.until("null");
    let copied = disk.copied.lock();
    let wanted: Vec<_> = (1..5).map(|i| (i * 512 * KIB, 512 * KIB)).collect();
    assert_eq!(*copied, wanted);
}

/// Would catch copying one piece at a time, and no bound on how many are in flight.
#[test]
fn several_copies_are_in_flight() {
    let bench = Bench::new();
    let disk = Disk::new(800, 0..800);
    disk.set_gate(true);
    bench.start(spec(), &disk);
    while disk.most_in_flight.lock().1 < copier::MAX_IN_FLIGHT {
        std::thread::yield_now();
    }
    disk.set_gate(false);
    bench.until("null");
    assert_eq!(disk.most_in_flight.lock().0, copier::MAX_IN_FLIGHT);
}

/// Would catch a stream that crowds out an active guest, and one that copies in small pieces where
/// nobody gains by it.
#[test]
fn a_stream_takes_less_at_once_while_a_guest_is_active() {
    for (load, piece) in [
        (GuestLoad::Active, copier::MAX_COPY),
        (GuestLoad::CpuContended, copier::CONTENDED_COPY),
    ] {
        let bench = Bench::new();
        let disk = Disk::new(800, 0..800);
        *disk.guest_load.lock() = load;
        bench.start(spec(), &disk);
        bench.until("null");
        assert_eq!(disk.most_in_flight.lock().0, copier::POLITE_IN_FLIGHT);
        let copied = disk.copied.lock();
        assert!(copied.iter().all(|&(_, len)| len == piece), "{load:?}");
        assert_eq!(copied.len() as u64, disk.len / piece, "{load:?}");
    }
}

/// Would catch pieces of a cluster, which would each be copied as the whole of it.
#[test]
fn clusters_stay_whole_while_threads_of_guests_wait() {
    let bench = Bench::new();
    let disk = Disk::with_clusters(256 * KIB, 16, 0..16);
    *disk.guest_load.lock() = GuestLoad::CpuContended;
    bench.start(spec(), &disk);
    bench.until("null");
    let wanted: Vec<_> = (0..16).map(|i| (i * 256 * KIB, 256 * KIB)).collect();
    assert_eq!(*disk.copied.lock(), wanted);
}

/// Would catch a result that is put in force without being asked for, and a job that vanishes
/// before its end was looked at.
#[test]
fn finalize_and_dismiss_wait_to_be_asked() {
    let bench = Bench::new();
    let disk = Disk::new(10, 0..10);
    let job = bench.start(
        JobSpec {
            auto_finalize: false,
            auto_dismiss: false,
            ..spec()
        },
        &disk,
    );
    bench.until("BLOCK_JOB_PENDING");
    assert!(!*disk.finished.lock());
    assert_eq!(job.info().status, Status::Pending);
    assert!(bench.manager.dismiss("j").unwrap().is_err());
    job.finalize().unwrap();
    assert_eq!(
        bench.until("concluded"),
        ["BLOCK_JOB_COMPLETED", "concluded"]
    );
    assert_eq!(
        job.finalize().unwrap_err().0,
        refusal("concluded", "finalize")
    );
    assert!(
        bench.manager.reserve(&["j".to_owned()], "stream").is_err(),
        "listed: still held"
    );
    bench.manager.dismiss("j").unwrap().unwrap();
    assert_eq!(bench.until("null"), ["null"]);
    assert!(bench.manager.dismiss("j").is_none());
    assert!(bench.manager.reserve(&["j".to_owned()], "stream").is_ok());
}

/// Would catch nodes that stay a job's which is over, or that are free too soon: by its kind, and how
/// it has ended.
#[test]
fn nodes_of_a_job_that_is_over() {
    for (holds, completed, cancelled) in [
        (HoldsNodes::Always, true, true),
        (HoldsNodes::Completed, true, false),
        (HoldsNodes::Never, false, false),
    ] {
        for (cancel, held) in [(false, completed), (true, cancelled)] {
            let bench = Bench::new();
            let spec = JobSpec {
                // Not over before it is cancelled.
                auto_finalize: !cancel,
                auto_dismiss: false,
                holds,
                ..spec()
            };
            let job = bench.start(spec, &Disk::new(10, 0..10));
            if cancel {
                bench.until("BLOCK_JOB_PENDING");
                job.cancel().unwrap();
            }
            bench.until("concluded");
            let taken = bench.manager.reserve(&["j".to_owned()], "stream");
            assert_eq!(taken.is_err(), held, "{holds:?}, cancelled: {cancel}");
        }
    }
}

fn refusal(state: &str, verb: &str) -> String {
    format!("Job 'j' in state '{state}' cannot accept command verb '{verb}'")
}

/// Would catch a cancelled job that changes the header, or one whose cancel waits for the quota.
#[test]
fn cancel_wakes_a_sleeping_job_and_keeps_the_chain() {
    let bench = Bench::frozen();
    let disk = Disk::new(100, 0..100);
    let job = bench.start(JobSpec { speed: 1, ..spec() }, &disk);
    job.cancel().unwrap();
    let events = bench.until("null");
    assert_eq!(
        events[2..],
        ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
    );
    assert!(!*disk.finished.lock());
}

/// Would catch a source that is not closed at one of the ways to end, or after its end was told.
#[test]
fn sources_are_closed() {
    for faults in [vec![], vec![(0, libc::EIO)]] {
        let bench = Bench::new();
        let disk = Disk::new(10, 0..10);
        *disk.faults.lock() = faults;
        bench.start(spec(), &disk);
        bench.until("concluded");
        assert_eq!(*disk.closed.lock(), 1);
    }
    let bench = Bench::frozen();
    let disk = Disk::new(10, 0..10);
    let job = bench.start(JobSpec { speed: 1, ..spec() }, &disk);
    job.cancel().unwrap();
    bench.until("concluded");
    assert_eq!(*disk.closed.lock(), 1);
}

/// Would catch a cancel that is forgotten once the job waits for its finalisation.
#[test]
fn cancel_of_a_pending_job() {
    let bench = Bench::new();
    let disk = Disk::new(1, [0]);
    let job = bench.start(
        JobSpec {
            auto_finalize: false,
            ..spec()
        },
        &disk,
    );
    bench.until("BLOCK_JOB_PENDING");
    job.block_cancel(false).unwrap();
    let events = bench.until("null");
    assert_eq!(
        events,
        ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
    );
    assert!(!*disk.finished.lock());
}

/// Would catch verbs that are taken in a state where they make no sense, and wrong texts.
#[test]
fn verbs_are_checked_against_the_state() {
    let bench = Bench::frozen();
    let disk = Disk::new(100, 0..100);
    let job = bench.start(JobSpec { speed: 1, ..spec() }, &disk);
    assert_eq!(
        job.complete().unwrap_err().0,
        refusal("running", "complete")
    );
    assert_eq!(
        job.finalize().unwrap_err().0,
        refusal("running", "finalize")
    );
    let dismissed = bench.manager.dismiss("j").unwrap();
    assert_eq!(dismissed.unwrap_err().0, refusal("running", "dismiss"));
    assert_eq!(
        job.resume().unwrap_err().0,
        "Can't resume a job that was not paused"
    );
    job.pause().unwrap();
    assert_eq!(job.pause().unwrap_err().0, "Job is already paused");
    assert!(job.info().paused);
    bench.until("paused");
    assert_eq!(
        job.set_speed(-1).unwrap_err().0,
        "Parameter 'speed' expects a non-negative value"
    );
    assert_eq!(
        job.block_cancel(false).unwrap_err().0,
        "The block job for device 'j' is currently paused"
    );
    job.resume().unwrap();
    assert_eq!(bench.until("running"), ["running"]);
    job.pause().unwrap();
    bench.until("paused");
    job.set_speed(0).unwrap();
    job.block_cancel(true).unwrap();
    assert_eq!(bench.until("null")[..2], ["running", "aborting"]);
}

/// Would catch a raised limit that is not felt until the old sleep is over.
#[test]
fn a_new_speed_wakes_a_sleeping_job() {
    let bench = Bench::frozen();
    let disk = Disk::new(100, 0..100);
    let job = bench.start(JobSpec { speed: 1, ..spec() }, &disk);
    job.set_speed(0).unwrap();
    bench.until("null");
    assert!(disk.needed.lock().is_empty());
}

/// Would catch a rate that is off, and quota that is taken for ranges that need no copy.
#[test]
fn a_limited_job_takes_the_time_it_should() {
    for speed in [64 * KIB, MIB, 512 * MIB] {
        let bench = Bench::new();
        let disk = Disk::new(4000, (0..4000).filter(|cluster| cluster % 1000 < 200));
        let copied = 800 * 64 * KIB;
        bench.start(JobSpec { speed, ..spec() }, &disk);
        bench.until("null");
        let wanted = copied as f64 / speed as f64;
        let taken = bench.time.now().as_secs_f64();
        assert!(
            (taken / wanted - 1.0).abs() < 0.02,
            "{speed} B/s: {taken} s for {wanted} s"
        );
    }
}

/// Would catch an error that does not end the job, or ends it as if nothing had been copied.
#[test]
fn report_ends_with_the_error() {
    let bench = Bench::new();
    let disk = Disk::new(64, 0..64);
    disk.faults.lock().push((MIB, libc::EIO));
    let job = bench.start(
        JobSpec {
            auto_dismiss: false,
            ..spec()
        },
        &disk,
    );
    let events = bench.until("concluded");
    assert_eq!(
        events[2..],
        [
            "ERROR read report",
            "aborting",
            "BLOCK_JOB_COMPLETED Input/output error",
            "concluded"
        ]
    );
    assert!(!*disk.finished.lock());
    let info = job.info();
    assert_eq!(info.offset, MIB, "what lies before the error was done");
    assert_eq!(info.error.as_deref(), Some("Input/output error"));
}

/// Would catch a chain that is cut although something of it was not copied.
#[test]
fn ignore_goes_on_and_keeps_the_backing_file() {
    let bench = Bench::new();
    let disk = Disk::new(64, 0..64);
    disk.faults
        .lock()
        .extend([(MIB, libc::EIO), (3 * MIB, libc::EIO)]);
    let job = bench.start(
        JobSpec {
            auto_dismiss: false,
            on_error: OnError::Ignore,
            ..spec()
        },
        &disk,
    );
    let events = bench.until("concluded");
    assert_eq!(
        events[2..],
        [
            "ERROR read ignore",
            "ERROR read ignore",
            "aborting",
            "BLOCK_JOB_COMPLETED Input/output error",
            "concluded"
        ]
    );
    let info = job.info();
    assert_eq!((info.offset, info.len), (4 * MIB, 4 * MIB));
    assert!(!*disk.finished.lock());
    assert_eq!(disk.needed.lock().len(), 16, "two pieces were left out");
}

/// Would catch a failed range that is not tried again, and several errors told for one stop.
#[test]
fn stop_pauses_and_tries_again() {
    let bench = Bench::new();
    let disk = Disk::new(64, 0..64);
    disk.faults
        .lock()
        .extend([(MIB, libc::ENOSPC), (2 * MIB, libc::EIO)]);
    disk.set_gate(true);
    let job = bench.start(
        JobSpec {
            on_error: OnError::Stop,
            ..spec()
        },
        &disk,
    );
    // Both ranges are in flight when the first fails.
    while disk.most_in_flight.lock().1 < copier::MAX_IN_FLIGHT {
        std::thread::yield_now();
    }
    disk.set_gate(false);
    assert_eq!(bench.until("paused")[2..], ["ERROR read stop", "paused"]);
    let info = job.info();
    assert_eq!((info.io_status, info.paused), (IoStatus::NoSpace, true));
    assert_eq!(info.offset, MIB);
    job.resume().unwrap();
    assert_eq!(job.info().io_status, IoStatus::Ok);
    bench.until("null");
    assert!(disk.needed.lock().is_empty());
    assert!(*disk.finished.lock());
}

/// Would catch errors that are tried again for ever, untold, when the job is resumed before it has
/// come to rest.
#[test]
fn stop_and_resume_at_once() {
    let bench = Bench::new();
    let disk = Disk::new(64, 0..64);
    disk.faults
        .lock()
        .extend([(0, libc::EIO), (MIB, libc::EIO), (0, libc::EIO)]);
    let job = bench.start(
        JobSpec {
            on_error: OnError::Stop,
            ..spec()
        },
        &disk,
    );
    let told = std::iter::from_fn(|| {
        let seen = bench.until_any(&["ERROR read stop", "null"]);
        while seen == "ERROR read stop" && job.info().paused {
            let _ = job.resume();
        }
        (seen != "null").then_some(())
    });
    assert!(
        told.count() >= 2,
        "the second failure of the range at 0 has to be told, too"
    );
    assert!(disk.needed.lock().is_empty());
}

/// Would catch `enospc` that stops for any error, or for none.
#[test]
fn enospc_stops_only_for_lack_of_space() {
    for (errno, last) in [(libc::ENOSPC, "paused"), (libc::EIO, "aborting")] {
        let bench = Bench::new();
        let disk = Disk::new(64, 0..64);
        disk.faults.lock().push((0, errno));
        bench.start(
            JobSpec {
                on_error: OnError::Enospc,
                ..spec()
            },
            &disk,
        );
        bench.until(last);
        bench.manager.shut_down();
    }
}

/// Would catch success being told when the header could not be written.
#[test]
fn a_failing_end_is_an_error() {
    let bench = Bench::new();
    let disk = Disk::new(1, [0]);
    *disk.finish_error.lock() = Some(libc::EIO);
    bench.start(spec(), &disk);
    let events = bench.until("null");
    assert_eq!(
        events[4..6],
        ["aborting", "BLOCK_JOB_COMPLETED cannot finish"]
    );
}

/// Would catch progress that jumps, goes back, or runs ahead of what has landed.
#[test]
fn progress_is_a_low_water_mark() {
    let bench = Bench::new();
    let disk = Disk::new(1000, 0..1000);
    disk.set_gate(true);
    let job = bench.start(spec(), &disk);
    while disk.most_in_flight.lock().1 < copier::MAX_IN_FLIGHT {
        assert_eq!(job.info().offset, 0);
    }
    disk.set_gate(false);
    let mut last = 0;
    while bench.manager.job("j").is_some() {
        let info = job.info();
        assert!(info.offset >= last && info.offset <= info.len);
        last = info.offset;
    }
}

/// Would catch a job that gets nowhere, or is slower, because its speed is set again and again; and
/// one that keeps to a request which is a burst at the speed that it has by then.
#[test]
fn a_speed_that_is_set_all_the_time_is_the_speed() {
    for speeds in [
        [64 * KIB, 64 * KIB],
        [64 * KIB, 640 * KIB],
        [5 * MIB, 64 * KIB],
    ] {
        let bench = Bench::new();
        let disk = Disk::new(200, 0..200);
        let (manager, mut ticks) = (Arc::downgrade(&bench.manager), 0);
        bench.time.every(Duration::from_millis(10), move |now| {
            let job = manager.upgrade().and_then(|manager| manager.job("j"));
            let Some(job) = job else { return };
            ticks += 1;
            let _ = job.set_speed(speeds[usize::from(ticks % 3 == 0)] as i64);
            if now > Duration::from_secs(600) {
                let _ = job.cancel();
            }
        });
        let speed = speeds[0];
        bench.start(JobSpec { speed, ..spec() }, &disk);
        bench.until("null");
        let mean = (2 * speeds[0] + speeds[1]) as f64 / 3.0;
        let wanted = disk.len as f64 / mean;
        let took = bench.time.now().as_secs_f64();
        assert!(disk.needed.lock().is_empty(), "{speeds:?}: cancelled");
        let off = took / wanted;
        assert!(
            (0.99..1.02).contains(&off),
            "{speeds:?}: {took} s, not {wanted}"
        );
        let largest = disk.copied.lock().iter().map(|(_, len)| *len).max();
        let allowed = (64 * KIB).max(speeds[0].max(speeds[1]) / 10);
        assert!(largest <= Some(allowed), "{speeds:?}: {largest:?} at once");
    }
}

/// Would catch names that are not checked, and two jobs of one name or on one node.
#[test]
fn names_and_nodes_belong_to_one_job() {
    let bench = Bench::frozen();
    for bad in ["", "1", "a b", "-a", "\u{e4}"] {
        assert_eq!(
            bench.manager.claim_id(bad).unwrap_err().0,
            format!("Invalid job ID '{bad}'")
        );
    }
    bench.start(JobSpec { speed: 1, ..spec() }, &Disk::new(100, 0..100));
    assert_eq!(
        bench.manager.claim_id("j").unwrap_err().0,
        "Job ID 'j' already in use"
    );
    let nodes = ["a".to_owned(), "j".to_owned()];
    let busy = bench.manager.reserve(&nodes, "stream").unwrap_err();
    assert_eq!(
        busy,
        Busy {
            index: 1,
            kind: "stream"
        }
    );
    assert!(
        bench.manager.reserve(&nodes[..1], "stream").is_ok(),
        "all or none"
    );
    bench.manager.shut_down();
    assert!(bench.manager.reserve(&nodes, "stream").is_ok());
    assert!(bench.manager.list().is_empty());
}

/// Would catch a job that stays listed as running for ever when its thread died.
#[test]
fn a_dead_thread_concludes_its_job() {
    let bench = Bench::new();
    let lease = bench.manager.reserve(&[], "stream").unwrap();
    let factory: BodyFactory = Box::new(|| panic!("the body cannot be made"));
    bench.manager.start(spec(), lease, factory).unwrap();
    let events = bench.until("null");
    assert_eq!(
        events[3],
        "BLOCK_JOB_COMPLETED The job's thread ended unexpectedly"
    );
}

/// Would catch an end of the daemon that keeps the list of all jobs while it waits for a job's turn:
/// a job that ends has that, and waits for the list.
#[test]
fn a_job_may_end_while_all_are_ended() {
    let bench = Bench::frozen();
    let job = bench.start(
        JobSpec {
            len: 100 * 64 * KIB,
            speed: 1,
            ..JobSpec::stream("j")
        },
        &Disk::new(100, 0..100),
    );
    let turn = job.turn();
    let manager = bench.manager.clone();
    let closing = std::thread::spawn(move || manager.shut_down());
    let manager = bench.manager.clone();
    let (closed, is_closed) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        while !manager.is_closed() {
            std::thread::yield_now();
        }
        let _ = closed.send(());
    });
    let seen = is_closed.recv_timeout(Duration::from_secs(60));
    drop(turn);
    closing.join().unwrap();
    seen.unwrap();
}
