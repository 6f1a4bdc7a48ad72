//! Operations that meet on one cluster, or in one flush, in orders that are chosen: each waits
//! where it must, and looks again at what another has changed meanwhile.
//!
//! What would be caught: a write that goes by what it saw before it had its claim, and copies old
//! bytes over a neighbour's new ones; a copy that covers what a guest wrote meanwhile; zeros that
//! an older write's old bytes come back over; a flush or a change of the header beside another
//! flush; a flush that is taken for done because an older one has ended; requests that wait for
//! one flush, and each make one.

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

use parking_lot::RwLockWriteGuard;
use stratablk::chain::{Chain, Span, View};
use stratablk::format::Qcow2;
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::alone;
use crate::disk::{Below, Disk, Opened, Recipe, read_all, write};
use crate::history::{SECTOR, fill};
use crate::machine::Machine;

/// Sectors of a cluster, and the first one of the cluster that is met on: the base has data there.
const CLUSTER: usize = 8;
const AT: usize = 40;

/// The stamp of a sector that was written: by whom, and which.
fn stamp(writer: u32, sector: usize) -> u32 {
    0xc000_0000 + (writer << 16) + sector as u32
}

struct Bench {
    reactor: Reactor,
    machine: Machine,
    /// Of the operations that are pending, the one issued last ends first; else the first.
    newest_first: bool,
    disk: Disk,
    chain: Arc<Chain>,
    image: Arc<Qcow2>,
    _alone: RwLockWriteGuard<'static, ()>,
    _dir: tempfile::TempDir,
}

/// Whether an operation has ended.
type Done = Rc<Cell<bool>>;

/// Pending operations end in the order that they were issued in, and in the opposite one.
const ORDERS: [bool; 2] = [false, true];

impl Bench {
    /// An overlay on a raw base, with its mapping in memory; operations stay pending from now on.
    fn new(options: &'static str, newest_first: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let recipe = Recipe {
            below: Below::Raw,
            ..Recipe::new(options, 128)
        };
        let disk = Disk::make(dir.path(), recipe);
        let reactor = Reactor::for_this_thread().unwrap();
        let machine = Machine::new(&disk.files);
        let alone = alone();
        let Opened { image, chain } = reactor.block_on(disk.open(&machine, true)).unwrap();
        read_all(&reactor, &chain).unwrap();
        machine.hold(true);
        Self {
            reactor,
            machine,
            newest_first,
            disk,
            chain,
            image,
            _alone: alone,
            _dir: dir,
        }
    }

    /// Begins something, which goes on until it waits.
    fn start(&self, what: impl Future<Output = ()> + 'static) -> Done {
        let done = Done::default();
        let ended = done.clone();
        self.reactor.spawn(async move {
            what.await;
            ended.set(true);
        });
        self.settle();
        done
    }

    fn settle(&self) {
        while self.reactor.turn() {}
    }

    /// Lets one pending operation of the storage end. False: there is none.
    fn step(&self) -> bool {
        let any = self
            .machine
            .finish_in_order(&self.reactor, self.newest_first);
        self.settle();
        any
    }

    /// Lets operations end until `done`.
    fn finish(&self, done: &Done) {
        while !done.get() {
            assert!(self.step(), "it waits for nothing");
        }
    }

    fn finish_all(&self, all: &[&Done]) {
        while self.step() {}
        assert!(all.iter().all(|done| done.get()), "it waits for nothing");
        assert_eq!(self.reactor.tasks(), 0);
    }

    fn view(&self) -> Rc<View> {
        View::of(self.chain.clone())
    }

    fn write(&self, writer: u32, sector: usize) -> Done {
        let view = self.view();
        self.start(async move {
            let mut buffer = AlignedBuf::zeroed(SECTOR);
            fill(&mut buffer, stamp(writer, sector));
            // SAFETY: `buffer` outlives the operation.
            let bufs = unsafe { IoBufs::of(&buffer, 0, SECTOR) };
            view.write((sector * SECTOR) as u64, bufs).await.unwrap();
        })
    }

    /// Copies the cluster that is met on.
    fn copy(&self, compressed: bool) -> Done {
        let view = self.view();
        self.start(async move {
            let (offset, len) = ((AT * SECTOR) as u64, (CLUSTER * SECTOR) as u64);
            let span = Span::new(0, 2).compressed(compressed);
            view.copy(span, offset, len).await.unwrap();
        })
    }

    /// Makes it read as zeros: by a request to write them, or by a discard.
    fn clear(&self, discard: bool) -> Done {
        let view = self.view();
        self.start(async move {
            let (offset, len) = ((AT * SECTOR) as u64, (CLUSTER * SECTOR) as u64);
            if discard {
                view.discard(offset, len).await.unwrap();
            } else {
                view.write_zeroes(offset, len, true).await.unwrap();
            }
        })
    }

    fn flush(&self) -> Done {
        let chain = self.chain.clone();
        self.start(async move { chain.flush().await.unwrap() })
    }

    /// The stamps that a guest reads, with nothing pending.
    fn read(&self) -> Vec<u32> {
        self.machine.hold(false);
        let seen = read_all(&self.reactor, &self.chain).unwrap();
        self.machine.hold(true);
        seen.into_iter()
            .map(|stamp| stamp.expect("a torn sector"))
            .collect()
    }

    /// Expects what was there at first, but for these sectors.
    fn expect(&self, case: &str, changed: &[(usize, u32)]) {
        let mut expected = self.disk.first.clone();
        for &(sector, stamp) in changed {
            expected[sector] = stamp;
        }
        assert_eq!(self.read(), expected, "{case}");
        self.machine.hold(false);
        self.reactor.block_on(self.image.close()).unwrap();
        let bytes = self.machine.bytes(0);
        let leaks = crate::qcow2::Image::new(&bytes).unwrap().check();
        assert_eq!(leaks, Ok(0), "{case}");
    }
}

