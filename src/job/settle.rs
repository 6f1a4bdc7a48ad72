//! What a job has copied becomes stable while the job runs: within five seconds, before it pauses,
//! and when it has copied its last, whether or not a guest flushes. What a process that is killed had
//! copied is not copied again then.
//!
//! It happens on the job's thread, beside the copies.

use std::cell::Cell;
use std::time::Duration;

use async_lock::{Mutex, MutexGuard};
use event_listener::Event as Signal;

use super::JobError;
use super::context::{ErrorAction, JobContext};
use super::source::{CopySource, JobIoError};

/// How long copies wait, at most. The rest of the five seconds is for making them stable.
pub const PERIOD: Duration = Duration::from_secs(4);

/// Makes the copies of a stream stable.
pub(super) struct Settle<'a> {
    source: &'a dyn CopySource,
    context: &'a JobContext,
    /// There are copies that are not known to be stable.
    unstable: Cell<bool>,
    changed: Signal,
    /// Held while they are made stable.
    settling: Mutex<()>,
}

impl<'a> Settle<'a> {
    pub fn new(source: &'a dyn CopySource, context: &'a JobContext) -> Self {
        Self {
            source,
            context,
            unstable: Cell::new(false),
            changed: Signal::new(),
            settling: Mutex::new(()),
        }
    }

    /// Makes copies stable from time to time, and is never done: it is dropped at the job's end.
    pub async fn run(&self) -> std::convert::Infallible {
        loop {
            let changed = self.changed.listen();
            if self.unstable.get() {
                self.context.sleep(PERIOD).await;
                self.try_now().await;
            } else {
                changed.await;
            }
        }
    }

    /// Something was copied.
    pub fn copied(&self) {
        if !self.unstable.replace(true) {
            self.changed.notify(usize::MAX);
        }
    }

    /// Makes what was copied stable. When that fails, it is tried again.
    pub async fn try_now(&self) {
        if let Err(error) = self.now().await {
            log::warn!("stream: what was copied is not stable yet: {error}");
        }
    }

    /// Makes the last copies stable. When that fails, it is the job's error as a copy's would be:
    /// nobody tries again once the job waits to be finalized, which may be hours.
    pub async fn last(&self) -> Result<(), JobError> {
        loop {
            let Err(error) = self.now().await else {
                return Ok(());
            };
            if self.context.should_stop() {
                log::warn!("stream: what was copied is not stable: {error}");
                return Ok(());
            }
            match self.context.error_action(error.errno, error.write) {
                ErrorAction::Stop => self.context.pause_point().await,
                ErrorAction::Report | ErrorAction::Ignore => {
                    return Err(JobError::new(error.text));
                }
            }
            if self.context.is_suspended() {
                return Ok(());
            }
        }
    }

    async fn now(&self) -> Result<(), JobIoError> {
        let _turn = self.settling.lock().await;
        if !self.unstable.replace(false) {
            return Ok(());
        }
        self.source.settle().await.inspect_err(|_| self.copied())
    }

    /// Waits until nothing is under way. Nothing begins while what is returned is held.
    pub async fn rest(&self) -> MutexGuard<'_, ()> {
        self.settling.lock().await
    }
}
