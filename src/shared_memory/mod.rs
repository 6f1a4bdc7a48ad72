//! Memory shared with other processes, which outlives this one: parts of files, mapped.
//!
//! * [`mapping`]: which files are mapped, and how much of them;
//! * [`sigbus`]: what becomes of an access when the file was cut short;
//! * [`SharedMemory`]: words in such memory that the next process relies on, and [`Records`] of
//!   them for stores that are made for every request;
//! * [`crash`]: bytes of it that are set when the process crashes.
//!
//! Guests' memory is read and written by the kernel and by the rings; what this process keeps for
//! its successor goes through [`SharedMemory`] alone: each store there is a step after which the
//! process may die. Tests end it at any of them, through a [`Gate`].

pub mod crash;
pub(crate) mod mapping;
pub(crate) mod sigbus;

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;
#[cfg(debug_assertions)]
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use mapping::Mapping;

/// What decides whether the process still lives: asked before each store. Once it is closed all
/// stores are lost, as those of a dead process would be.
#[cfg(debug_assertions)]
pub trait Gate: std::fmt::Debug + Send + Sync {
    /// Whether the next store takes place.
    fn is_open(&self) -> bool;
}

/// A part of a file, mapped, with words in the machine's byte order.
///
/// It may be written by other processes at any time. Should the file be cut short, it reads as
/// zeros from then on and stores go nowhere: [`SharedMemory::is_lost`].
#[derive(Debug)]
pub struct SharedMemory {
    mapping: Mapping,
    len: usize,
    #[cfg(debug_assertions)]
    gate: OnceLock<Arc<dyn Gate>>,
}

mod sealed {
    use std::sync::atomic::Ordering;

    /// A number that can be loaded and stored in one step.
    pub trait Word: Copy + Default {
        /// # Safety
        /// `at` is aligned and is in memory that stays mapped during the call, and is accessed
        /// by atomic operations alone.
        unsafe fn load(at: *mut u8, order: Ordering) -> Self;
        /// # Safety
        /// As for `load`.
        unsafe fn store(self, at: *mut u8, order: Ordering);
    }
}

/// Numbers that a [`SharedMemory`] consists of: 8, 16, 32 or 64 bits.
pub trait Word: sealed::Word {}

macro_rules! words {
    ($($number:ty: $atomic:ty),+) => {$(
        impl sealed::Word for $number {
            unsafe fn load(at: *mut u8, order: Ordering) -> Self {
                // SAFETY: the caller's promise.
                unsafe { <$atomic>::from_ptr(at.cast()) }.load(order)
            }

            unsafe fn store(self, at: *mut u8, order: Ordering) {
                // SAFETY: the caller's promise.
                unsafe { <$atomic>::from_ptr(at.cast()) }.store(self, order);
            }
        }

        impl Word for $number {}
    )+};
}
words!(u8: AtomicU8, u16: AtomicU16, u32: AtomicU32, u64: AtomicU64);

impl SharedMemory {
    /// Maps `[offset, offset + len)` of `file`, which is not empty.
    ///
    /// # Errors
    /// When it is larger than its file, the file is none that can be mapped safely, or the
    /// process has no room for it.
    pub fn map(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
        if len == 0 || offset.checked_add(len).is_none() {
            return Err(invalid("a part of a file that cannot be mapped"));
        }
        Ok(Self {
            mapping: Mapping::new(file, offset, len)?,
            len: usize::try_from(len).map_err(|_| invalid("too much to be mapped"))?,
            #[cfg(debug_assertions)]
            gate: OnceLock::new(),
        })
    }

    /// Bytes that it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether some of it was taken away: its file was cut short.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// From now on stores take place only while `gate` is open. Can be said once.
    #[cfg(debug_assertions)]
    pub fn set_gate(&self, gate: Arc<dyn Gate>) {
        let _ = self.gate.set(gate);
    }

