//! Inflight regions, message by message: what a front-end and its device say to each other, and what
//! a device does with what another one left.
//!
//! What would be caught: a request of a dead device that is done twice or not at all, or goes on at
//! the front-end's index instead of the region's; chains that are not marked while they are under
//! way, or stay marked; a driver that waits for a signal which its dead device owed; a drain that
//! forgets what was taken over; a region of another device, of another size, or with nonsense in
//! it, that is believed, or that costs more than its own device.

#![allow(clippy::unwrap_used)]

mod export_common;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use export_common::hand::*;
use export_common::held::{Held, Release};
use export_common::*;
use stratablk::export::Export;
use stratablk::storage::memory::MemoryStorage;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

const OUT: u32 = 1;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const DISK: usize = 1 << 20;

// In the region of queue 0.
const VERSION: u64 = 8;
const DESC_NUM: u64 = 10;
const LAST_BATCH_HEAD: u64 = 12;
const USED_IDX: u64 = 14;

/// The record of a descriptor.
fn record(head: u16) -> u64 {
    16 + 16 * u64::from(head)
}

fn disk(place: &Place) -> (Export, Arc<MemoryStorage>) {
    let (root, storage) = memory_root(vec![0; DISK]);
    (start(place.config(), root), storage)
}

/// A chain of three descriptors that writes 512 bytes of `value` to `sector`.
fn write(hand: &mut Hand, head: u16, sector: u64, value: u8) {
    let data = DATA + 512 * u64::from(head);
    hand.bytes(data, 512).fill(value);
    hand.chain(head, OUT, sector, &[(data, 512, false)]);
}

fn status(hand: &mut Hand, head: u16) -> u8 {
    hand.bytes(STATUS + u64::from(head), 1)[0]
}

/// A region in which a device that has died took `heads`, in this order, while its ring's used
/// index was `used`.
fn died_with(hand: &Hand, used: u16, heads: &[u16]) {
    hand.note(DESC_NUM, SIZE);
    hand.note(USED_IDX, used);
    for (counter, &head) in heads.iter().enumerate() {
        hand.note(record(head) + 8, counter as u16);
        hand.note(record(head), u16::from_ne_bytes([1, 0]));
    }
    hand.note(VERSION, 1);
}

fn marks(hand: &Hand) -> Vec<u16> {
    (0..SIZE)
        .filter(|&head| hand.noted(record(head)) != 0)
        .collect()
}

#[test]
fn what_a_dead_device_had_taken_is_done_and_the_rest_follows() {
    // Where nothing has happened yet, in the middle, and where the indices wrap.
    for index in [0, 7, 0xfffe] {
        let place = Place::new();
        let (_export, storage) = disk(&place);
        let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
        hand.begin_at(index);
        // Taken: 0 and 6; answered: 3, whose mark is still there. Not taken: 9.
        for (head, sector) in [(0, 1), (3, 2), (6, 3), (9, 4)] {
            write(&mut hand, head, sector, 0x10 + head as u8);
            hand.push(head);
        }
        died_with(&hand, index, &[0, 3, 6]);
        hand.note(LAST_BATCH_HEAD, 3);
        hand.set_used_index(index.wrapping_add(1));
        // QEMU says the used index, others what they like.
        hand.set_up_at(index.wrapping_add(1));
        let mut heads: Vec<u16> = (0..3).map(|_| hand.next_used().0).collect();
        heads.sort_unstable();
        assert_eq!(heads, [0, 6, 9], "from index {index}");
        let disk = storage.snapshot();
        let found: Vec<u8> = (1..5).map(|sector| disk[sector * 512]).collect();
        assert_eq!(found, [0x10, 0, 0x16, 0x19], "3 was answered before");
        let base = hand.front.get_vring_base(0).unwrap();
        assert_eq!(base, u32::from(index.wrapping_add(4)));
        assert!(marks(&hand).is_empty());
        assert_eq!(hand.noted(USED_IDX), index.wrapping_add(4));
    }
}

