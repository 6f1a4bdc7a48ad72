//! Asynchronous operations on storage for tasks: whole transfers, whatever the kernel splits or
//! interrupts, and whatever alignment the storage asks for.
//!
//! They take a storage with the purpose of the operation ([`Purpose::on`]), or alone where that has
//! none of its own.

use std::any::Any;
use std::future::Future;
use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::time::Duration;

use super::{AlignedBuf, IoBufs, Op, Purpose, ScratchBuf, Storage, Submission, Syncs, Target};
use crate::error::{Action, Error};
use crate::reactor::{Reactor, carry_out, yield_now};

/// Zeros are written from here where the storage cannot make them by itself.
const ZERO_CHUNK: usize = 256 * 1024;
/// An operation that was interrupted is tried again so often, and then no more: who waits for it
/// hears of it within seconds.
const TRIES: u32 = 1000;
/// The first tries follow one another.
const TRIES_AT_ONCE: u32 = 16;
/// Between the others is so much time.
const TRY_PAUSE: Duration = Duration::from_millis(1);

/// What an operation uses until it has ended: its memory, and the storage.
struct InUse {
    bufs: IoBufs,
    _storage: Option<Arc<dyn Any + Send + Sync>>,
}

/// Carries out the operation that `op` makes of the vectors of `bufs`, again when it was interrupted.
async fn run(
    to: Target<'_>,
    bufs: IoBufs,
    op: impl for<'a> Fn(&'a [libc::iovec]) -> Op<'a>,
) -> io::Result<u32> {
    let reactor = Reactor::current()
        .ok_or_else(|| io::Error::other("storage used on a thread without a reactor"))?;
    let Target { storage, purpose } = to;
    let mut tried = 0;
    let mut in_use = InUse {
        bufs,
        _storage: storage.hold(),
    };
    loop {
        let mut guard = reactor.reserve(in_use);
        let iovecs = guard.kept().map_or(&[][..], |kept| kept.bufs.iovecs());
        // The kernel takes at most 1024 vectors (IOV_MAX).
        let op = op(iovecs.get(..1024).unwrap_or(iovecs));
        // SAFETY: the vectors, and what they name, are kept by the guard until the operation has
        // ended.
        let result = match unsafe { storage.submit_for(&reactor, op, guard.token(), purpose) } {
            Submission::Ready(result) => result,
            Submission::Pending => {
                guard.mark_started();
                (&mut guard).await
            }
        };
        if let Some(syncs) = storage.syncs() {
            syncs.note_end();
        }
        tried += 1;
        match (result, guard.into_kept()) {
            (Err(error), Some(kept)) if tried < TRIES && is_interruption(&error) => in_use = kept,
            (result, _) => return result,
        }
        if tried < TRIES_AT_ONCE {
            // The task that has to make room for it may be on this thread.
            yield_now().await;
        } else {
            reactor.sleep(TRY_PAUSE).await;
        }
    }
}

/// Nothing was done, and may be when it is tried again.
fn is_interruption(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

/// Reads `bufs.len()` bytes at `offset`. What lies past the end of the storage reads as zeros, but
/// for storage of fixed length: there nothing begins behind the end, unless the device has become
/// shorter or is gone, and zeros would be taken for what was there.
///
/// # Errors
/// What the storage reports.
pub fn read<'a>(
    from: impl Into<Target<'a>>,
    bufs: &IoBufs,
    offset: u64,
) -> impl Future<Output = io::Result<()>> {
    read_from(from.into(), bufs, offset)
}

async fn read_from(from: Target<'_>, bufs: &IoBufs, offset: u64) -> io::Result<()> {
    let storage = from.storage;
    let len = bufs.len() as u64;
    match storage.capacity().await? {
        Some(end) if offset >= end && len > 0 => Err(io::Error::from_raw_os_error(libc::EIO)),
        Some(end) if len > end.saturating_sub(offset) => {
            let within = (end - offset) as usize;
            bufs.slice(within, bufs.len() - within).zero();
            read_within(from, &bufs.slice(0, within), offset).await
        }
        _ => read_within(from, bufs, offset).await,
    }
}

