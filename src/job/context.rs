//! One job as its body sees it.

use std::rc::Rc;
use std::sync::Arc;

use event_listener::EventListener;
use futures_util::future::{self, LocalBoxFuture};
use serde_json::json;

use super::handle::{Completion, Job, OnError};
use super::runner::Timer;
use super::status::{IoStatus, Progress, Status};
use crate::throttle::pacing::{Grant, Ticket};

/// Progress is shown in steps of at most this many bytes.
pub const PROGRESS_STEP: u64 = 512 << 10;

/// What to do about an error, decided by the job's `on-error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// End the job with the error.
    Report,
    /// Go on with the next range; end the job with the error when all is done.
    Ignore,
    /// The job was made to pause: try the range again after the next
    /// [`JobContext::pause_point`].
    Stop,
}

/// Whether a body may go on after it waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Go,
    /// The job is to pause or to end, or has a lower speed: see to that first.
    Interrupted,
}

/// A body's way to its job: what is asked of it, and what it has to tell.
pub struct JobContext {
    job: Arc<Job>,
    timer: Rc<dyn Timer>,
}

impl JobContext {
    pub(super) fn new(job: Arc<Job>, timer: Rc<dyn Timer>) -> Self {
        Self { job, timer }
    }

    /// What it is called in messages.
    pub fn name(&self) -> String {
        format!("{} job '{}'", self.job.spec().kind, self.job.id())
    }

    /// Whether the job was cancelled: the body ends as soon as what is in flight has landed.
    pub fn should_stop(&self) -> bool {
        self.job.lock().cancel
    }

    /// Whether the job ends for now, and with it the process: its images are closed in a moment.
    pub fn is_suspended(&self) -> bool {
        self.job.lock().suspend
    }

    /// Whether another process began the job, and may have done a part of it.
    pub fn is_restored(&self) -> bool {
        self.job.is_restored()
    }

    /// Whether the job is to pause, or to end: time for a [`pause_point`](Self::pause_point), with
    /// nothing in flight.
    pub fn interrupted(&self) -> bool {
        let state = self.job.lock();
        state.cancel || state.pause
    }

    /// Pauses here, if the job is to pause, until it is resumed or cancelled.
    pub async fn pause_point(&self) {
        let mut paused = false;
        loop {
            let listener = self.job.listen();
            {
                let mut state = self.job.lock();
                if state.cancel || !state.pause {
                    // Nobody is told of a job that ends for now.
                    if paused && !state.suspend {
                        state.idle = false;
                        let status = match state.ready {
                            true => Status::Ready,
                            false => Status::Running,
                        };
                        self.job.set_status(&mut state, status);
                    }
                    return;
                }
                if !paused {
                    paused = true;
                    state.idle = true;
                    let status = match state.ready {
                        true => Status::Standby,
                        false => Status::Paused,
                    };
                    self.job.set_status(&mut state, status);
                }
            }
            listener.await;
        }
    }

    /// The job has done all, and goes on following what it copies: a client says when it ends.
    pub fn set_ready(&self) {
        let mut state = self.job.lock();
        if state.ready || state.cancel {
            return;
        }
        state.ready = true;
        self.job.set_status(&mut state, Status::Ready);
        self.job.emit(
            "BLOCK_JOB_READY",
            json!({
                "device": self.job.id(),
                "len": state.len,
                "offset": state.offset,
                "speed": state.bucket.speed(),
                "type": self.job.spec().kind,
            }),
        );
    }

    /// How the job is to end, if it is ready and a client has said so.
    pub fn completion(&self) -> Option<Completion> {
        self.job.lock().complete
    }

    /// A future that ends when something about the job has changed. What is looked at after this
    /// call and before waiting is not missed.
    pub fn changed(&self) -> EventListener {
        self.job.listen()
    }

    /// Waits until the speed limit lets `bytes` through. A speed that is lower than the one at
    /// which the wait began interrupts it: what suited that one would be a burst by now.
    pub async fn limit(&self, bytes: u64) -> Flow {
        let mut ticket = Ticket::default();
        let mut begun = None;
        loop {
            let listener = self.job.listen();
            let wait = {
                let mut state = self.job.lock();
                state.idle = false;
                if state.cancel || state.pause {
                    return Flow::Interrupted;
                }
                let speed = state.bucket.speed();
                if speed != 0 && speed < *begun.get_or_insert(speed) {
                    return Flow::Interrupted;
                }
                match self.job.take_quota(&mut state, bytes, &mut ticket) {
                    Grant::Now => return Flow::Go,
                    Grant::After(wait) => wait,
                }
            };
            let mut sleep = self.timer.sleep(wait);
            self.job.lock().idle = true;
            future::select(&mut sleep, listener).await;
        }
    }

    /// Corrects the account of the speed limit when `used` bytes were moved where `granted` had been
    /// let through.
    pub fn settle(&self, granted: u64, used: u64) {
        if granted != used {
            self.job.lock().bucket.settle(granted, used);
        }
    }

    /// How much to move at once so that the rate stays smooth; whole clusters.
    pub fn smooth_request(&self, cluster: u64, max: u64) -> u64 {
        self.job.lock().bucket.smooth_request(cluster, max)
    }

    /// Whether the job's speed is limited.
    pub fn is_limited(&self) -> bool {
        self.job.lock().bucket.speed() != 0
    }

    /// Sets how much there is to do.
    pub fn set_len(&self, len: u64) {
        self.job.lock().len = len;
    }

    /// Tells how much is copied and is to be copied.
    pub fn set_progress(&self, progress: Progress) {
        self.job.lock().progress = progress;
    }

    /// Moves the low-water mark up to `offset`. It never goes back, and goes in small steps, so
    /// that a client that watches sees it pass.
    pub fn advance(&self, offset: u64) {
        loop {
            let mut state = self.job.lock();
            let target = offset.min(state.len);
            if state.offset >= target {
                return;
            }
            state.offset = target.min(state.offset.saturating_add(PROGRESS_STEP));
        }
    }

    /// Sleeps; a change of the job ends it early.
    pub fn sleep(&self, duration: std::time::Duration) -> LocalBoxFuture<'static, ()> {
        self.timer.sleep(duration)
    }

    /// Decides, and tells the clients, what is done about an I/O error.
    pub fn error_action(&self, errno: i32, is_write: bool) -> ErrorAction {
        let action = match self.job.spec().on_error {
            OnError::Report => ErrorAction::Report,
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc if errno == libc::ENOSPC => ErrorAction::Stop,
            OnError::Enospc => ErrorAction::Report,
        };
        let name = match action {
            ErrorAction::Report => "report",
            ErrorAction::Ignore => "ignore",
            ErrorAction::Stop => "stop",
        };
        let io_status = match errno {
            libc::ENOSPC => IoStatus::NoSpace,
            _ => IoStatus::Failed,
        };
        let _turn = self.job.turn();
        let stop = action == ErrorAction::Stop && !self.job.lock().cancel;
        if stop {
            // It stops in any case: unrecorded, it meets the error again in the next process.
            self.job.record_anyway(|job| {
                job.paused = true;
                job.io_status = io_status;
            });
        }
        let mut state = self.job.lock();
        let operation = if is_write { "write" } else { "read" };
        self.job.emit(
            "BLOCK_JOB_ERROR",
            json!({"device": self.job.id(), "operation": operation, "action": name}),
        );
        if stop && !state.cancel {
            state.pause = true;
            state.io_status = io_status;
            self.job.wake();
        }
        action
    }
}
