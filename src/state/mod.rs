//! What outlives the process on the disk: which jobs there are, what lies under which image since
//! a stream has ended, and which files could not be made stable.
//!
//! - [`record`]: the records, plain data that no other part's types are in
//! - [`folder`]: a file's replacement as a whole, step by step
//! - `text`: the records as text, with a version and a checksum
//! - [`Store`]: the file of one daemon, locked, and what it holds
//!
//! A change is in the file, and stable, before it is in force: [`Store::change`] fails otherwise
//! and nothing has changed. What has happened whether or not it can be recorded
//! ([`Store::happened`]) is kept in memory until it is in the file, which is with the next change at
//! the latest that succeeds: no record is ever added to a file that lacks what came before.
//! `docs/state.md` is the manual.

pub mod folder;
pub mod record;
mod text;
mod tops;
mod upgrade;

use std::fs::{File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub use folder::{DiskFolder, Folder, Owner};
pub use record::State;
pub use tops::Gone;

/// What the names of state files end with.
const SUFFIX: &str = ".state";
/// How long to wait for a lock: its holder may be ending.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why the state cannot be had or kept. The texts name the file and say what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The folder or the file cannot be used.
    #[error("{what} '{}': {error}{hint}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system says.
        error: String,
        /// What to do, if that is known.
        hint: &'static str,
    },
    /// A newer program wrote it.
    #[error(
        "'{}' has version {found} of the state, and this program knows version {known} at most: \
         use the program that wrote it, or remove the file to forget what it records",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// The file's version.
        found: u64,
        /// The newest one that is known here.
        known: u64,
    },
    /// It is not what was written.
    #[error(
        "'{}' is damaged: {what} (to forget the jobs, chains and failed flushes that it records, \
         remove it; look at the images' backing files first, see docs/state.md)",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Another process has it.
    #[error(
        "'{}' is in use by process {owner}: daemons that share a folder need names of their own \
         (--state-name)",
        path.display()
    )]
    Locked {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        owner: String,
    },
}

/// What is true, whether or not it is in the file.
#[derive(Debug)]
struct Held {
    state: State,
    /// The file may have something else.
    stale: bool,
    /// What the file has, if it is there and nobody else writes it.
    text: Option<Vec<u8>>,
}

/// Where a daemon records what is to outlive it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateOptions {
    /// The folder, which daemons may share.
    pub dir: PathBuf,
    /// What the daemon's own files in it are called, before the ending.
    pub name: String,
}

/// The state of one daemon, in a file that no other process writes.
#[derive(Debug)]
pub struct Store {
    folder: Arc<dyn Folder>,
    path: PathBuf,
    name: String,
    held: Mutex<Held>,
    /// Held as long as the store is there.
    lock: Option<Mutex<Lock>>,
}

impl Store {
    /// The state called `name` in the folder `dir`; an empty one if there is none yet.
    ///
    /// # Errors
    /// When the folder does not exist, another process uses that state, or it cannot be read or
    /// believed.
    pub fn open(dir: &Path, name: &str) -> Result<Self, StateError> {
        Self::open_within(dir, name, Owner::Own, PATIENCE)
    }

