//! A part of another storage, as storage of its own: raw's `offset` and `size`.
//!
//! Everything is moved by the offset, and nothing reaches past the part's end: what lies behind
//! it is not ours.

use std::any::Any;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::{
    Access, Answer, Limits, Op, Purpose, Storage, Submission, Syncs, Watches, at_once, later,
};
use crate::error::{Action, Error, Result};
use crate::reactor::{Reactor, Token};

/// Raw disks are counted in sectors of this many bytes.
const SECTOR: u64 = 512;

/// A window of a storage.
#[derive(Debug)]
pub struct Window {
    inner: Arc<dyn Storage>,
    /// Those of the storage as a whole: what is lost there is lost for all who are in it.
    syncs: Arc<Syncs>,
    offset: u64,
    /// Where it ends, if not where the storage does.
    size: Option<u64>,
    /// Shared by all windows that stand for one another.
    watches: Arc<Watches>,
}

impl Window {
    /// The part of `inner` that begins at `offset`: `size` bytes, or all that follows. `inner`
    /// itself when that is the whole.
    ///
    /// # Errors
    /// When the part is not within the storage, or does not consist of whole blocks of it: to
    /// write a part of a block the rest must be written too, over what others write there.
    pub async fn of(
        inner: Arc<dyn Storage>,
        offset: u64,
        size: Option<u64>,
    ) -> Result<Arc<dyn Storage>> {
        if offset == 0 && size.is_none() {
            return Ok(inner);
        }
        let name = inner.name();
        let read = |error| Error::io(Action::Read, name, 0, &error);
        let len = inner.len().await.map_err(read)?;
        let capacity = inner.capacity().await.map_err(read)?;
        if offset > len {
            return Err(Error::Invalid(format!(
                "{name}: Offset ({offset}) cannot be greater than size of the containing file \
                 ({len})"
            )));
        }
        if let Some(size) = size
            && size > len - offset
        {
            return Err(Error::Invalid(format!(
                "{name}: The sum of offset ({offset}) and size ({size}) has to be smaller or equal \
                 to the actual size of the containing file ({len})"
            )));
        }
        let block = inner.limits().offset_align.max(1);
        whole("offset", offset, block, name)?;
        match (size, capacity) {
            (Some(size), _) => {
                whole("size", size, SECTOR, name)?;
                whole("size", size, block, name)?;
            }
            // The last sector would end behind the end of what is there for good.
            (None, Some(end)) => whole(
                "the rest behind the offset",
                end.saturating_sub(offset),
                SECTOR.max(block),
                name,
            )?,
            (None, None) => {}
        }
        Ok(Arc::new(Self {
            syncs: Syncs::of(&inner),
            inner,
            offset,
            size,
            watches: Arc::default(),
        }))
    }

    /// Where `[offset, offset + len)` is in the storage below.
    ///
    /// # Errors
    /// With error number `past`, when it is not within the window.
    fn place(&self, offset: u64, len: u64, past: i32) -> io::Result<u64> {
        let end = offset.checked_add(len);
        let end = end.filter(|end| self.size.is_none_or(|size| *end <= size));
        end.and_then(|end| end.checked_add(self.offset))
            .and_then(|end| end.checked_sub(len))
            .ok_or_else(|| io::Error::from_raw_os_error(past))
    }

    fn moved<'a>(&self, op: Op<'a>) -> io::Result<Op<'a>> {
        let len = |iovecs: &[libc::iovec]| iovecs.iter().map(|iovec| iovec.iov_len as u64).sum();
        Ok(match op {
            Op::Read { iovecs, offset } => Op::Read {
                iovecs,
                offset: self.place(offset, len(iovecs), libc::EINVAL)?,
            },
            Op::Write { iovecs, offset } => Op::Write {
                iovecs,
                offset: self.place(offset, len(iovecs), libc::ENOSPC)?,
            },
            Op::Sync => Op::Sync,
            // There is nothing behind the end to reserve.
            Op::Reserve { .. } if self.size.is_some() => {
                return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
            }
            Op::Reserve { offset, len } => Op::Reserve {
                offset: self.place(offset, len, libc::ENOSPC)?,
                len,
            },
            Op::Zero { offset, len, unmap } => {
                // What is given back may end behind the window, where there is nothing to do.
                let rest = self.size.unwrap_or(u64::MAX).saturating_sub(offset);
                let len = if unmap { len.min(rest) } else { len };
                Op::Zero {
                    offset: self.place(offset, len, libc::ENOSPC)?,
                    len,
                    unmap,
                }
            }
        })
    }
}

/// Refuses `value` unless it is a multiple of `unit` bytes.
fn whole(what: &str, value: u64, unit: u64, name: &str) -> Result<()> {
    if value.is_multiple_of(unit) {
        return Ok(());
    }
    let advice = if unit > SECTOR || what == "offset" {
        ", or cache.direct=off if the blocks are those of direct I/O"
    } else {
        ""
    };
    Err(Error::Invalid(format!(
        "{name}: {what} ({value}) is not a multiple of {unit} bytes: a guest's write would change \
         what is beside it (expected {} or {}{advice})",
        value / unit * unit,
        value.next_multiple_of(unit),
    )))
}

