//! The daemon is killed while requests are in flight, and the next one goes on with the same front-end:
//! with an inflight region, and without one, where the front-end goes on at the used index.
//!
//! What would be caught: a request that no daemon answers, or two do; one that fails because of a
//! kill; one that takes effect after its answer, when its sector has been written again; a kill that
//! is taken for a crash, or a crash that leaves no trace.
//!
//! `STRATABLK_SEED=n` repeats the choices of a run; `STRATABLK_KILLS=n` sets how many each test
//! does.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::indexing_slicing)]

mod common;

use common::Res;
use common::daemon::{Daemon, Program, Setup};
use common::frontend::{Frontend, OK, Op};
use common::rng::{Rng, seed_from_environment};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const SECTOR: usize = 512;
/// Sectors of the disk: few, so that each is written again soon.
const SECTORS: usize = 512;
/// Requests in flight on each queue.
const DEPTH: usize = 32;
const KILLS: u64 = 6;

/// A device, the process that serves it, and what each sector holds.
struct Run {
    setup: Setup,
    dir: tempfile::TempDir,
    raw: PathBuf,
    program: Program,
    daemon: Daemon,
    front: Frontend,
    rng: Rng,
    /// The number that was written last and answered.
    sectors: Vec<u64>,
    /// What each slot of each queue writes: sector and number.
    slots: Vec<Vec<Option<(usize, u64)>>>,
    numbers: u64,
}

impl Run {
    fn new(queues: usize, track: bool, seed: u64) -> Res<Self> {
        let dir = tempfile::tempdir()?;
        let raw = dir.path().join("disk.raw");
        fs::write(&raw, vec![0; SECTORS * SECTOR])?;
        let setup = Setup {
            qmp: None,
            queues,
            ..Setup::new(dir.path(), &[(raw.clone(), "raw")])
        };
        let program = Program::under_test();
        let mut daemon = setup.start(&program, dir.path(), None)?;
        let memory = queues * DEPTH * SECTOR;
        let front = daemon.connect_tracked(&setup.socket, queues, 128, memory, track)?;
        Ok(Self {
            setup,
            dir,
            raw,
            program,
            daemon,
            front,
            rng: Rng::new(seed),
            sectors: vec![0; SECTORS],
            slots: vec![vec![None; DEPTH]; queues],
            numbers: 0,
        })
    }

    /// Fills all slots with writes to sectors that nobody else writes.
    fn fill(&mut self) -> Res<()> {
        for queue in 0..self.slots.len() {
            for slot in 0..DEPTH {
                if self.slots[queue][slot].is_some() {
                    continue;
                }
                let busy = |sector| self.slots.iter().flatten().flatten().any(|s| s.0 == sector);
                let mut sector = self.rng.below(SECTORS as u64) as usize;
                while busy(sector) {
                    sector = (sector + 1) % SECTORS;
                }
                self.numbers += 1;
                let at = (queue * DEPTH + slot) * SECTOR;
                let mut bytes = [0; SECTOR];
                bytes[..8].copy_from_slice(&self.numbers.to_le_bytes());
                self.front.memory.write(at, &bytes);
                self.slots[queue][slot] = Some((sector, self.numbers));
                let data = [(at, SECTOR)];
                let op = Op::write(sector as u64, &data);
                self.front.queues[queue].submit(&op, slot as u64)?;
            }
            self.front.queues[queue].kick()?;
        }
        Ok(())
    }

    /// Takes what has been answered. Each answer is to a request that has none yet: the queue
    /// looks at that.
    fn reap(&mut self) -> Res<u64> {
        let mut count = 0;
        for (queue, slots) in self.front.queues.iter_mut().zip(&mut self.slots) {
            while let Some(done) = queue.pop()? {
                let (sector, number) = slots[done.token as usize].take().ok_or("an empty slot")?;
                if done.status != OK {
                    return Err(format!("sector {sector}: status {}", done.status).into());
                }
                self.sectors[sector] = number;
                count += 1;
            }
        }
        Ok(count)
    }

    /// Writes until so many requests have been answered.
    fn serve(&mut self, requests: u64) -> Res<()> {
        let mut left = requests;
        loop {
            self.fill()?;
            if left == 0 {
                return Ok(());
            }
            let mut queues: Vec<_> = self.front.queues.iter_mut().collect();
            common::frontend::wait_any(&mut queues)?;
            left = left.saturating_sub(self.reap()?);
        }
    }

    fn die(&mut self) -> Res<()> {
        // Neither the test nor the daemon can tell what is in flight then.
        let moment = Instant::now() + Duration::from_micros(self.rng.below(300));
        while Instant::now() < moment {
            std::hint::spin_loop();
        }
        self.daemon.kill()
    }

    fn go_on(&mut self) -> Res<()> {
        self.daemon = self.setup.start(&self.program, self.dir.path(), None)?;
        self.daemon.reconnect(&mut self.front, &self.setup.socket)
    }

