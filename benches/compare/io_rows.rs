//! The rows about I/O: requests per second, latency and CPU time.

use crate::Options;
use crate::common::Res;
use crate::disks::{Compression, Disk, Disks};
use crate::floor;
use crate::load::{self, Load, Order, Shape};
use crate::machine::OtherLoad;
use crate::report::Report;
use crate::rounds::in_turn;
use crate::row::Row;
use crate::samples::IoSample;
use crate::variants::Variant;
use crate::warm::Memory;
use crate::workers::BackendCpu;
use std::path::Path;
use std::time::Duration;

/// All rows of a place.
pub fn rows(place: &str) -> Vec<Row> {
    let shape = |write, len, depth, order| Shape {
        write,
        len,
        queues: 1,
        depth,
        order,
        flush_every: None,
    };
    let row = Row::new;
    let read = shape(false, 4096, 32, Order::Random);
    let usual = [
        ("4k randread QD1", shape(false, 4096, 1, Order::Random)),
        ("4k randread QD32", read),
        ("4k randwrite QD32", shape(true, 4096, 32, Order::Random)),
        (
            "128k seqread QD8",
            shape(false, 128 << 10, 8, Order::Sequential),
        ),
    ];
    let mut rows = Vec::new();
    for disk in [Disk::Raw, Disk::Qcow2, Disk::Overlay] {
        rows.extend(usual.iter().map(|&(load, shape)| row(disk, load, shape)));
    }
    if place == "tmpfs" {
        // There the front-end's sleep and the call to end it are most of a request.
        rows.extend(usual.iter().map(|&(load, shape)| Row {
            poll: true,
            ..row(Disk::Raw, load, shape)
        }));
    }
    rows.push(row(Disk::Chain, "4k randread QD32", read));
    let [_, (random, _), _, (sequential, forward)] = usual;
    let zlib = Disk::Compressed(Compression::Zlib);
    rows.push(row(zlib, random, read));
    rows.push(row(zlib, sequential, forward));
    rows.push(row(Disk::Compressed(Compression::Zstd), random, read));
    for (queues, load) in [
        (2, "4k randread QD32, 2 queues"),
        (4, "4k randread QD32, 4 queues"),
    ] {
        rows.push(row(Disk::Raw, load, Shape { queues, ..read }));
    }
    let once = Order::EachClusterOnce;
    for (disk, load, len) in [
        (Disk::Overlay, "4k allocating write QD32", 4096),
        (Disk::Empty, "4k allocating write QD32", 4096),
        (Disk::Empty, "64k allocating write QD32", 65536),
    ] {
        rows.push(row(disk, load, shape(true, len, 32, once)));
    }
    for disk in [Disk::Overlay, Disk::Empty] {
        let shape = Shape {
            flush_every: Some(32),
            ..shape(true, 4096, 32, once)
        };
        rows.push(row(disk, "4k allocating write QD32, flush after 32", shape));
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
    let rows = options.wanted(rows(place), |row| row.name(place));
    if rows.is_empty() {
        return Ok(());
    }
    let disks = Disks::new(dir, options.disk_size())?;
    for row in rows {
        let name = row.name(place);
        let _memory = match memory(options, &row, &disks, place) {
            Ok(memory) => memory,
            Err(error) => {
                report.fail(&name, "memory", &error.to_string());
                continue;
            }
        };
        for round in 0..options.rounds() {
            match floor::measure(options, &row, &disks, place) {
                Ok(floor) => report.add_floor(&name, floor),
                Err(error) => report.fail(&name, "floor", &error.to_string()),
            }
            let fit = |variant: &&Variant| row.disk == Disk::Raw || !variant.raw_only;
            in_turn(
                (&name, round),
                variants.iter().filter(fit),
                report,
                Report::add_io,
                |variant| run(options, options.measured(), &row, variant, &disks, round),
            );
        }
    }
    Ok(())
}

/// Memory for the files that grow by a row. What lasts is made first, of other memory.
fn memory(options: &Options, row: &Row, disks: &Disks, place: &str) -> Res<Option<Memory>> {
    if !row.allocates() {
        return Ok(None);
    }
    disks.scratch()?;
    disks.layers(row.disk)?;
    disks.memory(options, place)
}

/// One run of a back-end, measured for `time`.
pub fn run(
    options: &Options,
    time: Duration,
    row: &Row,
    variant: &Variant,
    disks: &Disks,
    round: usize,
) -> Res<IoSample> {
    let mut setup = variant.setup(disks.dir(), &disks.layers(row.disk)?, false);
    setup.queues = row.shape.queues;
    let mut daemon = setup.start(&variant.program, disks.dir(), Some(options.cpu_backend))?;
    let memory = load::memory_for(row.shape);
    let frontend = variant.connect(&mut daemon, &setup, memory)?;
    // The same places for every back-end of a round.
    let seed = 1 + round as u64;
    let poll = row.poll || options.poll;
    let size = disks.size_of(row.disk);
    let mut load = Load::new(frontend, row.shape, size, poll, seed)?;
    if row.shape.order != Order::EachClusterOnce {
        load.run_for(options.warm_up())?;
    }
    let other = OtherLoad::start(&[daemon.pid()])?;
    let (cpu, written) = (BackendCpu::start(&daemon)?, daemon.bytes_written()?);
    let measured = load.run_for(time)?;
    let cpu = cpu.end(&daemon)?;
    let other = other.end()?;
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
    variant.end(daemon)?;
    Ok(IoSample {
        iops: measured.iops(),
        p50: measured.latencies.percentile(0.50),
        p99: measured.latencies.percentile(0.99),
        cpu: cpu.as_secs_f64() * 1e6 / measured.requests.max(1) as f64,
        written: written_each,
        other,
    })
}
