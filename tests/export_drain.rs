//! Requests in flight: what must wait for them, and when a write counts as done. The storage
//! holds its operations back until it is told to let them go.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "crash/qcow2.rs"]
mod qcow2;
#[allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#[path = "engine/support.rs"]
mod support;

mod export_common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use export_common::hand::*;
use export_common::held::Held;
use export_common::*;
use stratablk::chain::{Chain, Layer, Root, View, ViewCache};
use stratablk::export::ExportConfig;
use stratablk::reactor::Reactor;
use stratablk::storage::memory::{MemoryStorage, Step};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

const IN: u32 = 0;
const OUT: u32 = 1;
const OK: u8 = 0;
const DISK: usize = 1 << 20;

/// Runs `message` while a request hangs, and checks that it is answered only once the request
/// is in the used ring.
fn drains(what: &str, message: impl FnOnce(&mut Hand) + Send) {
    let place = Place::new();
    let storage = Held::new(DISK, false);
    let export = start(
        place.config(),
        raw_root(storage.clone(), DISK as u64, false),
    );
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    let answered = AtomicBool::new(false);
    hand.bytes(DATA, 1024).fill(0);
    for head in [0, 4] {
        hand.chain(
            head,
            IN,
            u64::from(head),
            &[(DATA + u64::from(head) * 128, 512, true)],
        );
        hand.push(head);
    }
    hand.kick();
    eventually("both requests hang", || {
        storage.waiting.load(Ordering::SeqCst) == 2
    });
    std::thread::scope(|scope| {
        let (hand, answered) = (&mut hand, &answered);
        let asker = scope.spawn(move || {
            message(hand);
            answered.store(true, Ordering::SeqCst);
            hand.used_index()
        });
        // Gives a device that does not wait the time to say so.
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!answered.load(Ordering::SeqCst), "{what} did not wait");
        storage.release();
        assert_eq!(asker.join().unwrap(), 2, "{what}");
    });
    assert_eq!(hand.bytes(DATA, 1024), [5; 1024], "{what}");
    drop(hand);
    export.shutdown();
}

/// Catches: an answer while the device still writes guest memory, which the front-end may then
/// use for something else or send away.
#[test]
fn whatever_takes_a_queue_away_waits_for_its_requests() {
    drains("GET_VRING_BASE", |hand| {
        assert_eq!(hand.front.get_vring_base(0).unwrap(), 2);
    });
    drains("SET_VRING_ENABLE", |hand| {
        hand.front.set_vring_enable(0, false).unwrap();
    });
    drains("RESET_DEVICE", |hand| hand.front.reset_device().unwrap());
    drains("REM_MEM_REG", |hand| {
        let region = hand.region();
        hand.front.remove_mem_region(&region).unwrap();
    });
    drains("SET_MEM_TABLE", |hand| {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            ..hand.region()
        };
        hand.front.set_mem_table(&[region]).unwrap();
    });
}

/// Catches: an end of the connection or of the export that frees memory under requests.
#[test]
fn a_front_end_that_dies_leaves_no_request_behind() {
    let place = Place::new();
    let storage = Held::new(DISK, false);
    let export = start(
        place.config(),
        raw_root(storage.clone(), DISK as u64, false),
    );
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    hand.chain(0, IN, 0, &[(DATA, 512, true)]);
    hand.push(0);
    hand.kick();
    eventually("the request hangs", || {
        storage.waiting.load(Ordering::SeqCst) == 1
    });
    hand.socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(export.info().connected, "its session waits for the request");
    storage.release();
    eventually("the session ends", || !export.info().connected);
    assert_eq!(hand.used_index(), 1, "completed all the same");
    let mut next = Hand::ready(&place.socket(), PLAIN);
    assert_eq!(next.request(IN, 0, &[(DATA, 512, true)]).1, OK);
}

/// What was written and what was made stable, in order.
fn steps(storage: &MemoryStorage) -> Vec<&'static str> {
    storage
        .take_log()
        .iter()
        .map(|step| match step {
            Step::Write { .. } => "write",
            Step::Zero { .. } => "zero",
            Step::SetLen(_) | Step::Grow(_) => "length",
            Step::Sync => "sync",
        })
        .collect()
}

