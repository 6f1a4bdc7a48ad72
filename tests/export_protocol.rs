//! The protocol and the ring, message by message and descriptor by descriptor: what a proper
//! front-end would notice rarely and a hostile one tries on purpose.

#![allow(clippy::unwrap_used)]

mod export_common;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use export_common::hand::*;
use export_common::*;
use stratablk::export::Export;
use stratablk::storage::memory::MemoryStorage;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const DISK: usize = 1 << 20;

/// A disk whose every sector begins with its own number.
fn numbered() -> Vec<u8> {
    let mut bytes = vec![0u8; DISK];
    for (number, sector) in bytes.chunks_mut(512).enumerate() {
        sector[..8].copy_from_slice(&(number as u64).to_le_bytes());
    }
    bytes
}

fn disk(place: &Place) -> (Export, Arc<MemoryStorage>) {
    let (root, storage) = memory_root(numbered());
    (start(place.config(), root), storage)
}

fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// Catches: a configuration that is readable only as a whole or from its beginning.
#[test]
fn the_configuration_is_readable_at_any_offset_and_length() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::connect(&place.socket(), PLAIN);
    let whole = hand.config(0, 60);
    assert_eq!(
        u64::from_le_bytes(whole[..8].try_into().unwrap()),
        DISK as u64 / 512
    );
    assert_eq!(
        u32::from_le_bytes(whole[12..16].try_into().unwrap()),
        126,
        "seg_max"
    );
    assert_eq!(
        u32::from_le_bytes(whole[20..24].try_into().unwrap()),
        512,
        "blk_size"
    );
    assert_eq!(whole[32], 1, "write back");
    for offset in 0..60u32 {
        for len in [1usize, 3, 8] {
            let mut expected = whole[offset as usize..].to_vec();
            expected.resize(len.max(expected.len()), 0);
            assert_eq!(hand.config(offset, len)[..1], expected[..1]);
            if offset as usize + len <= 60 {
                assert_eq!(hand.config(offset, len), expected[..len]);
            }
        }
    }
    assert_eq!(hand.config(0x100, 60), whole, "as some front-ends read it");
    assert_eq!(
        hand.config(0, 256).len(),
        256,
        "structures of later standards"
    );
}

/// Catches: requests that are refused or misread, and lengths that count what was not written.
#[test]
fn each_kind_of_request_does_what_it_says() {
    let place = Place::new();
    let (_export, storage) = disk(&place);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    assert_eq!(hand.request(IN, 3, &[(DATA, 1024, true)]), (1025, OK));
    assert_eq!(
        hand.bytes(DATA, 1024),
        &storage.snapshot()[3 * 512..5 * 512]
    );

    hand.bytes(DATA, 512).fill(7);
    assert_eq!(hand.request(OUT, 9, &[(DATA, 512, false)]), (1, OK));
    assert_eq!(storage.snapshot()[9 * 512..10 * 512], [7; 512]);

    storage.record();
    assert_eq!(hand.request(FLUSH, 0, &[]), (1, OK));
    assert_eq!(storage.take_log(), [stratablk::storage::memory::Step::Sync]);

    hand.bytes(DATA, 20).fill(0xff);
    assert_eq!(hand.request(GET_ID, 0, &[(DATA, 20, true)]), (21, OK));
    assert_eq!(hand.bytes(DATA, 20), b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");

    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        hand.bytes(DATA, 512).fill(7);
        assert_eq!(hand.request(OUT, 9, &[(DATA, 512, false)]), (1, OK));
        hand.bytes(DATA, 16).copy_from_slice(&segment(9, 1, flags));
        assert_eq!(hand.request(kind, 0, &[(DATA, 16, false)]), (1, OK));
        assert_eq!(storage.snapshot()[9 * 512..10 * 512], [0; 512]);
    }
}

