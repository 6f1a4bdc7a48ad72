//! The thread a job runs on, seen from the job: something that runs a future to its end and lets it
//! sleep.
//!
//! The daemon runs jobs on its reactor, whose I/O they need. [`ParkRunner`] has no I/O: it serves
//! jobs that need none, and tests.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use futures_util::future::LocalBoxFuture;

/// A steady clock.
pub trait Clock: Send + Sync {
    /// The time since some fixed moment.
    fn now(&self) -> Duration;
}

/// The clock of the operating system.
#[derive(Debug)]
pub struct SystemClock(Instant);

impl SystemClock {
    /// A clock that starts now.
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// How a job sleeps.
pub trait Timer {
    /// Done after `duration`.
    fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()>;
}

/// A job as its runner sees it: given a way to sleep, a future to run to its end.
pub type JobMain = Box<dyn FnOnce(Rc<dyn Timer>) -> LocalBoxFuture<'static, ()> + Send>;

/// Runs jobs, each on a thread that the [`super::Manager`] has made for it.
pub trait JobRunner: Send + Sync {
    /// Runs `main` to its end on the current thread. An error means that it was not run at all.
    fn run(&self, main: JobMain) -> io::Result<()>;
}

/// Runs a job with nothing but the thread it is on.
#[derive(Debug, Default)]
pub struct ParkRunner;

impl JobRunner for ParkRunner {
    fn run(&self, main: JobMain) -> io::Result<()> {
        let timer = Rc::new(ParkTimer::default());
        let future = main(timer.clone());
        run_parking(future, &timer);
        Ok(())
    }
}

/// The sleepers of a [`ParkRunner`].
#[derive(Default)]
struct ParkTimer {
    /// When which sleeper wants to be woken.
    sleepers: Rc<RefCell<Vec<(Instant, Waker)>>>,
}

impl ParkTimer {
    /// Wakes all whose time has come; says how long the next has to wait.
    fn wake(&self) -> Option<Duration> {
        let now = Instant::now();
        let mut sleepers = self.sleepers.borrow_mut();
        sleepers.retain(|(deadline, waker)| {
            let due = *deadline <= now;
            if due {
                waker.wake_by_ref();
            }
            !due
        });
        sleepers
            .iter()
            .map(|(deadline, _)| deadline.saturating_duration_since(now))
            .min()
    }
}

impl Timer for ParkTimer {
    fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()> {
        let deadline = Instant::now() + duration.min(Duration::from_secs(3600));
        Box::pin(Sleep {
            deadline,
            sleepers: self.sleepers.clone(),
        })
    }
}

struct Sleep {
    deadline: Instant,
    sleepers: Rc<RefCell<Vec<(Instant, Waker)>>>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.deadline {
            return Poll::Ready(());
        }
        self.sleepers
            .borrow_mut()
            .push((self.deadline, context.waker().clone()));
        Poll::Pending
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn run_parking(future: impl Future<Output = ()>, timer: &ParkTimer) {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    while future.as_mut().poll(&mut context).is_pending() {
        match timer.wake() {
            Some(wait) => thread::park_timeout(wait),
            None => thread::park(),
        }
    }
}
