//! The folder of the journals, and its files.
//!
//! A file is made in full, and every page of it touched, before anybody relies on it: a page that
//! tmpfs has no room for later would be a SIGBUS in the midst of a change.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::ids::{Id, boot, file_name, remove};
use super::log::{HEAD_AT, LEAST_WORDS, RING, Ring, TAIL_AT};
use super::mark::Mark;
use super::record::{finish, mix};
use crate::error::{Error, Result, errno_text};
#[cfg(debug_assertions)]
use crate::shared_memory::Gate;
use crate::shared_memory::SharedMemory;

/// "STRAJRNL", and the version of what follows.
const MAGIC: u64 = u64::from_be_bytes(*b"STRAJRNL");
const VERSION: u64 = 1;

/// The file's first words, by their place.
const MAGIC_AT: usize = 0;
const FIELDS: [usize; 8] = [8, 16, 24, 32, 40, 48, 56, 64];
const CHECK_AT: usize = 72;

const PAGE: usize = 4096;

/// How long a journal that another process has is waited for.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(1);

/// Bytes of a ring, unless an option says otherwise: between these two, by the image's size.
const LEAST_BYTES: u64 = 8 * LEAST_WORDS;
const MOST_BYTES: u64 = 4 << 20;
/// The largest ring that can be asked for.
const LIMIT_BYTES: u64 = 1 << 30;
/// What a first write to each cluster records, and as much again for the flush under way.
const BYTES_OF_CLUSTER: u64 = 2 * 48;

/// A folder on a tmpfs with the journals of images, one file each.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// Bytes of each new journal, if that was said.
    size: Option<u64>,
    boot: Id,
    /// The journals that were there at first, and what they are about.
    found: OnceLock<Vec<(PathBuf, Identity)>>,
    #[cfg(debug_assertions)]
    gate: OnceLock<Arc<dyn Gate>>,
}

/// Which bytes a journal is about, as far as they can be told from a copy: inode and time of birth.
/// Zeros where there is no such thing, as for a block device.
pub type Identity = [u64; 2];

impl Folder {
    /// The folder `path`, which must be on a tmpfs. Its new journals have `size` bytes, a power of
    /// two; without one, what suits the image.
    ///
    /// # Errors
    /// When it is no such folder, or the size is none that a journal can have.
    pub fn open(path: &Path, size: Option<u64>) -> Result<Arc<Self>> {
        Self::of_boot(path, size, boot()?)
    }

    /// As [`Folder::open`], as though the kernel's number of this boot were `boot`: for tests.
    ///
    /// # Errors
    /// As [`Folder::open`].
    #[doc(hidden)]
    pub fn of_boot(path: &Path, size: Option<u64>, boot: [u64; 2]) -> Result<Arc<Self>> {
        let fits =
            |size: &u64| (LEAST_BYTES..=LIMIT_BYTES).contains(size) && size.is_power_of_two();
        if let Some(size) = size.filter(|size| !fits(size)) {
            return Err(Error::Invalid(format!(
                "a journal of {size} bytes (expected a power of two from {LEAST_BYTES} to \
                 {LIMIT_BYTES})"
            )));
        }
        let failed = |error| explain(path, "opening the journal folder", &error);
        let folder = File::open(path).map_err(failed)?;
        if !folder.metadata().map_err(failed)?.is_dir() || !is_tmpfs(&folder).map_err(failed)? {
            return Err(Error::Invalid(format!(
                "{}: journals must be in a folder on a tmpfs, as /run and /dev/shm are: on another \
                 file system a change of the mapping could wait for a disk",
                path.display()
            )));
        }
        Ok(Arc::new(Self {
            path: path.to_owned(),
            size,
            boot,
            found: OnceLock::new(),
            #[cfg(debug_assertions)]
            gate: OnceLock::new(),
        }))
    }

    /// From now on stores to the journals that are opened take place only while `gate` is open. Can
    /// be said once.
    #[cfg(debug_assertions)]
    pub fn set_gate(&self, gate: Arc<dyn Gate>) {
        let _ = self.gate.set(gate);
    }

    pub(super) fn boot(&self) -> Id {
        self.boot
    }

    /// Where the journal with this nonce is.
    #[must_use]
    pub fn file(&self, nonce: [u64; 2]) -> PathBuf {
        self.path.join(file_name(nonce))
    }

