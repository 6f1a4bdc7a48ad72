//! A process whose image has a journal, killed at every instant: every begin and end of an operation
//! on the storage, and every store to the journal. The next process adopts the journal; it is killed
//! in turn, and the machine stops after it.
//!
//! What would be caught: a write that had completed and is gone, flushed or not; a discard whose old
//! bytes come back after somebody has read zeros; a change of the mapping or of a refcount that has
//! no record, or has it too late; a journal that begins too late, also after a flush that failed; a
//! next process that hands out what is in use, writes before it must, or cannot open what is left;
//! an image that `qemu-img check` finds fault with, before the journal is adopted and afterwards.
//!
//! Zeros that an export detects in what a guest writes come as the requests to write zeroes that
//! guests of these tests make.

use stratablk::reactor::Reactor;

use crate::cuts::{cuts, cuts_with};
use crate::disk::{Below, Disk, Recipe};
use crate::journals::usage;
use crate::machine::{Counted, Fault, Traits};
use crate::workload::Work;
use crate::{alone, seed};

/// States judged by default of each disk: after power cuts, and after kills.
const STATES: usize = 200;
const KILLS: usize = 500;

const fn journaled(options: &'static str, sectors: usize) -> Recipe {
    Recipe {
        journaled: true,
        states: STATES,
        kills: KILLS,
        ..Recipe::new(options, sectors)
    }
}

#[test]
fn small_clusters() {
    cuts(journaled("cluster_size=4k", 1024), false, 120);
}

#[test]
fn tables_that_are_not_all_in_memory() {
    for options in [
        "cluster_size=512,refcount_bits=1",
        "cluster_size=512,refcount_bits=8",
        "cluster_size=1k,refcount_bits=32",
    ] {
        let recipe = Recipe {
            cache_bytes: 4096,
            kills: KILLS / 2,
            ..journaled(options, 2048)
        };
        cuts(recipe, false, 80);
    }
}

#[test]
fn large_clusters() {
    let recipe = Recipe {
        states: STATES / 10,
        kills: KILLS / 10,
        ..journaled("cluster_size=2M", 12 << 10)
    };
    cuts(recipe, false, 40);
}

#[test]
fn a_refcount_table_that_grows() {
    let recipe = Recipe {
        filled: 3930,
        ..journaled("cluster_size=512,refcount_bits=64", 6400)
    };
    cuts(recipe, false, 120);
}

#[test]
fn reserved_space() {
    let recipe = Recipe {
        reserves: true,
        ..journaled("cluster_size=2k", 1024)
    };
    cuts(recipe, false, 80);
}

#[test]
fn an_overlay() {
    for copy_on_read in [false, true] {
        let recipe = Recipe {
            below: Below::Qcow2,
            copy_on_read,
            ..journaled("cluster_size=4k", 1024)
        };
        cuts(recipe, false, 80);
    }
}

#[test]
fn subclusters() {
    let recipe = Recipe {
        below: Below::Raw,
        ..journaled("cluster_size=16k,extended_l2=on", 1024)
    };
    cuts(recipe, false, 120);
}

#[test]
fn an_internal_snapshot() {
    for options in ["cluster_size=2k", "cluster_size=16k,extended_l2=on"] {
        let recipe = Recipe {
            filled: 700,
            snapshot: true,
            ..journaled(options, 1024)
        };
        cuts(recipe, false, 100);
    }
}

#[test]
fn a_persistent_bitmap() {
    let recipe = Recipe {
        bitmap: true,
        filled: 400,
        ..journaled("cluster_size=4k", 512)
    };
    cuts(recipe, false, 60);
}

#[test]
fn a_data_file() {
    for options in ["cluster_size=4k", "cluster_size=4k,data_file_raw=on"] {
        let recipe = Recipe {
            data_file: true,
            ..journaled(options, 1024)
        };
        cuts(recipe, false, 100);
    }
}

