//! Buffers for I/O: aligned memory of our own, and lists of memory, ours or a guest's.
//!
//! An operation that nobody waits for any more still uses its memory. So a list keeps what its
//! ranges are in, and goes with the operation.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

/// Alignment of every [`AlignedBuf`]: enough for direct I/O on any disk.
pub const BUFFER_ALIGN: usize = 4096;

/// Bytes of used buffers that a thread keeps for the next copy.
const KEPT_BYTES: usize = 16 << 20;
/// Smaller buffers are not worth keeping.
const KEPT_LEAST: usize = 16 << 10;

thread_local! {
    static KEPT: RefCell<Vec<AlignedBuf>> = const { RefCell::new(Vec::new()) };
}

/// Heap memory aligned to 4 KiB; zeroed when new.
pub struct AlignedBuf {
    start: NonNull<u8>,
    len: usize,
    /// Shared with the lists of its parts. None for nothing.
    memory: Option<Arc<Memory>>,
}

/// The memory of a buffer: it is freed when neither the buffer nor an operation uses it.
struct Memory {
    start: NonNull<u8>,
    len: usize,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `AlignedBuf::zeroed` with the same layout.
        unsafe { dealloc(self.start.as_ptr(), AlignedBuf::layout(self.len)) };
    }
}

// SAFETY: it is a mere allocation.
unsafe impl Send for Memory {}
// SAFETY: as above; nothing is done through references.
unsafe impl Sync for Memory {}

/// A buffer on loan from its thread: copies of large ranges follow one another, and new memory
/// for each costs more than the copying.
#[derive(Debug)]
pub struct ScratchBuf(AlignedBuf);

impl ScratchBuf {
    /// A buffer of `len` bytes with some contents or other.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let kept = KEPT.with_borrow_mut(|kept| {
            let index = kept.iter().rposition(|buffer| buffer.len == len)?;
            Some(kept.swap_remove(index))
        });
        Self(kept.unwrap_or_else(|| AlignedBuf::zeroed(len)))
    }
}

impl Drop for ScratchBuf {
    fn drop(&mut self) {
        // An operation may go on with it.
        let is_free = self
            .0
            .memory
            .as_mut()
            .is_some_and(|memory| Arc::get_mut(memory).is_some());
        if self.0.len < KEPT_LEAST || !is_free {
            return;
        }
        let buffer = std::mem::replace(&mut self.0, AlignedBuf::EMPTY);
        // While the thread ends there is nothing to keep it for.
        let _ = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            while kept.iter().map(|b| b.len).sum::<usize>() + buffer.len > KEPT_BYTES {
                if kept.is_empty() {
                    return;
                }
                kept.swap_remove(0);
            }
            kept.push(buffer);
        });
    }
}

impl Deref for ScratchBuf {
    type Target = AlignedBuf;

    fn deref(&self) -> &AlignedBuf {
        &self.0
    }
}

impl DerefMut for ScratchBuf {
    fn deref_mut(&mut self) -> &mut AlignedBuf {
        &mut self.0
    }
}

// SAFETY: the buffer owns its memory alone, like a Vec<u8>.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared references only read.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    const EMPTY: Self = Self {
        start: NonNull::dangling(),
        len: 0,
        memory: None,
    };

    /// A zeroed buffer of `len` bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self::EMPTY;
        }
        let layout = Self::layout(len);
        // SAFETY: the layout has a size above zero.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        Self {
            start,
            len,
            memory: Some(Arc::new(Memory { start, len })),
        }
    }

    /// A buffer that holds `bytes`.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    fn layout(len: usize) -> Layout {
        // A size near isize::MAX cannot be allocated anyway; the error is the allocator's.
        Layout::from_size_align(len, BUFFER_ALIGN)
            .unwrap_or_else(|_| handle_alloc_error(Layout::new::<[u8; BUFFER_ALIGN]>()))
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes are owned by self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and self is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// A list of memory ranges that a request reads from or writes to: guest pages, or parts of our
/// own buffers. It keeps what they are in, as far as it knows it.
///
/// Clones, and slices that are the whole list, share the vectors: requests are cut into parts at
/// each step of their way, and most are not longer than a part.
#[derive(Clone)]
pub struct IoBufs {
    iovecs: Rc<[libc::iovec]>,
    len: usize,
    keep: Keep,
}

