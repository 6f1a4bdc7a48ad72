//! What would be caught: a request that is answered twice or never because the process died
//! between two stores, whichever they are; one that takes effect after it was answered; a chain
//! without a mark; a successor that goes on at the wrong index, with rings that begin anywhere and
//! whose indices wrap, that are smaller than the region, with malformed chains and chains that are
//! left for later; queues that disturb one another; a region that is believed though it cannot be
//! true, and a reader of it that runs away.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::export::memory::{GuestMemory, RegionInfo};
use crate::export::ring::{RingAddresses, SplitRing};
use crate::shared_memory::Gate;

const LEN: u64 = 0x3000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;

fn memfd(len: u64) -> File {
    // SAFETY: the name is a string, and the descriptor is new and ours.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0)) };
    file.set_len(len).unwrap();
    file
}

/// A driver with a ring of its own, whose requests are numbered.
struct Driver {
    file: File,
    memory: Arc<GuestMemory>,
    size: u16,
    avail: u16,
    used: u16,
    /// The request whose chain begins with each descriptor.
    pending: Vec<Option<usize>>,
    /// How often each request has been answered.
    answers: Vec<u32>,
    total: usize,
}

impl Driver {
    fn new(size: u16, index: u16, total: usize) -> Self {
        let file = memfd(LEN);
        let info = RegionInfo {
            guest: 0x1_0000,
            len: LEN,
            user: 0x1_0000,
            file_offset: 0,
        };
        let memory = GuestMemory::default().with(info, file.try_clone().unwrap());
        let driver = Self {
            file,
            memory: Arc::new(memory.unwrap()),
            size,
            avail: index,
            used: index,
            pending: vec![None; usize::from(size)],
            answers: Vec::new(),
            total,
        };
        driver.put(AVAIL + 2, index);
        driver.put(USED + 2, index);
        driver
    }

    fn put(&self, at: u64, value: u16) {
        self.file.write_all_at(&value.to_le_bytes(), at).unwrap();
    }

    fn get(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Makes new requests available, with heads in no particular order.
    fn submit(&mut self, random: &mut StdRng) {
        let count = random.random_range(0..=self.size);
        for _ in 0..count {
            let free: Vec<usize> = (0..self.pending.len())
                .filter(|&head| self.pending[head].is_none())
                .collect();
            if free.is_empty() || self.answers.len() == self.total {
                break;
            }
            let head = free[random.random_range(0..free.len())];
            self.pending[head] = Some(self.answers.len());
            self.answers.push(0);
            let slot = u64::from(self.avail % self.size);
            self.put(AVAIL + 4 + 2 * slot, head as u16);
            self.avail = self.avail.wrapping_add(1);
            self.put(AVAIL + 2, self.avail);
        }
    }

    /// Takes what was answered.
    fn reap(&mut self) {
        let index = self.get(USED + 2);
        assert!(index.wrapping_sub(self.used) <= self.size, "the used index");
        while self.used != index {
            let slot = u64::from(self.used % self.size);
            let head = usize::from(self.get(USED + 4 + 8 * slot));
            let request = self.pending[head].take();
            self.answers[request.expect("an answer to nothing")] += 1;
            self.used = self.used.wrapping_add(1);
        }
    }

    /// A request takes effect.
    fn effect(&mut self, head: u16) {
        self.reap();
        let pending = self.pending[usize::from(head)];
        assert!(pending.is_some(), "an effect after the answer");
    }

    fn is_done(&self) -> bool {
        self.answers.len() == self.total && self.answers.iter().all(|&count| count == 1)
    }

    fn ring(&self, event_idx: bool) -> SplitRing {
        let at = RingAddresses {
            desc: 0x1_0000,
            avail: 0x1_0000 + AVAIL,
            used: 0x1_0000 + USED,
        };
        // What QEMU says when it has lost its back-end.
        let base = self.get(USED + 2);
        SplitRing::new(self.memory.clone(), &at, self.size, base, event_idx).unwrap()
    }
}

/// Lets so many stores pass; then the process is dead.
#[derive(Debug)]
struct Life {
    left: AtomicU64,
    dead: AtomicBool,
}

impl Life {
    fn of(stores: u64) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicU64::new(stores),
            dead: AtomicBool::new(false),
        })
    }

    fn is_over(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }
}

