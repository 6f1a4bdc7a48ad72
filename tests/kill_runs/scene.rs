//! One process after another on the same images, each killed.

use crate::common::daemon::{Daemon, Program};
use crate::common::qmp::Qmp;
use crate::common::rng::Rng;
use crate::common::{Res, images};
use crate::disk::{Abilities, Disk, State};
use crate::tally::Tally;
use crate::variants::Variant;
use serde_json::json;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a back-end may take until it serves a front-end. It includes the wait for the dead
/// one's I/O, and a machine that is busy with other things.
const START: Duration = Duration::from_secs(30);
/// How often a start may fail one after the other before the run is given up.
const STARTS: usize = 300;

/// When a process is killed.
#[derive(Clone, Copy, Debug)]
enum Death {
    /// So long after its start: while it recovers, or before.
    AfterStart(Duration),
    /// So long after the last front-end has connected: with requests of before in flight.
    AfterConnection(Duration),
    /// After all of before was answered and every byte was looked at, so long into new requests.
    UnderLoad(Duration),
    /// Not at all: it ends in order.
    Never,
}

/// Kills a process at a moment that was chosen before.
struct Killer {
    pid: u32,
    thread: Option<JoinHandle<Instant>>,
}

impl Killer {
    fn arm(&mut self, after: Duration) {
        let pid = self.pid;
        self.thread = Some(std::thread::spawn(move || {
            // The moment itself, not a wait for something.
            std::thread::sleep(after);
            let now = Instant::now();
            // SAFETY: the process is a child that is not waited for before this thread is joined,
            // so that its id is its own, even if it has ended.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
            now
        }));
    }

    /// When it was killed. Waits for that.
    fn wait(self) -> Res<Option<Instant>> {
        match self.thread {
            None => Ok(None),
            Some(thread) => Ok(Some(
                thread.join().map_err(|_| "the killer's thread failed")?,
            )),
        }
    }
}

/// A process, its images and its guests.
pub struct Scene {
    dir: TempDir,
    /// On a tmpfs: what outlives the process, if it can be told to keep something.
    _memory: Option<TempDir>,
    program: Program,
    args: Vec<String>,
    qmp: PathBuf,
    variant: Variant,
    disks: Vec<Disk>,
    kills: u64,
    /// A stream was running when the last process died.
    streaming: bool,
    /// Whether jobs are expected to go on by themselves.
    keeps_jobs: bool,
    log_seen: usize,
}

impl Scene {
    /// Makes the images of `variant` and the command line that each process gets.
    pub fn new(program: &Program, variant: Variant, rng: &mut Rng) -> Res<Self> {
        let dir = tempfile::tempdir()?;
        let direct = rng.one_in(2);
        let abilities = Abilities::of(program);
        let mut disks = Vec::new();
        let mut args = Vec::new();
        for number in 0..variant.exports {
            let disk = Disk::new(dir.path(), number, variant, abilities, rng)?;
            args.extend(disk.args(variant, direct));
            disks.push(disk);
        }
        let qmp = dir.path().join("qmp.sock");
        args.push("--chardev".to_owned());
        args.push(format!(
            "socket,id=control,path={},server=on,wait=off",
            qmp.display()
        ));
        args.extend(["--monitor".to_owned(), "chardev=control".to_owned()]);
        let mut memory = None;
        let help = images::run(images::text(&program.path)?, &["--help"])?;
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        if help.contains("--journal") {
            let folder = tempfile::tempdir_in("/dev/shm")?;
            args.extend([
                "--journal".to_owned(),
                images::text(folder.path())?.to_owned(),
            ]);
            memory = Some(folder);
        }
        let keeps_jobs = help.contains("--state");
        if keeps_jobs {
            let state = dir.path().join("state");
            std::fs::create_dir(&state)?;
            args.extend(["--state".to_owned(), images::text(&state)?.to_owned()]);
        }
        println!(
            "{}: {}",
            variant.name,
            if direct { "O_DIRECT" } else { "buffered" }
        );
        Ok(Scene {
            dir,
            _memory: memory,
            program: program.clone(),
            args,
            qmp,
            variant,
            disks,
            kills: 0,
            streaming: false,
            keeps_jobs,
            log_seen: 0,
        })
    }