/// What ranges are in.
#[allow(dead_code, reason = "held, and not looked at")]
#[derive(Clone)]
enum Keep {
    Nothing,
    One(Arc<dyn Any + Send + Sync>),
    All(Rc<[Keep]>),
}

impl Keep {
    fn and(self, other: &Self) -> Self {
        match (self, other) {
            (own, Self::Nothing) => own,
            (Self::Nothing, other) => other.clone(),
            (own, other) => Self::All(Rc::new([own, other.clone()])),
        }
    }
}

impl IoBufs {
    /// A list of ranges.
    ///
    /// # Safety
    /// Every range stays valid for reads and writes by anyone (guest memory may change at any
    /// time) for as long as this value, its clones and slices, and operations on them live; or for
    /// as long as what it is told to [keep](Self::keeping) is kept.
    #[must_use]
    pub unsafe fn new(iovecs: &[libc::iovec]) -> Self {
        Self {
            iovecs: Rc::from(iovecs),
            len: iovecs.iter().map(|v| v.iov_len).sum(),
            keep: Keep::Nothing,
        }
    }

    /// As long as this list, a part of it or an operation on one is there, `what` is too.
    #[must_use]
    pub fn keeping(mut self, what: Arc<dyn Any + Send + Sync>) -> Self {
        self.keep = self.keep.and(&Keep::One(what));
        self
    }

    /// A list of nothing.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            iovecs: Rc::new([]),
            len: 0,
            keep: Keep::Nothing,
        }
    }

    /// The part `[start, start + len)` of `buffer`, clipped to it. Its memory stays as long as the
    /// list and operations on it.
    ///
    /// # Safety
    /// While an operation reads into the list, nobody else looks at that part of `buffer`; while
    /// one writes from it, nobody changes it.
    #[must_use]
    pub unsafe fn of(buffer: &AlignedBuf, start: usize, len: usize) -> Self {
        let start = start.min(buffer.len);
        let len = len.min(buffer.len - start);
        if len == 0 {
            // A vector of nothing has no address, and would not be aligned to anything.
            return Self::empty();
        }
        // SAFETY: `start` is within the buffer.
        let base = unsafe { buffer.start.as_ptr().add(start) };
        Self {
            iovecs: Rc::new([libc::iovec {
                iov_base: base.cast(),
                iov_len: len,
            }]),
            len,
            keep: match &buffer.memory {
                Some(memory) => Keep::One(memory.clone()),
                None => Keep::Nothing,
            },
        }
    }

    /// Total length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a list of nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The ranges.
    #[must_use]
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// The ranges of `[start, start + len)`, clipped to the list.
    #[must_use]
    pub fn slice(&self, start: usize, len: usize) -> Self {
        if start == 0 && len >= self.len {
            return self.clone();
        }
        let mut iovecs = Vec::with_capacity(self.iovecs.len());
        slice_iovecs(&self.iovecs, start, len, |iovec| iovecs.push(iovec));
        Self {
            len: iovecs.iter().map(|v| v.iov_len).sum(),
            iovecs: iovecs.into(),
            keep: self.keep.clone(),
        }
    }

    /// The ranges of all `parts`, one after the other.
    #[must_use]
    pub fn joined(parts: &[Self]) -> Self {
        let iovecs: Vec<_> = parts
            .iter()
            .flat_map(|part| part.iovecs())
            .copied()
            .collect();
        let keep = parts.iter().map(|part| &part.keep);
        Self {
            iovecs: iovecs.into(),
            len: parts.iter().map(Self::len).sum(),
            keep: keep.fold(Keep::Nothing, Keep::and),
        }
    }

    /// True when every address and every length is a multiple of what `limits` ask for memory.
    #[must_use]
    pub fn is_aligned(&self, align: usize) -> bool {
        iovecs_aligned(&self.iovecs, align)
    }

    /// Whether all of it is zero; see [`iovecs_are_zero`].
    #[must_use]
    pub fn is_zero(&self) -> bool {
        // SAFETY: the ranges are valid by the contract of `new`.
        unsafe { iovecs_are_zero(&self.iovecs) }
    }

    /// Fills all of it with zeros.
    pub fn zero(&self) {
        for iovec in &*self.iovecs {
            // SAFETY: the ranges are valid by the contract of `new`.
            unsafe { std::ptr::write_bytes(iovec.iov_base.cast::<u8>(), 0, iovec.iov_len) };
        }
    }

    /// Copies from `source` into the ranges; returns the bytes copied.
    pub fn copy_from(&self, mut source: &[u8]) -> usize {
        let all = source.len();
        for iovec in &*self.iovecs {
            let (now, rest) = source.split_at(iovec.iov_len.min(source.len()));
            // SAFETY: the range is valid and at least as long as `now`; `copy` allows overlap.
            unsafe { std::ptr::copy(now.as_ptr(), iovec.iov_base.cast::<u8>(), now.len()) };
            source = rest;
        }
        all - source.len()
    }

    /// Copies the ranges into `target`; returns the bytes copied.
    pub fn copy_to(&self, target: &mut [u8]) -> usize {
        let mut done = 0;
        for iovec in &*self.iovecs {
            let rest = target.get_mut(done..).unwrap_or(&mut []);
            let now = iovec.iov_len.min(rest.len());
            // SAFETY: the range is valid and at least `now` long; `copy` allows overlap.
            unsafe { std::ptr::copy(iovec.iov_base.cast::<u8>(), rest.as_mut_ptr(), now) };
            done += now;
        }
        done
    }
}

