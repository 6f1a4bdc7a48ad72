//! The rows about a real guest: `fio` in Linux under QEMU, on a disk that a back-end serves.

use crate::Options;
use crate::common::Res;
use crate::common::daemon::Daemon;
use crate::disks::{Disk, Disks};
use crate::guest::{self, Guest, Testbed};
use crate::machine::OtherLoad;
use crate::report::Report;
use crate::rounds::in_turn;
use crate::samples::{Disturbance, IoSample};
use crate::variants::Variant;
use crate::workers::BackendCpu;
use serde_json::Value;
use std::fs;
use std::time::Duration;

/// One row: a job of `fio` on an image.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    disk: Disk,
    load: &'static str,
    /// What `fio` is told about it.
    options: &'static str,
}

impl Row {
    /// Its name in the report.
    pub fn name(&self, place: &str) -> String {
        format!("{place} guest {}, {}", self.disk.name(), self.load)
    }
}

/// All rows of a place. They are on one image there, so that one boot serves them all.
pub fn rows(place: &str) -> Vec<Row> {
    let disk = if place == "tmpfs" {
        Disk::Raw
    } else {
        Disk::Qcow2
    };
    [
        ("4k randread QD1", "--rw=randread --bs=4k --iodepth=1"),
        ("4k randread QD32", "--rw=randread --bs=4k --iodepth=32"),
        ("4k randwrite QD32", "--rw=randwrite --bs=4k --iodepth=32"),
        ("128k seqread QD8", "--rw=read --bs=128k --iodepth=8"),
    ]
    .map(|(load, options)| Row {
        disk,
        load,
        options,
    })
    .to_vec()
}

/// How long a job may take beyond the time that it measures.
const PATIENCE: Duration = Duration::from_secs(30);

/// What boots the guests, if any row wants one. Before all other rows are measured: a missing
/// guest is told at once.
pub fn prepare(options: &Options, report: &mut Report) -> Option<Testbed> {
    let mut places = options.places().into_iter();
    if !places.any(|(place, _)| !wanted(options, place).is_empty()) {
        return None;
    }
    match Testbed::prepare(options) {
        Ok(testbed) => {
            report.note(testbed.describe());
            Some(testbed)
        }
        Err(error) => {
            report.fail("all guest rows", "no guest", &error.to_string());
            None
        }
    }
}

fn wanted(options: &Options, place: &str) -> Vec<Row> {
    options.wanted(rows(place), |row| row.name(place))
}

/// Measures the wanted rows of all places: in each round every back-end in turn, with one boot.
pub fn measure(
    options: &Options,
    variants: &[Variant],
    testbed: &Testbed,
    report: &mut Report,
) -> Res<()> {
    for (place, dir) in options.places() {
        let rows = wanted(options, place);
        let Some(disk) = rows.first().map(|row| row.disk) else {
            continue;
        };
        let disks = Disks::new(&dir, options.disk_size())?;
        for round in 0..options.rounds() {
            in_turn(
                (&format!("{place} guest {}", disk.name()), round),
                variants.iter().filter(|variant| !variant.raw_only),
                report,
                |report, _, variant, samples: Vec<(String, IoSample)>| {
                    for (name, sample) in samples {
                        report.add_io(&name, variant, sample);
                    }
                },
                |variant| run(options, place, &rows, variant, testbed, &disks),
            );
        }
    }
    Ok(())
}

fn run(
    options: &Options,
    place: &str,
    rows: &[Row],
    variant: &Variant,
    testbed: &Testbed,
    disks: &Disks,
) -> Res<Vec<(String, IoSample)>> {
    let disk = rows.first().ok_or("no row")?.disk;
    let setup = variant.setup(disks.dir(), &disks.layers(disk)?, false);
    let mut daemon = setup.start(&variant.program, disks.dir(), Some(options.cpu_backend))?;
    daemon.retry(|| Ok(fs::metadata(&setup.socket)?))?;
    let mut guest = testbed.boot(Some(&setup.socket), &script(rows, options.measured()))?;
    let mut samples = Vec::new();
    for row in rows {
        let sample = one(row, options.measured(), &daemon, &mut guest);
        match sample {
            Ok(sample) => samples.push((row.name(place), sample)),
            Err(error) if daemon.alive()? => return Err(format!("{}: {error}", row.load).into()),
            Err(_) => break,
        }
    }
    drop(guest);
    // One that has ended before its time fails here, and says why.
    variant.end(daemon)?;
    Ok(samples)
}

/// The guest's job script: what warms up is written and verified, so that a back-end which drops
/// writes cannot win; then `fio` runs for each row, after a stop at which the bench takes the time.
///
/// `fio` takes all completions that are there, and submits as many at once. One by one, each is a
/// way through QEMU: under emulation that hides the back-end, and spreads the figures.
fn script(rows: &[Row], time: Duration) -> String {
    let mut text = format!(
        r#"
job() {{
    fio --name=guest --filename=/dev/vda --direct=1 --ioengine=libaio --output-format=json \
        --output=/tmp/out "$@" 2>/tmp/err && return
    report failed "fio $*: $(head -n 2 /tmp/err | tr '\n' ' ')"
    return 1
}}
measure() {{
    hold ready
    job --norandommap --time_based --runtime={}ms --iodepth_batch_submit=32 \
        --iodepth_batch_complete_max=32 "$@" || return
    report fio "$(tr -d '\n' </tmp/out)"
}}
echo none >/sys/block/vda/queue/scheduler
job --rw=randwrite --bs=4k-64k --size=16M --iodepth=16 --verify=crc32c --verify_fatal=1 || return
"#,
        time.as_millis()
    );
    for row in rows {
        text.push_str(&format!("measure {} || return\n", row.options));
    }
    text
}

/// One run of `fio`. The back-end's time is taken over all of it, and so are its requests.
fn one(row: &Row, time: Duration, daemon: &Daemon, guest: &mut Guest) -> Res<IoSample> {
    guest.wait_for("holding", guest::BOOT)?;
    let other = OtherLoad::start(&[daemon.pid(), guest.qemu()])?;
    let cpu = BackendCpu::start(daemon)?;
    guest.go()?;
    let result = guest.wait_for("fio", time + PATIENCE)?;
    let cpu = cpu.end(daemon)?;
    let other = other.end()?;
    let report: Value = serde_json::from_str(&result).map_err(|error| format!("fio: {error}"))?;
    sample(row, &report, cpu, other).ok_or_else(|| "fio: no figures".into())
}

fn sample(row: &Row, report: &Value, cpu: Duration, other: Disturbance) -> Option<IoSample> {
    let way = if row.options.contains("write") {
        "write"
    } else {
        "read"
    };
    let part = &report["jobs"].get(0)?[way];
    let percentile = |name| Some(part["clat_ns"]["percentile"].get(name)?.as_f64()? / 1000.0);
    let requests = part["total_ios"].as_f64().filter(|count| *count > 0.0)?;
    Some(IoSample {
        iops: part["iops"].as_f64()?,
        p50: percentile("50.000000")?,
        p99: percentile("99.000000")?,
        cpu: cpu.as_secs_f64() * 1e6 / requests,
        written: f64::NAN,
        other,
    })
}
