//! What a front-end hands over as an inflight region, and a ring to go with it.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use stratablk::export::inflight::{Again, Layout, Region, RingKind};
use stratablk::export::memory::{GuestMemory, RegionInfo};
use stratablk::export::ring::{RingAddresses, SplitRing};

/// Where guest memory begins in the guest's eyes.
const BASE: u64 = 0x1_0000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Bytes of guest memory.
const LEN: u64 = 0x3000;

/// A device that was left by its back-end.
struct Left {
    memory: Arc<GuestMemory>,
    region: Region,
    size: u16,
    base: u16,
}

impl Left {
    fn ring(&self) -> SplitRing {
        let at = RingAddresses {
            desc: BASE,
            avail: BASE + AVAIL,
            used: BASE + USED,
        };
        SplitRing::new(self.memory.clone(), &at, self.size, self.base, true)
            .expect("the ring is in guest memory")
    }

    /// A back-end takes the queue over.
    fn take_over(&self) -> Option<(SplitRing, Vec<Again>)> {
        let mut ring = self.ring();
        let used = ring.next_used();
        let region = self.region.queue(0).expect("it has a queue");
        let again = ring.track(region).ok()?;
        let mut heads: Vec<u16> = again.iter().map(|again| again.head).collect();
        heads.sort_unstable();
        heads.dedup();
        assert_eq!(heads.len(), again.len(), "one twice");
        assert!(heads.iter().all(|&head| head < self.size), "{heads:?}");
        let next = used.wrapping_add(again.len() as u16);
        assert_eq!(ring.next_avail(), next);
        Some((ring, again))
    }
}

/// The target: a header that says what ring there is, and the bytes of the region.
pub fn inflight(data: &[u8]) {
    let Some((&[ring, descriptors, ahead, answers], rest)) = data.split_first_chunk() else {
        return;
    };
    let Some((&[a, b, c, d], bytes)) = rest.split_first_chunk() else {
        return;
    };
    let size: u16 = 1 << (ring % 5);
    let (used, base) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    let layout = Layout::new(RingKind::Split, 1, 1 + u16::from(descriptors % 32));
    let layout = layout.expect("a shape that queues can have");
    let file = Region::create(&layout).expect("memory");
    let bytes = bytes.get(..layout.len()).unwrap_or(bytes);
    file.write_all_at(bytes, 0).expect("written");
    let read = || {
        let mut bytes = vec![0; layout.len()];
        file.read_exact_at(&mut bytes, 0).expect("read");
        bytes
    };
    let region = Region::map(layout, &file, 0, layout.len() as u64).expect("mapped");

    // A file like any other: as large as a region of so many descriptors.
    let large = Layout::new(RingKind::Split, 1, 1024).expect("a shape that queues can have");
    let guest = Region::create(&large).expect("memory");
    let put = |at: u64, value: u16| {
        guest
            .write_all_at(&value.to_le_bytes(), at)
            .expect("written");
    };
    put(USED + 2, used);
    put(AVAIL + 2, used.wrapping_add(u16::from(ahead)));
    for slot in 0..size {
        put(
            AVAIL + 4 + 2 * u64::from(slot),
            slot.wrapping_mul(u16::from(ahead)),
        );
    }
    let info = RegionInfo {
        guest: BASE,
        len: LEN,
        user: BASE,
        file_offset: 0,
    };
    let memory = GuestMemory::default().with(info, guest.try_clone().expect("a descriptor"));
    let left = Left {
        memory: Arc::new(memory.expect("mapped")),
        region,
        size,
        base,
    };

    let before = read();
    let Some((mut ring, again)) = left.take_over() else {
        assert!(read() == before, "refused, and changed");
        return;
    };
    // A successor that does nothing leaves to the next one what it found. It may find no fresh
    // region any more, and a crash is counted once.
    let (_, same) = left.take_over().expect("what was good is good");
    let heads = |again: &[Again]| again.iter().map(|again| again.head).collect::<Vec<_>>();
    assert_eq!(heads(&same), heads(&again));

    // Some are answered, some are taken.
    let mut under_way = heads(&again);
    let answered = usize::from(answers).min(under_way.len());
    for head in under_way.drain(..answered) {
        ring.put_used(head, 0);
    }
    ring.publish();
    for _ in 0..ring.available().unwrap_or(0) {
        let head = ring.peek();
        if under_way.contains(&head) || !ring.take(head) {
            break;
        }
        under_way.push(head);
    }
    let (_, next) = left.take_over().expect("our own region is good");
    let mut next = heads(&next);
    // What was taken has the order of its numbers, which the region may have made to wrap.
    next.sort_unstable();
    under_way.sort_unstable();
    assert_eq!(next, under_way);
}
