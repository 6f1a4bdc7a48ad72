//! Eventfds that a front-end hands us: kicks, calls and errors.
//!
//! Both sides share the open file, `O_NONBLOCK` included: a write waits for ever once the
//! front-end has made it blocking again and has filled the counter, and no check before the write
//! helps, since it can do both in between. So no thread of ours ever reads or writes one. Kicks
//! are polled. To signal, the kernel itself adds to the counter, as it does for a ring's
//! completions: that never waits.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode};

use crate::reactor::uring;

/// How often a signal is tried that the kernel has no memory for.
const TRIES: u32 = 1000;

/// Accepts an eventfd and nothing else: other files could misbehave when they are polled.
pub(super) fn accept(file: File) -> io::Result<File> {
    let fd = file.as_raw_fd();
    let kind = std::fs::read_link(format!("/proc/self/fd/{fd}"))?;
    if kind.as_os_str() != "anon_inode:[eventfd]" {
        // Its maker chose its name, newlines included.
        let text = format!("the descriptor is not an eventfd but {kind:?}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(file)
}

/// Signals eventfds without ever waiting: an io_uring that does nothing else. Each of its
/// completions, of operations that do nothing either, adds one to the counter of the eventfd that
/// is registered with it. A full counter stays as it is.
pub(super) struct Bell {
    uring: IoUring,
    attached: bool,
}

impl Bell {
    /// # Errors
    /// Whatever `io_uring_setup(2)` reports.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            uring: uring::build(&IoUring::builder(), 1).map_err(|error| uring::refused(&error))?,
            attached: false,
        })
    }

    /// The eventfd that is signalled from now on, if any.
    ///
    /// # Errors
    /// Whatever `io_uring_register(2)` reports; none is signalled then.
    pub(super) fn attach(&mut self, event: Option<&File>) -> io::Result<()> {
        if std::mem::take(&mut self.attached) {
            self.uring.submitter().unregister_eventfd()?;
        }
        if let Some(event) = event {
            self.uring.submitter().register_eventfd(event.as_raw_fd())?;
            self.attached = true;
        }
        Ok(())
    }

    /// Adds one to the counter of the eventfd, if there is one. `usual` is the one that is to be
    /// attached: if that has failed, it is tried again.
    ///
    /// # Errors
    /// Whatever `io_uring_enter(2)` reports, again and again; as [`Bell::attach`].
    pub(super) fn ring(&mut self, usual: Option<&File>) -> io::Result<()> {
        if !self.attached {
            if usual.is_none() {
                return Ok(());
            }
            self.attach(usual)?;
        }
        let entry = opcode::Nop::new().build();
        // SAFETY: the operation names no memory. The queue is full if an earlier signal has not
        // been taken: then it is that one which is tried again.
        let _ = unsafe { self.uring.submission().push(&entry) };
        let mut result = Ok(0);
        for _ in 0..TRIES {
            result = self.uring.submit();
            match &result {
                Ok(0) => {}
                Ok(_) => break,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::EBUSY | libc::EINTR) => {}
                    _ => break,
                },
            }
            std::thread::yield_now();
        }
        // What is looked at is gone: there is always room for the next.
        self.uring.completion().for_each(drop);
        result.map(drop)
    }

    /// Adds one to the counter of another eventfd. The one before stays, whatever happens.
    ///
    /// # Errors
    /// As [`Bell::attach`] and [`Bell::ring`].
    pub(super) fn ring_other(&mut self, event: &File, usual: Option<&File>) -> io::Result<()> {
        let rung = self.attach(Some(event)).and_then(|()| self.ring(None));
        let attached = self.attach(usual);
        rung.and(attached)
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a signal that waits for the other side, one that is lost or goes to
    //! another eventfd, one that is given up for ever after a full counter or a failure, and a
    //! front-end that writes lines into the log.

    use std::os::fd::{FromRawFd, IntoRawFd};

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    /// An eventfd, and what a front-end would hand over of it.
    fn pair(flags: i32) -> (EventFd, File) {
        let event = EventFd::new(flags).unwrap();
        let other = event.try_clone().unwrap();
        // SAFETY: the descriptor is the clone's, which gives it away.
        let file = unsafe { File::from_raw_fd(other.into_raw_fd()) };
        (event, file)
    }

    #[test]
    fn a_signal_adds_one_and_never_waits() {
        let mut bell = Bell::new().unwrap();
        bell.ring(None).unwrap();
        let (event, file) = pair(EFD_NONBLOCK);
        bell.attach(Some(&file)).unwrap();
        for _ in 0..100 {
            bell.ring(Some(&file)).unwrap();
        }
        assert_eq!(event.read().unwrap(), 100);

        let (full, file) = pair(0);
        full.write(u64::MAX - 1).unwrap();
        bell.attach(Some(&file)).unwrap();
        bell.ring(Some(&file)).unwrap();
        bell.ring(Some(&file)).unwrap();
        assert!(full.read().unwrap() >= u64::MAX - 1);
        bell.ring(Some(&file)).unwrap();
        assert_eq!(full.read().unwrap(), 1);
        assert!(event.read().is_err(), "not attached any more");
    }

    #[test]
    fn another_eventfd_is_signalled_in_between() {
        let mut bell = Bell::new().unwrap();
        let (event, file) = pair(EFD_NONBLOCK);
        let (other, other_file) = pair(EFD_NONBLOCK);
        for usual in [None, Some(&file)] {
            bell.attach(usual).unwrap();
            bell.ring_other(&other_file, usual).unwrap();
            assert_eq!(other.read().unwrap(), 1);
            assert!(event.read().is_err());
        }
        bell.ring(Some(&file)).unwrap();
        assert_eq!(event.read().unwrap(), 1);
    }

    #[test]
    fn an_eventfd_that_could_not_be_attached_is_tried_again() {
        let mut bell = Bell::new().unwrap();
        let (event, file) = pair(EFD_NONBLOCK);
        let null = File::open("/dev/null").unwrap();
        bell.attach(Some(&file)).unwrap();
        assert!(bell.ring_other(&null, Some(&file)).is_err());
        bell.ring(None).unwrap();
        assert_eq!(event.read().unwrap(), 1, "the usual one has stayed");
        assert!(bell.attach(Some(&null)).is_err());
        assert!(bell.ring(Some(&null)).is_err(), "nobody was signalled");
        bell.ring(Some(&file)).unwrap();
        assert_eq!(event.read().unwrap(), 1);
    }

    #[test]
    fn other_files_are_no_eventfds() {
        assert!(accept(File::open("/dev/null").unwrap()).is_err());
        assert!(accept(pair(0).1).is_ok());
        // SAFETY: the name is a string, and the descriptor is new and ours.
        let named =
            unsafe { File::from_raw_fd(libc::memfd_create(c"a\nb".as_ptr(), libc::MFD_CLOEXEC)) };
        let text = accept(named).unwrap_err().to_string();
        assert!(text.contains("a\\nb") && !text.contains('\n'), "{text}");
    }
}
