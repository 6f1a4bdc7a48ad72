//! The split virtqueue: what the device does with its three parts in guest memory.
//!
//! The `virtio-queue` crate is not used for this: its descriptor iterator ends at a loop or a
//! bad address as it ends at the last descriptor, so that a malformed chain looks like a short
//! one; and it looks up the region of every single access. Here the three parts are translated
//! once, when the queue starts, and each access is a load or a store.
//!
//! Nothing read from the ring is trusted: indices are reduced to the ring's size or refused.
//!
//! The next to serve the ring must know what was taken from it and not answered: that is in an
//! inflight region, or else follows from the used index, since chains then come back in the order
//! in which they were taken ([`inflight`](super::inflight)).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};

use crate::export::inflight::{Again, Order, QueueRegion, Refusal, RingState, Tracker};
use crate::export::memory::GuestMemory;

/// The descriptor continues with the one named by `next`.
pub const DESC_NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// The device writes the buffer.
pub const DESC_WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// The buffer is a table of descriptors.
pub const DESC_INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// The driver wants no interrupts (without EVENT_IDX).
const AVAIL_NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
/// The device wants no kicks (without EVENT_IDX).
const USED_NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// A descriptor, as little-endian guests write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Descriptor {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// `DESC_*`.
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

/// Size of a descriptor in memory.
pub const DESC_SIZE: u64 = size_of::<Descriptor>() as u64;

#[derive(Clone, Copy)]
#[repr(C)]
struct UsedElement {
    id: u32,
    len: u32,
}

/// Where the front-end put the parts of a ring, in its own address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// The descriptor table.
    pub desc: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
}

/// The driver broke the rules so that nothing in the ring can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the available index is {ahead} ahead in a ring of {size}")]
pub struct BrokenRing {
    ahead: u16,
    size: u16,
}

/// What a successor learns of the chains that were taken.
#[derive(Debug)]
enum Account {
    /// They come back in order.
    InOrder(Order),
    /// They are in an inflight region.
    Region(Tracker),
}

/// A table of descriptors in guest memory: the ring's own, or an indirect one.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    start: usize,
    len: u32,
    /// The memory is mapped for as long as the table is used.
    _memory: std::marker::PhantomData<&'a GuestMemory>,
}

impl<'a> Table<'a> {
    /// The indirect table of `len` bytes at `addr`. `None`: it is not memory, or `len` is no
    /// multiple of a descriptor's size.
    #[must_use]
    pub fn indirect(memory: &'a GuestMemory, addr: u64, len: u32) -> Option<Self> {
        if len == 0 || !u64::from(len).is_multiple_of(DESC_SIZE) {
            return None;
        }
        Some(Self {
            start: memory.guest_to_host(addr, u64::from(len))?,
            len: len / DESC_SIZE as u32,
            _memory: std::marker::PhantomData,
        })
    }

    /// How many descriptors it has.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.len
    }

    /// The descriptor at `index`, read once: the guest may change it at any time.
    #[must_use]
    pub fn get(&self, index: u16) -> Option<Descriptor> {
        if u32::from(index) >= self.len {
            return None;
        }
        let at: *const RawDescriptor = std::ptr::with_exposed_provenance(
            self.start + usize::from(index) * size_of::<RawDescriptor>(),
        );
        // SAFETY: within the table, which was checked to be mapped; the type is packed, so that it
        // needs no alignment (indirect tables may be anywhere).
        let RawDescriptor(addr, rest) = unsafe { at.read_volatile() };
        let rest = u64::from_le(rest);
        Some(Descriptor {
            addr: u64::from_le(addr),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        })
    }
}

/// A descriptor as it lies in memory: the address, and all else in one word, which is read faster
/// than field by field.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct RawDescriptor(u64, u64);

const _: () = assert!(size_of::<RawDescriptor>() == DESC_SIZE as usize);

/// A split virtqueue in use.
#[derive(Debug)]
pub struct SplitRing {
    memory: Arc<GuestMemory>,
    size: u16,
    desc: usize,
    avail: usize,
    used: usize,
    /// The next entry of the available ring to take.
    next_avail: u16,
    /// The next entry of the used ring to fill.
    next_used: u16,
    /// The used index when a signal was last thought about.
    signalled: u16,
    /// The next publication is signalled whatever the driver said.
    force_signal: bool,
    /// The used index as the guest sees it.
    published: u16,
    event_idx: bool,
    account: Account,
}

