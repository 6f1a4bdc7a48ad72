//! A local file or block device, through the reactor's io_uring.
//!
//! Files on tmpfs are memory: there the call is made in line, since io_uring would hand it to a
//! kernel worker thread (tmpfs has no non-blocking I/O), at twice the cost.
//!
//! What io_uring cannot do, closing included, may hang as long as the file system or its server
//! does: it is done on another thread ([`Calls`]), except in memory and where the kernel answers
//! from memory of its own.

use std::any::Any;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use io_uring::{opcode, squeue, types};
use parking_lot::Mutex;

use super::calls::Calls;
use super::file_system::{RAMFS, file_system, keeps_nowait};
use super::identity::{identity_of, number};
use super::locking::{Access, ImageLock, Leaving};
use super::opener::{self, OpenFlags, is_block_device, open_file};
use super::{Answer, Identity, Limits, Op, Storage, Submission, Syncs, Watches, at_once, later};
use crate::reactor::{Reactor, Token};

/// An open image file.
#[derive(Debug)]
pub struct FileStorage {
    opened: Arc<Opened>,
    /// The descriptor of the file, at hand.
    fd: RawFd,
    name: String,
    flags: OpenFlags,
    limits: Limits,
    syncs: Arc<Syncs>,
    identity: Option<Identity>,
    /// The file is memory: calls are made in line.
    in_line: bool,
    /// The ring gives operations to threads of its own at once.
    may_block: bool,
    block_device: bool,
    /// Bytes on the disk, as last known.
    allocated: Arc<AtomicU64>,
    /// Shared by all descriptors that stand for one another.
    watches: Arc<Watches>,
}

/// What is closed when the file is used no more: by its storage, and by calls that go on though
/// nobody waits for them.
#[derive(Debug)]
struct Opened {
    /// Taken by `drop`.
    held: ManuallyDrop<Held>,
    calls: Calls,
    /// Closing takes no time.
    in_line: bool,
    /// Set when the storage has gone, and only what goes on still needs the locks.
    leaving: Mutex<Option<Leaving>>,
}

#[derive(Debug)]
struct Held {
    /// None where nothing is locked. Given back before the file is closed.
    lock: Option<ImageLock>,
    file: Arc<File>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: it is taken here alone, and not used afterwards.
        let held = unsafe { ManuallyDrop::take(&mut self.held) };
        if self.in_line {
            return drop(held);
        }
        // The file is found unlocked by the next to open it, here or in another process. Where to
        // unlock may take long too, others of this process go on waiting for that.
        let leaving = self.leaving.get_mut().take();
        match held.lock.as_ref().is_none_or(ImageLock::leave) {
            true => self.calls.dispose(held),
            false => self.calls.dispose((held, leaving)),
        }
    }
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        let leaving = self.opened.held.lock.as_ref().and_then(ImageLock::leaving);
        *self.opened.leaving.lock() = leaving;
    }
}

impl FileStorage {
    /// Opens `path` and takes QEMU's image locks on it, as a reader: who is going to write asks
    /// for that with [`Storage::set_access`], so that an image which might be written can be
    /// shared as long as it is not. It blocks the thread: for those that serve nobody.
    ///
    /// # Errors
    /// When it cannot be opened, is in use, or is neither a file nor a block device; the text
    /// names the file.
    pub fn open(path: &Path, flags: OpenFlags) -> io::Result<Self> {
        let (file, block_device) = open_file(path, flags)?;
        let lock = (!flags.no_lock).then(|| ImageLock::new(file.clone(), path));
        let storage = Self::new(file, path, flags, block_device, lock, Arc::default())?;
        if let Some(lock) = &storage.opened.held.lock {
            lock.set(if flags.force_share {
                Access::ReadShared
            } else {
                Access::Read
            })?;
        }
        Ok(storage)
    }

    /// As [`open`](Self::open), on a thread that may hang for it.
    ///
    /// # Errors
    /// As there.
    pub async fn open_outside(path: &Path, flags: OpenFlags) -> io::Result<Self> {
        let path = path.to_owned();
        opener::outside(move || Self::open(&path, flags)).await
    }

