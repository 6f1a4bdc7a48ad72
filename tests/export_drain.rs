//! Requests in flight: what must wait for them, and when a write counts as done. The storage
//! holds its operations back until it is told to let them go.

#![allow(clippy::unwrap_used)]

mod export_common;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use export_common::hand::*;
use export_common::*;
use io_uring::{opcode, types};
use stratablk::export::ExportConfig;
use stratablk::reactor::{Reactor, Token};
use stratablk::storage::memory::{MemoryStorage, Step};
use stratablk::storage::{Limits, Op, Storage, Submission};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;

const IN: u32 = 0;
const OUT: u32 = 1;
const OK: u8 = 0;
const DISK: usize = 1 << 20;

/// Storage in memory whose operations hang until `release`.
#[derive(Debug)]
struct Held {
    inner: MemoryStorage,
    gate: EventFd,
    open: AtomicBool,
    waiting: AtomicUsize,
}

impl Held {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: MemoryStorage::new(vec![5; DISK]),
            gate: EventFd::new(0).unwrap(),
            open: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
        })
    }

    fn release(&self) {
        self.open.store(true, Ordering::SeqCst);
        self.gate.write(1).unwrap();
    }
}

impl Storage for Held {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        if self.open.load(Ordering::SeqCst) {
            // SAFETY: passed on to the caller.
            return unsafe { self.inner.submit(reactor, op, token) };
        }
        // The poll ends when the gate opens, as an operation that moved one byte: a short one,
        // which is done once more in full.
        let fd = types::Fd(self.gate.as_raw_fd());
        let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build();
        // SAFETY: a poll names no memory.
        unsafe { reactor.start(entry, token) }.unwrap();
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Submission::Pending
    }

    fn len(&self) -> std::io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.inner.set_len(len)
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn name(&self) -> &str {
        "held"
    }

    fn writable(&self) -> bool {
        true
    }
}

/// Runs `message` while a request hangs, and checks that it is answered only once the request
/// is in the used ring.
fn drains(what: &str, message: impl FnOnce(&mut Hand) + Send) {
    let place = Place::new();
    let storage = Held::new();
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
    let storage = Held::new();
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
    let with_cache = ["write", "zero"];
    let without = ["write", "sync", "zero", "sync"];
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
        assert_eq!(hand.request(13, 0, &[(DATA, 16, false)]).1, OK);
        assert_eq!(steps(&storage), expected, "{what}");
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
