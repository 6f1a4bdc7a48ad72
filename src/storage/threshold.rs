//! Write thresholds: somebody wants to hear, once, when a write to a node reaches past an offset.
//!
//! ```text
//!   armed ──a write ends behind the offset, the first that does──▶ crossed, and told ─ ─▶ gone
//!     └───────────────another one takes its place, or its node goes──────────────────────▶ gone
//! ```
//!
//! A threshold is looked at before a write begins, and nothing depends on whether it succeeds.
//! Storage has a [`Watches`] for those of its node, which the operations of tasks pass. The data path
//! does not: with a threshold somewhere under a disk, the disk's chain is one that asks its storage
//! for each write that it plans ([`Storage::note_write`](super::Storage::note_write)), and without
//! one there is nothing to ask.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::Op;

/// A write that has reached past a threshold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crossed {
    /// The threshold's node.
    pub node: Arc<str>,
    /// Where the threshold was, in bytes.
    pub threshold: u64,
    /// How far behind it the write ends, in bytes.
    pub exceeded: u64,
}

/// Is told of a write past a threshold, on the thread that is about to make it: it must not block.
pub type Listener = Arc<dyn Fn(Crossed) + Send + Sync>;

/// A threshold of a node.
pub struct Threshold {
    node: Arc<str>,
    /// In bytes; 0: it is armed no longer.
    at: AtomicU64,
    listener: Listener,
}

impl fmt::Debug for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Threshold")
            .field("node", &self.node)
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}

impl Threshold {
    /// One at offset `at` of node `node`, which is not 0.
    #[must_use]
    pub fn new(node: &str, at: u64, listener: Listener) -> Arc<Self> {
        Arc::new(Self {
            node: node.into(),
            at: AtomicU64::new(at),
            listener,
        })
    }

    /// Where it is, in bytes; 0 once it has been crossed or taken away.
    #[must_use]
    pub fn at(&self) -> u64 {
        self.at.load(Ordering::Acquire)
    }

    /// It is not to be told any more.
    pub fn disarm(&self) {
        self.at.store(0, Ordering::Release);
    }

    /// A write of `[offset, offset + len)` of its node is about to begin.
    pub fn note(&self, offset: u64, len: u64) {
        let (at, end) = (self.at(), offset.saturating_add(len));
        let crossed = at != 0 && end > at;
        // Of several writes at a time one is told of.
        let is_first = || {
            let taken = self
                .at
                .compare_exchange(at, 0, Ordering::AcqRel, Ordering::Relaxed);
            taken.is_ok()
        };
        if crossed && is_first() {
            (self.listener)(Crossed {
                node: self.node.clone(),
                threshold: at,
                exceeded: end - at,
            });
        }
    }
}

/// The thresholds of what a storage is the bytes of: its node's own, and that of a node over it that
/// has the same bytes.
#[derive(Debug, Default)]
pub struct Watches {
    any: AtomicBool,
    list: Mutex<Vec<Arc<Threshold>>>,
}

impl Watches {
    /// These are its thresholds from now on, to be looked at in this order.
    pub fn set(&self, thresholds: Vec<Arc<Threshold>>) {
        let mut list = self.list.lock();
        self.any.store(!thresholds.is_empty(), Ordering::Release);
        *list = thresholds;
    }

    /// A write of `[offset, offset + len)` of the storage is about to begin.
    pub fn note(&self, offset: u64, len: u64) {
        if self.any.load(Ordering::Acquire) {
            self.list
                .lock()
                .iter()
                .for_each(|one| one.note(offset, len));
        }
    }

    /// An operation is about to begin.
    pub(super) fn note_op(&self, op: &Op<'_>) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        match op {
            Op::Write { iovecs, offset } => {
                let len = iovecs.iter().map(|iovec| iovec.iov_len as u64).sum();
                self.note(*offset, len);
            }
            Op::Zero { offset, len, .. } => self.note(*offset, *len),
            // Room that is reserved has not been written.
            Op::Read { .. } | Op::Sync | Op::Reserve { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a threshold that is told of twice, or by a write that ends at it; one
    //! that was taken away and is told of; operations that are no writes and count as such.

    #![allow(clippy::unwrap_used)]

    use std::sync::mpsc::channel;

    use super::*;

    fn armed(at: u64) -> (Arc<Threshold>, std::sync::mpsc::Receiver<Crossed>) {
        let (send, told) = channel();
        let listener: Listener = Arc::new(move |crossed| drop(send.send(crossed)));
        (Threshold::new("disk", at, listener), told)
    }

    #[test]
    fn the_first_write_past_it_is_told_and_no_other() {
        let (threshold, told) = armed(4096);
        threshold.note(0, 4096);
        assert_eq!((threshold.at(), told.try_recv().is_err()), (4096, true));
        threshold.note(4000, 100);
        let crossed = told.try_recv().unwrap();
        assert_eq!((&*crossed.node, crossed.threshold), ("disk", 4096));
        assert_eq!((crossed.exceeded, threshold.at()), (4, 0));
        threshold.note(1 << 40, 1);
        assert!(told.try_recv().is_err());
        let (threshold, told) = armed(1);
        threshold.disarm();
        threshold.note(u64::MAX, u64::MAX);
        assert!(told.try_recv().is_err());
    }

    #[test]
    fn writes_and_zeros_count_and_nothing_else() {
        let memory = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 50,
        };
        let iovecs = &[memory, memory][..];
        let (offset, len) = (1000, 100);
        for (op, exceeded) in [
            (Op::Read { iovecs, offset }, None),
            (Op::Sync, None),
            (Op::Reserve { offset, len }, None),
            (Op::Write { iovecs, offset }, Some(1000)),
            (
                Op::Zero {
                    offset,
                    len,
                    unmap: true,
                },
                Some(1000),
            ),
        ] {
            let (threshold, told) = armed(100);
            let watches = Watches::default();
            watches.note_op(&op);
            watches.set(vec![threshold]);
            watches.note_op(&op);
            let told = told.try_recv().ok().map(|crossed| crossed.exceeded);
            assert_eq!(told, exceeded, "{op:?}");
        }
    }
}
