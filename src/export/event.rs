//! Eventfds that a front-end hands us: kicks, calls and errors.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

/// Accepts an eventfd and nothing else: other files could block or misbehave when a worker
/// writes to them or polls them. It is made non-blocking, so that a front-end which fills the
/// counter cannot stop a worker.
pub(super) fn accept(file: File) -> io::Result<File> {
    let fd = file.as_raw_fd();
    let kind = std::fs::read_link(format!("/proc/self/fd/{fd}"))?;
    if kind.as_os_str() != "anon_inode:[eventfd]" {
        let text = format!("the descriptor is not an eventfd but {}", kind.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // SAFETY: the descriptor is ours, and the call touches no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Adds one to the counter. A full counter means that the other side has been signalled often
/// enough.
pub(super) fn signal(mut event: &File) {
    let _ = event.write(&1u64.to_ne_bytes());
}