/// Catches: writes that complete before they are stable where the guest sends no flushes, and
/// flushes that nobody needs where it does.
#[test]
fn without_a_write_cache_a_write_is_stable_when_it_completes() {
    let with_cache = ["write", "zero", "zero"];
    let without = ["write", "sync", "zero", "sync", "zero", "sync"];
    for (what, write_cache, features, wce, expected) in [
        ("a cache", true, PLAIN, None, &with_cache[..]),
        ("no cache", false, PLAIN & !F_CONFIG_WCE, None, &without[..]),
        (
            "no flushes negotiated",
            true,
            PLAIN & !F_FLUSH,
            None,
            &without[..],
        ),
        (
            "switched off by the guest",
            true,
            PLAIN,
            Some(0),
            &without[..],
        ),
        ("switched on again", true, PLAIN, Some(1), &with_cache[..]),
    ] {
        let place = Place::new();
        let (root, storage) = memory_root(vec![0; DISK]);
        let config = ExportConfig {
            write_cache,
            ..place.config()
        };
        let _export = start(config, root);
        let mut hand = Hand::ready(&place.socket(), features);
        assert_eq!(hand.config(32, 1), [u8::from(write_cache)], "{what}");
        if let Some(wce) = wce {
            let flags = VhostUserConfigFlags::WRITABLE;
            hand.front.set_config(32, flags, &[0]).unwrap();
            hand.front.set_config(32, flags, &[wce]).unwrap();
            assert_eq!(hand.config(32, 1), [wce]);
        }
        storage.record();
        assert_eq!(hand.request(OUT, 0, &[(DATA, 512, false)]).1, OK);
        let mut segment = [0; 16];
        segment[8] = 1;
        hand.bytes(DATA, 16).copy_from_slice(&segment);
        // To write zeros, and to discard.
        for kind in [13, 11] {
            assert_eq!(hand.request(kind, 0, &[(DATA, 16, false)]).1, OK);
        }
        assert_eq!(steps(&storage), expected, "{what}");
    }
}

/// Catches: a short transfer that is reported as a whole one, or gone on with at the wrong place;
/// an interruption that the guest hears of.
#[test]
fn short_and_interrupted_operations_are_carried_out_all_the_same() {
    const LEN: usize = 24 << 10;
    let place = Place::new();
    let (root, storage) = memory_root((0..DISK).map(|n| (n / 512) as u8).collect());
    let mut expected = storage.snapshot();
    let _export = start(place.config(), root);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    storage.uneven(Some(1));
    for round in 0..300usize {
        let at = round * 7919 % (DISK / 512 - LEN / 512) * 512;
        // Parts of the guest's memory that are not in the order of the disk.
        let parts = [
            (16 << 10, 8 << 10),
            (0, 512),
            (1024, 15 << 10),
            (25 << 10, 512),
        ];
        let data = |write| parts.map(|(from, len)| (DATA + from, len as u32, write));
        if round % 2 == 0 {
            for (index, byte) in hand.bytes(DATA, 32 << 10).iter_mut().enumerate() {
                *byte = (index / 64 + round * 31) as u8;
            }
            let mut to = at;
            for (from, len) in parts {
                let bytes = hand.bytes(DATA + from, len);
                expected[to..to + len].copy_from_slice(bytes);
                to += len;
            }
            let answer = hand.request(OUT, (at / 512) as u64, &data(false));
            assert_eq!(answer.1, OK, "round {round}");
            assert!(storage.snapshot() == expected, "round {round}: written");
        } else {
            hand.bytes(DATA, 32 << 10).fill(0xee);
            let answer = hand.request(IN, (at / 512) as u64, &data(true));
            assert_eq!(answer, (LEN as u32 + 1, OK), "round {round}");
            let mut from_disk = at;
            for (from, len) in parts {
                let seen = &*hand.bytes(DATA + from, len);
                let wanted = &expected[from_disk..from_disk + len];
                assert!(seen == wanted, "round {round}: read");
                from_disk += len;
            }
        }
        if round % 8 == 0 {
            assert_eq!(hand.request(4, 0, &[]).1, OK, "a flush");
        }
    }
}

