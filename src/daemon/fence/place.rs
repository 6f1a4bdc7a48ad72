//! Where an export's fence lies: beside its socket, or beside the file of the daemon's state.
//!
//! The next daemon has to find it, so the name is made of what both have in common: the socket's
//! own name, also where the socket is handed down already open, and otherwise the export's id. A
//! socket that is handed down may have a name in a folder that this daemon cannot write or does not
//! see; then, as for one without a name, the fence lies beside the file of the daemon's state.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::file::FenceFile;
use crate::error::{Error, Result};
use crate::options::{ExportOptions, SocketAddress};

/// Opens the fence of `export`; `None` if there is no place for one. `state` is the file of the
/// daemon's state, without its ending: daemons that share the folder have different ones.
///
/// # Errors
/// When there is a place, and the file cannot be had there.
pub(super) fn open(export: &ExportOptions, state: Option<&Path>) -> Result<Option<FenceFile>> {
    let refused = |path: &Path, error: io::Error| {
        Error::Invalid(format!(
            "export '{}': its fence '{}': {error}",
            export.id,
            path.display()
        ))
    };
    let handed_down = match &export.addr {
        SocketAddress::Unix(path) => {
            let path = beside(path);
            return match FenceFile::open(&path) {
                Ok(fence) => Ok(Some(fence)),
                Err(error) => Err(refused(&path, error)),
            };
        }
        SocketAddress::Fd(fd) => listening_name(*fd),
    };
    if let Some(name) = handed_down {
        let path = beside(&name);
        match FenceFile::open(&path) {
            Ok(fence) => return Ok(Some(fence)),
            Err(error) if is_out_of_reach(&path, &error) => {
                log::debug!("no fence at '{}': {error}", path.display());
            }
            Err(error) => return Err(refused(&path, error)),
        }
    }
    let Some(state) = state else {
        return Ok(None);
    };
    let mut path = OsString::from(state);
    path.push(format!(".{}.fence", export.id));
    let path = PathBuf::from(path);
    match FenceFile::open_in_state(&path) {
        Ok(fence) => Ok(Some(fence)),
        Err(error) => Err(refused(&path, error)),
    }
}

fn beside(socket: &Path) -> PathBuf {
    let mut name = OsString::from(socket);
    name.push(".fence");
    name.into()
}

/// Whether a folder is one that this daemon will never reach, as opposed to one where something has
/// gone wrong today: the place must not change from one start to the next. A fence that lies there
/// is another user's, whose daemon may still run.
fn is_out_of_reach(fence: &Path, error: &io::Error) -> bool {
    if std::fs::symlink_metadata(fence).is_ok() {
        return false;
    }
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
    )
}

/// The name of a listening socket in the file system, if it has one that leads there from any
/// folder. A connection has the name of the socket that it came from, which it may share with others.
fn listening_name(fd: RawFd) -> Option<PathBuf> {
    let mut listens: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the call writes at most `len` bytes of `listens`.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut listens).cast(),
            &raw mut len,
        )
    };
    if result < 0 || listens == 0 {
        return None;
    }
    // SAFETY: all-zero bytes are a valid address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the call writes at most `len` bytes of `address`.
    if unsafe { libc::getsockname(fd, (&raw mut address).cast(), &raw mut len) } < 0 {
        return None;
    }
    if i32::from(address.sun_family) != libc::AF_UNIX {
        return None;
    }
    // The rest is zeros. One that begins with a zero is in no file system.
    let name: Vec<u8> = address
        .sun_path
        .iter()
        .map(|&byte| byte as u8)
        .take_while(|&byte| byte != 0)
        .collect();
    let name = Path::new(OsStr::from_bytes(&name));
    name.is_absolute().then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    //! What would be caught: a fence that the next daemon looks for somewhere else, or that two
    //! exports share; sockets whose name leads nowhere and that get a fence there; a folder that
    //! cannot be written and keeps a daemon from using the state folder.

    use std::net::TcpListener;
    use std::os::fd::AsRawFd;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    use super::*;

    fn export(addr: SocketAddress) -> ExportOptions {
        ExportOptions {
            id: "d0".into(),
            node_name: "n".into(),
            addr,
            writable: false,
            writethrough: false,
            num_queues: 1,
            logical_block_size: 512,
            iothread: None,
            serial: None,
        }
    }

    fn place(addr: SocketAddress, state: Option<&Path>) -> Option<PathBuf> {
        open(&export(addr), state)
            .unwrap()
            .map(|fence| fence.path().to_owned())
    }

    #[test]
    fn a_fence_lies_beside_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state").join("vm1");
        let socket = dir.path().join("vm.sock");
        let fence = Some(dir.path().join("vm.sock.fence"));
        assert_eq!(
            place(SocketAddress::Unix(socket.clone()), Some(&state)),
            fence
        );
        let listener = UnixListener::bind(&socket).unwrap();
        let fd = SocketAddress::Fd(listener.as_raw_fd());
        assert_eq!(place(fd.clone(), Some(&state)), fence);
        // Its folder is not to be seen from here.
        let hidden = dir.path().join("hidden");
        std::fs::create_dir(&hidden).unwrap();
        let listener = UnixListener::bind(hidden.join("vm.sock")).unwrap();
        std::fs::remove_dir_all(hidden).unwrap();
        let fd = SocketAddress::Fd(listener.as_raw_fd());
        assert_eq!(place(fd.clone(), None), None);
        std::fs::create_dir(dir.path().join("state")).unwrap();
        let fence = dir.path().join("state/vm1.d0.fence");
        assert_eq!(place(fd, Some(&state)), Some(fence));
    }

    #[test]
    fn sockets_without_a_name_take_the_state_folder() {
        let dir = tempfile::tempdir().unwrap();
        let address = SocketAddr::from_abstract_name(dir.path().as_os_str().as_bytes()).unwrap();
        let hidden = UnixListener::bind_addr(&address).unwrap();
        let network = TcpListener::bind("127.0.0.1:0").unwrap();
        let listener = UnixListener::bind(dir.path().join("vm.sock")).unwrap();
        let client = UnixStream::connect(dir.path().join("vm.sock")).unwrap();
        let (connection, _) = listener.accept().unwrap();
        let (pair, _other) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        for fd in [
            hidden.as_raw_fd(),
            network.as_raw_fd(),
            client.as_raw_fd(),
            connection.as_raw_fd(),
            pair.as_raw_fd(),
            file.as_raw_fd(),
            -1,
        ] {
            assert_eq!(place(SocketAddress::Fd(fd), None), None);
            let expected = Some(dir.path().join("vm1.d0.fence"));
            let state = dir.path().join("vm1");
            assert_eq!(place(SocketAddress::Fd(fd), Some(&state)), expected);
        }
    }

    #[test]
    fn what_lies_at_the_name_is_not_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vm.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        // Another user's, as root meets none.
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        assert!(is_out_of_reach(&beside(&socket), &denied));
        std::os::unix::fs::symlink("/", beside(&socket)).unwrap();
        assert!(!is_out_of_reach(&beside(&socket), &denied));
        for addr in [
            SocketAddress::Unix(socket.clone()),
            SocketAddress::Fd(listener.as_raw_fd()),
        ] {
            let error = open(&export(addr), Some(&dir.path().join("vm1")))
                .unwrap_err()
                .to_string();
            assert!(error.contains("no regular file"), "{error}");
            assert!(error.contains("vm.sock.fence'"), "{error}");
        }
    }
}
