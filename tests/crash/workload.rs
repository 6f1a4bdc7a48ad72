//! Guests and a job at work on one disk, many operations in flight at a time. Operations of
//! guests never overlap in a sector, often in a cluster.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stratablk::chain::resize::{begin_growing, finish_growing, shrink_in_use};
use stratablk::chain::{Chain, Span, View};
use stratablk::format::Format;
use stratablk::reactor::{Reactor, yield_now};
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::disk::Recipe;
use crate::history::{Change, History, SECTOR, fill, stamp_of};

/// What a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Zero,
    Unmap,
    Discard,
    /// A job's copy from the layers below.
    Copy,
    Flush,
    /// Another size for the disk.
    Resize,
}

/// The time, by which the history is kept.
pub type Clock = Box<dyn Fn() -> usize>;

/// Is told of what is added to the history.
pub type Observer = Box<dyn Fn(Report)>;

/// What is added to the history: for a history that is kept elsewhere as well.
#[derive(Clone, Copy, Debug)]
pub enum Report {
    Began {
        start: usize,
        len: usize,
        change: Change,
    },
    /// The operation with this number, counted from 0.
    Ended(usize),
    /// A flush that began when there were so many reports.
    Flushed(usize),
    /// The image stands alone.
    Alone,
}

/// A disk under work, and what is known of it.
pub struct Work {
    pub seed: u64,
    /// The chain that new requests use.
    pub chain: RefCell<Arc<Chain>>,
    pub history: RefCell<History>,
    /// Requests that failed, and how.
    pub failures: RefCell<Vec<(Kind, i32)>>,
    /// Failures end the test.
    pub strict: Cell<bool>,
    /// Copies are compressed.
    pub compress: Cell<bool>,
    /// The first sector that guests touch.
    pub from: Cell<usize>,
    /// And the first one behind those.
    pub until: Cell<usize>,
    /// Some requests that begin after a stream's end have the chain of before it.
    pub keep_views: Cell<bool>,
    kept: RefCell<Option<Rc<View>>>,
    kept_views: Cell<usize>,
    /// Sectors of a block: guests ask for whole ones.
    pub grain: Cell<usize>,
    /// Who keeps the history as well.
    pub observer: RefCell<Option<Observer>>,
    clock: Clock,
    busy: RefCell<Vec<bool>>,
    rng: RefCell<StdRng>,
    stamp: Cell<u32>,
}

impl Work {
    pub fn new(chain: Arc<Chain>, first: Vec<u32>, seed: u64, clock: Clock) -> Rc<Self> {
        Rc::new(Self {
            seed,
            chain: RefCell::new(chain),
            busy: RefCell::new(vec![false; first.len()]),
            history: RefCell::new(History::new(first)),
            failures: RefCell::default(),
            strict: Cell::new(true),
            compress: Cell::new(false),
            from: Cell::new(0),
            until: Cell::new(usize::MAX),
            keep_views: Cell::new(false),
            kept: RefCell::default(),
            kept_views: Cell::new(0),
            grain: Cell::new(1),
            observer: RefCell::default(),
            clock,
            rng: RefCell::new(StdRng::seed_from_u64(seed)),
            stamp: Cell::new(1),
        })
    }

    /// Takes what the recipe says of requests and copies.
    pub fn adopt(&self, recipe: &Recipe) {
        self.compress.set(recipe.compress);
        self.from.set(recipe.from);
        if recipe.resized > 0 && !recipe.grows() {
            // What is above is lost with it.
            self.until.set(recipe.resized);
        }
        self.grain.set(recipe.grain());
    }

    /// The stamps from this one on have not been written yet.
    pub fn stamp_from(&self, stamp: u32) {
        self.stamp.set(stamp);
    }

    fn view(&self) -> Rc<View> {
        if let Some(kept) = &*self.kept.borrow()
            && self.rng.borrow_mut().random_bool(0.4)
        {
            self.kept_views.set(self.kept_views.get() + 1);
            return kept.clone();
        }
        View::of(self.chain.borrow().clone())
    }

    /// Lets go of the views that were kept; returns how many requests have used them.
    pub fn end_kept_views(&self) -> usize {
        self.kept.take();
        self.kept_views.get()
    }

    /// A guest's task: `count` operations of random kinds, one after another.
    pub fn spawn_guest(self: &Rc<Self>, reactor: &Reactor, count: usize) {
        let work = self.clone();
        reactor.spawn(async move {
            for _ in 0..count {
                let kind = match work.rng.borrow_mut().random_range(0..16) {
                    0..7 => Kind::Write,
                    7 => Kind::Zero,
                    8 => Kind::Unmap,
                    9..11 => Kind::Discard,
                    11 => Kind::Copy,
                    12..14 => Kind::Read,
                    _ => Kind::Flush,
                };
                work.operate(kind).await;
            }
        });
    }

