//! QEMU's image locks: open-file-description locks on single bytes of the file, one per
//! permission. QEMU, `qemu-img` and this daemon thereby refuse an image that another writes.
//!
//! Source: the comments in QEMU's file driver and `docs/system/qemu-block-drivers` ("Disk image
//! file locking"). Byte `100 + p` is held by whoever uses permission `p`; byte `200 + p` by
//! whoever does not share it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

const USED: i64 = 100;
const UNSHARED: i64 = 200;

const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What a lock is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read; nobody may write meanwhile.
    Read,
    /// Read; others may write (`force-share`): nothing is locked.
    ReadShared,
    /// Read and write; nobody else may.
    Write,
}

impl Access {
    fn used(self) -> &'static [(i64, &'static str)] {
        match self {
            Self::Read => &[(CONSISTENT_READ, "consistent read")],
            Self::ReadShared => &[],
            Self::Write => &[
                (CONSISTENT_READ, "consistent read"),
                (WRITE, "write"),
                (RESIZE, "resize"),
            ],
        }
    }

    fn unshared(self) -> &'static [(i64, &'static str)] {
        match self {
            Self::Read | Self::Write => &[(WRITE, "write"), (RESIZE, "resize")],
            Self::ReadShared => &[],
        }
    }
}

/// Takes the locks for `access` and gives back those that it does not need; all go with the file.
///
/// # Errors
/// When somebody else's use of the image does not go with it. The text is QEMU's.
pub fn lock(file: &File, access: Access, path: &Path) -> io::Result<()> {
    let result = take(file, access, path);
    if result.is_err() {
        // What was held before is not known here; a reader's locks harm nobody.
        release_all_but(file, Access::Read)?;
    } else {
        release_all_but(file, access)?;
    }
    result
}

/// Gives all locks back. They would go with the file, but the kernel may hold on to that for a
/// moment after the last operation on it.
pub fn unlock(file: &File) {
    for bit in [CONSISTENT_READ, WRITE, RESIZE] {
        for byte in [USED + bit, UNSHARED + bit] {
            if let Err(error) = set_lock(file, libc::F_UNLCK, byte) {
                log::debug!("unlocking an image: {error}");
            }
        }
    }
}

fn release_all_but(file: &File, access: Access) -> io::Result<()> {
    for bit in [CONSISTENT_READ, WRITE, RESIZE] {
        if !access.used().iter().any(|&(b, _)| b == bit) {
            set_lock(file, libc::F_UNLCK, USED + bit)?;
        }
        if !access.unshared().iter().any(|&(b, _)| b == bit) {
            set_lock(file, libc::F_UNLCK, UNSHARED + bit)?;
        }
    }
    Ok(())
}

fn take(file: &File, access: Access, path: &Path) -> io::Result<()> {
    for &(bit, name) in access.used() {
        hold(file, USED + bit).map_err(|e| refused("shared ", name, path, &e))?;
    }
    for &(bit, name) in access.unshared() {
        hold(file, UNSHARED + bit).map_err(|e| refused("", name, path, &e))?;
    }
    // After taking our own, so that of two that race at least one sees the other.
    for &(bit, name) in access.used() {
        if held_by_other(file, UNSHARED + bit)? {
            return Err(in_use("", name, path));
        }
    }
    for &(bit, name) in access.unshared() {
        if held_by_other(file, USED + bit)? {
            return Err(in_use("shared ", name, path));
        }
    }
    Ok(())
}

fn in_use(shared: &str, name: &str, path: &Path) -> io::Error {
    io::Error::new(
        io::ErrorKind::WouldBlock,
        format!(
            "Could not open '{}': Failed to get {shared}\"{name}\" lock: Is another process using the image [{}]?",
            path.display(),
            path.display()
        ),
    )
}

fn refused(shared: &str, name: &str, path: &Path, error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => in_use(shared, name, path),
        _ => io::Error::new(
            error.kind(),
            format!("locking '{}': {error}", path.display()),
        ),
    }
}

fn flock(kind: i32, start: i64) -> libc::flock {
    // SAFETY: all-zero bytes are a valid flock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = start;
    lock.l_len = 1;
    lock
}

fn hold(file: &File, byte: i64) -> io::Result<()> {
    set_lock(file, libc::F_RDLCK, byte)
}

fn set_lock(file: &File, kind: libc::c_int, byte: i64) -> io::Result<()> {
    let lock = flock(kind, byte);
    // SAFETY: the call reads one flock.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether an exclusive lock would meet somebody else's.
fn held_by_other(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, byte);
    // SAFETY: the call reads and writes one flock.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}
