//! Replacing a file as a whole: a reader, at any moment and after a power cut, finds what
//! was there before or what is there now.
//!
//! The new bytes go to a file beside it, and are stable before that file takes the name; the new
//! name is stable before the replacement is said to be done. [`Folder`] is these steps one by one, so
//! that tests can stop between them.

use std::ffi::CString;
use std::fmt::Debug;
use std::fs::{File, Metadata, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;

use crate::storage::file::is_memory;

/// A folder with files for one owner.
pub trait Folder: Debug + Send + Sync {
    /// What the file `name` has; `None` if there is none.
    ///
    /// # Errors
    /// What the system reports, as for the other steps.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;

    /// Makes the file `name` anew and writes `bytes`. It has the owner and mode of the file `like`;
    /// without that one it is for its owner alone.
    fn write(&self, name: &str, like: &str, bytes: &[u8]) -> io::Result<()>;

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
        .write(&beside, name, bytes)
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

/// Whose files are believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Those of the user that this process runs as.
    Own,
    /// Anybody's: for an operator's tools.
    Any,
    /// Those that anybody may have written, too: where a file can do no more than refuse a start.
    Unknown,
}

/// A folder on the disk. What is in it is reached through its descriptor, and no symbolic link is
/// followed: others may have put some there.
#[derive(Debug)]
pub struct DiskFolder {
    folder: File,
    owner: Owner,
}

impl DiskFolder {
    /// The folder `path`, which exists.
    ///
    /// # Errors
    /// When it does not, or cannot be opened, or others could put files in place of those in it.
    pub fn open(path: &Path, owner: Owner) -> io::Result<Self> {
        let folder = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(path)?;
        let mode = folder.metadata()?.mode();
        if owner != Owner::Unknown && mode & 0o022 != 0 && mode & libc::S_ISVTX == 0 {
            return Err(not_safe(
                "others may replace files in it (chmod go-w, or chmod +t where daemons of \
                 several users share it)",
            ));
        }
        Ok(Self { folder, owner })
    }

    /// Whether it goes with the host.
    #[must_use]
    pub fn is_memory(&self) -> bool {
        is_memory(&self.folder)
    }

    fn open_at(&self, name: &str, flags: libc::c_int) -> io::Result<File> {
        let name = CString::new(name)?;
        // A planted pipe would keep us until somebody writes to it, but for `O_NONBLOCK`.
        let flags = flags | libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK;
        let (folder, mode): (_, libc::mode_t) = (self.folder.as_raw_fd(), 0o600);
        // SAFETY: the name is a string that outlives the call.
        let fd = unsafe { libc::openat(folder, name.as_ptr(), flags, mode) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it is a new descriptor that nobody else owns.
        Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Refuses a file that somebody else may have written.
    fn check(&self, file: &File) -> io::Result<Metadata> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(not_safe("it is no regular file"));
        }
        // SAFETY: the call always succeeds.
        let own = unsafe { libc::geteuid() };
        if self.owner == Owner::Own && metadata.uid() != own {
            return Err(not_safe(&format!(
                "it belongs to user {}, and this process runs as user {own} (chown it, if what it \
                 says is to be believed)",
                metadata.uid()
            )));
        }
        if self.owner != Owner::Unknown && metadata.mode() & 0o022 != 0 {
            return Err(not_safe(
                "others may write it (chmod go-w, if what it says is to be believed)",
            ));
        }
        Ok(metadata)
    }

    /// The file `name`, made if there is none, to be locked.
    ///
    /// # Errors
    /// When it cannot be opened, or is not this process's own. As for [`Folder::write`] a new one is
    /// like `like`.
    pub fn open_lock(&self, name: &str, like: &str) -> io::Result<File> {
        let made = self.open_at(name, libc::O_RDWR | libc::O_CREAT | libc::O_EXCL);
        let file = match made {
            Ok(file) => {
                self.make_like(&file, like)?;
                file
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.open_at(name, libc::O_RDWR | libc::O_CREAT)?
            }
            Err(error) => return Err(error),
        };
        self.check(&file)?;
        Ok(file)
    }

    /// Whether some process has locked the file `name`. If there is no telling, none has.
    #[must_use]
    pub fn is_locked(&self, name: &str) -> bool {
        let file = self.open_at(name, libc::O_RDONLY);
        file.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// Whether `file` is still what the name `name` stands for.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn has(&self, name: &str, file: &File) -> io::Result<bool> {
        let now = match self.open_at(name, libc::O_RDONLY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            now => now?.metadata()?,
        };
        let own = file.metadata()?;
        Ok((now.dev(), now.ino()) == (own.dev(), own.ino()))
    }

    /// Gives a new file the owner and mode of the file `like`, if there is one.
    fn make_like(&self, file: &File, like: &str) -> io::Result<()> {
        let like = match self.open_at(like, libc::O_RDONLY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            like => self.check(&like?)?,
        };
        let own = file.metadata()?;
        let user = (own.uid() != like.uid()).then_some(like.uid());
        let group = (own.gid() != like.gid()).then_some(like.gid());
        let mut mode = like.mode() & 0o644;
        match fchown(file, user, group) {
            // Only root may give a file to any group. What that one may read no other may.
            Err(error) if user.is_none() && error.raw_os_error() == Some(libc::EPERM) => {
                mode &= 0o604;
            }
            changed => changed?,
        }
        file.set_permissions(Permissions::from_mode(mode))
    }
}

fn not_safe(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

impl Folder for DiskFolder {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let mut file = match self.open_at(name, libc::O_RDONLY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        self.check(&file)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    fn write(&self, name: &str, like: &str, bytes: &[u8]) -> io::Result<()> {
        // One that a process has left which was killed, or that somebody has put there.
        match self.remove(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = self.open_at(name, libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL)?;
        self.make_like(&file, like)?;
        file.write_all(bytes)
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        self.open_at(name, libc::O_RDONLY)?.sync_all()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (CString::new(from)?, CString::new(to)?);
        let folder = self.folder.as_raw_fd();
        // SAFETY: the names are strings that outlive the call.
        match unsafe { libc::renameat(folder, from.as_ptr(), folder, to.as_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn sync_names(&self) -> io::Result<()> {
        self.folder.sync_all()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let name = CString::new(name)?;
        // SAFETY: the name is a string that outlives the call.
        match unsafe { libc::unlinkat(self.folder.as_raw_fd(), name.as_ptr(), 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
