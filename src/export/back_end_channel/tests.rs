//! What would be caught: a message that the crate is to read and that is taken here, descriptors of
//! the wrong kind or number that are kept or left open, a reply that nobody asked for, and a channel
//! that is full or closed and holds up who sends.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};

use super::*;

/// Sends a message with descriptors.
fn bring(stream: &UnixStream, header: Header, fds: &[BorrowedFd<'_>]) {
    let bytes = header.to_bytes();
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let mut control = [0u64; 16];
    let mut iovec = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: as for a message that is received; the buffers are large enough.
    unsafe {
        let mut message: libc::msghdr = zeroed();
        message.msg_iov = &raw mut iovec;
        message.msg_iovlen = 1;
        if !raw.is_empty() {
            let len = size_of_val(&*raw) as u32;
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(len) as _;
            let part = libc::CMSG_FIRSTHDR(&message);
            (*part).cmsg_level = libc::SOL_SOCKET;
            (*part).cmsg_type = libc::SCM_RIGHTS;
            (*part).cmsg_len = libc::CMSG_LEN(len) as _;
            std::ptr::copy_nonoverlapping(raw.as_ptr(), libc::CMSG_DATA(part).cast(), raw.len());
        }
        assert_eq!(libc::sendmsg(stream.as_raw_fd(), &message, 0), 12);
    }
}

fn header(flags: u32) -> Header {
    Header {
        request: SET_BACKEND_REQ_FD,
        flags: VERSION | flags,
        size: 0,
    }
}

/// A front-end's socket, ours, and both ends of a channel.
fn sockets() -> (UnixStream, UnixStream, UnixStream, UnixStream) {
    let (front, back) = UnixStream::pair().unwrap();
    let (theirs, ours) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    front.set_nonblocking(true).unwrap();
    (front, back, theirs, ours)
}

fn log() -> Log {
    Log::new("disk")
}

#[test]
fn a_channel_is_taken_and_told_of_each_change() {
    let (mut front, back, mut theirs, ours) = sockets();
    let channel = BackEndChannel::default();
    channel.config_changed(&log());
    bring(&front, header(NEED_REPLY), &[ours.as_fd()]);
    drop(ours);
    assert!(BackEndChannel::is_next(&back));
    assert!(BackEndChannel::is_next(&back), "it is still there");
    channel.take(&back, true).unwrap();
    let mut reply = [0; 20];
    front.read_exact(&mut reply).unwrap();
    let word = |at: usize| u32::from_ne_bytes(reply[at..at + 4].try_into().unwrap());
    assert_eq!(
        [word(0), word(4), word(8), word(12), word(16)],
        [21, 5, 8, 0, 0]
    );

    let mut message = [0; 12];
    assert!(
        theirs.read(&mut message).is_err(),
        "nothing was sent before"
    );
    for _ in 0..2 {
        channel.config_changed(&log());
        theirs.read_exact(&mut message).unwrap();
        let sent = Header::from_bytes(message);
        assert_eq!((sent.request, sent.flags, sent.size), (2, 1, 0));
    }
    channel.close();
    assert_eq!(theirs.read(&mut message).unwrap(), 0, "it is closed");
}

#[test]
fn no_reply_goes_to_who_wants_none() {
    for (flags, may_reply) in [(0, true), (NEED_REPLY, false)] {
        let (mut front, back, _theirs, ours) = sockets();
        bring(&front, header(flags), &[ours.as_fd()]);
        BackEndChannel::default().take(&back, may_reply).unwrap();
        assert!(front.read(&mut [0; 20]).is_err());
    }
}

#[test]
fn other_messages_are_left_to_be_read() {
    let (front, back, _theirs, _ours) = sockets();
    let other = Header {
        request: 1,
        ..header(0)
    };
    bring(&front, other, &[]);
    assert!(!BackEndChannel::is_next(&back));
    // What has come in part may be any message.
    let (mut front, back, ..) = sockets();
    front.write_all(&header(0).to_bytes()[..8]).unwrap();
    assert!(!BackEndChannel::is_next(&back));
}

#[test]
fn what_is_no_channel_is_closed_and_refused() {
    let file = tempfile::tempfile().unwrap();
    let (datagrams, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    for kind in 0..5 {
        let (mut front, back, mut theirs, ours) = sockets();
        let fds: &[BorrowedFd<'_>] = match kind {
            0 => &[],
            1 => &[file.as_fd()],
            2 => &[datagrams.as_fd()],
            3 => &[ours.as_fd(), ours.as_fd()],
            _ => &[ours.as_fd(); 9],
        };
        bring(&front, header(NEED_REPLY), fds);
        drop(ours);
        let channel = BackEndChannel::default();
        assert!(channel.take(&back, true).is_err(), "{kind}");
        assert!(channel.0.lock().is_none());
        let mut reply = [0; 20];
        front.read_exact(&mut reply).unwrap();
        assert_eq!(reply[12], 1);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "{kind}: all are closed");
    }
    for wrong in [
        Header {
            size: 8,
            ..header(0)
        },
        Header {
            flags: 2,
            ..header(0)
        },
        header(REPLY),
    ] {
        let (front, back, _, ours) = sockets();
        bring(&front, wrong, &[ours.as_fd()]);
        assert!(BackEndChannel::default().take(&back, true).is_err());
    }
}

#[test]
fn a_channel_that_nobody_reads_holds_nobody_up() {
    let (front, back, mut theirs, ours) = sockets();
    let channel = BackEndChannel::default();
    bring(&front, header(0), &[ours.as_fd()]);
    channel.take(&back, true).unwrap();
    for _ in 0..100_000 {
        channel.config_changed(&log());
    }
    let mut all = Vec::new();
    let _ = theirs.read_to_end(&mut all);
    assert!(!all.is_empty() && all.len() < 1_200_000, "it was full");
    assert!(all.len().is_multiple_of(12), "in whole messages");
    // It goes on when there is room again.
    channel.config_changed(&log());
    theirs.read_exact(&mut [0; 12]).unwrap();
}

#[test]
fn a_channel_that_is_closed_is_given_up_and_another_one_takes_its_place() {
    let (front, back, theirs, ours) = sockets();
    let channel = BackEndChannel::default();
    bring(&front, header(0), &[ours.as_fd()]);
    channel.take(&back, true).unwrap();
    drop((theirs, ours));
    channel.config_changed(&log());
    assert!(channel.0.lock().is_none());
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    bring(&front, header(0), &[ours.as_fd()]);
    channel.take(&back, true).unwrap();
    channel.config_changed(&log());
    theirs.read_exact(&mut [0; 12]).unwrap();
}
