//! What would be caught: overlapping writes that reach both disks in different orders; a guest that
//! changes its buffer in flight and gets other bytes on each; a background copy that brings back what
//! a guest has replaced; a failure of the second disk that the guest is told of, or that nobody
//! notices; a write that was told to be done and is not on the second disk when that one counts; a
//! flush that leaves the second disk out; a hold that is never had, or had twice.
//!
//! Operations of both disks end in an order that the seed decides.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use futures_util::future::join_all;
use proptest::prelude::*;

use super::*;
use crate::chain::{Chain, with_room};
use crate::format::qcow2::create::{CreateOptions, create};
use crate::format::qcow2::{self, Backing};
use crate::format::{Qcow2, Raw};
use crate::reactor::{Reactor, Token, yield_now};
use crate::storage::memory::{MemoryStorage, Step};
use crate::storage::{AlignedBuf, Answer, Limits, Op, Storage, Submission, Syncs};

const SIZE: u64 = 192 << 10;
const SECTOR: u64 = 512;

/// Numbers that follow from a seed (splitmix64).
#[derive(Debug)]
struct Rng(Cell<u64>);

impl Rng {
    fn new(seed: u64) -> Rc<Self> {
        Rc::new(Self(Cell::new(seed)))
    }

    fn below(&self, end: u64) -> u64 {
        let next = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(next);
        let mut mixed = next;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// Storage whose operations end later, in some order, and may fail.
#[derive(Debug)]
struct Late {
    inner: Arc<MemoryStorage>,
    rng: Mutex<u64>,
    /// Every fourth write fails.
    failing: AtomicBool,
}

impl Late {
    fn new(bytes: Vec<u8>, seed: u64) -> Arc<Self> {
        let inner = Arc::new(MemoryStorage::new(bytes));
        inner.record();
        Arc::new(Self {
            inner,
            rng: Mutex::new(seed),
            failing: AtomicBool::new(false),
        })
    }

    fn below(&self, end: u64) -> u64 {
        let mut state = self.rng.lock();
        let rng = Rng(Cell::new(*state));
        let value = rng.below(end);
        *state = rng.0.get();
        value
    }
}

/// A share of it, as a layer has one.
#[derive(Debug)]
struct Shared(Arc<Late>);

impl Storage for Shared {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        let changes = !matches!(op, Op::Read { .. } | Op::Sync);
        let fails = changes && self.0.failing.load(Ordering::SeqCst) && self.0.below(4) == 0;
        // The vectors are the caller's until the token is completed.
        let (vectors, offset, kind) = match op {
            Op::Read { iovecs, offset } => (iovecs.to_vec(), offset, 0),
            Op::Write { iovecs, offset } => (iovecs.to_vec(), offset, 1),
            Op::Zero { offset, len, unmap } => {
                let nothing = libc::iovec {
                    iov_base: std::ptr::null_mut(),
                    iov_len: len as usize,
                };
                (vec![nothing], offset, 2 + u8::from(unmap))
            }
            Op::Sync => (Vec::new(), 0, 4),
            Op::Reserve { .. } => {
                return Submission::Ready(Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)));
            }
        };
        let (storage, turns) = (self.0.clone(), self.0.below(12));
        reactor.spawn(async move {
            for _ in 0..turns {
                yield_now().await;
            }
            let reactor = Reactor::current().unwrap();
            let len = vectors.first().map_or(0, |v| v.iov_len as u64);
            let op = match kind {
                0 => Op::Read {
                    iovecs: &vectors,
                    offset,
                },
                1 => Op::Write {
                    iovecs: &vectors,
                    offset,
                },
                4 => Op::Sync,
                _ => Op::Zero {
                    offset,
                    len,
                    unmap: kind == 3,
                },
            };
            let result = match fails {
                true => Err(io::Error::from_raw_os_error(libc::EIO)),
                // SAFETY: the caller's memory is valid until the token is completed.
                false => match unsafe { storage.inner.submit(&reactor, op, Token::client(0)) } {
                    Submission::Ready(result) => result,
                    Submission::Pending => panic!("memory answers at once"),
                },
            };
            reactor.complete(token, result);
        });
        Submission::Pending
    }

    fn len(&self) -> Answer<'_, io::Result<u64>> {
        self.0.inner.len()
    }

    fn set_len(&self, len: u64) -> Answer<'_, io::Result<()>> {
        self.0.inner.set_len(len)
    }

    fn limits(&self) -> Limits {
        self.0.inner.limits()
    }

    fn name(&self) -> &'static str {
        "late"
    }

    fn writable(&self) -> bool {
        true
    }

    fn syncs(&self) -> Option<&Arc<Syncs>> {
        self.0.inner.syncs()
    }
}

