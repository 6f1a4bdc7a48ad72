//! The concurrent core under a model checker, which tries the interleavings of its threads: the
//! engine's own sources, compiled with the checker's primitives (the package in `tests/model/package`).
//!
//! What would be caught: claims that overlap, a waiter that is never woken, a cluster that is
//! used again while somebody may still read it, an old chain that lives on or goes too early, a
//! mapping slice that is forgotten with changes in it or loaded over newer ones, references that
//! are counted wrong, a base that comes to light after a stream's end, a write that a snapshot loses.
//!
//! Small cases are tried in every order; larger ones at random and with few preemptions
//! (PCT). `STRATABLK_MODEL_RUNS` is how many executions of each are made, `STRATABLK_SEED`
//! repeats a run: `STRATABLK_MODEL_RUNS=100000 cargo test --release --test model`. What fails
//! prints its schedule, too.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod core;
mod engine;
mod held;
#[cfg(debug_assertions)]
mod killed;
#[allow(dead_code)]
#[path = "../crash/qcow2.rs"]
mod qcow2;
mod snapped;
#[allow(dead_code)]
#[path = "../engine/support.rs"]
mod support;
mod turned;
mod withdrawn;

use stratablk_model::shuttle::scheduler::{DfsScheduler, PctScheduler, RandomScheduler};
use stratablk_model::shuttle::{Config, Runner};

fn number_from(variable: &str) -> Option<usize> {
    std::env::var(variable).ok()?.parse().ok()
}

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config
}

/// Tries `test` in every order, up to a bound; fails if there are not so many as `least`.
fn every_order(most: usize, least: usize, test: impl Fn() + Send + Sync + 'static) {
    let most = number_from("STRATABLK_MODEL_RUNS").unwrap_or(most);
    let runner = Runner::new(DfsScheduler::new(Some(most), false), config());
    let runs = runner.run(move || {
        test();
    });
    println!("{runs} orders{}", if runs < most { ": all" } else { "" });
    assert!(runs >= least, "{runs}");
}

/// Tries `test` in `runs` random orders, half of them with few preemptions.
fn many_orders(runs: usize, test: impl Fn() + Clone + Send + Sync + 'static) {
    let runs = number_from("STRATABLK_MODEL_RUNS").unwrap_or(runs);
    let seed = number_from("STRATABLK_SEED").map_or_else(rand::random, |seed| seed as u64);
    println!("STRATABLK_SEED={seed}");
    let begun = test.clone();
    let run = move || {
        begun();
    };
    let random = RandomScheduler::new_from_seed(seed, runs / 2);
    Runner::new(random, config()).run(run.clone());
    let few = PctScheduler::new_from_seed(seed, 4, runs / 2);
    Runner::new(few, config()).run(run);
}
