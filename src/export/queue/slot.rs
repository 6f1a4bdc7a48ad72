//! Request slots: one for each descriptor that can be the head of a chain, made when the queue
//! starts and used again and again.

use std::rc::Rc;

use crate::chain::View;
use crate::export::request::{Kind, Ranges};

/// A request on its way. Its index is the head of its chain.
#[derive(Debug)]
pub(super) struct Slot {
    /// The chain's memory. Operations in flight point into it.
    pub(super) ranges: Ranges,
    /// The data cut along the pieces of a plan with several. Operations point into it too.
    pub(super) cuts: Vec<libc::iovec>,
    /// What is wanted.
    pub(super) kind: Kind,
    /// Host address of the status byte.
    pub(super) status: usize,
    /// How much of what may be under way it takes, in bytes.
    pub(super) weight: u64,
    /// The chain of layers as the request sees it; present while it is on its way, unless a task
    /// has it.
    pub(super) view: Option<Rc<View>>,
    /// Operations whose completion is awaited.
    pub(super) pending: u32,
    /// Bytes that operations have transferred.
    pub(super) transferred: u64,
    /// An operation has failed.
    pub(super) failed: bool,
    /// The request has been taken from the ring and not been put back.
    pub(super) busy: bool,
}

impl Slot {
    pub(super) fn new() -> Self {
        Self {
            ranges: Ranges::with_room(),
            cuts: Vec::new(),
            kind: Kind::Flush,
            status: 0,
            weight: 0,
            view: None,
            pending: 0,
            transferred: 0,
            failed: false,
            busy: false,
        }
    }

    /// Readies the slot for a new request.
    pub(super) fn begin(&mut self, kind: Kind, status: usize, weight: u64) {
        self.kind = kind;
        self.status = status;
        self.weight = weight;
        self.pending = 0;
        self.transferred = 0;
        self.failed = false;
    }

    /// Whether the operations moved all that was asked for.
    pub(super) fn is_complete(&self) -> bool {
        !self.failed && self.transferred == self.ranges.data_len()
    }
}
