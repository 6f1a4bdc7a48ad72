//! What would be caught: a change that takes effect without being recorded, or is recorded and does
//! not take effect; a command that fails and leaves a trace; a job that goes on otherwise than it
//! was, copies anew what is there, or tells its end twice or to nobody; copies that are not stable
//! for longer than promised.

use std::sync::Arc;
use std::time::Duration;

use super::testing::*;
use super::*;
use crate::state::Store;
use crate::state::record::{self, State, Work};
use crate::state::testing::Steps;

fn work() -> Option<Work> {
    Some(Work::Stream(record::Stream {
        target: record::Node {
            name: None,
            format: "qcow2".to_owned(),
            file: "/top".to_owned(),
        },
        identity: [1, 2],
        base: None,
        backing_file: None,
        compress: false,
    }))
}

/// A job that copies a cluster and then waits for its speed limit, for ever.
fn slow() -> JobSpec {
    JobSpec {
        len: 100 * 64 * KIB,
        speed: 1,
        work: work(),
        auto_finalize: false,
        auto_dismiss: false,
        ..JobSpec::stream("j")
    }
}

/// The same, which does not wait.
fn quick() -> JobSpec {
    JobSpec { speed: 0, ..slow() }
}

fn pages() -> Arc<Pages> {
    Arc::default()
}

#[test]
fn a_job_is_recorded_from_its_start_through_its_changes() {
    let pages = pages();
    let bench = Bench::recorded(&pages);
    let job = bench.start(slow(), &Disk::new(100, 0..100));
    let record = || pages.job("j").unwrap();
    let first = record();
    assert_eq!((first.speed, first.paused, first.end), (1, false, None));
    assert_eq!((first.auto_finalize, first.auto_dismiss), (false, false));
    job.pause().unwrap();
    assert!(record().paused);
    bench.until("paused");
    job.set_speed(2).unwrap();
    assert_eq!(record().speed, 2);
    job.resume().unwrap();
    assert!(!record().paused);
    job.set_speed(0).unwrap();
    bench.until("BLOCK_JOB_PENDING");
    job.finalize().unwrap();
    bench.until("concluded");
    assert!(record().finalized);
    let end = record().end.unwrap();
    assert_eq!((end.offset, end.error), (100 * 64 * KIB, None));
    bench.manager.dismiss("j").unwrap().unwrap();
    assert_eq!(pages.job("j"), None);
}

#[test]
fn a_cancelled_job_is_recorded_as_such_and_forgotten_at_its_end() {
    let pages = pages();
    let bench = Bench::recorded(&pages);
    let disk = Disk::new(8, 0..8);
    disk.set_gate(true);
    let spec = JobSpec {
        auto_dismiss: true,
        ..quick()
    };
    let job = bench.start(spec, &disk);
    job.cancel().unwrap();
    assert!(pages.job("j").unwrap().cancelled);
    disk.set_gate(false);
    bench.until("BLOCK_JOB_CANCELLED");
    // Before anybody was told.
    assert_eq!(pages.job("j"), None);
}

#[test]
fn what_cannot_be_recorded_does_not_happen() {
    let pages = pages();
    let bench = Bench::recorded(&pages);
    let disk = Disk::new(100, 0..100);
    pages.set_full(true);
    let refused = |result: Result<(), Refused>| {
        assert_eq!(result.unwrap_err().0, "No room for the record");
    };
    refused(bench.try_start(slow(), &disk).map(drop));
    assert!(bench.manager.list().is_empty() && bench.events().is_empty());

    pages.set_full(false);
    let job = bench.start(slow(), &disk);
    pages.set_full(true);
    refused(job.pause());
    refused(job.set_speed(7));
    refused(job.cancel());
    let info = job.info();
    assert_eq!((info.paused, info.speed), (false, 1));
    assert_eq!(info.status, Status::Running);
    pages.set_full(false);
    job.pause().unwrap();
    pages.set_full(true);
    refused(job.resume());
    assert!(job.info().paused);
    pages.set_full(false);
    job.resume().unwrap();
    job.set_speed(0).unwrap();
    bench.until("BLOCK_JOB_PENDING");
    pages.set_full(true);
    refused(job.finalize());
    assert!(!*disk.finished.lock());
    pages.set_full(false);
    job.finalize().unwrap();
    bench.until("concluded");
    pages.set_full(true);
    refused(bench.manager.dismiss("j").unwrap());
    assert_eq!(bench.manager.list().len(), 1);
    pages.set_full(false);
    bench.manager.dismiss("j").unwrap().unwrap();
}