impl SplitRing {
    /// The ring of `size` entries at `at`, which goes on at `base` of the available ring.
    ///
    /// # Errors
    /// When a part of it is misaligned or not in one memory region.
    pub fn new(
        memory: Arc<GuestMemory>,
        at: &RingAddresses,
        size: u16,
        base: u16,
        event_idx: bool,
    ) -> io::Result<Self> {
        if !size.is_power_of_two() {
            return Err(invalid(format!("a ring cannot have {size} entries")));
        }
        let entries = u64::from(size);
        let place = |what: &str, user: u64, len: u64, align: usize| {
            memory
                .user_to_host(user, len)
                .filter(|host| host.is_multiple_of(align))
                .ok_or_else(|| invalid(format!("the {what} at {user:#x} is not guest memory")))
        };
        let desc = place("descriptor table", at.desc, DESC_SIZE * entries, 16)?;
        let avail = place("available ring", at.avail, 6 + 2 * entries, 2)?;
        let used = place("used ring", at.used, 6 + 8 * entries, 4)?;
        let mut ring = Self {
            memory,
            size,
            desc,
            avail,
            used,
            next_avail: base,
            next_used: 0,
            signalled: 0,
            force_signal: true,
            published: 0,
            event_idx,
            account: Account::InOrder(Order::new(size)),
        };
        // Where we left off in the used ring, the ring itself says.
        ring.next_used = ring.used_u16(2).load(Ordering::Acquire);
        ring.published = ring.next_used;
        ring.signalled = ring.next_used;
        Ok(ring)
    }

    /// Lets an inflight region say what was taken, and from now on what is taken. The requests
    /// that a predecessor left are to be carried out again, in this order; what is taken next
    /// comes after them, whatever `base` was.
    ///
    /// # Errors
    /// When the region cannot be believed.
    pub fn track(&mut self, region: QueueRegion) -> Result<Vec<Again>, Refusal> {
        let (tracker, again) = region.recover(RingState {
            size: self.size,
            used: self.published,
            base: self.next_avail,
        })?;
        // No more than the ring has.
        self.next_avail = self.published.wrapping_add(again.len() as u16);
        self.account = Account::Region(tracker);
        Ok(again)
    }

    /// Whether the inflight region was taken away, in part at least.
    #[must_use]
    pub fn region_is_lost(&self) -> bool {
        matches!(&self.account, Account::Region(tracker) if tracker.is_lost())
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The next entry of the available ring: what `GET_VRING_BASE` answers.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The next entry of the used ring.
    #[must_use]
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// The ring's own descriptor table.
    #[must_use]
    pub fn table(&self) -> Table<'_> {
        Table {
            start: self.desc,
            len: u32::from(self.size),
            _memory: std::marker::PhantomData,
        }
    }

