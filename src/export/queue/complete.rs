//! Requests on their way out: the answer, the used ring, the signal.

use super::life::{Context, Queue};
use super::slot::Slot;
use crate::export::memory;
use crate::export::request::{self, Kind, RequestStatus};
use crate::export::stats::QueueStats;

/// Requests that are done before the driver is shown them, within a batch. With fewer, the ring's
/// index goes from one processor's cache to the other's for nearly every request, and a driver
/// that sleeps is signalled for it; with more, it waits for what it could work on.
const PUBLISH_BATCH: u16 = 8;
/// Bytes of requests that are done before the driver is shown them: it works on large ones
/// while the next are carried out.
const PUBLISH_BYTES: u64 = 64 << 10;

impl Queue {
    /// A request has been carried out; a change may have to become stable first.
    #[inline(always)]
    pub(super) fn carried_out(&mut self, context: &mut Context, head: u16) {
        let changes = self.slots.get(usize::from(head)).is_some_and(|slot| {
            matches!(
                slot.kind,
                Kind::Out { .. } | Kind::Discard { .. } | Kind::WriteZeroes { .. }
            )
        });
        if changes && self.memory_is_lost() {
            // Zeros may have been written that nobody meant.
            self.complete(context, head, RequestStatus::IoError);
        } else if changes && self.write_through {
            self.flushes.join(head);
        } else {
            self.complete(context, head, RequestStatus::Ok);
        }
    }

    pub(super) fn identify(&mut self, context: &mut Context, head: u16) {
        if let Some(slot) = self.slots.get(usize::from(head)) {
            // SAFETY: the ranges were translated with `self.memory`.
            unsafe { memory::scatter(slot.ranges.data(), &context.facts.serial) };
        }
        self.complete(context, head, RequestStatus::Ok);
    }

    /// Answers a request and puts its chain into the used ring.
    pub(super) fn complete(&mut self, context: &mut Context, head: u16, status: RequestStatus) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return;
        };
        debug_assert!(slot.busy && slot.pending == 0, "answered once, at the end");
        slot.view = None;
        slot.busy = false;
        let len = count(&context.stats, slot, status);
        // SAFETY: the address was translated with `self.memory`, or with a smaller table whose
        // regions it still has.
        unsafe { memory::store_byte(slot.status, status as u8) };
        self.in_flight -= 1;
        self.weight -= slot.weight;
        self.unshown_bytes += slot.ranges.data_len();
        self.ring.put_used(head, len);
    }

    /// Puts back a chain with which nothing is to be done.
    #[cold]
    #[inline(never)]
    pub(super) fn answer_at_once(&mut self, head: u16, len: u32) {
        self.ring.put_used(head, len);
    }

    /// Shows the driver what is done if it is enough to begin with.
    pub(super) fn show_some(&mut self, context: &mut Context) {
        if self.ring.unpublished() >= PUBLISH_BATCH || self.unshown_bytes >= PUBLISH_BYTES {
            self.show(context);
        }
    }

    /// Shows the driver what is done, and signals it if it wants that.
    pub(super) fn show(&mut self, context: &mut Context) {
        self.ring.publish();
        self.unshown_bytes = 0;
        if self.call.is_some() && self.ring.needs_signal() {
            self.notify(context);
            context.stats.signals.add(1);
        }
    }

    pub(super) fn notify(&self, context: &mut Context) {
        let rung = context.bell.ring(self.call.as_deref());
        context.check_signal(rung);
    }
}

/// Counts a request that is done; the bytes that were written into the guest's memory for it.
fn count(stats: &QueueStats, slot: &Slot, status: RequestStatus) -> u32 {
    if status != RequestStatus::Ok {
        stats.errors.add(1);
        return 1;
    }
    let len = slot.ranges.data_len();
    match slot.kind {
        Kind::In { .. } => {
            stats.reads.add(1);
            stats.read_bytes.add(len);
            // The length was bounded when the request was parsed.
            return len as u32 + 1;
        }
        Kind::Out { .. } => {
            stats.writes.add(1);
            stats.write_bytes.add(len);
        }
        Kind::Flush => stats.flushes.add(1),
        Kind::GetId => return len.min(request::ID_LEN as u64) as u32 + 1,
        Kind::Discard { .. } | Kind::WriteZeroes { .. } => stats.discards.add(1),
    }
    1
}
