//! Space that is given back to the file system: while a freed cluster is punched, and until its
//! reference is off, nobody gets the cluster or a part of it.
//!
//! What would be caught: bytes that are written to a cluster while its old contents are punched.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use stratablk::chain::{Chain, Span, View};
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::alone;
use crate::disk::{Below, Disk, Opened, Recipe, read_all};
use crate::history::{SECTOR, fill};
use crate::machine::{Counted, Effect, Fault, Machine};
use crate::qcow2::Image;

/// Sectors of a cluster.
const CLUSTER: usize = 4096 / SECTOR;
/// The cluster that is freed begins at this sector.
const FREED: usize = 40;
/// The cluster that takes space meanwhile.
const TAKEN: usize = 48;

/// What was in the freed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freed {
    /// One compressed cluster, with room for others.
    Compressed,
    /// Data of one guest cluster.
    Data,
}

/// Who takes space while the freed cluster is punched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taker {
    /// A job's copy, compressed.
    Compressed,
    /// A job's copy.
    Copy,
    /// A guest's write.
    Write,
}

async fn copy(chain: Arc<Chain>, sector: usize, compressed: bool) {
    let span = Span::new(0, 2).compressed(compressed);
    let view = View::of(chain);
    let copied = view.copy(span, (sector * SECTOR) as u64, 4096);
    copied.await.unwrap();
}

async fn take(chain: Arc<Chain>, taker: Taker) {
    match taker {
        Taker::Compressed => copy(chain, TAKEN, true).await,
        Taker::Copy => copy(chain, TAKEN, false).await,
        Taker::Write => {
            let mut buffer = AlignedBuf::zeroed(4096);
            fill(&mut buffer, 0xc000_0000);
            // SAFETY: `buffer` outlives the operation.
            let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
            let view = View::of(chain);
            view.write((TAKEN * SECTOR) as u64, bufs).await.unwrap();
        }
    }
}

/// Frees a cluster, and lets `taker` go from its beginning to its end while the punch is pending.
fn free_and_take(freed: Freed, taker: Taker, fails: bool) {
    let case = format!("{freed:?} freed, {taker:?}, the punch fails: {fails}");
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe {
        below: Below::Raw,
        ..Recipe::new("cluster_size=4k", 128)
    };
    let disk = Disk::make(dir.path(), recipe);
    let reactor = Reactor::for_this_thread().unwrap();
    let machine = Machine::new(&disk.files);
    let _alone = alone();
    let Opened { image, chain } = reactor.block_on(disk.open(&machine, true)).unwrap();
    let flush = || reactor.block_on(chain.flush()).unwrap();
    reactor.block_on(copy(chain.clone(), FREED, freed == Freed::Compressed));
    // A new mapping of the cluster, without the copy or in its place.
    let offset = (FREED * SECTOR) as u64;
    let zeroes = View::of(chain.clone()).write_zeroes(offset, 4096, true);
    reactor.block_on(zeroes).unwrap();
    flush();
    // The next flush frees what was there.
    machine.fail(fails.then_some(Fault {
        file: 0,
        of: Counted::Changes,
        from: 0,
        until: 1,
        errno: libc::EIO,
    }));
    machine.hold(true);
    let done = Rc::new(Cell::new(0));
    let count = done.clone();
    let flushed = image.clone();
    reactor.spawn(async move {
        flushed.flush().await.unwrap();
        count.set(count.get() + 1);
    });
    let is_punch = |effect: &Effect| matches!(effect, Effect::Punch { .. });
    while reactor.turn() || machine.finish_others(&reactor, is_punch) {}
    assert_eq!(machine.pending(is_punch), 1, "{case}: nothing is punched");
    let (count, taken) = (done.clone(), take(chain.clone(), taker));
    reactor.spawn(async move {
        taken.await;
        count.set(count.get() + 1);
    });
    while reactor.turn() || machine.finish_others(&reactor, is_punch) {}
    assert_eq!(done.get(), 1, "{case}: the punch is waited for");
    while machine.finish_others(&reactor, |_| false) || reactor.turn() {}
    machine.hold(false);
    assert_eq!(done.get(), 2, "{case}");
    let judge = |seen: Vec<Option<u32>>| {
        for (sector, seen) in seen.into_iter().enumerate() {
            let expected = match (sector, taker) {
                (FREED..TAKEN, _) => 0,
                (TAKEN.., Taker::Write) if sector < TAKEN + CLUSTER => {
                    0xc000_0000 + (sector - TAKEN) as u32
                }
                _ => disk.first[sector],
            };
            assert_eq!(seen, Some(expected), "{case}: sector {sector}");
        }
    };
    let seen = read_all(&reactor, &chain);
    judge(seen.unwrap_or_else(|error| panic!("{case}: {error}")));
    reactor.block_on(image.close()).unwrap();
    drop(chain);
    let leaks = Image::new(&machine.bytes(0)).unwrap().check();
    assert_eq!(leaks, Ok(0), "{case}");
    let Opened { chain, .. } = reactor.block_on(disk.open(&machine, false)).unwrap();
    let seen = read_all(&reactor, &chain);
    judge(seen.unwrap_or_else(|error| panic!("{case}, opened again: {error}")));
}

#[test]
fn nobody_gets_a_cluster_while_it_is_punched() {
    for freed in [Freed::Compressed, Freed::Data] {
        for taker in [Taker::Compressed, Taker::Copy, Taker::Write] {
            free_and_take(freed, taker, false);
        }
    }
}

#[test]
fn a_cluster_that_cannot_be_punched_is_freed_like_others() {
    for taker in [Taker::Compressed, Taker::Copy, Taker::Write] {
        free_and_take(Freed::Compressed, taker, true);
    }
}
