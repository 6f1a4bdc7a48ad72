//! A process that works on files and is killed at every single operation, before it, in the
//! middle of it and behind it, and at every system call.
//!
//! What would be caught: an image that is only sound because the process lives on, flushed data
//! that was in memory, a lost barrier between what the kernel was given and what it was not.
//!
//! The process is this test program, started again with [`VARIABLE`] set. It reports what its
//! guests do on its standard output, a line each; the line's number is the time.

use std::cell::Cell;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use stratablk::reactor::{Reactor, Token};
use stratablk::storage::OpenFlags;
use stratablk::storage::{
    Access, Answer, FileStorage, Limits, Op, Storage, Submission, at_once, later,
};

use crate::disk::{Below, Disk, Recipe};
use crate::history::{Change, History};
use crate::judge::Judge;
use crate::landing::Start;
use crate::machine::Traits;
use crate::states::{End, Kept, State};
use crate::workload::{Report, Work};
use crate::{number_from, seed};

/// Tells the process what to do: recipe, seed, number of the operation, place in it, folder.
const VARIABLE: &str = "STRATABLK_KILLED";
/// Every so many kills one is shown to `qemu-img check`.
const QEMU: usize = 8;

const RECIPES: [(Recipe, bool); 5] = [
    (
        Recipe {
            reserves: true,
            ..Recipe::new("cluster_size=4k", 512)
        },
        false,
    ),
    (
        Recipe {
            cache_bytes: 4096,
            below: Below::Raw,
            ..Recipe::new("cluster_size=512,compat=0.10", 512)
        },
        true,
    ),
    (
        Recipe {
            below: Below::Qcow2,
            filled: 100,
            snapshot: true,
            ..Recipe::new("cluster_size=16k,extended_l2=on", 512)
        },
        false,
    ),
    (
        Recipe {
            data_file: true,
            ..Recipe::new("cluster_size=4k", 512)
        },
        false,
    ),
    (
        Recipe {
            storage: Traits {
                device: Some(1 << 20),
                ..Traits::FILE
            },
            ..Recipe::new("cluster_size=4k", 512)
        },
        false,
    ),
];

/// Where in an operation the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Before,
    /// A part of a write has been made.
    Middle,
    /// The kernel has been given it.
    Behind,
    /// Nowhere: it is killed from outside, or runs to its end.
    Never,
}

const PLACES: [Place; 4] = [Place::Before, Place::Middle, Place::Behind, Place::Never];

/// A file whose user is killed at an operation.
#[derive(Debug)]
struct Deadly {
    file: FileStorage,
    /// Operations left, of all files.
    left: Arc<AtomicUsize>,
    place: Place,
    /// It stands for a device of so many bytes.
    device: Option<u64>,
}

fn die() {
    // SAFETY: no memory is passed.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    // The signal ends the process before this returns, or soon after.
    loop {
        std::thread::park();
    }
}

impl Deadly {
    fn counts(&self) -> bool {
        self.left.fetch_sub(1, Ordering::SeqCst) == 1
    }

    /// What a device cannot do.
    fn refusal(&self, op: Op<'_>) -> Option<i32> {
        let device = self.device?;
        match op {
            Op::Write { iovecs, offset } => {
                let len: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
                (offset + len as u64 > device).then_some(libc::ENOSPC)
            }
            Op::Zero { .. } | Op::Reserve { .. } => Some(libc::EOPNOTSUPP),
            Op::Read { .. } | Op::Sync => None,
        }
    }
}

impl Storage for Deadly {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        if let Some(errno) = self.refusal(op) {
            return Submission::Ready(Err(std::io::Error::from_raw_os_error(errno)));
        }
        let last = !matches!(op, Op::Read { .. }) && self.counts();
        if last && self.place == Place::Before {
            die();
        }
        if last
            && self.place == Place::Middle
            && let Op::Write { iovecs, offset } = op
        {
            // SAFETY: valid by contract.
            let bufs = unsafe { stratablk::storage::IoBufs::new(iovecs) };
            let mut bytes = vec![0; bufs.len()];
            bufs.copy_to(&mut bytes);
            let mut options = std::fs::OpenOptions::new();
            let file = options.write(true).open(self.file.path()).unwrap();
            let half = &bytes[..bytes.len() / 1024 * 512];
            std::os::unix::fs::FileExt::write_all_at(&file, half, offset).unwrap();
        }
        if last && self.place == Place::Middle {
            die();
        }
        // SAFETY: passed on to the caller.
        let submission = unsafe { self.file.submit(reactor, op, token) };
        if last && self.place == Place::Behind {
            reactor.submit();
            die();
        }
        submission
    }

    fn len(&self) -> Answer<'_, std::io::Result<u64>> {
        self.file.len()
    }

    fn capacity(&self) -> Answer<'_, std::io::Result<Option<u64>>> {
        at_once(Ok(self.device))
    }

    fn set_len(&self, len: u64) -> Answer<'_, std::io::Result<()>> {
        assert!(self.device.is_none(), "a device has its length");
        let last = self.counts();
        if last && self.place == Place::Before {
            die();
        }
        later(async move {
            let result = self.file.set_len(len).await;
            if last {
                die();
            }
            result
        })
    }

    fn outlives_process(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        Limits {
            zero_past_end: self.device.is_none(),
            ..self.file.limits()
        }
    }

    fn name(&self) -> &str {
        self.file.name()
    }

    fn writable(&self) -> bool {
        true
    }

    fn set_access(&self, access: Access) -> Answer<'_, std::io::Result<()>> {
        self.file.set_access(access)
    }
}

