//! A queue at work: takes chains from the ring, carries the requests out, puts them back.
//!
//! The fast path needs no task and allocates nothing: the chain of layers answers with a plan,
//! and the plan's pieces go to storage with the guest's own memory. What the plan cannot say,
//! and what comes back short or failed, is done once more as a task by [`View::read`] and
//! [`View::write`], which load metadata, allocate, copy and explain errors; doing it twice is
//! harmless, since the guest has not been told yet. A task that finds no room is done again, too:
//! see [`with_room`].

use std::cell::RefCell;
use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;

use super::flush::FlushGroup;
use super::slot::Slot;
use super::{DeviceFacts, Kick, Left, QueueSetup, Unmap};
use crate::chain::{Pieces, Source, View, ViewCache, with_room};
use crate::error::{Error, Result};
use crate::export::config::{MAX_DISCARD, MAX_WRITE_ZEROES};
use crate::export::event::Bell;
use crate::export::inflight::Again;
use crate::export::limit::Topic;
use crate::export::memory::{self, GuestMemory};
use crate::export::request::{self, Kind, MAX_RANGES, Parsed, Status};
use crate::export::ring::SplitRing;
use crate::export::stats::QueueStats;
use crate::reactor::{Completion, Reactor, Token};
use crate::shared_memory::sigbus;
use crate::storage::buffer::{iovecs_aligned, iovecs_are_zero, slice_iovecs};
use crate::storage::{IoBufs, Limits, Op, Submission};

/// Chains taken from the ring before completions are looked at again.
const BATCH: u16 = 64;
/// Requests that are done before the driver is shown them, within a batch. With fewer, the ring's
/// index goes from one processor's cache to the other's for nearly every request, and a driver
/// that sleeps is signalled for it; with more, it waits for what it could work on.
const PUBLISH_BATCH: u16 = 8;
/// Operations that are submitted together, at least: the kernel gathers three and more, and tells
/// a disk of all of them at once, which for a virtual one is the dearest part of a request.
const SUBMIT_LEAST: u32 = 4;
/// And at most.
const SUBMIT_MOST: u32 = 16;
/// Bytes of requests that are done before the driver is shown them: it works on large ones
/// while the next are carried out.
const PUBLISH_BYTES: u64 = 64 << 10;
/// Bytes that a task moves at a time, which bounds the memory of its copies.
const TASK_CHUNK: u64 = 4 << 20;
/// Bytes of the requests that are under way. More are not taken from the ring until there are
/// fewer, so that what a queue must finish before it is given back does not grow with what its
/// guest asks for. A larger request is carried out alone, and by a task.
const MOST_BYTES: u64 = 64 << 20;
/// A discard counts for a part of its length: it changes mappings and moves no data.
const DISCARD_WEIGHT: u64 = 32;
/// Crashes of the process with one request under way, after which the request is not tried again but
/// read, for the place of its status.
const MOST_CRASHES: u8 = 3;
/// And after which it is not even read.
const MOST_CRASHES_READ: u8 = 2 * MOST_CRASHES;

/// What a task reports when it has ended.
pub(super) enum Done {
    Request(u16, Status),
    Flush(Vec<u16>, Status),
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
    limits: Option<(Rc<View>, Limits)>,
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

    fn limits(&mut self, view: &Rc<View>) -> Limits {
        match &self.limits {
            Some((known, limits)) if Rc::ptr_eq(known, view) => *limits,
            _ => {
                let limits = view.chain.limits();
                self.limits = Some((view.clone(), limits));
                limits
            }
        }
    }

