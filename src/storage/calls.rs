//! System calls that may block for as long as a file system or a server likes, on threads of their
//! own: `fstat`, `ftruncate`, `lseek`, `open`, `fcntl` and `close` have no other form.
//!
//! Each file has a queue of its calls ([`Calls`]). At most one call of a queue is carried out at a
//! time, so that a file that hangs occupies one thread, however many of its calls wait.
//! Calls that nobody waits for any more leave the queue when another one comes: behind a call that
//! hangs there are no more than are waited for.
//!
//! Invariants: a queue with calls has a thread. It is an idle one, or a new one: a call that never
//! returns keeps no other queue's calls waiting. Threads end when they have been idle for a while.
//! Every call that is waited for is answered: by an error if it panics, or is dropped unmade.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Condvar;

use super::silence::UnderWay;
use crate::sync::{Event, Mutex};

/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(5);

struct Call {
    make: Box<dyn FnOnce() + Send>,
    /// Where the answer goes, which the call holds, and its waiter as long as there is one. `None`:
    /// nobody need wait for it.
    answer: Option<Weak<dyn Any + Send + Sync>>,
}

impl Call {
    fn is_wanted(&self) -> bool {
        (self.answer.as_ref()).is_none_or(|answer| answer.strong_count() > 1)
    }
}

/// The calls of one file, in order.
#[derive(Clone, Debug, Default)]
pub struct Calls(Arc<Queue>);

#[derive(Default)]
struct Queue(parking_lot::Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    calls: VecDeque<Call>,
    /// A thread carries out the calls.
    has_thread: bool,
    /// The call that is carried out.
    under_way: Option<UnderWay>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Queue({} calls)", self.0.lock().calls.len())
    }
}

/// Where the result of a call waits for the task that asked for it.
struct Answer<T> {
    result: Mutex<Option<io::Result<T>>>,
    arrived: Event,
}

/// The call's side of an answer.
struct Promise<T>(Arc<Answer<T>>);

impl<T> Promise<T> {
    fn keep(&self, result: T) {
        *self.0.result.lock() = Some(Ok(result));
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        let lost = || {
            Err(io::Error::other(
                "a call for a file was not made to its end",
            ))
        };
        self.0.result.lock().get_or_insert_with(lost);
        self.0.arrived.notify(usize::MAX);
    }
}

impl Calls {
    /// Carries `call` out when those before it have returned. A call that nobody waits for any
    /// more is left out if it has not begun, and goes on to its end if it has.
    ///
    /// # Errors
    /// When there is no thread for it, or it panics.
    pub async fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let answer = Arc::new(Answer {
            result: Mutex::new(None),
            arrived: Event::new(),
        });
        let promise = Promise(answer.clone());
        let waiting = Arc::downgrade(&answer) as Weak<dyn Any + Send + Sync>;
        self.push(Call {
            make: Box::new(move || promise.keep(call())),
            answer: Some(waiting),
        })?;
        loop {
            let arrived = answer.arrived.listen();
            if let Some(result) = answer.result.lock().take() {
                return result;
            }
            arrived.await;
        }
    }

    /// Drops `value` when the calls before it have returned, on this thread only if there is no
    /// other.
    pub fn dispose(&self, value: impl Send + 'static) {
        let call = Call {
            make: Box::new(move || drop(value)),
            answer: None,
        };
        if let Err(error) = self.push(call) {
            log::warn!("closing a file on the thread that let go of it: {error}");
        }
    }

    /// Since when the call that is carried out is under way. `None`: none is.
    pub fn since(&self) -> Option<Instant> {
        self.0.0.lock().under_way.as_ref().map(UnderWay::since)
    }

    fn push(&self, call: Call) -> io::Result<()> {
        let mut waiting = self.0.0.lock();
        let queued = std::mem::take(&mut waiting.calls);
        let (calls, stale): (VecDeque<_>, VecDeque<_>) =
            queued.into_iter().partition(Call::is_wanted);
        waiting.calls = calls;
        waiting.calls.push_back(call);
        // Under the lock: nobody else's call comes to a queue that gets no thread.
        let (served, own) = match waiting.has_thread {
            true => (Ok(()), None),
            false => match POOL.serve(self.0.clone()) {
                Ok(()) => (Ok(()), None),
                Err(error) => (Err(error), waiting.calls.pop_back()),
            },
        };
        waiting.has_thread |= served.is_ok();
        drop(waiting);
        // Outside the lock: what a call holds may have calls of its own.
        drop((stale, own));
        served
    }
}

impl Queue {
    /// Carries out all calls.
    fn drain(&self) {
        loop {
            let mut waiting = self.0.lock();
            waiting.under_way = None;
            let Some(call) = waiting.calls.pop_front() else {
                waiting.has_thread = false;
                return;
            };
            waiting.under_way = Some(UnderWay::begin());
            drop(waiting);
            // The queue's other calls are made all the same. A panic has told of itself.
            if call.is_wanted() && catch_unwind(AssertUnwindSafe(call.make)).is_err() {
                log::error!("a call for a file panicked");
            }
        }
    }
}

/// The threads, for all files.
struct Pool {
    state: parking_lot::Mutex<State>,
    work: Condvar,
}

struct State {
    /// Queues that an idle thread is about to take; never more than there are of those.
    queues: VecDeque<Arc<Queue>>,
    idle: usize,
}

static POOL: Pool = Pool {
    state: parking_lot::Mutex::new(State {
        queues: VecDeque::new(),
        idle: 0,
    }),
    work: Condvar::new(),
};

