//! Long-running work on images: its states, its speed, and the jobs.
//!
//! A job is a [`Body`] (what to do), run by a [`Manager`] (which jobs exist, who may touch what) on
//! an OS thread of its own. Between the two stands the state that [`Job`] guards: clients change it
//! through verbs (pause, cancel, set-speed …), the body looks at it through its [`JobContext`], and
//! every change is told to the world through an [`EventSink`].
//!
//! States, verbs, events and error texts are those of QEMU's jobs, so that tools written for QEMU
//! work unchanged; `docs/qmp.md` lists them.
//!
//! - [`status`]: the states and which verb each allows
//! - [`handle`]: one job as its clients see it
//! - [`context`]: one job as its body sees it
//! - `driver`: takes a body through the states
//! - [`manager`]: all jobs, and the nodes they hold
//! - [`ledger`]: where jobs are recorded, so that another process can go on with them
//! - [`runner`]: the thread a job runs on
//! - [`source`]: what a job copies, and what it sees of guests
//! - [`copier`]: copies, in order and within limits: the common part of jobs
//! - [`stream`], [`commit`], [`active`]: the stream job, and both kinds of commit job
//! - [`create`]: the create job
//! - `relink`: what makes the results of streams and commits count
//! - [`records`]: what is recorded of nodes and results
//! - `survey`: what is left to copy
//! - `settle`: what was copied becomes stable while the job runs

pub mod active;
pub mod commit;
pub mod context;
pub mod copier;
pub mod create;
mod driver;
pub mod handle;
pub mod ledger;
pub mod manager;
pub mod records;
mod relink;
pub mod runner;
mod settle;
pub mod source;
pub mod status;
pub mod stream;
mod survey;

#[cfg(test)]
mod progress_tests;
#[cfg(test)]
mod recorded_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use futures_util::future::LocalBoxFuture;
use serde_json::Value;

/// The nodes that a job has, which no other job has meanwhile.
pub use crate::graph::Grant as Lease;

pub use context::{ErrorAction, JobContext};
pub use handle::{Job, JobInfo, JobSpec, OnError};
pub use ledger::Ledger;
pub use manager::{ClaimedId, Manager, Untold};
pub use runner::{Clock, JobMain, JobRunner, ParkRunner, SystemClock, Timer};
pub use status::{IoStatus, Progress, Status, Verb};

/// Something that happened to a job, for every client that listens.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The event's name in QMP.
    pub name: &'static str,
    /// Its members.
    pub data: Value,
}

/// Takes events, in the order in which they happened. It is called with locks held: it must not
/// block, and must not call back into the jobs.
pub type EventSink = Arc<dyn Fn(Event) + Send + Sync>;

/// Why a body failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobError {
    /// The text clients get to see.
    pub text: String,
}

impl JobError {
    /// An error with this text.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into() }
    }

    /// The error that the operating system calls `errno`.
    pub fn from_errno(errno: i32) -> Self {
        let text = std::io::Error::from_raw_os_error(errno).to_string();
        // What the C library says is what QEMU shows; the number behind it is Rust's addition.
        let text = text.split(" (os error").next().unwrap_or_default();
        Self::new(text)
    }
}

/// A verb was refused, or a job could not be made: the text says why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// What a job does. It lives on the job's thread and need not be `Send`.
pub trait Body {
    /// The work. Ends early, with any result, when [`JobContext::should_stop`] says so.
    fn run<'a>(&'a mut self, context: &'a JobContext) -> LocalBoxFuture<'a, Result<(), JobError>>;

    /// Makes the result count, once the work is done and the job was not cancelled. After this has
    /// begun the job can no longer be cancelled.
    fn commit<'a>(
        &'a mut self,
        context: &'a JobContext,
    ) -> LocalBoxFuture<'a, Result<(), JobError>>;

    /// Gives back what the job had taken, however it ended. Clients hear of the end after this.
    fn close(&mut self) -> LocalBoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// Makes the body, on the job's thread.
pub type BodyFactory =
    Box<dyn FnOnce() -> LocalBoxFuture<'static, Result<Box<dyn Body>, JobError>> + Send>;