    fn warn(&self, what: std::fmt::Arguments<'_>) {
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
    call: Option<Arc<File>>,
    error: Option<Arc<File>>,
    write_through: bool,
    memory: Arc<GuestMemory>,
    /// How often memory had been taken away from the process when all of `memory` was there; none
    /// before it was looked at.
    all_there: Option<usize>,
    slots: Vec<Slot>,
    /// What a process that died has left to be done, the next one last.
    again: Vec<Again>,
    /// The process has crashed with the request that is under way: nothing else is begun with.
    alone: bool,
    in_flight: u32,
    /// What the requests in flight weigh together.
    weight: u64,
    /// With no more than this in flight there is room for the next request.
    room: u64,
    /// Bytes of the requests that are done and that the driver cannot see yet.
    unshown_bytes: u64,
    flushes: FlushGroup,
    /// Nothing more is taken from the ring: it is being given back, or it is broken.
    closed: bool,
    /// The ring cannot be believed any more, or its memory has gone.
    broken: bool,
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

    fn has_room(&self) -> bool {
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
    fn memory_is_lost(&mut self) -> bool {
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

    /// Takes what is available, up to a batch. True: there was something.
    pub(super) fn take_available(&mut self, context: &mut Context) -> bool {
        if !self.again.is_empty() || self.alone {
            return self.take_again(context);
        }
        if !self.has_room() {
            return false;
        }
        let count = match self.ring.available() {
            Ok(0) => return false,
            Ok(count) => count.min(BATCH),
            Err(error) => {
                self.give_up(context, format_args!("{error}"));
                return false;
            }
        };
        let view = context.views.get();
        let limits = context.limits(&view);
        for _ in 0..count {
            self.take_next(context, &view, &limits);
            if !self.has_room() {
                break;
            }
            self.go_on(context);
        }
        true
    }

    /// Carries out what a process that died has left, before anything is taken from the ring, and
    /// also if nothing more is taken. What was under way at a crash comes first, one after the other:
    /// should one of them crash the process again, it is the only one that did. True: there was some.
    #[cold]
    #[inline(never)]
    fn take_again(&mut self, context: &mut Context) -> bool {
        if self.weight > self.room {
            return false;
        }
        let view = context.views.get();
        let limits = context.limits(&view);
        for _ in 0..BATCH {
            let suspect = self.again.last().is_some_and(|again| again.crashes > 0);
            if self.alone || suspect {
                if self.in_flight > 0 {
                    return false;
                }
                // It is no longer marked when the next one is begun with.
                self.show(context);
                self.alone = false;
            }
            let Some(again) = self.again.pop() else {
                break;
            };
            self.alone = suspect;
            if !self.begin_again(context, again, &view, &limits) {
                self.again.push(again);
                break;
            }
            self.go_on(context);
        }
        true
    }

    /// Begins with a request that a process that died has left. False: there is no room for it now.
    fn begin_again(
        &mut self,
        context: &mut Context,
        again: Again,
        view: &Rc<View>,
        limits: &Limits,
    ) -> bool {
        let Again { head, crashes } = again;
        if crashes >= MOST_CRASHES {
            context.facts.log.error(
                Topic::Disk,
                format_args!(
                    "a request was under way when the process crashed, {crashes} times, and is not \
                     tried again"
                ),
            );
        }
        if crashes >= MOST_CRASHES_READ {
            self.answer_at_once(head, 0);
            return true;
        }
        self.ring.begin(again);
        let begun = self.begin(context, again, view, limits);
        if !begun {
            self.ring.leave(again);
        }
        begun
    }

    /// Takes the next chain from the ring.
    fn take_next(&mut self, context: &mut Context, view: &Rc<View>, limits: &Limits) {
        let head = self.ring.peek();
        let Some(slot) = self.slots.get(usize::from(head)) else {
            return self.give_up(context, format_args!("no descriptor {head}"));
        };
        if slot.busy || !self.ring.take(head) {
            return self.give_up(context, format_args!("chain {head} is there twice"));
        }
        let request = Again { head, crashes: 0 };
        if !self.begin(context, request, view, limits) {
            // Whoever takes the queue over finds it there.
            self.ring.put_back(head);
        }
    }

    /// Between two requests: shows and submits what is enough for that.
    fn go_on(&mut self, context: &mut Context) {
        self.show_some(context);
        let queued = context.reactor.queued();
        let under_way = context.reactor.in_flight().saturating_sub(queued);
        if queued >= submit_together(under_way) {
            context.reactor.submit();
        }
    }

    /// Handles the completion of an operation of the fast path.
    pub(super) fn completed(&mut self, context: &mut Context, completion: Completion) {
        let head = completion.value as u16;
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return;
        };
        match completion.result {
            Ok(count) => slot.transferred += u64::from(count),
            Err(_) => slot.failed = true,
        }
        slot.pending = slot.pending.saturating_sub(1);
        if slot.pending == 0 {
            self.settle(context, head);
        }
    }

    /// Handles what tasks have finished.
    pub(super) fn tasks_done(&mut self, context: &mut Context) -> bool {
        if context.done.borrow().is_empty() {
            return false;
        }
        let done = std::mem::take(&mut *context.done.borrow_mut());
        for done in done {
            match done {
                Done::Request(head, Status::Ok) => self.carried_out(context, head),
                Done::Request(head, status) => self.complete(context, head, status),
                Done::Flush(heads, status) => {
                    self.flushes.end();
                    for head in heads {
                        self.complete(context, head, status);
                    }
                }
            }
        }
        true
    }

    /// Starts a flush if requests wait for one and none is running.
    pub(super) fn flush(&mut self, context: &mut Context) {
        let Some(heads) = self.flushes.begin() else {
            return;
        };
        let view = context.views.get();
        let (done, facts) = (context.done.clone(), context.facts.clone());
        context.reactor.spawn(async move {
            let status = match view.chain.flush().await {
                Ok(()) => Status::Ok,
                Err(error) => {
                    // The storage has told of a failure that stays.
                    if matches!(error, Error::Sync(_)) {
                        log::debug!("export '{}': {error}", facts.id);
                    } else {
                        facts.log.error(Topic::Disk, format_args!("{error}"));
                    }
                    Status::IoError
                }
            };
            done.borrow_mut().push(Done::Flush(heads, status));
        });
    }

    /// Shows the driver what is done if it is enough to begin with.
    pub(super) fn show_some(&mut self, context: &mut Context) {
        if self.ring.unpublished() >= PUBLISH_BATCH || self.unshown_bytes >= PUBLISH_BYTES {
            self.show(context);
        }
    }

    /// Shows the driver what is done, and signals it if it wants that.
    pub(super) fn show(&mut self, context: &mut Context) {
        self.ring.publish();
        self.unshown_bytes = 0;
        if self.call.is_some() && self.ring.needs_signal() {
            self.notify(context);
            context.stats.signals.add(1);
        }
    }

    fn notify(&self, context: &mut Context) {
        let rung = context.bell.ring(self.call.as_deref());
        context.check_signal(rung);
    }

    fn signal_error(&self, context: &mut Context) {
        if let Some(error) = &self.error {
            let rung = context.bell.ring_other(error, self.call.as_deref());
            context.check_signal(rung);
        }
    }

    /// The ring cannot be believed any more: nothing is taken from it until it is reset.
    fn give_up(&mut self, context: &mut Context, why: std::fmt::Arguments<'_>) {
        self.closed = true;
        // It is still marked for whoever comes after this.
        self.again.clear();
        self.broken = true;
        context.warn(format_args!("a queue is broken and stops: {why}"));
        self.signal_error(context);
    }

    /// Puts back a chain with which nothing is to be done.
    #[cold]
    #[inline(never)]
    fn answer_at_once(&mut self, head: u16, len: u32) {
        self.ring.put_used(head, len);
    }

    /// Begins with a request that was taken. False: there is no room for it now.
    // Said where the compiler would not: what a request costs is counted, and calls of such length
    // with as many arguments are a tenth of it.
    #[inline(always)]
    fn begin(
        &mut self,
        context: &mut Context,
        request: Again,
        view: &Rc<View>,
        limits: &Limits,
    ) -> bool {
        let Again { head, crashes } = request;
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return true;
        };
        let parsed = request::parse(&self.ring, &self.memory, head, &mut slot.ranges);
        let (kind, status) = match parsed {
            Parsed::Request { kind, status } => (kind, status),
            Parsed::Refused { with, status } => {
                context.stats.errors.add(1);
                // SAFETY: the address was translated with `self.memory`.
                unsafe { memory::store_byte(status, with as u8) };
                self.answer_at_once(head, 1);
                return true;
            }
            Parsed::Malformed => {
                context.stats.errors.add(1);
                context.warn(format_args!("a request has no place for its status"));
                self.answer_at_once(head, 0);
                return true;
            }
        };
        let weight = weigh(kind, slot.ranges.data_len());
        if self.weight > 0 && self.weight + weight > MOST_BYTES {
            self.room = MOST_BYTES.saturating_sub(weight);
            return false;
        }
        self.room = MOST_BYTES;
        self.weight += weight;
        slot.begin(kind, status, weight);
        slot.busy = true;
        slot.view = Some(view.clone());
        self.in_flight += 1;
        if let Some(refusal) = self.refusal(context, kind, head, view) {
            self.complete(context, head, refusal);
            return true;
        }
        if crashes >= MOST_CRASHES {
            self.complete(context, head, Status::IoError);
            return true;
        }
        match kind {
            Kind::In { offset } | Kind::Out { offset } => {
                let write = matches!(kind, Kind::Out { .. });
                self.transfer(context, head, offset, write, view, limits);
            }
            Kind::Flush => self.flushes.join(head),
            Kind::GetId => self.identify(context, head),
            Kind::Discard { .. } | Kind::WriteZeroes { .. } => self.spawn(context, head),
        }
        true
    }

    /// Why a well-formed request is not carried out.
    fn refusal(&self, context: &Context, kind: Kind, head: u16, view: &View) -> Option<Status> {
        let data_len = self.slots.get(usize::from(head))?.ranges.data_len();
        let (offset, len, max, write) = match kind {
            Kind::In { offset } => (offset, data_len, u64::MAX, false),
            Kind::Out { offset } => (offset, data_len, u64::MAX, true),
            Kind::Discard { offset, len } => (offset, len, MAX_DISCARD, true),
            Kind::WriteZeroes { offset, len, .. } => (offset, len, MAX_WRITE_ZEROES, true),
            Kind::Flush | Kind::GetId => return None,
        };
        let block = context.facts.block_size - 1;
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= view.chain.size());
        let allowed = !write || (context.facts.writable && !view.chain.top().read_only);
        let fits = inside && len <= max && (offset | len) & block == 0;
        (!fits || !allowed).then_some(Status::IoError)
    }

