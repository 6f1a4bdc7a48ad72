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
//!
//! **Unlocking** takes no time where the kernel keeps the locks, and is done before a storage that
//! is let go of is closed: the next to open the file, whoever that is, finds it free. Over a network
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

/// The number of a file system in memory that libc has no name for.
pub(super) const RAMFS: i64 = 0x8584_58f6;
const ZFS: i64 = 0x2fc1_2fc1;

/// The kind of the file system that a file is in; 0: not known.
pub(super) fn file_system(file: &File) -> i64 {
    // SAFETY: all-zero bytes are a valid statfs.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes one statfs.
    match unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } {
        0 => stat.f_type,
        _ => 0,
    }
}

/// Whether locks of files in such a file system are in the kernel's memory alone, and no server is
/// asked for them. Others are not known to be.
pub(super) fn is_local(file_system: i64) -> bool {
    matches!(
        file_system,
        libc::EXT4_SUPER_MAGIC
            | libc::XFS_SUPER_MAGIC
            | libc::BTRFS_SUPER_MAGIC
            | libc::F2FS_SUPER_MAGIC
            // Whatever it is over: the locks are its own.
            | libc::OVERLAYFS_SUPER_MAGIC
            | libc::TMPFS_MAGIC
            | RAMFS
            | ZFS
    )
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
mod tests {
    //! What would be caught: a lock that is not waited for though nobody who runs holds it, a wait
    //! that is not ended by the lock's release or by the deadline, a command that waits long for a
    //! program that goes on, a failure that does not say who holds the lock; locks of our own that are
    //! about to go and are not waited for; locks that are given
    //! back before others are taken, so that another program gets in between, and an attempt that
    //! failed and holds more or less than before.

    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use super::*;

    fn open(path: &Path) -> ImageLock {
        let file = File::options().read(true).write(true).open(path).unwrap();
        ImageLock::new(Arc::new(file), path)
    }

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
    fn held(access: Access) -> (tempfile::NamedTempFile, ImageLock, ImageLock) {
        let named = tempfile::NamedTempFile::new().unwrap();
        let (other, own) = (open(named.path()), open(named.path()));
        other.set(access).unwrap();
        (named, other, own)
    }

    #[test]
    fn a_lock_that_nobody_is_seen_to_hold_is_waited_for() {
        for (theirs, ours) in ALL.iter().flat_map(|a| ALL.map(|b| (*a, b))) {
            let (_named, other, own) = held(theirs);
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
            own.set_in(&mut world, ours).unwrap();
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
                Holder::Ending {
                    pid: 4711,
                    command: "qemu-io".into(),
                },
                Patience::UNKNOWN,
                "Process 4711 (qemu-io), which has been killed",
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
            let error = own.set_in(&mut world, Access::Read).unwrap_err();
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
    fn locks_that_are_about_to_be_given_back_are_waited_for() {
        for local in [true, false] {
            let (_named, mut other, own) = held(Access::Write);
            Arc::get_mut(&mut other.all).unwrap().local = local;
            let leaving = other.leaving();
            assert_eq!(other.leave(), local);
            let mut other = Some((other, leaving));
            let mut pauses = 0;
            let mut world = Scripted {
                holder: Holder::Own,
                waited: Duration::ZERO,
                at_pause: |_| {
                    pauses += 1;
                    other = None;
                },
            };
            own.set_in(&mut world, Access::Write).unwrap();
            assert_eq!(pauses, u32::from(!local));
        }
    }

    #[test]
    fn who_goes_on_in_the_place_of_a_dead_one_is_not_waited_for_long() {
        let (_named, _other, own) = held(Access::Write);
        let mut world = Scripted {
            holder: Holder::Process {
                pid: 1,
                command: "new".into(),
            },
            waited: Patience::RUNNING,
            at_pause: |_| panic!("waited"),
        };
        own.set_in(&mut world, Access::Write).unwrap_err();
    }

    #[test]
    fn nobody_gets_in_while_a_reader_becomes_a_writer_and_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let ours = open(file.path());
        ours.set(Access::Read).unwrap();
        let (over, tries) = (AtomicBool::new(false), AtomicU32::new(0));
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let theirs = open(file.path());
                while !over.load(Ordering::Relaxed) {
                    assert!(theirs.set(Access::Write).is_err(), "two writers");
                    tries.fetch_add(1, Ordering::Relaxed);
                }
            });
            while tries.load(Ordering::Relaxed) < 100 && !other.is_finished() {
                // What they have taken for their attempt may be in our way, too.
                let _ = ours.set(Access::Write);
                let _ = ours.set(Access::Read);
            }
            over.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn a_failure_leaves_all_as_it_was() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (ours, theirs, third) = (open(file.path()), open(file.path()), open(file.path()));
        for before in [Access::Read, Access::ReadShared] {
            ours.set(before).unwrap();
            theirs.set(Access::Read).unwrap();
            assert!(ours.set(Access::Write).is_err());
            theirs.set(Access::ReadShared).unwrap();
            // A reader keeps writers out, and one that shares does not.
            assert_eq!(third.set(Access::Write).is_err(), before == Access::Read);
            third.set(Access::ReadShared).unwrap();
        }
        ours.set(Access::Write).unwrap();
        assert!(third.set(Access::Read).is_err());
        drop(ours);
        third.set(Access::Write).unwrap();
    }

    #[test]
    fn one_writer_that_ends_takes_no_lock_from_another() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, theirs) = (open(file.path()), open(file.path()));
        first.set(Access::Read).unwrap();
        let (second, third) = (first.another(), first.another());
        for writer in [&second, &third] {
            writer.set(Access::Write).unwrap();
        }
        second.set(Access::Read).unwrap();
        theirs.set(Access::Read).unwrap_err();
        drop(third);
        theirs.set(Access::Read).unwrap();
        theirs.set(Access::Write).unwrap_err();
        drop((first, second));
        theirs.set(Access::Write).unwrap();
    }
}