impl Gate for Life {
    fn is_open(&self) -> bool {
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            self.dead.store(true, Ordering::Relaxed);
            return false;
        }
        self.left.store(left - 1, Ordering::Relaxed);
        true
    }
}

/// A queue as a process has it.
struct Served {
    ring: SplitRing,
    again: Vec<Again>,
    under_way: Vec<u16>,
}

struct World {
    drivers: Vec<Driver>,
    file: File,
    layout: Layout,
    random: StdRng,
}

impl World {
    fn new(queues: u16, index: u16, seed: u64) -> Self {
        // The rings are smaller than the region, and not all alike.
        let layout = Layout::new(RingKind::Split, queues, 16).unwrap();
        let sizes = [8, 4, 16];
        Self {
            drivers: (0..usize::from(queues))
                .map(|n| Driver::new(sizes[n % 3], index.wrapping_add(n as u16), 20))
                .collect(),
            file: memfd(layout.len() as u64),
            layout,
            random: StdRng::seed_from_u64(seed),
        }
    }

    fn region(&self) -> Region {
        Region::map(self.layout, &self.file, 0, self.layout.len() as u64).unwrap()
    }

    /// A process takes the device over and serves it until it dies, or until all is done and the
    /// queues are given back. False: it died.
    fn live(&mut self, life: &Arc<Life>) -> bool {
        let region = self.region();
        region.memory.set_gate(life.clone());
        let mut queues = Vec::new();
        for (index, driver) in self.drivers.iter_mut().enumerate() {
            let mut ring = driver.ring(true);
            let mut again = ring.track(region.queue(index as u16).unwrap()).unwrap();
            again.reverse();
            assert!(
                again.len() <= usize::from(driver.size),
                "more than the ring has"
            );
            queues.push(Served {
                ring,
                again,
                under_way: Vec::new(),
            });
            if life.is_over() {
                return false;
            }
        }
        while !self.drivers.iter().all(Driver::is_done) {
            for (driver, queue) in self.drivers.iter_mut().zip(&mut queues) {
                driver.reap();
                driver.submit(&mut self.random);
                if !turn(driver, queue, life, &mut self.random) {
                    return false;
                }
            }
        }
        for (driver, queue) in self.drivers.iter_mut().zip(&mut queues) {
            assert!(!queue.ring.enable_kicks());
            let wish = driver.get(USED + 4 + 8 * u64::from(driver.size));
            assert_eq!(wish, driver.avail, "kicks are asked for at the next chain");
            assert_eq!(queue.ring.next_avail(), driver.avail);
        }
        true
    }
}

/// Serves a queue for a while. False: the process has died.
fn turn(driver: &mut Driver, queue: &mut Served, life: &Life, random: &mut StdRng) -> bool {
    while let Some(again) = queue.again.pop() {
        queue.ring.begin(again);
        if random.random_range(0..8) == 0 {
            queue.ring.leave(again);
            queue.again.push(again);
        } else {
            driver.effect(again.head);
            queue.under_way.push(again.head);
        }
        if life.is_over() {
            return false;
        }
    }
    let available = queue.ring.available().unwrap();
    for _ in 0..random.random_range(0..=available) {
        let head = queue.ring.peek();
        assert!(queue.ring.take(head));
        if life.is_over() {
            return false;
        }
        match random.random_range(0..8) {
            // No room for it.
            0 => {
                queue.ring.put_back(head);
                break;
            }
            // Malformed: it goes back at once.
            1 => queue.ring.put_used(head, 0),
            _ => {
                driver.effect(head);
                queue.under_way.push(head);
            }
        }
        if life.is_over() {
            return false;
        }
    }
    for _ in 0..random.random_range(0..=queue.under_way.len()) {
        let which = random.random_range(0..queue.under_way.len());
        let head = queue.under_way.swap_remove(which);
        driver.effect(head);
        queue.ring.put_used(head, 1);
        if life.is_over() {
            return false;
        }
        if queue.ring.unpublished() >= 8 || random.random_range(0..3) == 0 {
            queue.ring.publish();
            if life.is_over() {
                return false;
            }
        }
    }
    queue.ring.publish();
    !life.is_over()
}