/// Catches: a failed flush or write that is reported as done.
#[test]
fn errors_of_the_storage_reach_the_guest() {
    let place = Place::new();
    let (root, storage) = memory_root(vec![0; DISK]);
    let _export = start(place.config(), root);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    storage.fail_after(0, libc::EIO);
    assert_eq!(hand.request(OUT, 0, &[(DATA, 512, false)]), (1, 1));
    assert_eq!(hand.request(IN, 0, &[(DATA, 512, true)]), (1, 1));
    assert_eq!(hand.request(4, 0, &[]), (1, 1));
    storage.fail_after(usize::MAX, 0);
    assert_eq!(hand.request(4, 0, &[]), (1, OK));
}

/// An image in memory, and its chain.
fn qcow2_chain(reactor: &Reactor) -> (Arc<MemoryStorage>, Arc<Root>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    support::create(&path, "cluster_size=4k", DISK as u64);
    let storage = Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()));
    let (_, chain) = support::open_memory(reactor, &storage);
    let layer = Layer {
        discard: true,
        ..(**chain.top()).clone()
    };
    let chain = Chain::new(vec![Arc::new(layer)]).unwrap();
    (storage, Root::new(chain))
}

fn discard_all(reactor: &Reactor, root: &Root) {
    let discard = View::of(root.chain()).discard(0, DISK as u64);
    reactor.block_on(discard).unwrap();
}

/// Flushes, which frees what nobody can see any more. True: nothing waits to be freed.
fn all_is_free(reactor: &Reactor, root: &Root, storage: &MemoryStorage) -> bool {
    reactor.block_on(root.chain().flush()).unwrap();
    let bytes = storage.snapshot();
    qcow2::Image::new(&bytes).unwrap().check() == Ok(0)
}

/// Catches: a queue's thread that sleeps and still counts as somebody who may use what was freed,
/// or that keeps an old chain with its files: nothing of it would ever be given back.
#[test]
fn an_idle_queue_holds_nothing_up() {
    let reactor = Reactor::for_this_thread().unwrap();
    let (storage, root) = qcow2_chain(&reactor);
    let place = Place::new();
    let export = start(place.config(), root.clone());
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    hand.bytes(DATA, 4096).fill(1);
    assert_eq!(hand.request(OUT, 0, &[(DATA, 4096, false)]).1, OK);
    assert_eq!(hand.request(IN, 0, &[(DATA, 4096, true)]).1, OK);
    // The queue has nothing to do from now on. Its thread may still be on its way to sleep, so
    // this is tried until it holds.
    discard_all(&reactor, &root);
    eventually("the discarded cluster is free", || {
        all_is_free(&reactor, &root, &storage)
    });
    let old = Arc::downgrade(&root.chain());
    assert_eq!(hand.request(IN, 0, &[(DATA, 4096, true)]).1, OK);
    let (other, _) = memory_root(vec![0; DISK]);
    root.publish(other.chain());
    eventually("the old chain goes", || old.upgrade().is_none());
    drop(hand);
    export.shutdown();
}

/// Catches: a thread that is never without requests and keeps what it saw with the first of them:
/// freed clusters would wait for it for ever.
#[test]
fn a_busy_queue_holds_up_no_more_than_its_requests() {
    let reactor = Reactor::for_this_thread().unwrap();
    let (storage, root) = qcow2_chain(&reactor);
    support::write_value(&reactor, &root.chain(), 0, 4096, 1).unwrap();
    // As a worker does: a view for each batch, and always one in flight.
    let mut cache = ViewCache::new(root.clone());
    let mut in_flight = cache.get();
    discard_all(&reactor, &root);
    // In a process of its own; beside other tests their requests may be waited for, too.
    eventually("the discarded cluster is free", || {
        in_flight = cache.get();
        all_is_free(&reactor, &root, &storage)
    });
}
