//! One front-end against the others of its process: descriptors that it shares and changes, a
//! backlog without end, and messages without end.
//!
//! What would be caught: a thread that waits for a descriptor of a front-end, a queue that has
//! taken more than it can finish, an error descriptor that is not told, and a log that a guest or
//! a front-end fills.

#![allow(clippy::unwrap_used, clippy::panic)]

mod export_common;

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;

use export_common::hand::*;
use export_common::held::{Held, Release};
use export_common::*;
use parking_lot::Mutex;
use stratablk::export::{Export, ExportConfig, SocketSource};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const OK: u8 = 0;
const IOERR: u8 = 1;
const DISK: usize = 96 << 20;

/// Runs `work`, which must end.
fn in_time<T: Send>(what: &str, work: impl FnOnce() -> T + Send, rescue: impl FnOnce()) -> T {
    let (done, ended) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let result = work();
            done.send(result).unwrap();
        });
        let result = ended.recv_timeout(PATIENCE);
        if result.is_err() {
            // Or the test would not end either.
            rescue();
        }
        result.unwrap_or_else(|_| panic!("{what} hangs"))
    })
}

/// Makes an eventfd one to which a write waits for ever.
fn fill(event: &EventFd) {
    let _ = event.read();
    event.write(u64::MAX - 1).unwrap();
    // SAFETY: no memory is passed.
    let set = unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, libc::O_RDWR) };
    assert_eq!(set, 0);
}

/// Lets a thread that waits for an eventfd go on.
fn drain(event: &EventFd) {
    // SAFETY: no memory is passed.
    unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    let _ = event.read();
}

/// Catches: a worker, or the session, that waits in a write to an eventfd which its front-end has
/// made blocking and filled; and an end of the export that waits for it.
#[test]
fn no_thread_waits_for_an_eventfd_of_a_front_end() {
    let place = Place::new();
    let export = start(place.config(), memory_root(vec![7; 1 << 20]).0);
    let error = EventFd::new(libc::EFD_NONBLOCK).unwrap();

    // A completion.
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    fill(&hand.call);
    let call = hand.call.try_clone().unwrap();
    let all = || {
        for _ in 0..3 {
            hand.chain(0, IN, 0, &[(DATA, 512, true)]);
            hand.push(0);
            hand.kick();
            hand.skip_used();
        }
        // Another full one, while the queue runs, and when it does not.
        hand.front.set_vring_call(0, &hand.call).unwrap();
        assert_eq!(hand.front.get_vring_base(0).unwrap(), 3);
        hand.front.set_vring_call(0, &hand.call).unwrap();
        drop(hand);
    };
    in_time("a completion", all, || drain(&call));

    // A broken ring.
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    hand.front.set_vring_err(0, &error).unwrap();
    fill(&error);
    hand.set_avail_index(1000);
    hand.kick();
    in_time(
        "an error",
        || {
            hand.front.get_vring_base(0).unwrap();
        },
        || drain(&error),
    );

    // The kick, and the end.
    fill(&hand.kick);
    let kick = hand.kick.try_clone().unwrap();
    in_time(
        "the end",
        || {
            drop(hand);
            serves(&place);
            export.shutdown();
        },
        || drain(&kick),
    );
}

/// Catches: an end of the export that waits for a front-end which sends half a message, or does
/// not read what it is told.
#[test]
fn the_end_waits_for_no_socket() {
    use std::io::Write;

    for half in [true, false] {
        let place = Place::new();
        let export = start(place.config(), memory_root(vec![7; 1 << 20]).0);
        let hand = Hand::ready(&place.socket(), PLAIN);
        let mut socket = hand.socket.try_clone().unwrap();
        if half {
            socket.write_all(&[1, 0, 0, 0, 1]).unwrap();
        } else {
            // GET_FEATURES again and again, until nobody reads them because nobody reads the
            // answers.
            socket.set_nonblocking(true).unwrap();
            let message = [1u32, 1, 0].map(u32::to_le_bytes).concat();
            let began = std::time::Instant::now();
            let mut full = 0;
            while full < 100 {
                assert!(began.elapsed() < PATIENCE, "it never stops to read");
                match socket.write(&message) {
                    Ok(_) => full = 0,
                    Err(_) => full += 1,
                }
                std::thread::yield_now();
            }
        }
        in_time(
            "the end",
            || export.shutdown(),
            || {
                let _ = socket.shutdown(std::net::Shutdown::Both);
            },
        );
    }
}

fn serves(place: &Place) {
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    assert_eq!(hand.request(IN, 0, &[(DATA, 512, true)]).1, OK);
}