type First = fn(&Bench) -> Done;

const FIRST: [(&str, First); 3] = [
    ("after a write", |bench| bench.write(1, AT)),
    ("after a copy", |bench| bench.copy(false)),
    ("after a compressed copy", |bench| bench.copy(true)),
];

/// Every combination of image, order and who is there first.
fn cases(options: &[&'static str], firsts: &[(&str, First)], test: impl Fn(&str, &Bench, First)) {
    for &options in options {
        for newest_first in ORDERS {
            for &(what, first) in firsts {
                let case = format!("{options}, newest first: {newest_first}, {what}");
                test(&case, &Bench::new(options, newest_first), first);
            }
        }
    }
}

/// The second finds the cluster there when it has its claim, and a third writes in place, without
/// one: a copy of the cluster then would lose what the third wrote.
#[test]
fn a_write_that_waited_for_its_claim_looks_again() {
    let options = ["cluster_size=4k", "cluster_size=16k,extended_l2=on"];
    cases(&options, &FIRST, |case, bench, first| {
        let first = first(bench);
        let second = bench.write(2, AT + 1);
        assert!(!first.get() && !second.get(), "{case}");
        bench.finish(&first);
        assert!(!second.get(), "{case}");
        // Whatever it reads of the old cluster it has read then.
        bench.step();
        let third = bench.write(3, AT + 2);
        bench.finish_all(&[&first, &second, &third]);
        let mut changed = vec![(AT + 1, stamp(2, AT + 1)), (AT + 2, stamp(3, AT + 2))];
        if case.ends_with("after a write") {
            changed.push((AT, stamp(1, AT)));
        }
        bench.expect(case, &changed);
    });
}

/// A guest's write is under way when a copy of its cluster begins.
#[test]
fn a_copy_that_waited_for_its_claim_looks_again() {
    let copies: [(&str, First); 2] = [
        ("a copy", |bench| bench.copy(false)),
        ("a compressed copy", |bench| bench.copy(true)),
    ];
    let options = ["cluster_size=4k", "cluster_size=16k,extended_l2=on"];
    cases(&options, &copies, |case, bench, copy| {
        let first = bench.write(1, AT);
        let second = copy(bench);
        assert!(!first.get() && !second.get(), "{case}");
        bench.finish_all(&[&first, &second]);
        bench.expect(case, &[(AT, stamp(1, AT))]);
    });
}

/// Zeros that completed stay: what an older write or copy takes from below comes before them.
#[test]
fn zeros_wait_for_what_is_under_way_in_their_cluster() {
    for discard in [false, true] {
        cases(&["cluster_size=4k"], &FIRST, |case, bench, first| {
            let first = first(bench);
            // It has read what is below.
            bench.step();
            let second = bench.clear(discard);
            assert!(!first.get(), "{case}");
            bench.finish_all(&[&first, &second]);
            let zeros: Vec<_> = (AT..AT + CLUSTER).map(|sector| (sector, 0)).collect();
            bench.expect(&format!("{case}, discard: {discard}"), &zeros);
        });
    }
}

#[test]
fn flushes_go_one_after_the_other_and_share() {
    for newest_first in ORDERS {
        let bench = Bench::new("cluster_size=4k", newest_first);
        let first = bench.write(1, AT);
        bench.finish(&first);
        let flush = bench.flush();
        assert!(!flush.get());
        // Not covered by the flush that is under way.
        bench.machine.hold(false);
        write(&bench.reactor, &bench.chain, 80, 1, stamp(2, 80)).unwrap();
        bench.machine.hold(true);
        let before = bench.machine.now();
        let (second, third) = (bench.flush(), bench.flush());
        assert_eq!(bench.machine.now(), before, "two flushes at a time");
        bench.finish(&flush);
        assert!(
            !second.get() && !third.get(),
            "the first began before their data"
        );
        while !(second.get() || third.get()) {
            assert!(bench.step());
        }
        let shared = bench.machine.now();
        bench.finish_all(&[&second, &third]);
        assert_eq!(bench.machine.now(), shared, "one flush is enough for both");
        // As after a cut: nothing of the image was closed.
        let files: Vec<_> = (0..2).map(|file| bench.machine.bytes(file)).collect();
        let machine = Machine::new(&files);
        let opened = bench.reactor.block_on(bench.disk.open(&machine, false));
        let seen = read_all(&bench.reactor, &opened.unwrap().chain).unwrap();
        assert_eq!(seen[AT], Some(stamp(1, AT)));
        assert_eq!(seen[80], Some(stamp(2, 80)));
        bench.expect("flushes", &[(AT, stamp(1, AT)), (80, stamp(2, 80))]);
    }
}

/// A header that no longer names the base must come behind all that was copied.
#[test]
fn the_header_waits_for_the_flush_that_is_under_way() {
    for newest_first in ORDERS {
        let bench = Bench::new("cluster_size=4k", newest_first);
        let first = bench.write(1, AT);
        bench.finish(&first);
        let flush = bench.flush();
        let before = bench.machine.now();
        let image = bench.image.clone();
        let header = bench.start(async move { image.set_backing(None).await.unwrap() });
        assert_eq!(bench.machine.now(), before, "beside a flush");
        bench.finish(&flush);
        assert!(!header.get());
        bench.finish_all(&[&flush, &header]);
        assert!(bench.image.backing().is_none());
    }
}