    /// Kills so many processes, one after the other, and looks at the images at the end.
    pub fn run(&mut self, kills: u64, tally: &mut Tally, rng: &mut Rng) -> Res<()> {
        let mut burst = 0;
        let mut failed = 0;
        while self.kills < kills {
            let death = if self.kills == 0 && self.variant.killed_at_once {
                Death::AfterConnection(Duration::from_micros(rng.below(300)))
            } else if burst > 0 {
                burst -= 1;
                Death::AfterStart(Duration::from_micros(rng.below(60_000)))
            } else {
                if rng.one_in(self.variant.bursts) {
                    burst = rng.between(1, 3);
                }
                let long = if rng.one_in(5) { 60_000 } else { 12_000 };
                let moment = Duration::from_micros(rng.below(long));
                if rng.one_in(4) {
                    Death::AfterConnection(moment)
                } else {
                    Death::UnderLoad(moment)
                }
            };
            if self.life(death, tally, rng)? {
                failed = 0;
                continue;
            }
            failed += 1;
            if failed > STARTS {
                return Err(format!("does not start any more: {}", self.log()).into());
            }
            // As a supervisor does that starts it again.
            std::thread::sleep(Duration::from_millis(10));
        }
        self.end(tally, rng)
    }

    /// One process. False if it ended by itself.
    fn life(&mut self, death: Death, tally: &mut Tally, rng: &mut Rng) -> Res<bool> {
        for disk in &mut self.disks {
            // The guest goes on while nobody serves it, or is rebooted meanwhile.
            let reboots = self.variant.reboots;
            if reboots > 0 && rng.one_in(2 * reboots) {
                disk.reboot(rng)?;
                tally.reboots += 1;
            }
            if rng.one_in(2) {
                disk.fill(rng)?;
            }
            disk.answers = 0;
        }
        self.note_log();
        let mut daemon = Daemon::start(&self.program, &self.args, self.dir.path(), None)?;
        let mut killer = Killer {
            pid: daemon.pid(),
            thread: None,
        };
        if let Death::AfterStart(moment) = death {
            killer.arm(moment);
        }
        let served = self.serve(&mut daemon, death, &mut killer, tally, rng);
        let killed = match served {
            Ok(()) => killer.wait()?,
            Err(error) => {
                daemon.kill()?;
                return Err(format!("{error}; it says: {}", self.log()).into());
            }
        };
        let Some(killed) = killed else {
            if matches!(death, Death::Never) && daemon.alive()? {
                daemon.stop()?;
                return Ok(true);
            }
            return self.ended_by_itself(daemon, tally);
        };
        let status = daemon.wait_for_end()?;
        if status.signal() != Some(libc::SIGKILL) {
            return self.ended_by_itself(daemon, tally);
        }
        self.kills += 1;
        tally.kills += 1;
        tally.barren_kills += u64::from(self.disks.iter().all(|disk| disk.answers == 0));
        for disk in &mut self.disks {
            disk.guest.disconnect();
            tally.in_flight += disk.guest.in_flight() as u64;
            if !rng.one_in(4) {
                // What had reached the ring is seen; otherwise when somebody signals.
                disk.guest.look();
                disk.take_answers(tally);
            }
            disk.note_kill();
            disk.died = Some(killed);
            disk.connected = None;
        }
        Ok(true)
    }

    fn ended_by_itself(&mut self, mut daemon: Daemon, tally: &mut Tally) -> Res<bool> {
        daemon.kill()?;
        for disk in &mut self.disks {
            disk.guest.disconnect();
        }
        tally.failed_starts += 1;
        tally.tell(|| format!("it ended by itself: {}", self.log()));
        Ok(false)
    }

