//! The primitives of `src/sync.rs`, as the model checker has them: each operation is a point
//! where another thread may go on.

use std::collections::HashMap;
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

pub use shuttle::hint::spin_loop;

/// Atomic types.
pub mod atomic {
    pub use shuttle::sync::atomic::*;

    /// Nothing to do: the checker keeps one order for all threads.
    pub fn fence(_order: Ordering) {}
}

/// A lock without poisoning.
#[derive(Debug, Default)]
pub struct Mutex<T>(shuttle::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub fn new(value: T) -> Self {
        Self(shuttle::sync::Mutex::new(value))
    }

    pub fn lock(&self) -> shuttle::sync::MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pointer that is replaced as a whole.
#[derive(Debug)]
pub struct ArcSwapAny<P>(Mutex<P>);

pub type ArcSwap<T> = ArcSwapAny<Arc<T>>;
pub type ArcSwapOption<T> = ArcSwapAny<Option<Arc<T>>>;

/// What a pointer was when it was loaded.
#[derive(Debug)]
pub struct Guard<P>(P);

impl<P> Deref for Guard<P> {
    type Target = P;

    fn deref(&self) -> &P {
        &self.0
    }
}

impl<P> Guard<P> {
    pub fn into_inner(guard: Self) -> P {
        guard.0
    }
}

impl<P: Clone> ArcSwapAny<P> {
    pub fn new(pointer: P) -> Self {
        Self(Mutex::new(pointer))
    }

    pub fn load(&self) -> Guard<P> {
        Guard(self.load_full())
    }

    pub fn load_full(&self) -> P {
        self.0.lock().clone()
    }

    pub fn store(&self, pointer: P) {
        // Outside the lock: dropping it may do anything.
        drop(self.swap(pointer));
    }

    pub fn swap(&self, pointer: P) -> P {
        std::mem::replace(&mut *self.0.lock(), pointer)
    }
}

impl<T> ArcSwapAny<Arc<T>> {
    pub fn from_pointee(value: T) -> Self {
        Self::new(Arc::new(value))
    }
}

impl<T> ArcSwapAny<Option<Arc<T>>> {
    pub fn empty() -> Self {
        Self::new(None)
    }
}

#[derive(Debug, Default)]
struct Waiter {
    notified: bool,
    waker: Option<Waker>,
}

type Waiters = Arc<std::sync::Mutex<HashMap<usize, Waiter>>>;

fn lock(waiters: &Waiters) -> std::sync::MutexGuard<'_, HashMap<usize, Waiter>> {
    waiters.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes those who listen. Nobody else goes on in the middle of its operations; before and behind
/// them are the points of the locks that its users hold.
#[derive(Debug, Default)]
pub struct Event {
    waiters: Waiters,
}

/// Somebody who listens; the future ends when he has been notified.
#[derive(Debug)]
pub struct EventListener {
    waiters: Waiters,
    number: usize,
}

impl Event {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn listen(&self) -> EventListener {
        // Numbers are unique in the process, so that they come in order.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        lock(&self.waiters).insert(number, Waiter::default());
        EventListener {
            waiters: self.waiters.clone(),
            number,
        }
    }

    /// Sees to it that at least `count` listeners are notified, the oldest first.
    pub fn notify(&self, count: usize) {
        let mut wakers = Vec::new();
        {
            let mut waiters = lock(&self.waiters);
            let mut numbers: Vec<usize> = waiters.keys().copied().collect();
            numbers.sort_unstable();
            for number in numbers.into_iter().take(count) {
                if let Some(waiter) = waiters.get_mut(&number) {
                    waiter.notified = true;
                    wakers.extend(waiter.waker.take());
                }
            }
        }
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Future for EventListener {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut waiters = lock(&self.waiters);
        match waiters.get_mut(&self.number) {
            Some(waiter) if !waiter.notified => {
                waiter.waker = Some(context.waker().clone());
                Poll::Pending
            }
            _ => {
                waiters.remove(&self.number);
                Poll::Ready(())
            }
        }
    }
}

impl Drop for EventListener {
    fn drop(&mut self) {
        lock(&self.waiters).remove(&self.number);
    }
}

/// A lock that is waited for as a future.
#[derive(Debug, Default)]
pub struct AsyncMutex<T> {
    locked: Mutex<bool>,
    unlocked: Event,
    _value: T,
}

/// Holds an [`AsyncMutex`].
#[derive(Debug)]
pub struct AsyncMutexGuard<'a, T>(&'a AsyncMutex<T>);

impl<T> AsyncMutex<T> {
    fn try_lock(&self) -> bool {
        !std::mem::replace(&mut *self.locked.lock(), true)
    }

    pub async fn lock(&self) -> AsyncMutexGuard<'_, T> {
        while !self.try_lock() {
            let listener = self.unlocked.listen();
            if self.try_lock() {
                break;
            }
            listener.await;
        }
        AsyncMutexGuard(self)
    }
}

impl<T> Drop for AsyncMutexGuard<'_, T> {
    fn drop(&mut self) {
        *self.0.locked.lock() = false;
        self.0.unlocked.notify(usize::MAX);
    }
}
