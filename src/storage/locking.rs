//! QEMU's image locks: open-file-description locks on single bytes of the file, one per
//! permission. QEMU, `qemu-img` and this daemon thereby refuse an image that another writes.
//!
//! Source: the comments in QEMU's file driver and `docs/system/qemu-block-drivers` ("Disk image
//! file locking"). Byte `100 + p` is held by whoever uses permission `p`; byte `200 + p` by
//! whoever does not share it.
//!
//! **Waiting.** A lock of a process that was killed goes when its last I/O has ended, which is a
//! moment after the process: the one that takes its place must not fail for that. So a lock that
//! no running process is seen to hold is waited for, within [`Patience`]. A running holder is
//! named at once, or nearly: it may be a tool that only looks. The wait blocks the thread, which
//! opens images and serves nobody.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use super::holder::{self, Holder};

const USED: i64 = 100;
const UNSHARED: i64 = 200;

const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What a lock is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read; nobody may write meanwhile.
    Read,
    /// Read; others may write (`force-share`): nothing is locked.
    ReadShared,
    /// Read and write; nobody else may.
    Write,
}

impl Access {
    fn used(self) -> &'static [(i64, &'static str)] {
        match self {
            Self::Read => &[(CONSISTENT_READ, "consistent read")],
            Self::ReadShared => &[],
            Self::Write => &[
                (CONSISTENT_READ, "consistent read"),
                (WRITE, "write"),
                (RESIZE, "resize"),
            ],
        }
    }

    fn unshared(self) -> &'static [(i64, &'static str)] {
        match self {
            Self::Read | Self::Write => &[(WRITE, "write"), (RESIZE, "resize")],
            Self::ReadShared => &[],
        }
    }
}

/// How long a lock that somebody else holds is waited for.
struct Patience;

impl Patience {
    /// With a process that runs: it may be a tool that only looks, or a daemon that closes its images.
    const RUNNING: Duration = Duration::from_secs(1);
    /// With nobody who could be seen.
    const UNKNOWN: Duration = Duration::from_secs(3);
    /// The first pause; each is twice the one before.
    const FIRST_PAUSE: Duration = Duration::from_millis(5);
    /// The longest.
    const LONGEST_PAUSE: Duration = Duration::from_millis(100);

    fn with(holder: &Holder) -> Duration {
        match holder {
            // It would not let go while we wait.
            Holder::Own => Duration::ZERO,
            Holder::Process { .. } => Self::RUNNING,
            Holder::Unknown { .. } => Self::UNKNOWN,
        }
    }
}

/// What waiting needs of the world.
trait World {
    fn holder(&mut self, file: &File, byte: i64) -> Holder;
    fn waited(&self) -> Duration;
    fn pause(&mut self);
}

struct System {
    since: Instant,
    next: Duration,
}

impl World for System {
    fn holder(&mut self, file: &File, byte: i64) -> Holder {
        holder::find(file, byte)
    }

    fn waited(&self) -> Duration {
        self.since.elapsed()
    }

    fn pause(&mut self) {
        std::thread::sleep(self.next);
        self.next = (self.next * 2).min(Patience::LONGEST_PAUSE);
    }
}

/// Takes the locks for `access` and gives back those that it does not need; all go with the file.
/// Waits a moment for those that somebody else holds: see the module's head.
///
/// # Errors
/// When somebody else's use of the image does not go with it. The text is QEMU's, and says who
/// that is.
pub fn lock(file: &File, access: Access, path: &Path) -> io::Result<()> {
    let mut system = System {
        since: Instant::now(),
        next: Patience::FIRST_PAUSE,
    };
    lock_in(&mut system, file, access, path)
}

fn lock_in(world: &mut dyn World, file: &File, access: Access, path: &Path) -> io::Result<()> {
    loop {
        let refusal = match take(file, access) {
            Ok(()) => return release_all_but(file, access),
            Err(refusal) => refusal,
        };
        let holder = match &refusal {
            Refusal::Held { byte, .. } => Some(world.holder(file, *byte)),
            Refusal::System(_) => None,
        };
        // What was held before is not known here; a reader's locks harm nobody.
        release_all_but(file, Access::Read)?;
        match holder {
            Some(holder) if world.waited() < Patience::with(&holder) => {
                log::debug!("waiting for a lock on '{}': {holder}", path.display());
                world.pause();
            }
            holder => return Err(refusal.explain(path, access, holder.as_ref())),
        }
    }
}