    /// Serves the guests until the process is gone, or, without a kill, until all is answered and
    /// looked at.
    fn serve(
        &mut self,
        daemon: &mut Daemon,
        death: Death,
        killer: &mut Killer,
        tally: &mut Tally,
        rng: &mut Rng,
    ) -> Res<()> {
        for disk in &mut self.disks {
            if !connect(disk, daemon, tally)? {
                return Ok(());
            }
        }
        match death {
            Death::AfterStart(_) => {}
            Death::AfterConnection(moment) => killer.arm(moment),
            Death::UnderLoad(_) | Death::Never => {
                if self.variant.stream {
                    self.stream(daemon, tally, rng)?;
                }
                if rng.one_in(2) && !self.load(Some(Duration::from_millis(3)), tally, rng)? {
                    return Ok(());
                }
                let reboots = self.variant.reboots;
                for disk in &mut self.disks {
                    if reboots > 0 && rng.one_in(reboots) {
                        disk.reboot_properly(tally, rng)?;
                        tally.reboots += 1;
                    }
                    if disk.drain(tally, rng)? == State::Gone
                        || disk.verify(tally, rng)? == State::Gone
                    {
                        return Ok(());
                    }
                }
                let Death::UnderLoad(moment) = death else {
                    return Ok(());
                };
                killer.arm(moment);
            }
        }
        self.load(None, tally, rng)?;
        Ok(())
    }

    /// Keeps the rings full, for so long or until the process is gone. False if it is.
    fn load(&mut self, time: Option<Duration>, tally: &mut Tally, rng: &mut Rng) -> Res<bool> {
        let begun = Instant::now();
        let patience = match self.disks.len() {
            1 => Duration::from_millis(2),
            _ => Duration::ZERO,
        };
        loop {
            for disk in &mut self.disks {
                disk.fill(rng)?;
                if disk.turn(patience, tally)?.0 == State::Gone {
                    return Ok(false);
                }
            }
            match time {
                Some(time) if begun.elapsed() > time => return Ok(true),
                None if begun.elapsed() > START => return Err("the kill did not come".into()),
                _ => {}
            }
        }
    }

    /// Looks after the stream: there must be one, unless it is done.
    fn stream(&mut self, daemon: &mut Daemon, tally: &mut Tally, rng: &mut Rng) -> Res<()> {
        let mut qmp: Qmp = daemon.qmp(&self.qmp)?;
        let jobs = qmp.execute("query-block-jobs", json!({}))??;
        if jobs.as_array().is_some_and(|jobs| !jobs.is_empty()) {
            self.streaming = true;
            return Ok(());
        }
        let top = self.disks.first().ok_or("no disk")?.top.clone();
        let words = ["info", "-U", "--output=json", images::text(&top)?];
        let info: serde_json::Value = serde_json::from_str(&images::qemu_img(&words)?)?;
        if info.get("backing-filename").is_none() {
            self.streaming = false;
            return Ok(());
        }
        if self.streaming && self.keeps_jobs {
            tally.lost_jobs += 1;
            tally.tell(|| "the stream is gone after a kill".to_owned());
        }
        let speed = if rng.one_in(4) {
            0
        } else {
            rng.between(1, 64) << 20
        };
        let arguments = json!({"device": "disk0", "job-id": "job", "speed": speed});
        qmp.execute("block-stream", arguments)??;
        self.streaming = true;
        Ok(())
    }

    /// The last process ends in order, and the images are judged.
    fn end(&mut self, tally: &mut Tally, rng: &mut Rng) -> Res<()> {
        let mut failed = 0;
        while !self.life(Death::Never, tally, rng)? {
            failed += 1;
            if failed > STARTS {
                return Err(format!("does not start any more: {}", self.log()).into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        for disk in &mut self.disks {
            disk.judge_image(tally, self.variant.name, self.kills)?;
        }
        Ok(())
    }

    fn log_text(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default()
    }

    fn note_log(&mut self) {
        self.log_seen = self.log_text().len();
    }

    /// What the process of now has said.
    fn log(&self) -> String {
        let text = self.log_text();
        text.get(self.log_seen..)
            .unwrap_or_default()
            .trim()
            .to_owned()
    }
}

/// Connects the front-end as soon as somebody listens; false if the process is gone.
fn connect(disk: &mut Disk, daemon: &mut Daemon, tally: &mut Tally) -> Res<bool> {
    let deadline = Instant::now() + START;
    loop {
        let Err(error) = disk.guest.connect(&disk.socket) else {
            disk.connected = Some(Instant::now());
            return Ok(true);
        };
        if !daemon.alive()? {
            return Ok(false);
        }
        if error.downcast_ref::<std::io::Error>().is_none() {
            tally.hang_ups += 1;
        }
        if Instant::now() > deadline {
            return Err(format!("no front-end is served: {error}").into());
        }
        // The front-end's own timer, and a poll of a condition with a deadline.
        std::thread::sleep(Duration::from_millis(1));
    }
}
