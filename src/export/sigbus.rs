//! Guest memory that is taken away.
//!
//! A front-end can shrink the file behind a region after it was mapped; the next access then
//! raises SIGBUS, which would end the whole process with all its other exports. The handler here
//! puts fresh zeros in the place of such a region instead: its guest has lost its memory, and
//! nobody else anything. Faults anywhere else go to whoever handled them before.

use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering, fence};

use parking_lot::Mutex;

/// Regions of all exports that can be protected at a time.
const SLOTS: usize = 2048;

/// A protected range. Written under [`CHANGES`], read by the signal handler without a lock:
/// `version` is odd while the other two change.
struct Slot {
    version: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
}

static REGIONS: [Slot; SLOTS] = [const {
    Slot {
        version: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
    }
}; SLOTS];
static CHANGES: Mutex<()> = Mutex::new(());
static OLD_ACTION: OnceLock<libc::sigaction> = OnceLock::new();
/// Regions that have been replaced.
static LOST: AtomicUsize = AtomicUsize::new(0);

impl Slot {
    fn set(&self, start: usize, len: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    fn get(&self) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let range = (
            self.start.load(Ordering::Relaxed),
            self.len.load(Ordering::Relaxed),
        );
        fence(Ordering::Acquire);
        let same = self.version.load(Ordering::Relaxed) == version;
        (same && version.is_multiple_of(2) && range.1 > 0).then_some(range)
    }
}

/// Protects a mapping until it is dropped, which must be before the mapping goes.
#[derive(Debug)]
pub(super) struct Guard {
    slot: Option<usize>,
}

impl Guard {
    /// Protects `[start, start + len)`, which is a mapping of the caller's.
    pub(super) fn new(start: usize, len: usize) -> Self {
        install();
        let _changes = CHANGES.lock();
        let free = REGIONS.iter().position(|slot| slot.get().is_none());
        if let Some(slot) = free.and_then(|index| REGIONS.get(index)) {
            slot.set(start, len);
        } else {
            log::warn!(
                "a memory region is not protected from being taken away: there are too many"
            );
        }
        Self { slot: free }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _changes = CHANGES.lock();
        if let Some(slot) = self.slot.and_then(|index| REGIONS.get(index)) {
            slot.set(0, 0);
        }
    }
}

/// How many regions have been taken away from this process.
pub(super) fn lost() -> usize {
    LOST.load(Ordering::Relaxed)
}

fn install() {
    OLD_ACTION.get_or_init(|| {
        // SAFETY: all-zero bytes are a valid sigaction.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: the handler does only what a signal handler may: it reads atomics and makes
        // system calls. Both structures are valid.
        if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut old) } < 0 {
            log::warn!("catching SIGBUS: {}", std::io::Error::last_os_error());
        }
        old
    });
}

extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure, and SIGBUS has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let region = REGIONS
        .iter()
        .filter_map(Slot::get)
        .find(|&(start, len)| (start..start.saturating_add(len)).contains(&address));
    if let Some((start, len)) = region {
        // SAFETY: the location is this thread's errno.
        let errno = unsafe { *libc::__errno_location() };
        // SAFETY: the range is a mapping that its owner has registered and cannot unmap before
        // it has taken it from the list; its contents are gone already.
        let result = unsafe {
            libc::mmap(
                ptr::with_exposed_provenance_mut(start),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        if result != libc::MAP_FAILED {
            LOST.fetch_add(1, Ordering::Relaxed);
            return;
        }
    }
    // Not ours: the access is repeated on return, and the one before us sees it.
    if let Some(old) = OLD_ACTION.get() {
        // SAFETY: the structure is valid; it is what was in force before.
        unsafe { libc::sigaction(libc::SIGBUS, old, ptr::null_mut()) };
    } else {
        // SAFETY: no memory is passed.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
}
