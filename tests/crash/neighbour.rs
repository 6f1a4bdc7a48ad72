//! A disk that hangs beside one that works, in one process.
//!
//! What would be caught: a file that grows without bound, or an end that never comes or loses
//! clusters, because a request of another image has not ended.

use std::cell::Cell;
use std::rc::Rc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use stratablk::chain::View;
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs, Storage};

use crate::alone;
use crate::disk::{Disk, Opened, Recipe, read_all, write};
use crate::history::{SECTOR, fill};
use crate::machine::Machine;
use crate::qcow2::Image;

const SECTORS: usize = 2048;
const CLUSTER: u64 = 64 << 10;

#[test]
fn a_disk_works_flushes_and_closes_while_another_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::make(dir.path(), Recipe::new("cluster_size=64k", SECTORS));
    let reactor = Reactor::for_this_thread().unwrap();
    let mut rng = StdRng::seed_from_u64(0);
    let _alone = alone();
    let other = Machine::new(&disk.files);
    let hanging = reactor.block_on(disk.open(&other, true)).unwrap().chain;
    other.hold(true);
    let done = Rc::new(Cell::new(false));
    let (view, ended) = (View::of(hanging.clone()), done.clone());
    reactor.spawn(async move {
        let mut buffer = AlignedBuf::zeroed(SECTOR);
        fill(&mut buffer, 3);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, SECTOR) };
        view.write(SECTOR as u64, bufs).await.unwrap();
        ended.set(true);
    });
    while reactor.turn() {}

    let machine = Machine::new(&disk.files);
    let Opened { image, chain } = reactor.block_on(disk.open(&machine, true)).unwrap();
    let file = machine.file(0);
    for round in 0..1000 {
        write(&reactor, &chain, 0, 1, 7).unwrap();
        let discard = View::of(chain.clone()).discard(0, CLUSTER);
        reactor.block_on(discard).unwrap();
        if round % 3 == 0 {
            reactor.block_on(chain.flush()).unwrap();
        }
        // The disk has 1 MiB; 16 MiB may wait to be freed.
        let len = reactor.block_on(file.len()).unwrap();
        assert!(len < 20 << 20, "a file of {} MiB", len >> 20);
    }
    write(&reactor, &chain, 9, 1, 8).unwrap();
    assert!(!done.get(), "nothing hangs");
    reactor.block_on(image.close()).unwrap();
    drop((image, chain));
    let files = [machine.bytes(0)];
    let checked = Image::new(&files[0]).and_then(|image| image.check());
    assert_eq!(checked, Ok(0), "clusters leaked, or what is wrong");
    let after = Machine::new(&files);
    let after = reactor.block_on(disk.open(&after, false)).unwrap();
    let seen = read_all(&reactor, &after.chain).unwrap();
    for (sector, stamp) in seen.into_iter().enumerate() {
        let expected = if sector == 9 { 8 } else { 0 };
        assert_eq!(stamp, Some(expected), "sector {sector}");
    }

    other.run(&reactor, &mut rng);
    assert!(done.get(), "it hangs for ever");
    let seen = read_all(&reactor, &hanging).unwrap();
    for (sector, stamp) in seen.into_iter().enumerate() {
        let expected = if sector == 1 { 3 } else { 0 };
        assert_eq!(stamp, Some(expected), "sector {sector} of the other");
    }
}