    /// The number at byte `at`, which must be within the memory and aligned: 0 if it is not.
    #[inline]
    #[must_use]
    pub fn load<T: Word>(&self, at: usize, order: Ordering) -> T {
        match self.place::<T>(at) {
            // SAFETY: it is aligned and within the mapping, which lives as long as `self`; nobody
            // of this process accesses it in another way.
            Some(place) => unsafe { T::load(place, order) },
            None => T::default(),
        }
    }

    /// Whether the process still lives, as its [`Gate`] says: asked before a step that is no store
    /// in here and that must not come after its end either. Costs nothing in release builds.
    #[inline]
    #[must_use]
    pub fn is_alive(&self) -> bool {
        #[cfg(debug_assertions)]
        return self.gate.get().is_none_or(|gate| gate.is_open());
        #[cfg(not(debug_assertions))]
        true
    }

    /// `count` records of `LEN` bytes from byte `at` on. `None`: they are not all within the
    /// memory, or they are not aligned to 8.
    #[must_use]
    pub fn records<const LEN: usize>(
        self: &Arc<Self>,
        at: usize,
        count: usize,
    ) -> Option<Records<LEN>> {
        const { assert!(LEN > 0 && LEN.is_multiple_of(8)) };
        let end = LEN.checked_mul(count)?.checked_add(at)?;
        let start = self.mapping.start().checked_add(at)?;
        (end <= self.len && start.is_multiple_of(8)).then(|| Records {
            memory: self.clone(),
            start,
            count,
        })
    }

    /// Stores a number at byte `at`, which must be within the memory and aligned: it is lost if it
    /// is not.
    #[inline]
    pub fn store<T: Word>(&self, at: usize, value: T, order: Ordering) {
        if !self.is_alive() {
            return;
        }
        if let Some(place) = self.place::<T>(at) {
            // SAFETY: as for `load`.
            unsafe { value.store(place, order) };
        }
    }

    #[inline]
    fn place<T: Word>(&self, at: usize) -> Option<*mut u8> {
        let inside = at < self.len && self.len - at >= size_of::<T>();
        let address = self.mapping.start().wrapping_add(at);
        let fits = inside && address.is_multiple_of(align_of::<T>());
        debug_assert!(fits, "byte {at} of {} of shared memory", self.len);
        fits.then(|| ptr::with_exposed_provenance_mut(address))
    }
}

/// Records of `LEN` bytes in shared memory, one after the other, whose place was checked once.
#[derive(Debug)]
pub struct Records<const LEN: usize> {
    memory: Arc<SharedMemory>,
    start: usize,
    count: usize,
}

impl<const LEN: usize> Records<LEN> {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// The memory that they are in.
    #[must_use]
    pub fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// The record at `index`, if there is one.
    #[inline]
    #[must_use]
    pub fn get(&self, index: usize) -> Option<Record<'_, LEN>> {
        (index < self.count).then(|| Record {
            start: ptr::with_exposed_provenance_mut(self.start + index * LEN),
            #[cfg(debug_assertions)]
            memory: &self.memory,
            _memory: PhantomData,
        })
    }
}

/// One of [`Records`].
#[derive(Clone, Copy, Debug)]
pub struct Record<'a, const LEN: usize> {
    start: *mut u8,
    #[cfg(debug_assertions)]
    memory: &'a SharedMemory,
    _memory: PhantomData<&'a SharedMemory>,
}