    /// Reads or writes by the chain's plan, or else by a task.
    #[inline(always)]
    fn transfer(
        &mut self,
        context: &mut Context,
        head: u16,
        offset: u64,
        write: bool,
        view: &View,
        limits: &Limits,
    ) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return;
        };
        let len = slot.ranges.data_len() as usize;
        let mut pieces = Pieces::new();
        // SAFETY: the ranges were translated with memory that the queue keeps.
        let zeros = || unsafe { iovecs_are_zero(slot.ranges.data()) };
        if write && context.facts.detect_zeroes.is_some() && zeros() {
            return self.spawn(context, head);
        }
        let planned = len as u64 <= MOST_BYTES
            && iovecs_aligned(slot.ranges.data(), limits.memory_align)
            && if write {
                view.chain.plan_write(offset, len, &mut pieces)
            } else {
                view.chain.plan_read(offset, len, &mut pieces)
            }
            && aligned(&pieces, limits.offset_align);
        if !planned || !submit(context, slot, head, view, &pieces, write) {
            return self.spawn(context, head);
        }
        if slot.pending == 0 {
            self.settle(context, head);
        }
    }

    /// All operations of a request have ended.
    #[inline(always)]
    fn settle(&mut self, context: &mut Context, head: u16) {
        let complete = self
            .slots
            .get(usize::from(head))
            .is_some_and(Slot::is_complete);
        if complete {
            self.carried_out(context, head);
        } else {
            self.spawn(context, head);
        }
    }

    /// A request has been carried out; a change may have to become stable first.
    #[inline(always)]
    fn carried_out(&mut self, context: &mut Context, head: u16) {
        let changes = self.slots.get(usize::from(head)).is_some_and(|slot| {
            matches!(
                slot.kind,
                Kind::Out { .. } | Kind::Discard { .. } | Kind::WriteZeroes { .. }
            )
        });
        if changes && self.memory_is_lost() {
            // Zeros may have been written that nobody meant.
            self.complete(context, head, Status::IoError);
        } else if changes && self.write_through {
            self.flushes.join(head);
        } else {
            self.complete(context, head, Status::Ok);
        }
    }

    fn identify(&mut self, context: &mut Context, head: u16) {
        if let Some(slot) = self.slots.get(usize::from(head)) {
            // SAFETY: the ranges were translated with `self.memory`.
            unsafe { memory::scatter(slot.ranges.data(), &context.facts.serial) };
        }
        self.complete(context, head, Status::Ok);
    }

    /// Carries a request out by a task.
    fn spawn(&mut self, context: &mut Context, head: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return;
        };
        // The task's alone: it lets go of it where it has to wait for room.
        let Some(view) = slot.view.take() else {
            return;
        };
        context.stats.slow.add(1);
        // SAFETY: the queue keeps the memory, and takes no new request into this slot, until
        // the task has reported.
        let bufs = unsafe { IoBufs::new(slot.ranges.data()) };
        let (kind, done, facts) = (slot.kind, context.done.clone(), context.facts.clone());
        let detect_zeroes = facts
            .detect_zeroes
            .map(|unmap| (unmap, self.memory.clone()));
        context.reactor.spawn(async move {
            let request = |view| perform(view, kind, &bufs, detect_zeroes.as_ref());
            let status = match with_room(view, || facts.root.chain(), request).await {
                Ok(()) => Status::Ok,
                Err(error) => {
                    facts.log.error(Topic::Disk, format_args!("{error}"));
                    Status::IoError
                }
            };
            done.borrow_mut().push(Done::Request(head, status));
        });
    }

    /// Answers a request and puts its chain into the used ring.
    fn complete(&mut self, context: &mut Context, head: u16, status: Status) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return;
        };
        debug_assert!(slot.busy && slot.pending == 0, "answered once, at the end");
        slot.view = None;
        slot.busy = false;
        let len = count(&context.stats, slot, status);
        // SAFETY: the address was translated with `self.memory`, or with a smaller table whose
        // regions it still has.
        unsafe { memory::store_byte(slot.status, status as u8) };
        self.in_flight -= 1;
        self.weight -= slot.weight;
        self.unshown_bytes += slot.ranges.data_len();
        self.ring.put_used(head, len);
    }
}

