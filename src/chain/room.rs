//! Room on a full disk, for those who can wait for it.
//!
//! A freed cluster becomes free when every request has ended that may still see it. A request that
//! finds no room may be one of these, and several may be so for each other: none of them may wait
//! while it has its view, or a claim that another waits for. So it ends without an answer, which
//! lets go of both, waits with empty hands, and is carried out again under a new view. To do so is
//! harmless as long as nobody has been told of the first time.
//!
//! It ends, also where others take the room each time: it is tried again only when clusters have
//! been freed since it began, and no longer than a bounded time.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Chain, View};
use crate::error::Result;
use crate::format::Format;

/// How long a request waits for room, in all its attempts together. A request that hangs may hold
/// up the room of all others of its disk, and a front-end that is to be let go waits for those.
const PATIENCE: Duration = Duration::from_secs(4);

impl Chain {
    /// Bytes that have become free in the top layer while it was open.
    fn freed(&self) -> u64 {
        match &self.top().format {
            Format::Qcow2(image) => image.freed(),
            Format::Raw(_) | Format::Qed(_) => 0,
        }
    }

    /// Waits until more is free in the top layer than `before`. False: that is not to be expected.
    async fn await_room(&self, before: u64, deadline: Instant) -> Result<bool> {
        match &self.top().format {
            Format::Qcow2(image) => image.await_room(before, deadline).await,
            Format::Raw(_) | Format::Qed(_) => Ok(false),
        }
    }
}

/// Carries out `request`, which may write into the top layer of the view that it is given: with
/// `view`, and where that ends for want of room, with a view of the chain as `renew` has it, once
/// clusters that were freed are free. Neither the caller nor `request` keeps a view, or a claim.
///
/// # Errors
/// Those of the last attempt, or of the flush that was to make room.
pub async fn with_room<T>(
    mut view: Rc<View>,
    renew: impl Fn() -> Arc<Chain>,
    request: impl AsyncFn(Rc<View>) -> Result<T>,
) -> Result<T> {
    let mut deadline = None;
    loop {
        let before = view.chain.freed();
        let error = match request(view).await {
            Err(error) if error.errno() == libc::ENOSPC => error,
            result => return result,
        };
        let chain = renew();
        let deadline = *deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
        if Instant::now() >= deadline || !Box::pin(chain.await_room(before, deadline)).await? {
            return Err(error);
        }
        view = View::of(chain);
    }
}