fn line(report: Report) -> String {
    match report {
        Report::Began { start, len, change } => {
            let change = match change {
                Change::Write(stamp) => format!("write {stamp}"),
                Change::Zero => "zero 0".into(),
                Change::Discard => "discard 0".into(),
            };
            format!("began {start} {len} {change}")
        }
        Report::Ended(number) => format!("ended {number}"),
        Report::Flushed(began) => format!("flushed {began}"),
        Report::Alone => "alone".into(),
    }
}

/// The report of a line; `None` for what else a test program says.
fn parse(line: &str) -> Option<Report> {
    let words: Vec<&str> = line.strip_prefix("report ")?.split(' ').collect();
    let number = |index: usize| words.get(index)?.parse::<usize>().ok();
    Some(match *words.first()? {
        "began" => Report::Began {
            start: number(1)?,
            len: number(2)?,
            change: match *words.get(3)? {
                "write" => Change::Write(number(4)? as u32),
                "zero" => Change::Zero,
                _ => Change::Discard,
            },
        },
        "ended" => Report::Ended(number(1)?),
        "flushed" => Report::Flushed(number(1)?),
        _ => Report::Alone,
    })
}

/// The process that is killed: does nothing in a run of the tests.
#[test]
fn victim() {
    let Ok(order) = std::env::var(VARIABLE) else {
        return;
    };
    // The line that the test program began ends here.
    println!();
    let words: Vec<&str> = order.splitn(5, ' ').collect();
    let number = |index: usize| words[index].parse::<usize>().unwrap();
    let (recipe, stream) = RECIPES[number(0)];
    let place = PLACES[number(3)];
    let left = Arc::new(AtomicUsize::new(number(2)));
    let reactor = Reactor::for_this_thread().unwrap();
    let disk = Disk::at(paths(Path::new(words[4]), recipe), recipe);
    let flags = OpenFlags {
        writable: true,
        ..OpenFlags::default()
    };
    let file = |index: usize| -> Arc<dyn Storage> {
        Arc::new(Deadly {
            file: FileStorage::open(&paths(Path::new(words[4]), recipe)[index], flags).unwrap(),
            left: left.clone(),
            place,
            device: recipe.storage.device.filter(|_| index == 0),
        })
    };
    let opened = reactor.block_on(disk.open_files(file, true)).unwrap();
    let lines = Rc::new(Cell::new(0));
    let clock = lines.clone();
    let chain = opened.chain.clone();
    let seed = words[1].parse().unwrap();
    let work = Work::new(
        chain,
        disk.first.clone(),
        seed,
        Box::new(move || clock.get()),
    );
    *work.observer.borrow_mut() = Some(Box::new(move |report| {
        lines.set(lines.get() + 1);
        let text = format!("report {}\n", line(report));
        std::io::stdout().write_all(text.as_bytes()).unwrap();
    }));
    if stream {
        work.spawn_stream(&reactor, 2);
    }
    for _ in 0..4 {
        work.spawn_guest(&reactor, 12);
    }
    while reactor.tasks() > 0 {
        if !reactor.turn() {
            reactor.wait(None);
        }
    }
    reactor.block_on(opened.image.close()).unwrap();
    println!("report ended {}", usize::MAX);
}

fn paths(folder: &Path, recipe: Recipe) -> Vec<PathBuf> {
    let below = match recipe.below {
        Below::Nothing => 0,
        Below::Raw => 1,
        Below::Qcow2 => 2,
    };
    let count = 1 + usize::from(recipe.data_file) + below;
    (0..count).map(|i| folder.join(i.to_string())).collect()
}

struct Executioner {
    number: usize,
    disk: Disk,
    dir: tempfile::TempDir,
    seed: u64,
    kills: usize,
}

