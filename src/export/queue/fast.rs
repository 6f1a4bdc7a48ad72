//! Requests that the plan of the chain says all of: its pieces go to storage at once.

use super::life::{Context, MOST_BYTES, Queue};
use super::slot::Slot;
use crate::chain::{Pieces, Source, View};
use crate::export::memory;
use crate::export::request::MAX_RANGES;
use crate::reactor::{Completion, Token};
use crate::storage::buffer::{iovecs_aligned, iovecs_are_zero, slice_iovecs};
use crate::storage::{Limits, Op, Submission};

impl Queue {
    /// Reads or writes by the chain's plan, or else by a task.
    #[inline(always)]
    pub(super) fn transfer(
        &mut self,
        context: &mut Context,
        head: u16,
        offset: u64,
        write: bool,
        view: &View,
        limits: &Limits,
    ) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return;
        };
        let len = slot.ranges.data_len() as usize;
        let mut pieces = Pieces::new();
        // SAFETY: the ranges were translated with memory that the queue keeps.
        let zeros = || unsafe { iovecs_are_zero(slot.ranges.data()) };
        if write && context.facts.detect_zeroes.is_some() && zeros() {
            return self.spawn(context, head);
        }
        let planned = len as u64 <= MOST_BYTES
            && iovecs_aligned(slot.ranges.data(), limits.memory_align)
            && if write {
                view.chain.plan_write(offset, len, &mut pieces)
            } else {
                view.chain.plan_read(offset, len, &mut pieces)
            }
            && aligned(&pieces, limits.offset_align);
        if !planned || !submit(context, slot, head, view, &pieces, write) {
            return self.spawn(context, head);
        }
        if slot.pending == 0 {
            self.settle(context, head);
        }
    }

    /// Handles the completion of an operation of the fast path.
    pub(super) fn completed(&mut self, context: &mut Context, completion: Completion) {
        let head = completion.value as u16;
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return;
        };
        match completion.result {
            Ok(count) => slot.transferred += u64::from(count),
            Err(_) => slot.failed = true,
        }
        slot.pending = slot.pending.saturating_sub(1);
        if slot.pending == 0 {
            self.settle(context, head);
        }
    }

    /// All operations of a request have ended.
    #[inline(always)]
    pub(super) fn settle(&mut self, context: &mut Context, head: u16) {
        let complete = self
            .slots
            .get(usize::from(head))
            .is_some_and(Slot::is_complete);
        if complete {
            self.carried_out(context, head);
        } else {
            self.spawn(context, head);
        }
    }
}

fn aligned(pieces: &Pieces, align: u64) -> bool {
    align <= 1
        || pieces.iter().all(|piece| match piece.source {
            Source::Storage { offset, .. } => (offset | piece.len as u64) & (align - 1) == 0,
            Source::Zero => true,
        })
}

/// Gives the pieces to storage. False: nothing was started, a task must do it.
fn submit(
    context: &Context,
    slot: &mut Slot,
    head: u16,
    view: &View,
    pieces: &Pieces,
    write: bool,
) -> bool {
    slot.cuts.clear();
    let mut bounds = [(0, 0); crate::chain::MAX_PIECES];
    if let [_] = pieces.as_slice() {
        // The one piece is all the data, as it is.
    } else {
        for (piece, bounds) in pieces.iter().zip(&mut bounds) {
            let start = slot.cuts.len();
            let cuts = &mut slot.cuts;
            slice_iovecs(slot.ranges.data(), piece.start, piece.len, |cut| {
                cuts.push(cut);
            });
            *bounds = (start, slot.cuts.len());
        }
    }
    let whole = pieces.len() == 1;
    let known = pieces.iter().all(|piece| match piece.source {
        Source::Storage { layer, .. } => view.chain.storage(layer).is_some(),
        Source::Zero => !write,
    });
    if !known || slot.cuts.len() > MAX_RANGES {
        return false;
    }
    for (piece, &(start, end)) in pieces.iter().zip(&bounds) {
        let iovecs = if whole {
            slot.ranges.data()
        } else {
            slot.cuts.get(start..end).unwrap_or(&[])
        };
        let Source::Storage { layer, offset } = piece.source else {
            // SAFETY: the ranges were translated with memory that the queue keeps.
            unsafe { memory::zero(iovecs) };
            slot.transferred += piece.len as u64;
            continue;
        };
        let Some(storage) = view.chain.storage(layer) else {
            slot.failed = true;
            continue;
        };
        let op = if write {
            Op::Write { iovecs, offset }
        } else {
            Op::Read { iovecs, offset }
        };
        // SAFETY: the vectors are in the slot, which takes no new request before all its
        // operations have completed; the memory they name is kept by the queue, which is not
        // given back before that either. Nobody cancels them.
        match unsafe { storage.submit(&context.reactor, op, Token::client(u64::from(head))) } {
            Submission::Pending => slot.pending += 1,
            Submission::Ready(Ok(count)) => slot.transferred += u64::from(count),
            Submission::Ready(Err(_)) => slot.failed = true,
        }
    }
    true
}
