//! How an inflight region is laid out.
//!
//! The regions of the queues follow one another, each a header and a record for each descriptor:
//!
//! ```text
//! split    0        8         10         12                14         16
//!          features version=1 desc_num   last_batch_head   used_idx   records
//!    record  0        1        6      8
//!            inflight padding  next   counter                          16 bytes
//!    padding          1        2        3
//!            of all   crashes
//!            of the first      crashed  write cache
//!
//! packed   0        8         10         12         14             16        18
//!          features version=1 desc_num   free_head  old_free_head  used_idx  old_used_idx
//!          20                 21                    22             32
//!          used_wrap_counter  old_used_wrap_counter padding        records
//!    record  0        2     4     6    8        16  18     20   24
//!            inflight next  last  num  counter  id  flags  len  addr   32 bytes
//! ```
//!
//! In the padding, which nobody else reads, are things that a successor must know as well: with each
//! request how often the process has crashed while it was under way, and, in the highest bit, that
//! it was taken over and nobody has begun with it since; once for the queue, whether the
//! process has crashed (1), and the guest's write cache (1: it is off, 2: it is on).
//!
//! Numbers have the host's byte order: a region never leaves it. Where one queue's region ends and
//! the next begins the specification leaves to the back-end: each has cache lines of its own here,
//! since queues have threads of their own. A successor must find them where its predecessor put
//! them, so this does not change from one version to the next.

use super::Refusal;

/// Bytes of a split queue's header.
pub(super) const SPLIT_HEADER: usize = 16;
/// Bytes of a split queue's record.
pub(super) const SPLIT_RECORD: usize = 16;
const PACKED_HEADER: usize = 32;
const PACKED_RECORD: usize = 32;

/// Processors fetch cache lines in pairs.
const ALIGN: usize = 128;

/// Descriptors that a queue can have.
const MOST_DESCRIPTORS: u16 = 1 << 15;

/// The kind of rings that a region is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingKind {
    /// Descriptor table, available ring, used ring.
    Split,
    /// One ring of descriptors.
    Packed,
}

/// Where the parts of a region are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    kind: RingKind,
    queues: u16,
    size: u16,
}

impl Layout {
    /// The layout for `queues` queues of `size` descriptors each.
    ///
    /// # Errors
    /// When there are none, or more than a queue can have.
    pub fn new(kind: RingKind, queues: u16, size: u16) -> Result<Self, Refusal> {
        if queues == 0 || size == 0 || size > MOST_DESCRIPTORS {
            return Err(Refusal::Shape { queues, size });
        }
        Ok(Self { kind, queues, size })
    }

    /// The rings that it is for.
    #[must_use]
    pub fn kind(&self) -> RingKind {
        self.kind
    }

    /// Queues.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Descriptors of each queue.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Bytes of the whole region.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stride() * usize::from(self.queues)
    }

    /// Never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queues == 0
    }

    /// Where the region of queue `index` begins, if it has one.
    #[must_use]
    pub fn queue(&self, index: u16) -> Option<usize> {
        (index < self.queues).then(|| self.stride() * usize::from(index))
    }

    fn stride(&self) -> usize {
        let (header, record) = match self.kind {
            RingKind::Split => (SPLIT_HEADER, SPLIT_RECORD),
            RingKind::Packed => (PACKED_HEADER, PACKED_RECORD),
        };
        (header + record * usize::from(self.size)).next_multiple_of(ALIGN)
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a layout that is not the specification's, queues that overlap, and
    //! numbers that differ from what a predecessor used.

    use std::mem::offset_of;

    use vhost::vhost_user::message::{
        DescStatePacked, DescStateSplit, QueueRegionPacked, QueueRegionSplit,
    };

    use super::*;

    #[test]
    fn it_is_the_one_of_the_specification() {
        assert_eq!(size_of::<DescStateSplit>(), SPLIT_RECORD);
        assert_eq!(offset_of!(DescStateSplit, next), 6);
        assert_eq!(offset_of!(DescStateSplit, counter), 8);
        assert_eq!(offset_of!(QueueRegionSplit, desc), SPLIT_HEADER);
        assert_eq!(offset_of!(QueueRegionSplit, version), 8);
        assert_eq!(offset_of!(QueueRegionSplit, desc_num), 10);
        assert_eq!(offset_of!(QueueRegionSplit, last_batch_head), 12);
        assert_eq!(offset_of!(QueueRegionSplit, used_idx), 14);
        assert_eq!(size_of::<DescStatePacked>(), PACKED_RECORD);
        // The crate's own type has no room between the header and its records; C has.
        assert!(offset_of!(QueueRegionPacked, desc) <= PACKED_HEADER);
    }

    #[test]
    fn queues_follow_one_another() {
        let layout = Layout::new(RingKind::Split, 3, 128).unwrap();
        // 16 + 16 * 128 are 2064.
        assert_eq!(
            [0, 1, 2, 3].map(|index| layout.queue(index)),
            [Some(0), Some(2176), Some(4352), None]
        );
        assert_eq!(layout.len(), 3 * 2176);
        let packed = Layout::new(RingKind::Packed, 2, 256).unwrap();
        assert_eq!(
            packed.len(),
            2 * (32 + 32 * 256_usize).next_multiple_of(128)
        );
        for (queues, size) in [(0, 128), (1, 0), (1, 32769)] {
            let refused = Layout::new(RingKind::Split, queues, size);
            assert_eq!(refused, Err(Refusal::Shape { queues, size }));
        }
        assert!(Layout::new(RingKind::Split, 1, 32768).is_ok());
    }
}
