//! Power cuts while a disk gets another size that is in more than one file, or has a mapping that
//! does not fit into memory.
//!
//! What would be caught: a new size before what is new reads as zeros, a data file that is shorter
//! than its disk or cut before the header names the smaller size, a raw data file that is no image
//! of the disk, a mapping that points behind the end of the file.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stratablk::chain::resize::{Resize, grow, shrink};
use stratablk::chain::resize::{begin_growing, finish_growing, shrink_in_use};
use stratablk::format::Qcow2;
use stratablk::format::qcow2::bitmaps::InForce;
use stratablk::format::qcow2::{self, Preallocation};
use stratablk::reactor::Reactor;
use stratablk::storage::{Storage, io};

use crate::cuts::{cuts, cuts_with};
use crate::disk::{Below, Disk, Opened, Recipe, read_all};
use crate::history::{SECTOR, fill, stamp_of};
use crate::machine::{Counted, Fault, Machine};
use crate::qcow2::Image;
use crate::states::{Kept, State, visit};
use crate::workload::Kind;
use crate::{alone, number_from, seed, together};

/// States judged by default, of each change of a size.
const STATES: usize = 300;
/// Of these, so many are shown to `qemu-img check` and given the new size once more.
const SAMPLES: usize = 15;

struct Bench {
    _dir: tempfile::TempDir,
    disk: Disk,
    /// Sectors that the disk is to have.
    wanted: usize,
    reactor: Reactor,
    seed: u64,
    /// Events until the change was done.
    done: usize,
    /// As it is done while guests use the disk.
    in_use: bool,
}

impl Bench {
    fn new(recipe: Recipe, wanted: usize) -> Self {
        let seed = seed();
        println!("STRATABLK_SEED={seed}: {recipe:?} to {wanted} sectors");
        let dir = tempfile::tempdir().unwrap();
        Self {
            disk: Disk::make(dir.path(), recipe),
            _dir: dir,
            wanted,
            reactor: Reactor::for_this_thread().unwrap(),
            seed,
            done: 0,
            in_use: false,
        }
    }

    fn size(&self) -> u64 {
        (self.wanted * SECTOR) as u64
    }

    fn is_raw(&self) -> bool {
        self.disk.recipe.options.contains("data_file_raw=on")
    }

    fn open(&self, machine: &Machine, writable: bool) -> Opened {
        let opened = self.disk.open(machine, writable);
        self.reactor.block_on(opened).unwrap()
    }

    fn resize(&self, machine: &Machine) {
        let Opened { chain, image } = self.open(machine, true);
        if self.in_use {
            let (old, size) = (chain.size(), self.size());
            let resized = async {
                if size > old {
                    begin_growing(&image, size).await?;
                    finish_growing(&chain, &image, (old, size)).await?;
                } else {
                    shrink_in_use(&image, size).await?;
                }
                image.close().await
            };
            return self.reactor.block_on(resized).unwrap();
        }
        let resized = async {
            if self.wanted * SECTOR > chain.size() as usize {
                let wanted = Resize {
                    size: self.size(),
                    ..Resize::default()
                };
                grow(&chain, wanted, &InForce::new()).await
            } else {
                shrink(&chain, self.size(), &InForce::new()).await
            }
        };
        self.reactor.block_on(resized).unwrap();
    }

