//! Queues: the session's handle of a worker thread.
//!
//! A worker lives as long as its export. The session gives it a queue ([`Worker::start`]) and
//! takes it back ([`Worker::stop`]); between the two the worker alone touches the ring. Orders
//! go through a list under a lock and a wake-up; all are answered, so that the session knows
//! that its order has been carried out before it answers the front-end.

mod admit;
mod complete;
mod fast;
mod flush;
mod life;
mod poller;
mod slot;
mod task;
mod turn;
mod worker;

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::Mutex;

use super::failure::{OnFailure, RequestFailure};
use super::inflight::Again;
use super::limit::{Log, Topic};
use super::memory::GuestMemory;
use super::request::ID_LEN;
use super::ring::SplitRing;
use super::stats::QueueStats;
use crate::chain::Root;
use crate::chain::turn::Turn;
use crate::error::{Error, Result};
use crate::reactor::Remote;

/// How the driver tells of new requests.
#[derive(Clone, Debug)]
pub(super) enum Kick {
    /// By this eventfd.
    Event(Arc<File>),
    /// Not at all: the ring must be polled.
    Polling,
}

/// A queue, as the session gives it to a worker.
#[derive(Debug)]
pub(super) struct QueueSetup {
    pub(super) ring: SplitRing,
    pub(super) kick: Kick,
    pub(super) call: Option<Arc<File>>,
    pub(super) error: Option<Arc<File>>,
    /// Every write is stable before it completes.
    pub(super) write_through: bool,
    /// What a process that died has left to be done, the next one last.
    pub(super) again: Vec<Again>,
}

/// Whether zeros that were found may give space back.
pub(super) type Unmap = bool;

/// What is the same for all queues of an export.
#[derive(Clone, Debug)]
pub(super) struct DeviceFacts {
    /// Names the device's threads.
    pub(super) id: String,
    /// The disk.
    pub(super) root: Arc<Root>,
    /// Where its messages go.
    pub(super) log: Arc<Log>,
    pub(super) serial: [u8; ID_LEN],
    pub(super) writable: bool,
    /// Requests keep to multiples of it.
    pub(super) block_size: u64,
    pub(super) poll_max_us: Arc<AtomicU32>,
    /// Writes of nothing but zeros become write-zeroes requests.
    pub(super) detect_zeroes: Option<Unmap>,
    /// Is told of requests that storage has failed.
    pub(super) on_failure: Option<OnFailure>,
}

impl DeviceFacts {
    /// Storage has failed a request, which was to change something or not: to be told before the
    /// guest is.
    #[cold]
    fn failed(&self, is_write: bool, error: &Error) {
        self.log.error(Topic::Disk, format_args!("{error}"));
        if let Some(on_failure) = &self.on_failure {
            on_failure.tell(RequestFailure {
                is_write,
                errno: error.errno(),
            });
        }
    }
}

/// What a worker that gives its queue back does about requests that a process that died has left,
/// and that it has not begun with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// It carries them out: the front-end is to find none in flight.
    Done,
    /// It leaves them to the next process with the inflight region: nothing bounds how long they take.
    Marked,
}

/// Whether a turning switch that workers were held for has come about.
pub(super) type Switched = bool;

/// An order to a worker.
enum Order {
    Start(Box<QueueSetup>, SyncSender<()>),
    /// Answered with the next available index when nothing is in flight any more.
    Stop(Left, SyncSender<u16>),
    SetCall(Option<Arc<File>>, SyncSender<()>),
    SetError(Option<Arc<File>>, SyncSender<()>),
    SetMemory(Arc<GuestMemory>, SyncSender<()>),
    SetWriteThrough(bool, SyncSender<()>),
    /// Answered when what is on its way has been handed over.
    Hold(Arc<Turn>, SyncSender<()>),
    GoOn(Arc<Turn>, Switched),
    Exit,
}

/// On cache lines of its own: its worker takes the lock in every turn.
#[derive(Default)]
#[repr(align(128))]
struct Mailbox {
    orders: Mutex<VecDeque<Order>>,
    /// Nobody takes orders any more.
    closed: AtomicBool,
}

/// Where a worker gets its orders; it may have ended.
#[derive(Clone)]
pub(super) struct Orders {
    mailbox: Arc<Mailbox>,
    remote: Arc<Remote>,
}

impl Orders {
    fn ask<T>(&self, order: impl FnOnce(SyncSender<T>) -> Order) -> Answer<T> {
        let (reply, answer) = sync_channel(1);
        self.send(order(reply));
        Answer(answer)
    }

    fn send(&self, order: Order) {
        {
            let mut orders = self.mailbox.orders.lock();
            if !self.mailbox.closed.load(Ordering::Relaxed) {
                orders.push_back(order);
            }
        }
        self.remote.wake();
    }