impl std::fmt::Debug for IoBufs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBufs({} bytes in {})", self.len, self.iovecs.len())
    }
}

/// Whether all bytes are zero: in blocks, which the compiler turns into vector instructions.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut blocks = bytes.chunks_exact(256);
    blocks
        .by_ref()
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && blocks.remainder().iter().all(|&byte| byte == 0)
}

/// Whether ranges have nothing but zeros. Who changes them meanwhile may get either answer.
///
/// # Safety
/// The ranges are valid for reads.
#[must_use]
pub unsafe fn iovecs_are_zero(iovecs: &[libc::iovec]) -> bool {
    let mut copy = [0; 4096];
    iovecs.iter().all(|iovec| {
        (0..iovec.iov_len).step_by(copy.len()).all(|start| {
            let now = copy.len().min(iovec.iov_len - start);
            // SAFETY: valid by contract, and `start + now` is within the range. It is copied, since
            // a guest may change it at any time.
            unsafe {
                let from = iovec.iov_base.cast::<u8>().add(start);
                std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), now);
            }
            copy.get(..now).is_some_and(is_zero)
        })
    })
}

/// Calls `push` with the vectors that cover `[start, start + len)` of `iovecs`.
pub fn slice_iovecs(
    iovecs: &[libc::iovec],
    mut start: usize,
    mut len: usize,
    mut push: impl FnMut(libc::iovec),
) {
    for iovec in iovecs {
        if len == 0 {
            return;
        }
        if start >= iovec.iov_len {
            start -= iovec.iov_len;
            continue;
        }
        let now = (iovec.iov_len - start).min(len);
        push(libc::iovec {
            iov_base: iovec.iov_base.cast::<u8>().wrapping_add(start).cast(),
            iov_len: now,
        });
        len -= now;
        start = 0;
    }
}

/// True when addresses and lengths are multiples of `align`.
#[must_use]
pub fn iovecs_aligned(iovecs: &[libc::iovec], align: usize) -> bool {
    align <= 1
        || iovecs
            .iter()
            .all(|v| (v.iov_base as usize).is_multiple_of(align) && v.iov_len % align == 0)
}