    /// Makes a journal for an image with `clusters` guest clusters.
    ///
    /// # Errors
    /// When there is no room for it; nothing is left of it then.
    pub(super) fn create(&self, nonce: Id, identity: Identity, clusters: u64) -> Result<Ring> {
        self.remove_left(identity);
        let bytes = self.size.unwrap_or_else(|| suitable(clusters));
        let path = self.file(nonce);
        let made = self.make(&path, nonce, identity, bytes);
        if made.is_err() {
            remove(&path);
        }
        made.map_err(|error| {
            let what = format!("making a journal of {bytes} bytes");
            explain(&path, &what, &error)
        })
    }

    /// Removes the journals of an image whose header names none: a process was killed between
    /// making one and naming it, or between taking its name out and removing it. Such a one has no
    /// records that are not flushed, and only one without is removed: another image may have the
    /// same inode and birth, on a file system that was copied or in another part of one file. Where
    /// the image has no identity all stay.
    fn remove_left(&self, identity: Identity) {
        if identity.contains(&0) {
            return;
        }
        let found = self.found.get_or_init(|| journals(&self.path));
        for (path, _) in found.iter().filter(|(_, other)| *other == identity) {
            if is_left(path).unwrap_or(false) {
                log::info!("{}: removed, the image names it no longer", path.display());
                remove(path);
            }
        }
    }

    fn make(&self, path: &Path, nonce: Id, identity: Identity, bytes: u64) -> io::Result<Ring> {
        let file = options().create_new(true).open(path)?;
        claim(&file, true)?;
        let len = RING as u64 + bytes;
        allocate(&file, len)?;
        let memory = SharedMemory::map(&file, 0, len)?;
        for page in (0..memory.len()).step_by(PAGE) {
            memory.store(page, 0u64, Ordering::Relaxed);
        }
        let words = bytes / 8;
        let fields = fields(nonce, self.boot, words, identity);
        for (at, field) in FIELDS.into_iter().zip(fields) {
            memory.store(at, field, Ordering::Relaxed);
        }
        memory.store(CHECK_AT, check(fields), Ordering::Relaxed);
        memory.store(MAGIC_AT, MAGIC, Ordering::Release);
        if memory.is_lost() {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(self.ring(memory, file, path, words, nonce))
    }

    fn ring(&self, memory: SharedMemory, file: File, path: &Path, words: u64, nonce: Id) -> Ring {
        #[cfg(debug_assertions)]
        if let Some(gate) = self.gate.get() {
            memory.set_gate(gate.clone());
        }
        Ring::new(memory, file, path.to_owned(), words, seed_of(nonce))
    }

    /// Opens the journal that an image names, to go on with it or to read it alone. `None`: there is
    /// none.
    ///
    /// # Errors
    /// When it is not ours, or contradicts itself; [`Error::Busy`] when another process has it.
    pub(super) fn find(
        &self,
        mark: &Mark,
        identity: Identity,
        writable: bool,
    ) -> Result<Option<Ring>> {
        let path = self.file(mark.nonce);
        let file = match options().open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(explain(&path, "opening the journal", &error)),
        };
        // Before anything is read: who has it may be writing.
        if let Err(error) = claim_soon(&file, writable) {
            return Err(match error {
                TryLockError::WouldBlock => Error::Busy(format!(
                    "its journal {} is in use: a process that has the image open goes on with it",
                    path.display()
                )),
                TryLockError::Error(error) => explain(&path, "locking the journal", &error),
            });
        }
        let refused = |what: &str| Err(Error::Invalid(format!("{}: {what}", path.display())));
        let failed = |error| explain(&path, "opening the journal", &error);
        let metadata = file.metadata().map_err(failed)?;
        // SAFETY: asks for a number.
        let user = unsafe { libc::geteuid() };
        if !metadata.is_file() || metadata.uid() != user || metadata.mode() & 0o077 != 0 {
            return refused("not a journal of this user's that nobody else can write");
        }
        let len = metadata.len();
        let words = len.saturating_sub(RING as u64) / 8;
        if !words.is_power_of_two() || words < LEAST_WORDS || len > RING as u64 + LIMIT_BYTES {
            return refused("not a journal: its length is wrong");
        }
        let memory = SharedMemory::map(&file, 0, len).map_err(failed)?;
        let found = FIELDS.map(|at| memory.load::<u64>(at, Ordering::Relaxed));
        let expected = fields(mark.nonce, mark.boot, words, identity);
        let same = |range: std::ops::Range<usize>| found.get(range.clone()) == expected.get(range);
        if memory.load::<u64>(MAGIC_AT, Ordering::Acquire) != MAGIC
            || memory.load::<u64>(CHECK_AT, Ordering::Relaxed) != check(found)
            || !same(0..6)
        {
            return refused("not a journal of this image, of this boot and in this format");
        }
        if !same(6..8) {
            return refused(
                "the journal is that of another file: the image has been copied, or restored",
            );
        }
        let ring = self.ring(memory, file, &path, words, mark.nonce);
        if ring.head() > ring.tail() || ring.tail() - ring.head() > words {
            return refused("the journal contradicts itself: its records end before they begin");
        }
        Ok(Some(ring))
    }
}