#[test]
fn a_stop_at_an_error_is_recorded() {
    for (errno, io_status) in [
        (libc::EIO, IoStatus::Failed),
        (libc::ENOSPC, IoStatus::NoSpace),
    ] {
        let pages = pages();
        let bench = Bench::recorded(&pages);
        let disk = Disk::new(8, 0..8);
        disk.faults.lock().push((0, errno));
        let on_error = OnError::Stop;
        let job = bench.start(
            JobSpec {
                on_error,
                ..quick()
            },
            &disk,
        );
        bench.until("paused");
        let record = pages.job("j").unwrap();
        assert_eq!((record.paused, record.io_status), (true, io_status));
        job.resume().unwrap();
        bench.until("BLOCK_JOB_PENDING");
        let record = pages.job("j").unwrap();
        assert_eq!((record.paused, record.io_status), (false, IoStatus::Ok));
    }
}

#[test]
fn a_restored_job_is_what_it_was_and_copies_nothing_again() {
    let pages = pages();
    let disk = Disk::new(100, 0..100);
    let before = Bench::recorded(&pages);
    let spec = JobSpec {
        on_error: OnError::Stop,
        ..slow()
    };
    let job = before.start(spec, &disk);
    job.pause().unwrap();
    before.until("paused");
    // What the process has done before it was killed.
    disk.needed.lock().retain(|cluster| *cluster >= 40);
    let record = pages.job("j").unwrap();
    before.manager.shut_down();
    disk.copied.lock().clear();

    let bench = Bench::recorded(&pages);
    let job = bench.restore(&record, &disk);
    bench.until("paused");
    let info = job.info();
    assert_eq!((info.id.as_str(), info.speed, info.paused), ("j", 1, true));
    assert_eq!((info.offset, info.len), (40 * 64 * KIB, 100 * 64 * KIB));
    assert_eq!((info.auto_finalize, info.auto_dismiss), (false, false));
    assert!(disk.copied.lock().is_empty());
    job.set_speed(0).unwrap();
    job.resume().unwrap();
    bench.until("BLOCK_JOB_PENDING");
    let first = disk.copied.lock().first().copied();
    assert_eq!(first.map(|(offset, _)| offset), Some(40 * 64 * KIB));
    assert_eq!(pages.job("j").unwrap().on_error, OnError::Stop);
}

#[test]
fn a_restored_job_shows_the_error_that_had_stopped_it() {
    let pages = pages();
    let before = Bench::recorded(&pages);
    let disk = Disk::new(8, 0..8);
    disk.faults.lock().push((0, libc::ENOSPC));
    let on_error = OnError::Enospc;
    before.start(
        JobSpec {
            on_error,
            ..quick()
        },
        &disk,
    );
    before.until("paused");
    let record = pages.job("j").unwrap();
    before.manager.shut_down();

    let bench = Bench::recorded(&pages);
    let job = bench.restore(&record, &disk);
    bench.until("paused");
    assert_eq!(job.info().io_status, IoStatus::NoSpace);
    job.resume().unwrap();
    bench.until("BLOCK_JOB_PENDING");
    assert_eq!(job.info().io_status, IoStatus::Ok);
}

