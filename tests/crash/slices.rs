//! L2 tables of several slices: tables come and go as a whole, slices one by one.

use rand::SeedableRng;
use rand::rngs::StdRng;
use stratablk::chain::View;
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::cuts::cuts;
use crate::disk::{Disk, Recipe, read_all};
use crate::history::{SECTOR, fill};
use crate::machine::Machine;
use crate::qcow2::Image;
use crate::{alone, seed};

/// Sectors that one slice of 4 KiB maps, in clusters of 8 KiB as well as in those of 16 KiB with
/// subclusters.
const SLICE: usize = 8192;
/// Orders of operations that are tried.
const ROUNDS: u64 = 80;

/// What would be caught: a slice that is written to the place of another, or of which another
/// one's changes are taken for its own; a slice of a new table that holds what was in the file.
#[test]
fn cuts_on_both_sides_of_a_border() {
    let recipe = Recipe {
        from: SLICE - 384,
        ..Recipe::new("cluster_size=8k", SLICE + 384)
    };
    cuts(recipe, false, 100);
}

/// What would be caught: a second table for an L1 entry, by a request that waited while somebody
/// else made the first one. What a flush has written to that one meanwhile would be lost.
#[test]
fn slices_of_a_table_that_is_not_there_yet() {
    let seed = seed();
    println!("STRATABLK_SEED={seed}");
    for options in ["cluster_size=8k", "cluster_size=16k,extended_l2=on"] {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::make(dir.path(), Recipe::new(options, 2 * SLICE));
        for round in 0..ROUNDS {
            first_writes(&disk, seed.wrapping_add(round));
        }
    }
}

/// Writes to each slice at the same time, a flush after each; all of it is stable then.
fn first_writes(disk: &Disk, seed: u64) {
    let reactor = Reactor::for_this_thread().unwrap();
    let mut rng = StdRng::seed_from_u64(seed);
    let machine = Machine::new(&disk.files);
    let _alone = alone();
    let opened = reactor.block_on(disk.open(&machine, true)).unwrap();
    let mut expected = vec![Some(0); 2 * SLICE];
    for (index, start) in [SLICE - 24, SLICE + 8].into_iter().enumerate() {
        let stamp = 64 * (index as u32 + 1);
        for (stamp, sector) in (stamp..).zip(&mut expected[start..start + 16]) {
            *sector = Some(stamp);
        }
        let chain = opened.chain.clone();
        reactor.spawn(async move {
            let mut buffer = AlignedBuf::zeroed(16 * SECTOR);
            fill(&mut buffer, stamp);
            // SAFETY: `buffer` outlives the operation.
            let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
            let view = View::of(chain.clone());
            view.write((start * SECTOR) as u64, bufs).await.unwrap();
            chain.flush().await.unwrap();
        });
    }
    machine.run(&reactor, &mut rng);
    let context = format!("STRATABLK_SEED={seed}: {:?}", disk.recipe);
    let files = [machine.bytes(0)];
    let checked = Image::new(&files[0]).and_then(|image| image.check());
    checked.unwrap_or_else(|what| panic!("{context}: {what}"));
    let machine = Machine::new(&files);
    let reopened = reactor.block_on(disk.open(&machine, false)).unwrap();
    let seen = read_all(&reactor, &reopened.chain).unwrap();
    for (sector, (seen, expected)) in seen.into_iter().zip(expected).enumerate() {
        assert_eq!(seen, expected, "{context}: sector {sector}");
    }
}