    /// How many chains wait.
    ///
    /// # Errors
    /// When there seem to be more than fit: the ring is unusable.
    pub fn available(&self) -> Result<u16, BrokenRing> {
        // Acquire: the entries and descriptors were written before the index.
        let index = self.avail_u16(2).load(Ordering::Acquire);
        let ahead = index.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return Err(BrokenRing {
                ahead,
                size: self.size,
            });
        }
        Ok(ahead)
    }

    /// True when the available index has moved: a cheap look for pollers.
    #[must_use]
    pub fn has_available(&self) -> bool {
        self.avail_u16(2).load(Ordering::Relaxed) != self.next_avail
    }

    /// The head of the next chain, after [`SplitRing::available`] said that there is one.
    #[must_use]
    pub fn peek(&self) -> u16 {
        let slot = usize::from(self.next_avail & (self.size - 1));
        self.avail_u16(4 + 2 * slot).load(Ordering::Relaxed)
    }

    /// Takes the next chain, which [`SplitRing::peek`] said to begin with `head` and which is not
    /// under way already. False: it is none that can be taken, since it has been answered and not
    /// shown, or there is no such descriptor.
    #[must_use]
    pub fn take(&mut self, head: u16) -> bool {
        if head >= self.size {
            return false;
        }
        match &mut self.account {
            Account::InOrder(order) => {
                if !order.take(head) {
                    return false;
                }
            }
            Account::Region(tracker) => {
                if !tracker.take(head) {
                    return false;
                }
            }
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        true
    }

    /// The calling thread is the one that serves the ring from now on.
    pub fn claim(&self) {
        if let Account::Region(tracker) = &self.account {
            tracker.claim();
        }
    }

    /// A request that a predecessor left is begun with.
    pub fn begin(&mut self, again: Again) {
        if let Account::Region(tracker) = &self.account {
            tracker.begin(again);
        }
    }

    /// A request that a predecessor left, and that was begun with, is left for later.
    pub fn leave(&mut self, again: Again) {
        if let Account::Region(tracker) = &self.account {
            tracker.leave(again);
        }
    }

    /// Leaves the chain that was taken last where it was: it is the next one again.
    pub fn put_back(&mut self, head: u16) {
        match &mut self.account {
            Account::InOrder(order) => order.put_back(),
            Account::Region(tracker) => tracker.put_back(head),
        }
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// Puts a chain into the used ring, or lets it wait for those that were taken before it.
    /// [`SplitRing::publish`] shows to the driver what is in the ring.
    #[inline(always)]
    pub fn put_used(&mut self, head: u16, len: u32) {
        match &mut self.account {
            Account::InOrder(order) => {
                if !order.done(head, len) {
                    return;
                }
            }
            Account::Region(tracker) => tracker.answer(head),
        }
        self.write_used(head, len);
        if matches!(&self.account, Account::InOrder(order) if order.has_waiting()) {
            self.put_waiting();
        }
    }

    /// Puts chains into the used ring that waited for the one that was put there last.
    #[cold]
    fn put_waiting(&mut self) {
        while let Account::InOrder(order) = &mut self.account
            && let Some((head, len)) = order.pop()
        {
            self.write_used(head, len);
        }
    }

    #[inline(always)]
    fn write_used(&mut self, head: u16, len: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let at: *mut UsedElement =
            std::ptr::with_exposed_provenance_mut(self.used + 4 + slot * size_of::<UsedElement>());
        let element = UsedElement {
            id: u32::from(head).to_le(),
            len: len.to_le(),
        };
        // SAFETY: within the used ring, which was checked to be mapped and aligned to 4.
        unsafe { at.write_volatile(element) };
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Chains in the used ring that the driver cannot see yet.
    #[must_use]
    pub fn unpublished(&self) -> u16 {
        self.next_used.wrapping_sub(self.published)
    }

    /// Shows the driver what has been used.
    pub fn publish(&mut self) {
        if self.published == self.next_used {
            return;
        }
        let count = self.unpublished();
        if let Account::Region(tracker) = &self.account {
            tracker.before_publication();
            if !tracker.is_alive() {
                return;
            }
        }
        self.published = self.next_used;
        // Release: the elements and the data come before the index.
        self.used_u16(2).store(self.published, Ordering::Release);
        if let Account::Region(tracker) = &self.account {
            tracker.after_publication(count, self.published);
        }
    }

    /// Whether the driver wants a signal for what has been published since the last call.
    pub fn needs_signal(&mut self) -> bool {
        let old = std::mem::replace(&mut self.signalled, self.published);
        if old == self.published {
            return false;
        }
        if std::mem::take(&mut self.force_signal) {
            return true;
        }
        // The driver writes its wish and then looks at the used index; we wrote the index and
        // now look at the wish. The barrier makes sure that one of us sees the other.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let wish = self.avail_u16(4 + 2 * usize::from(self.size));
            let wish = wish.load(Ordering::Relaxed);
            self.published.wrapping_sub(wish).wrapping_sub(1) < self.published.wrapping_sub(old)
        } else {
            self.avail_u16(0).load(Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// The next publication is to be signalled whatever the driver said: the call descriptor
    /// has changed.
    pub fn force_signal(&mut self) {
        self.force_signal = true;
    }

    /// Asks for kicks. True: chains became available meanwhile, for which no kick may come.
    #[must_use]
    pub fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            self.used_u16(4 + 8 * usize::from(self.size))
                .store(self.next_avail, Ordering::Relaxed);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
        }
        // The driver writes the available index and then looks whether we want a kick.
        fence(Ordering::SeqCst);
        self.has_available()
    }

    /// Asks for no kicks, as far as the driver can be told: with EVENT_IDX it sends none before
    /// the index that was last asked for comes round again.
    pub fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.used_u16(0).store(USED_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// The memory that the ring was translated with.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn avail_u16(&self, at: usize) -> &Le16 {
        // SAFETY: callers pass even offsets within the available ring, `6 + 2 * size` bytes
        // that were checked to be mapped and aligned; `memory` keeps them so.
        unsafe { le16(self.avail + at) }
    }

    fn used_u16(&self, at: usize) -> &Le16 {
        // SAFETY: as above, for the `6 + 8 * size` bytes of the used ring.
        unsafe { le16(self.used + at) }
    }
}

/// A little-endian 16-bit field that both sides use at the same time.
#[repr(transparent)]
struct Le16(AtomicU16);

impl Le16 {
    fn load(&self, order: Ordering) -> u16 {
        u16::from_le(self.0.load(order))
    }

    fn store(&self, value: u16, order: Ordering) {
        self.0.store(value.to_le(), order);
    }
}

/// # Safety
/// `at` is the address of two mapped, aligned bytes that stay so for the result's lifetime.
unsafe fn le16<'a>(at: usize) -> &'a Le16 {
    let at: *const Le16 = std::ptr::with_exposed_provenance(at);
    // SAFETY: passed on to the caller.
    unsafe { &*at }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

#[cfg(test)]
#[path = "split_tests.rs"]
mod tests;