/// Catches: a wrong answer to a request that cannot be carried out, or data changed by it.
#[test]
fn what_cannot_be_done_is_answered_with_the_right_status() {
    let place = Place::new();
    let (_export, storage) = disk(&place);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    let end = DISK as u64 / 512;
    let before = storage.snapshot();
    let one = [(DATA, 512, false)];
    assert_eq!(hand.request(77, 0, &one).1, UNSUPP, "unknown type");
    assert_eq!(hand.request(OUT, end, &one).1, IOERR, "behind the end");
    assert_eq!(hand.request(OUT, u64::MAX, &one).1, IOERR);
    assert_eq!(hand.request(OUT, u64::MAX / 512, &one).1, IOERR, "overflow");
    assert_eq!(hand.request(IN, end - 1, &[(DATA, 1024, true)]).1, IOERR);
    assert_eq!(
        hand.request(OUT, 0, &[(DATA, 100, false)]).1,
        IOERR,
        "half a sector"
    );
    assert_eq!(hand.request(IN, 0, &[(DATA, 511, true)]).1, IOERR);
    for (kind, sector, sectors, flags, expected) in [
        (DISCARD, 0, 1, 1, UNSUPP),
        (DISCARD, 0, 1, 2, UNSUPP),
        (WRITE_ZEROES, 0, 1, 2, UNSUPP),
        (WRITE_ZEROES, 0, 1, 0x8000_0001, UNSUPP),
        (WRITE_ZEROES, end, 1, 0, IOERR),
        (DISCARD, u64::MAX, 1, 0, IOERR),
        (DISCARD, u64::MAX / 512, u32::MAX, 0, IOERR),
        (WRITE_ZEROES, 0, u32::MAX, 0, IOERR),
    ] {
        hand.bytes(DATA, 16)
            .copy_from_slice(&segment(sector, sectors, flags));
        let (_, status) = hand.request(kind, 0, &[(DATA, 16, false)]);
        assert_eq!(status, expected, "{kind} {sector} {sectors} {flags}");
    }
    assert_eq!(
        hand.request(DISCARD, 0, &[(DATA, 32, false)]).1,
        UNSUPP,
        "two segments"
    );
    assert_eq!(hand.request(DISCARD, 0, &[(DATA, 15, false)]).1, IOERR);
    assert_eq!(hand.request(DISCARD, 0, &[]).1, IOERR);
    assert!(storage.snapshot() == before, "nothing was changed");
}

/// Catches: a read-only disk that can be written, or that offers to discard.
#[test]
fn a_read_only_disk_is_not_written() {
    let place = Place::new();
    let (root, storage) = memory_root(numbered());
    let config = stratablk::export::ExportConfig {
        writable: false,
        ..place.config()
    };
    let _export = start(config, root);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    let offered = hand.front.get_features().unwrap();
    assert_ne!(offered & (1 << 5), 0, "RO");
    assert_eq!(offered & (1 << 13 | 1 << 14), 0, "DISCARD, WRITE_ZEROES");
    assert_eq!(hand.request(OUT, 0, &[(DATA, 512, false)]).1, IOERR);
    hand.bytes(DATA, 16).copy_from_slice(&segment(0, 1, 0));
    assert_eq!(hand.request(WRITE_ZEROES, 0, &[(DATA, 16, false)]).1, IOERR);
    assert_eq!(hand.request(IN, 1, &[(DATA, 512, true)]).1, OK);
    assert!(storage.snapshot() == numbered());
}

