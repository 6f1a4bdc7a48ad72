//! Bytes in shared memory that are set when the process crashes, so that its successor can tell a
//! crash from a kill.
//!
//! A crash is a fault of the process's own: an access to no memory, an instruction that is none, an
//! abort. A SIGKILL leaves no trace, nor does an end that was asked for.
//!
//! A queue's requests are carried out by its thread alone. So a fault of a thread sets the byte of its
//! queue and no others: it is not for what other guests wanted. A signal from outside that ends the
//! process, as a watchdog's does, says nothing of where it hung, and sets them all.

use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use super::SharedMemory;

/// Bytes that can be watched at once: one for each queue that is served. 256 exports can have 256
/// queues each, with a thread for each of these. The table takes memory as it is used.
const PLACES: usize = 1 << 16;

struct Position {
    /// Where the byte is; 0: nowhere.
    byte: AtomicUsize,
    /// The thread that it is for; 0: none yet.
    thread: AtomicI32,
}

static PLACE: [Position; PLACES] = [const {
    Position {
        byte: AtomicUsize::new(0),
        thread: AtomicI32::new(0),
    }
}; PLACES];
/// The handler is at work, and the process is about to end.
static CRASHING: AtomicBool = AtomicBool::new(false);

const SIGNALS: [libc::c_int; 6] = [
    libc::SIGSEGV,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
    libc::SIGTRAP,
    libc::SIGSYS,
];

/// What was in force before, as flags and address of the handler.
struct Old {
    action: AtomicUsize,
    flags: AtomicUsize,
}
static OLD: [Old; SIGNALS.len()] = [const {
    Old {
        action: AtomicUsize::new(libc::SIG_DFL),
        flags: AtomicUsize::new(0),
    }
}; SIGNALS.len()];

/// A byte that is set to 1 at a crash, until this is dropped.
pub struct CrashByte {
    place: &'static Position,
    /// Kept mapped until nobody can write to it any more.
    _memory: Arc<SharedMemory>,
}

impl CrashByte {
    /// The byte at `at`. `None`: it is not in the memory, or too many are watched already, and
    /// then this one stays as it is at a crash.
    #[must_use]
    pub fn new(memory: &Arc<SharedMemory>, at: usize) -> Option<Self> {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(install);
        if at >= memory.len() {
            return None;
        }
        let address = memory.mapping.start().checked_add(at)?;
        let place = PLACE.iter().find(|place| {
            let byte = &place.byte;
            byte.compare_exchange(0, address, Ordering::SeqCst, Ordering::Relaxed)
                .is_ok()
        })?;
        Some(Self {
            place,
            _memory: memory.clone(),
        })
    }

    /// It is for what the calling thread does.
    pub fn claim(&self) {
        self.place.thread.store(this_thread(), Ordering::SeqCst);
    }
}

impl fmt::Debug for CrashByte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CrashByte").finish_non_exhaustive()
    }
}

fn this_thread() -> i32 {
    // SAFETY: no memory is passed.
    unsafe { libc::gettid() }
}

impl Drop for CrashByte {
    fn drop(&mut self) {
        self.place.thread.store(0, Ordering::SeqCst);
        self.place.byte.store(0, Ordering::SeqCst);
        // The handler reads the places after it has said that it is at work: either it does not
        // find this one, or we learn of it here and leave the memory where it is.
        while CRASHING.load(Ordering::SeqCst) {
            std::thread::park();
        }
    }
}

