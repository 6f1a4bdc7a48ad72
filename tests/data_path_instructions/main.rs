//! What a request costs in the steady state, counted and not timed: instructions of the queue's
//! thread. The companion of `data_path_costs.rs`, which counts allocations and system calls.
//!
//! Writes that allocate are counted too, without a journal and with one: what the journal costs is the
//! difference.
//!
//! What would be caught: a data path that still enters the kernel as often as before and does not
//! allocate, but has become slower: another hash of each request, a buffer that is cleared, a walk
//! over all layers where one look was enough, a function that is no longer inlined.
//!
//! How it is counted. The daemon runs under callgrind, with a front-end outside of it, on images on
//! tmpfs, where storage answers in line. The front-end fills the ring while the queue's thread
//! sleeps, kicks once, and waits until all is done and the thread sleeps again: what is done
//! together never depends on who was faster. There are two runs, with few and with many such rounds:
//! their difference, divided by the requests they differ by, has no start-up in it. Repeated runs
//! differ by three instructions per request, and by ten on a machine that is busy with other things.
//!
//! It is the daemon of the release build that runs, since instructions of a test's build say
//! little. `contrib/test` has built it anyway; built for this alone, the library would be compiled
//! once more, with the features that tests need, for longer than all the counting takes.
//!
//! Valgrind and a C compiler are needed (`contrib/setup` installs both), so this test is left out
//! unless asked for: `contrib/test costs`. `STRATABLK_DAEMON=path` counts another build.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::Res;
use common::daemon::{Daemon, Program, Setup};
use common::frontend::{Frontend, OK, Op, PATIENCE, Queue, poll};
use common::images;

/// Bytes of the disks.
const SIZE: u64 = 8 << 20;
/// Bytes of a request.
const BLOCK: usize = 4096;
/// Bytes of a cluster.
const CLUSTER: u64 = 64 << 10;
/// Requests in flight.
const DEPTH: usize = 32;
/// Rounds of both runs: all that is done once has been done after them.
const FEW: usize = 16;
/// Rounds of the longer run: 2048 requests more.
const MANY: usize = FEW + 64;
/// What a request may cost, in percent of what it did when the table was written. Another compiler
/// or C library can make as much; the counting itself makes less than one.
const ALLOWED: u64 = 103;

/// What a request cost when this was written (Rust 1.95). Who makes it cheaper writes the new figure
/// here, so that it stays so; who makes it dearer says in the commit what for.
const TABLE: [Case; 10] = [
    case(Disk::Raw, Kind::Read, 1298),
    case(Disk::Raw, Kind::Write, 1302),
    tracked(Disk::Raw, Kind::Read, 1298),
    tracked(Disk::Raw, Kind::Write, 1302),
    case(Disk::Qcow2, Kind::Read, 1586),
    case(Disk::Qcow2, Kind::Write, 1594),
    case(Disk::Overlay, Kind::Read, 1691),
    case(Disk::Chain, Kind::Read, 3147),
    case(Disk::Empty, Kind::Allocate, 13161),
    case(Disk::Journaled, Kind::Allocate, 13350),
];

/// What a journal may cost a write that allocates, in instructions.
const JOURNAL: u64 = 300;
/// How often a figure that is too large is measured again: the least of all counts.
const AGAIN: usize = 2;

#[derive(Clone, Copy, Debug)]
enum Disk {
    /// A raw file, all of it written.
    Raw,
    /// A qcow2 image, all clusters allocated.
    Qcow2,
    /// An empty overlay over such an image.
    Overlay,
    /// Fifteen empty overlays, one over the other, over such an image.
    Chain,
    /// A qcow2 image in which nothing is allocated.
    Empty,
    /// The same, with a journal.
    Journaled,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Read,
    Write,
    /// Writes to clusters that have not been written before, one in each.
    Allocate,
}

struct Case {
    disk: Disk,
    kind: Kind,
    /// With an inflight region.
    tracked: bool,
    /// Instructions of a request.
    measured: u64,
}

const fn case(disk: Disk, kind: Kind, measured: u64) -> Case {
    Case {
        disk,
        kind,
        tracked: false,
        measured,
    }
}

/// What is measured of writes that allocate on `disk`, whatever it was.
const fn case_of(disk: Disk) -> Case {
    case(disk, Kind::Allocate, 0)
}

const fn tracked(disk: Disk, kind: Kind, measured: u64) -> Case {
    Case {
        tracked: true,
        ..case(disk, kind, measured)
    }
}

