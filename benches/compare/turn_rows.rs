//! The rows about the daemon against itself: what layers and queues cost, to a raw file and one
//! queue.
//!
//! Machines have times at which all goes slower. Here the loads take turns of a moment, many of
//! them, and each is compared with the raw file in its own round.

use crate::Options;
use crate::common::Res;
use crate::disks::{Disk, Disks};
use crate::io_rows;
use crate::load::{Order, Shape};
use crate::report::Report;
use crate::row::Row;
use crate::samples::{IoSample, TurnSample};
use crate::variants::{self, Variant};
use std::path::Path;
use std::time::Duration;

/// A load, on each of the images and queues.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    load: &'static str,
    write: bool,
}

impl Turn {
    /// Its name in the report.
    pub fn name(&self, place: &str) -> String {
        format!("{place} in turn, {}", self.load)
    }

    /// What takes turns. The first is what the others are compared with.
    fn rows(&self) -> Vec<(&'static str, Row)> {
        let row = |disk, queues| {
            let shape = Shape {
                write: self.write,
                len: 4096,
                queues,
                depth: 32,
                order: Order::Random,
                flush_every: None,
            };
            Row::new(disk, self.load, shape)
        };
        let mut rows = vec![("raw", row(Disk::Raw, 1)), ("qcow2", row(Disk::Qcow2, 1))];
        if !self.write {
            rows.push(("overlay", row(Disk::Overlay, 1)));
            rows.push(("chain of 16", row(Disk::Chain, 1)));
        }
        rows.push(("raw, 2 queues", row(Disk::Raw, 2)));
        rows.push(("raw, 4 queues", row(Disk::Raw, 4)));
        rows
    }
}

/// All of them.
pub fn turns() -> [Turn; 2] {
    [("4k randread QD32", false), ("4k randwrite QD32", true)]
        .map(|(load, write)| Turn { load, write })
}

/// Rounds, for each round of the other rows.
const ROUNDS: usize = 4;

/// The time of a turn, at most.
const TIME: Duration = Duration::from_millis(700);

/// Measures the wanted rows in `dir`, if the daemon is among `variants`.
pub fn measure(
    options: &Options,
    place: &str,
    dir: &Path,
    variants: &[Variant],
    report: &mut Report,
) -> Res<()> {
    let Some(daemon) = variants.iter().find(|v| v.name == variants::UNDER_TEST) else {
        return Ok(());
    };
    let turns = options.wanted(turns(), |turn| turn.name(place));
    if turns.is_empty() {
        return Ok(());
    }
    let disks = Disks::new(dir, options.disk_size())?;
    for turn in turns {
        let name = turn.name(place);
        for round in 0..options.rounds() * ROUNDS {
            eprintln!("{name}: round {}", round + 1);
            match one(options, &turn, daemon, &disks, round) {
                Ok(samples) => samples
                    .into_iter()
                    .for_each(|(what, sample)| report.add_turn(&name, what, sample)),
                Err(error) => report.fail(&name, daemon.name, &error.to_string()),
            }
        }
    }
    Ok(())
}

fn one(
    options: &Options,
    turn: &Turn,
    daemon: &Variant,
    disks: &Disks,
    round: usize,
) -> Res<Vec<(&'static str, TurnSample)>> {
    let time = options.measured().min(TIME);
    let mut rows: Vec<_> = turn.rows().into_iter().enumerate().collect();
    // No place in the round is always the same one's: what comes before may change the disk.
    let begin = round % rows.len();
    rows.rotate_left(begin);
    let mut samples = Vec::new();
    for (place, (what, row)) in rows {
        let io = io_rows::run(options, time, &row, daemon, disks, round)?;
        samples.push((place, what, io));
    }
    samples.sort_by_key(|(place, ..)| *place);
    let Some((iops, cpu)) = samples.first().map(|(.., io)| (io.iops, io.cpu)) else {
        return Ok(Vec::new());
    };
    let to_first = |(_, what, io): (usize, _, IoSample)| {
        let sample = TurnSample {
            iops_to_first: io.iops / iops,
            cpu_to_first: io.cpu / cpu,
            io,
        };
        (what, sample)
    };
    Ok(samples.into_iter().map(to_first).collect())
}