    fn new(
        file: Arc<File>,
        path: &Path,
        flags: OpenFlags,
        block_device: bool,
        lock: Option<ImageLock>,
        watches: Arc<Watches>,
    ) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let syncs = match flags.no_flush {
            // They do nothing, and say nothing of the file.
            true => Syncs::new(false),
            false => Syncs::of_file(&metadata, flags.writable && !flags.direct),
        };
        // The node of a device is in memory, and the device is not.
        let in_line = !block_device && is_memory(&file);
        Ok(Self {
            syncs,
            fd: file.as_raw_fd(),
            limits: limits_of(&file, flags.direct, block_device),
            in_line,
            // The node of a device is in memory here, too, and a device does not block.
            may_block: !keeps_nowait(file_system(&file)),
            name: path.display().to_string(),
            identity: identity_of(&metadata),
            allocated: Arc::new(AtomicU64::new(metadata.blocks() * 512)),
            opened: Arc::new(Opened {
                held: ManuallyDrop::new(Held { lock, file }),
                calls: Calls::default(),
                in_line,
                leaving: Mutex::default(),
            }),
            flags,
            block_device,
            watches,
        })
    }

    /// Makes a system call: in line where the file is memory, elsewhere on another thread.
    fn call_outside<T: Send + 'static>(
        &self,
        call: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Answer<'_, io::Result<T>> {
        if self.in_line {
            return at_once(call(&self.opened.held.file));
        }
        // Without the locks: they go with the storage, however long the call takes.
        let (calls, file) = (self.opened.calls.clone(), self.opened.held.file.clone());
        later(async move { calls.run(move || call(&file)).await? })
    }

    /// The path that the file was opened by.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(&self.name)
    }

    /// How it was opened.
    #[must_use]
    pub fn flags(&self) -> OpenFlags {
        self.flags
    }

    fn fd(&self) -> RawFd {
        self.fd
    }

    /// # Safety
    /// The vectors of `op` are valid.
    unsafe fn call(&self, op: Op<'_>) -> io::Result<u32> {
        let result = match op {
            // One range costs the kernel less than a list of one.
            Op::Read {
                iovecs: [one],
                offset,
            } => {
                // SAFETY: the range is valid by contract.
                unsafe { libc::pread(self.fd(), one.iov_base, one.iov_len, offset as i64) }
            }
            Op::Write {
                iovecs: [one],
                offset,
            } => {
                // SAFETY: the range is valid by contract.
                unsafe { libc::pwrite(self.fd(), one.iov_base, one.iov_len, offset as i64) }
            }
            // SAFETY: the vectors are valid by contract.
            Op::Read { iovecs, offset } => unsafe {
                libc::preadv(
                    self.fd(),
                    iovecs.as_ptr(),
                    iovecs.len() as i32,
                    offset as i64,
                )
            },
            // SAFETY: the vectors are valid by contract.
            Op::Write { iovecs, offset } => unsafe {
                libc::pwritev(
                    self.fd(),
                    iovecs.as_ptr(),
                    iovecs.len() as i32,
                    offset as i64,
                )
            },
            // SAFETY: no memory is passed.
            Op::Sync => unsafe { libc::fdatasync(self.fd()) as isize },
            Op::Reserve { .. } => return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            Op::Zero { offset, len, unmap } => {
                let mode = zero_mode(unmap);
                // SAFETY: no memory is passed.
                unsafe { libc::fallocate(self.fd(), mode, offset as i64, len as i64) as isize }
            }
        };
        u32::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

/// The number of an image's file.
///
/// # Errors
/// When it is no image.
fn identity(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    is_block_device(&metadata)?;
    Ok(number(&metadata))
}

fn zero_mode(unmap: bool) -> i32 {
    if unmap {
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE
    } else {
        libc::FALLOC_FL_ZERO_RANGE
    }
}

impl Storage for FileStorage {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        if matches!(op, Op::Sync) && self.flags.no_flush {
            return Submission::Ready(Ok(0));
        }
        if matches!(op, Op::Reserve { .. }) && (!self.flags.direct || self.block_device) {
            // With a page cache the file system reserves by itself, when it writes back.
            return Submission::Ready(Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)));
        }
        if self.in_line {
            // SAFETY: passed on to the caller.
            return Submission::Ready(unsafe { self.call(op) });
        }
        let fd = types::Fd(self.fd());
        let entry = match op {
            Op::Read {
                iovecs: [one],
                offset,
            } => opcode::Read::new(fd, one.iov_base.cast(), one.iov_len as u32)
                .offset(offset)
                .build(),
            Op::Write {
                iovecs: [one],
                offset,
            } => opcode::Write::new(fd, one.iov_base.cast(), one.iov_len as u32)
                .offset(offset)
                .build(),
            Op::Read { iovecs, offset } => {
                opcode::Readv::new(fd, iovecs.as_ptr(), iovecs.len() as u32)
                    .offset(offset)
                    .build()
            }
            Op::Write { iovecs, offset } => {
                opcode::Writev::new(fd, iovecs.as_ptr(), iovecs.len() as u32)
                    .offset(offset)
                    .build()
            }
            Op::Sync => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Op::Reserve { offset, len } => opcode::Fallocate::new(fd, len).offset(offset).build(),
            Op::Zero { offset, len, unmap } => opcode::Fallocate::new(fd, len)
                .offset(offset)
                .mode(zero_mode(unmap))
                .build(),
        };
        // A file system in user space or over a network blocks the thread that submits to it, although the
        // ring asks it not to.
        let entry = match self.may_block {
            true => entry.flags(squeue::Flags::ASYNC),
            false => entry,
        };
        // SAFETY: the memory is valid until the completion, by contract.
        match unsafe { reactor.start(entry, token) } {
            Ok(()) => Submission::Pending,
            Err(error) => Submission::Ready(Err(error)),
        }
    }

    fn len(&self) -> Answer<'_, io::Result<u64>> {
        if self.block_device {
            return at_once(device_len(&self.opened.held.file));
        }
        self.call_outside(|file| Ok(file.metadata()?.len()))
    }

    fn allocated(&self) -> Answer<'_, io::Result<u64>> {
        let known = self.allocated.clone();
        // An answer that comes late is the next query's.
        self.call_outside(move |file| {
            let allocated = file.metadata()?.blocks() * 512;
            known.store(allocated, Ordering::Relaxed);
            Ok(allocated)
        })
    }

    fn allocated_before(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    fn capacity(&self) -> Answer<'_, io::Result<Option<u64>>> {
        // The kernel has the length of a device in memory.
        let device = (self.block_device).then(|| device_len(&self.opened.held.file));
        at_once(device.transpose())
    }

    fn set_len(&self, len: u64) -> Answer<'_, io::Result<()>> {
        if self.block_device {
            let fits = device_len(&self.opened.held.file).and_then(|all| match len <= all {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            });
            return at_once(fits);
        }
        // With the locks: if it came late, it would cut off what another program has written.
        let opened = self.opened.clone();
        self.call_outside(move |file| {
            let result = file.set_len(len);
            drop(opened);
            result
        })
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn writable(&self) -> bool {
        self.flags.writable
    }

    fn set_access(&self, access: Access) -> Answer<'_, io::Result<()>> {
        if self.opened.held.lock.is_none() {
            return at_once(Ok(()));
        }
        // Also in memory: a lock that another process holds is waited for.
        let opened = self.opened.clone();
        later(async move {
            let calls = opened.calls.clone();
            let set = move || {
                opened
                    .held
                    .lock
                    .as_ref()
                    .map_or(Ok(()), |lock| lock.set(access))
            };
            calls.run(set).await?
        })
    }

    fn open_writable(&self) -> Answer<'_, io::Result<Arc<dyn Storage>>> {
        let (opened, path) = (self.opened.clone(), self.path());
        let flags = OpenFlags {
            writable: true,
            ..self.flags
        };
        let watches = self.watches.clone();
        later(async move {
            let calls = opened.calls.clone();
            calls
                .run(move || opened.once_more(&path, flags, watches))
                .await?
        })
    }

    fn identity(&self) -> Option<Identity> {
        self.identity
    }

    fn outlives_process(&self) -> bool {
        true
    }

    fn hold(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        Some(self.opened.clone())
    }

    fn syncs(&self) -> Option<&Arc<Syncs>> {
        Some(&self.syncs)
    }

    fn watches(&self) -> Option<&Watches> {
        Some(&self.watches)
    }

    fn call_since(&self) -> Option<Instant> {
        self.opened.calls.since()
    }

    fn next_data(&self, offset: u64) -> Answer<'_, Option<(u64, u64)>> {
        if self.block_device {
            // It has no holes; what the kernel would call one is behind its end.
            return at_once(Some((offset, u64::MAX)));
        }
        if self.in_line {
            return at_once(next_data(&self.opened.held.file, offset));
        }
        let found = self.call_outside(move |file| Ok(next_data(file, offset)));
        later(async move { found.await.unwrap_or(Some((offset, u64::MAX))) })
    }
}

