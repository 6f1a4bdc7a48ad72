//! Disks that hang in every kind of call at once, beside one that is served and streamed.
//!
//! What would be caught: a kind of call that holds up another disk's requests, its job or its place in
//! the end, because both need a thread, a lock or a look at all disks; an end that takes longer than its
//! bound, or does not make the others stable.

#![allow(clippy::unwrap_used)]

mod common;

use common::Res;
use common::daemon::{Daemon, Program, Setup};
use common::frontend::{DISCARD, Frontend, OK, Op, PATIENCE, Segment, WRITE_ZEROES};
use common::images;
use common::qmp::Qmp;
use common::skips::skip;
use common::slow::Slow;
use common::stamp::{self, SECTOR};
use serde_json::json;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const DISK: u64 = 8 << 20;
const MEMORY: usize = 1 << 20;
const QUEUE: u16 = 128;

/// Requests for sectors that have not been read before, so that the kernel has to ask for them.
const PLACE: u64 = 4096;

/// What a disk hangs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A guest's request.
    Read,
    Write,
    Flush,
    WriteZeroes,
    Discard,
    /// The image is opened once more, and locked, to be written: a stream into it begins.
    Open,
    /// The file is asked where it has data: by a stream from it.
    NextData,
    /// The file is closed: a stream from it has ended.
    Close,
}

const KINDS: [Kind; 8] = [
    Kind::Read,
    Kind::Write,
    Kind::Flush,
    Kind::WriteZeroes,
    Kind::Discard,
    Kind::Open,
    Kind::NextData,
    // Behind them: what waits for a file must not keep those of others open.
    Kind::Close,
];

impl Kind {
    fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// Whether it is a guest's request, on a raw disk.
    fn is_request(self) -> bool {
        !matches!(self, Kind::Open | Kind::NextData | Kind::Close)
    }
}

/// A disk that hangs, until this is dropped.
struct Neighbour {
    kind: Kind,
    slow: Slow,
    dir: PathBuf,
    frontend: Option<Frontend>,
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.slow.signal(libc::SIGCONT);
    }
}

impl Neighbour {
    /// `None`: the machine has no file systems in user space.
    fn new(dir: &Path, kind: Kind) -> Res<Option<Self>> {
        let dir = dir.join(kind.name());
        fs::create_dir(&dir)?;
        let Some(slow) = Slow::mount(&dir, DISK)? else {
            return Ok(None);
        };
        let neighbour = Self {
            kind,
            slow,
            dir,
            frontend: None,
        };
        let file = fs::File::options().write(true).open(&neighbour.slow.file)?;
        match kind {
            Kind::Open => {
                let image = neighbour.dir.join("image.qcow2");
                images::create(&image, DISK, "compat=1.1", None)?;
                file.write_all_at(&fs::read(&image)?, 0)?;
            }
            Kind::NextData | Kind::Close => {
                file.write_all_at(&[5; 1 << 20], 0)?;
                let below = (&*neighbour.slow.file, "raw");
                images::create(&neighbour.overlay(), DISK, "compat=1.1", Some(below))?;
            }
            _ => file.write_all_at(&[5; 1 << 20], 0)?,
        }
        Ok(Some(neighbour))
    }

    fn overlay(&self) -> PathBuf {
        self.dir.join("overlay.qcow2")
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("vhost.sock")
    }

    /// Its words on the command line.
    fn args(&self) -> Vec<String> {
        let (name, file) = (self.kind.name(), self.slow.file.display());
        let node = match self.kind {
            Kind::Open => format!("qcow2,node-name={name},file.driver=file,file.filename={file}"),
            Kind::NextData | Kind::Close => format!(
                "qcow2,node-name={name},file.driver=file,file.filename={},backing.driver=raw,\
                 backing.file.driver=file,backing.file.filename={file},backing.file.locking=off",
                self.overlay().display()
            ),
            _ => format!("file,node-name={name},locking=off,filename={file},discard=unmap"),
        };
        let mut args = vec!["--blockdev".to_owned(), node];
        if self.kind.is_request() {
            args.push("--export".to_owned());
            args.push(format!(
                "type=vhost-user-blk,id={name}-export,node-name={name},writable=on,addr.type=unix,\
                 addr.path={}",
                self.socket().display()
            ));
        }
        args
    }

    /// All that has to be done before it hangs.
    fn prepare(&mut self, daemon: &mut Daemon, qmp: &mut Qmp) -> Res<()> {
        if self.kind.is_request() {
            let mut frontend = daemon.connect(&self.socket(), 1, QUEUE, MEMORY)?;
            let data = [(0, SECTOR)];
            assert_eq!(frontend.queues[0].run(&Op::write(0, &data))?, OK);
            self.frontend = Some(frontend);
        } else if self.kind == Kind::Close {
            let name = self.kind.name();
            let job = json!({"device": name, "job-id": name, "auto-finalize": false});
            qmp.execute("block-stream", job)??;
            qmp.event(|event| event["event"] == "BLOCK_JOB_PENDING")?;
        }
        Ok(())
    }