    /// Changes something with `change`, and judges what a cut at every instant leaves.
    fn cuts(&mut self, change: impl Fn(&Self, &Machine)) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let machine = Machine::new(&self.disk.files);
        {
            let _alone = alone();
            change(self, &machine);
        }
        self.done = machine.now();
        if self.disk.recipe.data_file {
            assert_eq!(machine.bytes(1).len() as u64, self.size(), "the data file");
        }
        // One more instant, of which nothing but what is stable is left.
        let file: Arc<dyn Storage> = machine.file(0);
        self.reactor.block_on(io::sync(&*file)).unwrap();
        let budget = number_from("STRATABLK_CRASH_STATES").unwrap_or(STATES);
        let sample = (SAMPLES as f64 / budget as f64).min(1.0);
        let mut new = [0, 0];
        let log = machine.log();
        let (total, judged) = visit(&self.disk.files, &log, budget, &mut rng, |state, rng| {
            let thorough = rng.random_bool(sample);
            new[usize::from(self.judge(&state, thorough))] += 1;
        });
        println!("{} events, {judged} of {total} states", log.len());
        assert!(
            new[0] > 0 && new[1] > 0,
            "cuts before and after the new size: {new:?}"
        );
    }

    /// Whether the disk has its new size.
    fn judge(&self, state: &State, thorough: bool) -> bool {
        let context = format!(
            "STRATABLK_SEED={}: {:?}: cut after event {}, kept {:?} of what was not stable",
            self.seed, self.disk.recipe, state.cut, state.kept
        );
        let image = Image::new(&state.files[0]).unwrap();
        let checked = image.check();
        let leaks = checked.unwrap_or_else(|what| panic!("{context}: {what}"));
        let new = {
            let _together = together();
            self.compare(&state.files, &context)
        };
        if state.cut > self.done {
            assert!(new, "{context}: done, but not stable");
            assert_eq!(leaks, 0, "{context}");
        }
        if thorough || (state.cut > self.done && state.kept == Kept::Nothing) {
            let checked = self.disk.qemu_check(&state.files);
            checked.unwrap_or_else(|what| panic!("{context}: {what}"));
            let _alone = alone();
            let machine = Machine::new(&state.files);
            self.resize(&machine);
            let files: Vec<_> = (0..state.files.len()).map(|i| machine.bytes(i)).collect();
            assert!(self.compare(&files, &context), "{context}: once more");
        }
        new
    }

    /// Compares the disk with what it is to hold. Whether it has its new size.
    fn compare(&self, files: &[Vec<u8>], context: &str) -> bool {
        let opened = self.open(&Machine::new(files), false);
        let seen = read_all(&self.reactor, &opened.chain).unwrap();
        let old = &self.disk.first;
        let new = seen.len() == self.wanted;
        assert!(new || seen.len() == old.len(), "{context}: {}", seen.len());
        if self.is_raw() {
            let len = files[1].len();
            assert!(len >= seen.len() * SECTOR, "{context}: a file of {len}");
        }
        // What is above the new end of a disk that shrinks may be lost already.
        let kept = if new {
            seen.len()
        } else {
            self.wanted.min(old.len())
        };
        for (sector, stamp) in seen.into_iter().enumerate().take(kept) {
            let expected = old.get(sector).copied().unwrap_or(0);
            assert_eq!(stamp, Some(expected), "{context}: sector {sector}");
            if self.is_raw() {
                let at = sector * SECTOR;
                let data = files[1].get(at..at + SECTOR).and_then(stamp_of);
                assert_eq!(
                    data,
                    Some(expected),
                    "{context}: sector {sector} of the file"
                );
            }
        }
        new
    }
}

/// Disks whose data are in a file of their own.
fn recipes(sectors: usize, filled: usize) -> impl Iterator<Item = Recipe> {
    let options = [
        "cluster_size=4k",
        "cluster_size=512,data_file_raw=on",
        "cluster_size=4k,data_file_raw=on",
        "cluster_size=16k,extended_l2=on",
    ];
    options.into_iter().map(move |options| Recipe {
        data_file: true,
        filled,
        ..Recipe::new(options, sectors)
    })
}

#[test]
fn a_data_file_that_grows() {
    const SECTORS: usize = 2049;
    for recipe in recipes(SECTORS, SECTORS) {
        let mut bench = Bench::new(recipe, 6003);
        let cluster = (1 << bench.disk.files[0][23]) / SECTOR;
        // Left by somebody who was killed while the disk became shorter: in the rest of the last
        // cluster, and behind it unless the file is an image by itself.
        let end = match bench.is_raw() {
            true => SECTORS.next_multiple_of(cluster),
            false => SECTORS + 300,
        };
        let data = &mut bench.disk.files[1];
        data.resize(end * SECTOR, 0);
        fill(&mut data[SECTORS * SECTOR..], 0xd000_0000);
        bench.cuts(Bench::resize);
        bench.in_use = true;
        bench.cuts(Bench::resize);
    }
}

#[test]
fn a_data_file_that_shrinks() {
    for recipe in recipes(6003, 5000) {
        let mut bench = Bench::new(recipe, 2049);
        bench.cuts(Bench::resize);
        bench.in_use = true;
        bench.cuts(Bench::resize);
    }
}

