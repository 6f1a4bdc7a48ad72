//! The per-thread reactor: one io_uring, a local executor for tasks, and timers.
//!
//! Every thread that touches images owns exactly one [`Reactor`]: a queue worker of an export, a
//! job's thread, or a control thread for as long as it opens or closes an image. The reactor is
//! the bottom floor: storage submits its operations here, tasks wait here, and other threads
//! reach it through its [`Remote`] half alone.
//!
//! There are two ways to wait for an operation:
//!
//! * **tasks** (`async` code: metadata misses, allocation, copy-on-write, jobs) reserve an
//!   operation slot with [`Reactor::reserve`] and `.await` it;
//! * the **data path** names its own request in a client [`Token`]; its completions are handed
//!   back by [`Reactor::next_completion`] with no task, no waker and no allocation.
//!
//! Both may be completed by another thread ([`Remote::complete`]), for storage that is no file.
//!
//! Nobody has to wait. An operation whose future is dropped goes on, and what it uses lives until
//! it has ended ([`OpGuard`]); so does work of several steps that must not be left half done
//! ([`carry_out`]). A thread that leaves its reactor gives such work the time to end
//! ([`Reactor::leave_thread`], [`Reactor::end_thread`]): it keeps files open, images locked and
//! clusters claimed. What has not ended by then stays in memory for good.
//!
//! Everything a thread waits for is in the ring, file descriptors included (multishot polls, see
//! [`Reactor::watch`]): a busy worker then submits its batch, waits, and learns of new kicks with
//! one system call, where a separate `epoll_wait` and the read of each eventfd would cost three.

mod carry;
mod executor;
pub mod kept;
mod op;
mod remote;
mod ring;
pub mod uring;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use io_uring::{opcode, squeue, types};

pub use carry::{CarryOut, carry_out};
pub use op::{OpGuard, Token};
pub use remote::Remote;

use executor::Executor;
use op::OpSlots;
use ring::Ring;

/// Completions moved out of the ring at a time.
const REAP_BATCH: usize = 64;

/// How long a thread that goes on with something else gives to work that nobody waits for.
const LEAVING: Duration = Duration::from_secs(1);

/// Reactors that have not ended, or have left operations behind.
static UNENDED: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static CURRENT: RefCell<Option<Reactor>> = const { RefCell::new(None) };
}

/// A completion for the data path: the client token's value and the operation's result.
#[derive(Debug)]
pub struct Completion {
    /// The value given to [`Token::client`].
    pub value: u64,
    /// Bytes transferred, or the error. For a watched descriptor: its poll events.
    pub result: io::Result<u32>,
}

struct Inner {
    ring: RefCell<Ring>,
    ops: RefCell<OpSlots>,
    executor: Executor,
    remote: std::sync::Arc<Remote>,
    timers: RefCell<BTreeMap<(Instant, u64), Waker>>,
    next_timer: Cell<u64>,
    completions: RefCell<VecDeque<Completion>>,
    /// Operations given to the ring whose completion has not been seen (watches excluded).
    in_flight: Cell<u32>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let ops = self.ops.get_mut();
        if self.in_flight.get() == 0 && ops.abandoned() == 0 {
            UNENDED.fetch_sub(1, Ordering::SeqCst);
        }
        ops.leak();
    }
}

/// The reactor of the current thread. Clones name the same reactor.
#[derive(Clone)]
pub struct Reactor {
    inner: Rc<Inner>,
}

impl std::fmt::Debug for Reactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reactor")
            .field("in_flight", &self.inner.in_flight.get())
            .finish()
    }
}

impl Reactor {
    /// Creates the reactor of this thread, or returns the one it has.
    ///
    /// # Errors
    /// Whatever `io_uring_setup(2)` or `eventfd(2)` reports, with a hint in the text.
    pub fn for_this_thread() -> io::Result<Self> {
        if let Some(reactor) = Self::current() {
            return Ok(reactor);
        }
        let ring = Ring::new()?;
        let remote = std::sync::Arc::new(Remote::new()?);
        let reactor = Self {
            inner: Rc::new(Inner {
                ring: RefCell::new(ring),
                ops: RefCell::new(OpSlots::default()),
                executor: Executor::new(remote.clone()),
                remote,
                timers: RefCell::new(BTreeMap::new()),
                next_timer: Cell::new(0),
                completions: RefCell::new(VecDeque::with_capacity(256)),
                in_flight: Cell::new(0),
            }),
        };
        UNENDED.fetch_add(1, Ordering::SeqCst);
        reactor.arm_watch(reactor.inner.remote.fd(), Token::WAKE)?;
        CURRENT
            .try_with(|current| current.replace(Some(reactor.clone())))
            .map_err(io::Error::other)?;
        Ok(reactor)
    }

