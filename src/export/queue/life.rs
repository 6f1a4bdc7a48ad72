//! A queue from the time that a worker is given it until it is given back, and what all queues of a
//! worker share.
//!
//! ```text
//!   new ──▶ takes chains ──close──▶ closed: what is under way is finished ──in_flight() = 0──▶ given back
//!                │                                        ▲
//!                └──give_up: the ring cannot be believed, or its memory has gone
//! ```
//!
//! A request goes through `admit` (taken from the ring and read), `fast` (carried out by the plan of
//! the chain) or `task` (by whatever it needs), and `complete` (answered and shown). The fast path
//! needs no task and allocates nothing: the chain of layers answers with a plan, and the plan's
//! pieces go to storage with the guest's own memory. What the plan cannot say, and what comes back
//! short or failed, is done once more as a task; doing it twice is harmless, since the guest has not
//! been told yet.

use std::cell::RefCell;
use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;

use super::flush::FlushGroup;
use super::slot::Slot;
use super::{DeviceFacts, Kick, Left, QueueSetup};
use crate::chain::turn::{Share, Turn};
use crate::chain::{Chain, View, ViewCache};
use crate::export::event::Bell;
use crate::export::inflight::Again;
use crate::export::limit::Topic;
use crate::export::memory::GuestMemory;
use crate::export::request::RequestStatus;
use crate::export::ring::SplitRing;
use crate::export::stats::QueueStats;
use crate::reactor::Reactor;
use crate::shared_memory::sigbus;
use crate::storage::Limits;

/// Bytes of the requests that are under way. More are not taken from the ring until there are
/// fewer, so that what a queue must finish before it is given back does not grow with what its
/// guest asks for. A larger request is carried out alone, and by a task.
pub(super) const MOST_BYTES: u64 = 64 << 20;

/// What a task reports, most of it when it has ended.
pub(super) enum Done {
    Request(u16, RequestStatus),
    /// The request has begun anew, with this chain.
    Moved(u16, Arc<Chain>),
    Flush(Vec<u16>, RequestStatus),
}

/// What all queues that a worker has in the course of time share.
pub(super) struct Context {
    pub(super) facts: Rc<DeviceFacts>,
    pub(super) reactor: Reactor,
    pub(super) views: ViewCache,
    pub(super) stats: Arc<QueueStats>,
    /// Tasks leave their results here.
    pub(super) done: Rc<RefCell<Vec<Done>>>,
    /// Signals the driver.
    pub(super) bell: Bell,
    /// The limits of the chain that was looked at last.
    pub(super) limits: Option<(Rc<View>, Limits)>,
}

impl Context {
    pub(super) fn new(
        facts: Rc<DeviceFacts>,
        reactor: Reactor,
        views: ViewCache,
        stats: Arc<QueueStats>,
        bell: Bell,
    ) -> Self {
        Self {
            facts,
            reactor,
            views,
            stats,
            done: Rc::default(),
            bell,
            limits: None,
        }
    }

    /// Whether no request has the view that was taken last: none is in flight, or they wait for
    /// room and would wait for this thread for ever.
    pub(super) fn is_unused(&self) -> bool {
        // One is the cache's, and one is kept with the limits.
        self.views.holders() <= 2
    }

    /// Lets go of the chain, since no request has the view.
    pub(super) fn leave(&mut self) {
        self.limits = None;
        self.views.leave();
    }

    pub(super) fn limits(&mut self, view: &Rc<View>) -> Limits {
        match &self.limits {
            Some((known, limits)) if Rc::ptr_eq(known, view) => *limits,
            _ => {
                let limits = view.chain.limits();
                self.limits = Some((view.clone(), limits));
                limits
            }
        }
    }

    pub(super) fn warn(&self, what: std::fmt::Arguments<'_>) {
        self.facts.log.warn(Topic::Ring, what);
    }

    /// A descriptor that cannot be signalled is its front-end's loss.
    pub(super) fn check_signal(&self, result: std::io::Result<()>) {
        if let Err(error) = result {
            self.warn(format_args!("a signal to the driver: {error}"));
        }
    }
}

