//! A random walk over the graph: everything that changes it, one after the other and side by side,
//! under guests that never stop, with kills and power cuts in between.
//!
//! Two or three disks are served. Nodes, exports and objects come and go, snapshots are taken of one
//! disk or of all, layers are streamed and committed, images are put under others, and commands are
//! refused. The process ends at random moments, also in the midst of a command, and the next one has
//! the same command line. On a file system in user space the power fails as well: what no barrier
//! covers is there or not.
//!
//! What would be caught: a guest's write that is lost, by a kill after it completed or by a power cut
//! after it was flushed; bytes of a wrong layer; a graph that is not what the commands have made of it,
//! at once or in the next process; a header that names another image; a command that is refused though
//! nothing is in its way, or leaves something when it is; a lock or a fence that is kept or not held;
//! images that `qemu-img` finds errors in. That such things are caught is shown by faults that are
//! planted ([`planted`]).
//!
//! Two short walks of fixed seeds are taken with all other tests. `STRATABLK_SEED=n` repeats the
//! choices of a long one, `STRATABLK_WALK_STEPS=n` and `STRATABLK_WALK_SECONDS=n` say how long it is.
//! Jobs and guests are as fast as they are, so two walks of a seed differ in what they meet.

#[path = "../common/mod.rs"]
mod common;

mod begin;
mod choose;
#[allow(dead_code)]
mod cut_fs;
mod guest;
mod lives;
mod look;
mod machine;
mod model;
mod new_images;
mod planted;
mod refusals;
mod scene;
mod steps;
mod sudden;
mod walk;
mod work;
mod world;

use std::time::{Duration, Instant};

use common::Res;
use common::daemon::Program;
use common::rng::seed_from_environment;
use common::skips::skip;
use walk::Walk;

/// Steps of a walk.
const STEPS: u64 = 25;

/// The seeds of the walks that are taken with all other tests.
const AMONG_THE_TESTS: [u64; 2] = [1, 2];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// There are file systems in user space.
fn can_cut_power() -> Res<bool> {
    let dir = tempfile::tempdir()?;
    Ok(cut_fs::CutFs::mount(dir.path()).is_some())
}

fn walk(seed: u64, power: bool) -> Res<()> {
    let steps = number("STRATABLK_WALK_STEPS").unwrap_or(STEPS);
    println!("STRATABLK_SEED={seed}, {steps} steps, power cuts: {power}");
    if power && !can_cut_power()? {
        return Ok(skip("power cuts: no file systems in user space here")?);
    }
    let walk = Walk { seed, steps, power };
    match walk.run(&Program::under_test())? {
        Some(found) => Err(format!("seed {seed}, step {}: {}", found.step, found.text).into()),
        None => Ok(()),
    }
}

#[test]
fn a_walk_with_kills() -> Res<()> {
    walk(AMONG_THE_TESTS[0], false)
}

#[test]
fn a_walk_with_power_cuts() -> Res<()> {
    walk(AMONG_THE_TESTS[1], true)
}

/// One seed, as a failure names it.
#[test]
#[ignore = "repeats what has failed"]
fn a_walk_from_a_seed() -> Res<()> {
    let power = number("STRATABLK_WALK_POWER") != Some(0);
    walk(seed_from_environment(), power)
}

/// Seed after seed, for as long as `STRATABLK_WALK_SECONDS` says.
#[test]
#[ignore = "takes as long as one likes: contrib/test walk"]
fn a_long_walk() -> Res<()> {
    let end = number("STRATABLK_WALK_SECONDS").unwrap_or(3600);
    let end = Instant::now() + Duration::from_secs(end);
    let mut seed = seed_from_environment();
    let power = can_cut_power()?;
    if !power {
        skip("power cuts: no file systems in user space here")?;
    }
    while Instant::now() < end {
        walk(seed, !seed.is_multiple_of(4) && power)?;
        seed += 1;
    }
    Ok(())
}

/// All planted faults, or the one that `STRATABLK_PLANTED_ONLY` names.
#[test]
#[ignore = "takes minutes: contrib/test planted"]
fn planted_faults_are_found() -> Res<()> {
    let only = std::env::var("STRATABLK_PLANTED_ONLY").ok();
    let seed = seed_from_environment();
    let seeds = seed..seed + number("STRATABLK_WALK_SEEDS").unwrap_or(6);
    let faults = planted::FAULTS.iter();
    let faults = faults.filter(|fault| only.as_deref().is_none_or(|only| only == fault.name));
    let faults: Vec<_> = faults.collect();
    if faults.is_empty() {
        return Err("no such fault".into());
    }
    if faults.iter().any(|fault| fault.power) && !can_cut_power()? {
        return Ok(skip("power cuts: no file systems in user space here")?);
    }
    for power in [false, true] {
        if faults.iter().any(|fault| fault.power == power) {
            planted::control(power, seeds.clone())?;
        }
    }
    let mut missed = Vec::new();
    for fault in faults {
        let begun = Instant::now();
        let found = planted::find(fault, seeds.clone());
        let took = begun.elapsed().as_secs();
        let name = fault.name;
        match found {
            Ok(Some((seed, found))) => {
                let line = found.error.lines().next().unwrap_or_default();
                let line: String = line.chars().take(200).collect();
                println!("{name}: seed {seed}, step {}, {took} s: {line}", found.step);
            }
            Ok(None) => {
                println!("{name}: NOT FOUND in {took} s ({})", fault.what);
                missed.push(name);
            }
            Err(error) => {
                println!("{name}: {error}");
                missed.push(name);
            }
        }
    }
    match missed.is_empty() {
        true => Ok(()),
        false => Err(format!("not found: {}", missed.join(", ")).into()),
    }
}
