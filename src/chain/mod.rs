//! The chain: the ordered layers of a disk, and who supplies each byte.
//!
//! A [`Chain`] is an immutable value. A request takes it once, in a [`View`], and keeps it to
//! its end; a change of the layers (at a job's end, say) publishes a new chain in the
//! [`Root`] and the old one goes with its last request. Guest I/O is never drained for that.
//!
//! Most changes are *neutral*: both chains read the same bytes while they live at the same time.
//! After others (a snapshot) the guest writes elsewhere than before: see [`turn`].
//!
//! Invariant of neutral changes: the end of a stream takes away layers that supply nothing any
//! more; afterwards a cluster must not become unallocated while some chain still has those layers under the image, since a request of that
//! chain would read through to them, or copy them up. Each chain therefore counts, as long as it
//! lives, in every image that has something below it ([`Qcow2::is_overlay`]), and only an image
//! that is an overlay nowhere unmaps clusters. It does not matter how a chain came to be
//! published, how many times, or in how many disks the image is.
//!
//! The data path asks [`Chain::plan_read`] and [`Chain::plan_write`] first: with the metadata in
//! memory they answer at once with pieces that go straight to the ring. Everything else
//! (metadata to load, clusters to allocate, copy or decompress) takes the `async` functions of
//! [`View`], as a task on the same thread.

mod backed;
mod copy;
mod onto;
mod read;
pub mod resize;
mod room;
mod span;
mod status;
pub mod tap;
pub mod turn;
mod write;

use std::rc::Rc;
use std::sync::Arc;

use arrayvec::ArrayVec;

use crate::error::{Action, Error, Result};
use crate::format::{Format, Place, Qcow2};
use crate::grace::{EraCache, Grace, LocalEra, Users};
use crate::reactor::carry_out;
use crate::storage::{self, Limits, Purpose, Storage, Threshold};
use crate::sync::{self, ArcSwap, Mutex};

pub use backed::Backed;
pub use copy::Copied;
pub use room::with_room;
pub use span::Span;
pub use status::CopyStatus;
pub use tap::Tap;

/// How many pieces a request is cut into before it takes the slow path.
pub const MAX_PIECES: usize = 8;

/// One image file in a chain.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The node's name.
    pub name: String,
    /// The format, with its metadata.
    pub format: Format,
    /// Where its bytes live.
    pub storage: Arc<dyn Storage>,
    /// Guest writes are refused.
    pub read_only: bool,
    /// Discards reach the image (`discard=unmap`).
    pub discard: bool,
    /// What is read from below is written into this layer (`copy-on-read`).
    pub copy_on_read: bool,
}

impl Layer {
    fn io_error(&self, action: Action, offset: u64, error: &std::io::Error) -> Error {
        self.io_error_of(action, Purpose::Data, offset, error)
    }

    fn io_error_of(
        &self,
        action: Action,
        purpose: Purpose,
        offset: u64,
        error: &std::io::Error,
    ) -> Error {
        Error::io_of(action, purpose.words(), self.storage.name(), offset, error)
    }

    /// The storages that the layer's bytes are in, that of its metadata first.
    #[must_use]
    pub fn storages(&self) -> Vec<&Arc<dyn Storage>> {
        match &self.format {
            Format::Qcow2(image) if image.header().has_data_file() => {
                vec![image.storage(), image.data_storage()]
            }
            Format::Qcow2(_) | Format::Raw(_) | Format::Qed(_) => vec![&self.storage],
        }
    }

    /// Makes everything stable that was written to this layer.
    ///
    /// # Errors
    /// What the storage reports.
    pub async fn flush(&self) -> Result<()> {
        if !self.storage.writable() {
            return Ok(());
        }
        match &self.format {
            Format::Raw(_) => storage::io::sync_shared(&self.storage)
                .await
                .map_err(|error| self.io_error(Action::Flush, 0, &error)),
            Format::Qcow2(qcow2) => {
                let qcow2 = qcow2.clone();
                carry_out(async move { qcow2.flush().await }).await
            }
            Format::Qed(_) => Ok(()),
        }
    }
}