/// Catches: a device that counts on the usual cut of a request into descriptors.
#[test]
fn a_request_may_be_cut_into_descriptors_anywhere() {
    let place = Place::new();
    let (_export, storage) = disk(&place);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    // The header in three pieces, the last of them with data; the data in odd pieces.
    hand.header(HEADER, OUT, 4);
    let header: Vec<u8> = hand.bytes(HEADER, 16).to_vec();
    hand.bytes(DATA, 3).copy_from_slice(&header[..3]);
    hand.bytes(DATA + 100, 5).copy_from_slice(&header[3..8]);
    hand.bytes(DATA + 200, 8).copy_from_slice(&header[8..]);
    hand.bytes(DATA + 208, 300).fill(1);
    hand.bytes(DATA + 1000, 212).fill(2);
    hand.desc(0, DATA, 3, NEXT, 1);
    hand.desc(1, DATA + 100, 5, NEXT, 2);
    hand.desc(2, DATA + 200, 308, NEXT, 3);
    hand.desc(3, DATA + 1000, 212, NEXT, 4);
    hand.desc(4, STATUS, 1, WRITE, 0);
    assert_eq!(hand.run(0), (1, OK));
    let sector = &storage.snapshot()[4 * 512..5 * 512];
    assert_eq!(
        (&sector[..300], &sector[300..]),
        (&[1; 300][..], &[2; 212][..])
    );

    // The status at the end of the data, and an empty descriptor.
    hand.header(HEADER, IN, 4);
    hand.desc(0, HEADER, 16, NEXT, 1);
    hand.desc(1, DATA, 0, NEXT | WRITE, 2);
    hand.desc(2, DATA, 513, WRITE, 0);
    hand.bytes(DATA, 513).fill(0xee);
    assert_eq!(hand.run(0).0, 513);
    assert_eq!(&hand.bytes(DATA, 512)[..300], [1; 300]);
    assert_eq!(hand.bytes(DATA + 512, 1), [OK]);

    // An indirect table, misaligned, behind a direct descriptor.
    let table = DATA + 0x1003;
    hand.header(HEADER, IN, 4);
    hand.desc(0, HEADER, 16, NEXT, 1);
    hand.desc(1, table, 32, INDIRECT, 0);
    hand.desc_at(table, DATA, 512, NEXT | WRITE, 1);
    hand.desc_at(table + 16, STATUS, 1, WRITE, 0);
    assert_eq!(hand.run(0), (513, OK));
}

/// Catches: a guest that crashes the daemon, reads or writes outside its memory, or whose bad
/// request stops the good ones that follow.
#[test]
fn malformed_chains_come_back_and_harm_nobody() {
    let place = Place::new();
    let (_export, storage) = disk(&place);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    let outside = BASE + MEMORY as u64;
    let table = DATA + 0x1000;
    type Build = fn(&mut Hand, u64, u64);
    let lost: [(&str, Build); 12] = [
        ("no status", |h, _, _| h.desc(0, HEADER, 16, 0, 0)),
        ("a loop", |h, _, _| h.desc(0, HEADER, 16, NEXT, 0)),
        ("a loop of two", |h, _, _| {
            h.desc(0, HEADER, 16, NEXT, 1);
            h.desc(1, STATUS, 1, NEXT | WRITE, 0);
        }),
        ("next outside the table", |h, _, _| {
            h.desc(0, HEADER, 16, NEXT, SIZE)
        }),
        ("status outside memory", |h, outside, _| {
            h.desc(0, HEADER, 16, NEXT, 1);
            h.desc(1, outside, 1, WRITE, 0);
        }),
        ("status that wraps", |h, _, _| {
            h.desc(0, HEADER, 16, NEXT, 1);
            h.desc(1, u64::MAX - 1, 8, WRITE, 0);
        }),
        ("an empty table", |h, _, table| {
            h.desc(0, table, 0, INDIRECT, 0)
        }),
        ("half a descriptor", |h, _, table| {
            h.desc(0, table, 24, INDIRECT, 0)
        }),
        ("a huge table", |h, _, table| {
            h.desc(0, table, !15, INDIRECT, 0)
        }),
        ("a table outside memory", |h, outside, _| {
            h.desc(0, outside, 32, INDIRECT, 0)
        }),
        ("a table in a table", |h, _, table| {
            h.desc(0, table, 32, INDIRECT, 0);
            h.desc_at(table, table, 32, INDIRECT, 0);
        }),
        ("a loop in a table", |h, _, table| {
            h.desc(0, table, 32, INDIRECT, 0);
            h.desc_at(table, HEADER, 16, NEXT, 1);
            h.desc_at(table + 16, HEADER, 16, NEXT, 0);
        }),
    ];
    for (what, build) in lost {
        hand.header(HEADER, IN, 0);
        build(&mut hand, outside, table);
        assert_eq!(hand.run(0).0, 0, "{what}");
        assert_eq!(
            hand.request(IN, 0, &[(DATA, 512, true)]).1,
            OK,
            "after {what}"
        );
    }
    let refused: [(&str, Build); 6] = [
        ("a short header", |h, _, _| h.desc(0, HEADER, 15, NEXT, 1)),
        ("no header", |h, _, _| h.desc(0, DATA, 16, NEXT | WRITE, 1)),
        ("header outside memory", |h, outside, _| {
            h.desc(0, outside, 16, NEXT, 1)
        }),
        ("data across the end of memory", |h, outside, _| {
            h.desc(0, HEADER, 16, NEXT, 2);
            h.desc(2, outside - 256, 512, NEXT | WRITE, 1);
        }),
        ("data that wraps", |h, _, _| {
            h.desc(0, HEADER, 16, NEXT, 2);
            h.desc(2, u64::MAX - 255, 512, NEXT | WRITE, 1);
        }),
        ("readable behind writable", |h, _, _| {
            h.desc(0, HEADER, 16, NEXT, 2);
            h.desc(2, DATA, 512, NEXT | WRITE, 3);
            h.desc(3, DATA, 512, NEXT, 1);
        }),
    ];
    for (what, build) in refused {
        hand.header(HEADER, IN, 0);
        hand.bytes(STATUS, 1)[0] = 0xff;
        build(&mut hand, outside, table);
        hand.desc(1, STATUS, 1, WRITE, 0);
        assert_eq!(hand.run(0), (1, IOERR), "{what}");
    }
    assert!(storage.snapshot() == numbered());
}

