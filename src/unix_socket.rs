//! Unix sockets that a process has left behind.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// Whether the socket at `path` is one that no process has any more. A process that listens there does not
/// notice the question, and nobody waits for its answer: a datagram's socket cannot be connected to
/// that of a stream, and the kernel says so when there is one.
#[must_use]
pub fn is_abandoned(path: &Path) -> bool {
    let connected = UnixDatagram::unbound().and_then(|socket| socket.connect(path));
    connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    //! What would be caught: a socket in use that is taken for left, a listener that has a visitor
    //! by the question, and one that makes it wait since its queue is full.

    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_socket_is_abandoned_when_its_process_has_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert!(!is_abandoned(&path), "there is none");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        assert!(!is_abandoned(&path));
        assert!(listener.accept().is_err(), "nobody has come");
        // SAFETY: no memory is passed.
        let result = unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) };
        assert_eq!(result, 0);
        let _waiting = UnixStream::connect(&path).unwrap();
        assert!(!is_abandoned(&path), "its queue is full");
        drop(listener);
        assert!(is_abandoned(&path));
    }
}