/// Gives all locks back. They would go with the file, but the kernel may hold on to that for a
/// moment after the last operation on it.
pub fn unlock(file: &File) {
    for bit in [CONSISTENT_READ, WRITE, RESIZE] {
        for byte in [USED + bit, UNSHARED + bit] {
            if let Err(error) = set_lock(file, libc::F_UNLCK, byte) {
                log::debug!("unlocking an image: {error}");
            }
        }
    }
}

fn release_all_but(file: &File, access: Access) -> io::Result<()> {
    for bit in [CONSISTENT_READ, WRITE, RESIZE] {
        if !access.used().iter().any(|&(b, _)| b == bit) {
            set_lock(file, libc::F_UNLCK, USED + bit)?;
        }
        if !access.unshared().iter().any(|&(b, _)| b == bit) {
            set_lock(file, libc::F_UNLCK, UNSHARED + bit)?;
        }
    }
    Ok(())
}

/// Why locks could not be taken.
enum Refusal {
    /// Somebody else has a lock on `byte`.
    Held {
        shared: &'static str,
        name: &'static str,
        byte: i64,
    },
    System(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

impl Refusal {
    fn explain(self, path: &Path, access: Access, holder: Option<&Holder>) -> io::Error {
        let path = path.display();
        let (shared, name) = match self {
            Self::System(error) => {
                return io::Error::new(error.kind(), format!("locking '{path}': {error}"));
            }
            Self::Held { shared, name, .. } => (shared, name),
        };
        let mut text = format!(
            "Could not open '{path}': Failed to get {shared}\"{name}\" lock: Is another process \
             using the image [{path}]?"
        );
        if let Some(holder) = holder {
            text += &format!(" {holder}; {}", advice(holder, access));
        }
        io::Error::new(io::ErrorKind::WouldBlock, text)
    }
}

/// What can be done about a holder.
fn advice(holder: &Holder, access: Access) -> &'static str {
    match (holder, access) {
        (Holder::Own, _) => "an image that is written can have no second user",
        (Holder::Process { .. }, Access::Write) => "let it end first",
        (Holder::Process { .. }, _) => {
            "let it end first, or read the image while it changes (force-share=on, -U)"
        }
        (Holder::Unknown { .. }, _) => "wait for its end and try again",
    }
}

fn take(file: &File, access: Access) -> Result<(), Refusal> {
    for &(bit, name) in access.used() {
        hold(file, USED + bit).map_err(|error| refused(error, "shared ", name, USED + bit))?;
    }
    for &(bit, name) in access.unshared() {
        hold(file, UNSHARED + bit).map_err(|error| refused(error, "", name, UNSHARED + bit))?;
    }
    // After taking our own, so that of two that race at least one sees the other.
    for (bits, shared, others) in [
        (access.used(), "", UNSHARED),
        (access.unshared(), "shared ", USED),
    ] {
        for &(bit, name) in bits {
            let byte = others + bit;
            if held_by_other(file, byte)? {
                return Err(Refusal::Held { shared, name, byte });
            }
        }
    }
    Ok(())
}

fn refused(error: io::Error, shared: &'static str, name: &'static str, byte: i64) -> Refusal {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Refusal::Held { shared, name, byte },
        _ => Refusal::System(error),
    }
}

fn flock(kind: i32, start: i64) -> libc::flock {
    // SAFETY: all-zero bytes are a valid flock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = start;
    lock.l_len = 1;
    lock
}

fn hold(file: &File, byte: i64) -> io::Result<()> {
    set_lock(file, libc::F_RDLCK, byte)
}