/// How much of what may be under way a request takes, in bytes: what it moves, or may have to.
fn weigh(kind: Kind, data_len: u64) -> u64 {
    match kind {
        Kind::In { .. } | Kind::Out { .. } => data_len,
        // The storage may know no shorter way than to write them.
        Kind::WriteZeroes { len, .. } => len,
        Kind::Discard { len, .. } => len / DISCARD_WEIGHT,
        Kind::Flush | Kind::GetId => 0,
    }
}

/// Counts a request that is done; the bytes that were written into the guest's memory for it.
fn count(stats: &QueueStats, slot: &Slot, status: Status) -> u32 {
    if status != Status::Ok {
        stats.errors.add(1);
        return 1;
    }
    let len = slot.ranges.data_len();
    match slot.kind {
        Kind::In { .. } => {
            stats.reads.add(1);
            stats.read_bytes.add(len);
            // The length was bounded when the request was parsed.
            return len as u32 + 1;
        }
        Kind::Out { .. } => {
            stats.writes.add(1);
            stats.write_bytes.add(len);
        }
        Kind::Flush => stats.flushes.add(1),
        Kind::GetId => return len.min(request::ID_LEN as u64) as u32 + 1,
        Kind::Discard { .. } | Kind::WriteZeroes { .. } => stats.discards.add(1),
    }
    1
}