/// The journals in a folder, and what they are about. Read once for all images of a daemon, of which
/// there may be many.
fn journals(folder: &Path) -> Vec<(PathBuf, Identity)> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = entries.flatten().map(|entry| entry.path());
    let journals = paths.filter(|path| path.extension().is_some_and(|end| end == "journal"));
    let with_identity = journals.filter_map(|path| {
        let identity = identity_in(&options().open(&path).ok()?).ok()??;
        Some((path, identity))
    });
    with_identity.collect()
}

/// What a journal is about; `None`: it is none that is whole.
fn identity_in(file: &File) -> io::Result<Option<Identity>> {
    let mut fields = [0; FIELDS.len()];
    for (field, at) in fields.iter_mut().zip(FIELDS) {
        *field = word_in(file, at)?;
    }
    let whole = word_in(file, MAGIC_AT)? == MAGIC && word_in(file, CHECK_AT)? == check(fields);
    let [.., inode, birth] = fields;
    Ok(whole.then_some([inode, birth]))
}

fn word_in(file: &File, at: usize) -> io::Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at as u64)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Whether no process has a journal, and it has nothing that is not flushed.
fn is_left(path: &Path) -> io::Result<bool> {
    let file = options().open(path)?;
    // Before the positions are read: who has it may be moving them.
    Ok(claim(&file, true).is_ok() && word_in(&file, HEAD_AT)? == word_in(&file, TAIL_AT)?)
}

/// As [`claim`], when the process that has it may be ending, or has just had a child that has not become
/// another program yet.
fn claim_soon(file: &File, writable: bool) -> std::result::Result<(), TryLockError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match claim(file, writable) {
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

/// Takes the lock that keeps other processes from a journal, for as long as the file is open: image
/// locks can be switched off.
fn claim(file: &File, writable: bool) -> std::result::Result<(), TryLockError> {
    if writable {
        file.try_lock()
    } else {
        file.try_lock_shared()
    }
}

/// What the checksums of the records begin with in the journal that has this nonce.
#[must_use]
pub fn seed_of(nonce: [u64; 2]) -> u64 {
    let [one, two] = nonce;
    mix(one, two)
}

fn fields(nonce: Id, boot: Id, words: u64, identity: Identity) -> [u64; 8] {
    let [inode, birth] = identity;
    [
        VERSION, nonce[0], nonce[1], boot[0], boot[1], words, inode, birth,
    ]
}

fn check(fields: [u64; 8]) -> u64 {
    finish(fields.into_iter().fold(MAGIC, mix))
}

fn suitable(clusters: u64) -> u64 {
    let wanted = clusters.saturating_mul(BYTES_OF_CLUSTER);
    wanted.clamp(LEAST_BYTES, MOST_BYTES).next_power_of_two()
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    options
}

fn allocate(file: &File, len: u64) -> io::Result<()> {
    let len = libc::off_t::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: no memory is passed.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

fn is_tmpfs(file: &File) -> io::Result<bool> {
    // SAFETY: all-zero bytes are a valid statfs.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes one statfs.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_type == libc::TMPFS_MAGIC)
}

fn explain(path: &Path, what: &str, error: &io::Error) -> Error {
    let text = error
        .raw_os_error()
        .map_or_else(|| error.to_string(), errno_text);
    Error::Invalid(format!("{}: {what}: {text}", path.display()))
}