fn install() {
    for (signal, old) in SIGNALS.iter().zip(&OLD) {
        // SAFETY: all-zero bytes are a valid sigaction.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: no new action is given, and the structure is valid.
        unsafe { libc::sigaction(*signal, ptr::null(), &raw mut before) };
        old.flags.store(before.sa_flags as usize, Ordering::Relaxed);
        old.action.store(before.sa_sigaction, Ordering::Release);
        // SAFETY: the handler does only what a signal handler may: it reads and writes atomics and
        // makes system calls.
        let result = unsafe { libc::sigaction(*signal, &raw const action, ptr::null_mut()) };
        if result < 0 {
            let error = std::io::Error::last_os_error();
            log::warn!("crashes by signal {signal} will not be noted: {error}");
        }
    }
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: all-zero bytes are a valid sigaction: the default one.
    let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
    if let Some((_, old)) = SIGNALS.iter().zip(&OLD).find(|(one, _)| **one == signal) {
        before.sa_sigaction = old.action.load(Ordering::Acquire);
        before.sa_flags = old.flags.load(Ordering::Relaxed) as libc::c_int;
    }
    // SAFETY: the kernel passes a valid structure.
    end(signal, unsafe { (*info).si_code }, before);
}

/// The process crashes: by a signal with this code, which is passed on to what was in force before.
/// May be called by signal handlers, and nowhere else.
pub(super) fn end(signal: libc::c_int, code: libc::c_int, before: libc::sigaction) {
    CRASHING.store(true, Ordering::SeqCst);
    // Faults, and aborts, which a thread sends to itself.
    let own = code > 0 || code == libc::SI_TKILL;
    set(own.then(this_thread));
    let sent = code <= 0;
    // A fault is repeated on return, and seen by what was in force before. That may do nothing about
    // a signal which was sent: it expects a fault.
    // SAFETY: all-zero bytes are a valid sigaction: the default one.
    let default: libc::sigaction = unsafe { std::mem::zeroed() };
    let next = if sent { default } else { before };
    // SAFETY: the structure is valid.
    unsafe { libc::sigaction(signal, &raw const next, ptr::null_mut()) };
    if sent {
        // It is delivered on return.
        // SAFETY: no memory is passed.
        unsafe { libc::raise(signal) };
    }
}

/// Sets all bytes, or those that are for a thread. May be called by signal handlers.
fn set(thread: Option<i32>) {
    for place in &PLACE {
        let address = place.byte.load(Ordering::SeqCst);
        let concerned = thread.is_none_or(|thread| place.thread.load(Ordering::SeqCst) == thread);
        if address != 0 && concerned {
            let byte: *mut u8 = ptr::with_exposed_provenance_mut(address);
            // SAFETY: the byte is in a mapping that its owner keeps while it is in the table, and
            // for ever if it was taken from the table after `CRASHING` was set.
            unsafe { AtomicU8::from_ptr(byte) }.store(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a byte that is not set at a crash, one that is set elsewhere or for what
    //! another thread did, and one that is written to when its memory may have gone.

    use std::fs::File;
    use std::os::fd::FromRawFd;

    use super::*;

    #[test]
    fn bytes_are_set_while_they_are_watched() {
        // SAFETY: the name is a string, and the descriptor is new and ours.
        let file =
            unsafe { File::from_raw_fd(libc::memfd_create(c"crash".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(4096).unwrap();
        let memory = Arc::new(SharedMemory::map(&file, 0, 4096).unwrap());
        let watched = [3, 4095].map(|at| CrashByte::new(&memory, at).unwrap());
        drop(CrashByte::new(&memory, 8).unwrap());
        assert!(CrashByte::new(&memory, 4096).is_none());
        let found = || [2, 3, 4, 8, 4095].map(|at| memory.load::<u8>(at, Ordering::Relaxed));
        // Without a crash, since this process is to go on.
        watched[0].claim();
        set(Some(0x7fff_ffff));
        assert_eq!(found(), [0; 5]);
        set(Some(this_thread()));
        assert_eq!(found(), [0, 1, 0, 0, 0]);
        set(None);
        assert_eq!(found(), [0, 1, 0, 0, 1]);
        drop(watched);
        memory.store(3, 0u8, Ordering::Relaxed);
        set(None);
        assert_eq!(memory.load::<u8>(3, Ordering::Relaxed), 0);
        // All queues of many exports.
        let many: Vec<_> = (0..5000)
            .map_while(|_| CrashByte::new(&memory, 5))
            .collect();
        assert_eq!(many.len(), 5000);
    }
}
