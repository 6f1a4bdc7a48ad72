//! Requests that take long: what they found stays what it was until they have ended.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use stratablk::chain::{Chain, Span, View};
use stratablk::format::Place;
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::alone;
use crate::disk::{Below, Disk, Opened, Recipe, read_all, write};
use crate::history::{SECTOR, fill, stamp_of};
use crate::machine::Machine;
use crate::qcow2::Image;

/// What would be caught: a cluster that is used again while a request that found it before it was
/// freed is still under way: a read would return what is somebody else's, a write destroy it. The
/// same of a request of another chain that has the image too.
#[test]
fn a_slow_request_keeps_the_clusters_that_it_found() {
    let cases = [(false, false), (false, true), (true, false), (true, true)];
    for (write_slowly, elsewhere) in cases {
        let dir = tempfile::tempdir().unwrap();
        let recipe = Recipe {
            filled: 64,
            ..Recipe::new("cluster_size=4k", 128)
        };
        let disk = Disk::make(dir.path(), recipe);
        let reactor = Reactor::for_this_thread().unwrap();
        let mut rng = StdRng::seed_from_u64(0);
        let machine = Machine::new(&disk.files);
        let _alone = alone();
        let opened = reactor.block_on(disk.open(&machine, true)).unwrap();
        let chain = opened.chain;
        // Brings the mapping into memory.
        read_all(&reactor, &chain).unwrap();
        let view = View::of(if elsewhere {
            Arc::new(Chain::new(chain.layers().to_vec()).unwrap())
        } else {
            chain.clone()
        });
        let read = Rc::new(RefCell::new(Vec::new()));
        let result = read.clone();
        machine.hold(true);
        reactor.spawn(async move {
            let mut buffer = AlignedBuf::zeroed(64 * SECTOR);
            fill(&mut buffer, 0xc000_0000);
            // SAFETY: `buffer` outlives the operation.
            let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
            if write_slowly {
                view.write(0, bufs).await.unwrap();
            } else {
                view.read(0, bufs).await.unwrap();
                *result.borrow_mut() = buffer.chunks(SECTOR).map(stamp_of).collect();
            }
        });
        while reactor.turn() {}
        machine.hold(false);
        let discard = View::of(chain.clone()).discard(0, 64 * SECTOR as u64);
        reactor.block_on(discard).unwrap();
        for start in (64..128).step_by(8) {
            reactor.block_on(chain.flush()).unwrap();
            write(&reactor, &chain, start, 8, 0xb000_0000 + start as u32).unwrap();
        }
        assert!(machine.finish_one(&reactor, &mut rng), "nothing was slow");
        machine.run(&reactor, &mut rng);
        for (sector, stamp) in read.borrow().iter().enumerate() {
            let possible = [Some(0), Some(disk.first[sector])];
            assert!(possible.contains(stamp), "sector {sector}: {stamp:x?}");
        }
        let seen = read_all(&reactor, &chain).unwrap();
        for (sector, stamp) in seen.into_iter().enumerate().skip(64) {
            assert_eq!(stamp, Some(0xb000_0000 + sector as u32), "sector {sector}");
        }
        // Now that nobody is slow, they are free.
        reactor.block_on(opened.image.close()).unwrap();
        let leaks = Image::new(&machine.bytes(0)).unwrap().check();
        assert_eq!(leaks, Ok(0));
    }
}

/// What would be caught: a cluster that is kept in memory after decompression, and taken for another
/// one that was written to the same place: who reads it slowly keeps it after it was freed.
#[test]
fn a_slow_read_of_a_compressed_cluster_that_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe {
        below: Below::Raw,
        ..Recipe::new("cluster_size=4k", 128)
    };
    let disk = Disk::make(dir.path(), recipe);
    let reactor = Reactor::for_this_thread().unwrap();
    let mut rng = StdRng::seed_from_u64(0);
    let machine = Machine::new(&disk.files);
    let _alone = alone();
    let Opened { image, chain } = reactor.block_on(disk.open(&machine, true)).unwrap();
    // Copies the cluster of a sector, compressed; returns where it is.
    let copy = |sector: usize| {
        let offset = (sector * SECTOR) as u64;
        let view = View::of(chain.clone());
        let copied = view.copy(Span::new(0, 2).compressed(true), offset, 4096);
        reactor.block_on(copied).unwrap();
        let extent = reactor.block_on(chain.top().map_loaded(offset, 4096));
        match extent.unwrap().place {
            Place::Compressed(compressed) => compressed.offset,
            place => panic!("not compressed: {place:?}"),
        }
    };
    let place = copy(40);
    reactor.block_on(chain.flush()).unwrap();
    machine.hold(true);
    let view = View::of(chain.clone());
    let first = disk.first.clone();
    reactor.spawn(async move {
        let buffer = AlignedBuf::zeroed(8 * SECTOR);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
        view.read(40 * SECTOR as u64, bufs).await.unwrap();
        for (sector, expected) in buffer.chunks(SECTOR).zip(&first[40..48]) {
            assert_eq!(stamp_of(sector), Some(*expected));
        }
    });
    while reactor.turn() {}
    machine.hold(false);
    write(&reactor, &chain, 40, 8, 0xb000_0000).unwrap();
    assert!(machine.finish_one(&reactor, &mut rng), "nothing was slow");
    machine.run(&reactor, &mut rng);
    // Frees what nobody can see any more.
    reactor.block_on(image.close()).unwrap();
    assert_eq!(copy(48), place, "the place is not used again");
    let seen = read_all(&reactor, &chain).unwrap();
    for (sector, seen) in seen.into_iter().enumerate() {
        let expected = match sector {
            40..48 => 0xb000_0000 + (sector - 40) as u32,
            _ => disk.first[sector],
        };
        assert_eq!(seen, Some(expected), "sector {sector}");
    }
}