/// How a disk is laid out.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Raw,
    /// Its version and cluster size.
    Qcow2(u32, u64),
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Raw),
        Just(Kind::Qcow2(3, 4096)),
        Just(Kind::Qcow2(3, 64 << 10)),
        Just(Kind::Qcow2(2, 4096)),
    ]
}

fn reactor() -> Reactor {
    Reactor::for_this_thread().unwrap()
}

/// A new disk of `size` bytes.
fn layer(kind: Kind, size: u64, seed: u64, backed: bool) -> (Arc<Layer>, Arc<Late>) {
    let (format, late): (Format, _) = match kind {
        Kind::Raw => {
            let late = Late::new(vec![0; size as usize], seed);
            (Format::Raw(Raw::new(size)), late)
        }
        Kind::Qcow2(version, cluster_size) => {
            let memory = MemoryStorage::new(Vec::new());
            let options = CreateOptions {
                version,
                cluster_size,
                backing: backed.then(|| Backing {
                    name: "below".into(),
                    format: Some("raw".into()),
                }),
                ..CreateOptions::new(size)
            };
            reactor().block_on(create(&memory, &options)).unwrap();
            let late = Late::new(memory.snapshot(), seed);
            let options = qcow2::Options {
                writable: true,
                discard: true,
                ..Default::default()
            };
            let open = Qcow2::open(Arc::new(Shared(late.clone())), options);
            (
                Format::Qcow2(Arc::new(reactor().block_on(open).unwrap())),
                late,
            )
        }
    };
    let layer = Layer {
        name: "disk".into(),
        format,
        storage: Arc::new(Shared(late.clone())),
        read_only: false,
        discard: true,
        copy_on_read: false,
    };
    (Arc::new(layer), late)
}

fn chain(layers: &[Arc<Layer>], tap: Option<&Arc<Tap>>) -> Chain {
    Chain::with_tap(layers.to_vec(), tap.cloned()).unwrap()
}

async fn write(root: &Root, offset: u64, buffer: &AlignedBuf) -> Result<()> {
    let request = async |view: Rc<View>| {
        // SAFETY: it may change at any time, as a guest's memory may.
        let bufs = unsafe { IoBufs::of(buffer, 0, buffer.len()) };
        view.write(offset, bufs).await
    };
    with_room(View::of(root.chain()), || root.chain(), request).await
}

fn read(root: &Root, len: u64) -> Vec<u8> {
    let buffer = AlignedBuf::zeroed(len as usize);
    // SAFETY: `buffer` outlives the read.
    let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
    let view = View::of(root.chain());
    reactor().block_on(view.read(0, bufs)).unwrap();
    buffer.to_vec()
}

/// Copies what of `range` the layers above `end` have, as a job does.
async fn copy(root: &Root, tap: &Tap, end: usize, range: Range<u64>) -> Result<()> {
    let renew = || tap.target().chain();
    let request = async |target: Rc<View>| {
        let hold = tap.hold(range.clone()).await;
        let source = View::of(root.chain());
        let part = (range.start, range.end - range.start);
        source.copy_onto(end, &target, part, Some(hold)).await
    };
    with_room(View::of(renew()), renew, request).await.map(drop)
}

/// Copies all that is dirty, and again where that fails.
async fn clean(root: &Root, tap: &Tap, end: usize) {
    while let Some(range) = tap.take_dirty(16 << 10) {
        if copy(root, tap, end, range.clone()).await.is_err() {
            tap.mark(range);
        }
    }
}

