//! A file for a new image.
//!
//! It exists for good when it is [kept](MadeFile::keep), with its place in the folder; until then it
//! goes when this is dropped, and all is as before.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::opener::outside;
use super::syncs;

/// A file that was made, or found empty, and may have to go again.
#[derive(Debug)]
#[must_use = "the file is removed when this is dropped"]
pub struct MadeFile {
    path: PathBuf,
    /// It was there before, with nothing in it.
    was_there: bool,
    /// What is in it by now is ours.
    written: bool,
    kept: bool,
}

impl MadeFile {
    /// Makes a file at `path`. One that is there already is taken if nothing is in it, as tools
    /// leave it that prepare its owner and its rights.
    ///
    /// # Errors
    /// What the system reports; or something is in the file.
    pub async fn make(path: &Path) -> io::Result<Self> {
        let path = path.to_owned();
        outside(move || Self::make_here(path)).await
    }

    fn make_here(path: PathBuf) -> io::Result<Self> {
        let new = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .custom_flags(libc::O_CLOEXEC)
            .open(&path);
        let was_there = match new {
            Ok(_) => false,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // Not opened: that could wait for ever, or do something.
                let found = std::fs::metadata(&path)?;
                if !found.is_file() || found.len() > 0 {
                    return Err(io::Error::new(
                        io::ErrorKind::AlreadyExists,
                        "it is there already, and not empty (expected a new file; an image that \
                         was made beforehand is taken with mode 'existing')",
                    ));
                }
                true
            }
            Err(error) => return Err(error),
        };
        Ok(Self {
            path,
            was_there,
            written: false,
            kept: false,
        })
    }

    /// Makes its place in the folder stable. What is in it is its writer's to make stable.
    ///
    /// # Errors
    /// What the system reports; the file goes then.
    pub async fn settle(&self) -> io::Result<()> {
        Self::settle_place(&self.path).await
    }

    /// Makes the place of the file at `path` in its folder stable, and that of a link which leads
    /// there. A path that is no file has no place.
    ///
    /// # Errors
    /// What the system reports.
    pub async fn settle_place(path: &Path) -> io::Result<()> {
        let path = path.to_owned();
        outside(move || {
            let target = match std::fs::canonicalize(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                target => target?,
            };
            sync_folder_of(&path)?;
            if target != path {
                sync_folder_of(&target)?;
            }
            Ok(())
        })
        .await
    }

    /// It has been locked, and is about to be written: what is in it from here on is ours. `len` is
    /// what is in it by then.
    ///
    /// # Errors
    /// Another program has written it since it was looked at.
    pub fn begin_to_write(&mut self, len: u64) -> io::Result<()> {
        if len > 0 {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "another program has just written it",
            ));
        }
        self.written = true;
        Ok(())
    }

    /// Leaves it there.
    pub fn keep(mut self) {
        self.kept = true;
    }

    fn take_back(&self) -> io::Result<()> {
        if !self.written && (self.was_there || std::fs::metadata(&self.path)?.len() > 0) {
            // What is in it is another program's.
            return Ok(());
        }
        match self.was_there {
            true => OpenOptions::new().write(true).open(&self.path)?.set_len(0),
            false => syncs::remove_file(&self.path),
        }
    }
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder)?.sync_all()
}

impl Drop for MadeFile {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = self.take_back()
        {
            let path = self.path.display();
            log::warn!("'{path}': taking back a file that is not needed: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a file of somebody else's that is overwritten or removed, and one that
    //! is left over.

    use super::*;
    use crate::reactor::Reactor;

    #[test]
    fn what_is_not_kept_is_as_before() {
        let dir = tempfile::tempdir().unwrap();
        let reactor = Reactor::for_this_thread().unwrap();
        let make = |path: &Path| reactor.block_on(MadeFile::make(path));
        let path = dir.path().join("new");
        drop(make(&path).unwrap());
        assert!(!path.exists());
        std::fs::write(&path, "").unwrap();
        let mut file = make(&path).unwrap();
        file.begin_to_write(0).unwrap();
        std::fs::write(&path, "an image").unwrap();
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        // Another program has it before it is locked.
        let mut file = make(&path).unwrap();
        std::fs::write(&path, "theirs").unwrap();
        assert!(file.begin_to_write(6).is_err());
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), b"theirs");
        std::fs::write(&path, "somebody's").unwrap();
        assert!(make(&path).is_err() && make(dir.path()).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody's");
        // The same of one that was not there.
        let fresh = dir.path().join("fresh");
        let mut file = make(&fresh).unwrap();
        std::fs::write(&fresh, "theirs").unwrap();
        assert!(file.begin_to_write(6).is_err());
        drop(file);
        assert_eq!(std::fs::read(&fresh).unwrap(), b"theirs");
        let other = dir.path().join("kept");
        let file = make(&other).unwrap();
        reactor.block_on(file.settle()).unwrap();
        file.keep();
        assert!(other.exists());
        assert!(make(&dir.path().join("no/where")).is_err());
    }
}
