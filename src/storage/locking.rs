//! QEMU's image locks: open-file-description locks on single bytes of the file, one per
//! permission. QEMU, `qemu-img` and this daemon thereby refuse an image that another writes.
//!
//! Source: the comments in QEMU's file driver and `docs/system/qemu-block-drivers` ("Disk image
//! file locking"). Byte `100 + p` is held by a process that uses permission `p`; byte
//! `200 + p` by one that does not share it.
//!
//! **Waiting.** A lock of a process that was killed goes when its last I/O has ended, which is a
//! moment after the process: the one that takes its place must not fail for that. So a lock that
//! no running process is seen to hold is waited for, within [`Patience`]. A running holder is
//! named at once, or nearly: it may be a tool that only looks. The wait blocks the thread, which
//! opens images and serves nobody.
//!
//! **Unlocking** takes no time where the kernel keeps the locks, and is done before a storage that
//! is let go of is closed: the next process to open the file finds it free. Over a network
//! it may hang like any other call, and is done with the closing ([`ImageLock::leave`]). Operations
//! that go on keep the locks as well. When a file is opened again in this process, all of that is
//! waited for as for a process that ends ([`ImageLock::leaving`]).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::file_system::{file_system, is_local};
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

    /// Whether its locks are among those of `other`.
    fn is_within(self, other: Self) -> bool {
        match self {
            Self::ReadShared => true,
            Self::Read => other != Self::ReadShared,
            Self::Write => other == Self::Write,
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
    /// With nobody who could be seen, or who only ends.
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
            Holder::Ending { .. } | Holder::Unknown { .. } => Self::UNKNOWN,
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

/// What one descriptor of an image may do, with the locks that stand for it.
///
/// The kernel gives locks to an open file description, and a second one of the same process is to
/// it like another process. So one description, the first, holds the locks for all: they become
/// more or less under it, and at no moment could somebody else get in between. What is locked is
/// what the one that does most needs.
#[derive(Debug)]
pub struct ImageLock {
    all: Arc<Locks>,
    access: Mutex<Access>,
}

/// The locks that this process holds on an image.
#[derive(Debug)]
struct Locks {
    file: Arc<File>,
    path: PathBuf,
    /// Device and inode.
    number: Option<(u64, u64)>,
    /// The kernel keeps the locks, and asks no server.
    local: bool,
    users: Mutex<Users>,
}

/// Files whose locks are about to be given back, by device and inode.
static LEAVING: Mutex<Vec<(u64, u64)>> = Mutex::new(Vec::new());

/// Says, as long as it is there, that the locks of a file are about to be given back.
#[derive(Debug)]
pub struct Leaving((u64, u64));

impl Drop for Leaving {
    fn drop(&mut self) {
        let mut leaving = LEAVING.lock();
        if let Some(index) = leaving.iter().position(|number| *number == self.0) {
            leaving.swap_remove(index);
        }
    }
}

/// How many descriptors are used for what; those that share all are not counted.
#[derive(Clone, Copy, Debug, Default)]
struct Users {
    readers: usize,
    writers: usize,
}

impl Users {
    fn count(&mut self, access: Access) -> Option<&mut usize> {
        match access {
            Access::Read => Some(&mut self.readers),
            Access::Write => Some(&mut self.writers),
            Access::ReadShared => None,
        }
    }

    fn with(mut self, old: Access, new: Access) -> Self {
        if let Some(count) = self.count(old) {
            *count = count.saturating_sub(1);
        }
        if let Some(count) = self.count(new) {
            *count += 1;
        }
        self
    }

    /// What is to be locked for them.
    fn access(self) -> Access {
        match self {
            Self { writers: 1.., .. } => Access::Write,
            Self { readers: 1.., .. } => Access::Read,
            _ => Access::ReadShared,
        }
    }
}

impl ImageLock {
    /// Locks nothing yet; the locks will be those of `file`, whose path is for messages.
    pub fn new(file: Arc<File>, path: &Path) -> Self {
        let metadata = file.metadata().ok();
        Self {
            all: Arc::new(Locks {
                number: metadata.map(|file| (file.dev(), file.ino())),
                local: is_local(file_system(&file)),
                file,
                path: path.to_owned(),
                users: Mutex::default(),
            }),
            access: Mutex::new(Access::ReadShared),
        }
    }

    /// For another descriptor of the same image, which may do nothing yet.
    pub fn another(&self) -> Self {
        Self {
            all: self.all.clone(),
            access: Mutex::new(Access::ReadShared),
        }
    }

    /// Takes the locks for `access` and gives back those that nobody needs any more; this one's go
    /// when it is dropped. Waits a moment for those that somebody else holds: see the module's head.
    ///
    /// # Errors
    /// When somebody else's use of the image does not go with it. All is as before then. The text
    /// is QEMU's, and says who that is.
    pub fn set(&self, access: Access) -> io::Result<()> {
        let mut system = System {
            since: Instant::now(),
            next: Patience::FIRST_PAUSE,
        };
        self.set_in(&mut system, access)
    }

    /// Gives its locks back, if that takes no time. False: they go when this is dropped, which may
    /// block.
    pub fn leave(&self) -> bool {
        if self.all.local
            && let (Some(mut own), Some(mut users)) =
                (self.access.try_lock(), self.all.users.try_lock())
        {
            *users = users.with(*own, Access::ReadShared);
            *own = Access::ReadShared;
            match release_all_but(&self.all.file, users.access()) {
                Ok(()) => return true,
                Err(error) => log::debug!("unlocking an image: {error}"),
            }
        }
        false
    }

    /// Says that the locks are about to go. Who wants them in this process waits for that, as long
    /// as what is returned is there.
    pub fn leaving(&self) -> Option<Leaving> {
        let number = self.all.number?;
        LEAVING.lock().push(number);
        Some(Leaving(number))
    }

    fn set_in(&self, world: &mut dyn World, access: Access) -> io::Result<()> {
        let mut own = self.access.lock();
        self.all.change(world, *own, access)?;
        *own = access;
        Ok(())
    }
}

impl Drop for ImageLock {
    /// Gives its locks back. They would go with the file, but the kernel may hold on to that for
    /// a moment after the last operation on it.
    fn drop(&mut self) {
        if let Err(error) = self.set(Access::ReadShared) {
            log::debug!("unlocking an image: {error}");
        }
    }
}

impl Locks {
    fn patience(&self, holder: &Holder) -> Duration {
        let leaving = || {
            self.number
                .is_some_and(|number| LEAVING.lock().contains(&number))
        };
        match holder {
            Holder::Own if leaving() => Patience::UNKNOWN,
            holder => Patience::with(holder),
        }
    }

    fn change(&self, world: &mut dyn World, old: Access, new: Access) -> io::Result<()> {
        let mut users = self.users.lock();
        let wanted = users.with(old, new);
        let (held, access) = (users.access(), wanted.access());
        if access.is_within(held) {
            // Nothing is taken, so that nobody can stand in the way.
            *users = wanted;
            return release_all_but(&self.file, access);
        }
        loop {
            let refusal = match take(&self.file, access) {
                Ok(()) => {
                    *users = wanted;
                    return release_all_but(&self.file, access);
                }
                Err(refusal) => refusal,
            };
            let holder = match &refusal {
                Refusal::Held { byte, .. } => Some(world.holder(&self.file, *byte)),
                Refusal::System(_) => None,
            };
            release_all_but(&self.file, held)?;
            match holder {
                Some(holder) if world.waited() < self.patience(&holder) => {
                    log::debug!("waiting for a lock on '{}': {holder}", self.path.display());
                    world.pause();
                }
                holder => return Err(refusal.explain(&self.path, access, holder.as_ref())),
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
        (Holder::Ending { .. } | Holder::Unknown { .. }, _) => "wait for its end and try again",
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
mod tests;