/// Reads what does not reach past a fixed end.
async fn read_within(from: Target<'_>, bufs: &IoBufs, offset: u64) -> io::Result<()> {
    let limits = from.storage.limits();
    if !bufs.is_aligned(limits.memory_align)
        || !offset.is_multiple_of(limits.offset_align)
        || !(bufs.len() as u64).is_multiple_of(limits.offset_align)
    {
        return read_unaligned(from, bufs, offset).await;
    }
    let mut done = 0;
    while done < bufs.len() {
        let rest = bufs.slice(done, bufs.len() - done);
        let offset = offset + done as u64;
        let count = run(from, rest, |iovecs| Op::Read { iovecs, offset }).await?;
        if count == 0 {
            bufs.slice(done, bufs.len() - done).zero();
            return Ok(());
        }
        done += count as usize;
        if done < bufs.len() && !(done as u64).is_multiple_of(limits.offset_align) {
            // A direct read that ends unaligned has met the end of the file.
            bufs.slice(done, bufs.len() - done).zero();
            return Ok(());
        }
    }
    Ok(())
}

async fn read_unaligned(from: Target<'_>, bufs: &IoBufs, offset: u64) -> io::Result<()> {
    let bytes = Box::pin(read_blocks(from, offset, bufs.len())).await?;
    bufs.copy_from(&bytes);
    Ok(())
}

/// Bytes of a storage, in a buffer on loan from the thread.
#[derive(Debug)]
pub struct Borrowed {
    buffer: ScratchBuf,
    range: Range<usize>,
}

impl Deref for Borrowed {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buffer.get(self.range.clone()).unwrap_or(&[])
    }
}

/// Reads the blocks that `len` bytes at `offset` lie in.
async fn read_blocks(from: Target<'_>, offset: u64, len: usize) -> io::Result<Borrowed> {
    let align = from.storage.limits().offset_align.max(1);
    let start = offset / align * align;
    let end = (offset + len as u64).div_ceil(align) * align;
    let whole = (end - start) as usize;
    // Few sizes: buffers are kept by theirs.
    let buffer = ScratchBuf::new(whole.next_power_of_two());
    // SAFETY: `buffer` outlives the operation below.
    let bufs = unsafe { IoBufs::of(&buffer, 0, whole) };
    read_from(from, &bufs, start).await?;
    let skip = (offset - start) as usize;
    Ok(Borrowed {
        buffer,
        range: skip..skip + len,
    })
}

/// Writes all of `bufs` at `offset`.
///
/// # Errors
/// What the storage reports; some of the bytes may have been written then.
pub fn write<'a>(
    to: impl Into<Target<'a>>,
    bufs: &IoBufs,
    offset: u64,
) -> impl Future<Output = io::Result<()>> {
    write_to(to.into(), bufs, offset)
}

async fn write_to(to: Target<'_>, bufs: &IoBufs, offset: u64) -> io::Result<()> {
    let limits = to.storage.limits();
    if !offset.is_multiple_of(limits.offset_align)
        || !(bufs.len() as u64).is_multiple_of(limits.offset_align)
    {
        return write_unaligned(to, bufs, offset).await;
    }
    if !bufs.is_aligned(limits.memory_align) {
        let mut bounce = AlignedBuf::zeroed(bufs.len());
        bufs.copy_to(&mut bounce);
        // SAFETY: `bounce` outlives the operation below.
        let whole = unsafe { IoBufs::of(&bounce, 0, bounce.len()) };
        return Box::pin(write_to(to, &whole, offset)).await;
    }
    let mut done = 0;
    while done < bufs.len() {
        let rest = bufs.slice(done, bufs.len() - done);
        let offset = offset + done as u64;
        let count = run(to, rest, |iovecs| Op::Write { iovecs, offset }).await?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        done += count as usize;
    }
    Ok(())
}

