//! The file of a fence, and the lock on it.

use std::fmt;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::errno_text;

/// The byte that is locked. One, and not all of them: should the name be a link to an image that
/// somebody has put there, the image's own locks are in nobody's way.
pub(super) const BYTE: i64 = 0;
/// The byte that a process locks, too, when it has been told to end.
const ENDING: i64 = 1;
/// Programs that remove old files from shared folders leave one with the sticky bit alone. No one
/// touches the file while it is locked, so that it looks old.
const MODE: u32 = 0o1600;

/// A file that is open and may be locked. Its lock goes with the open file.
#[derive(Debug)]
pub(super) struct FenceFile {
    file: Arc<File>,
    path: PathBuf,
    id: (u64, u64),
    /// It lies in the folder of the state, and not beside a socket.
    in_state: bool,
}

impl fmt::Display for FenceFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'", self.path.display())
    }
}

impl FenceFile {
    /// Opens the file, and makes it if there is none.
    ///
    /// # Errors
    /// What `open(2)` reports, in words where the errno says little; and when it is no regular file.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .mode(MODE)
            // A FIFO or a terminal that lies there must neither be waited for nor become ours.
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&path)
            .map_err(explain)?;
        let stat = file.metadata()?;
        if !stat.is_file() {
            return Err(strange());
        }
        if stat.mode() & MODE != MODE
            && let Err(error) = file.set_permissions(Permissions::from_mode(stat.mode() | MODE))
        {
            log::debug!("the mode of '{}': {error}", path.display());
        }
        Ok(Self {
            file: Arc::new(file),
            path,
            id: (stat.dev(), stat.ino()),
            in_state: false,
        })
    }

    /// As [`FenceFile::open`], in the folder of the daemon's state.
    ///
    /// # Errors
    /// As [`FenceFile::open`].
    pub(super) fn open_in_state(path: &Path) -> io::Result<Self> {
        Ok(Self {
            in_state: true,
            ..Self::open(path)?
        })
    }

    /// The file that is at the name now.
    ///
    /// # Errors
    /// As [`FenceFile::open`].
    pub(super) fn open_again(&self) -> io::Result<Self> {
        Ok(Self {
            in_state: self.in_state,
            ..Self::open(&self.path)?
        })
    }

    /// What to do in place of ending the process that holds it.
    pub(super) fn alternative(&self) -> &'static str {
        if self.in_state {
            "give this daemon a --state-name of its own"
        } else {
            "use another socket"
        }
    }

    #[cfg(test)]
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn shared(&self) -> Arc<File> {
        self.file.clone()
    }

    /// Whether it is the same file, whatever its name.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// Whether the name still leads to this file: otherwise nobody else will meet its lock.
    pub(super) fn is_in_place(&self) -> bool {
        std::fs::symlink_metadata(&self.path).is_ok_and(|stat| (stat.dev(), stat.ino()) == self.id)
    }

    /// Takes the lock if it is free. True if it is ours now.
    ///
    /// # Errors
    /// What `fcntl(2)` reports, but for a lock that somebody else has.
    pub(super) fn try_lock(&self) -> io::Result<bool> {
        match self.set_lock(libc::F_WRLCK, BYTE, 1) {
            Ok(()) => Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// Gives the lock back, also while other processes have the file open.
    ///
    /// # Errors
    /// What `fcntl(2)` reports.
    pub(super) fn unlock(&self) -> io::Result<()> {
        self.set_lock(libc::F_UNLCK, BYTE, 2)
    }

    /// Shows who waits for the lock that its holder is about to end.
    ///
    /// # Errors
    /// What `fcntl(2)` reports.
    pub(super) fn mark_ending(&self) -> io::Result<()> {
        self.set_lock(libc::F_WRLCK, ENDING, 1)
    }

    /// Whether the holder of the lock is about to end.
    pub(super) fn is_ending(&self) -> bool {
        let mut lock = lock(libc::F_RDLCK, ENDING, 1);
        // SAFETY: the call reads and writes one flock.
        let result =
            unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
        result >= 0 && i32::from(lock.l_type) != libc::F_UNLCK
    }

    fn set_lock(&self, kind: libc::c_int, start: i64, len: i64) -> io::Result<()> {
        let lock = lock(kind, start, len);
        // SAFETY: the call reads one flock.
        if unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

fn lock(kind: libc::c_int, start: i64, len: i64) -> libc::flock {
    // SAFETY: all-zero bytes are a valid flock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = start;
    lock.l_len = len;
    lock
}

/// Says what is to be done, where it is known.
fn explain(error: io::Error) -> io::Error {
    let Some(errno) = error.raw_os_error() else {
        return error;
    };
    let advice = match errno {
        libc::ELOOP | libc::EISDIR | libc::ENXIO => return strange(),
        libc::ENOENT => ": make the folder first",
        libc::EACCES => ": this user must be able to write the folder, and the file if it exists",
        _ => "",
    };
    io::Error::new(error.kind(), format!("{}{advice}", errno_text(errno)))
}

fn strange() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "what lies there is no regular file, but a symbolic link or something else: remove it",
    )
}

#[cfg(test)]
mod tests {
    //! What would be caught: a fence that follows a link to where somebody else wants it, waits for
    //! a FIFO's other side or is a folder; one that others can open; one that is taken for in place
    //! when the name is another file's; one that is handed down to programs that are executed.

    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_a_regular_file_is_a_fence() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let target = path("target");
        symlink(&target, path("link")).unwrap();
        std::fs::create_dir(path("folder")).unwrap();
        let fifo = std::ffi::CString::new(path("fifo").to_str().unwrap()).unwrap();
        // SAFETY: the path is a string.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
        for name in ["link", "folder", "fifo"] {
            let error = FenceFile::open(&path(name)).unwrap_err();
            assert!(
                error.to_string().contains("no regular file"),
                "{name}: {error}"
            );
        }
        assert!(!target.exists(), "made through the link");
        let error = FenceFile::open(&path("none/vm.fence")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_file_is_this_users_and_this_process_alone() {
        let dir = tempfile::tempdir().unwrap();
        let fence = FenceFile::open(&dir.path().join("vm.fence")).unwrap();
        let mode = fence.file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o177, 0, "{mode:o}");
        assert_ne!(mode & 0o1000, 0, "it would be removed as an old file");
        // SAFETY: no memory is passed.
        let flags = unsafe { libc::fcntl(fence.file.as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }

    #[test]
    fn a_lock_is_met_under_the_same_name_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.fence");
        let (first, second) = (
            FenceFile::open(&path).unwrap(),
            FenceFile::open(&path).unwrap(),
        );
        assert!(first.is_same(&second));
        assert!(first.try_lock().unwrap());
        assert!(!second.try_lock().unwrap());
        assert!(second.is_in_place());
        std::fs::remove_file(&path).unwrap();
        assert!(!second.is_in_place());
        let third = FenceFile::open(&path).unwrap();
        assert!(!second.is_in_place() && third.is_in_place() && !third.is_same(&first));
        drop(first);
        assert!(second.try_lock().unwrap());
    }
}
