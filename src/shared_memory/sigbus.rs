//! Guest memory that is taken away.
//!
//! A front-end can shrink the file behind a region after it was mapped, or share huge pages of
//! which none is free; an access then raises SIGBUS, which would end the whole process with all
//! its other exports. The handler here puts fresh zeros in the place of such a region instead:
//! its guest has lost its memory, and nobody else anything. Faults anywhere else go to the
//! handler that was there before.
//!
//! The table of regions grows by chunks that are never given back, so that the handler can walk
//! it without a lock, and a region is guarded or refused.

use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use parking_lot::Mutex;

use super::crash;

/// Regions by which the table grows.
const CHUNK: usize = 512;

/// A protected range. Written under [`FREE`]'s lock, read by the signal handler without
/// one: `version` is odd while the numbers change.
#[derive(Debug, Default)]
struct Slot {
    version: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    /// Size of the mapping's pages: the least that can be replaced.
    page: AtomicUsize,
    /// Zeros were put in its place.
    lost: AtomicBool,
}

#[derive(Debug)]
struct Chunk {
    slots: [Slot; CHUNK],
    next: OnceLock<&'static Chunk>,
}

#[derive(Debug)]
struct Free {
    slots: Vec<&'static Slot>,
    last: Option<&'static Chunk>,
}

static FIRST: OnceLock<&'static Chunk> = OnceLock::new();
static FREE: Mutex<Free> = Mutex::new(Free {
    slots: Vec::new(),
    last: None,
});
/// What was in force before; nothing if the handler could not be installed.
static OLD_ACTION: OnceLock<Option<libc::sigaction>> = OnceLock::new();
/// How often zeros were put in the place of memory.
static LOST: AtomicUsize = AtomicUsize::new(0);

/// What the handler knows of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: usize,
    len: usize,
    page: usize,
}

impl Slot {
    fn set(&self, range: Range) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(range.start, Ordering::Relaxed);
        self.len.store(range.len, Ordering::Relaxed);
        self.page.store(range.page, Ordering::Relaxed);
        self.lost.store(false, Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    fn get(&self) -> Option<Range> {
        let version = self.version.load(Ordering::Acquire);
        let range = Range {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            page: self.page.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        let same = self.version.load(Ordering::Relaxed) == version;
        (same && version.is_multiple_of(2) && range.len > 0).then_some(range)
    }
}

impl Free {
    /// A slot that nobody uses, of a new chunk if need be.
    fn take(&mut self) -> Option<&'static Slot> {
        if self.slots.is_empty() {
            let chunk: &'static Chunk = Box::leak(Box::new(Chunk {
                slots: std::array::from_fn(|_| Slot::default()),
                next: OnceLock::new(),
            }));
            // The one place that sets them, under the lock.
            let _ = self.last.map_or(&FIRST, |last| &last.next).set(chunk);
            self.last = Some(chunk);
            self.slots.extend(&chunk.slots);
        }
        self.slots.pop()
    }
}

/// All slots that there are. Reads atomics alone.
fn slots() -> impl Iterator<Item = &'static Slot> {
    std::iter::successors(FIRST.get().copied(), |chunk| chunk.next.get().copied())
        .flat_map(|chunk| &chunk.slots)
}

/// Protects a mapping until it is dropped, which must be before the mapping goes.
#[derive(Debug)]
pub(crate) struct Guard {
    slot: &'static Slot,
}

impl Guard {
    /// Protects `[start, start + len)`, which is a mapping of the caller's, of whole pages of
    /// `page` bytes.
    ///
    /// # Errors
    /// When SIGBUS cannot be caught.
    pub(crate) fn new(start: usize, len: usize, page: usize) -> io::Result<Self> {
        install()?;
        let mut free = FREE.lock();
        let slot = free
            .take()
            .ok_or_else(|| io::Error::other("no memory region can be guarded"))?;
        slot.set(Range { start, len, page });
        Ok(Self { slot })
    }

    /// Whether some of the memory was taken away.
    pub(crate) fn is_lost(&self) -> bool {
        self.slot.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut free = FREE.lock();
        self.slot.set(Range {
            start: 0,
            len: 0,
            page: 0,
        });
        free.slots.push(self.slot);
    }
}

/// How often memory has been taken away from this process: a cheap look. If it has changed, ask
/// your own guards, which know by then.
pub(crate) fn lost() -> usize {
    LOST.load(Ordering::Acquire)
}

