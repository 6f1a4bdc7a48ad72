//! Storage that answers late: a wrapper around one that answers at once.

use std::sync::Arc;
use std::time::Duration;

use stratablk::reactor::{Reactor, Token};
use stratablk::storage::{Answer, Limits, Op, Storage, Submission};

/// Answers each operation after the same time, any number of them together.
#[derive(Debug)]
pub struct Delay {
    inner: Arc<dyn Storage>,
    latency: Duration,
}

impl Delay {
    /// `inner`, which answers at once (a file on tmpfs), with a latency.
    pub fn new(inner: Arc<dyn Storage>, latency: Duration) -> Self {
        Self { inner, latency }
    }
}

impl Storage for Delay {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        // SAFETY: passed on to the caller.
        let result = match unsafe { self.inner.submit(reactor, op, token) } {
            Submission::Ready(result) if !self.latency.is_zero() => result,
            other => return other,
        };
        let (late, latency) = (reactor.clone(), self.latency);
        reactor.spawn(async move {
            late.sleep(latency).await;
            late.complete(token, result);
        });
        Submission::Pending
    }

    fn len(&self) -> Answer<'_, std::io::Result<u64>> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Answer<'_, std::io::Result<()>> {
        self.inner.set_len(len)
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn writable(&self) -> bool {
        self.inner.writable()
    }
}