fn aligned(pieces: &Pieces, align: u64) -> bool {
    align <= 1
        || pieces.iter().all(|piece| match piece.source {
            Source::Storage { offset, .. } => (offset | piece.len as u64) & (align - 1) == 0,
            Source::Zero => true,
        })
}

/// Gives the pieces to storage. False: nothing was started, a task must do it.
fn submit(
    context: &Context,
    slot: &mut Slot,
    head: u16,
    view: &View,
    pieces: &Pieces,
    write: bool,
) -> bool {
    slot.cuts.clear();
    let mut bounds = [(0, 0); crate::chain::MAX_PIECES];
    if let [_] = pieces.as_slice() {
        // The one piece is all the data, as it is.
    } else {
        for (piece, bounds) in pieces.iter().zip(&mut bounds) {
            let start = slot.cuts.len();
            let cuts = &mut slot.cuts;
            slice_iovecs(slot.ranges.data(), piece.start, piece.len, |cut| {
                cuts.push(cut);
            });
            *bounds = (start, slot.cuts.len());
        }
    }
    let whole = pieces.len() == 1;
    let known = pieces.iter().all(|piece| match piece.source {
        Source::Storage { layer, .. } => view.chain.storage(layer).is_some(),
        Source::Zero => !write,
    });
    if !known || slot.cuts.len() > MAX_RANGES {
        return false;
    }
    for (piece, &(start, end)) in pieces.iter().zip(&bounds) {
        let iovecs = if whole {
            slot.ranges.data()
        } else {
            slot.cuts.get(start..end).unwrap_or(&[])
        };
        let Source::Storage { layer, offset } = piece.source else {
            // SAFETY: the ranges were translated with memory that the queue keeps.
            unsafe { memory::zero(iovecs) };
            slot.transferred += piece.len as u64;
            continue;
        };
        let Some(storage) = view.chain.storage(layer) else {
            slot.failed = true;
            continue;
        };
        let op = if write {
            Op::Write { iovecs, offset }
        } else {
            Op::Read { iovecs, offset }
        };
        // SAFETY: the vectors are in the slot, which takes no new request before all its
        // operations have completed; the memory they name is kept by the queue, which is not
        // given back before that either.
        match unsafe { storage.submit(&context.reactor, op, Token::client(u64::from(head))) } {
            Submission::Pending => slot.pending += 1,
            Submission::Ready(Ok(count)) => slot.transferred += u64::from(count),
            Submission::Ready(Err(_)) => slot.failed = true,
        }
    }
    true
}

