//! What a job that copies needs of its disk, and what it sees of guests.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::future::{self, LocalBoxFuture};

use crate::chain::CopyStatus;
use crate::error::Error;

/// How much the guests want of what a job uses as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GuestLoad {
    /// They have asked for nothing in the last few milliseconds.
    #[default]
    Idle,
    /// They have.
    Active,
    /// They have, and the threads that serve them wait for a processor.
    CpuContended,
}

/// An I/O error, as a job needs to know it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct JobIoError {
    /// The error number, for clients and for deciding what to do.
    pub errno: i32,
    /// Whether writing failed, rather than reading.
    pub write: bool,
    /// What failed where, for the log.
    pub text: String,
}

impl From<&Error> for JobIoError {
    fn from(error: &Error) -> Self {
        Self {
            errno: error.errno(),
            write: error.is_write(),
            text: error.to_string(),
        }
    }
}

/// What a [`CopySource`] answers with: an error is told as a job needs it.
pub(super) fn answer<'a, T: 'a>(
    work: impl Future<Output = crate::error::Result<T>> + 'a,
) -> LocalBoxFuture<'a, Result<T, JobIoError>> {
    Box::pin(async move { work.await.map_err(|error| JobIoError::from(&error)) })
}

/// Sees how much guests want.
pub trait Guests {
    /// What they want at present.
    fn load(&self) -> GuestLoad;

    /// Lets the threads that serve them run, where they wait for a processor.
    fn give_way(&self);
}

/// Nobody uses the disk but the job.
pub struct NoGuests;

impl Guests for NoGuests {
    fn load(&self) -> GuestLoad {
        GuestLoad::Idle
    }

    fn give_way(&self) {}
}

/// What a job copies.
///
/// Futures are polled on the job's thread, several at once; a copy that was begun is always polled
/// to its end, unless the thread dies.
pub trait CopySource {
    /// The length of the device in bytes.
    fn len(&self) -> u64;

    /// Whether there is nothing to do.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The cluster size of the layer copied into.
    fn cluster_size(&self) -> u64;

    /// What the guests want at present.
    fn guest_load(&self) -> GuestLoad {
        GuestLoad::Idle
    }

    /// What the range at `offset` needs, and how far that holds: at least one byte, at most
    /// `max_len`. It may change before the range is copied.
    fn status(
        &self,
        offset: u64,
        max_len: u64,
    ) -> LocalBoxFuture<'_, Result<(u64, CopyStatus), JobIoError>>;

    /// Copies what the range still needs. Says how many bytes were moved: none where a guest has
    /// written in the meantime, more than `len` where clusters are larger.
    fn copy(&self, offset: u64, len: u64) -> LocalBoxFuture<'_, Result<u64, JobIoError>>;

    /// Makes what was copied so far, and all mappings to it, stable.
    fn settle(&self) -> LocalBoxFuture<'_, Result<(), JobIoError>> {
        Box::pin(future::ready(Ok(())))
    }
}

/// Lets the other tasks of the thread run.
pub(super) async fn yield_now() {
    struct Yield(bool);
    impl Future for Yield {
        type Output = ();
        fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
            if std::mem::replace(&mut self.0, true) {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            Poll::Pending
        }
    }
    Yield(false).await;
}
