//! The guest's write cache: whether writes become stable before they complete, as the guest has said.
//!
//! What would be caught: a guest that has switched its write cache off, sends no flushes, and gets
//! the cache back when it is served again: after a kill, after a lost connection, after a reboot; by a
//! device that does not know what was said to the one before it. A new guest that has no cache.

#![allow(clippy::unwrap_used)]

mod export_common;

use std::sync::Arc;

use export_common::hand::*;
use export_common::*;
use stratablk::export::Export;
use stratablk::storage::memory::{MemoryStorage, Step};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const OUT: u32 = 1;
const OK: u8 = 0;
const DISK: usize = 1 << 20;

/// In the region: the byte of the first descriptor's padding that says so.
const CACHE: u64 = 16 + 2;

/// What serves the disk: one process, and the next.
struct Process {
    place: Place,
    _export: Export,
    storage: Arc<MemoryStorage>,
}

impl Process {
    fn new() -> Self {
        let place = Place::new();
        let (root, storage) = memory_root(vec![0; DISK]);
        let export = start(place.config(), root);
        Self {
            place,
            _export: export,
            storage,
        }
    }

    fn connect(&self, tracked: bool) -> Hand {
        let connect = if tracked {
            Hand::connect_tracked
        } else {
            Hand::connect
        };
        connect(&self.place.socket(), PLAIN)
    }

    /// Whether there is a write cache, by what a write does and by what is said.
    fn has_cache(&self, hand: &mut Hand) -> bool {
        self.storage.record();
        assert_eq!(hand.request(OUT, 0, &[(DATA, 512, false)]).1, OK);
        let log = self.storage.take_log();
        let cached = !log.iter().any(|step| matches!(step, Step::Sync));
        assert_eq!(hand.config(32, 1), [u8::from(cached)]);
        cached
    }
}

fn set(hand: &mut Hand, on: bool) {
    let flags = VhostUserConfigFlags::WRITABLE;
    hand.front.set_config(32, flags, &[u8::from(on)]).unwrap();
}

/// The front-end says nothing again; it goes on at the used index.
fn reconnect(hand: &mut Hand, process: &Process) {
    hand.reconnect(&process.place.socket(), PLAIN);
    hand.set_up_at(hand.used_index());
}

#[test]
fn a_new_device_has_a_write_cache() {
    for tracked in [false, true] {
        let process = Process::new();
        let mut hand = process.connect(tracked);
        hand.set_up();
        assert!(process.has_cache(&mut hand));
    }
}

/// The guest sends no flush for what it wrote before it switched the cache off.
#[test]
fn what_was_written_is_stable_when_the_cache_is_off() {
    let process = Process::new();
    let mut hand = process.connect(false);
    hand.set_up();
    set(&mut hand, true);
    process.storage.record();
    assert_eq!(hand.request(OUT, 0, &[(DATA, 512, false)]).1, OK);
    set(&mut hand, false);
    assert_eq!(hand.config(32, 1), [0]);
    let syncs = |process: &Process| {
        let log = process.storage.take_log();
        log.iter().filter(|step| matches!(step, Step::Sync)).count()
    };
    assert_eq!(syncs(&process), 1);
    // It is off already.
    process.storage.record();
    set(&mut hand, false);
    assert_eq!(hand.config(32, 1), [0]);
    assert_eq!(syncs(&process), 0);
}

#[test]
fn what_the_guest_has_said_is_in_the_region() {
    for on in [false, true] {
        let mut process = Process::new();
        let mut hand = process.connect(true);
        hand.set_up();
        for said in [!on, on] {
            set(&mut hand, said);
            assert_eq!(process.has_cache(&mut hand), said);
        }
        for _ in 0..2 {
            process = Process::new();
            reconnect(&mut hand, &process);
            assert_eq!(process.has_cache(&mut hand), on);
        }
    }
}

/// As it may be where the guest was served before the region was there.
#[test]
fn what_was_said_before_the_region_was_there_is_in_it() {
    let process = Process::new();
    let mut hand = Hand::connect(&process.place.socket(), PLAIN);
    set(&mut hand, false);
    drop(hand);
    // The same guest, and no word of the cache.
    let mut hand = process.connect(true);
    hand.set_up();
    drop(process);
    let next = Process::new();
    reconnect(&mut hand, &next);
    assert!(!next.has_cache(&mut hand));
}

#[test]
fn what_the_guest_has_said_outlives_the_connection() {
    for (tracked, on) in [(false, false), (false, true), (true, false), (true, true)] {
        let process = Process::new();
        let mut hand = process.connect(tracked);
        hand.set_up();
        set(&mut hand, on);
        for _ in 0..2 {
            reconnect(&mut hand, &process);
            assert_eq!(process.has_cache(&mut hand), on, "{tracked}");
        }
    }
}

/// QEMU shows the next guest the configuration that the one before it had.
#[test]
fn what_a_guest_has_said_outlives_a_reset() {
    for tracked in [false, true] {
        let process = Process::new();
        let mut hand = process.connect(tracked);
        hand.set_up();
        set(&mut hand, false);
        VhostUserFrontend::reset_device(&mut hand.front).unwrap();
        hand.front.set_features(PLAIN).unwrap();
        if tracked {
            hand.set_inflight().unwrap();
        }
        hand.begin_at(0);
        hand.set_up();
        assert!(!process.has_cache(&mut hand));
        set(&mut hand, true);
        assert!(process.has_cache(&mut hand));
    }
}

#[test]
fn a_process_that_knows_nothing_gives_none() {
    let process = Process::new();
    let mut hand = process.connect(false);
    hand.begin_at(7);
    hand.set_up();
    assert!(!process.has_cache(&mut hand));
    set(&mut hand, true);
    assert!(process.has_cache(&mut hand));
    // A guest that comes from another machine, and has a region of ours.
    let process = Process::new();
    let mut hand = process.connect(true);
    hand.begin_at(7);
    hand.set_up();
    assert!(!process.has_cache(&mut hand));
    // A region whose maker has not said so.
    let process = Process::new();
    let mut hand = process.connect(true);
    hand.set_up();
    // Or it would take the next one's request, as long as it has not seen that it is left.
    drop(process);
    hand.note(CACHE, 0);
    let next = Process::new();
    reconnect(&mut hand, &next);
    assert!(!next.has_cache(&mut hand));
    // A device that begins anew, of a front-end that shows its guest what another one said.
    drop(next);
    let process = Process::new();
    hand.inflight = None;
    hand.begin_at(0);
    reconnect(&mut hand, &process);
    assert!(!process.has_cache(&mut hand));
}

/// It has nobody to ask.
#[test]
fn who_cannot_switch_the_cache_has_one() {
    let process = Process::new();
    let features = PLAIN & !F_CONFIG_WCE;
    let mut hand = Hand::connect(&process.place.socket(), features);
    hand.begin_at(7);
    hand.set_up();
    process.storage.record();
    assert_eq!(hand.request(OUT, 0, &[(DATA, 512, false)]).1, OK);
    let log = process.storage.take_log();
    assert!(!log.iter().any(|step| matches!(step, Step::Sync)));
}
