//! What would be caught: a signal or a kick too many or too few by an event index that is off by
//! one, at any distance and where the 16-bit indices wrap; a look for chains that is left out
//! after kicks were asked for; an entry in the wrong slot; an index that can be seen before it is
//! published; a ring that forgets where it was; a completion that overtakes another where the used
//! index must say what was answered.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use super::*;
use crate::export::memory::RegionInfo;

const BASE: u64 = 0x1_0000;
const LEN: u64 = 0x4000;
const DESC: u64 = BASE;
const AVAIL: u64 = BASE + 0x1000;
const USED: u64 = BASE + 0x2000;
const SIZE: u16 = 8;

/// The driver's side of a ring.
struct Driver {
    file: File,
    memory: Arc<GuestMemory>,
    size: u16,
}

impl Driver {
    fn new() -> Self {
        // SAFETY: the descriptor is new and ours.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0)) };
        file.set_len(LEN).unwrap();
        let info = RegionInfo {
            guest: BASE,
            len: LEN,
            user: BASE,
            file_offset: 0,
        };
        let memory = GuestMemory::default().with(info, file.try_clone().unwrap());
        Self {
            file,
            memory: Arc::new(memory.unwrap()),
            size: SIZE,
        }
    }

    fn put(&self, at: u64, value: u16) {
        let bytes = value.to_le_bytes();
        self.file.write_all_at(&bytes, at - BASE).unwrap();
    }

    fn get(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.file.read_exact_at(&mut bytes, at - BASE).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// The index whose use the driver wants to hear of (in the available ring).
    fn set_used_event(&self, index: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(self.size), index);
    }

    /// The index whose coming the device wants to hear of (in the used ring).
    fn avail_event(&self) -> u16 {
        self.get(USED + 4 + 8 * u64::from(self.size))
    }

    fn set_avail_index(&self, index: u16) {
        self.put(AVAIL + 2, index);
    }

    fn ring(&self, index: u16, event_idx: bool) -> SplitRing {
        let at = RingAddresses {
            desc: DESC,
            avail: AVAIL,
            used: USED,
        };
        self.put(USED + 2, index);
        self.set_avail_index(index);
        SplitRing::new(self.memory.clone(), &at, self.size, index, event_idx).unwrap()
    }

    /// A ring at work at `index`: the signal that every ring begins with has been given.
    fn used_ring(&self, index: u16, event_idx: bool) -> SplitRing {
        let mut ring = self.ring(index.wrapping_sub(1), event_idx);
        use_chains(&mut ring, 1);
        assert!(ring.needs_signal(), "the first publication is signalled");
        ring
    }
}

fn use_chains(ring: &mut SplitRing, count: u16) {
    for head in 0..count {
        assert!(ring.take(head % SIZE));
        ring.put_used(head % SIZE, 0);
    }
    ring.publish();
}

/// Indices around which something wraps.
fn interesting() -> impl Iterator<Item = u16> {
    [0, 1, 7, 8, 0x7fff, 0x8000, 0xfff7, 0xfff8, 0xfffe, 0xffff].into_iter()
}

/// Virtio 1.2, 2.7.7.1: the driver is signalled when the entry at the index that it wrote is used.
#[test]
fn a_signal_comes_when_the_wished_for_entry_is_among_those_published() {
    let driver = Driver::new();
    for old in interesting() {
        for count in 1..=SIZE {
            for ahead in -10..=10_i16 {
                let wish = old.wrapping_add_signed(ahead);
                let mut ring = driver.used_ring(old, true);
                driver.set_used_event(wish);
                use_chains(&mut ring, count);
                let expected = (0..count).any(|n| old.wrapping_add(n) == wish);
                assert_eq!(
                    ring.needs_signal(),
                    expected,
                    "entries from {old}, {count} of them, wish {wish}"
                );
                assert!(!ring.needs_signal(), "twice for one publication");
            }
        }
    }
}

#[test]
fn what_is_not_published_is_not_signalled_for() {
    let driver = Driver::new();
    for event_idx in [false, true] {
        let mut ring = driver.used_ring(5, event_idx);
        driver.set_used_event(5);
        assert!(!ring.needs_signal());
        assert!(ring.take(3));
        ring.put_used(3, 0);
        assert!(!ring.needs_signal());
        assert_eq!((driver.get(USED + 2), ring.unpublished()), (5, 1));
        ring.publish();
        assert_eq!((driver.get(USED + 2), ring.unpublished()), (6, 0));
        assert!(ring.needs_signal());
    }
}

#[test]
fn without_event_indices_the_flag_decides() {
    let driver = Driver::new();
    let mut ring = driver.used_ring(0, false);
    // An index that would decide otherwise.
    driver.set_used_event(100);
    for (flag, expected) in [(0, true), (AVAIL_NO_INTERRUPT, false), (0, true)] {
        driver.put(AVAIL, flag);
        use_chains(&mut ring, 1);
        assert_eq!(ring.needs_signal(), expected);
    }
    driver.set_avail_index(ring.next_avail());
    ring.disable_kicks();
    assert_eq!(driver.get(USED), USED_NO_NOTIFY);
    assert!(!ring.enable_kicks());
    assert_eq!(driver.get(USED), 0);
}