#[test]
fn a_restored_job_that_was_told_to_finalize_does_not_wait_for_it_again() {
    let pages = pages();
    let before = Bench::recorded(&pages);
    let disk = Disk::new(8, 0..8);
    before.start(quick(), &disk);
    before.until("BLOCK_JOB_PENDING");
    let mut record = pages.job("j").unwrap();
    record.finalized = true;
    before.manager.shut_down();

    let bench = Bench::recorded(&pages);
    bench.manager.tell();
    bench.restore(&record, &disk);
    bench.until("BLOCK_JOB_COMPLETED");
}

#[test]
fn a_restored_job_that_ends_before_anybody_listens_is_told_later() {
    let pages = pages();
    let before = Bench::recorded(&pages);
    let disk = Disk::new(8, 0..8);
    let spec = JobSpec {
        auto_dismiss: true,
        ..quick()
    };
    before.start(spec, &disk);
    before.until("BLOCK_JOB_PENDING");
    let mut record = pages.job("j").unwrap();
    record.finalized = true;
    before.manager.shut_down();

    let bench = Bench::recorded(&pages);
    let job = bench.restore(&record, &disk);
    while *disk.closed.lock() < 2 || job.info().busy {
        std::thread::yield_now();
    }
    assert!(!bench.events().contains(&"BLOCK_JOB_COMPLETED".to_owned()));
    assert!(pages.job("j").is_some());
    bench.manager.tell();
    bench.until("BLOCK_JOB_COMPLETED");
    bench.until("null");
    assert_eq!(pages.job("j"), None);
}

#[test]
fn the_end_of_the_process_is_none_of_the_jobs() {
    for pause in [false, true] {
        let pages = pages();
        let bench = Bench::recorded(&pages);
        let job = bench.start(slow(), &Disk::new(100, 0..100));
        if pause {
            job.pause().unwrap();
            bench.until("paused");
        }
        let record = pages.job("j").unwrap();
        bench.events();
        bench.manager.shut_down();
        assert_eq!(bench.events(), Vec::<String>::new());
        assert_eq!(pages.job("j").unwrap(), record);
        assert!(!record.cancelled);
    }
    // One that nobody can go on with is cancelled.
    let bench = Bench::recorded(&pages());
    bench.start(
        JobSpec {
            work: None,
            ..slow()
        },
        &Disk::new(100, 0..100),
    );
    bench.manager.shut_down();
    bench.until("BLOCK_JOB_CANCELLED");
}

#[test]
fn a_cancel_before_the_end_of_the_process_is_not_lost() {
    let pages = pages();
    let bench = Bench::recorded(&pages);
    let job = bench.start(slow(), &Disk::new(100, 0..100));
    job.cancel().unwrap();
    bench.manager.shut_down();
    bench.until("BLOCK_JOB_CANCELLED");
    assert!(pages.job("j").unwrap().end.is_some());
}

/// A record of a job that has gone far.
fn recorded(pages: &Arc<Pages>, auto_dismiss: bool) -> record::Job {
    let bench = Bench::recorded(pages);
    let spec = JobSpec {
        auto_dismiss,
        ..slow()
    };
    bench.start(spec, &Disk::new(100, 0..100));
    bench.manager.shut_down();
    pages.job("j").unwrap()
}

#[test]
fn an_end_that_nobody_was_told_of_is_told_once_to_those_who_listen() {
    for (untold, told) in [
        (Untold::Completed, &["BLOCK_JOB_COMPLETED"][..]),
        (Untold::Cancelled, &["aborting", "BLOCK_JOB_CANCELLED"]),
        (
            Untold::Failed("no luck".to_owned()),
            &["aborting", "BLOCK_JOB_COMPLETED no luck"],
        ),
    ] {
        let pages = pages();
        let record = recorded(&pages, true);
        let bench = Bench::recorded(&pages);
        let completed = untold == Untold::Completed;
        bench
            .manager
            .restore_over(&record, None, Some(untold))
            .unwrap();
        assert!(bench.events().is_empty());
        let info = bench.manager.job("j").unwrap().info();
        assert!(!info.busy && !info.paused);
        assert_eq!(info.offset == info.len, completed);
        assert!(pages.job("j").is_some());
        // It is too late for anything else.
        let job = bench.manager.job("j").unwrap();
        assert!(job.pause().is_err() && job.finalize().is_err());

        bench.manager.tell();
        assert_eq!(pages.job("j"), None);
        let mut wanted = told.to_vec();
        wanted.extend(["concluded", "null"]);
        assert_eq!(bench.events(), wanted);
        bench.manager.tell();
        assert!(bench.events().is_empty());
        assert!(bench.manager.list().is_empty());
    }
}