fn set_lock(file: &File, kind: libc::c_int, byte: i64) -> io::Result<()> {
    let lock = flock(kind, byte);
    // SAFETY: the call reads one flock.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether an exclusive lock would meet somebody else's.
fn held_by_other(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, byte);
    // SAFETY: the call reads and writes one flock.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    //! What would be caught: a lock that is not waited for though nobody who runs holds it, a wait
    //! that is not ended by the lock's release or by the deadline, a command that waits long for a
    //! program that goes on, a failure that does not say who holds the lock.

    use super::*;

    /// A world whose time passes with each pause.
    struct Scripted<F> {
        holder: Holder,
        waited: Duration,
        at_pause: F,
    }

    impl<F: FnMut(Duration)> World for Scripted<F> {
        fn holder(&mut self, _file: &File, _byte: i64) -> Holder {
            self.holder.clone()
        }

        fn waited(&self) -> Duration {
            self.waited
        }

        fn pause(&mut self) {
            self.waited += Patience::LONGEST_PAUSE;
            (self.at_pause)(self.waited);
        }
    }

    const UNSEEN: Holder = Holder::Unknown { all_seen: true };
    const ALL: [Access; 3] = [Access::Read, Access::ReadShared, Access::Write];

    fn conflict(one: Access, other: Access) -> bool {
        (one == Access::Write && other != Access::ReadShared)
            || (other == Access::Write && one != Access::ReadShared)
    }

    /// A file with somebody else's locks, and our own descriptor of it.
    fn held(access: Access) -> (tempfile::NamedTempFile, File, File) {
        let named = tempfile::NamedTempFile::new().unwrap();
        let (other, own) = (named.reopen().unwrap(), named.reopen().unwrap());
        lock(&other, access, named.path()).unwrap();
        (named, other, own)
    }

    #[test]
    fn a_lock_that_nobody_is_seen_to_hold_is_waited_for() {
        for (theirs, ours) in ALL.iter().flat_map(|a| ALL.map(|b| (*a, b))) {
            let (named, other, own) = held(theirs);
            let mut other = Some(other);
            let mut pauses = 0;
            let mut world = Scripted {
                holder: UNSEEN,
                waited: Duration::ZERO,
                at_pause: |_| {
                    pauses += 1;
                    if pauses == 3 {
                        other = None;
                    }
                },
            };
            lock_in(&mut world, &own, ours, named.path()).unwrap();
            let expected = if conflict(theirs, ours) { 3 } else { 0 };
            assert_eq!(pauses, expected, "{theirs:?}, {ours:?}");
        }
    }

    #[test]
    fn the_wait_is_bounded_and_says_who_it_was() {
        let process = |pid| Holder::Process {
            pid,
            command: "qemu-io".into(),
        };
        for (holder, longest, said) in [
            (Holder::Own, Duration::ZERO, "This process uses it itself"),
            (
                process(4711),
                Patience::RUNNING,
                "Process 4711 (qemu-io) holds",
            ),
            (
                UNSEEN,
                Patience::UNKNOWN,
                "left over from one that was killed",
            ),
            (
                Holder::Unknown { all_seen: false },
                Patience::UNKNOWN,
                "this user may look at",
            ),
        ] {
            let (named, _other, own) = held(Access::Write);
            let mut last = Duration::ZERO;
            let mut world = Scripted {
                holder,
                waited: Duration::ZERO,
                at_pause: |waited| last = waited,
            };
            let error = lock_in(&mut world, &own, Access::Read, named.path()).unwrap_err();
            assert_eq!(last, longest, "{said}");
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            let text = error.to_string();
            let qemus = format!(
                "Could not open '{0}': Failed to get shared \"write\" lock: Is another process \
                 using the image [{0}]? ",
                named.path().display()
            );
            assert!(text.starts_with(&qemus), "{text}");
            assert!(text.contains(said), "{text}");
        }
    }

    #[test]
    fn who_goes_on_in_the_place_of_a_dead_one_is_not_waited_for_long() {
        let (named, _other, own) = held(Access::Write);
        let mut world = Scripted {
            holder: Holder::Process {
                pid: 1,
                command: "new".into(),
            },
            waited: Patience::RUNNING,
            at_pause: |_| panic!("waited"),
        };
        lock_in(&mut world, &own, Access::Write, named.path()).unwrap_err();
    }

    #[test]
    fn what_was_read_is_still_held_after_a_refusal() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let open = || named.reopen().unwrap();
        let (reader, other, third) = (open(), open(), open());
        lock(&other, Access::Read, named.path()).unwrap();
        lock(&reader, Access::Read, named.path()).unwrap();
        lock(&reader, Access::Write, named.path()).unwrap_err();
        // Neither more nor less than a reader's locks.
        drop(other);
        lock(&third, Access::Read, named.path()).unwrap();
        lock(&third, Access::Write, named.path()).unwrap_err();
        drop(reader);
        lock(&third, Access::Write, named.path()).unwrap();
    }
}
