//! Sessions: the thread that waits for front-ends and serves them one after another.
//!
//! While one front-end is connected nobody else is accepted: others wait in the listener's
//! backlog. Whatever goes wrong in a session ends its connection; the listener goes on.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex as StdMutex};

use epoll::{ControlOptions, Event, Events};
use parking_lot::Mutex;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::back_end_channel::BackEndChannel;
use super::handler::Handler;
use super::limit::{Log, Topic};

/// What the session thread and the export's owner share.
pub(super) struct Control {
    stop: AtomicBool,
    event: EventFd,
    /// The present front-end, so that a stop can end a read or a write that hangs.
    connection: Mutex<Option<UnixStream>>,
    pub(super) connected: AtomicBool,
}

impl Control {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            stop: AtomicBool::new(false),
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            connection: Mutex::new(None),
            connected: AtomicBool::new(false),
        })
    }

    /// Asks the session thread to end.
    pub(super) fn stop(&self) {
        self.stop_if(|_| true);
    }

    /// Asks the session thread to end, unless there is a front-end. False: there is one.
    pub(super) fn stop_unless_connected(&self) -> bool {
        self.stop_if(|connection| connection.is_none())
    }

    fn stop_if(&self, wanted: impl FnOnce(Option<&UnixStream>) -> bool) -> bool {
        // A front-end that comes meanwhile either is seen here or sees that it is too late.
        let connection = self.connection.lock();
        if !wanted(connection.as_ref()) {
            return false;
        }
        self.stop.store(true, Ordering::SeqCst);
        if let Err(error) = self.event.write(1) {
            log::debug!("stopping an export: {error}");
        }
        if let Some(connection) = &*connection {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
        true
    }

    /// Whether there is a front-end: one that has gone, but not all of its requests have ended, is
    /// none.
    pub(super) fn has_front_end(&self) -> bool {
        self.connection.lock().is_some()
    }

    /// Takes a front-end in. False: the session thread is to end.
    fn enter(&self, stream: UnixStream) -> bool {
        let mut connection = self.connection.lock();
        if self.is_stopping() {
            return false;
        }
        *connection = Some(stream);
        true
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

/// Where front-ends come from.
pub(super) enum Source {
    Listener(UnixListener),
    Connection(UnixStream),
}

/// The session thread's main function: ends when it is told to, or when there can be no more
/// front-ends.
pub(super) fn run(
    log: &Log,
    source: Source,
    control: &Control,
    new_handler: impl Fn() -> Handler,
) -> io::Result<()> {
    match source {
        Source::Connection(stream) => serve(log, stream, control, new_handler()),
        Source::Listener(listener) => {
            listener.set_nonblocking(true)?;
            let waiter = Waiter::new(&[control.event.as_raw_fd(), listener.as_raw_fd()])?;
            while !control.is_stopping() {
                waiter.wait()?;
                let Some(stream) = accept(log, &listener) else {
                    continue;
                };
                if let Err(error) = serve(log, stream, control, new_handler()) {
                    log.warn(Topic::Session, format_args!("a session ended: {error}"));
                }
            }
            Ok(())
        }
    }
}

fn accept(log: &Log, listener: &UnixListener) -> Option<UnixStream> {
    match listener.accept() {
        Ok((stream, _)) => Some(stream),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(error) => {
            log.warn(
                Topic::Session,
                format_args!("accepting a front-end: {error}"),
            );
            // Out of descriptors, most likely: the listener stays readable, so do not spin.
            std::thread::sleep(std::time::Duration::from_millis(100));
            None
        }
    }
}

/// Serves one front-end until it goes.
fn serve(log: &Log, stream: UnixStream, control: &Control, handler: Handler) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    if !control.enter(stream.try_clone()?) {
        return Ok(());
    }
    control.connected.store(true, Ordering::SeqCst);
    log.info(Topic::Session, format_args!("a front-end has connected"));
    let handler = Arc::new(StdMutex::new(handler));
    let result = messages(log, stream, control, &handler);
    *control.connection.lock() = None;
    handler
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .disconnect();
    control.connected.store(false, Ordering::SeqCst);
    log.info(Topic::Session, format_args!("the front-end has gone"));
    result
}

fn messages(
    log: &Log,
    stream: UnixStream,
    control: &Control,
    handler: &Arc<StdMutex<Handler>>,
) -> io::Result<()> {
    let waiter = Waiter::new(&[control.event.as_raw_fd(), stream.as_raw_fd()])?;
    // To look at what comes before it is read there.
    let ahead = stream.try_clone()?;
    let mut requests = BackendReqHandler::from_stream(stream, handler.clone());
    while !control.is_stopping() {
        waiter.wait()?;
        if control.is_stopping() {
            break;
        }
        let handled = match BackEndChannel::is_next(&ahead) {
            true => handler
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .take_channel(&ahead),
            false => requests.handle_request(),
        };
        match handled {
            Ok(()) => {}
            Err(VhostError::Disconnected) => break,
            // A front-end that dies is no news.
            Err(VhostError::SocketBroken(_) | VhostError::PartialMessage) => break,
            Err(error) => {
                log.warn(
                    Topic::Session,
                    format_args!("closing the connection: {error}"),
                );
                break;
            }
        }
    }
    Ok(())
}

/// Waits for input on any of a few descriptors.
struct Waiter(OwnedFd);

impl Waiter {
    fn new(fds: &[RawFd]) -> io::Result<Self> {
        // SAFETY: the descriptor is new, and nobody else owns it.
        let waiter = Self(unsafe { OwnedFd::from_raw_fd(epoll::create(true)?) });
        for &fd in fds {
            epoll::ctl(
                waiter.0.as_raw_fd(),
                ControlOptions::EPOLL_CTL_ADD,
                fd,
                Event::new(Events::EPOLLIN, fd as u64),
            )?;
        }
        Ok(waiter)
    }

    fn wait(&self) -> io::Result<()> {
        let mut events = [Event::new(Events::empty(), 0); 2];
        match epoll::wait(self.0.as_raw_fd(), -1, &mut events) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }
}