#[test]
fn a_job_that_is_over_is_listed_until_it_is_dismissed() {
    let pages = pages();
    let before = Bench::recorded(&pages);
    let disk = Disk::new(8, 0..8);
    disk.faults.lock().push((0, libc::EIO));
    before.start(quick(), &disk);
    before.until("concluded");
    let record = pages.job("j").unwrap();

    let bench = Bench::recorded(&pages);
    bench.manager.restore_over(&record, None, None).unwrap();
    bench.manager.tell();
    assert!(bench.events().is_empty());
    let info = bench.manager.list().remove(0);
    assert_eq!(info.status, Status::Concluded);
    assert_eq!(info.error.as_deref(), Some("Input/output error"));
    bench.manager.dismiss("j").unwrap().unwrap();
    assert_eq!(bench.events(), ["null"]);
    assert_eq!(pages.job("j"), None);
    assert!(bench.manager.dismiss("j").is_none());
}

/// The longest time that a copy was not stable, of a log that ends stable.
fn longest_unstable(disk: &Disk) -> Duration {
    let mut since = None;
    let mut longest = Duration::ZERO;
    for (at, stable) in disk.log.lock().iter() {
        if *stable {
            longest = longest.max(since.take().map_or(Duration::ZERO, |since| *at - since));
        } else {
            since.get_or_insert(*at);
        }
    }
    longest
}

#[test]
fn copies_are_stable_within_five_seconds() {
    let bench = Bench::new();
    let disk = Disk::new(200, 0..200);
    // A minute at this speed.
    let speed = disk.len / 60;
    bench.start(
        JobSpec {
            speed,
            ..JobSpec::stream("j")
        },
        &disk,
    );
    bench.until("null");
    let longest = longest_unstable(&disk);
    assert!(longest <= Duration::from_secs(5), "{longest:?}");
    let settled = disk.log.lock().iter().filter(|(_, stable)| *stable).count();
    assert!((12..=20).contains(&settled), "{settled} times");
}

#[test]
fn copies_are_stable_before_a_pause_is_told() {
    let bench = Bench::frozen();
    let disk = Disk::new(100, 0..100);
    disk.set_gate(true);
    let job = bench.start(JobSpec::stream("j"), &disk);
    while disk.most_in_flight.lock().1 == 0 {
        std::thread::yield_now();
    }
    job.pause().unwrap();
    disk.set_gate(false);
    bench.until("paused");
    let log: Vec<_> = disk.log.lock().iter().map(|(_, stable)| *stable).collect();
    assert!(log.len() > 1, "{log:?}");
    assert_eq!(log.last(), Some(&true), "{log:?}");
}

/// Would catch a job that ends while the kernel still has what it asked for.
#[test]
fn what_is_being_made_stable_comes_to_its_end_first() {
    let bench = Bench::frozen();
    let disk = Disk::new(8, 0..8);
    disk.set_gate(true);
    disk.set_settle_gate(true);
    let job = bench.start(JobSpec::stream("j"), &disk);
    while disk.most_in_flight.lock().1 == 0 {
        std::thread::yield_now();
    }
    job.pause().unwrap();
    disk.set_gate(false);
    while *disk.settling.lock() == 0 {
        std::thread::yield_now();
    }
    job.cancel().unwrap();
    assert!(!bench.events().contains(&"BLOCK_JOB_CANCELLED".to_owned()));
    disk.set_settle_gate(false);
    bench.until("BLOCK_JOB_CANCELLED");
    assert_eq!(
        disk.log.lock().last().map(|(_, stable)| *stable),
        Some(true)
    );
}

