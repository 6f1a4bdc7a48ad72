//! The sockets of the control protocol, and the threads that serve them.
//!
//! Each listening socket has a thread that accepts, each client one that reads and carries out
//! commands, and one that writes. Clients are few ([`Limits`]), and a command of one that takes its
//! time keeps nobody else waiting.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde_json::{Value, json};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::command::Control;
use super::error::CommandError;
use super::events::{EventHub, Outbox, line_of};
use super::places::{Activity, Client, Limits, Places};
use super::session::Session;
use super::wire::{Decoder, Pool};
use crate::unix_socket::is_abandoned;

/// How long the last words to a client may take at the end.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(300);

/// Values may nest 1024 deep, and are read and written by recursion.
const CLIENT_STACK: usize = 8 << 20;

/// A socket to serve clients on.
#[derive(Debug)]
pub enum Endpoint {
    /// Accepts any number of clients.
    Listening {
        /// The socket.
        listener: UnixListener,
        /// Its name, if it is ours to remove.
        path: Option<PathBuf>,
    },
    /// One client, connected already.
    Connected(UnixStream),
}

impl Endpoint {
    /// Listens on `path`. A socket that nobody listens on any more is replaced; a live one, or
    /// another kind of file, is an error.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => {
                if !is_abandoned(path) {
                    return Err(io::Error::new(
                        io::ErrorKind::AddrInUse,
                        format!("another process listens on {}", path.display()),
                    ));
                }
                fs::remove_file(path)?;
            }
            Ok(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    format!("{} is there and is not a socket", path.display()),
                ));
            }
            Err(_) => {}
        }
        let listener = UnixListener::bind(path)?;
        Ok(Self::Listening {
            listener,
            path: Some(path.to_owned()),
        })
    }

    /// Serves an inherited socket, be it a listening or a connected one.
    pub fn from_fd(fd: OwnedFd) -> Self {
        let stream = UnixStream::from(fd);
        match stream.peer_addr() {
            Ok(_) => Self::Connected(stream),
            Err(_) => Self::Listening {
                listener: UnixListener::from(OwnedFd::from(stream)),
                path: None,
            },
        }
    }

    /// Connects to a client that listens on `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        UnixStream::connect(path).map(Self::Connected)
    }
}

/// What the threads share.
struct Shared {
    control: Arc<Control>,
    hub: Arc<EventHub>,
    limits: Limits,
    /// For values that are not whole yet.
    pool: Arc<Pool>,
    clients: Mutex<Places>,
    /// Told when a client came or went.
    clients_changed: Condvar,
    stopping: AtomicBool,
}

struct Acceptor {
    thread: JoinHandle<()>,
    stop: EventFd,
    /// The socket's file, and what identifies it, so that only our own is removed.
    file: Option<(PathBuf, u64, u64)>,
}

/// Serves clients until it is stopped or dropped.
pub struct Server {
    shared: Arc<Shared>,
    acceptors: Vec<Acceptor>,
}

impl Server {
    /// Serves clients on `endpoints`. They get the events of `hub`.
    pub fn start(
        endpoints: Vec<Endpoint>,
        control: Arc<Control>,
        hub: Arc<EventHub>,
    ) -> io::Result<Self> {
        Self::with_limits(Limits::default(), endpoints, control, hub)
    }