impl Opened {
    /// The same file, opened to be written, under the same locks.
    fn once_more(
        &self,
        path: &Path,
        flags: OpenFlags,
        watches: Arc<Watches>,
    ) -> io::Result<Arc<dyn Storage>> {
        let (file, block_device) = open_file(path, flags)?;
        if identity(&file)? != identity(&self.held.file)? {
            return Err(io::Error::other(format!(
                "Could not open '{}': it is another file than the one that was opened for reading",
                path.display()
            )));
        }
        let lock = self.held.lock.as_ref().map(ImageLock::another);
        let storage = FileStorage::new(file, path, flags, block_device, lock, watches)?;
        Ok(Arc::new(storage))
    }
}

fn next_data(file: &File, offset: u64) -> Option<(u64, u64)> {
    // SAFETY: no memory is passed. The file position is used by nobody.
    let start = unsafe { libc::lseek(file.as_raw_fd(), offset as i64, libc::SEEK_DATA) };
    if start < 0 {
        return match io::Error::last_os_error().raw_os_error() {
            Some(libc::ENXIO) => None,
            _ => Some((offset, u64::MAX)),
        };
    }
    // SAFETY: as above.
    let end = unsafe { libc::lseek(file.as_raw_fd(), start, libc::SEEK_HOLE) };
    Some((start as u64, u64::try_from(end).unwrap_or(u64::MAX)))
}

