//! The socket of an export: made at a path, or handed down.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::config::SocketSource;
use super::session::Source;
use crate::error::{Error, Result, errno_text};
use crate::unix_socket::is_abandoned;

/// A socket that front-ends come from.
pub(super) struct Socket {
    source: Source,
    guard: Option<PathGuard>,
}

impl Socket {
    pub(super) fn open(id: &str, source: SocketSource) -> Result<Self> {
        let kind_of = |fd: &OwnedFd| socket_option(fd, libc::SO_DOMAIN);
        let wrong = |what: &str| Error::Invalid(format!("export '{id}': {what}"));
        match source {
            SocketSource::Path(path) => {
                let listener = bind(&path).map_err(|error| {
                    let text = error
                        .raw_os_error()
                        .map_or_else(|| error.to_string(), errno_text);
                    Error::Invalid(format!(
                        "Failed to bind socket to {}: {text}",
                        path.display()
                    ))
                })?;
                Ok(Self {
                    guard: PathGuard::new(path),
                    source: Source::Listener(listener),
                })
            }
            SocketSource::ListenFd(fd) => {
                if kind_of(&fd).ok() != Some(libc::AF_UNIX)
                    || socket_option(&fd, libc::SO_ACCEPTCONN).ok() != Some(1)
                {
                    return Err(wrong("the descriptor is not a listening Unix socket"));
                }
                Ok(Self {
                    source: Source::Listener(UnixListener::from(fd)),
                    guard: None,
                })
            }
            SocketSource::ConnectedFd(fd) => {
                if kind_of(&fd).ok() != Some(libc::AF_UNIX)
                    || socket_option(&fd, libc::SO_ACCEPTCONN).ok() != Some(0)
                {
                    return Err(wrong("the descriptor is not a connected Unix socket"));
                }
                Ok(Self {
                    source: Source::Connection(UnixStream::from(fd)),
                    guard: None,
                })
            }
        }
    }

    /// The source, and what removes the path when it is dropped.
    pub(super) fn split(self) -> (Source, Option<PathGuard>) {
        (self.source, self.guard)
    }
}

impl SocketSource {
    /// The source that an inherited descriptor is: a listener or a connection.
    ///
    /// # Errors
    /// When it is no socket.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Ok(match socket_option(&fd, libc::SO_ACCEPTCONN)? {
            0 => Self::ConnectedFd(fd),
            _ => Self::ListenFd(fd),
        })
    }
}

/// Removes a socket at the end, if it is still the one that was made.
pub(super) struct PathGuard {
    path: PathBuf,
    id: (u64, u64),
}

impl PathGuard {
    fn new(path: PathBuf) -> Option<Self> {
        let id = file_id(&path)?;
        Some(Self { path, id })
    }
}

impl Drop for PathGuard {
    fn drop(&mut self) {
        if file_id(&self.path) == Some(self.id)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            log::warn!("removing {}: {error}", self.path.display());
        }
    }
}

fn file_id(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Binds, in the place of a socket that nobody listens on any more: a daemon that was killed
/// leaves one behind.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            if !is_socket || !is_abandoned(path) {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        result => result,
    }
}

fn socket_option(fd: &OwnedFd, option: i32) -> io::Result<i32> {
    let mut value: i32 = 0;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the call writes at most `len` bytes of `value`.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}