/// Reads the blocks around an unaligned write and writes them whole. Callers must see to it that
/// nobody else writes those blocks meanwhile.
async fn write_unaligned(to: Target<'_>, bufs: &IoBufs, offset: u64) -> io::Result<()> {
    let align = to.storage.limits().offset_align.max(1);
    let start = offset / align * align;
    let end = (offset + bufs.len() as u64).div_ceil(align) * align;
    let mut bounce = AlignedBuf::zeroed((end - start) as usize);
    // SAFETY: `bounce` outlives the operations below.
    let whole = unsafe { IoBufs::of(&bounce, 0, bounce.len()) };
    Box::pin(read_from(to, &whole, start)).await?;
    let skip = (offset - start) as usize;
    if let Some(target) = bounce.get_mut(skip..) {
        bufs.copy_to(target);
    }
    Box::pin(write_to(to, &whole, start)).await
}

/// Makes everything written before this call stable.
///
/// # Errors
/// What the storage reports: nothing is known about what was written since the last sync then. Of
/// a file that is written through the page cache every later sync fails, too ([`Syncs`]). It is
/// waited for also when the caller does not: others would not hear of its failure.
pub async fn sync_shared(storage: &Arc<dyn Storage>) -> io::Result<()> {
    let storage = storage.clone();
    let sync = async move {
        let sync = run(Purpose::Flush.on(&*storage), IoBufs::empty(), |_| Op::Sync);
        Syncs::of(&storage).share(storage.name(), sync).await
    };
    carry_out(sync).await
}

/// As [`sync_shared`], of storage that is used for one piece of work: a failure of one that does
/// not say whose syncs it has is not remembered.
///
/// # Errors
/// As for [`sync_shared`].
pub async fn sync(storage: &dyn Storage) -> io::Result<()> {
    let sync = run(Purpose::Flush.on(storage), IoBufs::empty(), |_| Op::Sync);
    match storage.syncs() {
        Some(syncs) => syncs.share(storage.name(), sync).await,
        None => sync.await.map(drop),
    }
}

/// Makes `[offset, offset + len)` read as zeros, by the storage's own means where it has them.
/// With `unmap` the space may be given back.
///
/// # Errors
/// What the storage reports.
pub fn zero<'a>(
    to: impl Into<Target<'a>>,
    offset: u64,
    len: u64,
    unmap: bool,
) -> impl Future<Output = io::Result<()>> {
    zero_in(to.into(), offset, len, unmap)
}

async fn zero_in(to: Target<'_>, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let zero = run(to, IoBufs::empty(), |_| Op::Zero { offset, len, unmap });
    match zero.await {
        Ok(_) => Ok(()),
        Err(error) if cannot(&error) => write_zeros(to, offset, len).await,
        Err(error) => Err(error),
    }
}

/// Reserves space behind the end of the storage, where that makes later writes cheaper.
/// False: it does not, or there is no space; writes will tell.
pub async fn reserve(storage: &dyn Storage, offset: u64, len: u64) -> bool {
    let reserve = run(Purpose::Space.on(storage), IoBufs::empty(), |_| {
        Op::Reserve { offset, len }
    });
    reserve.await.is_ok()
}

/// Tells the storage that a range is no longer needed. It may do nothing.
///
/// # Errors
/// What the storage reports, except that it cannot do this.
pub fn discard<'a>(
    to: impl Into<Target<'a>>,
    offset: u64,
    len: u64,
) -> impl Future<Output = io::Result<()>> {
    discard_in(to.into(), offset, len)
}

async fn discard_in(to: Target<'_>, offset: u64, len: u64) -> io::Result<()> {
    let unmap = true;
    let discard = run(to, IoBufs::empty(), |_| Op::Zero { offset, len, unmap });
    match discard.await {
        Err(error) if !cannot(&error) => Err(error),
        _ => Ok(()),
    }
}

fn cannot(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

async fn write_zeros(to: Target<'_>, offset: u64, len: u64) -> io::Result<()> {
    let zeros = AlignedBuf::zeroed(ZERO_CHUNK.min(len as usize));
    let mut done = 0;
    while done < len {
        let now = (len - done).min(ZERO_CHUNK as u64);
        // SAFETY: `zeros` outlives the operation.
        let bufs = unsafe { IoBufs::of(&zeros, 0, now as usize) };
        write_to(to, &bufs, offset + done).await?;
        done += now;
    }
    Ok(())
}

/// Reads `len` bytes at `offset` into a new buffer.
///
/// # Errors
/// What the storage reports.
pub fn read_buf<'a>(
    from: impl Into<Target<'a>>,
    offset: u64,
    len: usize,
) -> impl Future<Output = io::Result<AlignedBuf>> {
    read_new(from.into(), offset, len)
}

