//! Work that is not left half done when nobody waits for it any more.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::Reactor;

/// Carries `work` out. A caller may stop to wait for it: what has begun goes on by itself, on this
/// thread's reactor, with all that it holds (claims, eras, locks, buffers), to its end. For changes
/// of several steps, which would be lost or leave something behind half-way, and whose writes in
/// flight must not be overtaken.
pub fn carry_out<T: 'static>(work: impl Future<Output = T> + 'static) -> CarryOut<T> {
    CarryOut {
        work: Some(Box::pin(work)),
        begun: false,
    }
}

/// The future of [`carry_out`].
#[must_use = "work begins when it is waited for"]
pub struct CarryOut<T: 'static> {
    /// None when it has ended.
    work: Option<Pin<Box<dyn Future<Output = T>>>>,
    begun: bool,
}

impl<T> std::fmt::Debug for CarryOut<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CarryOut(begun: {})", self.begun)
    }
}

impl<T> Future for CarryOut<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let Some(work) = &mut self.work else {
            return Poll::Pending;
        };
        let polled = work.as_mut().poll(context);
        self.begun = true;
        if polled.is_ready() {
            self.work = None;
        }
        polled
    }
}

impl<T> Drop for CarryOut<T> {
    fn drop(&mut self) {
        let Some(work) = self.work.take_if(|_| self.begun) else {
            return;
        };
        // It is not left half done by the end of this thread either.
        let work = Self {
            work: Some(work),
            begun: true,
        };
        match Reactor::current() {
            Some(reactor) => reactor.spawn(async move { drop(work.await) }),
            // The thread has ended its I/O: nobody will know when the work's operations end.
            None => std::mem::forget(work),
        }
    }
}
