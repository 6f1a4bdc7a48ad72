//! Requests that need more than a plan: [`View::read`] and [`View::write`] load metadata, allocate,
//! copy and explain errors. A task that finds no room is done again: see [`with_room`].

use std::rc::Rc;
use std::sync::Arc;

use super::Unmap;
use super::life::{Context, Done, Queue};
use crate::chain::{View, with_room};
use crate::error::{Error, Result};
use crate::export::memory::GuestMemory;
use crate::export::request::{Kind, RequestStatus};
use crate::storage::IoBufs;

/// Bytes that a task moves at a time, which bounds the memory of its copies.
const TASK_CHUNK: u64 = 4 << 20;

impl Queue {
    /// Carries a request out by a task.
    pub(super) fn spawn(&mut self, context: &mut Context, head: u16) {
        if !self.late.is_empty() {
            self.not_in_place(head);
        }
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return;
        };
        // The task's alone: it lets go of it where it has to wait for room.
        let Some(view) = slot.view.take() else {
            return;
        };
        context.stats.slow.add(1);
        // SAFETY: the ranges were translated with the queue's memory, or with a smaller table whose
        // regions it still has; the list keeps it, and operations keep the list.
        let bufs = unsafe { IoBufs::new(slot.ranges.data()) };
        let bufs = bufs.keeping(self.memory.clone());
        let (kind, done, facts) = (slot.kind, context.done.clone(), context.facts.clone());
        let detect_zeroes = facts
            .detect_zeroes
            .map(|unmap| (unmap, self.memory.clone()));
        context.reactor.spawn(async move {
            let request = |view| perform(view, kind, &bufs, detect_zeroes.as_ref());
            let renew = || {
                let chain = facts.root.chain();
                done.borrow_mut().push(Done::Moved(head, chain.clone()));
                chain
            };
            let status = match with_room(view, renew, request).await {
                Ok(()) => RequestStatus::Ok,
                Err(error) => {
                    facts.failed(!matches!(kind, Kind::In { .. }), &error);
                    RequestStatus::IoError
                }
            };
            done.borrow_mut().push(Done::Request(head, status));
        });
    }

    /// Starts a flush if requests wait for one and none is running.
    pub(super) fn flush(&mut self, context: &mut Context) {
        let Some(heads) = self.flushes.begin() else {
            return;
        };
        let view = context.views.get();
        let (done, facts) = (context.done.clone(), context.facts.clone());
        context.reactor.spawn(async move {
            let status = match view.chain.flush().await {
                Ok(()) => RequestStatus::Ok,
                Err(error) => {
                    // The storage has told of a failure that stays.
                    if matches!(error, Error::Sync(_)) {
                        log::debug!("export '{}': {error}", facts.id);
                    } else {
                        facts.failed(true, &error);
                    }
                    RequestStatus::IoError
                }
            };
            done.borrow_mut().push(Done::Flush(heads, status));
        });
    }

    /// Handles what tasks have finished.
    pub(super) fn tasks_done(&mut self, context: &mut Context) -> bool {
        if context.done.borrow().is_empty() {
            return false;
        }
        let done = std::mem::take(&mut *context.done.borrow_mut());
        for done in done {
            match done {
                Done::Request(head, RequestStatus::Ok) => self.carried_out(context, head),
                Done::Request(head, status) => self.complete(context, head, status),
                Done::Moved(head, chain) => self.moved(head, &chain),
                Done::Flush(heads, status) => {
                    self.flushes.end();
                    for head in heads {
                        self.complete(context, head, status);
                    }
                }
            }
        }
        true
    }
}

/// Carries out a request with whatever it needs. Zeros are detected with the memory that they are
/// in.
async fn perform(
    view: Rc<View>,
    kind: Kind,
    bufs: &IoBufs,
    detect_zeroes: Option<&(Unmap, Arc<GuestMemory>)>,
) -> Result<()> {
    match kind {
        Kind::In { offset } => {
            for (start, len) in chunks(bufs.len() as u64) {
                let part = bufs.slice(start as usize, len as usize);
                view.clone().read(offset + start, part).await?;
            }
            Ok(())
        }
        Kind::Out { offset } => {
            if let Some((unmap, memory)) = detect_zeroes
                && bufs.is_zero()
            {
                if memory.is_lost() {
                    let text = "the shared memory of a write was taken away";
                    return Err(Error::Invalid(text.into()));
                }
                let len = bufs.len() as u64;
                return view.write_zeroes(offset, len, *unmap).await;
            }
            view.chain.note_write(offset, bufs.len() as u64);
            for (start, len) in chunks(bufs.len() as u64) {
                let part = bufs.slice(start as usize, len as usize);
                view.clone().write(offset + start, part).await?;
            }
            Ok(())
        }
        Kind::Discard { offset, len } => view.discard(offset, len).await,
        Kind::WriteZeroes { offset, len, unmap } => view.write_zeroes(offset, len, unmap).await,
        Kind::Flush | Kind::GetId => Err(Error::Invalid("a request without a task".into())),
    }
}

fn chunks(len: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len.div_ceil(TASK_CHUNK)).map(move |index| {
        let start = index * TASK_CHUNK;
        (start, TASK_CHUNK.min(len - start))
    })
}
