//! The one door by which io_urings come into being.
//!
//! What a ring has begun goes on after its process has been killed: direct I/O still reads and
//! writes the memory of guests when `waitpid` has returned. The kernel frees a ring, and with it
//! the files registered there, only when its last operation has ended. So a file that is registered
//! in every ring of a process stays open, with the locks on it, for as long as any I/O of the
//! process goes on. The daemon holds its fences that way (`daemon/fence`).
//!
//! Nobody else may make a ring (`clippy.toml` sees to it): one without these files would be I/O
//! that nobody knows of.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{Builder, IoUring};
use parking_lot::Mutex;

use super::kept;

/// What is registered in each ring.
static KEPT_OPEN: Mutex<Vec<Arc<File>>> = Mutex::new(Vec::new());

/// Keeps `files` open from now on, until the process has ended and so has the last operation of the
/// last ring that is made after this. Rings that exist already do not know of it.
pub fn keep_open(files: impl IntoIterator<Item = Arc<File>>) {
    KEPT_OPEN.lock().extend(files);
}

/// Makes it possible to keep files open that come later ([`kept::add`]): by all rings that are made
/// after this.
///
/// # Errors
/// When there can be no socket for that.
pub fn keep_more_open() -> io::Result<()> {
    keep_open(kept::prepare()?);
    Ok(())
}

/// Makes a ring.
///
/// # Errors
/// Whatever `io_uring_setup(2)` and `io_uring_register(2)` report.
pub fn build(builder: &Builder, entries: u32) -> io::Result<IoUring> {
    #[expect(clippy::disallowed_methods, reason = "this is the door")]
    let uring = builder.build(entries)?;
    register(&uring, &KEPT_OPEN.lock())?;
    Ok(uring)
}

/// That there is no ring, and what to look at.
pub fn refused(error: &io::Error) -> io::Error {
    let hint = match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            "without CAP_IPC_LOCK the rings of all processes of a user count as locked memory: raise \
             `ulimit -l`, or LimitMEMLOCK= of a systemd unit"
        }
        _ => "is it allowed by /proc/sys/kernel/io_uring_disabled?",
    };
    let text = format!("setting up an io_uring: {error} ({hint})");
    io::Error::new(error.kind(), text)
}

fn register(uring: &IoUring, files: &[Arc<File>]) -> io::Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    let descriptors: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
    uring
        .submitter()
        .register_files(&descriptors)
        .map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("registering {} files in an io_uring: {error}", files.len()),
            )
        })
}

#[cfg(test)]
mod tests {
    //! What would be caught: a ring that does not keep the files open, so that a lock on them is
    //! free while its I/O goes on.

    use std::fs::TryLockError;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_lock_lasts_as_long_as_the_ring_in_which_its_file_is() {
        let named = tempfile::NamedTempFile::new().unwrap();
        // The standard library's locks belong to the open file, as ours do.
        let file = Arc::new(named.reopen().unwrap());
        file.try_lock().unwrap();
        #[expect(clippy::disallowed_methods, reason = "with a file of its own")]
        let uring = IoUring::builder().build(1).unwrap();
        register(&uring, std::slice::from_ref(&file)).unwrap();
        drop(file);
        let other = named.reopen().unwrap();
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(uring);
        let deadline = Instant::now() + Duration::from_secs(60);
        while other.try_lock().is_err() {
            assert!(Instant::now() < deadline, "the lock stays");
            std::thread::yield_now();
        }
    }
}
