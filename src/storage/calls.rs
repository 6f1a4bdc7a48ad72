//! System calls that may block for as long as a file system or a server likes, on threads of their
//! own: `fstat`, `ftruncate`, `lseek`, `open`, `fcntl` and `close` have no other form.
//!
//! Each file has a queue of its calls ([`Calls`]). At most one call of a queue is carried out at a
//! time, so that a file that hangs occupies one thread, however many of its calls wait.
//! Invariant: a queue with calls has a thread. It is an idle one, or a new one: a call that never
//! returns keeps no other queue's calls waiting. Threads end when they have been idle for a while.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Condvar;

use crate::sync::{Event, Mutex};

/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(5);

type Call = Box<dyn FnOnce() + Send>;

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
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Queue({} calls)", self.0.lock().calls.len())
    }
}

/// Where the result of a call waits for the task that asked for it.
struct Answer<T> {
    result: Mutex<Option<T>>,
    arrived: Event,
}

impl Calls {
    /// Carries `call` out when those before it have returned. A call that nobody waits for any
    /// more is left out if it has not begun, and goes on to its end if it has.
    ///
    /// # Errors
    /// When there is no thread for it: it has not been made then.
    pub async fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let answer = Arc::new(Answer {
            result: Mutex::new(None),
            arrived: Event::new(),
        });
        let theirs = answer.clone();
        self.push(Box::new(move || {
            if Arc::strong_count(&theirs) == 1 {
                return;
            }
            let result = call();
            *theirs.result.lock() = Some(result);
            theirs.arrived.notify(usize::MAX);
        }))?;
        loop {
            let arrived = answer.arrived.listen();
            if let Some(result) = answer.result.lock().take() {
                return Ok(result);
            }
            arrived.await;
        }
    }

    /// Drops `value` when the calls before it have returned, on this thread only if there is no
    /// other.
    pub fn dispose(&self, value: impl Send + 'static) {
        if let Err(error) = self.push(Box::new(move || drop(value))) {
            log::warn!("closing a file on the thread that let go of it: {error}");
        }
    }

    fn push(&self, call: Call) -> io::Result<()> {
        let mut waiting = self.0.0.lock();
        waiting.calls.push_back(call);
        if std::mem::replace(&mut waiting.has_thread, true) {
            return Ok(());
        }
        drop(waiting);
        POOL.serve(self.0.clone()).inspect_err(|_| {
            let mut waiting = self.0.0.lock();
            waiting.has_thread = false;
            let calls = std::mem::take(&mut waiting.calls);
            drop(waiting);
            // Outside the lock: what a call holds may have calls of its own.
            drop(calls);
        })
    }
}

impl Queue {
    /// Carries out all calls.
    fn drain(&self) {
        loop {
            let mut waiting = self.0.lock();
            let Some(call) = waiting.calls.pop_front() else {
                waiting.has_thread = false;
                return;
            };
            drop(waiting);
            call();
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
    //! or out of order; a call that is made although nobody waits for it, and one whose result
    //! nobody gets.

    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::reactor::Reactor;

    const DEADLINE: Duration = Duration::from_secs(60);

    /// A call that has begun and hangs until the test lets it go.
    fn hang(calls: &Calls) -> std::sync::mpsc::Sender<()> {
        let (let_go, gate) = channel::<()>();
        let (begun, has_begun) = channel();
        let call = move || {
            begun.send(()).unwrap();
            let _ = gate.recv();
        };
        calls.push(Box::new(call)).unwrap();
        has_begun.recv_timeout(DEADLINE).unwrap();
        let_go
    }

    fn order(calls: &Calls, numbers: std::ops::Range<u32>) -> Receiver<u32> {
        let (made, order) = channel();
        for number in numbers {
            let made = made.clone();
            let call = move || made.send(number).unwrap();
            calls.push(Box::new(call)).unwrap();
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
}