/// Every end of the first process, and one of its successor during or after recovery.
fn every_cut(queues: u16, index: u16) {
    for seed in [1, 2] {
        for first in 0.. {
            let mut world = World::new(queues, index, seed);
            let done = world.live(&Life::of(first));
            if !done {
                // Most die while they take over.
                let second = world.random.random_range(0..24);
                let _ = world.live(&Life::of(second)) || world.live(&Life::of(u64::MAX));
            }
            for driver in &mut world.drivers {
                driver.reap();
                assert!(
                    driver.is_done(),
                    "{queues} queues from {index}, seed {seed}, cut {first}: {:?}",
                    driver.answers
                );
            }
            if done {
                break;
            }
        }
    }
}

#[test]
fn whenever_the_process_dies_each_request_is_answered_once() {
    every_cut(1, 0);
    every_cut(1, 0xfff6);
}

#[test]
fn so_it_is_with_several_queues() {
    every_cut(3, 0);
    every_cut(3, 0xfff9);
}

/// A small region with a ring of 8 entries, 16 descriptors, and numbers put into both by hand.
struct Still {
    driver: Driver,
    region: Region,
}

impl Still {
    fn new() -> Self {
        let layout = Layout::new(RingKind::Split, 1, 16).unwrap();
        let file = memfd(layout.len() as u64);
        let region = Region::map(layout, &file, 0, layout.len() as u64).unwrap();
        let still = Self {
            driver: Driver::new(8, 100, 0),
            region,
        };
        still.recover().unwrap();
        still
    }

    fn put(&self, at: usize, value: u16) {
        self.region.memory.store(at, value, Ordering::Relaxed);
    }

    fn mark(&self, head: u16, counter: u64) {
        let at = 16 + 16 * usize::from(head);
        self.put(at, u16::from_ne_bytes([1, 0]));
        self.region.memory.store(at + 8, counter, Ordering::Relaxed);
    }

    fn recover(&self) -> Result<(u16, Vec<u16>), Refusal> {
        let mut ring = self.driver.ring(false);
        let again = ring.track(self.region.queue(0).unwrap())?;
        let heads = again.iter().map(|again| again.head).collect();
        Ok((ring.next_avail(), heads))
    }

    fn bytes(&self) -> Vec<u8> {
        (0..self.region.memory.len())
            .map(|at| self.region.memory.load(at, Ordering::Relaxed))
            .collect()
    }
}

#[test]
fn what_was_taken_comes_again_in_that_order() {
    let still = Still::new();
    assert_eq!(still.recover(), Ok((100, vec![])));
    for (head, counter) in [(3, 7), (0, 9), (7, 8)] {
        still.mark(head, counter);
    }
    assert_eq!(still.recover(), Ok((103, vec![3, 7, 0])));
    assert_eq!(still.recover(), Ok((103, vec![3, 7, 0])), "and again");
    // Two were answered after that: 7, then 3.
    still.driver.put(USED + 2, 102);
    still.put(12, 3);
    still.put(16 + 16 * 3 + 6, 7);
    assert_eq!(still.recover(), Ok((103, vec![0])));
    assert_eq!(still.recover(), Ok((103, vec![0])));
}

#[test]
fn a_region_that_cannot_be_true_is_refused_and_left_as_it_is() {
    type Change = fn(&Still);
    let size = 8;
    let cases: [(Change, Refusal); 11] = [
        (
            |s| s.put(8, 2),
            Refusal::Version {
                version: 2,
                features: 0,
            },
        ),
        (
            |s| s.put(0, 1),
            Refusal::Version {
                version: 1,
                features: 1,
            },
        ),
        (
            |s| s.put(10, 8),
            Refusal::Descriptors {
                found: 8,
                expected: 16,
            },
        ),
        (|s| s.mark(8, 0), Refusal::Head { head: 8, ring: 8 }),
        (|s| s.put(16, 2), Refusal::Mark { head: 0, mark: 2 }),
        (
            |s| {
                s.mark(1, 0);
                s.put(14, 101);
            },
            Refusal::UsedIndex {
                region: 101,
                ring: 100,
                size,
            },
        ),
        (
            |s| {
                s.mark(1, 0);
                s.put(14, 91);
            },
            Refusal::UsedIndex {
                region: 91,
                ring: 100,
                size,
            },
        ),
        // The batch of three begins where nothing is, goes there, or in a circle.
        (
            |s| {
                s.mark(1, 0);
                s.put(14, 97);
                s.put(12, 8);
            },
            Refusal::Batch { head: 8 },
        ),
        (
            |s| {
                s.mark(1, 0);
                s.put(14, 97);
                s.put(12, 2);
                s.put(16 + 16 * 2 + 6, 0xffff);
            },
            Refusal::Batch { head: 0xffff },
        ),
        (
            |s| {
                s.mark(1, 0);
                s.put(14, 97);
                s.put(12, 2);
                s.put(16 + 16 * 2 + 6, 3);
                s.put(16 + 16 * 3 + 6, 2);
            },
            Refusal::Batch { head: 2 },
        ),
        // A ring in use, and a region that is new.
        (
            |s| {
                s.put(8, 0);
                s.driver.put(USED + 2, 90);
            },
            Refusal::Base {
                base: 100,
                used: 90,
            },
        ),
    ];
    for (change, refusal) in cases {
        let still = Still::new();
        change(&still);
        let before = still.bytes();
        let found = if let Refusal::Base { base, used } = refusal {
            let region = still.region.queue(0).unwrap();
            let recovered = region.recover(RingState { size, used, base });
            recovered.map(|_| unreachable!())
        } else {
            still.recover()
        };
        assert_eq!(found, Err(refusal));
        assert!(still.bytes() == before, "{refusal}: it was changed");
    }
}