/// Catches: a broken ring that takes the worker, or the next session, with it.
#[test]
fn a_broken_ring_costs_the_guest_its_queue_only() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    for what in ["index", "head", "twice"] {
        let mut hand = Hand::ready(&place.socket(), PLAIN);
        let error = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        hand.front.get_vring_base(0).unwrap();
        hand.front.set_vring_err(0, &error).unwrap();
        hand.front.set_vring_kick(0, &hand.kick).unwrap();
        match what {
            "index" => hand.set_avail_index(1000),
            "head" => hand.push(SIZE),
            _ => {
                // Both are taken in one batch, the first waits for its task.
                hand.chain(0, FLUSH, 0, &[]);
                hand.push(0);
                hand.push(0);
            }
        }
        hand.kick();
        eventually("the error descriptor is signalled", || {
            wait_readable(error.as_raw_fd())
        });
        hand.front.get_vring_base(0).unwrap();
        drop(hand);
        let mut hand = Hand::ready(&place.socket(), PLAIN);
        assert_eq!(
            hand.request(IN, 0, &[(DATA, 512, true)]).1,
            OK,
            "after {what}"
        );
    }
}

/// Catches: front-ends that wait for the first signal after handing over a descriptor, as
/// QEMU's own test does, and signals that go to a descriptor that was replaced.
#[test]
fn a_call_descriptor_is_signalled_once_when_it_is_set() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::connect(&place.socket(), PLAIN);
    hand.front.set_vring_call(0, &hand.call).unwrap();
    assert_eq!(hand.call.read().unwrap(), 1, "before the queue runs");
    hand.set_up();
    while hand.call.read().is_ok() {}
    hand.front.set_vring_call(0, &hand.call).unwrap();
    assert_eq!(hand.call.read().unwrap(), 1, "while it runs");
    let other = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    hand.front.set_vring_call(0, &other).unwrap();
    assert_eq!(other.read().unwrap(), 1);
    hand.chain(0, IN, 0, &[(DATA, 512, true)]);
    hand.push(0);
    hand.kick();
    eventually("the new descriptor is signalled", || {
        wait_readable(other.as_raw_fd())
    });
    assert!(hand.call.read().is_err(), "the old one is not");
}

/// Catches: signals that EVENT_IDX forbids, missing ones that it asks for, and kicks that are
/// lost between the last look and sleep.
#[test]
fn event_indices_are_honoured() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::ready(&place.socket(), PLAIN | F_EVENT_IDX);
    // The first publication is signalled in any case.
    assert_eq!(hand.request(IN, 0, &[(DATA, 512, true)]).1, OK);
    // Its signal may come after the request is seen to be done; taking the queue back waits.
    hand.front.set_vring_enable(0, false).unwrap();
    hand.front.set_vring_enable(0, true).unwrap();
    for round in 1..300u16 {
        // A queue that was taken back signals its first publication whatever the driver says: only
        // the one after that shows that its wish is understood.
        let (wish, signalled) = match round % 3 {
            1 => (round.wrapping_add(100), true),
            2 => (round, true),
            _ => (
                round.wrapping_add([100, 1, u16::MAX][usize::from(round / 3 % 3)]),
                false,
            ),
        };
        while hand.call.read().is_ok() {}
        hand.set_used_event(wish);
        hand.chain(0, IN, 0, &[(DATA, 512, true)]);
        let before = hand.used_index();
        hand.push(0);
        // A kick only where the device asks for one: it must not sleep with work at hand.
        if hand.avail_event() == round {
            hand.kick();
        }
        eventually("the request is done", || hand.used_index() != before);
        assert_eq!(hand.next_used().0, 0);
        if signalled {
            eventually("the signal comes", || wait_readable(hand.call.as_raw_fd()));
        } else {
            // Taking the queue back shows that the worker is past its signal.
            hand.front.set_vring_enable(0, false).unwrap();
            assert!(hand.call.read().is_err(), "a signal that nobody wants");
            hand.front.set_vring_enable(0, true).unwrap();
        }
    }
}

