//! What is in flight, written where it outlives the process: the inflight region of vhost-user.
//!
//! The front-end keeps a piece of shared memory for its device ([`Region`]) and hands it to each
//! back-end that serves the device. In it a [`Tracker`] marks every chain that was taken from a
//! ring and has not been answered. Should the process die, its successor finds the marks and
//! answers each of these requests once.
//!
//! The rule: a request in flight may take effect any number of times until it is answered, never
//! after; requests in flight together have no order. The used index in guest memory is the commit
//! point of an answer. Before it moves, the region names the batch of chains that it covers;
//! after it, their marks are cleared, and then the region notes the index. So the index in the
//! region tells a successor whether marks of the last batch may be left over.
//!
//! Every chain that is taken is marked, malformed ones too: the next chain to take is the used
//! index plus what is in flight, so that one missing mark would make one request run twice and
//! another be lost.
//!
//! Without a region an [`Order`] shows completions in the order in which the chains were taken.
//! Then a front-end that lost its back-end and goes on at the used index has exactly what was not
//! answered done again.
//!
//! The front-end can write what it likes into the region, at any time, and make it shorter. What
//! is read from it is read once, checked and bounded; a region that contradicts itself or its ring
//! costs its own device and nobody else's.
//!
//! Only the process's death is to be survived, not the machine's: what a thread has stored before
//! it died is in the memory, in any order of stores that the compiler keeps. Fences here are
//! therefore the compiler's.

mod layout;
mod order;
mod tracker;

// Gates are there in debug builds alone.
#[cfg(all(test, debug_assertions))]
mod cut_tests;

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use layout::{Layout, RingKind};
pub(super) use order::Order;
pub use tracker::{Again, QueueRegion, RingState, Tracker};

use crate::shared_memory::SharedMemory;

/// Why a region is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing that queues can have.
    #[error("an inflight region cannot be for {queues} queues of {size} descriptors")]
    Shape {
        /// Queues.
        queues: u16,
        /// Descriptors of each.
        size: u16,
    },
    /// Its size is not what its queues need.
    #[error(
        "the inflight region has {found} bytes, and one of this back-end has {expected} for as \
         many queues and descriptors: another back-end made it"
    )]
    Length {
        /// Bytes that it has.
        found: u64,
        /// Bytes that it would have.
        expected: u64,
    },
    /// More queues than the device has.
    #[error("the inflight region is for {found} queues, and the export has {most}")]
    Queues {
        /// Queues of the region.
        found: u16,
        /// Queues of the device.
        most: u16,
    },
    /// It is for rings that are not served.
    #[error("inflight regions of packed rings are not known")]
    Packed,
    /// Written by somebody else.
    #[error(
        "its version is {version} and its features are {features:#x}; versions 0 and 1 without \
         features are known"
    )]
    Version {
        /// Version in its header.
        version: u16,
        /// Features in its header.
        features: u64,
    },
    /// The region says another size than the front-end.
    #[error("it is for {found} descriptors, and the front-end says {expected}")]
    Descriptors {
        /// In its header.
        found: u16,
        /// In the front-end's message.
        expected: u16,
    },
    /// The ring does not fit.
    #[error("the ring has {ring} entries, and the region has {region} descriptors")]
    RingSize {
        /// Entries of the ring.
        ring: u16,
        /// Descriptors in the region.
        region: u16,
    },
    /// A chain that the ring does not have.
    #[error("descriptor {head} is in flight in it, and the ring has {ring}")]
    Head {
        /// The descriptor.
        head: u16,
        /// Entries of the ring.
        ring: u16,
    },
    /// A mark that is none.
    #[error("the mark of descriptor {head} is {mark} instead of 0 or 1")]
    Mark {
        /// The descriptor.
        head: u16,
        /// What is there.
        mark: u8,
    },
    /// More answers than a batch can have.
    #[error(
        "its used index is {region} and that of the ring is {ring}: more than the ring's {size} \
         entries apart, with requests in flight"
    )]
    UsedIndex {
        /// In the region.
        region: u16,
        /// In the ring.
        ring: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// The list of the last batch leads nowhere.
    #[error("the list of its last batch names descriptor {head} twice or in vain")]
    Batch {
        /// The descriptor.
        head: u16,
    },
    /// A ring that is in use, and a region that knows nothing of it.
    #[error(
        "the queue is to begin at available index {base} while its used index is {used}: what was \
         taken and not answered is not in the region, which is fresh"
    )]
    Base {
        /// Where the front-end says that the queue goes on.
        base: u16,
        /// The used index.
        used: u16,
    },
}