/// Catches: an error descriptor that comes while the queue runs, or after it has broken, and is
/// not told.
#[test]
fn an_error_descriptor_is_told_whenever_it_is_set() {
    let place = Place::new();
    let _export = start(place.config(), memory_root(vec![7; 1 << 20]).0);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    assert_eq!(hand.request(IN, 0, &[(DATA, 512, true)]).1, OK);
    let [first, second, third] = [(); 3].map(|()| EventFd::new(libc::EFD_NONBLOCK).unwrap());
    hand.front.set_vring_err(0, &first).unwrap();
    hand.front.set_vring_err(0, &second).unwrap();
    assert!(second.read().is_err(), "nothing is wrong");
    hand.set_avail_index(1000);
    hand.kick();
    eventually("the queue breaks", || wait_readable(second.as_raw_fd()));
    assert!(first.read().is_err(), "it was replaced");
    hand.front.set_vring_err(0, &third).unwrap();
    assert!(third.read().is_ok(), "it is broken already");
}

/// Where the tables of large requests are, in memory that the hand does not use.
const TABLES: u64 = BASE + 0xa000;
/// The data of large requests: the same bytes again and again.
const PIECE: u32 = 960 << 10;

/// Builds a request of `pieces` times the same data.
fn large(hand: &mut Hand, head: u16, kind: u32, pieces: u16) {
    let table = TABLES + 2048 * u64::from(head % 8);
    let header = HEADER + 16 * u64::from(head);
    let status = STATUS + u64::from(head);
    hand.header(header, kind, 0);
    hand.bytes(status, 1)[0] = 0xff;
    hand.desc_at(table, header, 16, NEXT, 1);
    let write = if kind == IN { WRITE } else { 0 };
    for piece in 1..=pieces {
        let at = table + 16 * u64::from(piece);
        hand.desc_at(at, DATA, PIECE, NEXT | write, piece + 1);
    }
    hand.desc_at(table + 16 * u64::from(pieces + 1), status, 1, WRITE, 0);
    let len = 16 * u32::from(pieces + 2);
    hand.desc(head, table, len, INDIRECT, 0);
}

/// Catches: a queue that takes all that its guest asks for, so that to take the queue back
/// is to wait for all of it; one that begins what it had not taken when it was to stop; and one that
/// does not go on when there is room again.
#[test]
fn what_is_under_way_is_bounded_and_the_rest_stays_in_the_ring() {
    for kind in [IN, OUT] {
        let place = Place::new();
        let storage = Held::new(DISK, false);
        let export = start(
            place.config(),
            raw_root(storage.clone(), DISK as u64, false),
        );
        let _release = Release(storage.clone());
        let mut hand = Hand::ready(&place.socket(), PLAIN);
        // Each of 15 MiB.
        for head in 0..8 {
            large(&mut hand, head, kind, 16);
            hand.push(head);
        }
        hand.kick();
        eventually("four are under way", || {
            storage.waiting.load(Ordering::SeqCst) == 4
        });
        std::thread::scope(|scope| {
            let _release = Release(storage.clone());
            let asker = scope.spawn(|| hand.front.get_vring_base(0).unwrap());
            eventually("the queue is to stop", || export.unfinished() == 4);
            assert_eq!(storage.waiting.load(Ordering::SeqCst), 4);
            storage.release();
            assert_eq!(asker.join().unwrap(), 4, "what was taken, and nothing more");
        });
        assert_eq!(hand.used_index(), 4);
        assert_eq!(export.unfinished(), 0);
        hand.front.set_vring_kick(0, &hand.kick).unwrap();
        hand.kick();
        let mut used: Vec<u16> = (0..8).map(|_| hand.next_used().0).collect();
        used.sort_unstable();
        assert_eq!(used, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(hand.bytes(STATUS, 8), [OK; 8]);
    }
}

/// Catches: queues that are stopped one after the other, so that the last one goes on taking
/// requests while the first is waited for.
#[test]
fn all_queues_of_a_front_end_stop_at_once() {
    let place = Place::new();
    let storage = Held::new(DISK, false);
    let config = ExportConfig {
        queues: 2,
        ..place.config()
    };
    let export = start(config, raw_root(storage.clone(), DISK as u64, false));
    let _release = Release(storage.clone());
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    hand.chain(0, IN, 0, &[(DATA, 512, true)]);
    hand.push(0);
    hand.kick();
    hand.rings = MOVED;
    hand.begin_at(0);
    let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    hand.front.set_vring_num(1, hand.size).unwrap();
    hand.front.set_vring_base(1, 0).unwrap();
    hand.front.set_vring_addr(1, &hand.rings()).unwrap();
    hand.front.set_vring_kick(1, &kick).unwrap();
    hand.front.set_vring_enable(1, true).unwrap();
    hand.chain(8, IN, 0, &[(DATA, 512, true)]);
    hand.push(8);
    kick.write(1).unwrap();
    eventually("both requests hang", || {
        storage.waiting.load(Ordering::SeqCst) == 2
    });
    hand.socket.shutdown(std::net::Shutdown::Both).unwrap();
    let waits = |queue: usize| {
        let stats = export.stats().get(queue).unwrap();
        stats.unfinished.load(Ordering::SeqCst) == 1
    };
    eventually("both queues are to stop", || waits(0) && waits(1));
    storage.release();
    eventually("the session ends", || !export.info().connected);
    serves(&place);
}

/// Catches: a request larger than the bound that is never taken, that is given to the storage in
/// one piece, or beside which others are taken.
#[test]
fn a_request_above_the_bound_is_carried_out_alone_and_in_pieces() {
    for kind in [IN, OUT] {
        let place = Place::new();
        let storage = Held::new(DISK, true);
        let _export = start(
            place.config(),
            raw_root(storage.clone(), DISK as u64, false),
        );
        let mut hand = Hand::ready(&place.socket(), PLAIN);
        hand.bytes(DATA, PIECE as usize).fill(9);
        // Of 75 MiB, between two small ones.
        hand.chain(1, IN, 0, &[(BASE + 0x6000, 512, true)]);
        large(&mut hand, 8, kind, 80);
        hand.chain(5, IN, 0, &[(BASE + 0x7000, 512, true)]);
        for head in [1, 8, 5] {
            hand.push(head);
        }
        hand.kick();
        for head in [1, 8, 5] {
            assert_eq!(hand.next_used().0, head);
            assert_eq!(hand.bytes(STATUS + u64::from(head), 1), [OK]);
        }
        assert!(storage.largest.load(Ordering::SeqCst) <= 4 << 20);
        let byte = if kind == IN { 5 } else { 9 };
        assert_eq!(hand.bytes(DATA, 1), [byte]);
        assert_eq!(hand.bytes(BASE + 0x6000, 512), [5; 512]);
        assert_eq!(hand.bytes(BASE + 0x7000, 512), [byte; 512]);
    }
}

/// Keeps the messages of this program.
struct Kept(Mutex<Vec<String>>);

static KEPT: Kept = Kept(Mutex::new(Vec::new()));

impl log::Log for Kept {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().push(record.args().to_string());
    }

    fn flush(&self) {}
}

