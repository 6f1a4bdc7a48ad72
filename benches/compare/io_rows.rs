//! The rows about I/O: requests per second, latency and CPU time.

use crate::Options;
use crate::common::Res;
use crate::disks::{Disk, Disks};
use crate::load::{self, Load, Order, Shape};
use crate::machine::OtherLoad;
use crate::report::{IoSample, Report};
use crate::variants::Variant;
use std::path::Path;

/// One row: a load on an image.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    disk: Disk,
    load: &'static str,
    shape: Shape,
}

impl Row {
    /// Its name in the report.
    pub fn name(&self, place: &str) -> String {
        format!("{place} {}, {}", self.disk.name(), self.load)
    }
}

/// All rows of a place.
pub fn rows() -> Vec<Row> {
    let shape = |write, len, depth, order| Shape {
        write,
        len,
        depth,
        order,
        flush_every: None,
    };
    let usual = [
        ("4k randread QD1", shape(false, 4096, 1, Order::Random)),
        ("4k randread QD32", shape(false, 4096, 32, Order::Random)),
        ("4k randwrite QD32", shape(true, 4096, 32, Order::Random)),
        (
            "128k seqread QD8",
            shape(false, 128 << 10, 8, Order::Sequential),
        ),
    ];
    let mut rows = Vec::new();
    for disk in [Disk::Raw, Disk::Qcow2, Disk::Overlay] {
        rows.extend(usual.iter().map(|&(load, shape)| Row { disk, load, shape }));
    }
    rows.push(Row {
        disk: Disk::Chain,
        load: "4k randread QD32",
        shape: shape(false, 4096, 32, Order::Random),
    });
    let once = Order::EachClusterOnce;
    for (disk, load, len, depth) in [
        (Disk::Overlay, "4k allocating write QD32", 4096, 32),
        (Disk::Empty, "4k allocating write QD32", 4096, 32),
        (Disk::Empty, "64k allocating write QD8", 65536, 8),
    ] {
        rows.push(Row {
            disk,
            load,
            shape: shape(true, len, depth, once),
        });
    }
    for disk in [Disk::Overlay, Disk::Empty] {
        rows.push(Row {
            disk,
            load: "4k allocating write QD32, flush after 32",
            shape: Shape {
                flush_every: Some(32),
                ..shape(true, 4096, 32, once)
            },
        });
    }
    rows
}

/// Measures the wanted rows in `dir`: in each round every back-end in turn.
pub fn measure(
    options: &Options,
    place: &str,
    dir: &Path,
    variants: &[Variant],
    report: &mut Report,
) -> Res<()> {
    let rows: Vec<Row> = rows()
        .into_iter()
        .filter(|row| options.wants_row(&row.name(place)))
        .collect();
    if rows.is_empty() {
        return Ok(());
    }
    let disks = Disks::new(dir, if options.quick { 256 << 20 } else { 1 << 30 })?;
    for row in rows {
        let name = row.name(place);
        for round in 0..options.rounds() {
            for variant in variants {
                eprintln!("{name}: round {}, {}", round + 1, variant.name);
                match run(options, &row, variant, &disks, round) {
                    Ok(sample) => report.add_io(&name, variant.name, sample),
                    Err(error) => report.fail(&name, variant.name, &error.to_string()),
                }
            }
        }
    }
    Ok(())
}

fn run(
    options: &Options,
    row: &Row,
    variant: &Variant,
    disks: &Disks,
    round: usize,
) -> Res<IoSample> {
    let setup = variant.setup(disks.dir(), &disks.layers(row.disk)?, false);
    let mut daemon = setup.start(&variant.program, disks.dir(), Some(options.cpu_backend))?;
    let memory = load::memory_for(row.shape);
    let frontend = daemon.connect(&setup.socket, 1, 256, memory)?;
    // The same places for every back-end of a round.
    let seed = 1 + round as u64;
    let mut load = Load::new(frontend, row.shape, disks.size(), options.poll, seed)?;
    if row.shape.order != Order::EachClusterOnce {
        load.run_for(options.warm_up())?;
    }
    let other = OtherLoad::start(&daemon)?;
    let (before, written) = (daemon.cpu_time()?, daemon.bytes_written()?);
    let measured = load.run_for(options.measured())?;
    let cpu = daemon.cpu_time()?.saturating_sub(before);
    let other = other.end(&daemon)?;
    let mut written_each = f64::NAN;
    if row.shape.write {
        load.flush()?;
        let bytes = daemon.bytes_written()?.saturating_sub(written);
        if bytes > 0 {
            written_each = bytes as f64 / 1024.0 / measured.requests.max(1) as f64;
        }
    }
    load.verify_samples()?;
    drop(load);
    daemon.stop()?;
    Ok(IoSample {
        iops: measured.iops(),
        p50: measured.latencies.percentile(0.50),
        p99: measured.latencies.percentile(0.99),
        cpu: cpu.as_secs_f64() * 1e6 / measured.requests.max(1) as f64,
        written: written_each,
        other,
    })
}
