//! The end of a chain: what its last request leaves behind.
//!
//! A job that has published another chain lets go of layers, and tells of its end, when no request
//! uses the old one any more. It waits for that here; requests never wait for it.

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Event, EventListener};

/// Says when a chain is gone, and all requests with it.
#[derive(Debug, Default)]
pub struct Ended {
    over: AtomicBool,
    event: Event,
}

impl Ended {
    /// The chain is gone.
    pub(super) fn set(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.event.notify(usize::MAX);
    }

    /// Whether it is.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Waits until it is.
    pub async fn wait(&self) {
        loop {
            let listener: EventListener = self.event.listen();
            if self.is_over() {
                return;
            }
            listener.await;
        }
    }
}
