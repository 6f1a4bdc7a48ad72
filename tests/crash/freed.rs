//! What waits to be freed: it is bounded, and waits for the requests of its own disk alone.
//!
//! What would be caught: a file that grows as long as a guest writes and discards, because it never
//! flushes or because a request hangs, here or in another image; a guest that reads something else
//! than zeros where space was kept for it; clusters that are lost; space that is kept although
//! nothing waits any longer.

use std::rc::Rc;
use std::sync::Arc;

use stratablk::chain::{Chain, View};
use stratablk::reactor::Reactor;

use crate::alone;
use crate::disk::{Below, Disk, Opened, Recipe, read_all, write};
use crate::history::SECTOR;
use crate::machine::Machine;
use crate::qcow2::Image;

const MIB: usize = 1 << 20;
/// Bytes of a cluster.
const CLUSTER: usize = 256 << 10;
/// Bytes of the disk.
const SIZE: usize = 2 * MIB;
/// What a small disk may have wait.
const BOUND: usize = 16 * MIB;
/// Enough for the disk and its metadata.
const REST: usize = 6 * MIB;

/// Who has a request that does not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hung {
    Nobody,
    /// The disk itself.
    Own,
    /// A disk with which it shares nothing.
    Other,
}

/// How the guest lets go of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Letting {
    Discard,
    WriteZeroes,
}

/// The guest writes to a cluster and lets go of it, so many times.
fn use_and_let_go(
    reactor: &Reactor,
    chain: &Arc<Chain>,
    letting: Letting,
    flushes: bool,
    times: usize,
) {
    for round in 0..times {
        let at = round % (SIZE / CLUSTER) * CLUSTER;
        write(reactor, chain, at / SECTOR, 1, 7).unwrap();
        let view = View::of(chain.clone());
        let (at, len) = (at as u64, CLUSTER as u64);
        match letting {
            Letting::Discard => reactor.block_on(view.discard(at, len)),
            Letting::WriteZeroes => reactor.block_on(view.write_zeroes(at, len, true)),
        }
        .unwrap();
        if flushes {
            reactor.block_on(chain.flush()).unwrap();
        }
    }
}

fn bounded(recipe: Recipe, letting: Letting, hung: Hung, flushes: bool) {
    let case = format!("{recipe:?}, {letting:?}, {hung:?}, flushes: {flushes}");
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::make(dir.path(), recipe);
    let reactor = Reactor::for_this_thread().unwrap();
    let machine = Machine::new(&disk.files);
    let _alone = alone();
    let open = |machine: &Machine| reactor.block_on(disk.open(machine, true)).unwrap();
    let Opened { image, chain } = open(&machine);
    let hanging: Option<Rc<View>> = match hung {
        Hung::Nobody => None,
        Hung::Own => Some(View::of(chain.clone())),
        Hung::Other => Some(View::of(open(&Machine::new(&disk.files)).chain)),
    };
    use_and_let_go(&reactor, &chain, letting, flushes, 120);
    let len = machine.bytes(0).len();
    let most = match (hung, flushes) {
        (Hung::Own, _) | (_, false) => BOUND + REST,
        _ => REST,
    };
    assert!(len <= most, "{case}: a file of {} KiB", len >> 10);
    // A cluster that the guest is free to see as it was.
    let may_stay = recipe.options.contains("0.10") && letting == Letting::Discard;
    for (sector, seen) in read_all(&reactor, &chain).unwrap().into_iter().enumerate() {
        let zero = if may_stay && sector % (CLUSTER / SECTOR) == 0 {
            seen == Some(0) || seen == Some(7)
        } else {
            seen == Some(0) || may_stay && seen == Some(disk.first[sector])
        };
        assert!(zero, "{case}: sector {sector} has {seen:x?}");
    }
    // From now on it goes on without getting longer.
    drop(hanging);
    use_and_let_go(&reactor, &chain, letting, true, 30);
    let after = machine.bytes(0).len();
    assert!(after <= len + REST, "{case}: {len} bytes, then {after}");
    reactor.block_on(image.close()).unwrap();
    drop(chain);
    let files: Vec<_> = (0..disk.files.len()).map(|n| machine.bytes(n)).collect();
    disk.qemu_check(&files).unwrap();
    if !recipe.options.contains("extended_l2") {
        assert_eq!(Image::new(&files[0]).unwrap().check(), Ok(0), "{case}");
    }
}

#[test]
fn what_waits_to_be_freed_is_bounded() {
    for options in [
        "cluster_size=256k",
        "cluster_size=256k,compat=0.10",
        "cluster_size=256k,extended_l2=on",
    ] {
        for below in [Below::Nothing, Below::Raw] {
            let recipe = Recipe {
                below,
                ..Recipe::new(options, SIZE / SECTOR)
            };
            for letting in [Letting::Discard, Letting::WriteZeroes] {
                for (hung, flushes) in [
                    (Hung::Nobody, false),
                    (Hung::Own, false),
                    (Hung::Own, true),
                    (Hung::Other, true),
                ] {
                    bounded(recipe, letting, hung, flushes);
                }
            }
        }
    }
}

/// What would be caught: space that is kept although a flush would make room: a guest that trims
/// a large disk never flushes in between.
#[test]
fn a_large_trim_gives_everything_back() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::make(
        dir.path(),
        Recipe::new("cluster_size=64k", 64 * MIB / SECTOR),
    );
    let reactor = Reactor::for_this_thread().unwrap();
    let machine = Machine::new(&disk.files);
    let _alone = alone();
    let Opened { image, chain } = reactor.block_on(disk.open(&machine, true)).unwrap();
    for mib in 0..64 {
        write(&reactor, &chain, mib * MIB / SECTOR, MIB / SECTOR, 7).unwrap();
    }
    for mib in 0..64 {
        let view = View::of(chain.clone());
        let trimmed = view.discard((mib * MIB) as u64, MIB as u64);
        reactor.block_on(trimmed).unwrap();
    }
    reactor.block_on(image.close()).unwrap();
    let bytes = machine.bytes(0);
    let left = bytes.chunks(64 << 10).filter(|c| c.iter().any(|b| *b != 0));
    let left = left.count();
    assert!(left < 10, "{left} clusters are left");
    assert_eq!(Image::new(&bytes).unwrap().check(), Ok(0));
}