/// A queue that a worker has been given.
pub(super) struct Queue {
    pub(super) ring: SplitRing,
    pub(super) kick: Kick,
    pub(super) call: Option<Arc<File>>,
    pub(super) error: Option<Arc<File>>,
    pub(super) write_through: bool,
    pub(super) memory: Arc<GuestMemory>,
    /// How often memory had been taken away from the process when all of `memory` was there; none
    /// before it was looked at.
    pub(super) all_there: Option<usize>,
    pub(super) slots: Vec<Slot>,
    /// What a process that died has left to be done, the next one last.
    pub(super) again: Vec<Again>,
    /// The process has crashed with the request that is under way: nothing else is begun with.
    pub(super) alone: bool,
    pub(super) in_flight: u32,
    /// What the requests in flight weigh together.
    pub(super) weight: u64,
    /// With no more than this in flight there is room for the next request.
    pub(super) room: u64,
    /// Bytes of the requests that are done and that the driver cannot see yet.
    pub(super) unshown_bytes: u64,
    pub(super) flushes: FlushGroup,
    /// What was handed over to turning switches and has not ended.
    pub(super) late: Vec<(Arc<Turn>, Share<u16>)>,
    /// Nothing more is taken from the ring: it is being given back, or it is broken.
    pub(super) closed: bool,
    /// The ring cannot be believed any more, or its memory has gone.
    pub(super) broken: bool,
}

impl Queue {
    pub(super) fn new(setup: QueueSetup) -> Self {
        let slots = std::iter::repeat_with(Slot::new)
            .take(usize::from(setup.ring.size()))
            .collect();
        Self {
            memory: setup.ring.memory().clone(),
            all_there: None,
            ring: setup.ring,
            kick: setup.kick,
            call: setup.call,
            error: setup.error,
            write_through: setup.write_through,
            slots,
            again: setup.again,
            alone: false,
            in_flight: 0,
            weight: 0,
            room: MOST_BYTES,
            unshown_bytes: 0,
            flushes: FlushGroup::default(),
            late: Vec::new(),
            closed: false,
            broken: false,
        }
    }

    /// Requests that must be answered before the queue can be given back.
    pub(super) fn in_flight(&self) -> u32 {
        // No more than the ring has entries.
        self.in_flight + self.again.len() as u32
    }

    /// Takes no more requests.
    pub(super) fn close(&mut self, left: Left) {
        self.closed = true;
        if left == Left::Marked {
            self.again.clear();
        }
    }

    /// Whether the next request that becomes available would be looked at.
    pub(super) fn takes_more(&self) -> bool {
        self.has_room() && !self.alone
    }

    pub(super) fn has_room(&self) -> bool {
        !self.closed && self.weight <= self.room
    }

    /// Makes the call descriptor of the setup the one that is signalled.
    pub(super) fn attach_call(&self, context: &mut Context) {
        let attached = context.bell.attach(self.call.as_deref());
        context.check_signal(attached);
    }

    pub(super) fn set_call(&mut self, context: &mut Context, call: Option<Arc<File>>) {
        self.call = call;
        self.attach_call(context);
        self.ring.force_signal();
        // The driver may have missed a signal that went to the old descriptor.
        self.notify(context);
    }

    pub(super) fn set_error(&mut self, context: &mut Context, error: Option<Arc<File>>) {
        self.error = error;
        if self.broken {
            self.signal_error(context);
        }
    }

    /// Gives the queue up if memory of its guest has been taken away. What the guest means to
    /// write may be zeros by now.
    pub(super) fn check_memory(&mut self, context: &mut Context) {
        if !self.broken && self.memory_is_lost() {
            self.give_up(
                context,
                format_args!("shared memory was taken away while in use"),
            );
        }
    }

    /// Whether memory of its guest has been taken away: one look at a count as long as the whole
    /// process has lost none.
    pub(super) fn memory_is_lost(&mut self) -> bool {
        let lost = sigbus::lost();
        if self.all_there == Some(lost) {
            return false;
        }
        if self.memory.is_lost() || self.ring.region_is_lost() {
            return true;
        }
        self.all_there = Some(lost);
        false
    }

    pub(super) fn set_memory(&mut self, context: &mut Context, memory: Arc<GuestMemory>) {
        self.memory = memory;
        self.all_there = None;
        self.check_memory(context);
    }

    pub(super) fn set_write_through(&mut self, on: bool) {
        self.write_through = on;
    }

    pub(super) fn signal_error(&self, context: &mut Context) {
        if let Some(error) = &self.error {
            let rung = context.bell.ring_other(error, self.call.as_deref());
            context.check_signal(rung);
        }
    }

    /// The ring cannot be believed any more: nothing is taken from it until it is reset.
    pub(super) fn give_up(&mut self, context: &mut Context, why: std::fmt::Arguments<'_>) {
        self.closed = true;
        // It is still marked for the next process.
        self.again.clear();
        self.broken = true;
        context.warn(format_args!("a queue is broken and stops: {why}"));
        self.signal_error(context);
    }
}