    /// As [`open`](Self::open), also the state of another daemon: for an operator.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_anybodys(dir: &Path, name: &str) -> Result<Self, StateError> {
        Self::open_within(dir, name, Owner::Any, PATIENCE)
    }

    fn open_within(
        dir: &Path,
        name: &str,
        owner: Owner,
        patience: Duration,
    ) -> Result<Self, StateError> {
        let folder = Arc::new(open_folder(dir, owner)?);
        if folder.is_memory() {
            log::warn!(
                "'{}' is in memory: what is recorded there is gone with the host",
                dir.display()
            );
        }
        let lock = Lock::take(folder.clone(), dir, name, patience)?;
        Self::read(folder, dir, name, Some(lock))
    }

    /// The state in a folder of any kind.
    ///
    /// # Errors
    /// When it cannot be read.
    fn read(
        folder: Arc<dyn Folder>,
        dir: &Path,
        name: &str,
        lock: Option<Lock>,
    ) -> Result<Self, StateError> {
        let name = format!("{name}{SUFFIX}");
        let path = dir.join(&name);
        let bytes = folder
            .read(&name)
            .map_err(|error| failed("reading", &path, &error))?;
        let state = match &bytes {
            Some(bytes) => text::parse(bytes, &path)?,
            None => State::default(),
        };
        Ok(Self {
            folder,
            path,
            name,
            held: Mutex::new(Held {
                state,
                stale: false,
                text: bytes,
            }),
            lock: lock.map(Mutex::new),
        })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is recorded, or is to be.
    #[must_use]
    pub fn state(&self) -> State {
        self.held.lock().state.clone()
    }

    /// Changes what is recorded. When this returns, that is stable.
    ///
    /// # Errors
    /// When it cannot be written: then nothing has changed.
    pub fn change(&self, change: impl FnOnce(&mut State)) -> Result<(), StateError> {
        let mut held = self.held.lock();
        let mut changed = held.state.clone();
        change(&mut changed);
        if changed == held.state {
            // There is nothing that could be refused.
            let _ = self.catch_up(&mut held);
            return Ok(());
        }
        if let Err(error) = self.put(&mut held, &changed) {
            if error.replaced {
                // The next process must not find what was refused.
                let before = held.state.clone();
                if let Err(error) = self.put(&mut held, &before) {
                    log::error!(
                        "'{}': taking a change back, which is tried again with the next one: {}",
                        self.path.display(),
                        error.error
                    );
                }
            }
            return Err(self.not_recorded(&error.error));
        }
        held.state = changed;
        Ok(())
    }

    /// Records what has happened, whether or not that can be recorded now.
    ///
    /// # Errors
    /// When it cannot be written: then it is with the next change, or at the end.
    pub fn happened(&self, change: impl FnOnce(&mut State)) -> Result<(), StateError> {
        let mut held = self.held.lock();
        let before = held.state.clone();
        change(&mut held.state);
        held.stale |= held.state != before;
        self.catch_up(&mut held)
    }

    /// Writes what could not be written when it happened, if there is anything.
    ///
    /// # Errors
    /// When that fails again.
    pub fn finish(&self) -> Result<(), StateError> {
        self.catch_up(&mut self.held.lock())
    }

    fn catch_up(&self, held: &mut Held) -> Result<(), StateError> {
        if !held.stale {
            return Ok(());
        }
        let state = held.state.clone();
        let put = self.put(held, &state);
        put.map_err(|error| self.not_recorded(&error.error))
    }

    fn put(&self, held: &mut Held, state: &State) -> Result<(), folder::NotReplaced> {
        let keep = self.keep_lock(held).map_err(|error| folder::NotReplaced {
            error,
            replaced: false,
        });
        let text = text::write(state);
        let put = keep.and_then(|()| folder::replace(&*self.folder, &self.name, &text));
        let replaced = put.as_ref().map_or_else(|error| error.replaced, |()| true);
        held.stale = match put {
            Ok(()) => false,
            Err(_) => held.stale || replaced,
        };
        if replaced {
            held.text = Some(text);
        }
        put
    }

    /// Sees to it that nobody else writes the file, and has not written it.
    fn keep_lock(&self, held: &Held) -> io::Result<()> {
        let Some(lock) = &self.lock else {
            return Ok(());
        };
        lock.lock().keep(|| {
            if self.folder.read(&self.name)? == held.text {
                return Ok(());
            }
            Err(io::Error::other(
                "its lock was removed, and something else has changed it since: it is not \
                 overwritten (start this daemon anew to go by what it says now)",
            ))
        })
    }

    fn not_recorded(&self, error: &io::Error) -> StateError {
        failed("recording the change in", &self.path, error)
    }
}

/// What is known of another daemon's state.
#[derive(Debug)]
pub struct Neighbour {
    /// The file.
    pub path: PathBuf,
    /// What it records, or why that is not known.
    pub state: Result<State, StateError>,
    /// What it has, as it is.
    pub text: Vec<u8>,
    /// Some process uses it.
    pub running: bool,
}

/// All states in the folder `dir` but for the one called `but`. Others may change them meanwhile.
///
/// # Errors
/// When the folder cannot be read.
pub fn others(dir: &Path, but: &str) -> Result<Vec<Neighbour>, StateError> {
    let folder = open_folder(dir, Owner::Unknown)?;
    let names = names(dir)?.into_iter().filter(|name| name != but);
    let found = names.filter_map(|name| {
        let path = dir.join(format!("{name}{SUFFIX}"));
        let (state, text) = match folder.read(&format!("{name}{SUFFIX}")) {
            Ok(None) => return None,
            Ok(Some(text)) => (text::parse(&text, &path), text),
            Err(error) => (Err(failed("reading", &path, &error)), Vec::new()),
        };
        Some(Neighbour {
            path,
            state,
            text,
            running: folder.is_locked(&lock_of(&name)),
        })
    });
    Ok(found.collect())
}