/// Catches: a queue that is given back in the state of a thread that is awake and wants no kicks:
/// the next to serve the ring would wait for them for ever.
#[test]
fn a_queue_that_is_given_back_wants_kicks() {
    for features in [PLAIN, PLAIN | F_EVENT_IDX] {
        let place = Place::new();
        let (_export, _) = disk(&place);
        let mut hand = Hand::ready(&place.socket(), features);
        for round in 0..10 {
            assert_eq!(hand.request(IN, 0, &[(DATA, 512, true)]).1, OK);
            hand.front.set_vring_enable(0, false).unwrap();
            if features & F_EVENT_IDX == 0 {
                assert_eq!(hand.used_flags(), 0, "round {round}");
            } else {
                assert_eq!(hand.avail_event(), round + 1);
            }
            hand.front.set_vring_enable(0, true).unwrap();
        }
    }
}

/// Catches: requests that a front-end believes it cannot get signals or send kicks for.
#[test]
fn a_queue_without_descriptors_is_polled() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::connect(&place.socket(), PLAIN);
    hand.front.set_vring_num(0, SIZE).unwrap();
    hand.front.set_vring_addr(0, &hand.rings()).unwrap();
    let none = 0x100u64.to_le_bytes();
    hand.raw_message(12, &none); // SET_VRING_KICK
    hand.raw_message(13, &none); // SET_VRING_CALL
    hand.front.set_vring_enable(0, true).unwrap();
    hand.chain(0, IN, 0, &[(DATA, 512, true)]);
    hand.push(0);
    eventually("the request is done", || hand.used_index() == 1);
}

/// Catches: a device that forgets where it was, or that works after it was told not to.
#[test]
fn a_queue_stops_and_goes_on_where_it_was() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    assert_eq!(hand.request(IN, 0, &[(DATA, 512, true)]).1, OK);
    assert_eq!(hand.request(IN, 0, &[(DATA, 512, true)]).1, OK);
    assert_eq!(hand.front.get_vring_base(0).unwrap(), 2);
    hand.chain(0, IN, 0, &[(DATA, 512, true)]);
    hand.push(0);
    hand.kick();
    assert_eq!(hand.front.get_vring_base(0).unwrap(), 2, "stopped");
    assert_eq!(hand.used_index(), 2);
    hand.front.set_vring_base(0, 2).unwrap();
    hand.front.set_vring_kick(0, &hand.kick).unwrap();
    assert_eq!(hand.next_used().0, 0, "what waited is found without a kick");

    // Disabled, and enabled again.
    hand.front.set_vring_enable(0, false).unwrap();
    hand.push(0);
    hand.kick();
    hand.front.get_features().unwrap();
    assert_eq!(hand.used_index(), 3);
    hand.front.set_vring_enable(0, true).unwrap();
    assert_eq!(hand.next_used().0, 0);

    // Rings that move while the queue runs: the new ones go on with the old indices.
    let (from, to) = (0, MOVED);
    let old = hand.memory.part(from, MOVED).to_vec();
    hand.memory.part(to, MOVED).copy_from_slice(&old);
    hand.rings = MOVED;
    hand.front.set_vring_addr(0, &hand.rings()).unwrap();
    assert_eq!(hand.request(IN, 0, &[(DATA, 512, true)]).1, OK);
    assert!(
        hand.front.set_vring_num(0, SIZE / 2).is_err(),
        "not while it runs"
    );
}