    /// The reactor of the current thread, if it has one: a thread that ends has none any more.
    #[must_use]
    pub fn current() -> Option<Self> {
        CURRENT.try_with(|current| current.borrow().clone()).ok()?
    }

    /// Takes the reactor off the thread again: for threads that needed one for a moment only. Work
    /// that goes on though nobody waits for it has a second to end. Its resources go with the last
    /// clone.
    pub fn leave_thread() {
        Self::leave_within(Some(LEAVING));
    }

    /// As [`leave_thread`](Self::leave_thread), for a thread that has nothing else to do: work that
    /// goes on has all the time that it takes.
    pub fn end_thread() {
        Self::leave_within(None);
    }

    fn leave_within(patience: Option<Duration>) {
        let Some(reactor) = Self::current() else {
            return;
        };
        let began = Instant::now();
        loop {
            let (tasks, abandoned) = (reactor.tasks(), reactor.with_ops(|ops| ops.abandoned()));
            if tasks == 0 && abandoned == 0 {
                break;
            }
            let left = patience.map(|patience| patience.saturating_sub(began.elapsed()));
            if left == Some(Duration::ZERO) {
                log::warn!(
                    "a thread ends its I/O with {tasks} tasks and {abandoned} operations under \
                     way: what they use stays in use"
                );
                break;
            }
            if !reactor.turn() {
                reactor.wait(left);
            }
            // Nobody takes them any more, and the thread would not sleep.
            while reactor.next_completion().is_some() {}
        }
        CURRENT.set(None);
    }

    /// The half of the reactor that other threads may use, to wake it.
    #[must_use]
    pub fn remote(&self) -> std::sync::Arc<Remote> {
        self.inner.remote.clone()
    }