/// A death between the used index and the signal.
#[test]
fn a_driver_is_signalled_though_nothing_is_left_to_be_done() {
    for features in [PLAIN, PLAIN | F_EVENT_IDX] {
        let place = Place::new();
        let (_export, _) = disk(&place);
        let mut hand = Hand::connect_tracked(&place.socket(), features);
        write(&mut hand, 0, 1, 1);
        hand.push(0);
        hand.set_used_index(1);
        died_with(&hand, 1, &[]);
        hand.set_up_at(0);
        assert!(wait_readable(std::os::fd::AsRawFd::as_raw_fd(&hand.call)));
        // And is heard when it has more.
        write(&mut hand, 3, 2, 2);
        assert_eq!(hand.run(3), (1, OK));
        eventually("a kick is asked for at the next chain", || {
            features & F_EVENT_IDX == 0 || hand.avail_event() == 2
        });
    }
}

#[test]
fn chains_are_marked_until_their_answer_is_seen() {
    let place = Place::new();
    let (root, storage) = memory_root(vec![0; DISK]);
    let _export = start(place.config(), root);
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    hand.set_up();
    assert_eq!((hand.noted(VERSION), hand.noted(DESC_NUM)), (1, SIZE));
    for round in 0..40_u16 {
        for head in [0, 3, 6] {
            write(&mut hand, head, 1 + u64::from(head), round as u8);
            hand.push(head);
        }
        // One without a place for its status, and one that is refused.
        hand.desc(9, DATA, 512, 0, 0);
        hand.push(9);
        hand.chain(10, 77, 0, &[]);
        hand.push(10);
        hand.kick();
        for _ in 0..5 {
            hand.next_used();
        }
        eventually("no mark is left", || marks(&hand).is_empty());
        eventually("the index is noted", || {
            hand.noted(USED_IDX) == 5 * (round + 1)
        });
    }
    assert_eq!(storage.snapshot()[512], 39);
}

#[test]
fn a_drain_waits_for_what_was_taken_over() {
    let place = Place::new();
    let (_export, storage) = disk(&place);
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    let heads = [9, 0, 6, 3];
    for head in heads {
        write(&mut hand, head, u64::from(head), 5);
        hand.push(head);
    }
    died_with(&hand, 0, &heads);
    hand.set_up_at(0);
    assert_eq!(hand.front.get_vring_base(0).unwrap(), 4);
    assert!(hand.all_used());
    assert!(heads.iter().all(|&head| status(&mut hand, head) == OK));
    assert_eq!(storage.snapshot()[9 * 512], 5);
}

#[test]
fn a_front_end_that_goes_and_comes_goes_on() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    hand.set_up();
    for _ in 0..3 {
        for head in [0, 3] {
            write(&mut hand, head, 1, 1);
            assert_eq!(hand.run(head), (1, OK));
        }
        hand.reconnect(&place.socket(), PLAIN);
        // It is not asked.
        hand.set_up_at(4711);
    }
}

#[test]
fn a_reset_makes_the_region_new() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    hand.set_up();
    write(&mut hand, 0, 1, 1);
    assert_eq!(hand.run(0), (1, OK));
    VhostUserFrontend::reset_device(&mut hand.front).unwrap();
    assert_eq!(hand.noted(VERSION), 0);
    // The same once more, for a ring that begins anew; then a new one.
    for _ in 0..2 {
        hand.front.set_features(PLAIN).unwrap();
        hand.set_inflight().unwrap();
        hand.begin_at(0);
        hand.set_up();
        assert_eq!(hand.run(0), (1, OK));
        VhostUserFrontend::reset_device(&mut hand.front).unwrap();
        let wanted = VhostUserInflight::new(0, 0, 1, SIZE);
        hand.inflight = Some(hand.front.get_inflight_fd(&wanted).unwrap());
    }
}

/// As QEMU does at a guest's reboot where it cannot reset the device, and keeps the region.
#[test]
fn a_ring_may_begin_anew_when_nothing_is_in_flight() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    hand.begin_at(1000);
    hand.set_up();
    write(&mut hand, 0, 1, 1);
    assert_eq!(hand.run(0), (1, OK));
    assert_eq!(hand.front.get_vring_base(0).unwrap(), 1001);
    hand.begin_at(0);
    hand.set_up();
    assert_eq!(hand.run(0), (1, OK));
}

/// Wherever it was left, and whatever was answered last.
#[test]
fn a_clean_region_serves_any_ring_that_begins_anew() {
    for (left, last, size) in [(0xffc3, 0, SIZE), (0xfff8, 0, SIZE), (4, 12, 8)] {
        let place = Place::new();
        let (_export, _) = disk(&place);
        let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
        hand.begin_at(left);
        hand.set_up();
        for head in [last, last, last] {
            write(&mut hand, head, 1, 1);
            assert_eq!(hand.run(head), (1, OK));
        }
        hand.front.get_vring_base(0).unwrap();
        hand.size = size;
        hand.begin_at(0);
        hand.set_up();
        write(&mut hand, 0, 1, 1);
        assert_eq!(hand.run(0), (1, OK), "after {left:#x}");
    }
}

