//! Storage: where the bytes of a layer live.
//!
//! [`Storage`] is asynchronous and may be slow or fail: a local file today, remote stores later,
//! and in tests storage that records, delays and breaks. The data path calls
//! [`Storage::submit`] with a client token and guest memory as it is; everything else uses the
//! `async` functions of [`io`], which own their buffers.
//!
//! Operations of tasks say what they are for ([`Purpose`]); those of the data path are guest data.
//!
//! Storage may move fewer bytes than it was asked to, and may answer any operation with EINTR or
//! EAGAIN, which mean that nothing was done. [`io`] goes on where a transfer ended and tries such
//! an operation again, for a bounded time. The data path does neither: what has not moved every
//! byte it gives to a task, which goes through [`io`].
//!
//! No call blocks its thread, whatever the storage. What is known is told at once (limits, name,
//! identity); everything else is an operation or an [`Answer`], which may take minutes and may be
//! cancelled by dropping it. Operations may be completed by other threads
//! ([`crate::reactor::Remote::complete`]).

pub mod blkdebug;
pub mod buffer;
mod calls;
pub mod fault;
pub mod file;
mod file_system;
pub(crate) mod holder;
pub mod identity;
pub mod io;
pub mod locking;
mod made_file;
pub mod memory;
mod new_file;
pub mod null;
pub mod opener;
mod purpose;
pub mod silence;
pub mod syncs;
pub mod threshold;
pub mod window;

use std::future::{Ready, ready};
use std::time::Instant;

use futures_util::future::{Either, FutureExt, LocalBoxFuture};

use crate::reactor::{Reactor, Token};

pub use buffer::{AlignedBuf, IoBufs, ScratchBuf};
pub use file::FileStorage;
pub use identity::{Content, Identity, are_different, is_known, is_same_file, is_same_path};
pub use locking::Access;
pub use made_file::MadeFile;
pub use new_file::{NewFile, behind_links};
pub use null::Null;
pub use opener::OpenFlags;
pub use purpose::{Purpose, Target};
pub use syncs::Syncs;
pub use threshold::{Threshold, Watches};
pub use window::Window;

/// An operation on storage.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// Read into the vectors from `offset`. May be short, by whole blocks of
    /// [`Limits::offset_align`] unless it meets the end; 0 bytes means the end of the file.
    Read {
        /// Where the bytes go.
        iovecs: &'a [libc::iovec],
        /// Position in the storage, in bytes.
        offset: u64,
    },
    /// Write from the vectors to `offset`. May be short, by whole blocks of
    /// [`Limits::offset_align`].
    Write {
        /// Where the bytes come from.
        iovecs: &'a [libc::iovec],
        /// Position in the storage, in bytes.
        offset: u64,
    },
    /// Make everything written before stable (`fdatasync`). EINTR and EAGAIN say that it has not
    /// been tried to its end, so that it can be tried again; after any other error nothing is known
    /// about what was written.
    Sync,
    /// Reserve space for a range behind the end, which reads as zeros; the storage becomes longer.
    /// An error means that nothing is gained by it, or nothing was reserved: both are harmless.
    Reserve {
        /// Start in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Make a range read as zeros; with `unmap` its space may be given back.
    Zero {
        /// Start in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Whether space may be given back.
        unmap: bool,
    },
}

/// What became of a submitted operation.
#[derive(Debug)]
pub enum Submission {
    /// It is done: bytes transferred, or the error. The token will not be completed.
    Ready(std::io::Result<u32>),
    /// The token's completion will tell.
    Pending,
}

/// What the storage asks of its callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Alignment of buffer addresses, bytes (1: any).
    pub memory_align: usize,
    /// Alignment of offsets and lengths, bytes (1: any).
    pub offset_align: u64,
    /// True when what lies past the end reads as zeros once a later write extends it
    /// (regular files).
    pub zero_past_end: bool,
}

/// What a call to storage comes to: at once, where that takes no time, or later. Dropped before its
/// end, it releases the waiter; a call that has begun goes on to its end all the same.
pub type Answer<'a, T> = Either<Ready<T>, LocalBoxFuture<'a, T>>;

/// An answer that is known.
pub fn at_once<'a, T>(result: T) -> Answer<'a, T> {
    Either::Left(ready(result))
}

/// An answer that is waited for.
pub fn later<'a, T>(result: impl Future<Output = T> + 'a) -> Answer<'a, T> {
    Either::Right(result.boxed_local())
}

/// A place that holds the bytes of one layer.
#[allow(clippy::len_without_is_empty)] // An empty file is nothing special.
pub trait Storage: Send + Sync + std::fmt::Debug {
    /// Starts `op`. It may end short, or with EINTR or EAGAIN: see [`crate::storage`].
    ///
    /// # Safety
    /// The memory that the operation names, the array of vectors included, stays valid until
    /// the operation is done: when `Ready` is returned, or when `token`'s completion has been
    /// delivered.
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission;

