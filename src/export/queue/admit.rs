//! Requests on their way in: which chains are taken, and when; what of them is refused; what a
//! process that died has left.

use std::rc::Rc;

use super::life::{Context, MOST_BYTES, Queue};
use crate::chain::View;
use crate::export::config::{MAX_DISCARD, MAX_WRITE_ZEROES};
use crate::export::inflight::Again;
use crate::export::limit::Topic;
use crate::export::memory;
use crate::export::request::{self, Kind, Parsed, RequestStatus};
use crate::storage::Limits;

/// Chains taken from the ring before completions are looked at again.
const BATCH: u16 = 64;
/// A discard counts for a part of its length: it changes mappings and moves no data.
const DISCARD_WEIGHT: u64 = 32;
/// Crashes of the process with one request under way, after which the request is not tried again but
/// read, for the place of its status.
const MOST_CRASHES: u8 = 3;
/// And after which it is not even read.
const MOST_CRASHES_READ: u8 = 2 * MOST_CRASHES;

/// Operations that are submitted together, at least: the kernel gathers three and more, and tells
/// a disk of all of them at once, which for a virtual one is the dearest part of a request.
const SUBMIT_LEAST: u32 = 4;
/// And at most.
const SUBMIT_MOST: u32 = 16;

impl Queue {
    /// Takes what is available, up to a batch. True: there was something.
    pub(super) fn take_available(&mut self, context: &mut Context) -> bool {
        if !self.again.is_empty() || self.alone {
            return self.take_again(context);
        }
        if !self.has_room() {
            return false;
        }
        let count = match self.ring.available() {
            Ok(0) => return false,
            Ok(count) => count.min(BATCH),
            Err(error) => {
                self.give_up(context, format_args!("{error}"));
                return false;
            }
        };
        let view = context.views.get();
        let limits = context.limits(&view);
        for _ in 0..count {
            self.take_next(context, &view, &limits);
            if !self.has_room() {
                break;
            }
            self.go_on(context);
        }
        true
    }

    /// Carries out what a process that died has left, before anything is taken from the ring, and
    /// also if nothing more is taken. What was under way at a crash comes first, one after the other:
    /// should one of them crash the process again, it is the only one that did. True: there was some.
    #[cold]
    #[inline(never)]
    fn take_again(&mut self, context: &mut Context) -> bool {
        if self.weight > self.room {
            return false;
        }
        let view = context.views.get();
        let limits = context.limits(&view);
        for _ in 0..BATCH {
            let suspect = self.again.last().is_some_and(|again| again.crashes > 0);
            if self.alone || suspect {
                if self.in_flight > 0 {
                    return false;
                }
                // It is no longer marked when the next one is begun with.
                self.show(context);
                self.alone = false;
            }
            let Some(again) = self.again.pop() else {
                break;
            };
            self.alone = suspect;
            if !self.begin_again(context, again, &view, &limits) {
                self.again.push(again);
                break;
            }
            self.go_on(context);
        }
        true
    }

    /// Begins with a request that a process that died has left. False: there is no room for it now.
    fn begin_again(
        &mut self,
        context: &mut Context,
        again: Again,
        view: &Rc<View>,
        limits: &Limits,
    ) -> bool {
        let Again { head, crashes } = again;
        if crashes >= MOST_CRASHES {
            context.facts.log.error(
                Topic::Disk,
                format_args!(
                    "a request was under way when the process crashed, {crashes} times, and is not \
                     tried again"
                ),
            );
        }
        if crashes >= MOST_CRASHES_READ {
            self.answer_at_once(head, 0);
            return true;
        }
        self.ring.begin(again);
        let begun = self.begin(context, again, view, limits);
        if !begun {
            self.ring.leave(again);
        }
        begun
    }

    /// Takes the next chain from the ring.
    fn take_next(&mut self, context: &mut Context, view: &Rc<View>, limits: &Limits) {
        let head = self.ring.peek();
        let Some(slot) = self.slots.get(usize::from(head)) else {
            return self.give_up(context, format_args!("no descriptor {head}"));
        };
        if slot.busy || !self.ring.take(head) {
            return self.give_up(context, format_args!("chain {head} is there twice"));
        }
        let request = Again { head, crashes: 0 };
        if !self.begin(context, request, view, limits) {
            // The next to serve the queue finds it there.
            self.ring.put_back(head);
        }
    }

    /// Between two requests: shows and submits what is enough for that.
    fn go_on(&mut self, context: &mut Context) {
        self.show_some(context);
        let queued = context.reactor.queued();
        let under_way = context.reactor.in_flight().saturating_sub(queued);
        if queued >= submit_together(under_way) {
            context.reactor.submit();
        }
    }

