//! Replacing a file as a whole: whoever reads it, at any moment and after a power cut, finds what
//! was there before or what is there now.
//!
//! The new bytes go to a file beside it, and are stable before that file takes the name; the new
//! name is stable before the replacement is said to be done. [`Folder`] is these steps one by one, so
//! that tests can stop between them.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::storage::file::is_memory;

/// A folder with files for one owner.
pub trait Folder: Debug + Send + Sync {
    /// What the file `name` has; `None` if there is none.
    ///
    /// # Errors
    /// What the system reports, as for the other steps.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;

    /// Makes the file `name`, for its owner alone, or empties it, and writes `bytes`.
    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Makes stable what was written to the file `name`.
    fn sync(&self, name: &str) -> io::Result<()>;

    /// Gives a file another name, in place of the file that has it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Makes names stable.
    fn sync_names(&self) -> io::Result<()>;

    /// Takes a file away.
    fn remove(&self, name: &str) -> io::Result<()>;
}

/// A replacement that failed.
#[derive(Debug)]
pub struct NotReplaced {
    /// Why.
    pub error: io::Error,
    /// Who reads the file finds the new bytes, though that may not last.
    pub replaced: bool,
}

/// Puts `bytes` in place of what the file `name` has.
///
/// # Errors
/// At the first step that fails.
pub fn replace(folder: &dyn Folder, name: &str, bytes: &[u8]) -> Result<(), NotReplaced> {
    let beside = format!("{name}.new");
    let prepared = folder
        .write(&beside, bytes)
        .and_then(|()| folder.sync(&beside))
        .and_then(|()| folder.rename(&beside, name));
    if let Err(error) = prepared {
        // What is left is overwritten by the next one; but it may be what fills the disk.
        let _ = folder.remove(&beside);
        return Err(NotReplaced {
            error,
            replaced: false,
        });
    }
    folder.sync_names().map_err(|error| NotReplaced {
        error,
        replaced: true,
    })
}

/// A folder on the disk.
#[derive(Debug)]
pub struct DiskFolder {
    path: PathBuf,
    /// For making names stable.
    folder: File,
}

impl DiskFolder {
    /// The folder `path`, which exists.
    ///
    /// # Errors
    /// When it does not, or cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let folder = File::open(path)?;
        if !folder.metadata()?.is_dir() {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        Ok(Self {
            path: path.to_owned(),
            folder,
        })
    }

    /// Whether it goes with the host.
    #[must_use]
    pub fn is_memory(&self) -> bool {
        is_memory(&self.folder)
    }
}

impl Folder for DiskFolder {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match std::fs::read(self.path.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(self.path.join(name))?;
        file.write_all(bytes)
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        File::open(self.path.join(name))?.sync_all()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path.join(from), self.path.join(to))
    }

    fn sync_names(&self) -> io::Result<()> {
        self.folder.sync_all()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))
    }
}