#[test]
fn a_changed_call_descriptor_is_signalled_once_whatever_the_driver_wishes() {
    let driver = Driver::new();
    let mut ring = driver.used_ring(0, true);
    driver.set_used_event(1000);
    ring.force_signal();
    assert!(!ring.needs_signal(), "nothing is new");
    use_chains(&mut ring, 1);
    assert!(ring.needs_signal());
    use_chains(&mut ring, 1);
    assert!(!ring.needs_signal());
}

/// The driver kicks when it makes the entry at the index available that the device wrote.
#[test]
fn a_kick_is_asked_for_at_the_next_entry_and_what_came_before_is_seen() {
    let driver = Driver::new();
    for index in interesting() {
        for event_idx in [false, true] {
            let mut ring = driver.ring(index, event_idx);
            assert!(!ring.enable_kicks() && !ring.has_available());
            if event_idx {
                assert_eq!(driver.avail_event(), index);
            }
            driver.set_avail_index(index.wrapping_add(2));
            assert!(ring.has_available());
            assert!(ring.enable_kicks(), "two chains came, without a kick");
            assert_eq!(ring.available(), Ok(2));
            assert!(ring.take(0) && ring.take(1));
            assert!(!ring.enable_kicks());
            if event_idx {
                assert_eq!(driver.avail_event(), index.wrapping_add(2));
            }
        }
    }
}

#[test]
fn a_full_ring_is_served_and_one_more_is_refused() {
    let driver = Driver::new();
    for index in interesting() {
        let ring = driver.ring(index, true);
        for ahead in [0, 1, SIZE - 1, SIZE] {
            driver.set_avail_index(index.wrapping_add(ahead));
            assert_eq!(ring.available(), Ok(ahead));
        }
        for ahead in [SIZE + 1, 0x8000, 0xffff] {
            driver.set_avail_index(index.wrapping_add(ahead));
            let size = SIZE;
            assert_eq!(ring.available(), Err(BrokenRing { ahead, size }));
        }
    }
}

#[test]
fn entries_go_round() {
    let driver = Driver::new();
    for index in interesting() {
        let mut ring = driver.ring(index, true);
        for n in 0..20_u16 {
            let at = index.wrapping_add(n);
            let slot = u64::from(at % SIZE);
            driver.put(AVAIL + 4 + 2 * slot, n % SIZE);
            assert_eq!(ring.peek(), n % SIZE);
            assert!(ring.take(n % SIZE));
            assert_eq!(ring.next_avail(), at.wrapping_add(1));
            ring.put_used(n % SIZE, 7);
            assert_eq!(driver.get(USED + 4 + 8 * slot), n % SIZE);
            assert_eq!(driver.get(USED + 8 + 8 * slot), 7);
            assert_eq!(driver.get(USED + 2), at, "not yet");
            ring.publish();
            assert_eq!(driver.get(USED + 2), at.wrapping_add(1));
        }
    }
}

/// Without an inflight region the used index alone says what was answered.
#[test]
fn completions_are_shown_in_the_order_of_the_chains() {
    let driver = Driver::new();
    for index in interesting() {
        let mut ring = driver.ring(index, true);
        for head in [5, 2, 7] {
            assert!(ring.take(head));
        }
        assert!(!ring.take(SIZE), "there is no such descriptor");
        ring.put_used(7, 70);
        ring.put_used(2, 20);
        ring.publish();
        assert_eq!(driver.get(USED + 2), index, "5 is not done");
        assert!(!ring.take(7), "it has not been shown");
        ring.put_used(5, 50);
        assert_eq!(ring.unpublished(), 3);
        ring.publish();
        assert_eq!(driver.get(USED + 2), index.wrapping_add(3));
        for (n, head) in [(0, 5), (1, 2), (2, 7)] {
            let at = USED + 4 + 8 * u64::from(index.wrapping_add(n) % SIZE);
            assert_eq!((driver.get(at), driver.get(at + 4)), (head, 10 * head));
        }
        assert!(ring.take(7));
        ring.put_back(7);
        assert_eq!(ring.next_avail(), index.wrapping_add(3));
    }
}

#[test]
fn parts_that_are_misaligned_or_no_memory_are_refused() {
    let driver = Driver::new();
    let good = RingAddresses {
        desc: DESC,
        avail: AVAIL,
        used: USED,
    };
    let new = |at: &RingAddresses, size| SplitRing::new(driver.memory.clone(), at, size, 0, true);
    assert!(new(&good, SIZE).is_ok());
    for size in [0, 3, 9] {
        assert!(new(&good, size).is_err(), "{size}");
    }
    let end = BASE + LEN;
    // The sizes, with the event indices, are those of Virtio 1.2, 2.7.
    for (desc, avail, used) in [
        (DESC + 8, AVAIL, USED),
        (DESC, AVAIL + 1, USED),
        (DESC, AVAIL, USED + 2),
        (end - 16 * u64::from(SIZE) + 16, AVAIL, USED),
        (DESC, end - 6 - 2 * u64::from(SIZE) + 2, USED),
        (DESC, AVAIL, end - 4 - 8 * u64::from(SIZE)),
        (BASE - 16, AVAIL, USED),
        (DESC, u64::MAX - 1, USED),
    ] {
        let at = RingAddresses { desc, avail, used };
        assert!(new(&at, SIZE).is_err(), "{at:x?}");
    }
}
