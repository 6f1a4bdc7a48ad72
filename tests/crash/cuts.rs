//! Power cuts and kills: every state that one may leave is opened and read, and its references
//! counted.
//!
//! What would be caught: a pointer that reaches the disk before what it points at, references
//! taken off too early, clusters used again too early, flushed data lost, a torn header, a
//! snapshot that is written to, a stream whose base is let go of before the copy is stable, an
//! image that cannot be written any more after a cut.
//!
//! `STRATABLK_CRASH_STATES` is how many states of each disk are judged after power cuts, and how
//! many after kills (all there are, if there are fewer), `STRATABLK_CRASH_QEMU=all` has `qemu-img
//! check` judge each of them, and `STRATABLK_SEED` repeats a run.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stratablk::reactor::Reactor;

use crate::disk::{Below, Disk, Recipe, read_all, write};
use crate::journals::usage;
use crate::judge::Judge;
use crate::landing::{Start, visit_kills};
use crate::machine::{Counted, Effect, Event, Fault, Machine};
use crate::qcow2::Image;
use crate::states::visit;
use crate::workload::{Kind, Work};
use crate::{alone, number_from, seed};

/// Of these, so many are shown to `qemu-img check` and written to.
const SAMPLES: usize = 40;

/// What would be caught: a flush that meets a write in the middle, and makes a table stable of
/// which nothing is in the file.
#[test]
fn a_flush_while_the_first_write_to_a_table_is_under_way() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::make(dir.path(), Recipe::new("cluster_size=4k", 64));
    let reactor = Reactor::for_this_thread().unwrap();
    let mut rng = StdRng::seed_from_u64(0);
    let machine = Machine::new(&disk.files);
    let _alone = alone();
    let opened = reactor.block_on(disk.open(&machine, true)).unwrap();
    machine.hold(true);
    let chain = opened.chain.clone();
    let work = Work::new(chain.clone(), disk.first.clone(), 0, Box::new(|| 0));
    let writer = work.clone();
    reactor.spawn(async move { writer.operate(crate::workload::Kind::Write).await });
    let is_data = |event: &Event| {
        matches!(event, Event::Issued { effect: Effect::Write { bytes, .. }, .. }
            if bytes.iter().any(|byte| *byte != 0))
    };
    while !machine.log().iter().any(is_data) {
        if !reactor.turn() {
            assert!(machine.finish_one(&reactor, &mut rng), "nothing is written");
        }
    }
    machine.hold(false);
    reactor.block_on(chain.flush()).unwrap();
    let files = [machine.bytes(0)];
    disk.qemu_check(&files).unwrap();
    Image::new(&files[0]).unwrap().check().unwrap();
    machine.run(&reactor, &mut rng);
}

/// Guests work on a disk, and a stream if `stream`; then the machine stops at every instant, and
/// the process is killed at every instant. Returns the image as it was before and after the work.
pub fn cuts(recipe: Recipe, stream: bool, operations: usize) -> (Vec<u8>, Vec<u8>) {
    let worked = cuts_with(seed(), recipe, stream, operations, None);
    (worked.before, worked.after)
}

/// What work on a disk has come to.
pub struct Worked {
    /// The image as it was before.
    pub before: Vec<u8>,
    /// And after it.
    pub after: Vec<u8>,
    /// What has failed, and with which error.
    pub failures: Vec<(Kind, i32)>,
}

