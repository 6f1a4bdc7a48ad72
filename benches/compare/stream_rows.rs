//! The rows about streams: how long the base takes to be copied into the overlay, and what the
//! guest notices of it.

use crate::Options;
use crate::common::Res;
use crate::common::daemon::Setup;
use crate::common::qmp::{Qmp, is_job_end};
use crate::copy;
use crate::disks::{Disk, Disks};
use crate::load::{self, Load, Order, Shape};
use crate::machine::OtherLoad;
use crate::report::Report;
use crate::rounds::in_turn;
use crate::samples::StreamSample;
use crate::variants::Variant;
use crate::workers::BackendCpu;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// One row.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    loaded: bool,
}

impl Row {
    /// Its name in the report.
    pub fn name(&self, place: &str) -> String {
        let load = if self.loaded {
            "under 4k randread QD32"
        } else {
            "idle"
        };
        format!("{place} stream, {load}")
    }

    /// How much is streamed. Without a guest it is quick, and a plain copy is measured against it:
    /// there it is more, so that the start and the end of a copy do not count for much.
    fn size(&self, quick: bool) -> u64 {
        match (quick, self.loaded) {
            (true, _) => 256 << 20,
            (_, true) => 2 << 30,
            (_, false) => 4 << 30,
        }
    }
}

/// All rows of a place.
pub fn rows() -> Vec<Row> {
    vec![Row { loaded: false }, Row { loaded: true }]
}

const SHAPE: Shape = Shape {
    write: false,
    len: 4096,
    queues: 1,
    depth: 32,
    order: Order::Random,
    flush_every: None,
};

/// Measures the wanted rows in `dir`: in each round every back-end in turn.
pub fn measure(
    options: &Options,
    place: &str,
    dir: &Path,
    variants: &[Variant],
    report: &mut Report,
) -> Res<()> {
    for row in options.wanted(rows(), |row| row.name(place)) {
        let disks = Disks::new(dir, row.size(options.quick))?;
        let name = row.name(place);
        // The base is made first, of other memory.
        disks.qcow2()?;
        let _memory = disks.memory(options, place)?;
        for round in 0..options.rounds() {
            if !row.loaded {
                match copy::fastest(options, &disks, place) {
                    Ok(seconds) => report.add_copy(&name, seconds),
                    Err(error) => report.fail(&name, "plain copy", &error.to_string()),
                }
            }
            in_turn(
                (&name, round),
                variants.iter().filter(|variant| !variant.raw_only),
                report,
                Report::add_stream,
                |variant| run(options, row, variant, &disks, round),
            );
        }
    }
    Ok(())
}

fn run(
    options: &Options,
    row: Row,
    variant: &Variant,
    disks: &Disks,
    round: usize,
) -> Res<StreamSample> {
    let setup = variant.setup(disks.dir(), &disks.layers(Disk::Overlay)?, true);
    let mut daemon = setup.start(&variant.program, disks.dir(), Some(options.cpu_backend))?;
    let frontend = variant.connect(&mut daemon, &setup, load::memory_for(SHAPE))?;
    let socket = setup.qmp.as_ref().ok_or("no control socket")?;
    let mut qmp = daemon.qmp(socket)?;
    let mut load = Load::new(
        frontend,
        SHAPE,
        disks.size(),
        options.poll,
        1 + round as u64,
    )?;
    let mut sample = StreamSample::new();
    if row.loaded {
        load.run_for(options.warm_up())?;
        let idle = load.run_for(options.measured())?;
        sample.iops_before = idle.iops();
        sample.p99_before = idle.latencies.percentile(0.99);
    }
    let other = OtherLoad::start(&[daemon.pid()])?;
    let cpu = BackendCpu::start(&daemon)?;
    let begin = Instant::now();
    let arguments = json!({"device": Setup::node(0), "job-id": "stream"});
    qmp.execute("block-stream", arguments)??;
    if row.loaded {
        let measured = load.run(|| ended(&mut qmp))?;
        sample.iops = measured.iops();
        sample.p99 = measured.latencies.percentile(0.99);
        sample.seconds = measured.elapsed.as_secs_f64();
    } else {
        qmp.set_patience(Duration::from_secs(300))?;
        succeeded(&qmp.job_end("stream")?)?;
        sample.seconds = begin.elapsed().as_secs_f64();
        sample.cpu = cpu.end(&daemon)?.as_secs_f64();
    }
    sample.other = other.end()?;
    load.verify_samples()?;
    drop(load);
    variant.end(daemon)?;
    Ok(sample)
}

/// True if the job has ended well by now.
fn ended(qmp: &mut Qmp) -> Res<bool> {
    for event in qmp.pending_events()? {
        if is_job_end(&event, "stream") {
            succeeded(&event)?;
            return Ok(true);
        }
    }
    Ok(false)
}

fn succeeded(event: &Value) -> Res<()> {
    let data = &event["data"];
    let whole = data["offset"] == data["len"] && data.get("error").is_none();
    if event["event"] != "BLOCK_JOB_COMPLETED" || !whole {
        return Err(format!("the stream did not succeed: {event}").into());
    }
    Ok(())
}