/// The layers of a disk, top first.
///
/// Apart from the count of those who share it: every request looks at the layers, and each thread
/// that goes to sleep changes the count.
#[derive(Debug)]
#[repr(align(128))]
pub struct Chain {
    layers: Vec<Arc<Layer>>,
    /// Bytes of the disk, for good: one of another size has another chain.
    size: u64,
    /// Where the mapping of the top layer ended when the chain was made. The unit in which the disk
    /// ends counts as whole only if that is the size: what is above it may become a part of the disk
    /// while requests of this chain are on their way.
    mapped_end: u64,
    /// Those under the top that writes are still on their way into, or have just arrived in.
    closing: Vec<Arc<Layer>>,
    /// The grace periods of its requests, which its images wait for.
    grace: Arc<Grace>,
    /// Where all that is written to it is written as well.
    tap: Option<tap::InUse>,
    /// Somebody wants to hear of writes that reach past an offset: of the disk, by these, or of
    /// what it is laid out in.
    watch: Option<Vec<Arc<Threshold>>>,
    /// Not every write goes just where the layers say: there is a tap or a watch.
    minds_writes: bool,
}

/// A part of a request and where its bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where the bytes are.
    pub source: Source,
    /// Where the part begins in the request.
    pub start: usize,
    /// How long it is.
    pub len: usize,
}

/// Where a piece's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the storage of a layer.
    Storage {
        /// Index of the layer, 0 is the top.
        layer: usize,
        /// Offset in the storage.
        offset: u64,
    },
    /// They are zeros.
    Zero,
}

/// A plan's pieces, in order and without gaps.
pub type Pieces = ArrayVec<Piece, MAX_PIECES>;

impl Chain {
    /// A chain of `layers`, top first.
    ///
    /// # Errors
    /// A chain without a layer.
    pub fn new(layers: Vec<Arc<Layer>>) -> Result<Self> {
        Self::with_tap(layers, None)
    }

    /// A chain of `layers`, top first. All that is written to it goes to `tap` as well, if there is one.
    ///
    /// # Errors
    /// A chain without a layer.
    pub fn with_tap(layers: Vec<Arc<Layer>>, tap: Option<Arc<Tap>>) -> Result<Self> {
        let Some(top) = layers.first() else {
            return Err(Error::Invalid("a chain needs at least one layer".into()));
        };
        let chain = Self {
            size: top.format.size(),
            mapped_end: top.format.mapped_end(),
            layers,
            closing: Vec::new(),
            grace: Arc::new(Grace::new(tap.is_some())),
            minds_writes: tap.is_some(),
            tap: tap.map(tap::InUse::new),
            watch: None,
        };
        chain.users().for_each(|users| users.add(&chain.grace));
        chain.overlays().for_each(Qcow2::begin_overlay);
        Ok(chain)
    }

    /// The chain of a disk that ends where the mapping of its top layer does: for who makes that a
    /// part of the disk.
    #[must_use]
    fn whole(mut self) -> Self {
        self.size = self.mapped_end;
        self
    }

    /// What says when this chain is gone, and all requests with it.
    #[must_use]
    pub fn grace(&self) -> &Arc<Grace> {
        &self.grace
    }

    /// The chain with these of its layers as *closing*: each was the top, and what the guest began to
    /// write then may arrive there at any time. A flush is one of these layers, too.
    #[must_use]
    pub fn closing(mut self, layers: Vec<Arc<Layer>>) -> Self {
        self.closing = layers;
        self
    }

    /// The chain as one whose writes are looked at, since somebody wants to hear of them: those to the
    /// disk with these thresholds, those to its storage with that one's own.
    #[must_use]
    pub fn watched(mut self, thresholds: Option<Vec<Arc<Threshold>>>) -> Self {
        self.minds_writes = self.tap.is_some() || thresholds.is_some();
        self.watch = thresholds;
        self
    }

    /// The images that have something below them here.
    fn overlays(&self) -> impl Iterator<Item = &Qcow2> {
        let above = self.layers.split_last().map_or(&[][..], |(_, above)| above);
        above.iter().filter_map(|layer| match &layer.format {
            Format::Qcow2(image) => Some(&**image),
            Format::Raw(_) | Format::Qed(_) => None,
        })
    }

    /// The users of each image that frees clusters.
    fn users(&self) -> impl Iterator<Item = &Users> {
        self.layers.iter().filter_map(|layer| match &layer.format {
            Format::Qcow2(image) => Some(image.users()),
            Format::Raw(_) | Format::Qed(_) => None,
        })
    }

