//! Errors as values, with their context: which file, which offset, what was expected.

use std::fmt;
use std::io;

use crate::storage::syncs::SyncFailure;

/// What an operation on storage was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Reading.
    Read,
    /// Writing, allocating or zeroing.
    Write,
    /// Making something stable.
    Flush,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
        })
    }
}

/// Everything that can go wrong with an image.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The storage failed.
    #[error("{file}: {action} at offset {offset}: {}", errno_text(*errno))]
    Io {
        /// What was tried.
        action: Action,
        /// The system's error number.
        errno: i32,
        /// The storage's name.
        file: String,
        /// Where, in bytes.
        offset: u64,
    },
    /// The storage cannot make anything stable, since it failed to do so before.
    #[error("{0}")]
    Sync(SyncFailure),
    /// The image contradicts its format.
    #[error("{file}: image is corrupt: {what}")]
    Corrupt {
        /// The storage's name.
        file: String,
        /// What was found, and what was expected.
        what: String,
    },
    /// The image has no room left, whatever room its storage has.
    #[error("{file}: image is full: {what}")]
    Full {
        /// The storage's name.
        file: String,
        /// What is at its limit, and what to do.
        what: String,
    },
    /// The image needs what this program does not have.
    #[error("{file}: {what}")]
    Unsupported {
        /// The storage's name.
        file: String,
        /// The feature.
        what: String,
    },
    /// Somebody else uses the image in a way that excludes ours.
    #[error("{0}")]
    Busy(String),
    /// The request makes no sense for the image: a write to a read-only layer, a range past the
    /// end, a name that does not exist.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// Wraps a storage error.
    #[must_use]
    pub fn io(action: Action, file: &str, offset: u64, error: &io::Error) -> Self {
        let inner = error.get_ref();
        if let Some(failure) = inner.and_then(|inner| inner.downcast_ref::<SyncFailure>()) {
            return Self::Sync(failure.clone());
        }
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        Self::Io {
            action,
            errno,
            file: file.to_owned(),
            offset,
        }
    }

    /// An image that contradicts its format.
    #[must_use]
    pub fn corrupt(file: &str, what: impl Into<String>) -> Self {
        Self::Corrupt {
            file: file.to_owned(),
            what: what.into(),
        }
    }

    /// An image that has grown as far as its format goes.
    #[must_use]
    pub fn full(file: &str, what: impl Into<String>) -> Self {
        Self::Full {
            file: file.to_owned(),
            what: what.into(),
        }
    }

    /// An image that needs more than there is.
    #[must_use]
    pub fn unsupported(file: &str, what: impl Into<String>) -> Self {
        Self::Unsupported {
            file: file.to_owned(),
            what: what.into(),
        }
    }

    /// The error number that a guest or a job reports.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io { errno, .. } => *errno,
            Self::Sync(failure) => failure.errno,
            Self::Corrupt { .. } => libc::EIO,
            Self::Full { .. } => libc::ENOSPC,
            Self::Unsupported { .. } => libc::ENOTSUP,
            Self::Busy(_) => libc::EBUSY,
            Self::Invalid(_) => libc::EINVAL,
        }
    }

    /// Whether writing failed, rather than reading.
    #[must_use]
    pub fn is_write(&self) -> bool {
        matches!(
            self,
            Self::Full { .. }
                | Self::Io {
                    action: Action::Write | Action::Flush,
                    ..
                }
                | Self::Sync(_)
        )
    }
}

/// The result of an operation on images.
pub type Result<T> = std::result::Result<T, Error>;

/// The system's text for an error number, as `strerror` has it.
#[must_use]
pub fn errno_text(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    // The standard library appends " (os error N)".
    text.split(" (os error")
        .next()
        .unwrap_or_default()
        .to_owned()
}