/// A region, mapped.
#[derive(Clone, Debug)]
pub struct Region {
    memory: Arc<SharedMemory>,
    layout: Layout,
}

impl Region {
    /// Memory for a new region, which begins as zeros. The front-end keeps it.
    ///
    /// # Errors
    /// The system's.
    pub fn create(layout: &Layout) -> io::Result<File> {
        const NAME: &CStr = c"inflight";
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a string.
        let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(layout.len() as u64)?;
        // Nobody is to pull it away from under us, be it by mistake.
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: no memory is passed.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(file)
    }

    /// Maps the region that is at `offset` of `file` and has `len` bytes.
    ///
    /// # Errors
    /// When it does not have the size of its layout, or cannot be mapped.
    pub fn map(layout: Layout, file: &File, offset: u64, len: u64) -> io::Result<Self> {
        let expected = layout.len() as u64;
        if layout.kind() == RingKind::Packed {
            return Err(refused(Refusal::Packed));
        }
        if len != expected {
            let found = len;
            return Err(refused(Refusal::Length { found, expected }));
        }
        if !offset.is_multiple_of(8) {
            let text = format!("the inflight region at byte {offset} of its file is not aligned");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let memory = SharedMemory::map(file, offset, len)?;
        Ok(Self::new(layout, Arc::new(memory)))
    }

    pub(crate) fn new(layout: Layout, memory: Arc<SharedMemory>) -> Self {
        Self { memory, layout }
    }

    /// What it says of queue `index`; `None` if it is for fewer queues.
    #[must_use]
    pub fn queue(&self, index: u16) -> Option<QueueRegion> {
        let at = self.layout.queue(index)?;
        QueueRegion::new(&self.memory, at, self.layout.size())
    }

    /// Makes it as new: all queues have been drained, and the device begins anew.
    pub fn clear(&self) {
        for at in self.queues() {
            self.memory
                .store(at + tracker::VERSION, 0u16, Ordering::Release);
        }
    }

    /// Whether the guest has a write cache, as the back-end before said; `None`: there was none.
    /// Where that is not clear, the guest may have switched it off.
    #[must_use]
    pub fn write_cache(&self) -> Option<bool> {
        let in_use = |at: &usize| {
            let version: u16 = self.memory.load(at + tracker::VERSION, Ordering::Acquire);
            version == tracker::IN_USE
        };
        let on = |at| {
            let cache: u8 = self.memory.load(at + tracker::CACHE, Ordering::Relaxed);
            cache == tracker::CACHE_ON
        };
        let queues = self.queues().filter(in_use);
        queues.map(on).reduce(|all, one| all & one)
    }

    /// Says whether the guest has a write cache.
    pub fn set_write_cache(&self, on: bool) {
        let cache = if on {
            tracker::CACHE_ON
        } else {
            tracker::CACHE_OFF
        };
        for at in self.queues() {
            let at = at + tracker::CACHE;
            self.memory.store(at, cache, Ordering::Release);
        }
    }

    /// Where the queues' regions begin.
    fn queues(&self) -> impl Iterator<Item = usize> {
        (0..self.layout.queues()).filter_map(|index| self.layout.queue(index))
    }

    /// Whether some of it was taken away.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.memory.is_lost()
    }
}

fn refused(refusal: Refusal) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, refusal)
}