    /// Has some of the sectors that guests leave alone written and cleared, many at once: many
    /// changes of the mapping in little time. No cluster is freed, or a flush would have to come.
    pub async fn fill(&self, start: usize, len: usize) {
        for kind in [Kind::Write, Kind::Zero] {
            self.operate_on(kind, start, len).await;
        }
    }

    /// The job: copies everything in `tasks` tasks; the last one to end lets go of the base.
    pub fn spawn_stream(self: &Rc<Self>, reactor: &Reactor, tasks: usize) {
        self.spawn_job(reactor, tasks, true);
    }

    /// The job as long as it copies; what fails is left.
    pub fn spawn_copies(self: &Rc<Self>, reactor: &Reactor, tasks: usize) {
        self.spawn_job(reactor, tasks, false);
    }

    fn spawn_job(self: &Rc<Self>, reactor: &Reactor, tasks: usize, whole: bool) {
        let left = Rc::new(Cell::new(tasks));
        let part = self.history.borrow().len().div_ceil(tasks);
        let part = part.next_multiple_of(self.grain.get()) * SECTOR;
        for task in 0..tasks {
            let (work, left) = (self.clone(), left.clone());
            reactor.spawn(async move {
                let size = work.chain.borrow().size();
                let mut at = (task * part) as u64;
                let stop = (at + part as u64).min(size);
                while at < stop {
                    let len = (stop - at).min(24 << 10);
                    let copied = work.copy(at, len).await;
                    work.judge(Kind::Copy, copied);
                    at += len;
                }
                left.set(left.get() - 1);
                if whole && left.get() == 0 {
                    work.let_go().await;
                }
            });
        }
    }

    /// Gives the disk another size when guests have done `after` operations.
    pub fn spawn_resize(self: &Rc<Self>, reactor: &Reactor, sectors: usize, after: usize) {
        let work = self.clone();
        let size = (sectors * SECTOR) as u64;
        reactor.spawn(async move {
            while work.history.borrow().notes() < after {
                yield_now().await;
            }
            let resized = work.resize(size).await;
            work.judge(Kind::Resize, resized);
        });
    }

    async fn resize(&self, size: u64) -> stratablk::error::Result<()> {
        let chain = self.chain.borrow().clone();
        let Format::Qcow2(image) = &chain.top().format else {
            panic!("the top layer is qcow2")
        };
        let (image, old) = (image.clone(), chain.size());
        drop(chain);
        if size < old {
            image.show(size);
            self.renew().await;
            return shrink_in_use(&image, size).await;
        }
        begin_growing(&image, size).await?;
        if !old.is_multiple_of(image.cluster_size()) {
            self.renew().await;
        }
        let chain = self.chain.borrow().clone();
        finish_growing(&chain, &image, (old, size)).await?;
        drop(chain);
        self.renew().await;
        Ok(())
    }

    /// Lets requests that begin from now on have a new chain of the same layers, and waits for the
    /// others.
    async fn renew(&self) {
        let layers = self.chain.borrow().layers().to_vec();
        let old = self.chain.replace(Arc::new(Chain::new(layers).unwrap()));
        let ended = old.grace().clone();
        drop(old);
        ended.ended().await;
    }

    /// Takes the base away, as the end of a stream does.
    pub async fn let_go(&self) {
        let chain = self.chain.borrow().clone();
        let Format::Qcow2(image) = &chain.top().format else {
            panic!("the top layer is qcow2")
        };
        let began = self.history.borrow().notes();
        let ended = image.set_backing(None).await;
        if self.judge(Kind::Flush, ended) {
            self.note(Report::Flushed(began));
            self.note(Report::Alone);
            let top = chain.top().clone();
            if self.keep_views.get() {
                *self.kept.borrow_mut() = Some(View::of(chain));
            }
            *self.chain.borrow_mut() = Arc::new(Chain::new(vec![top]).unwrap());
        }
    }

    /// The time.
    pub fn now(&self) -> usize {
        (self.clock)()
    }

    /// Adds to the history; the number of an operation that began.
    fn note(&self, report: Report) -> usize {
        let number = self.history.borrow_mut().note((self.clock)(), report);
        if let Some(observer) = &*self.observer.borrow() {
            observer(report);
        }
        number
    }

    /// True: it succeeded.
    fn judge(&self, kind: Kind, result: stratablk::error::Result<()>) -> bool {
        let Err(error) = result else { return true };
        assert!(
            !self.strict.get(),
            "seed {}: {kind:?} failed: {error}",
            self.seed
        );
        self.failures.borrow_mut().push((kind, error.errno()));
        false
    }