#[test]
#[ignore = "needs valgrind and the release build: contrib/test costs"]
fn a_request_takes_no_more_instructions_than_it_did() -> Res<()> {
    let daemon = daemon()?;
    // Kept on failure, for a look at what was counted.
    let profiles = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("instructions");
    let _ = fs::remove_dir_all(&profiles);
    fs::create_dir_all(&profiles)?;
    let shim = shim(&profiles)?;
    let mut failures = Vec::new();
    let measure = |case: &Case| -> Res<(String, u64, PathBuf)> {
        let region = if case.tracked { "-inflight" } else { "" };
        let name = format!("{:?}-{:?}{region}", case.disk, case.kind).to_lowercase();
        let mut totals = [0; 2];
        let mut profile = PathBuf::new();
        for (total, rounds) in totals.iter_mut().zip([FEW, MANY]) {
            let dir = profiles.join(format!("{name}-{rounds}"));
            let _ = fs::remove_dir_all(&dir);
            (*total, profile) = count(&daemon, &shim, &dir, case, rounds)
                .map_err(|error| format!("{name}, {rounds} rounds: {error}"))?;
        }
        let requests = ((MANY - FEW) * DEPTH) as u64;
        let more = totals[1].checked_sub(totals[0]);
        let more = more.ok_or_else(|| format!("{name}: fewer instructions for more requests"))?;
        let found = more.div_ceil(requests);
        Ok((name, found, profile))
    };
    let mut without_journal = 0;
    for case in TABLE {
        let Case { disk, measured, .. } = case;
        let allowed = measured * ALLOWED / 100;
        let (name, mut found, mut profile) = measure(&case)?;
        // What else runs on the machine decides how many requests a turn finds.
        for _ in 0..AGAIN {
            if found <= allowed {
                break;
            }
            println!("{name:18} {found:6} instructions per request; once more");
            let (_, again, at) = measure(&case)?;
            if again < found {
                (found, profile) = (again, at);
            }
        }
        println!(
            "{name:18} {found:6} instructions per request; table {measured}, allowed {allowed}"
        );
        match disk {
            Disk::Empty => without_journal = found,
            Disk::Journaled => {
                // How many writes share a flush of metadata depends on other load on the machine, by
                // some 200 instructions a write in either run: the least of each is compared.
                let mut with_journal = found;
                for _ in 0..AGAIN {
                    if with_journal <= without_journal + JOURNAL {
                        break;
                    }
                    let without = measure(&case_of(Disk::Empty))?.1;
                    let again = measure(&case)?.1;
                    println!("{name:18} {again:6} once more, and {without} without a journal");
                    without_journal = without_journal.min(without);
                    with_journal = with_journal.min(again);
                }
                let cost = with_journal.saturating_sub(without_journal);
                if cost > JOURNAL {
                    failures.push(format!(
                        "a journal costs {cost} instructions per write (expected at most \
                         {JOURNAL}): {}",
                        profile.display()
                    ));
                }
            }
            _ => {}
        }
        if found > allowed {
            failures.push(format!(
                "{name}: {found} instructions per request; {measured} when the table was written, \
                 {allowed} allowed. Where they go:\n    callgrind_annotate --inclusive=yes {}",
                profile.display()
            ));
        }
    }
    assert!(
        failures.is_empty(),
        "{}\nThe same at the commit before shows what is new. If it is worth its cost, the new \
         figures go into the table in {}.",
        failures.join("\n"),
        file!()
    );
    let _ = fs::remove_dir_all(&profiles);
    Ok(())
}