impl<const LEN: usize> Record<'_, LEN> {
    /// The number at byte `AT` of the record.
    #[inline]
    #[must_use]
    pub fn load<T: Word, const AT: usize>(self, order: Ordering) -> T {
        // SAFETY: as for the store.
        unsafe { T::load(self.place::<T, AT>(), order) }
    }

    /// Stores a number at byte `AT` of the record.
    #[inline]
    pub fn store<T: Word, const AT: usize>(self, value: T, order: Ordering) {
        #[cfg(debug_assertions)]
        if !self.memory.is_alive() {
            return;
        }
        // SAFETY: the record is within the mapping, which lives as long as what this was borrowed
        // from, and begins at a multiple of 8; `place` looked at the rest. Nobody of this process
        // accesses the memory in another way.
        unsafe { value.store(self.place::<T, AT>(), order) };
    }

    #[inline]
    fn place<T: Word, const AT: usize>(self) -> *mut u8 {
        const { assert!(AT + size_of::<T>() <= LEN && AT.is_multiple_of(align_of::<T>())) };
        self.start.wrapping_add(AT)
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: words that go elsewhere, stores of a process that is dead, and a
    //! process that dies with the file.

    use std::os::fd::FromRawFd;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::AtomicU64;

    use super::*;

    fn memory(len: u64) -> File {
        // SAFETY: the name is a string, and the descriptor is new and ours.
        let file =
            unsafe { File::from_raw_fd(libc::memfd_create(c"shared".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn words_are_in_the_file() {
        let file = memory(8192);
        let shared = SharedMemory::map(&file, 4096 + 64, 128).unwrap();
        assert_eq!(shared.len(), 128);
        shared.store(8, 0x1122_3344_5566_7788_u64, Ordering::Release);
        shared.store(127, 9u8, Ordering::Relaxed);
        let mut bytes = [0; 128];
        file.read_exact_at(&mut bytes, 4096 + 64).unwrap();
        assert_eq!(bytes[8..16], 0x1122_3344_5566_7788_u64.to_ne_bytes());
        assert_eq!(bytes[127], 9);
        assert_eq!(shared.load::<u32>(12, Ordering::Acquire), 0x1122_3344);
        assert!(SharedMemory::map(&file, 8000, 200).is_err());
        assert!(SharedMemory::map(&file, 0, 0).is_err());
    }

    /// Lets so many stores pass.
    #[derive(Debug)]
    struct Budget(AtomicU64);

    impl Gate for Budget {
        fn is_open(&self) -> bool {
            self.0
                .try_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    left.checked_sub(1)
                })
                .is_ok()
        }
    }

    #[test]
    fn the_dead_store_nothing() {
        let shared = SharedMemory::map(&memory(4096), 0, 4096).unwrap();
        shared.set_gate(Arc::new(Budget(AtomicU64::new(2))));
        for at in 0..4 {
            shared.store(at, 1u8, Ordering::Relaxed);
        }
        assert_eq!(shared.load::<u32>(0, Ordering::Relaxed), 0x0000_0101);
    }

    #[test]
    fn records_are_where_they_were_checked_to_be() {
        let shared = Arc::new(SharedMemory::map(&memory(4096), 0, 4096).unwrap());
        let records = shared.records::<16>(4096 - 48, 3).unwrap();
        records
            .get(2)
            .unwrap()
            .store::<u64, 8>(5, Ordering::Relaxed);
        assert_eq!(shared.load::<u64>(4096 - 8, Ordering::Relaxed), 5);
        let record = records.get(2).unwrap();
        assert_eq!(record.load::<u32, 8>(Ordering::Relaxed), 5);
        assert!(records.get(3).is_none());
        assert!(shared.records::<16>(4096 - 48, 4).is_none(), "too many");
        assert!(shared.records::<16>(4, 1).is_none(), "not aligned");
        shared.set_gate(Arc::new(Budget(AtomicU64::new(0))));
        record.store::<u64, 8>(6, Ordering::Relaxed);
        assert_eq!(record.load::<u64, 8>(Ordering::Relaxed), 5, "dead");
    }

    #[test]
    fn a_file_that_is_cut_short_costs_nobody_else() {
        let file = memory(4096);
        let shared = SharedMemory::map(&file, 0, 4096).unwrap();
        shared.store(0, 7u64, Ordering::Relaxed);
        assert!(!shared.is_lost());
        file.set_len(0).unwrap();
        assert_eq!(shared.load::<u64>(0, Ordering::Relaxed), 0);
        assert!(shared.is_lost());
    }
}
