//! A disk that hangs beside others, in the same daemon.
//!
//! What would be caught: a command about a disk that hangs (it is being opened, asked for its size, made
//! stable or closed) which holds up commands about others, queries of all nodes among them; an end that
//! does not make the others stable, or that waits for a disk which was dead before it began; a disk that
//! is abandoned without a word.

mod common;

use common::Res;
use common::daemon::{Daemon, Program, Setup};
use common::frontend::{OK, Op, PATIENCE};
use common::images;
use common::skips::skip;
use common::slow::Slow;
use common::stamp::{self, SECTOR};
use serde_json::json;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
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

/// The longest that the daemon itself takes for its end when a disk was dead before: the bound that is
/// documented, and as much again for a machine that is busy. Without that bound it would be 72 s.
const END: Duration = Duration::from_secs(18);

/// Waits until a process does nothing more, for as long as it may take.
fn wait_for_its_end(daemon: &Daemon, bound: Duration) -> Res<()> {
    let told = Instant::now();
    while !has_ended(daemon.pid())? {
        assert!(told.elapsed() < bound, "no end: {}", daemon.log());
        std::thread::sleep(Duration::from_millis(1));
    }
    eprintln!("the end took {:?}", told.elapsed());
    Ok(())
}

/// Waits until a thread waits for the file system.
fn wait_for_hang(daemon: &Daemon, what: &str) -> Res<()> {
    let deadline = Instant::now() + PATIENCE;
    while !waits(daemon.pid(), &[ANSWER, DATA])? {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// What a guest had written before it was told so is in the image, which was closed clean.
fn assert_clean(image: &Path, scratch: &Path) -> Res<()> {
    images::wait_unlocked(image)?;
    assert!(!images::check(image)?, "clusters are lost");
    let found = images::read_owners(image, "qcow2", scratch)?;
    for owner in found.iter().take(16) {
        assert_eq!(*owner, Ok(7), "a write that had completed");
    }
    Ok(())
}

/// A guest's flush hangs for longer than a disk may be silent; the daemon ends without that disk.
#[test]
fn a_sync_that_hangs_holds_up_neither_others_nor_the_end() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let Some(slow) = Slow::mount(dir.path(), DISK)? else {
        return Ok(skip("no file systems in user space here")?);
    };
    let image = dir.path().join("disk.qcow2");
    images::create(&image, DISK, "compat=1.1", None)?;
    let mut setup = Setup::new(dir.path(), &[(image.clone(), "qcow2")]);
    let control = dir.path().join("qmp.sock");
    setup.qmp = Some(control.clone());
    let socket = dir.path().join("second.sock");
    setup.extra = [
        "--blockdev".to_owned(),
        format!(
            "driver=file,node-name=hung,locking=off,filename={}",
            slow.file.display()
        ),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=two,node-name=hung,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        ),
    ]
    .to_vec();
    let mut daemon: Daemon = setup.start(&Program::under_test(), dir.path(), None)?;
    let mut first = daemon.connect(&setup.socket, 1, QUEUE, MEMORY)?;
    let mut second = daemon.connect(&socket, 1, QUEUE, MEMORY)?;
    let mut bytes = vec![0; 16 * SECTOR];
    stamp::fill_all(&mut bytes, 7, 0);
    first.memory.write(0, &bytes);
    second.memory.write(0, &bytes);
    let data = [(0, bytes.len())];
    assert_eq!(second.queues[0].run(&Op::write(0, &data))?, OK);
    let stopped = Stopped::new(&slow);
    second.queues[0].submit(&Op::flush(), 1)?;
    second.queues[0].kick()?;
    wait_for_hang(&daemon, "a sync of the disk that hangs")?;
    // For longer than a disk may be silent.
    let silent = Instant::now() + Duration::from_secs(11);
    let mut qmp = daemon.qmp(&control)?;
    let mut longest = Duration::ZERO;
    while Instant::now() < silent {
        for query in ["query-block", "query-named-block-nodes", "query-block-jobs"] {
            let asked = Instant::now();
            qmp.execute(query, json!({}))??;
            longest = longest.max(asked.elapsed());
        }
        for op in [Op::write(0, &data), Op::flush()] {
            assert_eq!(first.queues[0].run(&op)?, OK);
        }
    }
    eprintln!("the longest command took {longest:?}");
    daemon.signal(libc::SIGTERM)?;
    wait_for_its_end(&daemon, END)?;
    let log = daemon.log();
    drop(stopped);
    let status = daemon.wait_for_end()?;
    assert_eq!(status.code(), Some(1), "{log}");
    for words in [
        "abandoned",
        "node 'hung'",
        "its storage has not answered for",
    ] {
        assert!(log.contains(words), "{words}: {log}");
    }
    assert!(!log.contains("node 'layer0'"), "{log}");
    assert_clean(&image, &dir.path().join("scratch"))
}

