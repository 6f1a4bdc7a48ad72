//! A queue's thread: one loop of taking, completing, showing and, when there is nothing to do,
//! sleeping.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use super::life::{Context, Queue};
use super::poller::Poller;
use super::{DeviceFacts, Kick, Left, Mailbox, Order, QueueSetup};
use crate::chain::ViewCache;
use crate::chain::turn::Turn;
use crate::export::event::Bell;
use crate::export::limit::Topic;
use crate::export::stats::QueueStats;
use crate::reactor::{Reactor, Remote};
use crate::sched;

/// Marks the completions of kick descriptors; heads of chains are below it.
const KICK: u64 = 1 << 32;
/// How often a ring without a kick descriptor is looked at.
const POLL_INTERVAL: Duration = Duration::from_micros(50);

/// How long a thread wants to run at a time.
const SLICE: Duration = Duration::from_micros(115);
/// After that time without a sleep others get their turn: a busy queue would otherwise have the
/// processor until the scheduler's next tick, some milliseconds, and another queue on it would
/// wait that long for each of its turns. Before the slice ends, or the one after it would be lost.
const BUSY: Duration = Duration::from_micros(100);

struct WorkerLoop<'a> {
    mailbox: &'a Mailbox,
    reactor: Reactor,
    context: Context,
    poller: Poller,
    queue: Option<Queue>,
    /// Who waits for the queue to be given back.
    stopping: Vec<SyncSender<u16>>,
    /// Names the watch of the present kick descriptor.
    watch: u64,
    /// The last available index of a queue that was taken back.
    last_base: u16,
    /// Turning switches that it waits for: it takes no requests meanwhile.
    held: Vec<Arc<Turn>>,
    /// The thread is to end, as soon as nothing is in flight.
    exit: bool,
    /// What was queued in the turn before has not been submitted.
    held_back: bool,
    fairness: Fairness,
    /// Requests that had been answered when the thread last slept or let others run.
    answered: u64,
}

/// When a thread that does not sleep lets others run.
struct Fairness {
    on: bool,
    since: Option<Instant>,
}

impl Fairness {
    /// For the calling thread. Off where slices cannot be set: who yields then may lose much.
    fn of_this_thread() -> Self {
        let set = sched::set(sched::nice(), SLICE);
        if let Err(error) = &set {
            log::debug!("the slice of a queue's thread: {error}");
        }
        Self {
            on: matches!(set, Ok(true)),
            since: None,
        }
    }

    fn slept(&mut self) {
        self.since = None;
    }

    /// One more turn has begun. True: others have run.
    fn turn(&mut self) -> bool {
        let due = self.on && self.is_due(Instant::now());
        if due {
            sched::give_turn();
        }
        due
    }

    /// Whether others are to run at a turn that begins `now`. Then the time counts anew.
    fn is_due(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let due = now.saturating_duration_since(since) >= BUSY;
        if due {
            self.since = None;
        }
        due
    }
}

