//! Storage for fuzzing: the seed's bytes with pages of changes over them, and a watch on
//! writes where none may be.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use stratablk::reactor::{Reactor, Token};
use stratablk::storage::{Answer, IoBufs, Limits, Op, Storage, Submission, at_once};

const PAGE: usize = 4096;
/// How far behind its end an image may grow in one run, beside 96 clusters: a run writes at most
/// 24 times, 128 KiB each, and what it frees is used again only after a flush.
const SLACK: u64 = 16 << 20;
/// Nobody reads more at a time than QEMU's limit for a bitmap directory.
const LARGEST_READ: usize = 64 << 20;

/// An image in memory.
#[derive(Debug)]
pub struct SparseStorage {
    base: Arc<[u8]>,
    /// Writes behind this are a find.
    limit: AtomicU64,
    align: u64,
    changes: Mutex<Changes>,
}

#[derive(Debug, Default)]
struct Changes {
    pages: HashMap<usize, Box<[u8]>>,
    len: u64,
}

impl SparseStorage {
    /// Storage that holds `base`, of an image with clusters of `cluster` bytes; offsets and
    /// lengths must be multiples of `align`.
    #[must_use]
    pub fn new(base: Arc<[u8]>, cluster: u64, align: u64) -> Self {
        let len = base.len() as u64;
        Self {
            limit: AtomicU64::new(len + SLACK + 96 * cluster),
            align,
            base,
            changes: Mutex::new(Changes {
                pages: HashMap::new(),
                len,
            }),
        }
    }

    /// Overwrites some bytes of the image: damage, not a write.
    pub fn patch(&self, offset: u64, bytes: &[u8]) {
        let mut changes = self.changes();
        if offset.saturating_add(bytes.len() as u64) <= changes.len {
            changes.put(&self.base, offset as usize, bytes);
        }
    }

    /// Lets writes go anywhere: a repair puts what it moves behind all that counts as used, and
    /// damaged refcounts say that far away.
    pub fn without_limit(&self) {
        self.limit.store(u64::MAX, Ordering::Relaxed);
    }

    /// Where its bytes end.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.changes().len
    }

    /// The bytes of `[offset, offset + len)`, as far as there are any.
    #[must_use]
    pub fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        self.changes().get(&self.base, offset, len)
    }

    fn changes(&self) -> std::sync::MutexGuard<'_, Changes> {
        self.changes.lock().unwrap()
    }

    fn check(&self, what: &str, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        assert!(
            end <= self.limit.load(Ordering::Relaxed),
            "{what} of {len} bytes at {offset:#x} of an image of {:#x} bytes",
            self.base.len()
        );
        assert!(
            offset.is_multiple_of(self.align) && len.is_multiple_of(self.align),
            "{what} of {len} bytes at {offset:#x}: not aligned to {}",
            self.align
        );
    }
}

impl Changes {
    fn page<'a>(&'a mut self, base: &[u8], number: usize) -> &'a mut [u8] {
        self.pages.entry(number).or_insert_with(|| {
            let mut page = vec![0; PAGE].into_boxed_slice();
            let rest = base.get(number * PAGE..).unwrap_or_default();
            let count = rest.len().min(PAGE);
            page[..count].copy_from_slice(&rest[..count]);
            page
        })
    }

    fn put(&mut self, base: &[u8], mut at: usize, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (number, within) = (at / PAGE, at % PAGE);
            let count = bytes.len().min(PAGE - within);
            let (now, rest) = bytes.split_at(count);
            self.page(base, number)[within..within + count].copy_from_slice(now);
            at += count;
            bytes = rest;
        }
        self.len = self.len.max(at as u64);
    }

    fn get(&self, base: &[u8], offset: u64, len: usize) -> Vec<u8> {
        let count = len.min(self.len.saturating_sub(offset) as usize);
        let mut bytes = vec![0; count];
        let mut done = 0;
        while done < count {
            let at = offset as usize + done;
            let (number, within) = (at / PAGE, at % PAGE);
            let now = (count - done).min(PAGE - within);
            let target = &mut bytes[done..done + now];
            if let Some(page) = self.pages.get(&number) {
                target.copy_from_slice(&page[within..within + now]);
            } else if let Some(rest) = base.get(at..) {
                let now = now.min(rest.len());
                target[..now].copy_from_slice(&rest[..now]);
            }
            done += now;
        }
        bytes
    }

    /// Makes a range zero, and what is behind the end unless it is grown over.
    fn zero(&mut self, base: &[u8], offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        let mut at = offset;
        while at < end {
            let now = (end - at).min(PAGE as u64 - at % PAGE as u64);
            let within = at as usize % PAGE;
            self.page(base, at as usize / PAGE)[within..within + now as usize].fill(0);
            at += now;
        }
    }
}

impl Storage for SparseStorage {
    unsafe fn submit(&self, _reactor: &Reactor, op: Op<'_>, _token: Token) -> Submission {
        let count = match op {
            Op::Read { iovecs, offset } => {
                // SAFETY: valid by the contract of `submit`.
                let bufs = unsafe { IoBufs::new(iovecs) };
                assert!(bufs.len() <= LARGEST_READ, "a read of {} bytes", bufs.len());
                bufs.copy_from(&self.bytes(offset, bufs.len()))
            }
            Op::Write { iovecs, offset } => {
                // SAFETY: valid by the contract of `submit`.
                let bufs = unsafe { IoBufs::new(iovecs) };
                self.check("a write", offset, bufs.len() as u64);
                let mut bytes = vec![0; bufs.len()];
                bufs.copy_to(&mut bytes);
                self.changes().put(&self.base, offset as usize, &bytes);
                bytes.len()
            }
            Op::Sync => 0,
            Op::Reserve { offset, len } => {
                self.check("a reservation", offset, len);
                let mut changes = self.changes();
                changes.len = changes.len.max(offset + len);
                0
            }
            Op::Zero { offset, len, .. } => {
                self.check("zeroes", offset, len);
                self.changes().zero(&self.base, offset, len);
                0
            }
        };
        Submission::Ready(Ok(count as u32))
    }

    fn len(&self) -> Answer<'_, io::Result<u64>> {
        at_once(Ok(self.changes().len))
    }

    fn set_len(&self, len: u64) -> Answer<'_, io::Result<()>> {
        self.check("a new length", len, 0);
        let mut changes = self.changes();
        let end = changes.len;
        if len < end {
            changes.zero(&self.base, len, end - len);
        }
        changes.len = len;
        at_once(Ok(()))
    }

    fn limits(&self) -> Limits {
        Limits {
            memory_align: 1,
            offset_align: self.align,
            zero_past_end: true,
        }
    }

    fn name(&self) -> &str {
        "fuzz"
    }

    /// As a file: else the target of journals would have none.
    fn outlives_process(&self) -> bool {
        true
    }

    fn writable(&self) -> bool {
        true
    }
}