#[test]
fn copies_that_cannot_be_made_stable_are_tried_again_and_end_no_job() {
    let bench = Bench::new();
    let disk = Disk::new(200, 0..200);
    *disk.settle_faults.lock() = 2;
    let speed = disk.len / 60;
    bench.start(
        JobSpec {
            speed,
            ..JobSpec::stream("j")
        },
        &disk,
    );
    let events = bench.until("null");
    assert!(
        events.contains(&"BLOCK_JOB_COMPLETED".to_owned()),
        "{events:?}"
    );
    assert_eq!(*disk.settle_faults.lock(), 0);
    assert!(longest_unstable(&disk) <= Duration::from_secs(15));
}

fn commit() -> record::Commit {
    let Some(Work::Stream(stream)) = work() else {
        unreachable!();
    };
    record::Commit {
        link: record::Link {
            node: stream.target,
            header: None,
            below: None,
            identity: [1, 2],
            released: Vec::new(),
            released_files: Vec::new(),
            let_go: false,
        },
        done: false,
    }
}

/// A job that records its result, and ends while there is no room for that in the record.
fn end_unrecorded(bench: &Bench, store: &Arc<Store>, steps: &Steps, spec: JobSpec) {
    let disk = Disk::new(8, 0..8);
    let (store, full) = (store.clone(), steps.clone());
    *disk.on_finish.lock() = Some(Box::new(move || {
        let announce = |state: &mut State| state.jobs[0].commit = Some(commit());
        store.change(announce).unwrap();
        full.set_full(true);
    }));
    bench.start(spec, &disk);
    bench.until("null");
    steps.set_full(false);
}

/// Would catch an end that is forgotten because there was no room for it: the next job of the same
/// name, or the next process, took the record for its own.
#[test]
fn an_end_that_was_not_recorded_is_recorded_with_the_next_change() {
    let spec = || JobSpec {
        auto_finalize: true,
        auto_dismiss: true,
        ..quick()
    };
    for id in ["j", "k"] {
        let steps = Steps::default();
        let store = Arc::new(steps.store());
        let bench = Bench::recorded_in(store.clone());
        end_unrecorded(&bench, &store, &steps, spec());
        assert_eq!(steps.store().state().jobs.len(), 1, "not recorded yet");
        let next = JobSpec {
            speed: 1,
            id: id.to_owned(),
            ..spec()
        };
        let job = bench.start(next, &Disk::new(100, 0..100));
        let state = steps.store().state();
        let ids: Vec<_> = state.jobs.iter().map(|job| job.id.as_str()).collect();
        assert_eq!(ids, [id]);
        assert_eq!(state.links, [commit().link]);
        job.cancel().unwrap();
        bench.until("BLOCK_JOB_CANCELLED");
        let state = steps.store().state();
        assert_eq!((state.jobs.len(), state.links), (0, vec![commit().link]));
    }
}

#[test]
fn a_second_record_of_a_job_is_refused() {
    let steps = Steps::default();
    let store = Arc::new(steps.store());
    Bench::recorded_in(store.clone()).start(slow(), &Disk::new(100, 0..100));
    // A process that does not list the job, whatever the reason.
    let bench = Bench::recorded_in(store.clone());
    let refused = bench.try_start(slow(), &Disk::new(100, 0..100)).err();
    assert!(refused.unwrap().0.contains("'j'"));
    assert_eq!(store.state().jobs.len(), 1);
}

