//! Exports: disks offered to virtual machines over vhost-user.
//!
//! An [`Export`] is a virtio block device behind a Unix socket. What happens, from top to
//! bottom:
//!
//! * The **session thread** (`session`) accepts one front-end at a time and hands its
//!   messages to the handler, which keeps the device's state: features, memory, rings.
//! * When a queue has all it needs, the handler gives it to its **worker**, a thread of the
//!   queue's own with a [reactor](crate::reactor). It takes the queue back before anything about
//!   it changes, and the worker lets go only when every request has completed and is visible in
//!   the used ring.
//! * The worker takes chains of descriptors from the ring, finds out what they want, asks the
//!   chain of layers for a plan and submits the plan's pieces with the guest's own memory; or
//!   spawns a task for what takes longer.
//! * What is done goes into the used ring, a batch at a time, and the driver is signalled if it
//!   asked for that. With nothing to do the worker polls for a moment and then sleeps.
//!
//! Guests and front-ends are not trusted. A guest that breaks its ring loses the queue, a
//! front-end that breaks the protocol loses its connection, and the next one is welcome.

mod back_end_channel;
mod config;
mod event;
mod failure;
mod features;
mod handler;
pub mod inflight;
pub(crate) mod limit;
pub mod memory;
mod queue;
pub mod request;
pub mod ring;
mod session;
mod socket;
pub mod stats;
mod turn;
mod write_cache;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub use config::{DEFAULT_POLL_MAX_US, DEFAULT_QUEUE_SIZE, ExportConfig, MAX_QUEUES, SocketSource};
pub use failure::{OnFailure, RequestFailure};
pub use stats::{Counter, QueueStats};
pub use turn::Held;

use back_end_channel::BackEndChannel;
use config::Geometry;
use handler::Handler;
use limit::{Log, Topic};
use queue::{DeviceFacts, Orders, Worker};
use session::Control;
use socket::Socket;
use write_cache::Kept;

use crate::chain::Root;
use crate::error::{Error, Result};

/// What an export says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its name.
    pub id: String,
    /// The node that it shows: the top of its chain at the moment.
    pub node_name: String,
    /// Whether the guest may write.
    pub writable: bool,
    /// How many queues it has.
    pub queues: u16,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// Whether it is ending.
    pub shutting_down: bool,
}

/// What is called when the last front-end has gone.
type OnEnd = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Ending {
    ended: bool,
    callback: Option<OnEnd>,
}

/// A disk offered on a socket. Dropping it ends it as [`Export::shutdown`] does.
pub struct Export {
    id: String,
    writable: bool,
    queues: u16,
    /// The disk, until the export has ended: its node may go then, though the export is still
    /// listed.
    root: Mutex<Option<Arc<Root>>>,
    /// The node as of the beginning.
    node_name: String,
    control: Arc<Control>,
    channel: Arc<BackEndChannel>,
    log: Arc<Log>,
    stats: Vec<Arc<QueueStats>>,
    /// To each of its workers.
    orders: Vec<Orders>,
    block_size: u32,
    started: Instant,
    poll_max_us: Arc<AtomicU32>,
    shutting_down: AtomicBool,
    session: Mutex<Option<JoinHandle<()>>>,
    ending: Arc<Mutex<Ending>>,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("id", &self.id).finish()
    }
}