async fn read_new(from: Target<'_>, offset: u64, len: usize) -> io::Result<AlignedBuf> {
    let buffer = AlignedBuf::zeroed(len);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
    read_from(from, &bufs, offset).await?;
    Ok(buffer)
}

/// As [`read_buf`], with an error that says which file, and where.
///
/// # Errors
/// What the storage reports.
pub fn fetch<'a>(
    from: impl Into<Target<'a>>,
    offset: u64,
    len: usize,
) -> impl Future<Output = crate::error::Result<AlignedBuf>> {
    let from = from.into();
    async move {
        let read = read_new(from, offset, len).await;
        read.map_err(|error| failed_read(from, offset, &error))
    }
}

fn failed_read(from: Target<'_>, offset: u64, error: &io::Error) -> Error {
    let words = from.purpose.words();
    Error::io_of(Action::Read, words, from.storage.name(), offset, error)
}

/// As [`fetch`], but for a moment, and wherever the bytes begin and end: into memory that is neither
/// new nor cleared, and not copied from there.
///
/// # Errors
/// What the storage reports, with the file and the place.
pub fn borrow<'a>(
    from: impl Into<Target<'a>>,
    offset: u64,
    len: usize,
) -> impl Future<Output = crate::error::Result<Borrowed>> {
    let from = from.into();
    async move {
        let read = read_blocks(from, offset, len).await;
        read.map_err(|error| failed_read(from, offset, &error))
    }
}

/// Writes `bytes` at `offset`.
///
/// # Errors
/// What the storage reports.
pub fn write_buf<'a>(
    to: impl Into<Target<'a>>,
    offset: u64,
    bytes: &AlignedBuf,
) -> impl Future<Output = io::Result<()>> {
    write_bytes(to.into(), offset, bytes)
}

async fn write_bytes(to: Target<'_>, offset: u64, bytes: &AlignedBuf) -> io::Result<()> {
    // SAFETY: `bytes` is borrowed for the whole operation.
    let bufs = unsafe { IoBufs::of(bytes, 0, bytes.len()) };
    write_to(to, &bufs, offset).await
}

#[cfg(test)]
mod tests {
    //! What would be caught: zeros, or no answer at all, for what lies behind the end of a device;
    //! bytes from the wrong place of their blocks, more or fewer than were
    //! asked for, those of an earlier use past the storage's end, and memory that is new for each
    //! use; a short transfer that counts as a whole one, or is gone on with at the wrong place of
    //! the storage or of memory; an interruption that is an error, or a done thing, or waited for
    //! without end.

    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::storage::Window;
    use crate::storage::fault::FaultStorage;
    use crate::storage::memory::MemoryStorage;

    /// Bytes that tell where they belong.
    fn pattern(len: usize, seed: u64) -> Vec<u8> {
        (0..len as u64)
            .map(|n| (n / 3 + n * n / 251 + seed * 17) as u8)
            .collect()
    }