impl Pool {
    fn serve(&'static self, queue: Arc<Queue>) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.idle > state.queues.len() {
            state.queues.push_back(queue);
            self.work.notify_one();
            return Ok(());
        }
        drop(state);
        std::thread::Builder::new()
            .name("file-calls".into())
            .spawn(move || self.run(queue))
            .map(drop)
    }

    /// A thread's main function.
    fn run(&self, mut queue: Arc<Queue>) {
        loop {
            queue.drain();
            // Before it is idle: the last holder of a file may be the queue.
            drop(queue);
            let mut state = self.state.lock();
            queue = loop {
                if let Some(next) = state.queues.pop_front() {
                    break next;
                }
                state.idle += 1;
                let waited = self.work.wait_for(&mut state, IDLE);
                state.idle -= 1;
                if waited.timed_out() && state.queues.is_empty() {
                    return;
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a call that waits for another file's; calls of one file side by side
    //! or out of order; a call that is made although nobody waits for it, or is kept for that, and
    //! one whose result nobody gets; a waiter that is told nothing, and a queue that loses its thread.

    use std::pin::pin;
    use std::sync::mpsc::{Receiver, channel};

    use futures_util::future::{Either, join, select};

    use super::*;
    use crate::reactor::Reactor;

    const DEADLINE: Duration = Duration::from_secs(60);

    fn push(calls: &Calls, call: impl FnOnce() + Send + 'static) {
        let call = Call {
            make: Box::new(call),
            answer: None,
        };
        calls.push(call).unwrap();
    }

    /// A call that has begun and hangs until the test lets it go.
    fn hang(calls: &Calls) -> std::sync::mpsc::Sender<()> {
        let (let_go, gate) = channel::<()>();
        let (begun, has_begun) = channel();
        let call = move || {
            begun.send(()).unwrap();
            let _ = gate.recv();
        };
        push(calls, call);
        has_begun.recv_timeout(DEADLINE).unwrap();
        let_go
    }

    fn order(calls: &Calls, numbers: std::ops::Range<u32>) -> Receiver<u32> {
        let (made, order) = channel();
        for number in numbers {
            let made = made.clone();
            let call = move || made.send(number).unwrap();
            push(calls, call);
        }
        order
    }

    #[test]
    fn a_call_that_hangs_keeps_its_own_file_alone_waiting() {
        let hung: Vec<_> = (0..8).map(|_| hang(&Calls::default())).collect();
        let order = order(&Calls::default(), 0..2);
        for number in 0..2 {
            assert_eq!(order.recv_timeout(DEADLINE), Ok(number));
        }
        drop(hung);
    }

    #[test]
    fn calls_of_one_file_follow_one_another() {
        let calls = Calls::default();
        let let_go = hang(&calls);
        let beside = order(&Calls::default(), 0..1);
        let order = order(&calls, 0..3);
        // Time in which another thread could take them.
        beside.recv_timeout(DEADLINE).unwrap();
        assert!(order.try_recv().is_err(), "beside the first");
        let_go.send(()).unwrap();
        for number in 0..3 {
            assert_eq!(order.recv_timeout(DEADLINE), Ok(number));
        }
    }

    #[test]
    fn a_call_that_was_cancelled_is_made_only_if_it_had_begun() {
        let reactor = Reactor::for_this_thread().unwrap();
        let calls = Calls::default();
        let (made, seen) = channel();
        let (begun, has_begun) = channel();
        let (let_go, gate) = channel::<()>();
        let tell = made.clone();
        let first = calls.run(move || {
            begun.send(()).unwrap();
            let _ = gate.recv();
            tell.send(1).unwrap();
        });
        let second = calls.run(move || made.send(2).unwrap());
        let mut both = Box::pin(futures_util::future::join(first, second));
        let waker = std::task::Waker::noop();
        let mut context = std::task::Context::from_waker(waker);
        assert!(both.as_mut().poll(&mut context).is_pending());
        has_begun.recv_timeout(DEADLINE).unwrap();
        drop(both);
        let_go.send(()).unwrap();
        assert_eq!(seen.recv_timeout(DEADLINE), Ok(1));
        reactor.block_on(calls.run(|| ())).unwrap();
        assert!(seen.try_recv().is_err());
        Reactor::leave_thread();
    }

    /// Begins `call`, and stops waiting for it.
    fn cancel(calls: &Calls, call: impl FnOnce() + Send + 'static) {
        let mut answer = Box::pin(calls.run(call));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(answer.as_mut().poll(&mut context).is_pending());
    }

    #[test]
    fn calls_that_were_cancelled_do_not_pile_up() {
        let calls = Calls::default();
        assert_eq!(calls.since(), None);
        let before = Instant::now();
        let let_go = hang(&calls);
        assert!(calls.since().unwrap() >= before);
        for _ in 0..100 {
            cancel(&calls, || ());
        }
        assert!(calls.0.0.lock().calls.len() <= 1);
        drop(let_go);
    }

    fn in_time<T>(reactor: &Reactor, answer: impl Future<Output = T>) -> T {
        match reactor.block_on(select(pin!(answer), reactor.sleep(DEADLINE))) {
            Either::Left((answer, _)) => answer,
            Either::Right(_) => panic!("it is not answered"),
        }
    }

    #[test]
    fn a_call_that_is_lost_answers_and_takes_no_other_along() {
        let reactor = Reactor::for_this_thread().unwrap();
        let calls = Calls::default();
        let panicked = calls.run(|| panic!("as the test wants it"));
        assert!(in_time(&reactor, panicked).is_err());
        assert_eq!(in_time(&reactor, calls.run(|| 7)).unwrap(), 7);
        let let_go = hang(&calls);
        let forget = async { calls.0.0.lock().calls.clear() };
        let (lost, ()) = in_time(&reactor, join(calls.run(|| ()), forget));
        assert!(lost.is_err());
        drop(let_go);
        Reactor::leave_thread();
    }
}