/// What the state called `name` in the folder `dir` is at the moment, even while another process uses it.
///
/// # Errors
/// When it cannot be read.
pub fn peek(dir: &Path, name: &str) -> Result<State, StateError> {
    let path = dir.join(format!("{name}{SUFFIX}"));
    let bytes = open_folder(dir, Owner::Any)?.read(&format!("{name}{SUFFIX}"));
    let bytes = bytes.and_then(|bytes| bytes.ok_or_else(|| io::ErrorKind::NotFound.into()));
    text::parse(
        &bytes.map_err(|error| failed("reading", &path, &error))?,
        &path,
    )
}

fn open_folder(dir: &Path, owner: Owner) -> Result<DiskFolder, StateError> {
    DiskFolder::open(dir, owner).map_err(|error| StateError::Io {
        what: "opening the folder of the state",
        path: dir.to_owned(),
        error: error_text(&error),
        hint: match error.kind() {
            io::ErrorKind::NotFound => " (make it, for its owner alone: mkdir -m 700)",
            _ => "",
        },
    })
}

/// The names of the states in the folder `dir`.
///
/// # Errors
/// When the folder cannot be read.
pub fn names(dir: &Path) -> Result<Vec<String>, StateError> {
    let cannot = |error: io::Error| failed("reading the folder", dir, &error);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(cannot)? {
        let name = entry.map_err(cannot)?.file_name();
        if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn failed(what: &'static str, path: &Path, error: &io::Error) -> StateError {
    StateError::Io {
        what,
        path: path.to_owned(),
        error: error_text(error),
        hint: "",
    }
}

/// What the system says, without Rust's addition.
fn error_text(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => crate::error::errno_text(errno),
        None => error.to_string(),
    }
}

fn lock_of(name: &str) -> String {
    format!("{name}.lock")
}

/// The lock of a state. It is a file of its own, since the state's own is replaced by each change.
#[derive(Debug)]
struct Lock {
    folder: Arc<DiskFolder>,
    /// The name of the file.
    name: String,
    /// The name of the state's own file.
    state: String,
    file: File,
}

impl Lock {
    /// Locks the state called `name`.
    fn take(
        folder: Arc<DiskFolder>,
        dir: &Path,
        name: &str,
        patience: Duration,
    ) -> Result<Self, StateError> {
        let (name, state) = (lock_of(name), format!("{name}{SUFFIX}"));
        let path = dir.join(&name);
        let cannot = |error: io::Error| failed("locking", &path, &error);
        let mut file = folder.open_lock(&name, &state).map_err(cannot)?;
        let deadline = Instant::now() + patience;
        while !lock(&folder, &name, &state, &mut file).map_err(cannot)? {
            if Instant::now() >= deadline {
                return Err(StateError::Locked {
                    path: dir.join(state),
                    owner: owner(&mut file),
                });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // On a full disk the state can be read all the same.
        if let Err(error) = sign(&mut file) {
            log::warn!("'{}': {error}", path.display());
        }
        Ok(Self {
            folder,
            name,
            state,
            file,
        })
    }

    /// Takes the lock again where its file was removed: it keeps nobody out any more. It is ours if
    /// `check` finds that nobody had it meanwhile.
    ///
    /// # Errors
    /// When another process has it by now, or has had it.
    fn keep(&mut self, check: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if self.folder.has(&self.name, &self.file)? {
            return Ok(());
        }
        let mut file = self.folder.open_lock(&self.name, &self.state)?;
        if !lock(&self.folder, &self.name, &self.state, &mut file)? {
            return Err(io::Error::other(format!(
                "'{}' was removed, and process {} has the state now",
                self.name,
                owner(&mut file)
            )));
        }
        check()?;
        sign(&mut file)?;
        self.file = file;
        Ok(())
    }
}

/// Locks `file`, or the one that has its name by now. False if another process has it.
fn lock(folder: &DiskFolder, name: &str, state: &str, file: &mut File) -> io::Result<bool> {
    loop {
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // Somebody may have removed the file that we have locked.
        if folder.has(name, file)? {
            if file.metadata()?.nlink() < 2 {
                return Ok(true);
            }
            // In a copy of the folder that was made of links it would be one lock for both; and
            // whatever else it is, it is not ours to write to.
            folder.remove(name)?;
        }
        *file = folder.open_lock(name, state)?;
    }
}

/// Whose the lock is, for people: without it what is said is as true.
fn owner(file: &mut File) -> String {
    let mut owner = String::new();
    let _ = file.read_to_string(&mut owner);
    owner.trim().to_owned()
}

fn sign(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