/// Catches: a reset that leaves a queue running or features in force.
#[test]
fn a_reset_device_can_be_set_up_anew() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    assert_eq!(hand.request(IN, 0, &[(DATA, 512, true)]).1, OK);
    hand.front
        .set_config(32, VhostUserConfigFlags::WRITABLE, &[0])
        .unwrap();
    hand.front.reset_device().unwrap();
    assert_eq!(hand.config(32, 1), [0], "the write cache stays as it is");
    hand.push(0);
    hand.kick();
    hand.front.get_features().unwrap();
    assert_eq!(hand.used_index(), 1, "stopped");
    hand.front.set_features(PLAIN).unwrap();
    hand.front.set_vring_num(0, SIZE).unwrap();
    hand.front.set_vring_base(0, 1).unwrap();
    hand.front.set_vring_addr(0, &hand.rings()).unwrap();
    hand.front.set_vring_kick(0, &hand.kick).unwrap();
    hand.front.set_vring_enable(0, true).unwrap();
    assert_eq!(hand.next_used().0, 0);
}

/// Catches: memory that would kill the process when touched, rings that lie nowhere, and files
/// that would block a worker. Each costs the front-end its connection and nobody else anything.
#[test]
fn hostile_messages_cost_the_connection_only() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    type Attack = fn(&mut Hand) -> bool;
    let attacks: [(&str, Attack); 12] = [
        ("a region larger than its file", |h| {
            let region = VhostUserMemoryRegionInfo {
                memory_size: MEMORY as u64 + 4096,
                ..h.region()
            };
            h.front.set_mem_table(&[region]).is_err()
        }),
        ("a region that begins behind its file", |h| {
            let region = VhostUserMemoryRegionInfo {
                mmap_offset: 1 << 40,
                ..h.region()
            };
            h.front.set_mem_table(&[region]).is_err()
        }),
        ("regions that overlap", |h| {
            h.front.set_mem_table(&[h.region(), h.region()]).is_err()
        }),
        ("a region that is no memory", |h| {
            let region = VhostUserMemoryRegionInfo {
                mmap_handle: h.kick.as_raw_fd(),
                ..h.region()
            };
            h.front.set_mem_table(&[region]).is_err()
        }),
        ("a region that is not there", |h| {
            let region = VhostUserMemoryRegionInfo {
                guest_phys_addr: 0,
                ..h.region()
            };
            h.front.remove_mem_region(&region).is_err()
        }),
        ("a ring outside memory", |h| {
            h.memory.part(0, 1);
            let mut rings = h.rings();
            rings.used_ring_addr = h.memory.addr() + MEMORY as u64 - 8;
            h.front.set_vring_addr(0, &rings).is_err()
        }),
        ("a queue that is not there", |h| {
            h.front.set_vring_num(7, 16).is_err()
        }),
        ("a size that is no power of two", |h| {
            h.front.get_vring_base(0).unwrap();
            h.front.set_vring_num(0, 15).is_err()
        }),
        ("features that are not offered", |h| {
            h.front.set_features(PLAIN | 1 << 40).is_err()
        }),
        ("a configuration that is fixed", |h| {
            h.front
                .set_config(0, VhostUserConfigFlags::WRITABLE, &[9; 8])
                .is_err()
        }),
        ("a message that is unknown", |h| {
            h.raw_message(250, &[]);
            true
        }),
        ("a message that is too short", |h| {
            h.raw_message(8, &[1, 2]);
            true
        }),
    ];
    for (what, attack) in attacks {
        let mut hand = Hand::ready(&place.socket(), PLAIN);
        assert!(attack(&mut hand), "{what} was accepted");
        hand.expect_closed();
        let mut next = Hand::ready(&place.socket(), PLAIN);
        assert_eq!(
            next.request(IN, 0, &[(DATA, 512, true)]).1,
            OK,
            "after {what}"
        );
    }
}