/// What a guest does next: write, write-zeroes or discard.
async fn change(root: &Root, rng: &Rng, range: Range<u64>) -> (Result<()>, Option<u8>) {
    let (at, len) = (range.start, range.end - range.start);
    match rng.below(6) {
        0 => {
            let unmap = rng.below(2) == 0;
            let view = View::of(root.chain());
            (view.write_zeroes(at, len, unmap).await, Some(0))
        }
        1 => (View::of(root.chain()).discard(at, len).await, None),
        _ => {
            let fill = 1 + rng.below(255) as u8;
            let buffer = AlignedBuf::copy_of(&vec![fill; len as usize]);
            (write(root, at, &buffer).await, Some(fill))
        }
    }
}

fn some_range(rng: &Rng, size: u64, most: u64) -> Range<u64> {
    let start = rng.below(size / SECTOR) * SECTOR;
    let len = (1 + rng.below(most / SECTOR)) * SECTOR;
    start..(start + len).min(size)
}

/// Guests write all over a disk, each other's bytes included, while it is copied onto another one,
/// which fails now and then.
fn mirror(top: Kind, target: Kind, failing: bool, seed: u64) {
    let rng = Rng::new(seed);
    let (top, _) = layer(top, SIZE, seed ^ 1, false);
    let (second, late) = layer(target, SIZE, seed ^ 2, false);
    let tap = Tap::new(Root::new(chain(&[second], None)));
    let root = Root::new(chain(std::slice::from_ref(&top), None));
    let before = AlignedBuf::copy_of(&vec![0xaa; SIZE as usize / 2]);
    reactor().block_on(write(&root, 0, &before)).unwrap();
    let old = root.publish(Arc::new(chain(&[top], Some(&tap))));
    drop(old);
    late.failing.store(failing, Ordering::SeqCst);
    let guests = (0..5).map(|_| {
        let (root, rng) = (&root, rng.clone());
        async move {
            for _ in 0..12 {
                let range = some_range(&rng, SIZE, 24 << 10);
                let (result, _) = change(root, &rng, range).await;
                result.expect("the guest's own disk is well");
            }
        }
    });
    // One that changes its buffer while it is written.
    let restless = async {
        for _ in 0..12 {
            let range = some_range(&rng, SIZE, 24 << 10);
            let buffer = AlignedBuf::zeroed((range.end - range.start) as usize);
            // SAFETY: as a guest's memory, it may change at any time.
            let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
            let over = Cell::new(false);
            let scribble = async {
                while !over.get() {
                    bufs.copy_from(&vec![rng.below(256) as u8; buffer.len()]);
                    yield_now().await;
                }
            };
            let writing = async {
                let result = write(&root, range.start, &buffer).await;
                over.set(true);
                result.expect("the guest's own disk is well");
            };
            join(scribble, writing).await;
        }
    };
    let copier = async {
        let mut at = 0;
        while at < SIZE {
            let end = SIZE.min(at + (16 << 10));
            if copy(&root, &tap, 1, at..end).await.is_err() {
                tap.mark(at..end);
            }
            at = end;
        }
    };
    reactor().block_on(async { join(join_all(guests), join(restless, copier)).await });
    late.failing.store(false, Ordering::SeqCst);
    reactor().block_on(clean(&root, &tap, 1));
    assert!(tap.begin_turn(), "all has been copied");
    let (own, copied) = (read(&root, SIZE), read(tap.target(), SIZE));
    let differs = own
        .iter()
        .zip(&copied)
        .position(|(one, other)| one != other);
    assert_eq!(differs, None, "the disks differ");
}