/// A guest that reboots while its device has died: what the old one wanted is nobody's any more.
#[test]
fn a_reset_is_remembered_until_the_region_comes() {
    let place = Place::new();
    let (_export, storage) = disk(&place);
    let mut hand = Hand::connect(&place.socket(), PLAIN);
    let wanted = VhostUserInflight::new(0, 0, 1, SIZE);
    hand.inflight = Some(hand.front.get_inflight_fd(&wanted).unwrap());
    died_with(&hand, 0, &[0]);
    VhostUserFrontend::reset_device(&mut hand.front).unwrap();
    hand.front.set_features(PLAIN).unwrap();
    hand.set_inflight().unwrap();
    write(&mut hand, 0, 1, 1);
    write(&mut hand, 3, 2, 2);
    hand.set_up();
    assert_eq!(hand.run(3), (1, OK));
    let found = storage.snapshot();
    assert_eq!([found[512], found[1024]], [0, 2]);
    // Once: it is in use now.
    assert_eq!(hand.front.get_vring_base(0).unwrap(), 1);
    hand.note(record(0), u16::from_ne_bytes([1, 0]));
    hand.push(0);
    hand.set_inflight().unwrap();
    hand.set_up_at(1);
    assert_eq!(hand.next_used().0, 0);
}

#[test]
fn a_ring_smaller_than_the_region_is_served() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    hand.size = 8;
    for head in [0, 3] {
        write(&mut hand, head, 1, 9);
        hand.push(head);
    }
    died_with(&hand, 0, &[0]);
    hand.set_up_at(0);
    let mut heads = [hand.next_used().0, hand.next_used().0];
    heads.sort_unstable();
    assert_eq!(heads, [0, 3]);
}

#[test]
fn a_region_that_cannot_be_true_costs_its_own_device() {
    type Change = fn(&mut Hand);
    let changes: [(&str, Change); 7] = [
        ("version", |hand| hand.note(VERSION, 2)),
        ("descriptors", |hand| hand.note(DESC_NUM, 8)),
        ("mark", |hand| hand.note(record(2), 7)),
        ("used index", |hand| {
            hand.note(record(2), u16::from_ne_bytes([1, 0]));
            hand.note(USED_IDX, 1000);
        }),
        ("batch", |hand| {
            hand.note(record(2), u16::from_ne_bytes([1, 0]));
            hand.note(USED_IDX, 0xfffe);
            hand.note(LAST_BATCH_HEAD, 4);
            hand.note(record(4) + 6, 4);
        }),
        ("no such descriptor", |hand| {
            hand.size = 8;
            hand.note(record(8), u16::from_ne_bytes([1, 0]));
        }),
        ("shrunk", |hand| {
            // No region of ours: that could not be cut short.
            let file = Shared::new(4096).file;
            let (mut inflight, _) = hand.inflight.take().unwrap();
            inflight.mmap_offset = 0;
            hand.inflight = Some((inflight, std::fs::File::from(file)));
            hand.set_inflight().unwrap();
            hand.inflight.as_ref().unwrap().1.set_len(0).unwrap();
        }),
    ];
    let other = Place::new();
    let (_other, _) = disk(&other);
    let mut guest = Hand::connect_tracked(&other.socket(), PLAIN);
    guest.set_up();
    for (what, change) in changes {
        let place = Place::new();
        let (_export, _) = disk(&place);
        let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
        died_with(&hand, 0, &[]);
        change(&mut hand);
        assert!(hand.try_set_up().is_err(), "{what}");
        hand.expect_closed();
        let mut next = Hand::connect_tracked(&place.socket(), PLAIN);
        next.set_up();
        for hand in [&mut next, &mut guest] {
            write(hand, 0, 1, 1);
            assert_eq!(hand.run(0), (1, OK), "after {what}");
        }
    }
}

