//! Power cuts and faults on other kinds of storage than files of a page cache: with blocks of
//! 4 KiB, of fixed length, and with transfers that are short and operations that are interrupted.
//!
//! What would be caught: a part of a block that is written; anything behind the end of a device;
//! clusters of a device that are taken for zeros; a full device that is not sound, or from which
//! what was cut off cannot be read; bytes that are lost where a transfer is short; an interruption
//! that a guest hears of, or that counts as a barrier.

use crate::cuts::cuts;
use crate::disk::{Below, Recipe};
use crate::faults::bench;
use crate::machine::Counted::{Changes, Reads};
use crate::machine::Traits;
use crate::seed;

/// States judged by default, of each disk.
const STATES: usize = 600;

const BLOCKS: Traits = Traits {
    block: 4096,
    ..Traits::FILE
};

const fn device(len: u64) -> Traits {
    Traits {
        device: Some(len),
        ..Traits::FILE
    }
}

fn uneven(storage: Traits) -> Traits {
    Traits {
        uneven: Some(seed()),
        ..storage
    }
}

fn on(storage: Traits, options: &'static str) -> Recipe {
    Recipe {
        storage,
        states: STATES,
        ..Recipe::new(options, 1024)
    }
}

#[test]
fn cuts_on_large_blocks() {
    cuts(on(BLOCKS, "cluster_size=4k"), false, 80);
    let recipe = Recipe {
        below: Below::Qcow2,
        compress: true,
        ..on(BLOCKS, "cluster_size=16k")
    };
    cuts(recipe, true, 60);
}

#[test]
fn cuts_on_a_device() {
    cuts(on(device(1 << 20), "cluster_size=4k"), false, 80);
    // The disk has 512 KiB: this fills up.
    cuts(on(device(300 << 10), "cluster_size=4k"), false, 80);
    // A snapshot, and the last cluster is not whole.
    let recipe = Recipe {
        filled: 400,
        snapshot: true,
        ..on(device((1 << 20) + 512), "cluster_size=2k")
    };
    cuts(recipe, false, 60);
}

#[test]
fn cuts_with_uneven_transfers() {
    cuts(on(uneven(Traits::FILE), "cluster_size=4k"), false, 60);
    let recipe = Recipe {
        below: Below::Raw,
        ..on(uneven(Traits::FILE), "cluster_size=16k,extended_l2=on")
    };
    cuts(recipe, true, 40);
}

#[test]
fn cuts_on_an_uneven_device_of_large_blocks() {
    let storage = Traits {
        device: Some(400 << 10),
        ..uneven(BLOCKS)
    };
    let recipe = Recipe {
        below: Below::Raw,
        ..on(storage, "cluster_size=4k")
    };
    cuts(recipe, false, 60);
}

#[test]
fn faults_of_a_device() {
    let recipe = Recipe {
        sectors: 512,
        ..on(device(1 << 20), "cluster_size=4k")
    };
    bench(recipe, false).every(0, Changes, libc::EIO);
}

#[test]
fn faults_of_uneven_large_blocks() {
    let recipe = Recipe {
        sectors: 512,
        filled: 200,
        cache_bytes: 4096,
        ..on(uneven(BLOCKS), "cluster_size=4k")
    };
    let mut bench = bench(recipe, false);
    bench.every(0, Changes, libc::EIO);
    bench.every(0, Reads, libc::EIO);
}