/// The number that a message of others begins with.
fn left_out(message: &str) -> Option<usize> {
    let (_, rest) = message.split_once("': ")?;
    rest.strip_suffix(" more messages were left out")?
        .parse()
        .ok()
}

/// Catches: a log that grows with what a guest or a front-end does, a limit that begins anew with
/// each connection, messages that are left out without a word, and a guest's nonsense that hides
/// what is wrong with its disk.
#[test]
fn messages_that_a_guest_or_a_front_end_causes_are_limited_and_counted() {
    log::set_logger(&KEPT).unwrap();
    log::set_max_level(log::LevelFilter::Info);
    const ROUNDS: usize = 40;
    let began = std::time::Instant::now();
    let place = Place::new();
    let (root, storage) = memory_root(vec![7; 1 << 20]);
    let config = ExportConfig {
        writable: true,
        ..ExportConfig::new("flooded", SocketSource::Path(place.socket()))
    };
    let export: Export = start(config, root);
    for round in 0..ROUNDS {
        // Chains without a place for a status.
        let mut hand = Hand::ready(&place.socket(), PLAIN);
        for _ in 0..20 {
            hand.desc(0, DATA, 16, 0, 0);
            hand.push(0);
            hand.kick();
            assert_eq!(hand.next_used(), (0, 0));
        }
        // Requests that the disk fails.
        storage.fail_after(0, libc::EIO);
        for kind in [IN, FLUSH] {
            assert_eq!(hand.request(kind, 0, &[(DATA, 512, true)]).1, IOERR);
        }
        storage.fail_after(usize::MAX, 0);
        // Broken rings and messages.
        match round % 4 {
            0 => {
                hand.set_avail_index(1000 + round as u16 * 100);
                hand.kick();
                hand.front.get_vring_base(0).unwrap();
            }
            1 => {
                let region = VhostUserMemoryRegionInfo {
                    mmap_offset: 1 << 40,
                    ..hand.region()
                };
                assert!(hand.front.set_mem_table(&[region]).is_err());
            }
            2 => assert!(hand.front.set_features(PLAIN | 1 << 40).is_err()),
            _ => {
                hand.raw_message(250, &[]);
                hand.expect_closed();
            }
        }
    }
    export.shutdown();
    drop(export);
    let messages = KEPT.0.lock();
    let ours = || messages.iter().filter(|text| text.contains("'flooded'"));
    let told: usize = ours().filter_map(|text| left_out(text)).sum();
    let written = ours().filter(|text| left_out(text).is_none()).count();
    // Three topics, five of each in ten seconds.
    let windows = began.elapsed().as_secs() as usize / 10 + 1;
    assert!(
        written <= 15 * windows,
        "{written} in {windows}: {messages:#?}"
    );
    assert!(ours().any(|text| text.contains("flush") || text.contains("read")));
    assert!(ours().any(|text| text.contains("place for its status")));
    // Twenty of chains, two of the disk, two of the connection, and that of the round.
    assert!(
        written + told >= ROUNDS * 24,
        "{written} written, {told} left out"
    );
}