    /// Lets no request begin until the worker is told to [go on](Self::go_on), and has it hand over
    /// what is on its way: that is done when it answers, or has ended.
    pub(super) fn hold(&self, turn: &Arc<Turn>) -> Answer<()> {
        self.ask(|reply| Order::Hold(turn.clone(), reply))
    }

    /// Goes on with what is available by then.
    pub(super) fn go_on(&self, turn: &Arc<Turn>, switched: Switched) {
        self.send(Order::GoOn(turn.clone(), switched));
    }
}

impl Mailbox {
    /// Nobody takes orders any more: those that are there will not be answered.
    fn close(&self) {
        let left = {
            let mut orders = self.orders.lock();
            self.closed.store(true, Ordering::Relaxed);
            std::mem::take(&mut *orders)
        };
        drop(left);
    }
}

/// A name that shows in lists of threads; the system keeps 15 bytes of it.
pub(super) fn thread_name(id: &str, role: &str) -> String {
    let id: String = id.chars().filter(|&c| c != '\0').take(10).collect();
    format!("{id}-{role}")
}

/// What a worker says to an order, once it has carried it out.
pub(super) struct Answer<T>(Receiver<T>);

impl<T> Answer<T> {
    /// As [`wait`](Self::wait), for a time. `None`: the answer has not come, and may yet.
    pub(super) fn wait_until(&self, deadline: Instant) -> Option<std::io::Result<T>> {
        let patience = deadline.saturating_duration_since(Instant::now());
        match self.0.recv_timeout(patience) {
            Ok(answer) => Some(Ok(answer)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(ended())),
        }
    }

    pub(super) fn wait(self) -> std::io::Result<T> {
        self.0.recv().map_err(|_| ended())
    }
}

fn ended() -> std::io::Error {
    std::io::Error::other("the queue's worker has ended")
}

/// A queue's worker thread.
pub(super) struct Worker {
    orders: Orders,
    stats: Arc<QueueStats>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread of queue `index`.
    pub(super) fn spawn(index: u16, facts: &Arc<DeviceFacts>) -> Result<Self> {
        let mailbox = Arc::new(Mailbox::default());
        let stats = Arc::new(QueueStats::default());
        let (ready, started) = sync_channel(1);
        let thread = {
            let (mailbox, stats) = (mailbox.clone(), stats.clone());
            let facts = facts.clone();
            std::thread::Builder::new()
                .name(thread_name(&facts.id, &format!("q{index}")))
                .spawn(move || worker::run(&facts, &mailbox, stats, &ready))
        };
        let explain = |error: std::io::Error| {
            Error::Invalid(format!(
                "starting a worker of export '{}': {error}",
                facts.id
            ))
        };
        let thread = thread.map_err(explain)?;
        let remote = started
            .recv()
            .unwrap_or_else(|_| Err(std::io::Error::other("the thread ended at once")))
            .map_err(explain)?;
        Ok(Self {
            orders: Orders { mailbox, remote },
            stats,
            thread: Some(thread),
        })
    }

    /// Gives the worker a queue.
    pub(super) fn start(&self, queue: QueueSetup) -> std::io::Result<()> {
        self.ask(|reply| Order::Start(Box::new(queue), reply))
            .wait()
    }

    /// Takes the queue back. It takes no more requests; the answer comes once those it has taken
    /// are done and visible in the used ring, and is the next available index.
    pub(super) fn begin_stop(&self, left: Left) -> Answer<u16> {
        self.ask(|reply| Order::Stop(left, reply))
    }

    /// Replaces the call descriptor, and signals the new one once: also where there is no queue
    /// yet, since what an old one was told may have been lost.
    pub(super) fn set_call(&self, call: Option<Arc<File>>) -> std::io::Result<()> {
        self.ask(|reply| Order::SetCall(call, reply)).wait()
    }

    /// Replaces the error descriptor, and signals the new one if the queue is broken.
    pub(super) fn set_error(&self, error: Option<Arc<File>>) -> std::io::Result<()> {
        self.ask(|reply| Order::SetError(error, reply)).wait()
    }

    /// Lets the queue use a larger memory table. What it used before must be in it.
    pub(super) fn set_memory(&self, memory: Arc<GuestMemory>) -> std::io::Result<()> {
        self.ask(|reply| Order::SetMemory(memory, reply)).wait()
    }

    /// Switches the write cache.
    pub(super) fn set_write_through(&self, on: bool) -> std::io::Result<()> {
        self.ask(|reply| Order::SetWriteThrough(on, reply)).wait()
    }

    /// The queue's counters.
    pub(super) fn stats(&self) -> &Arc<QueueStats> {
        &self.stats
    }

    /// Where it gets its orders.
    pub(super) fn orders(&self) -> &Orders {
        &self.orders
    }

    fn ask<T>(&self, order: impl FnOnce(SyncSender<T>) -> Order) -> Answer<T> {
        self.orders.ask(order)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.orders.send(Order::Exit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a queue worker has panicked");
        }
    }
}
