//! Errors as values, with their context: which file, which offset, what was expected.

use std::fmt;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

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
    #[error("{file}: {action}{of} at offset {offset}: {}", errno_text(*errno))]
    Io {
        /// What was tried.
        action: Action,
        /// Of what, or what for, with a space before it; nothing where the offset says it.
        of: &'static str,
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
        Self::io_of(action, "", file, offset, error)
    }

    /// As [`io`](Self::io), with words that say of what it was, or what for.
    #[must_use]
    pub fn io_of(
        action: Action,
        of: &'static str,
        file: &str,
        offset: u64,
        error: &io::Error,
    ) -> Self {
        let inner = error.get_ref();
        if let Some(failure) = inner.and_then(|inner| inner.downcast_ref::<SyncFailure>()) {
            return Self::Sync(failure.clone());
        }
        // Of a disk that serves as storage: it names the file, and the place in it.
        if let Some(below) = inner.and_then(|inner| inner.downcast_ref::<Self>()) {
            return below.clone();
        }
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        Self::Io {
            action,
            of,
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

impl From<Error> for io::Error {
    /// As storage reports it: what it cannot do is an error number, which callers look at, and
    /// everything else is what [`Error::io`] makes of it again.
    fn from(error: Error) -> Self {
        let plain = Self::from_raw_os_error(error.errno());
        match error {
            Error::Sync(failure) => failure.into(),
            Error::Unsupported { .. } | Error::Invalid(_) => plain,
            error => Self::new(plain.kind(), error),
        }
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

/// A sync that failed, after which nothing is known of what was written before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncFailure {
    /// The file's name.
    pub file: String,
    /// The system's error number.
    pub errno: i32,
    /// When it failed.
    pub at: SystemTime,
}

impl fmt::Display for SyncFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: a flush failed at {} ({}): what was written since the last one that succeeded may \
             be lost, and all flushes fail until the file has been checked and 'stratactl \
             clear-sync-error' says so",
            self.file,
            utc(self.at),
            errno_text(self.errno)
        )
    }
}

impl std::error::Error for SyncFailure {}

impl From<SyncFailure> for io::Error {
    fn from(failure: SyncFailure) -> Self {
        let kind = Self::from_raw_os_error(failure.errno).kind();
        Self::new(kind, failure)
    }
}

/// `2026-11-23 09:05:33 UTC`.
pub(crate) fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    // Years that begin in March, in eras of 400 of them, since 0000-03-01.
    let days = seconds / 86400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (
        day - (153 * month + 2) / 5 + 1,
        if month < 10 { month + 3 } else { month - 9 },
    );
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    //! What would be caught: a day that the calendar does not have, or has twice.

    use std::time::Duration;

    use super::*;

    #[test]
    fn the_time_is_told_in_utc() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (1_795_424_733, "2026-11-23 09:05:33 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
