//! A queue's part in a turning switch: it hands over what it has begun and not finished to write.
//!
//! Nothing is kept of this for each request: a worker knows its requests, and looks at them when it is
//! held. What was handed over of a request is given back behind the completions of the turn in which
//! it ends, before its slot is used again.

use std::ops::Range;
use std::sync::Arc;

use super::life::Queue;
use super::slot::Slot;
use crate::chain::Chain;
use crate::chain::turn::{Share, Turn};
use crate::export::request::Kind;
use crate::planted::{Fault, is_planted};

impl Queue {
    /// Hands over all that writes to the disk of `turn`.
    pub(super) fn hand_over(&mut self, turn: &Arc<Turn>) {
        if is_planted(Fault::LateWrite) {
            return;
        }
        // What is copied up for a read is written, too; that is a task.
        let reads_write = !turn.in_place && turn.root.chain().top().copy_on_read;
        for (head, slot) in self.slots.iter().enumerate() {
            // A task has the view.
            if turn.in_place && slot.view.is_none() {
                continue;
            }
            if let Some(range) = written(slot, reads_write) {
                let writes = turn.hand_over(&range);
                // No ring has more than 32768 descriptors.
                self.late
                    .push((turn.clone(), Share::new(head as u16, writes)));
            }
        }
    }

    /// The switch that was prepared has not come about.
    pub(super) fn take_back(&mut self, turn: &Arc<Turn>) {
        self.late.retain(|(of, _)| !Arc::ptr_eq(of, turn));
    }

    /// Gives back what was handed over of requests that have ended.
    #[cold]
    pub(super) fn end_late(&mut self) {
        let slots = &self.slots;
        let is_busy = |head: u16| slots.get(usize::from(head)).is_some_and(|slot| slot.busy);
        self.late.retain(|(_, share)| is_busy(share.request));
    }

    /// Request `head` writes nothing in place by a plan any more: a task goes on with it, which would
    /// wait for itself.
    pub(super) fn not_in_place(&mut self, head: u16) {
        self.late
            .retain(|(turn, share)| !turn.in_place || share.request != head);
    }

    /// Request `head` has begun anew, with `chain`.
    pub(super) fn moved(&mut self, head: u16, chain: &Chain) {
        self.late
            .retain_mut(|(_, share)| share.request != head || share.moved(chain));
    }
}

/// What a request that is on its way writes of the disk.
fn written(slot: &Slot, reads_write: bool) -> Option<Range<u64>> {
    if !slot.busy {
        return None;
    }
    let (offset, len) = match slot.kind {
        Kind::Out { offset } => (offset, slot.ranges.data_len()),
        Kind::In { offset } if reads_write => (offset, slot.ranges.data_len()),
        Kind::Discard { offset, len } | Kind::WriteZeroes { offset, len, .. } => (offset, len),
        Kind::In { .. } | Kind::Flush | Kind::GetId => return None,
    };
    Some(offset..offset.saturating_add(len))
}
