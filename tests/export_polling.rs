//! How long the queues' threads look for work before they sleep, as their counters show it.
//!
//! Nothing here is timed: a thread is idle when the system says that it sleeps, and while it does,
//! work on another queue shows that time goes by.

#![allow(clippy::unwrap_used)]

mod export_common;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use export_common::*;
use stratablk::export::{Export, ExportConfig, QueueStats};

/// Longer than any sleep of a test, so that a window that has opened stays open.
const LONG: u32 = u32::MAX;

fn export(place: &Place, poll_max_us: u32) -> Export {
    let (root, _) = memory_root(vec![0; 1 << 20]);
    let config = ExportConfig {
        queues: 2,
        poll_max_us,
        ..place.config()
    };
    start(config, root)
}

fn read(guest: &mut Guest, queue: usize) {
    let part = guest.memory.part(queue * 4096, 4096);
    assert_eq!(guest.run(queue, |q| q.read(0, part, 0)), 0);
}

/// Waits until the queue's thread sleeps. Then it has nothing to do: only an event wakes it.
fn wait_idle(stats: &QueueStats) {
    let thread = stats.thread.load(Ordering::Relaxed);
    let path = format!("/proc/self/task/{thread}/stat");
    eventually("the thread sleeps", || {
        let stat = std::fs::read_to_string(&path).unwrap();
        // Its name may have any character in it; the state comes after that.
        stat.rsplit(')').next().unwrap().starts_with(" S")
    });
}

/// Polls that found work, polls that did not, their time.
fn polls(stats: &QueueStats) -> [u64; 3] {
    [&stats.polls_found, &stats.polls_missed, &stats.poll_ns].map(|counter| counter.get())
}

/// Catches: an idle queue whose thread polls on and on, or wakes up for nothing; polls that are
/// not counted.
#[test]
fn an_idle_queue_polls_once_more_and_then_stands_still() {
    for poll_max_us in [32, LONG] {
        let place = Place::new();
        let export = export(&place, poll_max_us);
        let mut guest = Guest::connect(&place.socket(), 2);
        for _ in 0..100 {
            read(&mut guest, 0);
        }
        let idle = &export.stats()[0];
        wait_idle(idle);
        let before = (polls(idle), idle.sleeps.get(), idle.enters.get());
        for _ in 0..1000 {
            read(&mut guest, 1);
        }
        let after = (polls(idle), idle.sleeps.get(), idle.enters.get());
        assert_eq!(before, after, "at most {poll_max_us} us");
        let [_, missed, ns] = polls(idle);
        if poll_max_us == LONG {
            assert!(missed > 0 && ns > 0, "{missed} polls of {ns} ns");
        }
    }
}

/// Catches: a thread that polls although its last sleep says that nothing will come.
#[test]
fn a_long_sleep_ends_the_polling() {
    let place = Place::new();
    let export = export(&place, 32);
    let mut guest = Guest::connect(&place.socket(), 2);
    let stats = &export.stats()[0];
    read(&mut guest, 0);
    wait_idle(stats);
    let mut before = None;
    for round in 0..50 {
        // It has slept since before this.
        let start = Instant::now();
        while start.elapsed() <= Duration::from_micros(32) {}
        read(&mut guest, 0);
        wait_idle(stats);
        let now = (polls(stats), stats.sleeps.get() - round);
        assert_eq!(*before.get_or_insert(now), now, "round {round}");
    }
}

/// Catches: polling although it is switched off, or counted without having been done.
#[test]
fn without_polling_nothing_is_counted() {
    let place = Place::new();
    let export = export(&place, 0);
    let mut guest = Guest::connect(&place.socket(), 2);
    for _ in 0..300 {
        read(&mut guest, 0);
        read(&mut guest, 1);
    }
    for stats in export.stats() {
        wait_idle(stats);
        assert_eq!(stats.reads.get(), 300);
        assert!(stats.sleeps.get() > 0);
        assert_eq!(polls(stats), [0; 3]);
    }
}