    /// Lets it hang in its call.
    fn hang(&mut self, daemon: &mut Daemon, control: &Path, qmp: &mut Qmp) -> Res<()> {
        self.slow.signal(libc::SIGSTOP);
        let name = self.kind.name();
        let data = [(0, SECTOR)];
        let ranges = [Segment {
            sector: PLACE,
            count: 128,
            flags: 0,
        }];
        let op = match self.kind {
            Kind::Read => Op::read(PLACE, &data),
            Kind::Write => Op::write(PLACE, &data),
            Kind::Flush => Op::flush(),
            Kind::WriteZeroes => Op::ranges(WRITE_ZEROES, &ranges),
            Kind::Discard => Op::ranges(DISCARD, &ranges),
            Kind::Open | Kind::NextData => {
                // It may not be answered.
                let mut stuck = daemon.qmp(control)?;
                let job = json!({"device": name, "job-id": name});
                std::thread::spawn(move || drop(stuck.execute("block-stream", job)));
                return Ok(());
            }
            Kind::Close => {
                qmp.execute("job-finalize", json!({"id": name}))??;
                qmp.job_end(&name)?;
                return Ok(());
            }
        };
        let frontend = self.frontend.as_mut().ok_or("no front-end")?;
        frontend.queues[0].submit(&op, 1)?;
        frontend.queues[0].kick()
    }

    /// Whether its call has not ended.
    fn still_hangs(&mut self, qmp: &mut Qmp) -> Res<bool> {
        Ok(match (self.kind, &mut self.frontend) {
            (_, Some(frontend)) => !frontend.queues[0].ready(),
            (Kind::NextData, None) => {
                let jobs = qmp.execute("query-block-jobs", json!({}))??;
                let jobs = jobs.as_array().ok_or("no list")?.iter();
                jobs.filter(|job| job["device"] == self.kind.name())
                    .all(|job| job["status"] == "running")
            }
            _ => true,
        })
    }
}

/// How many threads wait for file systems in user space, those of the kernel for the process among them.
fn waiting(pid: u32) -> Res<usize> {
    let mut waiting = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may have ended meanwhile.
        let place = fs::read_to_string(thread?.path().join("wchan")).unwrap_or_default();
        waiting +=
            usize::from(place.contains("request_wait_answer") || place.contains("folio_wait"));
    }
    Ok(waiting)
}

/// Whether a process does nothing more, though the kernel may still wait for its I/O.
fn has_ended(pid: u32) -> Res<bool> {
    const PF_EXITING: u64 = 4;
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{pid}/stat"))?;
    // Behind the name: the state, five numbers, and the flags (proc(5)).
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let flags = fields.split_whitespace().nth(6).ok_or("no flags")?;
    Ok(flags.parse::<u64>()? & PF_EXITING != 0)
}

#[test]
fn a_disk_goes_on_beside_others_that_hang_in_every_kind_of_call() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let mut neighbours = Vec::new();
    for kind in KINDS {
        let Some(neighbour) = Neighbour::new(dir.path(), kind)? else {
            return Ok(skip("no file systems in user space here")?);
        };
        neighbours.push(neighbour);
    }
    let base = dir.path().join("base.raw");
    fs::write(&base, vec![5; DISK as usize])?;
    let image = dir.path().join("disk.qcow2");
    images::create(&image, DISK, "compat=1.1", Some((&base, "raw")))?;
    let mut setup = Setup::new(dir.path(), &[(image.clone(), "qcow2"), (base, "raw")]);
    let control = dir.path().join("qmp.sock");
    setup.qmp = Some(control.clone());
    setup.extra = neighbours.iter().flat_map(Neighbour::args).collect();
    // What hangs has an eighth of it, and nothing here is slow.
    setup.extra.push("--stop-timeout=16".to_owned());
    let mut daemon: Daemon = setup.start(&Program::under_test(), dir.path(), None)?;
    let mut guest = daemon.connect(&setup.socket, 1, QUEUE, MEMORY)?;
    let mut qmp = daemon.qmp(&control)?;
    for neighbour in &mut neighbours {
        neighbour.prepare(&mut daemon, &mut qmp)?;
    }
    // In a run that fails they go on before the daemon is waited for.
    let mut neighbours = neighbours;
    for (hanging, neighbour) in neighbours.iter_mut().enumerate() {
        neighbour.hang(&mut daemon, &control, &mut qmp)?;
        let deadline = Instant::now() + PATIENCE;
        while waiting(daemon.pid())? <= hanging {
            let kind = neighbour.kind;
            assert!(Instant::now() < deadline, "{kind:?} does not hang");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    let queue = &mut guest.queues[0];
    let job = json!({"device": "layer0", "job-id": "other"});
    qmp.execute("block-stream", job)??;
    let mut bytes = vec![0; 16 * SECTOR];
    stamp::fill_all(&mut bytes, 7, 0);
    guest.memory.write(0, &bytes);
    let data = [(0, bytes.len())];
    for op in [Op::write(0, &data), Op::read(64, &data), Op::flush()] {
        assert_eq!(queue.run(&op)?, OK);
    }
    let end = qmp.job_end("other")?;
    assert_eq!(end["data"].get("error"), None, "{end}");
    // Not flushed: the end makes it stable.
    guest.memory.write(0, &bytes);
    assert_eq!(queue.run(&Op::write(0, &data))?, OK);
    for neighbour in &mut neighbours {
        let hangs = neighbour.still_hangs(&mut qmp)?;
        assert!(hangs, "{:?} has ended meanwhile", neighbour.kind);
    }

    daemon.signal(libc::SIGTERM)?;
    let deadline = Instant::now() + PATIENCE;
    while !has_ended(daemon.pid())? {
        assert!(Instant::now() < deadline, "no end: {}", daemon.log());
        std::thread::sleep(Duration::from_millis(1));
    }
    let log = daemon.log();
    drop(neighbours);
    let status = daemon.wait_for_end()?;
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("abandoned"), "{log}");
    assert!(!log.contains("'layer0'"), "{log}");
    images::wait_unlocked(&image)?;
    assert!(!images::check(&image)?, "clusters are lost");
    let found = images::read_owners(&image, "qcow2", &dir.path().join("scratch"))?;
    for owner in found.iter().take(16) {
        assert_eq!(*owner, Ok(7), "a write that had completed");
    }
    Ok(())
}