#[test]
fn a_stream() {
    for options in ["cluster_size=4k", "cluster_size=16k,extended_l2=on"] {
        let recipe = Recipe {
            below: Below::Qcow2,
            ..journaled(options, 1024)
        };
        cuts(recipe, true, 80);
    }
}

#[test]
fn a_compressed_stream() {
    let recipe = Recipe {
        below: Below::Raw,
        compress: true,
        ..journaled("cluster_size=4k", 1024)
    };
    cuts(recipe, true, 80);
}

#[test]
fn a_device_that_fills_up() {
    for len in [1 << 20, 200 << 10] {
        let storage = Traits {
            device: Some(len),
            ..Traits::FILE
        };
        let recipe = Recipe {
            storage,
            ..journaled("cluster_size=4k", 1024)
        };
        cuts(recipe, false, 80);
    }
}

/// Writes that fail, and barriers: what was to be flushed stays in the journal.
#[test]
fn flushes_that_fail() {
    let seed = seed();
    let recipe = Recipe {
        filled: 400,
        ..journaled("cluster_size=4k", 512)
    };
    for (round, of) in (0..).zip([Counted::Changes, Counted::Barriers]) {
        for errno in [libc::EIO, libc::ENOSPC] {
            let from = 4 + 20 * round;
            let fault = Fault {
                file: 0,
                of,
                from,
                until: from + 8,
                errno,
            };
            cuts_with(
                seed.wrapping_add(round as u64),
                recipe,
                false,
                60,
                Some(fault),
            );
        }
    }
}

/// A disk whose journal has `used` percent of its words in use when guests begin.
fn filled(used: u64) -> Recipe {
    Recipe {
        used,
        from: 512,
        ..journaled("cluster_size=4k", 1024)
    }
}

/// A failure of the barriers of the image from one of them on, for so many.
fn no_barriers(count: usize) -> Fault {
    Fault {
        file: 0,
        of: Counted::Barriers,
        from: 0,
        until: count,
        errno: libc::EIO,
    }
}

/// What would be caught, too: a flush that takes away what came while it was under way.
#[test]
fn a_journal_that_is_half_full() {
    cuts(filled(49), false, 120);
}

/// Flushes that fail have left no more room than the largest change takes. What would be caught, too:
/// a change that fails because the flush of a journal that is half full has; one that goes on
/// without room.
#[test]
fn a_journal_that_is_full() {
    cuts_with(seed(), filled(74), false, 120, Some(no_barriers(3)));
}

/// What would be caught: changes that go on until the journal has no room for what a flush records.
#[test]
fn a_full_journal_takes_no_more_changes_until_a_flush_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = filled(0);
    let disk = Disk::make(dir.path(), recipe);
    let reactor = Reactor::for_this_thread().unwrap();
    let machine = disk.machine();
    let opened = {
        let _alone = alone();
        reactor.block_on(disk.open(&machine, true)).unwrap()
    };
    let clock = machine.clone();
    let clock = Box::new(move || clock.now());
    let work = Work::new(opened.chain, disk.first.clone(), 1, clock);
    work.adopt(&recipe);
    work.strict.set(false);
    machine.be_quiet(true);
    machine.fail(Some(no_barriers(usize::MAX)));
    let failed = || !work.failures.borrow().is_empty();
    for _ in 0..10_000 {
        reactor.block_on(work.fill(0, 64));
        if failed() {
            break;
        }
    }
    assert!(failed(), "the journal does not become full");
    let (used, words) = usage(&machine.left().1.unwrap()).unwrap();
    let reserve = words / 8;
    assert!(used <= words - reserve, "{used} of {words} words");
    machine.fail(None);
    machine.clear_sync_error(0);
    assert!(reactor.block_on(work.flush()));
    work.failures.borrow_mut().clear();
    reactor.block_on(work.fill(0, 64));
    assert!(!failed());
    reactor.block_on(opened.image.close()).unwrap();
}
