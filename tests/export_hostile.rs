//! One front-end against the others of its process: descriptors that it shares and changes, a
//! backlog without end, and messages without end.
//!
//! What would be caught: a thread that waits for a descriptor of a front-end, an error descriptor that is not told, and a log that a guest or
//! a front-end fills.

#![allow(clippy::unwrap_used)]

mod export_common;

use std::os::fd::AsRawFd;
use std::sync::mpsc::channel;

use export_common::hand::*;
use export_common::*;
use parking_lot::Mutex;
use stratablk::export::{Export, ExportConfig, SocketSource};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;

const IN: u32 = 0;
const FLUSH: u32 = 4;
const OK: u8 = 0;
const IOERR: u8 = 1;

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
    assert_eq!(
        unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, libc::O_RDWR) },
        0
    );
}

/// Lets whoever waits for an eventfd go on.
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
