//! Files for new images.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::opener::outside;
use super::{Access, FileStorage, OpenFlags, Storage, syncs};
use crate::error::{Action, Error, Result, errno_text};

/// Where a chain of symbolic links ends, whether or not there is a file.
#[must_use]
pub fn behind_links(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    // As many as the kernel follows.
    for _ in 0..40 {
        let Ok(target) = std::fs::read_link(&path) else {
            break;
        };
        path = match path.parent() {
            Some(folder) => folder.join(target),
            None => target,
        };
    }
    path
}

/// A file for a new image; one that was not there goes again unless it is kept.
#[derive(Debug)]
pub struct NewFile {
    storage: Arc<FileStorage>,
    path: PathBuf,
    fresh: bool,
}

impl NewFile {
    /// Opens or makes the file. It is locked, so that nobody loses an image in use.
    ///
    /// # Errors
    /// When it cannot be made or opened, or another program has it.
    pub async fn open(path: &Path) -> Result<Self> {
        let failed = |error: io::Error| {
            let text = match error.raw_os_error() {
                Some(code) => errno_text(code),
                None => error.to_string(),
            };
            Error::Invalid(format!("Could not create '{}': {text}", path.display()))
        };
        let wanted = path.to_owned();
        let (path, fresh) = outside(move || {
            // A link that leads nowhere stays: what it names is made, and goes again if need be.
            let path = behind_links(&wanted);
            match OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o644)
                .custom_flags(libc::O_CLOEXEC)
                .open(&path)
            {
                Ok(_) => Ok((path, true)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok((path, false)),
                Err(error) => Err(error),
            }
        })
        .await
        .map_err(failed)?;
        let flags = OpenFlags {
            writable: true,
            ..OpenFlags::default()
        };
        let text = |error: io::Error| Error::Busy(error.to_string());
        let storage = FileStorage::open_outside(&path, flags)
            .await
            .map_err(|error| {
                forget(&path, fresh);
                text(error)
            })?;
        let file = Self {
            storage: Arc::new(storage),
            path,
            fresh,
        };
        file.storage.set_access(Access::Write).await.map_err(text)?;
        Ok(file)
    }

    /// Its bytes.
    #[must_use]
    pub fn storage(&self) -> Arc<dyn Storage> {
        self.storage.clone()
    }

    /// Empties the file and makes it `size` bytes of zeros.
    ///
    /// # Errors
    /// When the file system has no files of that size, or fails.
    pub async fn set_size(&self, size: u64) -> Result<()> {
        let failed = |error| Error::io(Action::Write, self.storage.name(), size, &error);
        // Where the file system has no files of that size, the old contents stay.
        if self.storage.len().await.map_err(failed)? < size {
            self.storage.set_len(size).await.map_err(failed)?;
        }
        self.storage.set_len(0).await.map_err(failed)?;
        self.storage.set_len(size).await.map_err(failed)
    }

    /// Keeps the file, although it was not there before.
    pub fn keep(mut self) {
        self.fresh = false;
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        forget(&self.path, self.fresh);
    }
}

fn forget(path: &Path, fresh: bool) {
    if fresh {
        // The error that led here is told; this one would say no more.
        let _ = syncs::remove_file(path);
    }
}