fn install() -> io::Result<()> {
    let old = OLD_ACTION.get_or_init(|| {
        // SAFETY: all-zero bytes are a valid sigaction.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: the handler does only what a signal handler may: it reads and writes atomics and
        // makes system calls. Both structures are valid.
        let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut old) };
        (result == 0).then_some(old)
    });
    match old {
        Some(_) => Ok(()),
        None => Err(io::Error::other("SIGBUS cannot be caught")),
    }
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure, and SIGBUS has an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // One that somebody has sent has none.
    let found = slots().filter(|_| code > 0).find_map(|slot| {
        let range = slot.get()?;
        let inside = address.wrapping_sub(range.start) < range.len;
        inside.then_some((slot, range))
    });
    if let Some((slot, range)) = found {
        // Before the zeros are there, so that readers of them learn of it afterwards;
        // the flag before the count, which is what they look at first.
        slot.lost.store(true, Ordering::Relaxed);
        LOST.fetch_add(1, Ordering::Release);
        if replace(range, address) {
            return;
        }
    }
    // Not ours: the one before us sees it.
    let before = OLD_ACTION.get().copied().flatten();
    // SAFETY: all-zero bytes are a valid sigaction: the default one.
    let before = before.unwrap_or_else(|| unsafe { std::mem::zeroed() });
    crash::end(signal, code, before);
}

/// Puts zeros in the place of a region; where the system does not promise that much memory
/// (`vm.overcommit_memory` 2), in the place of the page of `address`.
fn replace(range: Range, address: usize) -> bool {
    let Range { start, len, page } = range;
    let inside = address - start;
    let one = (start + (inside - inside % page.max(1)), page);
    // SAFETY: the location is this thread's errno.
    let errno = unsafe { *libc::__errno_location() };
    let replaced = [(start, len), one]
        .into_iter()
        .any(|(start, len)| put_zeros(start, len));
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    replaced
}

/// Puts zeros in the place of whole pages of a registered mapping. False: they are as they were.
///
/// In two steps: a mapping that goes to a fixed address at once may unmap what is there before the
/// system refuses the memory, and whatever is mapped next may then get into the hole.
fn put_zeros(start: usize, len: usize) -> bool {
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
    let fresh = unsafe {
        libc::mmap(
            ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if fresh == libc::MAP_FAILED {
        return false;
    }
    // SAFETY: what is moved is the mapping just made, which nobody else knows. The place is within
    // a mapping that its owner has registered, in whole pages of it (huge ones are not split), and
    // cannot unmap before it has taken it from the list; its contents are gone already.
    let moved = unsafe {
        libc::mremap(
            fresh,
            len,
            len,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            ptr::with_exposed_provenance_mut::<libc::c_void>(start),
        )
    };
    if moved == libc::MAP_FAILED {
        // SAFETY: it is still ours alone, and not used.
        unsafe { libc::munmap(fresh, len) };
        return false;
    }
    true
}

#[cfg(test)]
mod tests {
    //! What would be caught: zeros that reach over the borders of what was taken away, are put
    //! elsewhere, or leave a mapping behind.

    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd};

    use super::*;

    const PAGE: usize = 4096;

    #[test]
    fn zeros_take_the_place_of_a_region_and_of_nothing_else() {
        // SAFETY: the name is a string, and the descriptor is new and ours.
        let file = unsafe {
            File::from_raw_fd(libc::memfd_create(c"replaced".as_ptr(), libc::MFD_CLOEXEC))
        };
        file.set_len(4 * PAGE as u64).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                4 * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        // SAFETY: the mapping is ours until the end of the test.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start.cast::<u8>(), 4 * PAGE) };
        bytes.fill(7);
        let start = start.expose_provenance();
        let range = Range {
            start: start + PAGE,
            len: 2 * PAGE,
            page: PAGE,
        };
        let zeros = |from: usize, to: usize| {
            let mut expected = vec![7; 4 * PAGE];
            expected[from * PAGE..to * PAGE].fill(0);
            expected
        };
        assert!(put_zeros(range.start, PAGE), "the page alone");
        assert_eq!(bytes, zeros(1, 2));
        assert!(replace(range, start + 2 * PAGE + 5));
        assert_eq!(bytes, zeros(1, 3));
        // They are memory like any other, and no longer the file's.
        bytes.fill(1);
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let left = text.lines().filter(|line| line.contains("memfd:replaced"));
        assert_eq!(left.count(), 2, "{text}");
        let ends = format!("{:x}-{:x} rw-p", range.start, range.start + range.len);
        assert!(text.lines().any(|line| line.starts_with(&ends)), "{text}");
        // SAFETY: nobody uses it any more.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(start), 4 * PAGE) };
    }
}
