//! A Linux guest under QEMU, booted by `contrib/guest.py`: the guest reports what it finds, and
//! stops where its job says so until it is told to go on.

use crate::Options;
use crate::common::{Res, images};
use crate::machine::succeed;
use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, PipeReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long a guest may take to boot, under emulation and on a busy machine.
pub const BOOT: Duration = Duration::from_secs(40);

/// A guest boots under KVM within this time, or not at all: some machines have the device, and
/// stock kernels hang on it.
const KVM: Duration = Duration::from_secs(10);

/// No guest runs longer, even if the bench forgets it.
const LONGEST: &str = "600";

/// Else a guest under emulation takes the time from the HPET, and each of `fio`'s looks at the clock
/// is a way through QEMU.
const KERNEL: &str = "tsc=reliable";

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/guest.py");

/// What all guests of a bench have in common.
pub struct Testbed {
    /// In memory: what is made for each boot must not be written back to the disk during a run.
    dir: tempfile::TempDir,
    accelerator: String,
    description: String,
}

impl Testbed {
    /// Makes sure that guests can be booted, and finds out how.
    pub fn prepare(options: &Options) -> Res<Self> {
        let built = succeed(Command::new("python3").args([SCRIPT, "build"]))?;
        let version = succeed(Command::new("qemu-system-x86_64").arg("--version"))
            .map_err(|error| format!("{error}; run contrib/setup"))?;
        let mut folder = tempfile::Builder::new();
        folder.prefix("stratablk-bench-");
        let dir = match options.dir_tmpfs.to_str() {
            Some("none") => folder.tempdir()?,
            _ => folder.tempdir_in(&options.dir_tmpfs)?,
        };
        let mut testbed = Testbed {
            dir,
            accelerator: "kvm".to_owned(),
            description: String::new(),
        };
        match std::env::var("STRATABLK_ACCEL") {
            Ok(wanted) => testbed.accelerator = wanted,
            Err(_) if testbed.boots() => {}
            Err(_) => testbed.accelerator = "tcg".to_owned(),
        }
        let first = |text: &str| text.lines().next().unwrap_or_default().to_owned();
        let kernel = first(&built);
        testbed.description = format!(
            "guest: {}, {}, on {}",
            kernel.rsplit('/').next().unwrap_or_default(),
            testbed.accelerator,
            first(&version)
        );
        Ok(testbed)
    }

    /// The guest's kernel, QEMU's version, and what executes the guest's instructions.
    pub fn describe(&self) -> String {
        self.description.clone()
    }

    fn boots(&self) -> bool {
        let up = |mut guest: Guest| guest.wait_for("up", KVM).map(drop);
        self.boot(None, "report up").and_then(up).is_ok()
    }

    /// Boots a guest with the disk that a back-end serves on `socket`, for a job script in the
    /// words of `contrib/guest.py`. It runs on the CPU of the calling thread.
    pub fn boot(&self, socket: Option<&Path>, job: &str) -> Res<Guest> {
        let script = self.dir.path().join("job.sh");
        fs::write(&script, job)?;
        let mut command = Command::new("python3");
        command.args([SCRIPT, "run", "--driven", "--timeout", LONGEST]);
        command.args(["--append", KERNEL]);
        command.args(["--job", images::text(&script)?]);
        if let Some(socket) = socket {
            command.args(["--disk", images::text(socket)?]);
        }
        let (reader, writer) = std::io::pipe()?;
        let mut child = command
            .env("STRATABLK_ACCEL", &self.accelerator)
            .env("TMPDIR", self.dir.path())
            .stdin(Stdio::piped())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            // Its own group, so that it can be killed with its QEMU.
            .process_group(0)
            .spawn()
            .map_err(|error| format!("python3: {error}"))?;
        // The command holds the pipe's other end, and would keep it open.
        drop(command);
        let input = child.stdin.take();
        let mut guest = Guest {
            child,
            input,
            lines: lines_of(reader),
            console: VecDeque::new(),
            qemu: 0,
        };
        guest.qemu = guest.wait_for("qemu", BOOT)?.parse()?;
        Ok(guest)
    }
}

/// Lines as they come, so that they can be waited for with a deadline.
fn lines_of(reader: PipeReader) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            let line = line.replace(|c: char| c.is_control(), "");
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// A running guest. Dropping it kills it.
pub struct Guest {
    child: Child,
    input: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
    /// The last lines that were no reports.
    console: VecDeque<String>,
    qemu: u32,
}

impl Guest {
    /// Waits until the guest reports `name`, and returns what it says about it.
    pub fn wait_for(&mut self, name: &str, patience: Duration) -> Res<String> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match self.lines.recv_timeout(left) {
                _ if left.is_zero() => return Err(self.error(&format!("{patience:?} passed"))),
                Ok(line) => line,
                Err(mpsc::RecvTimeoutError::Timeout) => continue,
                Err(_) => return Err(self.error("the guest ended")),
            };
            // A kernel message may stand before the mark in the same line.
            let Some((_, report)) = line.split_once("@@ ") else {
                self.console.push_back(line);
                if self.console.len() > 8 {
                    self.console.pop_front();
                }
                continue;
            };
            let (found, value) = report.split_once(' ').unwrap_or((report, ""));
            match found {
                _ if found == name => return Ok(value.to_owned()),
                "failed" => return Err(value.into()),
                "done" => return Err(self.error("its job ended")),
                _ => {}
            }
        }
    }

    fn error(&self, why: &str) -> Box<dyn std::error::Error + Send + Sync> {
        let console: Vec<&str> = self.console.iter().map(String::as_str).collect();
        format!("{why}; the console ends with: {}", console.join(" | ")).into()
    }

    /// QEMU's process id.
    pub fn qemu(&self) -> u32 {
        self.qemu
    }

    /// Ends the guest's `hold`.
    pub fn go(&mut self) -> Res<()> {
        let input = self.input.as_mut().ok_or("no input")?;
        Ok(input.write_all(b"go\n")?)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The end of its input is what tells guest.py to end, and to remove its files.
        self.input = None;
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            // A poll of a condition with a deadline: nothing depends on how long this takes.
            std::thread::sleep(Duration::from_millis(5));
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            // SAFETY: a system call without memory. The child leads its group and has not been
            // waited for, so that the group's id is its own.
            unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
            let _ = self.child.wait();
        }
    }
}