/// What would be caught: clusters that a flush in the midst of the preallocation maps, although the
/// file does not reach there yet: nothing was written to them.
#[test]
fn a_mapping_that_is_made_ahead_piece_by_piece() {
    let recipe = Recipe {
        filled: 100,
        ..Recipe::new("cluster_size=512", 100)
    };
    Bench::new(recipe, 2000).cuts(|bench, machine| {
        let Opened { image, .. } = bench.open(machine, true);
        let size = bench.size();
        let resized = async {
            image.reserve_mapping(size).await?;
            image.close().await?;
            let options = qcow2::Options {
                writable: true,
                // Little memory: the mapping is written many times.
                cache_bytes: 0,
                size: Some(size),
                ..qcow2::Options::default()
            };
            let wide = Qcow2::open(machine.file(0), options).await?;
            wide.preallocate(100 * SECTOR as u64, size, Preallocation::Metadata)
                .await?;
            wide.set_size(size, &InForce::new()).await?;
            wide.close().await
        };
        bench.reactor.block_on(resized).unwrap();
    });
}

/// Disks that get another size while guests use them.
fn in_use(sectors: usize, resized: usize) -> Vec<Recipe> {
    let recipe = |options: &'static str, below: Below, filled: usize| Recipe {
        below,
        filled,
        resized,
        states: 150,
        kills: 150,
        ..Recipe::new(options, sectors)
    };
    let data_file = |options: &'static str| Recipe {
        data_file: true,
        ..recipe(options, Below::Nothing, sectors / 2)
    };
    vec![
        recipe("cluster_size=4k", Below::Nothing, sectors / 2),
        recipe("cluster_size=4k", Below::Qcow2, 0),
        // The L1 table moves.
        recipe("cluster_size=512", Below::Raw, sectors / 2),
        recipe("cluster_size=16k,extended_l2=on", Below::Raw, 0),
        recipe("cluster_size=16k,compat=0.10", Below::Raw, sectors / 2),
        data_file("cluster_size=4k"),
        data_file("cluster_size=4k,data_file_raw=on"),
    ]
}

/// What would be caught: a size that is stable before what is new reads as zeros, or shown before it is
/// stable; data of the layers below in what is new; a request on its way that clears what another one
/// has written behind the old end; an L1 table that moves from under a flush.
#[test]
fn a_disk_that_grows_under_its_guests() {
    for recipe in in_use(1020, 5001) {
        cuts(recipe, false, 100);
    }
}

/// What would be caught, too: a journal that names what the header does not, and refuses the start.
#[test]
fn a_disk_with_a_journal_that_grows_under_its_guests() {
    for recipe in in_use(1020, 5001) {
        if !recipe.options.contains("0.10") {
            let recipe = Recipe {
                journaled: true,
                ..recipe
            };
            cuts(recipe, false, 100);
        }
    }
}

/// What would be caught: data above the new end that is gone while the header has the old size, or
/// clusters that are let go of and used while somebody still has them.
#[test]
fn a_disk_that_shrinks_under_its_guests() {
    for journaled in [false, true] {
        for recipe in in_use(3000, 1021) {
            if !(journaled && recipe.options.contains("0.10")) {
                cuts(
                    Recipe {
                        journaled,
                        ..recipe
                    },
                    false,
                    100,
                );
            }
        }
    }
}

/// What would be caught: a change that fails half-way and leaves a disk of another size, or one that
/// cannot be used.
#[test]
fn a_disk_that_cannot_get_its_new_size() {
    let seed = seed();
    for resized in [3000, 700] {
        let mut failed = 0;
        for (round, of) in (0..).zip([Counted::Changes, Counted::Barriers]) {
            for from in [3, 10, 25, 40] {
                let recipe = Recipe {
                    filled: 600,
                    resized,
                    states: 60,
                    kills: 60,
                    ..Recipe::new("cluster_size=512", 1021)
                };
                let fault = Fault {
                    file: 0,
                    of,
                    from,
                    until: from + 6,
                    errno: libc::EIO,
                };
                let worked = cuts_with(seed.wrapping_add(round), recipe, false, 40, Some(fault));
                let mut failures = worked.failures.iter();
                failed += usize::from(failures.any(|(kind, _)| *kind == Kind::Resize));
            }
        }
        assert!(failed > 0, "no fault has met the new size {resized}");
    }
}