    /// The layers, top first. Never empty.
    #[must_use]
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// The layer that the guest writes.
    #[must_use]
    #[allow(clippy::indexing_slicing)]
    pub fn top(&self) -> &Arc<Layer> {
        // A chain is made of at least one layer.
        &self.layers[0]
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The unit of allocation of the top layer in bytes, 1 if it has none.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.top().format.cluster_size()
    }

    /// The storage of a layer.
    #[must_use]
    pub fn storage(&self, layer: usize) -> Option<&dyn Storage> {
        self.layers.get(layer).map(|layer| &*layer.storage)
    }

    /// The strictest alignment that any layer's storage asks for. A request that keeps to it can
    /// go to the ring as it is; others take the slow path, which copies.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.layers.iter().map(|layer| layer.storage.limits()).fold(
            Limits {
                memory_align: 1,
                offset_align: 1,
                zero_past_end: true,
            },
            |a, b| Limits {
                memory_align: a.memory_align.max(b.memory_align),
                offset_align: a.offset_align.max(b.offset_align),
                zero_past_end: a.zero_past_end && b.zero_past_end,
            },
        )
    }

    /// Plans a read of `[offset, offset + len)`, which lies within the disk. True: `pieces` say
    /// it all. False: take [`View::read`].
    pub fn plan_read(&self, offset: u64, len: usize, pieces: &mut Pieces) -> bool {
        pieces.clear();
        let mut done = 0;
        while done < len {
            let Some((source, now)) = self.find(0, offset + done as u64, (len - done) as u64)
            else {
                return false;
            };
            let now = now as usize;
            if self.top().copy_on_read && !matches!(source, Source::Storage { layer: 0, .. }) {
                return false;
            }
            if pieces
                .try_push(Piece {
                    source,
                    start: done,
                    len: now,
                })
                .is_err()
            {
                return false;
            }
            done += now;
        }
        true
    }

    /// Plans a write of `[offset, offset + len)`, which lies within the disk, in place. False:
    /// take [`View::write`].
    pub fn plan_write(&self, offset: u64, len: usize, pieces: &mut Pieces) -> bool {
        pieces.clear();
        if self.minds_writes {
            return self.plan_minded_write(offset, len, pieces);
        }
        self.plan_in_place(offset, len, pieces)
    }

    /// Plans a write where there is a tap or a watch.
    #[cold]
    #[inline(never)]
    fn plan_minded_write(&self, offset: u64, len: usize, pieces: &mut Pieces) -> bool {
        if self.tap.is_some() || !self.plan_in_place(offset, len, pieces) {
            return false;
        }
        self.note_write(offset, len as u64);
        for piece in pieces.iter() {
            if let Source::Storage { offset, .. } = piece.source {
                self.top().storage.note_write(offset, piece.len as u64);
            }
        }
        true
    }

    /// A write of `[offset, offset + len)` of the disk is about to begin.
    pub fn note_write(&self, offset: u64, len: u64) {
        if !self.minds_writes {
            return;
        }
        for threshold in self.watch.iter().flatten() {
            threshold.note(offset, len);
        }
        if self.watch.is_some() && matches!(self.top().format, Format::Raw(_)) {
            // All of it at once, in however many pieces it gets there.
            self.top().storage.note_write(offset, len);
        }
    }

    #[inline(always)]
    fn plan_in_place(&self, offset: u64, len: usize, pieces: &mut Pieces) -> bool {
        let mut done = 0;
        while done < len {
            let Some((at, now)) = self
                .top()
                .format
                .map_write(offset + done as u64, (len - done) as u64)
            else {
                return false;
            };
            let now = now as usize;
            let source = Source::Storage {
                layer: 0,
                offset: at,
            };
            if now == 0
                || pieces
                    .try_push(Piece {
                        source,
                        start: done,
                        len: now,
                    })
                    .is_err()
            {
                return false;
            }
            done += now;
        }
        true
    }

    /// Finds who supplies the bytes from `offset` on, looking from layer `first` down. `None`:
    /// metadata is missing, or the bytes are compressed.
    fn find(&self, first: usize, offset: u64, len: u64) -> Option<(Source, u64)> {
        let mut len = len;
        for (layer, at) in self.layers.iter().enumerate().skip(first) {
            let extent = at.format.map(offset, len);
            len = extent.len;
            match extent.place {
                Place::Data(offset) => return Some((Source::Storage { layer, offset }, len)),
                Place::Zero => return Some((Source::Zero, len)),
                Place::Below => {}
                Place::Compressed(_) | Place::Unknown => return None,
            }
        }
        Some((Source::Zero, len))
    }

    /// Makes everything stable that the guest wrote.
    ///
    /// # Errors
    /// What the storage reports.
    pub async fn flush(&self) -> Result<()> {
        // What lies below first: the top may hold copies of it.
        for layer in &self.closing {
            Box::pin(layer.flush()).await?;
        }
        match &self.tap {
            None => self.top().flush().await,
            Some(tap) => Box::pin(tap.flush(self.top())).await,
        }
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        self.overlays().for_each(Qcow2::end_overlay);
        self.users().for_each(|users| users.remove(&self.grace));
        self.grace.end();
    }
}

