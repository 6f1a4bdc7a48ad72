//! Where a stream job reads and writes: what it needs of a graph, and what the parts of the job have
//! in common.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::future::{self, LocalBoxFuture};

/// What a range needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkStatus {
    /// The layer has its own data (or zeros) there.
    AlreadyPresent,
    /// No layer above the base has data there.
    NotNeeded,
    /// A layer between has data there: it has to be copied.
    NeedsCopy,
    /// The layers between say that it is zeros: the layer has to say so, too. No data is moved.
    NeedsZeroes,
}

/// How much the guests want of what a job uses as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GuestLoad {
    /// They have asked for nothing in the last few milliseconds.
    #[default]
    Idle,
    /// They have.
    Active,
    /// They have, and the threads that serve them wait for a processor.
    Crowded,
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

/// Where a stream job reads and writes.
///
/// Futures are polled on the job's thread, several at once; a copy that was begun is always polled
/// to its end, unless the thread dies.
pub trait StreamSource {
    /// The length of the device in bytes.
    fn len(&self) -> u64;

    /// Whether there is nothing to do.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The cluster size of the layer streamed into.
    fn cluster_size(&self) -> u64;

    /// What the guests want at present.
    fn guest_load(&self) -> GuestLoad {
        GuestLoad::Idle
    }

    /// What the range at `offset` needs, and how far that holds: at least one byte, at most
    /// `max_len`. It may change before the range is copied.
    fn chunk_status(
        &self,
        offset: u64,
        max_len: u64,
    ) -> LocalBoxFuture<'_, Result<(u64, ChunkStatus), JobIoError>>;

    /// Copies what the range still needs. Says how many bytes were moved: none where a guest has
    /// written in the meantime, more than `len` where clusters are larger.
    fn copy(&self, offset: u64, len: u64) -> LocalBoxFuture<'_, Result<u64, JobIoError>>;

    /// Makes what was copied so far, and all mappings to it, stable.
    fn settle(&self) -> LocalBoxFuture<'_, Result<(), JobIoError>> {
        Box::pin(future::ready(Ok(())))
    }

    /// Makes what was copied, and all mappings to it, stable; then makes the layer's header point
    /// at the base, under the name `backing_file` or, without one, its own; and when that is stable,
    /// puts the shorter chain in force. Nothing of it happens when this is not called.
    fn finish(&self, backing_file: Option<String>) -> LocalBoxFuture<'_, Result<(), JobIoError>>;

    /// Gives back what the stream had taken, however it ended: called last.
    fn close(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(future::ready(()))
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