/// Under way, a queue whose region is gone stops as one does whose memory is gone.
#[test]
fn a_region_that_is_cut_short_under_way_stops_its_device() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    let file = Shared::new(4096).file;
    let (inflight, _) = hand.inflight.take().unwrap();
    hand.inflight = Some((inflight, std::fs::File::from(file)));
    hand.set_inflight().unwrap();
    hand.set_up();
    write(&mut hand, 0, 1, 1);
    assert_eq!(hand.run(0), (1, OK));
    let broken = vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).unwrap();
    hand.front.set_vring_err(0, &broken).unwrap();
    hand.inflight.as_ref().unwrap().1.set_len(0).unwrap();
    write(&mut hand, 0, 1, 1);
    hand.push(0);
    hand.kick();
    eventually("the queue is broken", || {
        wait_readable(std::os::fd::AsRawFd::as_raw_fd(&broken))
    });
    drop(hand);
    let mut next = Hand::connect_tracked(&place.socket(), PLAIN);
    next.set_up();
    write(&mut next, 0, 1, 1);
    assert_eq!(next.run(0), (1, OK));
}

#[test]
fn a_region_of_another_shape_is_refused() {
    let wrong: [fn(&mut VhostUserInflight); 5] = [
        |inflight| inflight.mmap_size -= 8,
        |inflight| inflight.queue_size = 8,
        |inflight| inflight.queue_size = 0x8001,
        |inflight| inflight.mmap_offset = 4096,
        |inflight| {
            inflight.num_queues = 2;
            inflight.mmap_size *= 2;
        },
    ];
    let place = Place::new();
    let (_export, _) = disk(&place);
    for (number, change) in wrong.into_iter().enumerate() {
        let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
        change(&mut hand.inflight.as_mut().unwrap().0);
        assert!(hand.set_inflight().is_err(), "{number}");
        hand.expect_closed();
    }
    let mut hand = Hand::connect(&place.socket(), PLAIN);
    let wanted = VhostUserInflight::new(0, 0, 9, SIZE);
    assert!(hand.front.get_inflight_fd(&wanted).is_err(), "too many");
    hand.expect_closed();
    // A ring that is larger than the region.
    let mut hand = Hand::connect(&place.socket(), PLAIN);
    let wanted = VhostUserInflight::new(0, 0, 1, 8);
    hand.inflight = Some(hand.front.get_inflight_fd(&wanted).unwrap());
    hand.set_inflight().unwrap();
    assert!(hand.try_set_up().is_err());
}

/// The region cannot know what was taken before it was there.
#[test]
fn a_new_region_is_for_a_ring_without_requests_in_flight() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    hand.begin_at(5);
    hand.set_used_index(4);
    assert!(hand.try_set_up().is_err());
    hand.expect_closed();
}

/// A mark, with how often the process has crashed; `left`: no process had begun with it.
fn mark(crashes: u8, left: bool) -> u16 {
    u16::from_ne_bytes([1, crashes | if left { 0x80 } else { 0 }])
}

/// The last process has crashed.
fn crashed(hand: &Hand) {
    // Beside the first descriptor's mark.
    hand.note(record(0) + 2, u16::from_ne_bytes([1, 0]));
}

#[test]
fn a_request_that_crashed_the_process_three_times_is_answered_with_an_error() {
    let place = Place::new();
    let (_export, storage) = disk(&place);
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    for head in [0, 3, 6, 9] {
        write(&mut hand, head, 1 + u64::from(head), 7);
        hand.push(head);
    }
    died_with(&hand, 0, &[0, 3, 6, 9]);
    hand.note(record(3), mark(1, false));
    hand.note(record(6), mark(2, false));
    // Nobody has tried it the third time.
    hand.note(record(9), mark(2, true));
    crashed(&hand);
    hand.set_up_at(0);
    let heads = [0; 4].map(|_| hand.next_used().0);
    assert_eq!(
        heads,
        [0, 3, 9, 6],
        "those that are less to be suspected first"
    );
    let found = [0, 3, 6, 9].map(|head| status(&mut hand, head));
    assert_eq!(found, [OK, OK, IOERR, OK]);
    assert_eq!(storage.snapshot()[7 * 512], 0, "it is not tried again");
    hand.front.get_vring_base(0).unwrap();
    assert!(marks(&hand).is_empty());
    assert_eq!(hand.noted(record(0) + 2) & 0xff, 0);
}