#[test]
fn copies_are_stable_when_a_job_is_pending_or_at_its_end() {
    let stable = |disk: &Disk| {
        let log = disk.log.lock();
        assert!(log.iter().any(|(_, stable)| !stable), "nothing was copied");
        log.last().is_some_and(|(_, stable)| *stable)
    };
    let bench = Bench::frozen();
    let disk = Disk::new(8, 0..8);
    let spec = JobSpec {
        auto_finalize: false,
        ..JobSpec::stream("j")
    };
    bench.start(spec, &disk);
    bench.until("BLOCK_JOB_PENDING");
    assert!(stable(&disk), "pending");

    for cancelled in [false, true] {
        let bench = Bench::frozen();
        let disk = Disk::new(8, 0..8);
        match cancelled {
            true => disk.set_gate(true),
            false => disk.faults.lock().push((7 * 64 * KIB, libc::EIO)),
        }
        let job = bench.start(JobSpec::stream("j"), &disk);
        if cancelled {
            while disk.most_in_flight.lock().1 == 0 {
                std::thread::yield_now();
            }
            job.cancel().unwrap();
            disk.set_gate(false);
        }
        bench.until("null");
        // Beside the fault one copy may have landed, or none.
        let copied = disk.log.lock().iter().any(|(_, stable)| !stable);
        assert!(!copied || stable(&disk), "cancelled: {cancelled}");
    }
}

/// Would catch a job that is pending, or ended well, with copies that may be lost.
#[test]
fn copies_that_cannot_be_made_stable_at_the_end_are_an_error_of_the_job() {
    for on_error in [OnError::Report, OnError::Stop] {
        let bench = Bench::frozen();
        let disk = Disk::new(8, 0..8);
        *disk.settle_faults.lock() = 1;
        let spec = JobSpec {
            auto_finalize: false,
            auto_dismiss: false,
            on_error,
            ..JobSpec::stream("j")
        };
        let job = bench.start(spec, &disk);
        if on_error == OnError::Report {
            bench.until("concluded");
            assert_eq!(job.info().error.as_deref(), Some("cannot settle"));
            continue;
        }
        bench.until("paused");
        assert_eq!(job.info().io_status, IoStatus::Failed);
        job.resume().unwrap();
        bench.until("BLOCK_JOB_PENDING");
        assert!(disk.log.lock().last().is_some_and(|(_, stable)| *stable));
    }
}

/// Would catch an end of a job that is kept after its end, and of which the record says that its
/// result may not be in force.
#[test]
fn the_result_of_a_completed_job_is_in_force() {
    let steps = Steps::default();
    let store = Arc::new(steps.store());
    let bench = Bench::recorded_in(store.clone());
    bench.start(slow(), &Disk::new(100, 0..100));
    store
        .change(|state| state.jobs[0].commit = Some(commit()))
        .unwrap();
    let record = store.state().jobs[0].clone();
    bench.manager.shut_down();
    let bench = Bench::recorded_in(store.clone());
    let untold = Some(Untold::Completed);
    bench.manager.restore_over(&record, None, untold).unwrap();
    let done = || {
        let state = steps.store().state();
        state.jobs[0]
            .commit
            .as_ref()
            .is_some_and(|commit| commit.done)
    };
    assert!(done(), "before anybody listens");
    bench.manager.tell();
    assert!(done() && store.state().jobs[0].end.is_some());
}

/// Would catch a result that is forgotten though the header may have been changed; and a name that
/// cannot be used again for that.
#[test]
fn a_result_that_may_be_in_force_stays_recorded_when_the_job_fails() {
    for auto_dismiss in [true, false] {
        let steps = Steps::default();
        let store = Arc::new(steps.store());
        let bench = Bench::recorded_in(store.clone());
        let disk = Disk::new(8, 0..8);
        let spec = JobSpec {
            auto_finalize: false,
            auto_dismiss,
            ..quick()
        };
        let job = bench.start(spec, &disk);
        bench.until("BLOCK_JOB_PENDING");
        let put = |state: &mut State| state.jobs[0].commit = Some(commit());
        store.change(put).unwrap();
        *disk.finish_error.lock() = Some(libc::EIO);
        job.finalize().unwrap();
        bench.until("concluded");
        if auto_dismiss {
            bench.until("null");
        } else {
            bench.manager.dismiss("j").unwrap().unwrap();
        }
        let left = steps.store().state().jobs;
        assert!(left.len() == 1 && left[0].commit.is_some(), "{left:?}");
        bench.start(slow(), &Disk::new(100, 0..100));
    }
}
