//! The row about a neighbour that hangs: the same daemon serves a second disk, whose file system does
//! not answer for as long as the first one is measured.

use crate::Options;
use crate::common::Res;
use crate::common::daemon::{Daemon, Setup};
use crate::common::frontend::{Frontend, OK, Op};
use crate::common::slow::Slow;
use crate::disks::{Disk, Disks};
use crate::hung_table::{Figures, HungSample};
use crate::load::{self, Load, Measured, Order, Shape};
use crate::machine::OtherLoad;
use crate::report::Report;
use crate::rounds::in_turn;
use crate::variants::Variant;
use std::path::Path;
use std::time::Duration;

/// The load of the disk that is measured.
const SHAPE: Shape = Shape {
    write: false,
    len: 4096,
    queues: 1,
    depth: 32,
    order: Order::Random,
    flush_every: None,
};

/// Requests of the neighbour that hang: reads, writes and a flush.
const HANGING: u64 = 32;

/// Bytes of the neighbour's disk.
const NEIGHBOUR: u64 = 64 << 20;

/// Its name in the report.
pub fn name(place: &str) -> String {
    format!("{place} raw, 4k randread QD32, beside a disk that hangs")
}

/// Measures the row in `dir`, if it is wanted, for `time` without and `time` with the neighbour that
/// hangs: in each round every back-end in turn.
pub fn measure(
    options: &Options,
    place: &str,
    dir: &Path,
    variants: &[Variant],
    report: &mut Report,
) -> Res<()> {
    let name = name(place);
    let Some(seconds) = options.hang.filter(|_| options.wants_row(&name)) else {
        return Ok(());
    };
    let disks = Disks::new(dir, options.disk_size())?;
    for round in 0..options.rounds() {
        in_turn(
            (&name, round),
            variants.iter().filter(|variant| !variant.raw_only),
            report,
            Report::add_hung,
            |variant| {
                let time = Duration::from_secs_f64(seconds);
                run(options, time, variant, &disks, round)
            },
        );
    }
    Ok(())
}

fn run(
    options: &Options,
    time: Duration,
    variant: &Variant,
    disks: &Disks,
    round: usize,
) -> Res<HungSample> {
    let mut setup = variant.setup(disks.dir(), &disks.layers(Disk::Raw)?, false);
    let folder = tempfile::tempdir_in(disks.dir())?;
    let slow =
        Slow::mount(folder.path(), NEIGHBOUR)?.ok_or("no file systems in user space here")?;
    let socket = folder.path().join("neighbour.sock");
    setup.extra.extend([
        "--blockdev".to_owned(),
        format!(
            "driver=file,node-name=neighbour,locking=off,filename={}",
            slow.file.display()
        ),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=neighbour,node-name=neighbour,writable=on,addr.type=unix,\
             addr.path={}",
            socket.display()
        ),
    ]);
    let mut daemon = setup.start(&variant.program, disks.dir(), Some(options.cpu_backend))?;
    let mut load = load_of(options, variant, &mut daemon, &setup, disks, round)?;
    let memory = HANGING as usize * 4096;
    let mut neighbour = daemon.connect(&socket, 1, 256, memory)?;
    load.run_for(options.warm_up())?;
    let other = OtherLoad::start(&[daemon.pid()])?;
    // By turns: what comes first may find the machine in another state.
    let hung_first = round % 2 == 1;
    let first = one(
        &mut load,
        hung_first.then_some((&slow, &mut neighbour)),
        time,
    )?;
    let second = one(
        &mut load,
        (!hung_first).then_some((&slow, &mut neighbour)),
        time,
    )?;
    let other = other.end()?;
    load.verify_samples()?;
    drop((load, neighbour));
    variant.end(daemon)?;
    let (alone, beside) = if hung_first {
        (second, first)
    } else {
        (first, second)
    };
    Ok(HungSample {
        alone,
        beside,
        other,
    })
}

fn load_of(
    options: &Options,
    variant: &Variant,
    daemon: &mut Daemon,
    setup: &Setup,
    disks: &Disks,
    round: usize,
) -> Res<Load> {
    let frontend = variant.connect(daemon, setup, load::memory_for(SHAPE))?;
    let size = disks.size_of(Disk::Raw);
    Load::new(frontend, SHAPE, size, options.poll, 1 + round as u64)
}

/// One measurement, beside a neighbour that hangs if there is one.
fn one(load: &mut Load, neighbour: Option<(&Slow, &mut Frontend)>, time: Duration) -> Res<Figures> {
    let Some((slow, frontend)) = neighbour else {
        return Ok(figures(&load.run_for(time)?));
    };
    slow.signal(libc::SIGSTOP);
    let measured = hang(frontend).and_then(|()| load.run_for(time));
    // However that ended: nobody could kill a back-end that waits for it.
    slow.signal(libc::SIGCONT);
    let measured = figures(&measured?);
    let queue = frontend.queues.first_mut().ok_or("no queue")?;
    let mut ended = 0;
    while ended < HANGING {
        queue.wait()?;
        while let Some(done) = queue.pop()? {
            if done.status != OK {
                return Err(format!("a request that hung: status {}", done.status).into());
            }
            ended += 1;
        }
    }
    Ok(measured)
}

/// What a load gave.
fn figures(measured: &Measured) -> Figures {
    Figures {
        iops: measured.iops(),
        p50: measured.latencies.percentile(0.50),
        p99: measured.latencies.percentile(0.99),
    }
}

/// Sends requests that do not end.
fn hang(frontend: &mut Frontend) -> Res<()> {
    let queue = frontend.queues.first_mut().ok_or("no queue")?;
    for token in 0..HANGING {
        let data = [(token as usize * 4096, 4096)];
        let sector = token * 2048;
        let op = match token {
            0 => Op::flush(),
            _ if token % 2 == 0 => Op::read(sector, &data),
            _ => Op::write(sector, &data),
        };
        queue.submit(&op, token)?;
    }
    queue.kick()
}
