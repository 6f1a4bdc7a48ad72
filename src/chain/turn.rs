//! Turning switches: a new top, while the guest's writes are on their way into the old one.
//!
//! After a neutral switch it does not matter which of two chains a request has. After a turning one
//! it does: a write that a guest began before may land in the old top when a copy of its cluster is
//! in the new top already, which hides it for good. No guest waits for such a switch, whatever its
//! storage does:
//!
//! ```text
//!  workers          admit ──hold──▶ admit nothing ───────────go on──▶ admit
//!                            │          ▲ no I/O is waited for          ▲
//!                            └ hand over what is unfinished             │
//!  who switches    hold ─────▶ all have handed over ──▶ chains stored ──┘──▶ late writes end ──▶ closed
//! ```
//!
//! 1. Each worker of each affected disk admits no new request, and in its next turn hands over what
//!    it has begun and not finished to write, its tasks included: as [`LateWrite`]s of the images
//!    that come on top.
//! 2. All chains are stored, and admission goes on. A request takes its view after it was admitted.
//! 3. Copies into the new top wait for the late writes in their way, and nobody else does. The old
//!    top is *closing* until the last of them has ended: it stays open to be written, and the
//!    guest's flushes are its flushes, too ([`Chain::closing`]).
//!
//! An internal snapshot turns as well, without another top: from one instant on, a write to a cluster
//! that was the guest's alone goes to a copy of it. What a queue has in flight in place then is late
//! for the image itself, and a copy waits for it ([`Turn::in_place`]). Its tasks look at the mapping
//! anew for each piece, and tell of their writes in place themselves.
//!
//! A request that is carried out again ([`with_room`](super::with_room)) has let go of its old chain
//! and may go on with the new one: it is no late write from then on ([`Share::moved`]), or it would
//! wait for itself.

use std::ops::Range;
use std::sync::Arc;

use super::{Chain, Root};
use crate::format::qcow2::late::LateWrite;
use crate::format::{Format, Qcow2};

/// A disk that gets a new top, or whose top gets a snapshot.
#[derive(Clone, Debug)]
pub struct Turn {
    /// The disk.
    pub root: Arc<Root>,
    /// The images that are put on top of it, all between the new top and the old one.
    pub images: Vec<Arc<Qcow2>>,
    /// The images are its top already, and get snapshots: what is written in place alone is handed
    /// over, and not what tasks do.
    pub in_place: bool,
}

impl Turn {
    /// Takes over a write to `range` of the disk that is on its way.
    #[must_use]
    pub fn hand_over(&self, range: &Range<u64>) -> Vec<LateWrite> {
        let images = self.images.iter();
        images
            .map(|image| image.late().add(range.clone()))
            .collect()
    }

    /// Waits until all writes that were handed over have ended.
    pub async fn late_writes_end(&self) {
        for image in &self.images {
            image.late().those_there_end().await;
        }
    }
}

/// What a queue has handed over of one request, by which name it knows it.
#[derive(Debug)]
pub struct Share<T> {
    /// The request.
    pub request: T,
    writes: Vec<LateWrite>,
}

impl<T> Share<T> {
    /// The late `writes` of `request`.
    #[must_use]
    pub fn new(request: T, writes: Vec<LateWrite>) -> Self {
        Self { request, writes }
    }

    /// The request has begun anew, with `chain`: it is late for those images alone that are above
    /// it. False: for none.
    pub fn moved(&mut self, chain: &Chain) -> bool {
        for layer in chain.layers() {
            if let Format::Qcow2(image) = &layer.format {
                self.writes.retain(|write| !write.is_of(image.late()));
            }
        }
        !self.writes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::single_range_in_vec_init)]
    //! What would be caught: a request that begins anew with another chain and waits for itself, or
    //! is forgotten where it is late still.

    use super::*;
    use crate::chain::Layer;
    use crate::format::qcow2::create::{CreateOptions, create};
    use crate::format::qcow2::{Options, Qcow2};
    use crate::reactor::Reactor;
    use crate::storage::memory::MemoryStorage;

    async fn image() -> (Arc<Qcow2>, Arc<Layer>) {
        let file = Arc::new(MemoryStorage::new(Vec::new()));
        create(&*file, &CreateOptions::new(1 << 20)).await.unwrap();
        let image = Qcow2::open(file.clone(), Options::default()).await;
        let image = Arc::new(image.unwrap());
        let layer = Layer {
            name: "layer".into(),
            format: Format::Qcow2(image.clone()),
            storage: file,
            read_only: false,
            discard: false,
            copy_on_read: false,
        };
        (image, Arc::new(layer))
    }

    #[test]
    fn a_request_is_late_for_what_is_above_its_chain() {
        let reactor = Reactor::for_this_thread().unwrap();
        let images = [(); 3].map(|()| reactor.block_on(image()));
        let [(_, old), (first, middle), (second, _)] = images;
        let chain = |layers: &[&Arc<Layer>]| {
            Chain::new(layers.iter().map(|layer| (*layer).clone()).collect()).unwrap()
        };
        let root = Root::new(chain(&[&old]));
        let range = 0..4096;
        let turns = [&first, &second].map(|image| Turn {
            root: root.clone(),
            images: vec![image.clone()],
            in_place: false,
        });
        let writes = turns.iter().flat_map(|turn| turn.hand_over(&range));
        let mut share = Share::new(7u16, writes.collect());
        let is_late = |image: &Arc<Qcow2>| image.late().in_the_way(&[0..1]).is_some();
        assert!(is_late(&first) && is_late(&second));
        assert!(share.moved(&chain(&[&old])), "nothing has changed for it");
        assert!(is_late(&first) && is_late(&second));
        assert!(share.moved(&chain(&[&middle, &old])));
        assert!(!is_late(&first) && is_late(&second));
        drop(share);
        assert!(!is_late(&second), "it has ended");
        for turn in &turns {
            reactor.block_on(turn.late_writes_end());
        }
    }
}
