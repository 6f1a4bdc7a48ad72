//! A disk as storage: what lets a layer be laid out in another disk.
//!
//! A layer over a file, or over a window of one, uses that file's storage itself. Where the bytes
//! of a layer are those of a disk that a format keeps (a raw window over a qcow2 image, an image
//! inside another image), there is no such storage, and [`Backed`] takes its place. Each operation
//! is a task on the thread that submitted it, with a view of its own of the disk as it is then, so
//! the layers below may change while it is in use.
//!
//! It is like a block device: it has the length of the disk, and space that was not written need not
//! read as zeros to those above, who ask for it. Its holes are what the layers say is zeros, and the
//! holes of the files under raw layers.
//!
//! Two disks above one another do not wait for each other in a circle: an operation on the lower
//! one waits for operations on the lower one and on what is under it, and for nothing above. That
//! holds for clusters (claims), for room (grace periods, [`with_room`]) and for syncs, of which
//! each disk has its own [`Syncs`].

use std::io;
use std::sync::Arc;

use super::{Chain, Root, View, with_room};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::reactor::{Reactor, Token};
use crate::storage::{
    Access, Answer, Identity, IoBufs, Limits, Op, Storage, Submission, Syncs, at_once, later,
};

/// Bytes that one operation moves at most; a longer transfer is short.
const MAX_TRANSFER: u64 = 64 << 20;
/// Extents of the disk that are looked at for the end of a hole. What follows a longer one is data,
/// until it is asked for itself.
const MAX_EXTENTS: usize = 1024;

/// The disk at a [`Root`], as the storage of a layer above it.
#[derive(Debug)]
pub struct Backed {
    root: Arc<Root>,
    name: String,
    /// What a write has to be aligned to, in bytes.
    align: u64,
    /// Syncs of the disk as a whole. Those of the files that it is in keep their own failures.
    syncs: Arc<Syncs>,
}

impl Backed {
    /// The disk at `root`.
    ///
    /// # Errors
    /// When it ends within a block of its file: what is in that block could not be written.
    pub fn new(root: Arc<Root>) -> Result<Self> {
        let chain = root.chain();
        let top = chain.top();
        let (size, align) = (chain.size(), top.storage.limits().offset_align.max(1));
        if !size.is_multiple_of(align) {
            return Err(Error::Invalid(format!(
                "node '{}': its disk of {size} bytes is not a multiple of the {align} bytes of its \
                 file's blocks, so it cannot be the file of another node (expected \
                 cache.direct=off)",
                top.name
            )));
        }
        Ok(Self {
            name: format!("{} (the disk in node '{}')", top.storage.name(), top.name),
            align,
            syncs: Syncs::new(false),
            root,
        })
    }

    /// Bytes of the disk.
    fn size(&self) -> u64 {
        self.root.chain().size()
    }

    /// The disk.
    #[must_use]
    pub fn root(&self) -> &Arc<Root> {
        &self.root
    }

    /// Turns an operation into what the disk is to do.
    ///
    /// # Errors
    /// What a block device answers to one that makes no sense.
    ///
    /// # Safety
    /// The memory that `op` names stays valid until the action has ended.
    unsafe fn action(&self, op: Op<'_>) -> io::Result<Action> {
        match op {
            Op::Read { iovecs, offset } => {
                // SAFETY: passed on to the caller.
                let bufs = unsafe { IoBufs::new(iovecs) };
                self.whole_blocks(offset, bufs.len() as u64)?;
                let len = (bufs.len() as u64).min(self.size().saturating_sub(offset));
                let bufs = bufs.slice(0, len.min(MAX_TRANSFER) as usize);
                Ok(Action::Read(offset, bufs))
            }
            Op::Write { iovecs, offset } => {
                // SAFETY: passed on to the caller.
                let bufs = unsafe { IoBufs::new(iovecs) };
                self.whole_blocks(offset, bufs.len() as u64)?;
                self.within(offset, bufs.len() as u64)?;
                let len = (bufs.len() as u64).min(MAX_TRANSFER);
                Ok(Action::Write(offset, bufs.slice(0, len as usize)))
            }
            Op::Sync => Ok(Action::Sync),
            // There is nothing behind the end.
            Op::Reserve { .. } => Err(error(libc::EOPNOTSUPP)),
            Op::Zero { offset, len, unmap } => {
                // What is given back may end behind the disk, where there is nothing to do.
                let rest = self.size().saturating_sub(offset);
                let len = if unmap { len.min(rest) } else { len };
                self.whole_blocks(offset, len)?;
                self.within(offset, len)?;
                Ok(Action::Zero { offset, len, unmap })
            }
        }
    }