    /// As [`submit`](Self::submit), of an operation with a purpose that is not to move the bytes of a
    /// disk at once: that is what `submit` alone is for.
    ///
    /// # Safety
    /// As there.
    unsafe fn submit_for(
        &self,
        reactor: &Reactor,
        op: Op<'_>,
        token: Token,
        _purpose: Purpose,
    ) -> Submission {
        if let Some(watches) = self.watches() {
            watches.note_op(&op);
        }
        // SAFETY: passed on to the caller.
        unsafe { self.submit(reactor, op, token) }
    }

    /// Length in bytes: the end of what was ever written.
    ///
    /// # Errors
    /// What the system reports.
    fn len(&self) -> Answer<'_, std::io::Result<u64>>;

    /// The length that it has for good, as a block device does: nothing can be written behind it.
    /// `None`: writes make it longer. Asked anew where space runs out, since an administrator may
    /// have made the device larger, and by every read of a task: storage that writes make longer
    /// answers at once.
    ///
    /// # Errors
    /// What the system reports.
    fn capacity(&self) -> Answer<'_, std::io::Result<Option<u64>>> {
        at_once(Ok(None))
    }

    /// Sets the length; new bytes read as zeros.
    ///
    /// # Errors
    /// What the system reports.
    fn set_len(&self, len: u64) -> Answer<'_, std::io::Result<()>>;

    /// What callers must keep to.
    fn limits(&self) -> Limits;

    /// A name for messages: the file name.
    fn name(&self) -> &str;

    /// Whether it was opened for writing.
    fn writable(&self) -> bool;

    /// Changes what other programs may do with the file meanwhile (image locks).
    ///
    /// # Errors
    /// When their use of it does not go with `access`.
    fn set_access(&self, _access: Access) -> Answer<'_, std::io::Result<()>> {
        at_once(Ok(()))
    }

    /// The same file once more, open for writing, under the locks that this one holds: who wants
    /// to write asks for more of them ([`set_access`](Self::set_access)), through either.
    ///
    /// # Errors
    /// When it cannot be opened for writing, or its name stands for another file by now. Storage
    /// that is no file of its own cannot do it.
    fn open_writable(&self) -> Answer<'_, std::io::Result<std::sync::Arc<dyn Storage>>> {
        at_once(Err(std::io::Error::new(
            std::io::ErrorKind::Unsupported,
            format!("{}: cannot be opened for writing", self.name()),
        )))
    }

    /// What it is to its bytes, over those of `inner`, which has the same ones: a wrapper whose state
    /// goes on when its file is opened once more. `None`: it has no state.
    fn over(&self, _inner: &std::sync::Arc<dyn Storage>) -> Option<std::sync::Arc<dyn Storage>> {
        None
    }

    /// What tells the file from a copy of it that has taken its place: inode and time of birth, as
    /// they were when it was opened. `None`: it is no file of its own, or there is no telling.
    fn identity(&self) -> Option<Identity> {
        None
    }

    /// Whether a write that has completed is still read after the process was killed, flushed or
    /// not: the journal of an image relies on that.
    fn outlives_process(&self) -> bool {
        false
    }

    /// What it takes on the disk, in bytes; 0 where that is not known.
    ///
    /// # Errors
    /// What the system reports.
    fn allocated(&self) -> Answer<'_, std::io::Result<u64>> {
        at_once(Ok(self.allocated_before()))
    }

    /// What it took on the disk when that was last found out, in bytes.
    fn allocated_before(&self) -> u64 {
        0
    }

    /// What operations of it need until they have ended, though nobody waits for them and the
    /// storage itself is let go of: the open file, its locks, a connection.
    fn hold(&self) -> Option<std::sync::Arc<dyn std::any::Any + Send + Sync>> {
        None
    }

    /// The syncs of the file that its bytes are in, shared with all others that have it; a storage over
    /// another one has that one's. `None`: it has a file of its own, written through a page cache.
    fn syncs(&self) -> Option<&std::sync::Arc<Syncs>> {
        None
    }

    /// The thresholds of writes to it, shared by all descriptors of it. `None`: nobody is told of
    /// those. Operations of tasks look at them by themselves.
    fn watches(&self) -> Option<&Watches> {
        None
    }

    /// The data path is about to write `[offset, offset + len)`: looks at the thresholds of this
    /// storage and of those that it passes the write on to.
    fn note_write(&self, offset: u64, len: u64) {
        if let Some(watches) = self.watches() {
            watches.note(offset, len);
        }
    }

    /// Since when a call of it is under way that blocks a thread (asking its length, closing).
    /// `None`: none is.
    fn call_since(&self) -> Option<Instant> {
        None
    }

    /// The first range of data at or after `offset` (`SEEK_DATA`, `SEEK_HOLE`), start and end.
    /// `None`: only zeros follow. Storage that cannot tell says everything is data.
    fn next_data(&self, offset: u64) -> Answer<'_, Option<(u64, u64)>> {
        at_once(Some((offset, u64::MAX)))
    }
}