/// Guests, each with bytes of its own in all clusters, write a disk that is committed; in the middle
/// of it they are put on the base. What they were told to be done is there.
fn turn(top: Kind, base: Kind, failing: bool, called_off: bool, seed: u64) {
    const UNIT: u64 = 6 * SECTOR;
    const GUESTS: u64 = 4;
    let rng = Rng::new(seed);
    let (base, late) = layer(base, SIZE, seed ^ 3, false);
    let (top, _) = layer(top, SIZE, seed ^ 4, true);
    let second = Root::new(chain(std::slice::from_ref(&base), None));
    let before = AlignedBuf::copy_of(&vec![0xaa; SIZE as usize]);
    reactor().block_on(write(&second, 0, &before)).unwrap();
    let tap = Tap::new(second);
    let root = Root::new(chain(&[top.clone(), base.clone()], Some(&tap)));
    late.failing.store(failing, Ordering::SeqCst);
    // None: anything may be there.
    let model = RefCell::new(vec![Some(0xaa_u8); SIZE as usize]);
    let at_work = Cell::new(GUESTS);
    let guests = (0..GUESTS).map(|guest| {
        let (root, rng, model, at_work) = (&root, rng.clone(), &model, &at_work);
        async move {
            for _ in 0..20 {
                let unit = rng.below(SIZE / UNIT / GUESTS) * GUESTS + guest;
                let within = some_range(&rng, UNIT, UNIT);
                let range = unit * UNIT + within.start..unit * UNIT + within.end;
                let (result, fill) = change(root, &rng, range.clone()).await;
                let fill = fill.filter(|_| result.is_ok());
                for byte in range {
                    model.borrow_mut()[byte as usize] = fill;
                }
            }
            at_work.set(at_work.get() - 1);
        }
    });
    let job = async {
        for at in (0..SIZE).step_by(16 << 10) {
            if copy(&root, &tap, 1, at..at + (16 << 10)).await.is_err() {
                tap.mark(at..at + (16 << 10));
            }
        }
        loop {
            clean(&root, &tap, 1).await;
            if !tap.begin_turn() {
                continue;
            }
            for _ in 0..rng.below(40) {
                yield_now().await;
            }
            let turned = tap.is_clean() && !called_off;
            if turned {
                let next = Arc::new(chain(std::slice::from_ref(&base), None));
                drop(root.publish(next));
            }
            tap.end_turn(turned);
            if turned {
                tap.unused().await;
                return;
            }
            if called_off && at_work.get() == 0 {
                clean(&root, &tap, 1).await;
                return;
            }
            yield_now().await;
        }
    };
    reactor().block_on(async { join(join_all(guests), job).await });
    let disks = match called_off {
        // Both are good, whether the job is cancelled or goes on.
        true => vec![read(&root, SIZE), read(tap.target(), SIZE)],
        false => vec![read(&root, SIZE)],
    };
    for disk in disks {
        for (at, (found, wanted)) in disk.iter().zip(&*model.borrow()).enumerate() {
            let right = wanted.is_none_or(|wanted| wanted == *found);
            assert!(right, "at {at}: {found:#x} in place of {wanted:x?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn both_disks_get_what_is_written(
        top in kinds(), target in kinds(), failing: bool, seed: u64
    ) {
        mirror(top, target, failing, seed);
        Reactor::leave_thread();
    }

    #[test]
    fn what_is_done_is_on_the_disk_that_counts(
        cluster in prop_oneof![Just(4096u64), Just(64 << 10)],
        version in 2u32..4,
        base in kinds(), failing: bool, called_off: bool, seed: u64
    ) {
        turn(Kind::Qcow2(version, cluster), base, failing, called_off, seed);
        Reactor::leave_thread();
    }
}

/// A raw disk with a raw second one.
fn raw() -> (Arc<Root>, Arc<Tap>, Arc<Late>, Arc<Late>) {
    let (top, own) = layer(Kind::Raw, SIZE, 5, false);
    let (second, late) = layer(Kind::Raw, SIZE, 6, false);
    let tap = Tap::new(Root::new(chain(&[second], None)));
    let root = Root::new(chain(&[top], Some(&tap)));
    (root, tap, own, late)
}

#[test]
fn a_flush_covers_both_disks_and_fails_with_the_one_that_counts() {
    let (root, tap, own, late) = raw();
    let flush = || reactor().block_on(root.chain().flush());
    let buffer = AlignedBuf::copy_of(&[7; 4096]);
    reactor().block_on(write(&root, 0, &buffer)).unwrap();
    flush().unwrap();
    for storage in [&own, &late] {
        assert_eq!(storage.inner.take_log().last(), Some(&Step::Sync));
    }
    late.inner.fail_syncs(true);
    flush().unwrap();
    assert_eq!(tap.failure().unwrap().errno, libc::EIO);
    assert!(!tap.begin_turn(), "it cannot be the guest's disk");
    let (root, tap, own, late) = raw();
    assert!(tap.begin_turn());
    tap.end_turn(true);
    own.inner.fail_syncs(true);
    reactor().block_on(root.chain().flush()).unwrap();
    late.inner.fail_syncs(true);
    assert!(reactor().block_on(root.chain().flush()).is_err());
    Reactor::leave_thread();
}

#[test]
fn while_it_is_decided_a_failure_waits() {
    for turned in [false, true] {
        let (root, tap, _, late) = raw();
        assert!(tap.begin_turn());
        late.failing.store(true, Ordering::SeqCst);
        let told: Rc<Cell<Option<bool>>> = Rc::default();
        let (writer, answer) = (root.clone(), told.clone());
        let reactor = reactor();
        reactor.spawn(async move {
            let buffer = AlignedBuf::copy_of(&[7; 4096]);
            // Until one fails.
            let mut ok = true;
            for block in 0..SIZE / 4096 {
                ok &= write(&writer, block * 4096, &buffer).await.is_ok();
            }
            answer.set(Some(ok));
        });
        while tap.is_clean() && told.get().is_none() {
            reactor.turn();
        }
        for _ in 0..100 {
            reactor.turn();
        }
        assert_eq!(told.get(), None, "it is not known yet");
        late.failing.store(false, Ordering::SeqCst);
        tap.end_turn(turned);
        while told.get().is_none() {
            assert!(reactor.turn(), "nobody was woken");
        }
        assert_eq!(told.get(), Some(!turned));
    }
    Reactor::leave_thread();
}

#[test]
fn holds_are_had_in_order_and_given_up() {
    let reactor = reactor();
    let holds: Arc<Holds> = Arc::default();
    type Held = Vec<(u64, Range<u64>)>;
    let held: Rc<RefCell<Held>> = Rc::default();
    let rng = Rng::new(1);
    for number in 0..300 {
        let (holds, held) = (holds.clone(), held.clone());
        let range = some_range(&rng, 20 * SECTOR, 8 * SECTOR);
        let (turns, gives_up) = (rng.below(3), rng.below(5) == 0);
        reactor.spawn(async move {
            if gives_up {
                let mut hold = Box::pin(holds.hold(range));
                let _ = futures_util::poll!(&mut hold);
                yield_now().await;
                return;
            }
            let hold = holds.hold(range.clone()).await;
            for (other, theirs) in &*held.borrow() {
                let apart = theirs.end <= range.start || range.end <= theirs.start;
                assert!(apart, "{number} has {range:?} with {other}");
            }
            held.borrow_mut().push((number, range));
            for _ in 0..turns {
                yield_now().await;
            }
            held.borrow_mut().retain(|(other, _)| *other != number);
            drop(hold);
        });
    }
    while reactor.tasks() > 0 {
        assert!(reactor.turn(), "a waiter was never woken");
    }
    // A long range has its turn among short ones that never end.
    let first = reactor.block_on(holds.hold(0..SECTOR));
    let mut long = Box::pin(holds.hold(0..SIZE));
    assert!(futures_util::FutureExt::now_or_never(&mut long).is_none());
    let mut after = Box::pin(holds.hold(SECTOR..2 * SECTOR));
    assert!(futures_util::FutureExt::now_or_never(&mut after).is_none());
    drop(first);
    let long = reactor.block_on(long);
    assert!(futures_util::FutureExt::now_or_never(&mut after).is_none());
    drop(long);
    drop(reactor.block_on(after));
    Reactor::leave_thread();
}

#[test]
fn dirty_ranges_grow_together_and_are_taken_in_pieces() {
    let (_, tap, ..) = raw();
    for range in [10..20, 30..40, 19..31, 50..60, 5..10, 60..61, 70..70] {
        tap.mark(range);
    }
    assert_eq!(tap.dirty(), 46);
    assert_eq!(tap.take_dirty(20), Some(5..25));
    assert_eq!(tap.take_dirty(100), Some(25..40));
    assert_eq!(tap.take_dirty(100), Some(50..61));
    assert_eq!(tap.take_dirty(100), None);
    assert!(tap.begin_turn());
    Reactor::leave_thread();
}