    /// A range that nothing in flight touches, if one is found soon.
    fn pick(&self) -> Option<(usize, usize)> {
        let mut rng = self.rng.borrow_mut();
        let mut busy = self.busy.borrow_mut();
        let end = (self.chain.borrow().size() as usize / SECTOR).min(self.until.get());
        for _ in 0..20 {
            let grain = self.grain.get();
            let longest = [1, 8, 24, 64][rng.random_range(0..4)];
            let start = rng.random_range(self.from.get()..end) / grain * grain;
            let len = rng.random_range(1..=longest).min(end - start);
            let len = len.next_multiple_of(grain);
            if busy[start..start + len].iter().all(|busy| !busy) {
                busy[start..start + len].fill(true);
                return Some((start, len));
            }
        }
        None
    }

    pub async fn flush(&self) -> bool {
        let began = self.history.borrow().notes();
        let chain = self.chain.borrow().clone();
        let flushed = chain.flush().await;
        let fine = self.judge(Kind::Flush, flushed);
        if fine {
            self.note(Report::Flushed(began));
        }
        fine
    }

    /// One operation of `kind` somewhere.
    pub async fn operate(&self, kind: Kind) {
        if kind == Kind::Flush {
            self.flush().await;
            return;
        }
        let Some((start, len)) = self.pick() else {
            yield_now().await;
            return;
        };
        self.operate_on(kind, start, len).await;
        self.busy.borrow_mut()[start..start + len].fill(false);
    }

    async fn operate_on(&self, kind: Kind, start: usize, len: usize) {
        let change = match kind {
            Kind::Write => {
                let stamp = self.stamp.get();
                self.stamp.set(stamp + len as u32);
                Some(Change::Write(stamp))
            }
            Kind::Zero | Kind::Unmap => Some(Change::Zero),
            Kind::Discard => Some(Change::Discard),
            _ => None,
        };
        let number = change.map(|change| self.note(Report::Began { start, len, change }));
        let result = self.perform(kind, start, len, change).await;
        if self.judge(kind, result)
            && let Some(number) = number
        {
            self.note(Report::Ended(number));
            if kind == Kind::Discard && self.rng.borrow_mut().random() {
                self.see_zeros(start, len).await;
            }
        }
    }

    /// Looks what a discard has left: after zeros, old bytes are never read again.
    async fn see_zeros(&self, start: usize, len: usize) {
        let mut buffer = AlignedBuf::zeroed(len * SECTOR);
        buffer.fill(1);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, len * SECTOR) };
        let read = self.view().read((start * SECTOR) as u64, bufs).await;
        if !self.judge(Kind::Read, read) {
            return;
        }
        for (start, sector) in (start..).zip(buffer.chunks(SECTOR)) {
            if stamp_of(sector) == Some(0) {
                let (len, change) = (1, Change::Zero);
                let number = self.note(Report::Began { start, len, change });
                self.note(Report::Ended(number));
            }
        }
    }

    /// Copies a range from the layers below, as a job does.
    async fn copy(&self, offset: u64, len: u64) -> stratablk::error::Result<()> {
        let view = self.view();
        let end = view.chain.layers().len();
        let span = Span::new(0, end).compressed(self.compress.get());
        let copied = view.copy(span, offset, len).await;
        copied.map(drop)
    }

    async fn perform(
        &self,
        kind: Kind,
        start: usize,
        len: usize,
        change: Option<Change>,
    ) -> stratablk::error::Result<()> {
        let (offset, bytes) = ((start * SECTOR) as u64, len * SECTOR);
        let mut buffer = AlignedBuf::zeroed(bytes);
        if let Some(Change::Write(stamp)) = change {
            fill(&mut buffer, stamp);
        }
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, bytes) };
        let view = self.view();
        match kind {
            Kind::Read => {
                view.read(offset, bufs).await?;
                self.verify(start, &buffer);
                Ok(())
            }
            Kind::Write => view.write(offset, bufs).await,
            Kind::Zero => view.write_zeroes(offset, bytes as u64, false).await,
            Kind::Unmap => view.write_zeroes(offset, bytes as u64, true).await,
            Kind::Discard => view.discard(offset, bytes as u64).await,
            Kind::Copy => self.copy(offset, bytes as u64).await,
            Kind::Flush | Kind::Resize => Ok(()),
        }
    }

    /// Whether sectors that nothing in flight touches read as something they may hold.
    pub fn verify(&self, start: usize, bytes: &[u8]) {
        let history = self.history.borrow();
        for (sector, got) in (start..).zip(bytes.chunks(SECTOR)) {
            let (stamp, possible) = (stamp_of(got), history.visible(sector));
            assert!(
                stamp.is_some_and(|stamp| possible.contains(&stamp)),
                "seed {}: sector {sector} reads {stamp:x?} {:x?}, written were {possible:x?}",
                self.seed,
                &got[..8]
            );
        }
    }
}