    /// Runs `future` beside the others of this thread, from the next [`Reactor::turn`] on.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        self.inner.executor.spawn(Box::pin(future));
    }

    /// How many spawned tasks have not ended.
    #[must_use]
    pub fn tasks(&self) -> usize {
        self.inner.executor.len()
    }

    /// Operations in flight.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.inner.in_flight.get()
    }

    /// Whether this is the only reactor of the process, and nothing is in flight that it or one
    /// before it has begun.
    #[must_use]
    pub fn is_last_and_idle(&self) -> bool {
        self.in_flight() == 0 && UNENDED.load(Ordering::SeqCst) == 1
    }

    /// Runs `future` to its end on this thread, serving the thread's other tasks meanwhile.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let mut future = std::pin::pin!(future);
        let (waker, woken) = self.inner.executor.root_waker();
        let mut context = Context::from_waker(&waker);
        loop {
            if woken.take()
                && let Poll::Ready(output) = future.as_mut().poll(&mut context)
            {
                return output;
            }
            if !self.turn() && !woken.is_set() {
                self.wait(None);
            }
        }
    }

    /// Does what can be done without waiting: submits what is queued, collects completions,
    /// fires timers, runs tasks that are ready. True if anything happened.
    pub fn turn(&self) -> bool {
        let busy = self.collect();
        // After the tasks: what they queued goes out in the same call.
        self.submit();
        busy
    }

    /// As [`Reactor::turn`], but submits nothing: for callers who are about to
    /// [`Reactor::wait`], which submits and waits in one system call.
    pub fn collect(&self) -> bool {
        let mut busy = self.reap();
        busy |= self.fire_timers();
        busy |= self
            .inner
            .executor
            .run_ready(|token, result| self.complete(token, result));
        busy
    }

    /// Operations queued and not yet submitted.
    #[must_use]
    pub fn queued(&self) -> u32 {
        self.inner.ring.borrow().queued()
    }

    /// Submits and waits until a completion, a watched descriptor, a timer, a wake from
    /// another thread or `timeout`. Returns at once if tasks or client completions are pending.
    pub fn wait(&self, timeout: Option<Duration>) {
        if !self.inner.completions.borrow().is_empty() || !self.inner.remote.prepare_sleep() {
            self.inner.remote.end_sleep();
            self.submit();
            return;
        }
        let timeout = match (timeout, self.time_to_next_timer()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        if let Err(error) = self.inner.ring.borrow_mut().wait(timeout) {
            log::error!("io_uring: waiting for completions: {error}");
        }
        self.inner.remote.end_sleep();
    }

    /// Submits the queued operations: one system call, none if nothing is queued.
    pub fn submit(&self) {
        if let Err(error) = self.inner.ring.borrow_mut().submit() {
            log::error!("io_uring: submitting operations: {error}");
        }
    }

    /// True when completions wait in the ring or for the client: a poll that costs no system
    /// call, for adaptive polling.
    #[must_use]
    pub fn has_completions(&self) -> bool {
        !self.inner.completions.borrow().is_empty()
            || self.inner.ring.borrow_mut().has_completions()
            || self.inner.remote.has_work()
    }

    /// The next completion of a client token.
    #[must_use]
    pub fn next_completion(&self) -> Option<Completion> {
        self.inner.completions.borrow_mut().pop_front()
    }

    /// Watches `fd` for input. Each time it becomes readable a [`Completion`] with `value` is
    /// delivered (edge-triggered: an eventfd need not be read). It stays until
    /// [`Reactor::unwatch`].
    ///
    /// # Errors
    /// When the ring cannot take the poll.
    pub fn watch(&self, fd: RawFd, value: u64) -> io::Result<()> {
        self.arm_watch(fd, Token::watch(value))
    }

    /// Ends a watch; its completions that are already queued are still delivered. The
    /// descriptor may be closed afterwards.
    ///
    /// # Errors
    /// When the ring cannot take the operation.
    pub fn unwatch(&self, value: u64) -> io::Result<()> {
        let entry = opcode::PollRemove::new(Token::watch(value).raw())
            .build()
            .user_data(Token::IGNORE.raw());
        // Now, not when the removal is confirmed: the poll may end by itself before that, and
        // must not be armed again on a number that names another file by then.
        self.inner
            .ops
            .borrow_mut()
            .forget_watch(Token::watch(value));
        // SAFETY: a poll removal names no memory.
        unsafe { self.inner.ring.borrow_mut().push(&entry) }?;
        self.submit();
        Ok(())
    }

    fn arm_watch(&self, fd: RawFd, token: Token) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(token.raw());
        self.inner.ops.borrow_mut().remember_watch(token, fd);
        // SAFETY: a poll names no memory; the descriptor is checked by the kernel.
        unsafe { self.inner.ring.borrow_mut().push(&entry) }
    }

    /// Reserves a slot for one operation that a task will wait for, and that uses what `kept` owns.
    pub fn reserve<K: 'static>(&self, kept: K) -> OpGuard<K> {
        let token = self.inner.ops.borrow_mut().reserve();
        OpGuard::new(self.clone(), token, kept)
    }

    /// Queues `entry` for `token`.
    ///
    /// # Errors
    /// When the ring is broken; the operation was then not started.
    ///
    /// # Safety
    /// Every pointer in `entry` stays valid, and the memory of a read is not otherwise
    /// accessed, until the token's completion has been delivered.
    pub unsafe fn start(&self, entry: squeue::Entry, token: Token) -> io::Result<()> {
        // SAFETY: passed on to the caller.
        unsafe {
            self.inner
                .ring
                .borrow_mut()
                .push(&entry.user_data(token.raw()))
        }?;
        self.inner.in_flight.set(self.inner.in_flight.get() + 1);
        Ok(())
    }

    /// Waits for `duration`; wakes no earlier.
    #[must_use]
    pub fn sleep(&self, duration: Duration) -> Sleep {
        Sleep {
            reactor: self.clone(),
            deadline: Instant::now() + duration,
            key: None,
        }
    }

    fn reap(&self) -> bool {
        let mut batch = [(0u64, 0i32, 0u32); REAP_BATCH];
        let mut any = false;
        loop {
            let count = self.inner.ring.borrow_mut().reap(&mut batch);
            for &(user_data, result, flags) in batch.iter().take(count) {
                self.deliver(Token::from_raw(user_data), result, flags);
            }
            any |= count > 0;
            if count < REAP_BATCH {
                return any;
            }
        }
    }

    fn deliver(&self, token: Token, result: i32, flags: u32) {
        if token == Token::IGNORE {
            return;
        }
        if token.is_watch() {
            if !io_uring::cqueue::more(flags) {
                self.rearm(token, result);
            }
            if token != Token::WAKE && result >= 0 {
                let value = token.value();
                let result = Ok(result as u32);
                self.inner
                    .completions
                    .borrow_mut()
                    .push_back(Completion { value, result });
            }
            return;
        }
        self.inner
            .in_flight
            .set(self.inner.in_flight.get().saturating_sub(1));
        let result = if result < 0 {
            Err(io::Error::from_raw_os_error(-result))
        } else {
            Ok(result as u32)
        };
        self.complete(token, result);
    }

    /// How often this thread's ring has entered the kernel: system calls for I/O and for waiting.
    #[must_use]
    pub fn enters(&self) -> u64 {
        self.inner.ring.borrow().enters()
    }

    /// Delivers the result of an operation that this thread's storage has carried out without
    /// the ring, after it had answered [`Pending`](crate::storage::Submission::Pending). What
    /// waits for `token` goes on with the next [`Reactor::turn`].
    pub fn complete(&self, token: Token, result: io::Result<u32>) {
        if token.is_client() {
            let value = token.value();
            self.inner
                .completions
                .borrow_mut()
                .push_back(Completion { value, result });
            return;
        }
        let ended = self.inner.ops.borrow_mut().complete(token, result);
        ended.finish();
    }

    /// A multishot poll ends when the completion queue overflowed, and when it was removed. One
    /// that failed would fail again at once, for ever: such a descriptor cannot be watched.
    fn rearm(&self, token: Token, result: i32) {
        let Some(fd) = self.inner.ops.borrow().watched(token) else {
            return;
        };
        let armed = if result < 0 {
            Err(io::Error::from_raw_os_error(-result))
        } else {
            self.arm_watch(fd, token)
        };
        if let Err(error) = armed {
            log::error!("io_uring: watching descriptor {fd}: {error}");
            self.inner.ops.borrow_mut().forget_watch(token);
        }
    }

    fn fire_timers(&self) -> bool {
        if self.inner.timers.borrow().is_empty() {
            return false;
        }
        let now = Instant::now();
        let mut any = false;
        loop {
            let due = {
                let mut timers = self.inner.timers.borrow_mut();
                match timers.first_key_value() {
                    Some((&(when, _), _)) if when <= now => timers.pop_first(),
                    _ => None,
                }
            };
            match due {
                Some((_, waker)) => waker.wake(),
                None => return any,
            }
            any = true;
        }
    }

    fn time_to_next_timer(&self) -> Option<Duration> {
        let timers = self.inner.timers.borrow();
        let (&(when, _), _) = timers.first_key_value()?;
        Some(when.saturating_duration_since(Instant::now()))
    }

    pub(crate) fn with_ops<T>(&self, f: impl FnOnce(&mut OpSlots) -> T) -> T {
        f(&mut self.inner.ops.borrow_mut())
    }
}

/// A future that ends at a point in time; see [`Reactor::sleep`].
pub struct Sleep {
    reactor: Reactor,
    deadline: Instant,
    key: Option<(Instant, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.deadline {
            return Poll::Ready(());
        }
        let key = self.key.unwrap_or_else(|| {
            let id = self.reactor.inner.next_timer.get();
            self.reactor.inner.next_timer.set(id + 1);
            (self.deadline, id)
        });
        self.key = Some(key);
        self.reactor
            .inner
            .timers
            .borrow_mut()
            .insert(key, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.reactor.inner.timers.borrow_mut().remove(&key);
        }
    }
}

/// Lets the other tasks of the thread run once.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(move |context| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl AsRawFd for Reactor {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.ring.borrow().fd()
    }
}

#[cfg(test)]
mod tests;