impl Storage for Window {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        match self.moved(op) {
            // SAFETY: the memory is the caller's, who keeps it valid.
            Ok(op) => unsafe { self.inner.submit(reactor, op, token) },
            Err(error) => Submission::Ready(Err(error)),
        }
    }

    unsafe fn submit_for(
        &self,
        reactor: &Reactor,
        op: Op<'_>,
        token: Token,
        purpose: Purpose,
    ) -> Submission {
        self.watches.note_op(&op);
        match self.moved(op) {
            // SAFETY: the memory is the caller's, who keeps it valid.
            Ok(op) => unsafe { self.inner.submit_for(reactor, op, token, purpose) },
            Err(error) => Submission::Ready(Err(error)),
        }
    }

    fn len(&self) -> Answer<'_, io::Result<u64>> {
        later(async {
            let rest = self.inner.len().await?.saturating_sub(self.offset);
            Ok(self.size.map_or(rest, |size| size.min(rest)))
        })
    }

    fn capacity(&self) -> Answer<'_, io::Result<Option<u64>>> {
        if self.size.is_some() {
            return at_once(Ok(self.size));
        }
        later(async {
            let capacity = self.inner.capacity().await?;
            Ok(capacity.map(|capacity| capacity.saturating_sub(self.offset)))
        })
    }

    fn set_len(&self, len: u64) -> Answer<'_, io::Result<()>> {
        match self.size {
            // As a block device: nothing is cut off, and it does not grow.
            Some(size) if len <= size => at_once(Ok(())),
            Some(_) => at_once(Err(io::Error::from_raw_os_error(libc::ENOSPC))),
            None => match self.place(len, 0, libc::EFBIG) {
                Ok(len) => self.inner.set_len(len),
                Err(error) => at_once(Err(error)),
            },
        }
    }

    fn limits(&self) -> Limits {
        let limits = self.inner.limits();
        Limits {
            zero_past_end: limits.zero_past_end && self.size.is_none(),
            ..limits
        }
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn writable(&self) -> bool {
        self.inner.writable()
    }

    fn set_access(&self, access: Access) -> Answer<'_, io::Result<()>> {
        self.inner.set_access(access)
    }

    fn over(&self, inner: &Arc<dyn Storage>) -> Option<Arc<dyn Storage>> {
        Some(Arc::new(Self {
            inner: inner.clone(),
            syncs: Syncs::of(inner),
            offset: self.offset,
            size: self.size,
            watches: self.watches.clone(),
        }))
    }

    fn identity(&self) -> Option<[u64; 2]> {
        self.inner.identity()
    }

    fn allocated(&self) -> Answer<'_, io::Result<u64>> {
        self.inner.allocated()
    }

    fn allocated_before(&self) -> u64 {
        self.inner.allocated_before()
    }

    fn outlives_process(&self) -> bool {
        self.inner.outlives_process()
    }

    fn hold(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        self.inner.hold()
    }

    fn syncs(&self) -> Option<&Arc<Syncs>> {
        Some(&self.syncs)
    }

    fn watches(&self) -> Option<&Watches> {
        Some(&self.watches)
    }

    fn note_write(&self, offset: u64, len: u64) {
        self.watches.note(offset, len);
        self.inner
            .note_write(offset.saturating_add(self.offset), len);
    }

    fn call_since(&self) -> Option<Instant> {
        self.inner.call_since()
    }

    fn next_data(&self, offset: u64) -> Answer<'_, Option<(u64, u64)>> {
        let from = offset.checked_add(self.offset);
        let from = from.filter(|_| self.size.is_none_or(|size| offset < size));
        let Some(from) = from else {
            return at_once(None);
        };
        later(async move {
            let (start, end) = self.inner.next_data(from).await?;
            let start = start.saturating_sub(self.offset);
            let end = end.saturating_sub(self.offset);
            let size = self.size.unwrap_or(u64::MAX);
            (start < size).then_some((start, end.min(size)))
        })
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: an operation at another place, one that reaches past the window's
    //! end, ends that are told wrong, and parts of blocks that are taken for whole ones.

    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::storage::fault::FaultStorage;
    use crate::storage::memory::MemoryStorage;
    use crate::storage::{AlignedBuf, io as storage_io};

    const LEN: usize = 16 << 10;

    fn memory() -> Arc<MemoryStorage> {
        Arc::new(MemoryStorage::new(
            (0..LEN).map(|at| (at / 512) as u8).collect(),
        ))
    }

    fn window(inner: &Arc<MemoryStorage>, offset: u64, size: Option<u64>) -> Arc<dyn Storage> {
        wait(Window::of(inner.clone(), offset, size)).unwrap()
    }

    fn wait<T>(future: impl Future<Output = T>) -> T {
        Reactor::for_this_thread().unwrap().block_on(future)
    }

    fn bytes(value: u8, len: usize) -> AlignedBuf {
        let mut buffer = AlignedBuf::zeroed(len);
        buffer.fill(value);
        buffer
    }

    #[test]
    fn every_operation_keeps_to_its_window() {
        let inner = memory();
        let reactor = Reactor::for_this_thread().unwrap();
        let outer = window(&inner, 1024, Some(8192));
        for (window, start, end) in [
            (outer.clone(), 1024, 9216),
            // A window of a window.
            (
                wait(Window::of(outer, 512, Some(1024))).unwrap(),
                1536,
                2560,
            ),
        ] {
            let before = inner.snapshot();
            let len = (end - start) as u64;
            assert_eq!(
                (
                    wait(window.len()).unwrap(),
                    wait(window.capacity()).unwrap()
                ),
                (len, Some(len))
            );
            // Across the end: what is there, and zeros.
            let read = reactor
                .block_on(storage_io::read_buf(&*window, len - 512, 2048))
                .unwrap();
            assert!(read[..512] == before[end - 512..end] && read[512..].iter().all(|b| *b == 0));
            let written = reactor.block_on(async {
                storage_io::write_buf(&*window, 0, &bytes(0xaa, 512))
                    .await
                    .unwrap();
                storage_io::zero(&*window, len - 512, 512, false)
                    .await
                    .unwrap();
                let past = storage_io::write_buf(&*window, len - 512, &bytes(0xbb, 1024)).await;
                let zeroed = storage_io::zero(&*window, len - 512, 1024, false).await;
                let far = storage_io::write_buf(&*window, u64::MAX - 511, &bytes(0xbb, 512)).await;
                storage_io::discard(&*window, len - 512, 1024)
                    .await
                    .unwrap();
                [past, zeroed, far]
            });
            for result in written {
                assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
            }
            assert_eq!(
                wait(window.set_len(len + 1)).unwrap_err().raw_os_error(),
                Some(libc::ENOSPC)
            );
            wait(window.set_len(512)).unwrap();
            let mut expected = before;
            expected[start..start + 512].fill(0xaa);
            expected[end - 512..end].fill(0);
            assert!(inner.snapshot() == expected);
        }
        Reactor::leave_thread();
    }

    #[test]
    fn a_window_without_a_size_grows_with_its_file() {
        let inner = memory();
        let reactor = Reactor::for_this_thread().unwrap();
        let window = window(&inner, 1024, None);
        let end = wait(window.len()).unwrap();
        let capacity = wait(window.capacity()).unwrap();
        assert_eq!((end, capacity), (LEN as u64 - 1024, None));
        reactor
            .block_on(storage_io::write_buf(&*window, end, &bytes(0xaa, 512)))
            .unwrap();
        assert_eq!(inner.snapshot()[LEN..], [0xaa; 512]);
        wait(window.set_len(4096)).unwrap();
        let ends = [inner.len(), window.len()].map(|len| wait(len).unwrap());
        assert_eq!(ends, [5120, 4096]);
        assert!(wait(window.set_len(u64::MAX)).is_err());
        Reactor::leave_thread();
    }

    #[test]
    fn data_and_holes_are_those_within() {
        let holes = || Arc::new(FaultStorage::over(memory()).with_data(4096..12288));
        let data = |offset, size, at| {
            let window = wait(Window::of(holes(), offset, size)).unwrap();
            wait(window.next_data(at))
        };
        assert_eq!(data(1024, Some(2048), 0), None);
        assert_eq!(data(1024, Some(8192), 0), Some((3072, 8192)));
        assert_eq!(data(1024, Some(8192), 8192), None);
        assert_eq!(data(5120, None, 1024), Some((1024, 7168)));
        assert_eq!(data(5120, None, 7168), None);
    }

    #[test]
    fn parts_of_blocks_are_refused() {
        let small: Arc<dyn Storage> = memory();
        let large: Arc<dyn Storage> = Arc::new(FaultStorage::over(memory()).with_blocks(512, 4096));
        let odd = window(&memory(), 100, Some(8192));
        for (inner, offset, size, expected) in [
            (
                &small,
                0,
                Some(1000),
                "size (1000) is not a multiple of 512",
            ),
            (
                &small,
                0,
                Some(LEN as u64 + 512),
                "has to be smaller or equal",
            ),
            (&small, LEN as u64 + 1, None, "cannot be greater"),
            (&large, 512, None, "expected 0 or 4096, or cache.direct=off"),
            (
                &large,
                4096,
                Some(512),
                "size (512) is not a multiple of 4096",
            ),
            (&odd, 100, None, "the rest behind the offset (8092)"),
        ] {
            let window = wait(Window::of(inner.clone(), offset, size));
            let error = window.unwrap_err().to_string();
            assert!(error.contains(expected), "{offset} {size:?}: {error}");
        }
        // A file grows by what its last sector lacks.
        assert!(wait(Window::of(small.clone(), 100, None)).is_ok());
        assert!(wait(Window::of(large, 4096, Some(4096))).is_ok());
        assert!(Arc::ptr_eq(
            &wait(Window::of(small.clone(), 0, None)).unwrap(),
            &small
        ));
    }
}