/// Catches: a file of another kind in the place of a kick or call.
#[test]
fn descriptors_of_the_wrong_kind_are_refused() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    for kind in ["kick", "call"] {
        let hand = Hand::ready(&place.socket(), PLAIN);
        let (pipe, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        // SAFETY: the descriptor of a socket, which is not used as the eventfd that it is not.
        let fake = unsafe {
            use std::os::fd::{FromRawFd, IntoRawFd};
            EventFd::from_raw_fd(pipe.into_raw_fd())
        };
        let result = match kind {
            "kick" => hand.front.set_vring_kick(0, &fake),
            _ => hand.front.set_vring_call(0, &fake),
        };
        assert!(result.is_err(), "{kind}");
    }
    assert_eq!(
        Hand::ready(&place.socket(), PLAIN)
            .request(IN, 0, &[(DATA, 512, true)])
            .1,
        OK
    );
}

/// Catches: memory that comes and goes while the queue runs, not followed or not let go.
#[test]
fn memory_is_added_and_removed_under_a_running_queue() {
    let place = Place::new();
    let (_export, storage) = disk(&place);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    let mut extra = Shared::new(65536);
    let at = BASE + (1 << 30);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: at,
        memory_size: 65536,
        userspace_addr: extra.addr(),
        mmap_offset: 0,
        mmap_handle: extra.file.as_raw_fd(),
    };
    assert_eq!(
        hand.request(IN, 2, &[(at, 512, true)]).1,
        IOERR,
        "not yet there"
    );
    hand.front.add_mem_region(&region).unwrap();
    assert_eq!(hand.request(IN, 2, &[(at, 512, true)]).1, OK);
    assert_eq!(extra.part(0, 512), &storage.snapshot()[2 * 512..3 * 512]);
    hand.front.remove_mem_region(&region).unwrap();
    assert_eq!(hand.request(IN, 2, &[(at, 512, true)]).1, IOERR, "gone");
    assert_eq!(
        hand.request(IN, 2, &[(DATA, 512, true)]).1,
        OK,
        "the queue goes on"
    );
    // The region that holds the rings: the queue stops, the session lives.
    hand.front.remove_mem_region(&hand.region()).unwrap();
    hand.chain(0, IN, 2, &[(DATA, 512, true)]);
    hand.push(0);
    hand.front.get_features().unwrap();
    assert_eq!(hand.used_index(), 4);
    hand.front.add_mem_region(&hand.region()).unwrap();
    assert_eq!(hand.next_used().0, 0, "it goes on with the memory");
    assert_eq!(hand.front.get_vring_base(0).unwrap(), 5);
}

/// Catches: a front-end that kills the daemon by shrinking the memory it shared (SIGBUS).
#[test]
fn memory_that_is_taken_away_costs_its_owner_only() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    assert_eq!(hand.request(IN, 0, &[(DATA, 512, true)]).1, OK);
    // From here on this side must not touch it either.
    let file = std::fs::File::from(hand.memory.file.try_clone().unwrap());
    file.set_len(0).unwrap();
    hand.kick();
    // The worker has looked at the ring when it gives the queue back.
    hand.front.get_vring_base(0).unwrap();
    drop(hand);
    let mut next = Hand::ready(&place.socket(), PLAIN);
    assert_eq!(next.request(IN, 0, &[(DATA, 512, true)]).1, OK);
}

/// Catches: indices that are compared or reduced wrongly where they wrap around.
#[test]
fn ring_indices_wrap_around() {
    let place = Place::new();
    let (_export, _) = disk(&place);
    for features in [PLAIN, PLAIN | F_EVENT_IDX] {
        let mut hand = Hand::connect(&place.socket(), features);
        hand.begin_at(65530);
        hand.set_up();
        for round in 0..40u16 {
            let before = hand.used_index();
            hand.set_used_event(before.wrapping_add(1));
            for head in [0, 4, 8] {
                hand.chain(head, IN, u64::from(round), &[(DATA, 512, true)]);
                hand.push(head);
            }
            hand.kick();
            eventually("the signal comes", || {
                hand.used_index() == before.wrapping_add(3) && wait_readable(hand.call.as_raw_fd())
            });
            let _ = hand.call.read();
            for head in [0, 4, 8] {
                assert_eq!(hand.next_used(), (head, 513));
            }
        }
        let end = 65530u16.wrapping_add(120);
        assert_eq!(hand.front.get_vring_base(0).unwrap(), u32::from(end));
    }
}