fn device_len(file: &File) -> io::Result<u64> {
    let mut len = 0u64;
    // BLKGETSIZE64
    const REQUEST: libc::c_ulong = 0x8008_1272;
    // SAFETY: the request writes one u64.
    if unsafe { libc::ioctl(file.as_raw_fd(), REQUEST, &raw mut len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(len)
}

/// Whether a file or folder is in memory: it goes with the host.
pub(crate) fn is_memory(file: &File) -> bool {
    matches!(file_system(file), libc::TMPFS_MAGIC | RAMFS)
}

/// Asks the kernel for the alignment of direct I/O (`STATX_DIOALIGN`, Linux 6.1); without an
/// answer 4 KiB for memory and the common sector size of 512 bytes for offsets are assumed.
fn limits_of(file: &File, direct: bool, block_device: bool) -> Limits {
    let zero_past_end = !block_device;
    if !direct {
        return Limits {
            memory_align: 1,
            offset_align: 1,
            zero_past_end,
        };
    }
    // SAFETY: all-zero bytes are a valid statx.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty string and the call writes one statx.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    if result == 0
        && stat.stx_mask & libc::STATX_DIOALIGN != 0
        && stat.stx_dio_offset_align != 0
        && stat.stx_dio_mem_align != 0
    {
        return Limits {
            memory_align: stat.stx_dio_mem_align as usize,
            offset_align: u64::from(stat.stx_dio_offset_align),
            zero_past_end,
        };
    }
    Limits {
        memory_align: 512,
        offset_align: 512,
        zero_past_end,
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: image locks that outlive the storage with a call that needs none, or
    //! with an operation that is not waited for, so that the file cannot be opened again; a file
    //! system that passes operations on and is taken for one that does not block.

    #![allow(clippy::unwrap_used)]

    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_call_that_hangs_keeps_no_lock_of_a_storage_that_has_gone() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let reactor = Reactor::for_this_thread().unwrap();
        let flags = OpenFlags {
            writable: true,
            ..OpenFlags::default()
        };
        let open = || {
            let storage = FileStorage::open(named.path(), flags)?;
            reactor.block_on(storage.set_access(Access::Write))?;
            io::Result::Ok(storage)
        };
        let storage = open().unwrap();
        let ((let_go, gate), (begun, has_begun)) = (channel::<()>(), channel());
        let mut hung = storage.call_outside(move |_| {
            begun.send(()).unwrap();
            let _ = gate.recv();
            Ok(())
        });
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        if std::pin::Pin::new(&mut hung)
            .poll(&mut context)
            .is_pending()
        {
            has_begun.recv().unwrap();
        }
        drop(hung);
        drop(storage);
        let storage = open().unwrap();
        drop(let_go);
        // What an operation has that goes on.
        let held = storage.hold();
        drop(storage);
        assert!(held.as_ref().is_some_and(|held| {
            let opened = held.downcast_ref::<Opened>();
            opened.is_some_and(|opened| opened.leaving.lock().is_some())
        }));
        drop(held);
        open().unwrap();
        Reactor::leave_thread();
    }
}