    #[test]
    fn short_and_interrupted_transfers_move_every_byte_to_its_place() {
        let reactor = Reactor::for_this_thread().unwrap();
        for seed in 0..200 {
            let storage = MemoryStorage::new(pattern(20_000, 0));
            storage.uneven(Some(seed));
            let mut expected = pattern(20_000, 0);
            let at = seed as usize * 37 + 1;
            // Three vectors of different lengths, and bytes of others around them.
            let mut new = AlignedBuf::copy_of(&pattern(6000, seed + 1));
            // SAFETY: `new` outlives the operations.
            let bufs = |buffer: &AlignedBuf| unsafe {
                IoBufs::joined(&[
                    IoBufs::of(buffer, 0, 1000),
                    IoBufs::of(buffer, 1700, 11),
                    IoBufs::of(buffer, 2000, 3000),
                ])
            };
            let parts = [0..1000, 1700..1711, 2000..5000];
            let vectors = bufs(&new);
            reactor
                .block_on(write(&storage, &vectors, at as u64))
                .unwrap();
            let mut to = at;
            for part in &parts {
                let bytes = new.get(part.clone()).unwrap();
                expected
                    .get_mut(to..to + part.len())
                    .unwrap()
                    .copy_from_slice(bytes);
                to += part.len();
            }
            assert!(storage.snapshot() == expected, "seed {seed}: written");
            let mut wanted = new.to_vec();
            new.fill(0xee);
            for (index, byte) in wanted.iter_mut().enumerate() {
                if !parts.iter().any(|part| part.contains(&index)) {
                    *byte = 0xee;
                }
            }
            reactor
                .block_on(read(&storage, &vectors, at as u64))
                .unwrap();
            assert!(*new == *wanted, "seed {seed}: read");
            // A read over the end is zeros from there on.
            let over = reactor.block_on(read_buf(&storage, 15_000, 8000)).unwrap();
            let mut wanted = expected.get(15_000..).unwrap().to_vec();
            wanted.resize(8000, 0);
            assert!(*over == *wanted, "seed {seed}: over the end");
            reactor
                .block_on(zero(&storage, at as u64, 999, true))
                .unwrap();
            expected.get_mut(at..at + 999).unwrap().fill(0);
            assert!(storage.snapshot() == expected, "seed {seed}: zeroed");
            storage.record();
            reactor.block_on(sync(&storage)).unwrap();
            reactor.block_on(discard(&storage, 0, 10)).unwrap();
            assert_eq!(storage.take_log().len(), 2, "seed {seed}");
        }
        Reactor::leave_thread();
    }

    #[test]
    fn what_is_interrupted_for_ever_fails_in_the_end() {
        let reactor = Reactor::for_this_thread().unwrap();
        let storage = MemoryStorage::new(vec![0; 512]);
        storage.fail_after(0, libc::EAGAIN);
        let error = reactor.block_on(sync(&storage)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
        Reactor::leave_thread();
    }

    #[test]
    fn bytes_off_the_blocks_are_those_asked_for_in_memory_used_before() {
        let bytes: Vec<u8> = (0..70_000u32).map(|n| (n / 7) as u8).collect();
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        let storage = FaultStorage::over(storage).with_blocks(4096, 4096);
        let reactor = Reactor::for_this_thread().unwrap();
        let mut places = Vec::new();
        for (offset, len) in [
            (512, 33_000),
            (20_480, 36_864),
            (4095, 40_001),
            (40_000, 30_500),
        ] {
            let borrowed = reactor
                .block_on(borrow(&storage, offset as u64, len))
                .unwrap();
            let mut wanted = bytes.get(offset..).unwrap().to_vec();
            wanted.resize(len, 0);
            assert!(*borrowed == *wanted, "{len} bytes at {offset}");
            places.push(borrowed.buffer.as_ptr());
            drop(borrowed);
            let read = reactor.block_on(read_buf(&storage, offset as u64, len));
            assert!(
                **read.as_ref().unwrap() == *wanted,
                "{len} at {offset}, by `read`"
            );
        }
        places.dedup();
        assert_eq!(places.len(), 1, "new memory for each");
        Reactor::leave_thread();
    }

    /// A device may become shorter, and an image point behind its end.
    #[test]
    fn nothing_begins_behind_a_fixed_end() {
        let bytes = Arc::new(MemoryStorage::new(vec![7; 8192]));
        let reactor = Reactor::for_this_thread().unwrap();
        let window = reactor.block_on(Window::of(bytes, 0, Some(4096))).unwrap();
        let read = |offset, len| reactor.block_on(read_buf(&*window, offset, len));
        let across = read(3584, 1024).unwrap();
        assert!(across[..512].iter().all(|&byte| byte == 7));
        assert!(across[512..].iter().all(|&byte| byte == 0));
        for offset in [4096, 4608, 1 << 40, u64::MAX - 511] {
            let error = read(offset, 512).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "at {offset}");
        }
        assert_eq!(read(4608, 0).unwrap().len(), 0);
        Reactor::leave_thread();
    }
}