/// Carries out a request with whatever it needs. Zeros are detected with the memory that they are
/// in.
async fn perform(
    view: Rc<View>,
    kind: Kind,
    bufs: &IoBufs,
    detect_zeroes: Option<&(Unmap, Arc<GuestMemory>)>,
) -> Result<()> {
    match kind {
        Kind::In { offset } => {
            for (start, len) in chunks(bufs.len() as u64) {
                let part = bufs.slice(start as usize, len as usize);
                view.clone().read(offset + start, part).await?;
            }
            Ok(())
        }
        Kind::Out { offset } => {
            if let Some((unmap, memory)) = detect_zeroes
                && bufs.is_zero()
            {
                if memory.is_lost() {
                    let text = "the shared memory of a write was taken away";
                    return Err(Error::Invalid(text.into()));
                }
                let len = bufs.len() as u64;
                return view.write_zeroes(offset, len, *unmap).await;
            }
            for (start, len) in chunks(bufs.len() as u64) {
                let part = bufs.slice(start as usize, len as usize);
                view.clone().write(offset + start, part).await?;
            }
            Ok(())
        }
        Kind::Discard { offset, len } => view.discard(offset, len).await,
        Kind::WriteZeroes { offset, len, unmap } => view.write_zeroes(offset, len, unmap).await,
        Kind::Flush | Kind::GetId => Err(Error::Invalid("a request without a task".into())),
    }
}

fn chunks(len: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len.div_ceil(TASK_CHUNK)).map(move |index| {
        let start = index * TASK_CHUNK;
        (start, TASK_CHUNK.min(len - start))
    })
}

/// How many operations to gather while so many are under way. A disk that has little to do begins
/// with the first ones while the others are still being prepared: with all at once disk, back-end
/// and driver would take turns. One that has much to do does not miss a few more.
fn submit_together(under_way: u32) -> u32 {
    (under_way / 4).clamp(SUBMIT_LEAST, SUBMIT_MOST)
}

#[cfg(test)]
mod tests {
    //! What would be caught: a disk without work that waits for a long batch, batches so short that
    //! the kernel does not gather them, and work that the bound of a queue does not count.

    use super::*;

    #[test]
    fn the_more_is_under_way_the_more_is_submitted_together() {
        let together: Vec<u32> = [0, 1, 16, 24, 31, 64, 255].map(submit_together).into();
        assert_eq!(together, [4, 4, 4, 6, 7, 16, 16]);
    }

    #[test]
    fn a_request_weighs_what_it_may_have_to_move() {
        let (offset, len) = (0, 1 << 30);
        for (kind, weight) in [
            (Kind::In { offset }, 16),
            (Kind::Out { offset }, 16),
            (Kind::Flush, 0),
            (Kind::Discard { offset, len }, 32 << 20),
        ] {
            assert_eq!(weigh(kind, 16), weight, "{kind:?}");
        }
        for unmap in [true, false] {
            assert_eq!(weigh(Kind::WriteZeroes { offset, len, unmap }, 16), len);
        }
    }
}