/// Where exports and jobs get the chain of a disk: the place in which new ones are published.
#[derive(Debug)]
pub struct Root {
    chain: ArcSwap<Chain>,
    /// Those of chains before it, of which requests may still be on their way.
    past: Mutex<Vec<Arc<Grace>>>,
}

impl Root {
    /// A root that begins with `chain`.
    #[must_use]
    pub fn new(chain: Chain) -> Arc<Self> {
        Arc::new(Self {
            chain: ArcSwap::from_pointee(chain),
            past: Mutex::default(),
        })
    }

    /// What says when the requests of all chains before the present one have ended: not only of the
    /// last one, since a chain is replaced without a wait for the one before.
    #[must_use]
    pub fn past(&self) -> Vec<Arc<Grace>> {
        self.past.lock().clone()
    }

    /// The chain as it is now.
    #[must_use]
    pub fn chain(&self) -> Arc<Chain> {
        self.chain.load_full()
    }

    /// Publishes a new chain: requests that begin from now on use it. Returns the old one, which
    /// may be the last to hold a file open.
    pub fn publish(&self, chain: Arc<Chain>) -> Arc<Chain> {
        let mut past = self.past.lock();
        let old = self.chain.swap(chain);
        past.retain(|grace| !grace.is_over());
        past.push(old.grace().clone());
        old
    }
}

/// A chain as one request sees it, and the grace period that protects its clusters.
///
/// `Rc`: a view stays on its thread, and sharing it costs no atomic operation.
#[derive(Debug)]
pub struct View {
    /// The layers.
    pub chain: Arc<Chain>,
    _era: LocalEra,
}

impl View {
    /// A view of `chain` for a task that is no queue worker's.
    #[must_use]
    pub fn of(chain: Arc<Chain>) -> Rc<Self> {
        let era = LocalEra::enter(&chain.grace);
        Rc::new(Self { chain, _era: era })
    }
}

/// A worker's own reference to the current view: requests clone it for the price of a plain
/// increment.
#[derive(Debug)]
pub struct ViewCache {
    root: Arc<Root>,
    eras: EraCache,
    view: Option<Rc<View>>,
}

impl ViewCache {
    /// Views of the disk at `root`.
    #[must_use]
    pub fn new(root: Arc<Root>) -> Self {
        Self {
            root,
            eras: EraCache::default(),
            view: None,
        }
    }

    /// The current view. Call it once per batch.
    pub fn get(&mut self) -> Rc<View> {
        let chain = self.root.chain.load();
        let era = self.eras.enter(&chain.grace);
        if let Some(view) = &self.view
            && Arc::ptr_eq(&view.chain, &chain)
            && view._era.is(&era)
        {
            return view.clone();
        }
        let view = Rc::new(View {
            chain: sync::Guard::into_inner(chain),
            _era: era,
        });
        self.view = Some(view.clone());
        view
    }

    /// How many have the current view, this cache among them.
    #[must_use]
    pub fn holders(&self) -> usize {
        self.view.as_ref().map_or(0, Rc::strong_count)
    }

    /// Lets go of everything, since no request has the view: call it before the thread sleeps,
    /// so that an idle worker holds up neither freed clusters nor old chains.
    pub fn leave(&mut self) {
        self.view = None;
        self.eras.leave();
    }

    /// The disk.
    #[must_use]
    pub fn root(&self) -> &Arc<Root> {
        &self.root
    }
}
