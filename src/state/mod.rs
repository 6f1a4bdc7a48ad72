//! What outlives the process on the disk: which jobs there are, what lies under which image since
//! a stream has ended, and which files could not be made stable.
//!
//! - [`record`]: the records, plain data that no other part's types are in
//! - [`folder`]: a file's replacement as a whole, step by step
//! - `text`: the records as text, with a version and a checksum
//! - [`Store`]: the file of one daemon, locked, and what it holds
//!
//! A change is in the file, and stable, before it is in force: [`Store::change`] fails otherwise
//! and nothing has changed. `docs/state.md` is the manual.

pub mod folder;
pub mod record;
mod text;

use std::fs::{File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub use folder::{DiskFolder, Folder};
pub use record::State;

/// What the names of state files end with.
const SUFFIX: &str = ".state";
/// How long to wait for a lock: whoever held it may be ending.
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

/// The state of one daemon, in a file that no other process writes.
#[derive(Debug)]
pub struct Store {
    folder: Box<dyn Folder>,
    path: PathBuf,
    name: String,
    state: Mutex<State>,
    /// Locked as long as the store is there.
    _lock: Option<File>,
}

impl Store {
    /// The state called `name` in the folder `dir`; an empty one if there is none yet.
    ///
    /// # Errors
    /// When the folder does not exist, another process uses that state, or it cannot be read.
    pub fn open(dir: &Path, name: &str) -> Result<Self, StateError> {
        Self::open_within(dir, name, PATIENCE)
    }

    fn open_within(dir: &Path, name: &str, patience: Duration) -> Result<Self, StateError> {
        let folder = DiskFolder::open(dir).map_err(|error| StateError::Io {
            what: "opening the folder of the state",
            path: dir.to_owned(),
            error: error_text(&error),
            hint: match error.kind() {
                io::ErrorKind::NotFound => " (make it, for its owner alone: mkdir -m 700)",
                _ => "",
            },
        })?;
        if folder.is_memory() {
            log::warn!(
                "'{}' is in memory: what is recorded there is gone with the host",
                dir.display()
            );
        }
        let lock = lock(dir, name, patience)?;
        Self::read(Box::new(folder), dir, name, Some(lock))
    }

    /// The state in a folder of any kind.
    ///
    /// # Errors
    /// When it cannot be read.
    fn read(
        folder: Box<dyn Folder>,
        dir: &Path,
        name: &str,
        lock: Option<File>,
    ) -> Result<Self, StateError> {
        let name = format!("{name}{SUFFIX}");
        let path = dir.join(&name);
        let bytes = folder
            .read(&name)
            .map_err(|error| failed("reading", &path, &error))?;
        let state = match bytes {
            Some(bytes) => text::parse(&bytes, &path)?,
            None => State::default(),
        };
        Ok(Self {
            folder,
            path,
            name,
            state: Mutex::new(state),
            _lock: lock,
        })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is recorded.
    #[must_use]
    pub fn state(&self) -> State {
        self.state.lock().clone()
    }

    /// Changes what is recorded. When this returns, that is stable.
    ///
    /// # Errors
    /// When it cannot be written: then nothing has changed.
    pub fn change(&self, change: impl FnOnce(&mut State)) -> Result<(), StateError> {
        let mut state = self.state.lock();
        let mut changed = state.clone();
        change(&mut changed);
        if changed == *state {
            return Ok(());
        }
        let bytes = text::write(&changed);
        if let Err(error) = folder::replace(&*self.folder, &self.name, &bytes) {
            if error.replaced {
                // The next process must not find what was refused.
                let before = text::write(&state);
                if let Err(error) = folder::replace(&*self.folder, &self.name, &before) {
                    log::error!(
                        "'{}': taking a change back: {}",
                        self.path.display(),
                        error.error
                    );
                }
            }
            return Err(failed("recording the change in", &self.path, &error.error));
        }
        *state = changed;
        Ok(())
    }
}

/// All states in the folder `dir` that can be read, with their names, but for the one called
/// `but`. Others may change them meanwhile.
///
/// # Errors
/// When the folder cannot be read.
pub fn others(dir: &Path, but: &str) -> Result<Vec<(PathBuf, State)>, StateError> {
    let names = names(dir)?;
    let mut found = Vec::new();
    for name in names.into_iter().filter(|name| name != but) {
        let path = dir.join(format!("{name}{SUFFIX}"));
        match std::fs::read(&path) {
            Ok(bytes) => match text::parse(&bytes, &path) {
                Ok(state) => found.push((path, state)),
                Err(error) => log::warn!("another daemon's state: {error}"),
            },
            Err(error) => log::warn!("another daemon's state: '{}': {error}", path.display()),
        }
    }
    Ok(found)
}

/// What the state called `name` in the folder `dir` is at the moment, whoever uses it.
///
/// # Errors
/// When it cannot be read.
pub fn peek(dir: &Path, name: &str) -> Result<State, StateError> {
    let path = dir.join(format!("{name}{SUFFIX}"));
    let bytes = std::fs::read(&path).map_err(|error| failed("reading", &path, &error))?;
    text::parse(&bytes, &path)
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

/// Locks the state called `name`, for as long as the file is open. It is a file of its own, since
/// the state's own is replaced by each change.
fn lock(dir: &Path, name: &str, patience: Duration) -> Result<File, StateError> {
    let path = dir.join(format!("{name}.lock"));
    let cannot = |error: &io::Error| failed("locking", &path, error);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|error| cannot(&error))?;
    let deadline = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                // The number is for people: without it the message is as true.
                let _ = file.read_to_string(&mut owner);
                return Err(StateError::Locked {
                    path: dir.join(format!("{name}{SUFFIX}")),
                    owner: owner.trim().to_owned(),
                });
            }
            Err(TryLockError::Error(error)) => return Err(cannot(&error)),
        }
    }
    let note = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    // On a full disk the state can be read all the same.
    if let Err(error) = note {
        log::warn!("'{}': {error}", path.display());
    }
    Ok(file)
}

#[cfg(test)]
mod tests;