    /// Serves clients within `limits` on `endpoints`. They get the events of `hub`.
    pub fn with_limits(
        limits: Limits,
        endpoints: Vec<Endpoint>,
        control: Arc<Control>,
        hub: Arc<EventHub>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            control,
            hub,
            limits,
            pool: Pool::new(limits.unfinished),
            clients: Mutex::default(),
            clients_changed: Condvar::new(),
            stopping: AtomicBool::new(false),
        });
        let mut server = Self {
            shared,
            acceptors: Vec::new(),
        };
        for endpoint in endpoints {
            server.add(endpoint)?;
        }
        Ok(server)
    }

    /// Serves clients on one more socket.
    pub fn add(&mut self, endpoint: Endpoint) -> io::Result<()> {
        self.add_awaited(endpoint, || {})
    }

    /// Serves clients on one more socket, and calls `arrived` when it has its first.
    pub fn add_awaited(
        &mut self,
        endpoint: Endpoint,
        arrived: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        match endpoint {
            Endpoint::Connected(stream) => {
                stream.set_nonblocking(false)?;
                Shared::serve(&self.shared, stream, None)?;
                arrived();
                Ok(())
            }
            Endpoint::Listening { listener, path } => {
                listener.set_nonblocking(true)?;
                let file = path.and_then(|path| {
                    let found = fs::symlink_metadata(&path).ok()?;
                    Some((path, found.dev(), found.ino()))
                });
                let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
                let waiter = Waiter::new(&listener, &stop)?;
                let shared = self.shared.clone();
                let thread = thread::Builder::new()
                    .name("qmp-accept".to_owned())
                    .spawn(move || accept(&shared, &listener, &waiter, arrived))?;
                self.acceptors.push(Acceptor { thread, stop, file });
                Ok(())
            }
        }
    }

    /// Accepts no more clients, gives those there are their last answers and events, hangs up, and
    /// removes the sockets' files.
    pub fn stop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.clients_changed.notify_all();
        for acceptor in self.acceptors.drain(..) {
            if acceptor.stop.write(1).is_ok() && acceptor.thread.join().is_err() {
                log::error!("a thread of the control socket panicked");
            }
            if let Some((path, dev, ino)) = acceptor.file {
                let ours = fs::symlink_metadata(&path)
                    .is_ok_and(|found| found.dev() == dev && found.ino() == ino);
                if ours && let Err(error) = fs::remove_file(&path) {
                    log::warn!("cannot remove {}: {error}", path.display());
                }
            }
        }
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        let mut clients = self.shared.clients.lock();
        for client in clients.iter() {
            client.outbox.close();
        }
        for client in clients.iter() {
            client
                .outbox
                .drain(deadline.saturating_duration_since(Instant::now()));
            client.hang_up();
        }
        // A client's thread that is still in the middle of a command ends after it, by itself.
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        while !clients.is_empty() {
            if self
                .shared
                .clients_changed
                .wait_until(&mut clients, deadline)
                .timed_out()
            {
                return;
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Waits for a socket to become readable, or to be told to stop.
struct Waiter(Epoll);

const WANT_CLIENT: u64 = 0;
const WANT_STOP: u64 = 1;

impl Waiter {
    fn new(listener: &UnixListener, stop: &EventFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for (fd, token) in [
            (listener.as_raw_fd(), WANT_CLIENT),
            (stop.as_raw_fd(), WANT_STOP),
        ] {
            epoll.ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(EventSet::IN, token),
            )?;
        }
        Ok(Self(epoll))
    }

    /// False when it is time to stop.
    fn wait(&self) -> bool {
        let mut events = [EpollEvent::default(); 2];
        match self.0.wait(-1, &mut events) {
            Ok(count) => !events
                .iter()
                .take(count)
                .any(|event| event.data() == WANT_STOP),
            Err(error) => error.kind() == io::ErrorKind::Interrupted,
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener, waiter: &Waiter, arrived: impl FnOnce()) {
    let mut arrived = Some(arrived);
    while waiter.wait() {
        let result = match listener.accept() {
            Ok((stream, _)) => {
                let negotiation = shared.limits.negotiation;
                Shared::serve(shared, stream, Some(negotiation))
            }
            Err(error) => Err(error),
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                log::warn!("cannot serve a control client: {error}");
                // Short of file descriptors or threads: do not ask again at full speed.
                thread::sleep(Duration::from_millis(50));
            }
            Ok(()) => {
                if let Some(arrived) = arrived.take() {
                    arrived();
                }
            }
        }
    }
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Starts to serve the client at the other end of `stream`, which has to negotiate within
    /// `negotiation`.
    fn serve(
        this: &Arc<Self>,
        stream: UnixStream,
        negotiation: Option<Duration>,
    ) -> io::Result<()> {
        let outbox = Arc::new(Outbox::default());
        outbox.answer(&Session::greeting(), false);
        let client = Client::new(outbox.clone(), stream.try_clone()?);
        let activity = client.activity();
        let hang_up = stream.try_clone()?;
        let writing = stream.try_clone()?;
        {
            let mut clients = this.clients.lock();
            if this.is_stopping() {
                return Err(io::Error::other("the daemon is ending"));
            }
            if let Err(text) = clients.admit(client, &this.limits) {
                drop(clients);
                turn_away(&stream, text);
                return Ok(());
            }
        }
        this.clients_changed.notify_all();
        this.hub.add(
            &outbox,
            Box::new(move || {
                // Not connected any more is as good.
                let _ = hang_up.shutdown(Shutdown::Both);
            }),
        );
        let reader = {
            let (shared, outbox) = (this.clone(), outbox.clone());
            thread::Builder::new()
                .name("qmp-client".to_owned())
                .stack_size(CLIENT_STACK)
                .spawn(move || {
                    let deadline = negotiation.map(|time| Instant::now() + time);
                    shared.attend(stream, writing, &outbox, deadline, &activity);
                })
        };
        if reader.is_err() {
            this.forget(&outbox);
        }
        reader.map(drop)
    }

    /// A client's life.
    fn attend(
        &self,
        stream: UnixStream,
        writing: UnixStream,
        outbox: &Arc<Outbox>,
        deadline: Option<Instant>,
        activity: &Activity,
    ) {
        let writer = {
            let outbox = outbox.clone();
            thread::Builder::new()
                .name("qmp-writer".to_owned())
                .spawn(move || write_lines(writing, &outbox))
        };
        match writer {
            Ok(writer) => {
                if !self.read_commands(&stream, outbox, deadline, activity) {
                    log::info!("a control client did not negotiate in time and is cut off");
                    outbox.drain(DRAIN_TIMEOUT);
                    outbox.cut();
                    let _ = stream.shutdown(Shutdown::Both);
                }
                // A client may have sent its last command and still wait for the answer.
                outbox.close();
                if writer.join().is_err() {
                    log::error!("a thread of the control socket panicked");
                }
            }
            Err(error) => log::warn!("cannot serve a control client: {error}"),
        }
        // Clones of the socket are still about; this ends them all.
        let _ = stream.shutdown(Shutdown::Both);
        self.forget(outbox);
    }

    fn forget(&self, outbox: &Arc<Outbox>) {
        self.clients.lock().leave(outbox);
        self.clients_changed.notify_all();
    }

    /// Carries out commands until there will be no more. False when the client has not negotiated
    /// by the `deadline`.
    fn read_commands(
        &self,
        mut stream: &UnixStream,
        outbox: &Outbox,
        mut deadline: Option<Instant>,
        activity: &Activity,
    ) -> bool {
        let mut session = Session::new(self.control.clone());
        let mut decoder = Decoder::within(self.pool.clone());
        let mut buffer = vec![0; 64 << 10];
        let mut connected = true;
        while connected {
            if let Some(until) = deadline {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let text = "Capabilities negotiation was not completed in time";
                    outbox.answer(&error_of(text.to_owned()), false);
                    return false;
                }
                if stream.set_read_timeout(Some(left)).is_err() {
                    return true;
                }
            }
            let bytes = match stream.read(&mut buffer) {
                Ok(0) => return true,
                Ok(count) => buffer.get(..count).unwrap_or_default(),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) =>
                {
                    continue;
                }
                Err(_) => return true,
            };
            decoder.push(bytes, &mut |item| {
                connected = connected && self.answer(&mut session, outbox, activity, item);
            });
            if deadline.is_some() && session.is_negotiated() {
                deadline = None;
                connected = connected && stream.set_read_timeout(None).is_ok();
            }
        }
        true
    }

    /// Answers a value; false if the client is gone.
    fn answer(
        &self,
        session: &mut Session,
        outbox: &Outbox,
        activity: &Activity,
        item: Result<Value, String>,
    ) -> bool {
        let negotiated = session.is_negotiated();
        // Without the wait for a client that does not read its answers: that one is idle.
        let reply = activity.during(|| session.handle(item));
        let connected = outbox.answer(&reply.value, session.is_negotiated());
        if session.is_negotiated() && !negotiated {
            self.control.jobs().tell();
        }
        if reply.quit {
            outbox.drain(DRAIN_TIMEOUT);
            self.control.quit();
        }
        connected
    }
}

/// Tells a client that there is no place for it, as far as it takes that at once.
fn turn_away(mut stream: &UnixStream, text: String) {
    log::info!("a control client is turned away: {text}");
    if stream.set_nonblocking(true).is_ok() {
        // A client that does not read it would not have read a greeting.
        let _ = stream.write_all(&line_of(&error_of(text)));
    }
}

fn error_of(text: String) -> Value {
    json!({"error": CommandError::generic(text).to_value()})
}

fn write_lines(mut stream: UnixStream, outbox: &Outbox) {
    while let Some(line) = outbox.next() {
        if stream.write_all(&line).is_err() {
            outbox.cut();
            // The reading side finds out, too.
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
}