/// The daemon of the release build, as it is now.
fn daemon() -> Res<PathBuf> {
    let found = Command::new("valgrind").arg("--version").output();
    if !found.is_ok_and(|output| output.status.success()) {
        return Err("valgrind is missing or does not run; contrib/setup installs it".into());
    }
    if let Some(path) = std::env::var_os("STRATABLK_DAEMON") {
        return Ok(fs::canonicalize(path)?);
    }
    let output = Command::new(env!("CARGO"))
        .args(["build", "--release", "--bins", "--message-format=json"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(std::process::Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err("the release build failed".into());
    }
    // Cargo alone knows where it put it.
    String::from_utf8(output.stdout)?
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "stratablk")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .ok_or_else(|| "cargo names no executable".into())
}

/// Builds what makes the ring's wait known to valgrind.
fn shim(dir: &Path) -> Res<PathBuf> {
    let path = dir.join("ring_wait.so");
    let source =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data_path_instructions/ring_wait.c");
    let status = Command::new("cc")
        .args(["-O2", "-shared", "-fPIC", "-o"])
        .args([&path, &source])
        .arg("-ldl")
        .status();
    match status {
        Ok(status) if status.success() => Ok(path),
        other => Err(format!(
            "cc {}: {other:?}; contrib/setup installs it",
            source.display()
        )
        .into()),
    }
}

/// Serves as many rounds: the instructions of the queue's thread, and the file that says more.
fn count(
    daemon: &Path,
    shim: &Path,
    dir: &Path,
    case: &Case,
    rounds: usize,
) -> Res<(u64, PathBuf)> {
    fs::create_dir(dir)?;
    let memory = tempfile::tempdir_in("/dev/shm")?;
    let setup = Setup {
        qmp: None,
        iothread: true,
        // It would look at the ring for as long as a clock says.
        poll_max_ns: Some(0),
        ..Setup::new(memory.path(), &layers(memory.path(), case.disk)?)
    };
    let mut args = vec![
        format!("LD_PRELOAD={}", shim.display()),
        "valgrind".into(),
        "--tool=callgrind".into(),
        "--separate-threads=yes".into(),
        format!("--callgrind-out-file={}/callgrind.out", dir.display()),
        daemon.display().to_string(),
    ];
    args.extend(setup.args());
    if matches!(case.disk, Disk::Journaled) {
        args.push(format!("--journal={}", memory.path().display()));
    }
    // What `env` executes has its process id, and so has what valgrind does.
    let program = Program { path: "env".into() };
    let mut daemon = Daemon::start(&program, &args, dir, None)?;
    let memory = DEPTH * BLOCK;
    let mut front = if case.tracked {
        daemon.connect_tracked(&setup.socket, 1, 128, memory, true)?
    } else {
        daemon.connect(&setup.socket, 1, 128, memory)?
    };
    let served = serve(&mut front, daemon.pid(), case.kind, rounds);
    served.map_err(|error| format!("{error}; the daemon says: {}", daemon.log()))?;
    drop(front);
    daemon.stop()?;
    total_of_the_queue(dir)
}

/// The layers of a disk, made anew: the guest's first.
fn layers(dir: &Path, disk: Disk) -> Res<Vec<(PathBuf, &'static str)>> {
    if matches!(disk, Disk::Empty | Disk::Journaled) {
        let path = dir.join("disk.qcow2");
        images::create(&path, (MANY * DEPTH) as u64 * CLUSTER, "compat=1.1", None)?;
        return Ok(vec![(path, "qcow2")]);
    }
    let raw = dir.join("disk.raw");
    fs::write(&raw, vec![7; SIZE as usize])?;
    let above = match disk {
        Disk::Raw => return Ok(vec![(raw, "raw")]),
        Disk::Qcow2 => 0,
        Disk::Overlay => 1,
        _ => 15,
    };
    let base = dir.join("disk.qcow2");
    let names = [images::text(&raw)?, images::text(&base)?];
    images::qemu_img(&["convert", "-f", "raw", "-O", "qcow2", names[0], names[1]])?;
    let mut layers = vec![(base, "qcow2")];
    for number in 0..above {
        let path = dir.join(format!("overlay{number}.qcow2"));
        images::create(&path, SIZE, "compat=1.1", Some((&layers[0].0, "qcow2")))?;
        layers.insert(0, (path, "qcow2"));
    }
    Ok(layers)
}

/// Rounds of requests, each served as a whole by a thread that was asleep.
fn serve(front: &mut Frontend, pid: u32, kind: Kind, rounds: usize) -> Res<()> {
    let thread = queue_thread(pid)?;
    let queue = front.queues.first_mut().ok_or("no queue")?;
    for round in 0..rounds {
        asleep(&thread)?;
        // One signal, for the first that is done: it must not depend on when we look.
        queue.disarm()?;
        queue.arm();
        for slot in 0..DEPTH {
            let block = (round * 37 + slot * 101) % (SIZE as usize / BLOCK);
            let sector = match kind {
                Kind::Read | Kind::Write => (block * BLOCK) as u64,
                Kind::Allocate => (round * DEPTH + slot) as u64 * CLUSTER,
            } / 512;
            let data = [(slot * BLOCK, BLOCK)];
            let op = match kind {
                Kind::Read => Op::read(sector, &data),
                Kind::Write | Kind::Allocate => Op::write(sector, &data),
            };
            queue.submit(&op, slot as u64)?;
        }
        queue.kick()?;
        if !poll(&[queue.call_fd()], PATIENCE)? {
            return Err("nothing was completed for a minute".into());
        }
        queue.disarm()?;
        drain(queue)?;
    }
    asleep(&thread)
}

fn drain(queue: &mut Queue) -> Res<()> {
    while queue.in_flight() > 0 {
        queue.spin()?;
        while let Some(done) = queue.pop()? {
            if done.status != OK {
                return Err(format!("a request failed with {}", done.status).into());
            }
        }
    }
    Ok(())
}

/// The queue's thread, as a folder of /proc.
fn queue_thread(pid: u32) -> Res<PathBuf> {
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        if fs::read_to_string(path.join("comm"))?
            .trim_end()
            .ends_with("-q0")
        {
            return Ok(path);
        }
    }
    Err("no thread has the name of a queue's".into())
}

/// Waits until the thread waits for its ring, which is a poll here (`ring_wait.c`).
fn asleep(thread: &Path) -> Res<()> {
    let waiting = format!("{} ", libc::SYS_poll);
    let start = Instant::now();
    while !fs::read_to_string(thread.join("syscall"))?.starts_with(&waiting) {
        if start.elapsed() > PATIENCE {
            return Err("the queue's thread did not sleep for a minute".into());
        }
        // A poll of a condition with a deadline: nothing depends on how long this takes.
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// The count of the thread that served the queue. Callgrind writes a file for each thread.
fn total_of_the_queue(dir: &Path) -> Res<(u64, PathBuf)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        // Nobody else has a use for what carries requests out.
        if !text.contains("export::queue::life::Queue") {
            continue;
        }
        let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
        found.push((
            total.ok_or("a profile without a total")?.trim().parse()?,
            path,
        ));
    }
    match found.len() {
        1 => Ok(found.remove(0)),
        count => Err(format!("{count} threads in {} served a queue", dir.display()).into()),
    }
}