/// As [`cuts`], on storage that fails for a while if there is a `fault`.
pub fn cuts_with(
    seed: u64,
    recipe: Recipe,
    stream: bool,
    operations: usize,
    fault: Option<Fault>,
) -> Worked {
    println!("STRATABLK_SEED={seed}: {recipe:?}, {fault:?}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::make(dir.path(), recipe);
    let reactor = Reactor::for_this_thread().unwrap();
    let machine = disk.machine();
    let (mut start, mut made) = (machine.left(), 0);
    let (history, failures) = {
        let _alone = alone();
        let opened = reactor.block_on(disk.open(&machine, true)).unwrap();
        let clock = machine.clone();
        let work = Work::new(
            opened.chain,
            disk.first.clone(),
            seed,
            Box::new(move || clock.now()),
        );
        work.adopt(&recipe);
        let may_be_full = recipe.storage.device.is_some();
        work.strict.set(fault.is_none() && !may_be_full);
        if recipe.used > 0 {
            // As long as it lasts.
            machine.fail(fault.map(|fault| Fault {
                until: usize::MAX,
                ..fault
            }));
            fill(&reactor, &machine, &work, recipe.used);
            (start, made) = (machine.left(), machine.now());
        }
        machine.fail(fault);
        if stream {
            work.spawn_stream(&reactor, 3);
        }
        if recipe.resized > 0 {
            work.spawn_resize(&reactor, recipe.resized, operations / 4);
        }
        for _ in 0..5 {
            work.spawn_guest(&reactor, operations / 5);
        }
        machine.run(&reactor, &mut rng);
        machine.fail(None);
        if fault.is_none() {
            let failures = work.failures.borrow();
            let full = failures.iter().all(|(_, errno)| *errno == libc::ENOSPC);
            assert!(full, "seed {seed}: {failures:?}");
        }
        work.strict.set(true);
        reactor.block_on(work.flush());
        let everything = read_all(&reactor, &work.chain.borrow()).unwrap();
        let history = work.history.borrow().clone();
        let failures = work.failures.borrow().clone();
        let resized = !failures.iter().any(|(kind, _)| *kind == Kind::Resize);
        // One that shrinks is bounded first.
        if recipe.resized > 0 && (resized || recipe.grows()) {
            let size = match resized {
                true => recipe.resized,
                false => recipe.sectors,
            };
            assert_eq!(
                everything.len(),
                size,
                "seed {seed}: the size, {failures:?}"
            );
        }
        for (sector, stamp) in everything.into_iter().enumerate() {
            let allowed = history.visible(sector);
            assert!(
                stamp.is_some_and(|stamp| allowed.contains(&stamp)),
                "seed {seed}: sector {sector} reads {stamp:x?}, allowed are {allowed:x?}"
            );
        }
        reactor.block_on(opened.image.close()).unwrap();
        (history, failures)
    };
    let log = machine.log();
    let judge = Judge {
        seed,
        disk: &disk,
        reactor,
        history,
        start: Start {
            files: &start.0,
            journals: start.1.as_ref(),
            made,
            from: made,
        },
    };
    let given = number_from("STRATABLK_CRASH_STATES");
    let each = std::env::var("STRATABLK_CRASH_QEMU").is_ok_and(|value| value == "all");
    // Fewer of few.
    let sample = |budget: usize| SAMPLES as f64 / budget.max(SAMPLES * 60) as f64;
    // Where the log begins later, it is not known what was stable then.
    if recipe.used == 0 {
        let budget = given.unwrap_or(recipe.states);
        let (total, judged) = visit(&disk.files, &log, budget, &mut rng, |state, rng| {
            let thorough = rng.random_bool(sample(budget));
            judge.judge(&state, thorough, each || thorough);
        });
        println!("{} events, {judged} of {total} states", log.len());
        assert!(judged * 2 > budget.min(total), "{judged} of {total} states");
    }
    let budget = given.unwrap_or(recipe.kills);
    let (total, judged) = visit_kills(judge.start, &log, budget, &mut rng, |state, rng| {
        let thorough = rng.random_bool(sample(budget));
        judge.judge(&state, thorough, each || thorough);
        if thorough {
            judge.succeed(&state, &log, rng);
        }
    });
    println!("{judged} of {total} states after a kill");
    assert!(judged * 2 > budget.min(total), "{judged} of {total} states");
    Worked {
        before: disk.files[0].clone(),
        after: machine.bytes(0),
        failures,
    }
}

/// Changes the mapping until so much of the journal is used, out of the log.
fn fill(reactor: &Reactor, machine: &Machine, work: &Work, percent: u64) {
    const STEP: usize = 64;
    machine.be_quiet(true);
    let used = || usage(&machine.left().1?);
    let mut starts = (0..work.from.get()).step_by(STEP).cycle().take(10_000);
    while used().is_some_and(|(used, words)| used * 100 < words * percent) {
        let start = starts.next().expect("the journal does not become fuller");
        reactor.block_on(work.fill(start, STEP));
    }
    let failures = work.failures.borrow();
    assert!(failures.is_empty(), "there was room: {failures:?}");
    machine.be_quiet(false);
}

#[test]
fn small_clusters() {
    cuts(Recipe::new("cluster_size=4k", 1024), false, 150);
}

#[test]
fn tables_that_are_not_all_in_memory() {
    let recipe = Recipe {
        cache_bytes: 4096,
        ..Recipe::new("cluster_size=512,refcount_bits=1", 2048)
    };
    cuts(recipe, false, 150);
}

/// Where the refcount table of an image is.
fn refcount_table(image: &[u8]) -> Vec<u8> {
    image[48..56].to_vec()
}

#[test]
fn a_refcount_table_that_grows() {
    // The table of such an image covers 2 MiB, most of which is in use.
    let recipe = Recipe {
        filled: 3930,
        ..Recipe::new("cluster_size=512,refcount_bits=64", 6400)
    };
    let (before, after) = cuts(recipe, false, 150);
    let grown = refcount_table(&before) != refcount_table(&after);
    assert!(grown, "the table has not grown");
}

/// What would be caught: a new table that names blocks which no flush has written yet.
#[test]
fn a_refcount_table_that_grows_before_the_first_flush() {
    // The last block that the table has room for is not there yet.
    let recipe = Recipe {
        filled: 3850,
        ..Recipe::new("cluster_size=512,refcount_bits=64", 6400)
    };
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::make(dir.path(), recipe);
    let table = refcount_table(&disk.files[0]);
    let reactor = Reactor::for_this_thread().unwrap();
    let machine = Machine::new(&disk.files);
    let opened = {
        let _alone = alone();
        reactor.block_on(disk.open(&machine, true)).unwrap()
    };
    let mut starts = (recipe.filled..recipe.sectors).step_by(32);
    while refcount_table(&machine.bytes(0)) == table {
        let start = starts.next().expect("the table does not grow");
        write(&reactor, &opened.chain, start, 32, start as u32).unwrap();
    }
    let mut rng = StdRng::seed_from_u64(0);
    // The states of the header are always among them.
    visit(&disk.files, &machine.log(), 200, &mut rng, |state, _| {
        let checked = Image::new(&state.files[0]).and_then(|image| image.check());
        if let Err(what) = checked {
            let (cut, kept) = (state.cut, state.kept);
            panic!("cut after event {cut}, kept {kept:?} of what was not stable: {what}");
        }
    });
}

#[test]
fn version_2() {
    cuts(
        Recipe::new("cluster_size=64k,compat=0.10", 2048),
        false,
        120,
    );
}

#[test]
fn reserved_space() {
    let recipe = Recipe {
        reserves: true,
        ..Recipe::new("cluster_size=2k", 1024)
    };
    cuts(recipe, false, 100);
}

#[test]
fn an_overlay() {
    let recipe = Recipe {
        below: Below::Qcow2,
        ..Recipe::new("cluster_size=4k", 1024)
    };
    cuts(recipe, false, 150);
}

#[test]
fn subclusters() {
    let recipe = Recipe {
        below: Below::Raw,
        ..Recipe::new("cluster_size=16k,extended_l2=on", 1024)
    };
    cuts(recipe, false, 150);
}

#[test]
fn an_internal_snapshot() {
    let recipe = Recipe {
        filled: 700,
        snapshot: true,
        ..Recipe::new("cluster_size=2k", 1024)
    };
    cuts(recipe, false, 150);
}

#[test]
fn a_snapshot_of_subclusters() {
    let recipe = Recipe {
        below: Below::Raw,
        filled: 700,
        snapshot: true,
        ..Recipe::new("cluster_size=16k,extended_l2=on", 1024)
    };
    cuts(recipe, false, 120);
}

/// What would be caught: a write in place that is stable before the bitmap which has not recorded
/// it is marked.
#[test]
fn a_persistent_bitmap() {
    let recipe = Recipe {
        bitmap: true,
        filled: 400,
        ..Recipe::new("cluster_size=4k", 512)
    };
    cuts(recipe, false, 60);
}

#[test]
fn a_data_file() {
    let recipe = Recipe {
        data_file: true,
        ..Recipe::new("cluster_size=4k", 1024)
    };
    cuts(recipe, false, 120);
}

#[test]
fn a_raw_data_file() {
    let recipe = Recipe {
        data_file: true,
        ..Recipe::new("cluster_size=4k,data_file_raw=on", 1024)
    };
    cuts(recipe, false, 120);
}

#[test]
fn a_stream() {
    let recipe = Recipe {
        below: Below::Qcow2,
        ..Recipe::new("cluster_size=4k", 1024)
    };
    cuts(recipe, true, 100);
}

#[test]
fn a_stream_into_version_2() {
    let recipe = Recipe {
        below: Below::Raw,
        cache_bytes: 4096,
        ..Recipe::new("cluster_size=512,compat=0.10", 1024)
    };
    cuts(recipe, true, 100);
}

#[test]
fn a_stream_of_subclusters() {
    let recipe = Recipe {
        below: Below::Raw,
        ..Recipe::new("cluster_size=16k,extended_l2=on", 1024)
    };
    cuts(recipe, true, 100);
}

#[test]
fn a_compressed_stream() {
    let recipe = Recipe {
        below: Below::Raw,
        compress: true,
        ..Recipe::new("cluster_size=4k", 1024)
    };
    cuts(recipe, true, 100);
}

/// What would be caught: a flush that failed and counts all the same, clusters that are free because
/// a flush that failed has unmapped them.
#[test]
fn storage_that_fails_for_a_while() {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 0..6 {
        let recipe = Recipe {
            filled: 400,
            data_file: round >= 4,
            ..Recipe::new("cluster_size=4k", 512)
        };
        let (of, from, count) = match round % 2 {
            0 => (Counted::Changes, rng.random_range(10..60), 1..20),
            _ => (Counted::Barriers, rng.random_range(0..10), 1..4),
        };
        let fault = Fault {
            file: usize::from(recipe.data_file),
            of,
            from,
            until: from + rng.random_range(count),
            errno: libc::EIO,
        };
        cuts_with(seed.wrapping_add(round), recipe, false, 60, Some(fault));
    }
}