/// A stream's end lets go of a base, which cannot be closed.
#[test]
fn a_close_that_hangs_holds_up_neither_others_nor_the_end() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let Some(slow) = Slow::mount(dir.path(), DISK)? else {
        return Ok(skip("no file systems in user space here")?);
    };
    let base = fs::File::options().write(true).open(&slow.file)?;
    base.write_all_at(&[5; 1 << 20], 0)?;
    drop(base);
    let image = dir.path().join("disk.qcow2");
    images::create(&image, DISK, "compat=1.1", None)?;
    let over = dir.path().join("over.qcow2");
    images::create(&over, DISK, "compat=1.1", Some((&slow.file, "raw")))?;
    let mut setup = Setup::new(dir.path(), &[(image.clone(), "qcow2")]);
    let control = dir.path().join("qmp.sock");
    setup.qmp = Some(control.clone());
    setup.extra = [
        "--blockdev".to_owned(),
        format!(
            "qcow2,node-name=over,file.driver=file,file.filename={},backing.driver=raw,\
             backing.file.driver=file,backing.file.filename={},backing.file.locking=off",
            over.display(),
            slow.file.display()
        ),
    ]
    .to_vec();
    let mut daemon: Daemon = setup.start(&Program::under_test(), dir.path(), None)?;
    let mut guest = daemon.connect(&setup.socket, 1, QUEUE, MEMORY)?;
    let mut bytes = vec![0; 16 * SECTOR];
    stamp::fill_all(&mut bytes, 7, 0);
    guest.memory.write(0, &bytes);
    let data = [(0, bytes.len())];
    let mut qmp = daemon.qmp(&control)?;
    let job = json!({"device": "over", "job-id": "j", "auto-finalize": false});
    qmp.execute("block-stream", job)??;
    qmp.event(|event| event["event"] == "BLOCK_JOB_PENDING")?;
    let stopped = Stopped::new(&slow);
    qmp.execute("job-finalize", json!({"id": "j"}))??;
    // The job is at its end though its base is not closed.
    let end = qmp.job_end("j")?;
    assert_eq!(end["data"].get("error"), None, "{end}");
    wait_for_hang(&daemon, "the base is closed")?;
    let mut longest = Duration::ZERO;
    for query in ["query-block", "query-named-block-nodes", "query-block-jobs"] {
        let asked = Instant::now();
        qmp.execute(query, json!({}))??;
        longest = longest.max(asked.elapsed());
    }
    eprintln!("the longest command took {longest:?}");
    assert_eq!(guest.queues[0].run(&Op::write(0, &data))?, OK);
    daemon.signal(libc::SIGTERM)?;
    wait_for_its_end(&daemon, END)?;
    let log = daemon.log();
    drop(stopped);
    let status = daemon.wait_for_end()?;
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(!images::check(&over)?, "clusters are lost");
    assert_clean(&image, &dir.path().join("scratch"))
}

#[test]
fn a_disk_that_hangs_holds_up_no_command_of_others() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let Some(slow) = Slow::mount(dir.path(), DISK)? else {
        return Ok(skip("no file systems in user space here")?);
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
    wait_for_hang(&daemon, "the image is opened")?;
    go_on(&mut daemon, &control, |op| guest.queues[0].run(op), &data)?;
    daemon.signal(libc::SIGTERM)?;
    wait_for_its_end(&daemon, PATIENCE)?;
    // The kernel lets it go when its last I/O has ended.
    drop(stopped);
    daemon.wait_for_end()?;
    assert_clean(&image, &dir.path().join("scratch"))
}

/// Asks for all that another client could want, and lets the guest of another disk write.
fn go_on(
    daemon: &mut Daemon,
    control: &Path,
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