impl Executioner {
    fn new(number: usize) -> Self {
        let seed = seed();
        let recipe = RECIPES[number].0;
        println!("STRATABLK_SEED={seed}: {recipe:?}");
        let dir = tempfile::tempdir().unwrap();
        Self {
            number,
            disk: Disk::make(dir.path(), recipe),
            dir,
            seed,
            kills: 0,
        }
    }

    /// Runs the process under `wrapper`, which kills it unless it does so itself, and judges what
    /// it leaves. False: it came to its end.
    fn kill(&mut self, operation: usize, place: Place, wrapper: &[String]) -> bool {
        let folder = self.dir.path().join(format!("{operation}{place:?}"));
        std::fs::create_dir(&folder).unwrap();
        let paths = paths(&folder, self.disk.recipe);
        for (path, bytes) in paths.iter().zip(&self.disk.files) {
            std::fs::write(path, bytes).unwrap();
        }
        let place_number = PLACES.iter().position(|p| *p == place).unwrap();
        let order = format!(
            "{} {} {operation} {place_number} {}",
            self.number,
            self.seed,
            folder.display()
        );
        let program = std::env::current_exe().unwrap();
        let program = program.to_str().unwrap().to_owned();
        let words: Vec<String> = wrapper.iter().cloned().chain([program]).collect();
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .args(["--exact", "kill::victim", "--nocapture", "--test-threads=1"])
            .env(VARIABLE, order)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut history = History::new(self.disk.first.clone());
        let (mut now, mut ended) = (0, false);
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            match parse(&line.unwrap_or_default()) {
                Some(Report::Ended(usize::MAX)) => ended = true,
                Some(report) => {
                    history.note(now, report);
                    now += 1;
                }
                None => {}
            }
        }
        let status = child.wait().unwrap();
        assert!(
            (ended && status.success()) || status.signal() == Some(libc::SIGKILL),
            "seed {}: operation {operation}, {place:?}: {status}",
            self.seed
        );
        self.kills += 1;
        let files = paths.iter().map(|p| std::fs::read(p).unwrap()).collect();
        std::fs::remove_dir_all(&folder).unwrap();
        let judge = Judge {
            seed: self.seed,
            disk: &self.disk,
            reactor: Reactor::for_this_thread().unwrap(),
            history,
            start: Start::of(&self.disk.files),
        };
        let state = State {
            end: End::Kill,
            ..State::after_cut(now, Kept::All, files)
        };
        let qemu = self.kills.is_multiple_of(QEMU);
        judge.judge(&state, qemu, qemu);
        !ended
    }
}

/// How many operations are passed over between two kills: more of a default run would only be
/// slow. `STRATABLK_KILL_STEP=1` leaves none out.
fn step(default: usize) -> usize {
    number_from("STRATABLK_KILL_STEP").unwrap_or(default)
}

fn at_every_operation(number: usize) {
    let mut executioner = Executioner::new(number);
    let step = step(3);
    let mut operation = 1;
    loop {
        let mut killed = true;
        for place in [Place::Before, Place::Middle, Place::Behind] {
            killed &= executioner.kill(operation, place, &[]);
        }
        if !killed {
            break;
        }
        operation += step;
    }
    println!("{} kills", executioner.kills);
    assert!(executioner.kills * step > 100, "{}", executioner.kills);
}

#[test]
fn at_every_operation_on_an_image() {
    at_every_operation(0);
}

#[test]
fn at_every_operation_of_a_stream() {
    at_every_operation(1);
}

#[test]
fn at_every_operation_on_an_overlay_with_a_snapshot() {
    at_every_operation(2);
}

#[test]
fn at_every_operation_on_an_image_with_a_data_file() {
    at_every_operation(3);
}

#[test]
fn at_every_operation_on_a_device() {
    at_every_operation(4);
}

/// Needs `strace`, and is passed over without it.
#[test]
fn at_every_system_call() {
    if Command::new("strace").arg("-V").output().is_err() {
        println!("no strace: passed over");
        return;
    }
    let mut executioner = Executioner::new(1);
    let step = step(8);
    let mut call = 1;
    let wrapper = |call: usize| -> Vec<String> {
        let calls = "io_uring_enter,fdatasync,fallocate,ftruncate,pwrite64,pwritev,fstat,statx";
        let inject = format!("inject={calls}:signal=KILL:when={call}");
        let words = ["strace", "-f", "-qq", "-o", "/dev/null", "-e"];
        let words = words.into_iter().map(str::to_owned);
        words.chain([inject]).collect()
    };
    while executioner.kill(usize::MAX - call, Place::Never, &wrapper(call)) {
        call += step;
    }
    println!("{} kills", executioner.kills);
    assert!(call > 40, "{call}");
}