/// The thread's main function. `ready` hears whether it has what it needs.
pub(super) fn run(
    facts: &DeviceFacts,
    mailbox: &Mailbox,
    stats: Arc<QueueStats>,
    ready: &SyncSender<std::io::Result<Arc<Remote>>>,
) {
    let made = Reactor::for_this_thread().and_then(|reactor| Ok((reactor, Bell::new()?)));
    let (reactor, bell) = match made {
        Ok(made) => made,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    // SAFETY: no memory is passed.
    let thread = unsafe { libc::gettid() };
    stats.thread.store(thread, Ordering::Relaxed);
    let _ = ready.send(Ok(reactor.remote()));
    let poller = Poller::new(facts.poll_max_us.clone());
    // A copy of its own: every request looks at the facts and every task holds them, so that a
    // count that all workers shared would take the line away from the others.
    let facts = Rc::new(facts.clone());
    let views = ViewCache::new(facts.root.clone());
    let mut worker = WorkerLoop {
        mailbox,
        context: Context::new(facts, reactor.clone(), views, stats, bell),
        reactor,
        poller,
        queue: None,
        stopping: Vec::new(),
        watch: KICK,
        last_base: 0,
        held: Vec::new(),
        exit: false,
        held_back: false,
        fairness: Fairness::of_this_thread(),
        answered: 0,
    };
    while !worker.exit || worker.in_flight() {
        worker.turn();
    }
    drop(worker);
    mailbox.close();
    // What requests of other disks wait for may be among it: the claims of a change under way.
    Reactor::end_thread();
}

impl WorkerLoop<'_> {
    fn turn(&mut self) {
        if self.fairness.turn() {
            self.note_ends();
        }
        self.take_orders();
        let mut taken = false;
        if let Some(queue) = &mut self.queue {
            queue.check_memory(&mut self.context);
            if self.held.is_empty() {
                taken = queue.take_available(&mut self.context);
            }
            queue.flush(&mut self.context);
        }
        let mut busy = taken | self.reactor.collect();
        if let Some(queue) = &mut self.queue {
            while let Some(completion) = self.reactor.next_completion() {
                busy = true;
                if completion.value < KICK {
                    queue.completed(&mut self.context, completion);
                    queue.show_some(&mut self.context);
                }
            }
            busy |= queue.tasks_done(&mut self.context);
            if !queue.late.is_empty() {
                queue.end_late();
            }
            queue.flush(&mut self.context);
            queue.show(&mut self.context);
        } else {
            // Late news of a descriptor that is watched no more.
            while self.reactor.next_completion().is_some() {}
        }
        self.finish_stop();
        if !busy && (!self.exit || self.in_flight()) {
            self.rest();
        } else if !taken || self.held_back {
            self.reactor.submit();
            self.held_back = false;
        } else {
            // The next turn looks for more first: if there is none, the submission is one
            // system call with the wait. Once only, or the disk would wait for the driver.
            self.held_back = true;
        }
    }

    fn take_orders(&mut self) {
        loop {
            let Some(order) = self.mailbox.orders.lock().pop_front() else {
                return;
            };
            self.carry_out(order);
        }
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Start(setup, reply) => {
                self.start(*setup);
                let _ = reply.send(());
            }
            Order::Stop(left, reply) => {
                if let Some(queue) = &mut self.queue {
                    queue.close(left);
                }
                self.stopping.push(reply);
            }
            Order::SetCall(call, reply) => {
                if let Some(queue) = &mut self.queue {
                    queue.set_call(&mut self.context, call);
                } else if let Some(call) = call {
                    let rung = self.context.bell.ring_other(&call, None);
                    self.context.check_signal(rung);
                }
                let _ = reply.send(());
            }
            Order::SetError(error, reply) => {
                if let Some(queue) = &mut self.queue {
                    queue.set_error(&mut self.context, error);
                }
                let _ = reply.send(());
            }
            Order::SetMemory(memory, reply) => {
                if let Some(queue) = &mut self.queue {
                    queue.set_memory(&mut self.context, memory);
                }
                let _ = reply.send(());
            }
            Order::SetWriteThrough(on, reply) => {
                if let Some(queue) = &mut self.queue {
                    queue.set_write_through(on);
                }
                let _ = reply.send(());
            }
            Order::Hold(turn, reply) => {
                if let Some(queue) = &mut self.queue {
                    queue.hand_over(&turn);
                }
                self.held.push(turn);
                let _ = reply.send(());
            }
            Order::GoOn(turn, switched) => {
                self.held.retain(|held| !Arc::ptr_eq(held, &turn));
                if let Some(queue) = &mut self.queue
                    && !switched
                {
                    queue.take_back(&turn);
                }
                // Nobody waits for the view of a thread that has no requests of that time.
                self.context.leave();
            }
            Order::Exit => {
                // Sessions give their queues back first; one that panicked has not.
                if let Some(queue) = &mut self.queue {
                    queue.close(Left::Marked);
                }
                self.exit = true;
            }
        }
    }

    fn in_flight(&self) -> bool {
        self.queue.as_ref().is_some_and(|q| q.in_flight() > 0)
    }

    fn start(&mut self, setup: QueueSetup) {
        self.watch += 1;
        if let Kick::Event(kick) = &setup.kick {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&**kick);
            if let Err(error) = self.reactor.watch(fd, self.watch) {
                self.context
                    .facts
                    .log
                    .error(Topic::Session, format_args!("watching a kick: {error}"));
            }
        }
        setup.ring.claim();
        let mut queue = Queue::new(setup);
        queue.attach_call(&mut self.context);
        queue.check_memory(&mut self.context);
        self.queue = Some(queue);
    }

    /// Gives the queue back when nothing of it is in flight any more.
    fn finish_stop(&mut self) {
        if self.stopping.is_empty() {
            return;
        }
        let unfinished = self.queue.as_ref().map_or(0, Queue::in_flight);
        let stats = &self.context.stats;
        stats.unfinished.store(unfinished, Ordering::Relaxed);
        if unfinished > 0 {
            return;
        }
        if let Some(mut queue) = self.queue.take() {
            self.last_base = queue.ring.next_avail();
            // The next to serve the ring may count on kicks.
            let _ = queue.ring.enable_kicks();
            if matches!(queue.kick, Kick::Event(_))
                && let Err(error) = self.reactor.unwatch(self.watch)
            {
                self.context
                    .facts
                    .log
                    .error(Topic::Session, format_args!("a kick: {error}"));
            }
            let detached = self.context.bell.attach(None);
            self.context.check_signal(detached);
        }
        self.context.leave();
        for reply in self.stopping.drain(..) {
            let _ = reply.send(self.last_base);
        }
    }

    /// Notes that requests have been answered since the last time.
    fn note_ends(&mut self) {
        let stats = &self.context.stats;
        let answered = stats.requests();
        if std::mem::replace(&mut self.answered, answered) != answered {
            stats.last_end.note();
        }
    }

    /// Waits for something to do.
    fn rest(&mut self) {
        let mut timeout = None;
        self.held_back = false;
        // The driver is quick to send its next request. Storage takes its time, and one request
        // after the other would be waited for: there the looking costs more than it brings.
        let in_flight = self.in_flight();
        if let Some(queue) = self.queue.as_mut()
            && self.held.is_empty()
            && queue.takes_more()
        {
            let look = || queue.ring.has_available() || self.reactor.has_completions();
            if !in_flight && let Some(polled) = self.poller.poll(look) {
                let stats = &self.context.stats;
                // A poll is shorter than the centuries that the number holds.
                stats.poll_ns.add(polled.time.as_nanos() as u64);
                if polled.found {
                    stats.polls_found.add(1);
                    return;
                }
                stats.polls_missed.add(1);
            }
            if matches!(queue.kick, Kick::Polling) {
                timeout = Some(POLL_INTERVAL);
            } else if queue.ring.enable_kicks() {
                queue.ring.disable_kicks();
                return;
            }
        }
        if !in_flight || self.context.is_unused() {
            self.context.leave();
        }
        self.note_ends();
        let stats = &self.context.stats;
        stats.sleeps.add(1);
        stats.enters.add(self.reactor.enters() - stats.enters.get());
        let start = (self.poller.is_on() && !in_flight).then(Instant::now);
        self.reactor.wait(timeout);
        self.fairness.slept();
        if let Some(start) = start {
            self.poller.slept(start.elapsed());
        }
        if let Some(queue) = &mut self.queue {
            queue.ring.disable_kicks();
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a busy thread that never yields, one that yields at every turn, and one
    //! that counts the time it slept.

    use super::*;

    fn fairness() -> Fairness {
        Fairness {
            on: true,
            since: None,
        }
    }

    #[test]
    fn a_busy_thread_yields_once_in_each_stretch() {
        let (mut fairness, start) = (fairness(), Instant::now());
        let turn = Duration::from_micros(10);
        let yielded: Vec<u32> = (0..32)
            .filter(|n| fairness.is_due(start + turn * *n))
            .collect();
        // The turn after a yield begins a stretch of its own.
        assert_eq!(yielded, [10, 21]);
        assert!(BUSY < SLICE, "or the next slice would be lost with it");
    }

    #[test]
    fn a_sleep_begins_a_new_stretch() {
        let (mut fairness, start) = (fairness(), Instant::now());
        assert!(!fairness.is_due(start));
        assert!(!fairness.is_due(start + BUSY / 2));
        fairness.slept();
        assert!(!fairness.is_due(start + BUSY * 50));
        assert!(!fairness.is_due(start + BUSY * 50 + BUSY / 2));
        assert!(fairness.is_due(start + BUSY * 51));
    }
}
