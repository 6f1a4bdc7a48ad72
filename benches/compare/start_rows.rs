//! The rows about a daemon that has just started, has nothing to do, or little.

use crate::Options;
use crate::common::daemon::Daemon;
use crate::common::frontend::Op;
use crate::common::{Res, images};
use crate::disks::Disks;
use crate::report::Report;
use crate::rounds::in_turn;
use crate::samples::StartSample;
use crate::variants::Variant;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// One row: so many empty layers, of a terabyte each. A daemon that keeps a journal has changes of the
/// mapping in it when it is killed, as many as fill one of the usual size.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    layers: usize,
}

impl Row {
    /// Its name in the report.
    pub fn name(&self, place: &str) -> String {
        let layers = if self.layers == 1 { "layer" } else { "layers" };
        format!("{place} start, 1 TiB in {} {layers}", self.layers)
    }
}

/// All rows of a place.
pub fn rows() -> Vec<Row> {
    [1, 16, 64].map(|layers| Row { layers }).to_vec()
}

/// The size of the disk.
const SIZE: u64 = 1 << 40;

/// Requests in flight when it is killed.
const IN_FLIGHT: u64 = 32;

/// Bytes of a journal that is not flushed before it has as much as a full one of the usual size.
const JOURNAL: u64 = 8 << 20;

/// First writes to clusters that fill half of it: each takes 48 bytes.
const CHANGES: u64 = JOURNAL / 2 / 48 - 1000;

/// 64 KiB.
const SECTORS_OF_CLUSTER: u64 = 128;

/// Requests each second of a guest that does little.
const FEW: u32 = 1000;

/// Measures the wanted rows in `dir`: in each round every back-end in turn.
pub fn measure(
    options: &Options,
    place: &str,
    dir: &Path,
    variants: &[Variant],
    report: &mut Report,
) -> Res<()> {
    for row in options.wanted(rows(), |row| row.name(place)) {
        let name = row.name(place);
        let disks = Disks::new(dir, SIZE)?;
        let layers = create(&disks, row.layers)?;
        for round in 0..options.rounds() {
            in_turn(
                (&name, round),
                variants.iter(),
                report,
                Report::add_start,
                |variant| run(options, variant, &disks, &layers, round as u64),
            );
        }
    }
    Ok(())
}

/// Empty images, each over the next; the top comes first.
fn create(disks: &Disks, count: usize) -> Res<Vec<(PathBuf, &'static str)>> {
    let mut layers: Vec<(PathBuf, &'static str)> = Vec::new();
    for number in 0..count {
        let path = disks.dir().join(format!("empty{number}.qcow2"));
        let below = layers
            .first()
            .map(|(path, format)| (path.as_path(), *format));
        images::create(&path, disks.size(), "compat=1.1", below)?;
        layers.insert(0, (path, "qcow2"));
    }
    Ok(layers)
}

fn run(
    options: &Options,
    variant: &Variant,
    disks: &Disks,
    layers: &[(PathBuf, &'static str)],
    round: u64,
) -> Res<StartSample> {
    let mut setup = variant.setup(disks.dir(), layers, false);
    if variant.journals.is_some() {
        setup.extra.push(format!("--journal-size={JOURNAL}"));
    }
    let begin = Instant::now();
    let mut daemon = setup.start(&variant.program, disks.dir(), Some(options.cpu_backend))?;
    let mut first = variant.connect(&mut daemon, &setup, 1 << 16)?;
    let ready = begin.elapsed();
    let resident = resident(&daemon)?;
    let queue = first.queues.first_mut().ok_or("no queue")?;
    queue.run(&Op::read(0, &[(0, 4096)]))?;
    // What begins with the first request has ended by then.
    std::thread::sleep(options.warm_up());
    let (switches, begin) = (switches(&daemon)?, Instant::now());
    std::thread::sleep(options.measured());
    let idle = self::switches(&daemon)?.saturating_sub(switches) as f64;
    let wakeups = idle / begin.elapsed().as_secs_f64();
    let cpu = daemon.cpu_time()?;
    let (mut requests, mut next) = (0u32, Instant::now());
    let end = next + options.measured();
    while next < end {
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        queue.run(&Op::read(u64::from(requests) * 128, &[(0, 4096)]))?;
        requests += 1;
        next += Duration::from_secs(1) / FEW;
    }
    let cpu = daemon.cpu_time()?.saturating_sub(cpu);
    if variant.journals.is_some() {
        // Where no round before has written.
        for number in round * CHANGES..(round + 1) * CHANGES {
            queue.run(&Op::write(number * SECTORS_OF_CLUSTER, &[(0, 4096)]))?;
        }
    }
    for number in 0..IN_FLIGHT {
        queue.submit(&Op::read(number * 128, &[(0, 4096)]), number)?;
    }
    queue.kick()?;
    daemon.kill()?;
    let said = daemon.log().len();
    let begin = Instant::now();
    let mut daemon = setup.start(&variant.program, disks.dir(), Some(options.cpu_backend))?;
    let frontend = variant.connect(&mut daemon, &setup, 1 << 16)?;
    let again = begin.elapsed();
    let fence = daemon.log().get(said..).and_then(fenced);
    drop((frontend, first));
    variant.end(daemon)?;
    Ok(StartSample {
        ready: ready.as_secs_f64() * 1e3,
        resident,
        wakeups,
        cpu: cpu.as_secs_f64() * 1e6 / f64::from(requests.max(1)),
        again: again.as_secs_f64() * 1e3,
        fence: fence.unwrap_or(f64::NAN),
    })
}

/// How long the last start waited for the fence, in milliseconds, as it has said.
fn fenced(log: &str) -> Option<f64> {
    let serving = log.lines().rfind(|line| line.contains("serving after"))?;
    serving
        .rsplit("fence ")
        .next()?
        .strip_suffix(" ms")?
        .parse()
        .ok()
}

/// Resident memory in MiB.
fn resident(daemon: &Daemon) -> Res<f64> {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid()))?;
    Ok(field(&status, "VmRSS:").ok_or("no VmRSS")? / 1024.0)
}

/// How often threads of the process went to sleep so far.
fn switches(daemon: &Daemon) -> Res<u64> {
    let mut sum = 0.0;
    for thread in fs::read_dir(format!("/proc/{}/task", daemon.pid()))? {
        let status = fs::read_to_string(thread?.path().join("status")).unwrap_or_default();
        sum += field(&status, "voluntary_ctxt_switches:").unwrap_or(0.0);
    }
    Ok(sum as u64)
}

fn field(status: &str, name: &str) -> Option<f64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    value.split_whitespace().next()?.parse().ok()
}
