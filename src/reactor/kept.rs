//! Files that rings keep open although they were opened after the rings were made.
//!
//! A ring's files are registered when it is made, by the thread that uses it. So one file is
//! registered in every ring that can still be added to: a socket. What is sent to a socket and not
//! received stays in its queue, open files included, for as long as the socket is open anywhere;
//! and a ring holds it until the ring's last operation has ended.
//!
//! The queue has the whole set of files at any time. When the set changes the new one is sent
//! first, and the old one is received and closed then: no file is ever in this process's hands
//! alone.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Files in one message; the kernel takes 253.
const FILES: usize = 128;

struct Queue {
    send: UnixStream,
    receive: UnixStream,
    files: Vec<Arc<File>>,
    /// Messages that the set was sent in.
    messages: usize,
}

static QUEUE: Mutex<Option<Queue>> = Mutex::new(None);

/// Makes it possible to [`add`] files later: to all rings in which the file that is returned has been
/// registered. `None`: it was returned before.
///
/// # Errors
/// When there can be no socket.
pub(super) fn prepare() -> io::Result<Option<Arc<File>>> {
    let mut queue = QUEUE.lock();
    if queue.is_some() {
        return Ok(None);
    }
    let (made, file) = Queue::new()?;
    *queue = Some(made);
    Ok(Some(file))
}

/// Keeps `file` open for as long as any ring that knows of the socket.
///
/// # Errors
/// When no ring can know of it, or the kernel does not take it.
pub fn add(file: Arc<File>) -> io::Result<()> {
    let mut queue = QUEUE.lock();
    let none = || io::Error::other("no ring was made to keep more files open");
    queue.as_mut().ok_or_else(none)?.add(file)
}

/// No longer keeps `file` open. It may stay open where the kernel has no room for the new set.
pub fn remove(file: &Arc<File>) {
    if let Some(queue) = QUEUE.lock().as_mut()
        && let Err(error) = queue.remove(file)
    {
        log::debug!("a file that is kept open: {error}");
    }
}

impl Queue {
    fn new() -> io::Result<(Self, Arc<File>)> {
        let (send, receive) = UnixStream::pair()?;
        send.set_nonblocking(true)?;
        receive.set_nonblocking(true)?;
        let file = Arc::new(File::from(OwnedFd::from(receive.try_clone()?)));
        let queue = Self {
            send,
            receive,
            files: Vec::new(),
            messages: 0,
        };
        Ok((queue, file))
    }

    fn add(&mut self, file: Arc<File>) -> io::Result<()> {
        self.files.push(file);
        self.send_again().inspect_err(|_| {
            self.files.pop();
        })
    }

    fn remove(&mut self, file: &Arc<File>) -> io::Result<()> {
        self.files.retain(|other| !Arc::ptr_eq(other, file));
        self.send_again()
    }

    /// Replaces what is in the queue by the present set. When that fails the queue has both.
    fn send_again(&mut self) -> io::Result<()> {
        let old = self.messages;
        for files in self.files.chunks(FILES) {
            let files: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
            let sent = self.send.send_with_fds(&[&[0_u8][..]], &files);
            sent.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
            self.messages += 1;
        }
        for _ in 0..old {
            self.receive_one()?;
            self.messages -= 1;
        }
        Ok(())
    }

    /// Takes the oldest message, and closes its files.
    fn receive_one(&self) -> io::Result<()> {
        let (mut byte, mut files) = ([0_u8; 1], [-1; FILES]);
        let mut vectors = [libc::iovec {
            iov_base: byte.as_mut_ptr().cast(),
            iov_len: byte.len(),
        }];
        // SAFETY: the vector is of memory that outlives the call.
        let received = unsafe { self.receive.recv_with_fds(&mut vectors, &mut files) };
        let (_, count) = received.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        for &file in files.iter().take(count) {
            // SAFETY: the kernel has made this descriptor for us, and nobody else knows it.
            drop(unsafe { OwnedFd::from_raw_fd(file) });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a file that is closed although a ring is to keep it open, at a change
    //! of the set as well; one that stays open when it was let go of, or when the rings are gone;
    //! descriptors that are left behind.

    #![allow(clippy::unwrap_used)]

    use std::fs::TryLockError;
    use std::time::{Duration, Instant};

    use super::*;

    struct Locked {
        named: tempfile::NamedTempFile,
    }

    impl Locked {
        /// A file with a lock that belongs to the open file.
        fn new() -> (Self, Arc<File>) {
            let named = tempfile::NamedTempFile::new().unwrap();
            let file = Arc::new(named.reopen().unwrap());
            file.try_lock().unwrap();
            (Self { named }, file)
        }

        fn is_held(&self) -> bool {
            let other = self.named.reopen().unwrap();
            matches!(other.try_lock(), Err(TryLockError::WouldBlock))
        }

        fn comes_free(&self) {
            let deadline = Instant::now() + Duration::from_secs(60);
            while self.is_held() {
                assert!(Instant::now() < deadline, "the lock stays");
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn a_ring_holds_files_that_came_after_it() {
        let (mut queue, socket) = Queue::new().unwrap();
        #[expect(clippy::disallowed_methods, reason = "with a file of its own")]
        let uring: io_uring::IoUring = io_uring::IoUring::builder().build(1).unwrap();
        let registered = uring.submitter().register_files(&[socket.as_raw_fd()]);
        registered.unwrap();
        drop(socket);
        let (one, file_one) = Locked::new();
        let (other, file_other) = Locked::new();
        queue.add(file_one.clone()).unwrap();
        queue.add(file_other.clone()).unwrap();
        // Only what was let go of is free, and only when nobody else has it open.
        queue.remove(&file_one).unwrap();
        assert!(one.is_held());
        drop(file_one);
        one.comes_free();
        drop(file_other);
        assert!(other.is_held());
        // The process is gone, but not its ring.
        drop(queue);
        assert!(other.is_held());
        drop(uring);
        other.comes_free();
    }

    #[test]
    fn sets_larger_than_a_message_are_kept_and_leave_nothing() {
        let (mut queue, _socket) = Queue::new().unwrap();
        let (held, first) = Locked::new();
        queue.add(first.clone()).unwrap();
        let others: Vec<_> = (0..2 * FILES)
            .map(|_| Arc::new(tempfile::tempfile().unwrap()))
            .collect();
        for file in &others {
            queue.add(file.clone()).unwrap();
        }
        assert_eq!(queue.messages, 3);
        for file in &others {
            queue.remove(file).unwrap();
        }
        assert_eq!(queue.messages, 1);
        drop((first, std::mem::take(&mut queue.files)));
        assert!(held.is_held(), "the queue has it alone");
        queue.send_again().unwrap();
        held.comes_free();
    }
}