/// The parser may be what crashes. Without it nobody knows where the status is.
#[test]
fn a_chain_that_crashes_the_parser_goes_back_unread() {
    let place = Place::new();
    let (_export, storage) = disk(&place);
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    write(&mut hand, 0, 1, 7);
    hand.push(0);
    died_with(&hand, 0, &[0]);
    hand.note(record(0), mark(5, false));
    crashed(&hand);
    hand.set_up_at(0);
    assert_eq!(hand.next_used(), (0, 0));
    assert_eq!(status(&mut hand, 0), 0xff);
    assert_eq!(storage.snapshot()[512], 0);
}

/// One of them is the one that crashes the process.
#[test]
fn what_was_under_way_at_a_crash_is_done_again_one_by_one() {
    let place = Place::new();
    let storage = Held::new(DISK, false);

    let export = start(
        place.config(),
        raw_root(storage.clone(), DISK as u64, false),
    );
    let _release = Release(storage.clone());
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    for head in [0, 3, 6, 9] {
        write(&mut hand, head, 1 + u64::from(head), 7);
        hand.push(head);
    }
    // 9 has not been taken, 6 was not begun with.
    died_with(&hand, 0, &[0, 3, 6]);
    hand.note(record(6), mark(0, true));
    crashed(&hand);
    hand.set_up_at(0);
    eventually("the first hangs", || {
        storage.waiting.load(Ordering::SeqCst) == 1
    });
    // A whole turn later nothing else is under way.
    hand.front.set_vring_call(0, &hand.call).unwrap();
    hand.front.set_vring_call(0, &hand.call).unwrap();
    assert_eq!(storage.waiting.load(Ordering::SeqCst), 1);
    let found = [0, 3, 6, 9].map(|head| hand.noted(record(head)));
    assert_eq!(found, [mark(1, false), mark(1, true), mark(0, true), 0]);
    storage.release();
    let mut heads = [0; 4].map(|_| hand.next_used().0);
    assert_eq!(heads[..2], [0, 3]);
    heads.sort_unstable();
    assert_eq!(heads, [0, 3, 6, 9]);
    drop(hand);
    export.shutdown();
}

/// Who ends does not carry out all that others have left.
#[test]
fn what_was_not_begun_with_is_left_at_the_end() {
    const LARGE: usize = 64 << 20;
    let place = Place::new();
    let storage = Held::new(LARGE + 1024, false);

    let size = (LARGE + 1024) as u64;
    let export = start(place.config(), raw_root(storage.clone(), size, false));
    let _release = Release(storage.clone());
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    // As much as may be under way, and more.
    for (head, sector, sectors) in [(0, 0, (LARGE / 512) as u32), (3, (LARGE / 512) as u64, 1)] {
        let data = DATA + 16 * u64::from(head);
        let bytes = hand.bytes(data, 16);
        bytes.fill(0);
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
        hand.chain(head, WRITE_ZEROES, 0, &[(data, 16, false)]);
        hand.push(head);
    }
    died_with(&hand, 0, &[0, 3]);
    hand.set_up_at(0);
    eventually("the first hangs", || {
        storage.waiting.load(Ordering::SeqCst) == 1
    });
    hand.socket.shutdown(std::net::Shutdown::Both).unwrap();
    eventually("the session ends", || export.unfinished() > 0);
    storage.release();
    eventually("the session has ended", || !export.info().connected);
    assert_eq!(hand.used_index(), 1);
    assert_eq!(marks(&hand), [3]);
    hand.reconnect(&place.socket(), PLAIN);
    hand.set_up_at(1);
    assert_eq!([hand.next_used().0, hand.next_used().0], [0, 3]);
    drop(hand);
    export.shutdown();
}

/// A driver that names a chain again before it has seen the answer.
#[test]
fn a_chain_that_is_answered_and_not_shown_cannot_be_taken() {
    let place = Place::new();
    let (export, _) = disk(&place);
    let mut hand = Hand::connect_tracked(&place.socket(), PLAIN);
    hand.set_up();
    let broken = vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).unwrap();
    hand.front.set_vring_err(0, &broken).unwrap();
    // Answered at once, in the batch that names it twice.
    hand.chain(0, 77, 0, &[]);
    hand.chain(4, 77, 0, &[]);
    for head in [4, 0, 0] {
        hand.push(head);
    }
    hand.kick();
    eventually("the queue is broken", || {
        wait_readable(std::os::fd::AsRawFd::as_raw_fd(&broken))
    });
    hand.front.get_vring_base(0).unwrap();
    assert_eq!(hand.used_index(), 2);
    assert!(marks(&hand).is_empty());
    drop(hand);
    export.shutdown();
}
