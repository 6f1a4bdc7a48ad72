//! A disk that hangs beside others, in the same daemon.
//!
//! What would be caught: a command about a disk that hangs (it is being opened, or asked for its
//! size) which holds up commands about others, queries of all nodes among them; an end that does
//! not make the others stable.

mod common;

use common::Res;
use common::daemon::{Daemon, Program, Setup};
use common::frontend::{OK, Op, PATIENCE};
use common::images;
use common::slow::Slow;
use common::stamp::{self, SECTOR};
use serde_json::json;
use std::fs;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const DISK: u64 = 8 << 20;
const MEMORY: usize = 1 << 20;
const QUEUE: u16 = 128;

/// Storage that hangs until this is dropped.
struct Stopped<'a>(&'a Slow);

impl<'a> Stopped<'a> {
    fn new(slow: &'a Slow) -> Self {
        slow.signal(libc::SIGSTOP);
        Self(slow)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.signal(libc::SIGCONT);
    }
}

/// Whether a thread of a process, or of the kernel for it, waits for what `waits_for` names.
fn waits(pid: u32, waits_for: &[&str]) -> Res<bool> {
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may have ended meanwhile.
        let place = fs::read_to_string(thread?.path().join("wchan")).unwrap_or_default();
        if waits_for.iter().any(|name| place.contains(name)) {
            return Ok(true);
        }
    }
    Ok(false)
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

/// An answer of a file system in user space.
const ANSWER: &str = "request_wait_answer";
/// Data of a file.
const DATA: &str = "folio_wait";

#[test]
fn a_disk_that_hangs_holds_up_no_command_of_others() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let Some(slow) = Slow::mount(dir.path(), DISK)? else {
        eprintln!("skipped: no file systems in user space here");
        return Ok(());
    };
    let image = dir.path().join("disk.qcow2");
    images::create(&image, DISK, "compat=1.1", None)?;
    let base = dir.path().join("base.raw");
    fs::write(&base, vec![5; 1 << 20])?;
    let over = dir.path().join("over.qcow2");
    images::create(&over, DISK, "compat=1.1", Some((&base, "raw")))?;
    // The same as an image on the storage that will hang.
    let file = fs::File::options().write(true).open(&slow.file)?;
    file.write_all_at(&fs::read(&over)?, 0)?;
    drop(file);
    let mut setup = Setup::new(dir.path(), &[(image.clone(), "qcow2")]);
    let control = dir.path().join("qmp.sock");
    setup.qmp = Some(control.clone());
    for (name, path) in [("over", &over), ("hung", &slow.file)] {
        setup.extra.extend([
            "--blockdev".to_owned(),
            format!(
                "qcow2,node-name={name},file.driver=file,file.filename={}",
                path.display()
            ),
        ]);
    }
    setup
        .extra
        .extend(["--stop-timeout".to_owned(), "16".to_owned()]);
    let mut daemon: Daemon = setup.start(&Program::under_test(), dir.path(), None)?;
    let mut guest = daemon.connect(&setup.socket, 1, QUEUE, MEMORY)?;
    let mut bytes = vec![0; 16 * SECTOR];
    stamp::fill_all(&mut bytes, 7, 0);
    guest.memory.write(0, &bytes);
    let data = [(0, bytes.len())];

    let stopped = Stopped::new(&slow);
    // Its image is opened to be written, which does not come to an end.
    let mut stuck = daemon.qmp(&control)?;
    std::thread::spawn(move || {
        let job = json!({"device": "hung", "job-id": "stuck"});
        let _ = stuck.execute("block-stream", job);
    });
    let deadline = Instant::now() + PATIENCE;
    while !waits(daemon.pid(), &[ANSWER, DATA])? {
        assert!(Instant::now() < deadline, "the image is never opened");
        std::thread::sleep(Duration::from_millis(1));
    }
    go_on(&mut daemon, &control, |op| guest.queues[0].run(op), &data)?;
    daemon.signal(libc::SIGTERM)?;
    let deadline = Instant::now() + PATIENCE;
    while !has_ended(daemon.pid())? {
        assert!(Instant::now() < deadline, "no end: {}", daemon.log());
        std::thread::sleep(Duration::from_millis(1));
    }
    // The kernel lets it go when its last I/O has ended.
    drop(stopped);
    daemon.wait_for_end()?;
    images::wait_unlocked(&image)?;
    assert!(!images::check(&image)?, "clusters are lost");
    let found = images::read_owners(&image, "qcow2", &dir.path().join("scratch"))?;
    for owner in found.iter().take(16) {
        assert_eq!(*owner, Ok(7), "a write that had completed");
    }
    Ok(())
}

/// Asks for all that another client could want, and lets the guest of another disk write.
fn go_on(
    daemon: &mut Daemon,
    control: &std::path::Path,
    mut run: impl FnMut(&Op) -> Res<u8>,
    data: &[(usize, usize)],
) -> Res<()> {
    let mut qmp = daemon.qmp(control)?;
    // Until the kernel does not know the file's size any longer, and asks.
    let deadline = Instant::now() + PATIENCE;
    let mut longest = Duration::ZERO;
    while !waits(daemon.pid(), &[ANSWER])? {
        assert!(Instant::now() < deadline, "the file's size is never asked");
        qmp.execute("query-block", json!({}))??;
    }
    let mut timed = |command: &str, arguments| {
        let asked = Instant::now();
        let answer = qmp.execute(command, arguments);
        longest = longest.max(asked.elapsed());
        answer
    };
    for query in [
        "query-block",
        "query-named-block-nodes",
        "query-blockstats",
        "query-block-exports",
        "query-jobs",
    ] {
        timed(query, json!({}))??;
    }
    let job = json!({"device": "over", "job-id": "other"});
    timed("block-stream", job)??;
    let busy = json!({"device": "hung", "job-id": "again"});
    let refused = timed("block-stream", busy)?;
    eprintln!("the longest command took {longest:?}");
    qmp.job_end("other")?;
    let text = refused.err().map(|refusal| refusal.desc);
    let wanted = "Node 'hung' is busy: block device is in use by block job: stream";
    assert_eq!(text.as_deref(), Some(wanted));
    assert_eq!(run(&Op::write(0, data))?, OK);
    Ok(())
}