/// A driver that was started anew, and a front-end that keeps the region.
#[test]
fn a_clean_region_serves_a_ring_that_begins_anew() {
    let still = Still::new();
    still.driver.put(USED + 2, 0);
    assert_eq!(still.recover(), Ok((0, vec![])));
    still.mark(2, 0);
    assert_eq!(still.recover(), Ok((1, vec![2])));
    still.region.clear();
    assert_eq!(still.recover(), Ok((0, vec![])), "nothing is left");
}

#[test]
fn a_ring_larger_than_the_region_is_refused() {
    let layout = Layout::new(RingKind::Split, 1, 4).unwrap();
    let file = memfd(layout.len() as u64);
    let region = Region::map(layout, &file, 0, layout.len() as u64).unwrap();
    let mut ring = Driver::new(8, 0, 0).ring(false);
    assert_eq!(
        ring.track(region.queue(0).unwrap()),
        Err(Refusal::RingSize { ring: 8, region: 4 })
    );
    assert!(region.queue(1).is_none());
}

#[test]
fn a_region_of_another_size_or_kind_is_not_mapped() {
    let layout = Layout::new(RingKind::Split, 2, 16).unwrap();
    let len = layout.len() as u64;
    let file = memfd(2 * len);
    let map = |layout, offset, len| Region::map(layout, &file, offset, len).map(|_| ());
    assert!(map(layout, 0, len).is_ok());
    assert!(map(layout, len, len).is_ok());
    assert!(map(layout, 4, len).is_err(), "not aligned");
    assert!(map(layout, 0, len - 1).is_err());
    assert!(map(layout, 0, 2 * len).is_err());
    assert!(map(layout, 2 * len, len).is_err(), "behind the file's end");
    let packed = Layout::new(RingKind::Packed, 2, 16).unwrap();
    let refusal = map(packed, 0, packed.len() as u64).unwrap_err();
    assert!(refusal.to_string().contains("packed"), "{refusal}");
}

#[test]
fn a_new_region_cannot_be_made_shorter() {
    let layout = Layout::new(RingKind::Split, 2, 16).unwrap();
    let file = Region::create(&layout).unwrap();
    assert!(file.set_len(0).is_err());
    assert!(Region::map(layout, &file, 0, layout.len() as u64).is_ok());
}

#[test]
fn a_region_that_is_taken_away_is_known_to_be() {
    let still = Still::new();
    let mut ring = still.driver.ring(false);
    ring.track(still.region.queue(0).unwrap()).unwrap();
    assert!(!ring.region_is_lost());
    let file = memfd(still.region.memory.len() as u64);
    let region = Region::map(
        still.region.layout,
        &file,
        0,
        file.metadata().unwrap().len(),
    );
    let region = region.unwrap();
    ring.track(region.queue(0).unwrap()).unwrap();
    file.set_len(0).unwrap();
    assert!(ring.take(0));
    ring.put_used(0, 0);
    ring.publish();
    assert!(ring.region_is_lost() && region.is_lost());
    assert!(!still.region.is_lost());
}