    /// Waits for all that is in flight, and compares the disk with what was answered.
    fn settle(&mut self) -> Res<()> {
        while self.front.queues.iter().any(|queue| queue.in_flight() > 0) {
            let mut busy: Vec<_> = self.front.queues.iter_mut().collect();
            busy.retain(|queue| queue.in_flight() > 0);
            common::frontend::wait_any(&mut busy)?;
            self.reap()?;
        }
        let file = fs::File::open(&self.raw)?;
        for (sector, number) in self.sectors.iter().enumerate() {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, (sector * SECTOR) as u64)?;
            let found = u64::from_le_bytes(bytes);
            if found != *number {
                return Err(format!("sector {sector} holds {found} instead of {number}").into());
            }
        }
        Ok(())
    }
}

fn kills(queues: usize, track: bool) -> Res<()> {
    let seed = seed_from_environment();
    println!("STRATABLK_SEED={seed}");
    let kills = std::env::var("STRATABLK_KILLS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(KILLS);
    let mut run = Run::new(queues, track, seed)?;
    for kill in 0..kills {
        let step = |run: &mut Run| {
            // The first comes before anything was answered, some during recovery.
            let requests = if kill % 3 == 0 { 0 } else { run.rng.below(600) };
            run.serve(requests)?;
            run.die()?;
            run.reap()?;
            run.go_on()?;
            if kill % 2 == 1 {
                run.settle()?;
            }
            Ok(())
        };
        step(&mut run).map_err(|error: Box<dyn std::error::Error + Send + Sync>| {
            let log = run.daemon.log();
            format!("STRATABLK_SEED={seed}, kill {kill}: {error}; the daemon says: {log}")
        })?;
    }
    run.serve(100)?;
    run.settle()?;
    run.daemon.stop()
}

#[test]
fn each_request_is_answered_once_whenever_the_daemon_is_killed() -> Res<()> {
    kills(1, true)
}

#[test]
fn so_it_is_with_two_queues() -> Res<()> {
    kills(2, true)
}

/// The front-end goes on at the used index, and knows no more than that.
#[test]
fn without_a_region_the_used_index_says_what_was_answered() -> Res<()> {
    kills(1, false)?;
    kills(2, false)
}

/// In the padding of the first descriptor's record of each of two queues.
fn crash_bytes(run: &mut Run) -> Res<[u8; 2]> {
    let (_, file) = run.front.tracked()?.inflight().ok_or("no region")?;
    let mut found = [9; 2];
    // A queue's region, of 128 descriptors, has whole pairs of cache lines.
    for (byte, at) in found.iter_mut().zip([0, 2176]) {
        file.read_exact_at(std::slice::from_mut(byte), at + 16 + 2)?;
    }
    Ok(found)
}

/// Sends a signal to the thread of queue 0, as a fault or an abort does.
fn crash_of_queue_0(run: &mut Run, signal: i32) -> Res<()> {
    let pid = run.daemon.pid();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = entry?;
        let name = fs::read_to_string(task.path().join("comm"))?;
        let thread: libc::c_long = task.file_name().to_string_lossy().parse()?;
        if name.trim_end().ends_with("-q0") {
            // SAFETY: no memory is passed.
            unsafe { libc::syscall(libc::SYS_tgkill, pid, thread, signal) };
            run.daemon.wait_for_end()?;
            return Ok(());
        }
    }
    Err("no thread has the name of a queue's".into())
}

/// Other guests' requests are none of its doing.
#[test]
fn a_crash_of_a_queues_thread_is_noted_with_this_queue_alone() -> Res<()> {
    for signal in [libc::SIGABRT, libc::SIGBUS] {
        let mut run = Run::new(2, true, 1)?;
        run.serve(1)?;
        crash_of_queue_0(&mut run, signal)?;
        assert_eq!(crash_bytes(&mut run)?, [1, 0], "signal {signal}");
        run.reap()?;
        run.go_on()?;
        run.settle()?;
        run.daemon.end_by(signal)?;
        assert_eq!(crash_bytes(&mut run)?, [1, 1], "from outside");
        run.go_on()?;
        run.daemon.stop()?;
    }
    Ok(())
}

#[test]
fn a_crash_is_noted_and_a_kill_is_not() -> Res<()> {
    for (signal, noted) in [
        (libc::SIGKILL, 0),
        (libc::SIGSEGV, 1),
        (libc::SIGBUS, 1),
        (libc::SIGABRT, 1),
    ] {
        let mut run = Run::new(1, true, 1)?;
        run.serve(1)?;
        run.daemon.end_by(signal)?;
        let (_, file) = run.front.tracked()?.inflight().ok_or("no region")?;
        let mut byte = [9];
        // In the padding of the first descriptor's record.
        file.read_exact_at(&mut byte, 16 + 2)?;
        assert_eq!(byte, [noted], "after signal {signal}");
        run.reap()?;
        run.go_on()?;
        run.settle()?;
        run.daemon.stop()?;
    }
    Ok(())
}