    fn whole_blocks(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.is_multiple_of(self.align) && len.is_multiple_of(self.align) {
            true => Ok(()),
            false => Err(error(libc::EINVAL)),
        }
    }

    fn within(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(error(libc::ENOSPC)),
        }
    }
}

/// What an operation does to the disk.
enum Action {
    Read(u64, IoBufs),
    Write(u64, IoBufs),
    Zero { offset: u64, len: u64, unmap: bool },
    Sync,
}

/// Carries out an operation on the disk at `root`. Returns the bytes moved.
async fn carry_out(root: &Root, action: &Action) -> Result<usize> {
    let renew = || root.chain();
    let view = View::of(renew());
    match action {
        Action::Read(_, bufs) if bufs.is_empty() => Ok(0),
        // By copy-on-read it may write.
        Action::Read(offset, bufs) => with_room(view, renew, async |view| {
            view.read(*offset, bufs.clone()).await
        })
        .await
        .map(|()| bufs.len()),
        Action::Write(offset, bufs) => with_room(view, renew, async |view| {
            view.write(*offset, bufs.clone()).await
        })
        .await
        .map(|()| bufs.len()),
        &Action::Zero { offset, len, unmap } => {
            if unmap && !can_unmap(&view.chain) {
                return Err(Error::unsupported(
                    view.chain.top().storage.name(),
                    "an image of version 2 over another one cannot record zeros",
                ));
            }
            with_room(view, renew, async |view| {
                view.write_zeroes(offset, len, unmap).await
            })
            .await
            .map(|()| 0)
        }
        Action::Sync => view.chain.flush().await.map(|()| 0),
    }
}

/// Whether a range can be given back without writing zeros to it as data. Those who need zeros
/// write them themselves then.
fn can_unmap(chain: &Chain) -> bool {
    match &chain.top().format {
        Format::Qcow2(image) => image.has_zero_clusters() || !image.is_overlay(),
        Format::Raw(_) | Format::Qed(_) => true,
    }
}

fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

impl Storage for Backed {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        // SAFETY: the caller keeps the memory until the token's completion has been delivered,
        // which is the last thing that the task does.
        let action = match unsafe { self.action(op) } {
            Ok(action) => action,
            Err(error) => return Submission::Ready(Err(error)),
        };
        let root = self.root.clone();
        reactor.spawn(async move {
            let result = carry_out(&root, &action).await;
            // The memory is the caller's again from here on.
            drop(action);
            let result = result.map(|len| len as u32).map_err(io::Error::from);
            // Tasks run on the thread of their reactor alone. The task has no handle of it, which
            // would keep the reactor that has the task.
            match Reactor::current() {
                Some(reactor) => reactor.complete(token, result),
                None => log::error!("an operation on a disk ended on a thread without a reactor"),
            }
        });
        Submission::Pending
    }

    fn len(&self) -> Answer<'_, io::Result<u64>> {
        at_once(Ok(self.size()))
    }

    fn capacity(&self) -> Answer<'_, io::Result<Option<u64>>> {
        at_once(Ok(Some(self.size())))
    }

    /// Nothing is cut off, and it does not grow.
    fn set_len(&self, len: u64) -> Answer<'_, io::Result<()>> {
        at_once(self.within(0, len))
    }

    fn limits(&self) -> Limits {
        Limits {
            // Buffers of any address are read and written; what the files need is seen to there.
            memory_align: 1,
            offset_align: self.align,
            zero_past_end: false,
        }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn writable(&self) -> bool {
        !self.root.chain().top().read_only
    }

    /// The image locks of the disk's files follow from how its own node is used.
    fn set_access(&self, _access: Access) -> Answer<'_, io::Result<()>> {
        at_once(Ok(()))
    }

    fn allocated(&self) -> Answer<'_, io::Result<u64>> {
        let chain = self.root.chain();
        later(async move { chain.top().storage.allocated().await })
    }

    fn identity(&self) -> Option<Identity> {
        self.root.chain().top().storage.identity()
    }

    fn syncs(&self) -> Option<&Arc<Syncs>> {
        Some(&self.syncs)
    }

    fn next_data(&self, offset: u64) -> Answer<'_, Option<(u64, u64)>> {
        // Like that of any request, the view keeps freed clusters from being used anew meanwhile.
        let view = View::of(self.root.chain());
        let size = view.chain.size();
        later(async move {
            let mut at = offset;
            for _ in 0..MAX_EXTENTS {
                if at >= size {
                    return None;
                }
                match view.chain.hole(at, size - at).await {
                    Ok((true, len)) => at += len,
                    Ok((false, len)) => return Some((at, at + len)),
                    // Who reads it is told.
                    Err(_) => break,
                }
            }
            Some((at, size))
        })
    }
}

#[cfg(test)]
mod tests;
