//! The channel on which a back-end sends messages of its own: to tell that the configuration space,
//! and the size of the disk in it, is another one.
//!
//! The `vhost` crate takes in such a channel and keeps it to itself, and cannot send this message.
//! So the message that brings the channel (`SET_BACKEND_REQ_FD`) is seen on the socket before the
//! crate reads it, and taken there. This module can go when the crate can do both.
//!
//! ```text
//!   header, of either direction      0        4        8        12
//!                                    │ request │ flags  │ size   │
//!   flags: 0..2 version 1 │ 2 reply │ 3 needs a reply
//!
//!   front-end ─▶ 21, no payload, one descriptor      (reply: 21, a word of 64 bits, 0 is well)
//!   back-end  ─▶  2, no payload                      (on the channel; it is to read the space anew)
//! ```
//!
//! What is sent needs no reply: a front-end answers by reading the space on the main socket, and
//! who waited for a reply would keep it from that. Nor does sending wait. Where the channel is full
//! the front-end has messages like this one before it, and will read the space after it has seen
//! them.

use std::io::{self, Write};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use parking_lot::Mutex;

use super::limit::{Log, Topic};

/// The request that brings the channel.
const SET_BACKEND_REQ_FD: u32 = 21;
/// What the back-end sends.
const CONFIG_CHANGE: u32 = 2;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Descriptors that are looked at in one message. It has one; what is behind these is closed by the
/// kernel.
const MOST_FDS: usize = 4;

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    request: u32,
    flags: u32,
    size: u32,
}

impl Header {
    const LEN: usize = 12;

    fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let words = [self.request, self.flags, self.size];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let mut words = bytes.chunks_exact(4).map(|word| {
            let word = word.try_into().unwrap_or_default();
            u32::from_ne_bytes(word)
        });
        let mut next = || words.next().unwrap_or_default();
        Self {
            request: next(),
            flags: next(),
            size: next(),
        }
    }
}

/// The channel of an export's present front-end, if that has given one.
#[derive(Debug, Default)]
pub(super) struct BackEndChannel(Mutex<Option<UnixStream>>);

impl BackEndChannel {
    /// Whether the next message on `stream`, which has something to be read, brings a channel.
    pub(super) fn is_next(stream: &UnixStream) -> bool {
        let mut bytes = [0u8; Header::LEN];
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: the buffer is as long as is said.
        let len = unsafe {
            libc::recv(
                stream.as_raw_fd(),
                bytes.as_mut_ptr().cast(),
                bytes.len(),
                flags,
            )
        };
        // Of one that comes in pieces the channel is not used.
        usize::try_from(len) == Ok(Header::LEN)
            && Header::from_bytes(bytes).request == SET_BACKEND_REQ_FD
    }

    /// Takes the message that brings a channel, and answers it if it wants that and `may_reply`.
    ///
    /// # Errors
    /// When it is no such message, or brings something else.
    pub(super) fn take(&self, mut stream: &UnixStream, may_reply: bool) -> io::Result<()> {
        let (header, fds) = receive(stream)?;
        let taken = accept(header, fds);
        if may_reply && header.flags & NEED_REPLY != 0 {
            let reply = Header {
                request: header.request,
                flags: VERSION | REPLY,
                size: size_of::<u64>() as u32,
            };
            let mut bytes = reply.to_bytes().to_vec();
            bytes.extend(u64::from(taken.is_err()).to_ne_bytes());
            stream.write_all(&bytes)?;
        }
        *self.0.lock() = Some(taken?);
        Ok(())
    }

    /// Tells the front-end that it is to read the configuration space anew, if it has a channel for
    /// that.
    pub(super) fn config_changed(&self, log: &Log) {
        let mut channel = self.0.lock();
        let Some(socket) = &*channel else { return };
        let message = Header {
            request: CONFIG_CHANGE,
            flags: VERSION,
            size: 0,
        };
        match send(socket, &message.to_bytes()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                log.warn(
                    Topic::Session,
                    format_args!("telling the front-end of another size: {error}"),
                );
                *channel = None;
            }
        }
    }

    /// The front-end has gone.
    pub(super) fn close(&self) {
        *self.0.lock() = None;
    }
}

/// Checks what a message brings.
fn accept(header: Header, fds: Vec<OwnedFd>) -> io::Result<UnixStream> {
    let refused = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
    if header.request != SET_BACKEND_REQ_FD
        || header.flags & (VERSION_MASK | REPLY) != VERSION
        || header.size != 0
    {
        return Err(refused("a message for the back-end's channel is malformed"));
    }
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| {
        let text = format!("a back-end's channel is one descriptor, not {}", fds.len());
        io::Error::new(io::ErrorKind::InvalidData, text)
    })?;
    let option = |name| socket_option(fd.as_raw_fd(), name);
    if option(libc::SO_DOMAIN) != Some(libc::AF_UNIX)
        || option(libc::SO_TYPE) != Some(libc::SOCK_STREAM)
    {
        return Err(refused("a back-end's channel is not a Unix stream socket"));
    }
    let channel = UnixStream::from(fd);
    // The end of a connection to a listener, to ours perhaps: while it is open, the session that has it
    // would never see its front-end go.
    if !channel.peer_addr()?.is_unnamed() {
        return Err(refused(
            "a back-end's channel is connected to a socket with a name (expected one of a pair)",
        ));
    }
    Ok(channel)
}

fn socket_option(fd: RawFd, name: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and length are as the call wants them.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            name,
            std::ptr::from_mut(&mut value).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(value)
}

/// Sends without waiting, and without a signal if nobody is there.
fn send(socket: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the bytes are as long as is said.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            flags,
        )
    };
    match usize::try_from(sent) {
        Ok(len) if len == bytes.len() => Ok(()),
        // Nothing that is sent later could be told apart.
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Receives a header, and the descriptors that come with it.
fn receive(stream: &UnixStream) -> io::Result<(Header, Vec<OwnedFd>)> {
    const SPACE: usize = 64;
    /// As the kernel wants control messages to be aligned.
    #[repr(C, align(8))]
    struct Control([u8; SPACE]);

    let mut bytes = [0u8; Header::LEN];
    let mut control = Control([0; SPACE]);
    let mut iovec = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a message header of zeros is one without anything.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut iovec;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: it only computes.
    let space = unsafe { libc::CMSG_SPACE((MOST_FDS * size_of::<RawFd>()) as u32) } as usize;
    message.msg_controllen = space.min(SPACE) as _;
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_WAITALL;
    // SAFETY: the buffers are as long as is said, and outlive the call.
    let len = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, flags) };
    let fds = descriptors(&message);
    match usize::try_from(len) {
        Ok(Header::LEN) => Ok((Header::from_bytes(bytes), fds)),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// The descriptors that have come with a message. They are ours from here on.
fn descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut found = Vec::new();
    // SAFETY: the kernel has filled in the message, whose buffers are still there.
    let mut part = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: it is a control message of the kernel's, or null.
    while let Some(header) = unsafe { part.as_ref() } {
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: the message is of this kind.
            let data = unsafe { libc::CMSG_DATA(part) }.cast::<RawFd>();
            // SAFETY: it only computes.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = header.cmsg_len.saturating_sub(empty) / size_of::<RawFd>();
            for index in 0..count {
                // SAFETY: there are so many descriptors, which nobody else has.
                found.push(unsafe { OwnedFd::from_raw_fd(data.add(index).read_unaligned()) });
            }
        }
        // SAFETY: both are of this message.
        part = unsafe { libc::CMSG_NXTHDR(message, part) };
    }
    found
}

#[cfg(test)]
mod tests;
