//! The tasks of one thread. A task lives where it was spawned; its waker may be used anywhere.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use slab::Slab;

use super::Token;
use super::remote::Remote;

type BoxedTask = Pin<Box<dyn Future<Output = ()>>>;

/// The identifier under which `block_on`'s own future is queued: it is no spawned task.
const ROOT: usize = usize::MAX;
/// Tasks that are polled in one go.
const BATCH: usize = 4;

struct TaskWaker {
    task: usize,
    /// Set while the task is in the ready queue, so that it is there once.
    queued: AtomicBool,
    remote: Arc<Remote>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.remote.push(self.task);
        }
    }
}

struct Task {
    /// Taken out while the task is polled, so that it may spawn others.
    future: Option<BoxedTask>,
    waker: Arc<TaskWaker>,
}

/// Tells whether the future that `block_on` drives has been woken.
pub(super) struct RootFlag(Arc<TaskWaker>);

impl RootFlag {
    pub(super) fn take(&self) -> bool {
        self.0.queued.swap(false, Ordering::AcqRel)
    }

    pub(super) fn is_set(&self) -> bool {
        self.0.queued.load(Ordering::Acquire)
    }
}

pub(super) struct Executor {
    tasks: RefCell<Slab<Task>>,
    ready: RefCell<VecDeque<usize>>,
    /// Kept for its memory.
    arrived: RefCell<Vec<usize>>,
    /// Kept for its memory.
    completed: RefCell<Vec<(Token, io::Result<u32>)>>,
    running: Cell<bool>,
    remote: Arc<Remote>,
}

impl Executor {
    pub(super) fn new(remote: Arc<Remote>) -> Self {
        Self {
            tasks: RefCell::new(Slab::new()),
            ready: RefCell::new(VecDeque::new()),
            arrived: RefCell::new(Vec::new()),
            completed: RefCell::new(Vec::new()),
            running: Cell::new(false),
            remote,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.tasks.borrow().len()
    }

    pub(super) fn spawn(&self, future: BoxedTask) {
        let waker = {
            let mut tasks = self.tasks.borrow_mut();
            let entry = tasks.vacant_entry();
            let waker = self.waker(entry.key());
            entry.insert(Task {
                future: Some(future),
                waker: waker.clone(),
            });
            waker
        };
        waker.wake_by_ref();
    }

    pub(super) fn root_waker(&self) -> (Waker, RootFlag) {
        let waker = self.waker(ROOT);
        waker.queued.store(true, Ordering::Release);
        (Waker::from(waker.clone()), RootFlag(waker))
    }

    fn waker(&self, task: usize) -> Arc<TaskWaker> {
        Arc::new(TaskWaker {
            task,
            queued: AtomicBool::new(false),
            remote: self.remote.clone(),
        })
    }

    /// Gives `complete` what other threads have completed, and polls a few of the tasks that are
    /// ready. The others, and those that become ready
    /// meanwhile, wait for the next call: neither the ring nor the requests that the first have
    /// completed wait for the last.
    pub(super) fn run_ready(&self, complete: impl Fn(Token, io::Result<u32>)) -> bool {
        if !self.remote.has_work() && self.ready.borrow().is_empty() {
            return false;
        }
        let completed = self.take_arrived(complete);
        if self.running.replace(true) {
            return completed;
        }
        let mut batch = [ROOT; BATCH];
        let mut count = 0;
        {
            let mut ready = self.ready.borrow_mut();
            for slot in &mut batch {
                let Some(task) = ready.pop_front() else { break };
                *slot = task;
                count += 1;
            }
            // What is left must be found before the thread sleeps.
            if !ready.is_empty() {
                self.remote.wake();
            }
        }
        for &task in batch.iter().take(count) {
            self.poll_task(task);
        }
        self.running.set(false);
        true
    }

    /// Takes what other threads have left here; true if operations were completed.
    fn take_arrived(&self, complete: impl Fn(Token, io::Result<u32>)) -> bool {
        let mut arrived = self.arrived.borrow_mut();
        let mut completed = self.completed.borrow_mut();
        self.remote.take(&mut arrived, &mut completed);
        let tasks = arrived.drain(..).filter(|&task| task != ROOT);
        self.ready.borrow_mut().extend(tasks);
        let any = !completed.is_empty();
        for (token, result) in completed.drain(..) {
            complete(token, result);
        }
        any
    }

    fn poll_task(&self, key: usize) {
        let Some((mut future, waker)) = self.tasks.borrow_mut().get_mut(key).and_then(|task| {
            // Cleared before the poll: a wake during it queues the task again.
            task.waker.queued.store(false, Ordering::Release);
            Some((task.future.take()?, task.waker.clone()))
        }) else {
            // A stale wake of a task that has ended.
            return;
        };
        let waker = Waker::from(waker);
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(()) => {
                let ended = self.tasks.borrow_mut().try_remove(key);
                drop(ended);
            }
            Poll::Pending => {
                if let Some(task) = self.tasks.borrow_mut().get_mut(key) {
                    task.future = Some(future);
                }
            }
        }
    }
}