impl Export {
    /// Offers the disk at `root`. When this returns front-ends can connect.
    ///
    /// # Errors
    /// When the settings make no sense, the socket cannot be had, or threads or their rings
    /// cannot be made.
    pub fn start(config: ExportConfig, root: Arc<Root>) -> Result<Self> {
        config.check()?;
        let started = Instant::now();
        let chain = root.chain();
        if config.writable && chain.top().read_only {
            return Err(Error::Invalid("Block node is read-only".into()));
        }
        let geometry = Geometry::new(&config, &chain);
        let log = Arc::new(Log::new(&config.id));
        let poll_max_us = Arc::new(AtomicU32::new(config.poll_max_us));
        let facts = Arc::new(DeviceFacts {
            id: config.id.clone(),
            root: root.clone(),
            log: log.clone(),
            serial: config.serial_bytes(),
            writable: config.writable,
            block_size: u64::from(geometry.block_size),
            poll_max_us: poll_max_us.clone(),
            detect_zeroes: config.detect_zeroes,
            on_failure: config.on_failure.clone(),
        });
        let workers = (0..config.queues)
            .map(|index| Worker::spawn(index, &facts))
            .collect::<Result<Vec<_>>>()?;
        let stats = workers
            .iter()
            .map(|worker| worker.stats().clone())
            .collect();
        let orders = workers
            .iter()
            .map(|worker| worker.orders().clone())
            .collect();
        let block_size = geometry.block_size;
        let socket = Socket::open(&config.id, config.socket)?;
        let explain = |error: std::io::Error| {
            Error::Invalid(format!("starting export '{}': {error}", config.id))
        };
        let control = Arc::new(Control::new().map_err(explain)?);
        let ending = Arc::new(Mutex::new(Ending::default()));
        let switches = (config.writable, config.write_cache);
        let channel = Arc::new(BackEndChannel::default());
        let session = SessionThread {
            log: log.clone(),
            channel: channel.clone(),
            root: root.clone(),
            geometry,
            workers: Arc::new(workers),
            switches,
            control: control.clone(),
            ending: ending.clone(),
        };
        let thread = std::thread::Builder::new()
            .name(queue::thread_name(&config.id, "s"))
            .spawn(move || session.run(socket))
            .map_err(explain)?;
        Ok(Self {
            id: config.id,
            writable: config.writable,
            queues: config.queues,
            node_name: root.chain().top().name.clone(),
            root: Mutex::new(Some(root)),
            control,
            channel,
            log,
            stats,
            orders,
            block_size,
            started,
            poll_max_us,
            shutting_down: AtomicBool::new(false),
            session: Mutex::new(Some(thread)),
            ending,
        })
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The disk that it shows; `None` when it has ended.
    #[must_use]
    pub fn root(&self) -> Option<Arc<Root>> {
        self.root.lock().clone()
    }

    /// The node that it shows: the top of its chain at the moment.
    #[must_use]
    pub fn node_name(&self) -> String {
        let top = self.root().map(|root| root.chain().top().name.clone());
        top.unwrap_or_else(|| self.node_name.clone())
    }

    /// The bytes of a block, which is the least that its guest reads or writes.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// What it is and how it is.
    #[must_use]
    pub fn info(&self) -> ExportInfo {
        ExportInfo {
            id: self.id.clone(),
            node_name: self.node_name(),
            writable: self.writable,
            queues: self.queues,
            connected: self.control.connected.load(Ordering::SeqCst),
            shutting_down: self.shutting_down.load(Ordering::SeqCst),
        }
    }

    /// The counters of each queue.
    #[must_use]
    pub fn stats(&self) -> &[Arc<QueueStats>] {
        &self.stats
    }

    /// How long the counters have been counting.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The longest time that a queue polls before it sleeps.
    #[must_use]
    pub fn poll_max(&self) -> Duration {
        Duration::from_micros(self.poll_max_us.load(Ordering::Relaxed).into())
    }

    /// From now on its queues poll no longer than this before they sleep; 0: not at all.
    pub fn set_poll_max_us(&self, micros: u32) {
        self.poll_max_us.store(micros, Ordering::Relaxed);
    }

    /// How many requests an export that is ending still waits for.
    #[must_use]
    pub fn unfinished(&self) -> u64 {
        let queues = self.stats.iter();
        queues
            .map(|queue| u64::from(queue.unfinished.load(Ordering::Relaxed)))
            .sum()
    }

    /// Tells the front-end to read the configuration space anew: the disk has another size. A
    /// front-end that cannot be told sees it when it connects the next time.
    pub fn config_changed(&self) {
        self.channel.config_changed(&self.log);
    }

    /// Calls `callback` once there can be no more front-ends: when the one of a connected
    /// socket has gone, or the export was shut down. At once if it is so already. The export's own
    /// thread calls it, which therefore cannot wait for the export's end.
    pub fn on_end(&self, callback: impl FnOnce() + Send + 'static) {
        let mut ending = self.ending.lock();
        if ending.ended {
            drop(ending);
            callback();
        } else {
            ending.callback = Some(Box::new(callback));
        }
    }

    /// Lets no front-end in any more, unless there is one. False: there is one, and all goes on.
    #[must_use]
    pub fn close_unless_connected(&self) -> bool {
        let closed = self.control.stop_unless_connected();
        if closed {
            self.shutting_down.store(true, Ordering::SeqCst);
        }
        closed
    }

    /// Whether a front-end is there.
    #[must_use]
    pub fn has_front_end(&self) -> bool {
        self.control.has_front_end()
    }

    /// Lets no front-end in any more and hangs up on the one that is there. What it has asked for
    /// still goes on.
    pub fn close(&self) {
        self.shutting_down.store(true, Ordering::SeqCst);
        self.control.stop();
    }

    /// Ends the export: every request that was taken is completed, threads end, the socket is
    /// removed. Returns when that is done.
    pub fn shutdown(&self) {
        self.shutting_down.store(true, Ordering::SeqCst);
        self.control.stop();
        // Held while the thread is waited for: who comes second waits as well.
        let mut session = self.session.lock();
        if let Some(session) = session.take()
            && session.join().is_err()
        {
            log::error!("export '{}': the session thread has panicked", self.id);
        }
        let root = self.root.lock().take();
        drop(root);
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// What the session thread owns.
struct SessionThread {
    log: Arc<Log>,
    channel: Arc<BackEndChannel>,
    root: Arc<Root>,
    geometry: Geometry,
    workers: Arc<Vec<Worker>>,
    switches: (bool, bool),
    control: Arc<Control>,
    ending: Arc<Mutex<Ending>>,
}

impl SessionThread {
    fn run(self, socket: Socket) {
        let (source, guard) = socket.split();
        let kept = Kept::default();
        let new_handler = || {
            Handler::new(
                &self.log,
                &self.root,
                &self.geometry,
                &self.workers,
                self.switches,
                (&kept, &self.channel),
            )
        };
        if let Err(error) = session::run(&self.log, source, &self.control, new_handler) {
            self.log.error(
                Topic::Session,
                format_args!("no more front-ends are accepted: {error}"),
            );
        }
        drop(guard);
        // The last of the workers' owners, but for a handler that is gone by now: they end here.
        drop(self.workers);
        let callback = {
            let mut ending = self.ending.lock();
            ending.ended = true;
            ending.callback.take()
        };
        if let Some(callback) = callback {
            callback();
        }
    }
}
