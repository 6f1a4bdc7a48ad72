//! The guest's side of a split virtqueue, in memory that outlives the back-end.
//!
//! Unlike a driver crate's, this ring goes on over any number of back-ends, begins at any index,
//! and reports an element that no request asked for instead of taking it for an error of its own.

use crate::common::memory::Memory;
use crate::common::rng::Rng;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

/// Where guest memory begins in the guest's eyes.
pub const GUEST_BASE: u64 = 0x4000_0000;
/// Bytes that a ring of up to 128 entries takes.
pub const RING_BYTES: usize = 0x2000;
const AVAIL: usize = 0x1000;
const USED: usize = 0x1800;

const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;
const INDIRECT: u16 = 4;

/// One descriptor's worth of memory: where it lies, how long it is, whether the device writes it.
#[derive(Clone, Copy)]
pub struct Piece {
    /// Offset in the shared memory.
    pub at: usize,
    /// Bytes.
    pub len: usize,
    /// The device writes it.
    pub device_writes: bool,
}

/// A split virtqueue.
pub struct Ring {
    memory: Arc<Memory>,
    at: usize,
    size: u16,
    avail: u16,
    used: u16,
    free: Vec<u16>,
}

impl Ring {
    /// An empty ring of `size` entries at offset `at`, whose indices begin at `index`.
    pub fn new(memory: Arc<Memory>, at: usize, size: u16, index: u16) -> Self {
        memory.write(at, &[0; RING_BYTES]);
        let ring = Ring {
            memory,
            at,
            size,
            avail: index,
            used: index,
            free: (0..size).collect(),
        };
        ring.word(AVAIL + 2).store(index, Ordering::SeqCst);
        ring.word(USED + 2).store(index, Ordering::SeqCst);
        ring
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Offsets of descriptor table, available ring and used ring in the shared memory.
    pub fn parts(&self) -> (usize, usize, usize) {
        (self.at, self.at + AVAIL, self.at + USED)
    }

    fn word(&self, at: usize) -> &AtomicU16 {
        let address = self.memory.address(self.at + at);
        // SAFETY: the offset is even and inside the shared memory, which lives as long as `self`;
        // every other access to this place is atomic too, or the back-end's.
        unsafe { &*(address as *const AtomicU16) }
    }

    fn long(&self, at: usize) -> &AtomicU32 {
        let address = self.memory.address(self.at + at);
        // SAFETY: as for `word`; the offset is a multiple of four.
        unsafe { &*(address as *const AtomicU32) }
    }

    /// Makes a chain of `pieces` available; the head's number, or None if too few descriptors are
    /// free. `table` is the place of an indirect table, if the chain is to be one. Which
    /// descriptors a chain gets is random, as in a guest that has run for long.
    pub fn push(&mut self, pieces: &[Piece], table: Option<usize>, rng: &mut Rng) -> Option<u16> {
        let wanted = if table.is_some() { 1 } else { pieces.len() };
        if self.free.len() < wanted {
            return None;
        }
        let mut descriptors = Vec::new();
        for _ in 0..wanted {
            let chosen = rng.below(self.free.len() as u64) as usize;
            descriptors.push(self.free.swap_remove(chosen));
        }
        let head = *descriptors.first()?;
        let indirect = table.inspect(|&at| {
            let list = Piece {
                at,
                len: 16 * pieces.len(),
                device_writes: false,
            };
            self.describe(self.at + 16 * usize::from(head), list, INDIRECT, 0);
        });
        for (i, &piece) in pieces.iter().enumerate() {
            let next = match indirect {
                Some(_) => (i + 1 < pieces.len()).then_some(i as u16 + 1),
                None => descriptors.get(i + 1).copied(),
            };
            let place = match (indirect, descriptors.get(i)) {
                (Some(at), _) => at + 16 * i,
                (None, Some(&index)) => self.at + 16 * usize::from(index),
                (None, None) => return None,
            };
            let flags = if next.is_some() { NEXT } else { 0 };
            let writes = if piece.device_writes {
                DEVICE_WRITES
            } else {
                0
            };
            self.describe(place, piece, flags | writes, next.unwrap_or_default());
        }
        let slot = usize::from(self.avail % self.size);
        self.word(AVAIL + 4 + 2 * slot)
            .store(head, Ordering::Relaxed);
        self.avail = self.avail.wrapping_add(1);
        self.word(AVAIL + 2).store(self.avail, Ordering::Release);
        Some(head)
    }

    fn describe(&self, at: usize, piece: Piece, flags: u16, next: u16) {
        let mut bytes = Vec::with_capacity(16);
        bytes.extend((GUEST_BASE + piece.at as u64).to_le_bytes());
        bytes.extend((piece.len as u32).to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write(at, &bytes);
    }

    /// Gives the descriptors of the chain at `head` back, as they stand in the table.
    pub fn release(&mut self, head: u16) {
        let mut index = head;
        for _ in 0..self.size {
            self.free.push(index);
            let mut bytes = [0; 4];
            self.memory
                .read(self.at + 16 * usize::from(index) + 12, &mut bytes);
            let [f0, f1, n0, n1] = bytes;
            if u16::from_le_bytes([f0, f1]) & NEXT == 0 {
                break;
            }
            index = u16::from_le_bytes([n0, n1]);
        }
    }

    /// The used index as it is in memory: what a front-end gives as the base after a kill.
    pub fn used_index(&self) -> u16 {
        self.word(USED + 2).load(Ordering::Acquire)
    }

    /// How many elements wait to be taken.
    pub fn waiting(&self) -> u16 {
        self.used_index().wrapping_sub(self.used)
    }

    /// The next used element, if there is one: the number that the device put there.
    pub fn pop(&mut self) -> Option<u32> {
        if self.waiting() == 0 {
            return None;
        }
        let slot = usize::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        Some(self.long(USED + 4 + 8 * slot).load(Ordering::Relaxed))
    }

    /// Asks for a signal at the next element; false if there is one already.
    pub fn arm(&self) -> bool {
        self.word(AVAIL + 4 + 2 * usize::from(self.size))
            .store(self.used, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.waiting() == 0
    }

    /// Whether the device asked to be told about what was made available since `since`.
    pub fn kick_wanted(&self, since: u16, event_idx: bool) -> bool {
        fence(Ordering::SeqCst);
        if !event_idx {
            return self.word(USED).load(Ordering::SeqCst) & 1 == 0;
        }
        let event = self
            .word(USED + 4 + 8 * usize::from(self.size))
            .load(Ordering::SeqCst);
        let new = self.avail;
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(since)
    }

    /// The index behind the last chain that was made available.
    pub fn avail_index(&self) -> u16 {
        self.avail
    }
}