    /// Begins with a request that was taken. False: there is no room for it now.
    // Said where the compiler would not: what a request costs is counted, and calls of such length
    // with as many arguments are a tenth of it.
    #[inline(always)]
    pub(super) fn begin(
        &mut self,
        context: &mut Context,
        request: Again,
        view: &Rc<View>,
        limits: &Limits,
    ) -> bool {
        let Again { head, crashes } = request;
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return true;
        };
        let parsed = request::parse(&self.ring, &self.memory, head, &mut slot.ranges);
        let (kind, status) = match parsed {
            Parsed::Request { kind, status } => (kind, status),
            Parsed::Refused { with, status } => {
                context.stats.errors.add(1);
                // SAFETY: the address was translated with `self.memory`.
                unsafe { memory::store_byte(status, with as u8) };
                self.answer_at_once(head, 1);
                return true;
            }
            Parsed::Malformed => {
                context.stats.errors.add(1);
                context.warn(format_args!("a request has no place for its status"));
                self.answer_at_once(head, 0);
                return true;
            }
        };
        let weight = weigh(kind, slot.ranges.data_len());
        if self.weight > 0 && self.weight + weight > MOST_BYTES {
            self.room = MOST_BYTES.saturating_sub(weight);
            return false;
        }
        self.room = MOST_BYTES;
        self.weight += weight;
        slot.begin(kind, status, weight);
        slot.busy = true;
        slot.view = Some(view.clone());
        self.in_flight += 1;
        if let Some(refusal) = self.refusal(context, kind, head, view) {
            self.complete(context, head, refusal);
            return true;
        }
        if crashes >= MOST_CRASHES {
            self.complete(context, head, RequestStatus::IoError);
            return true;
        }
        match kind {
            Kind::In { offset } | Kind::Out { offset } => {
                let write = matches!(kind, Kind::Out { .. });
                self.transfer(context, head, offset, write, view, limits);
            }
            Kind::Flush => self.flushes.join(head),
            Kind::GetId => self.identify(context, head),
            Kind::Discard { .. } | Kind::WriteZeroes { .. } => self.spawn(context, head),
        }
        true
    }

    /// Why a well-formed request is not carried out.
    fn refusal(
        &self,
        context: &Context,
        kind: Kind,
        head: u16,
        view: &View,
    ) -> Option<RequestStatus> {
        let data_len = self.slots.get(usize::from(head))?.ranges.data_len();
        let (offset, len, max, write) = match kind {
            Kind::In { offset } => (offset, data_len, u64::MAX, false),
            Kind::Out { offset } => (offset, data_len, u64::MAX, true),
            Kind::Discard { offset, len } => (offset, len, MAX_DISCARD, true),
            Kind::WriteZeroes { offset, len, .. } => (offset, len, MAX_WRITE_ZEROES, true),
            Kind::Flush | Kind::GetId => return None,
        };
        let block = context.facts.block_size - 1;
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= view.chain.size());
        let allowed = !write || (context.facts.writable && !view.chain.top().read_only);
        let fits = inside && len <= max && (offset | len) & block == 0;
        (!fits || !allowed).then_some(RequestStatus::IoError)
    }
}

/// How much of what may be under way a request takes, in bytes: what it moves, or may have to.
fn weigh(kind: Kind, data_len: u64) -> u64 {
    match kind {
        Kind::In { .. } | Kind::Out { .. } => data_len,
        // The storage may know no shorter way than to write them.
        Kind::WriteZeroes { len, .. } => len,
        Kind::Discard { len, .. } => len / DISCARD_WEIGHT,
        Kind::Flush | Kind::GetId => 0,
    }
}

/// How many operations to gather while so many are under way. A disk that has little to do begins
/// with the first ones while the others are still being prepared: with all at once disk, back-end
/// and driver would take turns. One that has much to do does not miss a few more.
fn submit_together(under_way: u32) -> u32 {
    (under_way / 4).clamp(SUBMIT_LEAST, SUBMIT_MOST)
}

#[cfg(test)]
mod tests {
    //! What would be caught: a disk without work that waits for a long batch, batches so short that
    //! the kernel does not gather them, and work that the bound of a queue does not count.

    use super::*;

    #[test]
    fn the_more_is_under_way_the_more_is_submitted_together() {
        let together: Vec<u32> = [0, 1, 16, 24, 31, 64, 255].map(submit_together).into();
        assert_eq!(together, [4, 4, 4, 6, 7, 16, 16]);
    }

    #[test]
    fn a_request_weighs_what_it_may_have_to_move() {
        let (offset, len) = (0, 1 << 30);
        for (kind, weight) in [
            (Kind::In { offset }, 16),
            (Kind::Out { offset }, 16),
            (Kind::Flush, 0),
            (Kind::Discard { offset, len }, 32 << 20),
        ] {
            assert_eq!(weigh(kind, 16), weight, "{kind:?}");
        }
        for unmap in [true, false] {
            assert_eq!(weigh(Kind::WriteZeroes { offset, len, unmap }, 16), len);
        }
    }
}
