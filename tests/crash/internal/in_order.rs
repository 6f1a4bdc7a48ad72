//! Orders of a few operations, each one chosen: what begins before a snapshot and ends after it.

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::SystemTime;

use stratablk::chain::View;
use stratablk::storage::{AlignedBuf, IoBufs};

use super::taken::Snapshots;
use super::{Bench, recipe};
use crate::disk::read_all;
use crate::history::{SECTOR, fill, stamp_of};
use crate::machine::Machine;
use crate::qcow2::{Image, Sector};
use crate::workload::Work;

/// A disk with its operations pending; of these the one issued last ends first.
struct Slow {
    bench: Bench,
    machine: Machine,
    work: Rc<Work>,
    snapshots: Rc<Snapshots>,
}

impl Slow {
    fn new() -> Self {
        let bench = Bench::new(recipe("cluster_size=4k"));
        let machine = Machine::new(&bench.disk.files);
        let (work, snapshots) = bench.work(&machine);
        machine.hold(true);
        Self {
            bench,
            machine,
            work,
            snapshots,
        }
    }

    fn settle(&self) {
        while self.bench.reactor.turn() {}
    }

    /// Begins something, which goes on until it waits.
    fn start(&self, what: impl Future<Output = ()> + 'static) -> Rc<Cell<bool>> {
        let done = Rc::new(Cell::new(false));
        let ended = done.clone();
        self.bench.reactor.spawn(async move {
            what.await;
            ended.set(true);
        });
        self.settle();
        done
    }

    fn write(&self, sector: usize, stamp: u32) -> Rc<Cell<bool>> {
        let view = View::of(self.work.chain.borrow().clone());
        self.start(async move {
            let mut buffer = AlignedBuf::zeroed(SECTOR);
            fill(&mut buffer, stamp);
            // SAFETY: `buffer` outlives the operation.
            let bufs = unsafe { IoBufs::of(&buffer, 0, SECTOR) };
            view.write((sector * SECTOR) as u64, bufs).await.unwrap();
        })
    }

    /// Takes a snapshot; says when its instant has come.
    fn take(&self) -> Rc<Cell<bool>> {
        let image = self.snapshots.image.clone();
        let instant = Rc::new(Cell::new(false));
        let come = instant.clone();
        self.start(async move {
            let names = ["one".to_owned()];
            let prepared = image.take_snapshots(&names, SystemTime::UNIX_EPOCH).await;
            let rest = prepared.unwrap().take_effect();
            come.set(true);
            image.late().those_there_end().await;
            rest.finish().await.unwrap();
        });
        instant
    }

    /// Lets operations end, the last one first, until `done`; the first one of all stays if it can.
    fn until(&self, done: &Cell<bool>) {
        while !done.get() {
            let any = self.machine.finish_in_order(&self.bench.reactor, true);
            assert!(any, "it waits for nothing");
            self.settle();
        }
    }

    /// Ends everything; returns the disk's stamps, and those of the snapshot.
    fn end(self) -> (Vec<Option<u32>>, Vec<Option<u32>>) {
        while self.machine.finish_in_order(&self.bench.reactor, true) {
            self.settle();
        }
        assert_eq!(self.bench.reactor.tasks(), 0);
        self.machine.hold(false);
        let chain = self.work.chain.borrow().clone();
        let seen = read_all(&self.bench.reactor, &chain).unwrap();
        let closed = self.bench.reactor.block_on(self.snapshots.image.close());
        closed.unwrap();
        let bytes = self.machine.bytes(0);
        let image = Image::new(&bytes).unwrap();
        assert_eq!(image.check(), Ok(0));
        let root = image.snapshots().unwrap()[0];
        let stamp = |sector: usize| match image.find(root, sector as u64).unwrap() {
            Sector::Host(at) => stamp_of(&bytes[at as usize..at as usize + SECTOR]),
            Sector::Zero | Sector::Below => Some(0),
        };
        (seen, (0..self.bench.disk.first.len()).map(stamp).collect())
    }
}

/// What would be caught: a mapping of before the instant that comes into memory after it, by which
/// a write goes to the snapshot.
#[test]
fn a_table_that_is_read_while_it_moves() {
    let slow = Slow::new();
    let first = slow.bench.disk.first.clone();
    // The mapping is not in memory: it waits for that.
    let read = slow.write(8, 71);
    let instant = slow.take();
    slow.until(&instant);
    assert!(!read.get(), "the table has been read before it moved");
    slow.until(&read);
    let again = slow.write(9, 72);
    slow.until(&again);
    let (seen, taken) = slow.end();
    assert_eq!((seen[8], seen[9]), (Some(71), Some(72)));
    let expected: Vec<_> = first.into_iter().map(Some).collect();
    assert!(taken == expected, "the snapshot has been written to");
}

/// What would be caught: a write in place that lands in the snapshot alone, since its cluster has been
/// copied before.
#[test]
fn a_write_in_place_that_lands_after_the_instant() {
    let slow = Slow::new();
    let loaded = slow.write(0, 70);
    slow.until(&loaded);
    let early = slow.write(8, 71);
    let instant = slow.take();
    slow.until(&instant);
    assert!(!early.get(), "it has landed before the instant");
    let late = slow.write(9, 72);
    slow.until(&late);
    assert!(early.get(), "nobody has waited for it");
    let first = slow.bench.disk.first.clone();
    let (seen, taken) = slow.end();
    assert_eq!((seen[8], seen[9]), (Some(71), Some(72)));
    assert_eq!((taken[0], taken[8]), (Some(70), Some(71)));
    assert_eq!(taken[9], Some(first[9]), "the snapshot has been written to");
}
