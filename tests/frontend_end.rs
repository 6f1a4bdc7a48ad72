//! How the daemon begins and ends as a process: what it may have, and who waits for whom.
//!
//! What would be caught: a daemon that keeps a service manager's soft limit of descriptors; and an
//! export or a job that hangs and keeps the daemon from ending, until it is killed with the other
//! guests' unflushed data, or that keeps images from being closed which it has nothing to do with.

mod common;

use common::Res;
use common::daemon::{Daemon, Program, Setup};
use common::frontend::{OK, Op, PATIENCE};
use common::images;
use common::skips::skip;
use common::slow::Slow;
use common::stamp::{self, SECTOR};
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const DISK: u64 = 8 << 20;
const MEMORY: usize = 1 << 20;
const QUEUE: u16 = 128;

/// A daemon of a qcow2 image, to which others can be added.
fn bed(dir: &Path) -> Res<(PathBuf, Setup)> {
    let image = dir.join("disk.qcow2");
    images::create(&image, DISK, "compat=1.1", None)?;
    let mut setup = Setup::new(dir, &[(image.clone(), "qcow2")]);
    setup.qmp = None;
    Ok((image, setup))
}

#[test]
fn the_limit_of_descriptors_is_raised() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let (_, setup) = bed(dir.path())?;
    let script = dir.path().join("limited");
    let daemon = Program::under_test().path;
    let text = format!(
        "#!/bin/sh\nulimit -Sn 64\nexec '{}' \"$@\"\n",
        daemon.display()
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let mut daemon = setup.start(&Program { path: script }, dir.path(), None)?;
    let _frontend = daemon.connect(&setup.socket, 1, QUEUE, MEMORY)?;
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid()))?;
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .ok_or("no limit")?;
    let numbers: Vec<&str> = line.split_whitespace().skip(3).take(2).collect();
    assert_eq!(numbers.first(), numbers.get(1), "{line}");
    daemon.stop()
}

/// Whether a thread of a process waits for the answer of a file system in user space.
fn waits_for_file_system(pid: u32) -> Res<bool> {
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may have ended meanwhile.
        let place = fs::read_to_string(thread?.path().join("wchan")).unwrap_or_default();
        if place.contains("request_wait_answer") {
            return Ok(true);
        }
    }
    Ok(false)
}

#[test]
fn an_export_that_hangs_costs_the_others_nothing_at_the_end() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let (image, mut setup) = bed(dir.path())?;
    let Some(slow) = Slow::mount(dir.path(), DISK)? else {
        return Ok(skip("no file systems in user space here")?);
    };
    let socket = dir.path().join("second.sock");
    setup.extra = [
        "--blockdev".to_owned(),
        format!(
            "driver=file,node-name=second,locking=off,filename={}",
            slow.file.display()
        ),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=two,node-name=second,writable=on,addr.type=unix,addr.path={}",
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
    let data = [(0, bytes.len())];
    let op = Op::write(0, &data);
    assert_eq!(first.queues[0].run(&op)?, OK);
    assert_eq!(second.queues[0].run(&op)?, OK);
    slow.signal(libc::SIGSTOP);
    second.queues[0].submit(&op, 1)?;
    second.queues[0].kick()?;

    daemon.signal(libc::SIGTERM)?;
    let deadline = Instant::now() + PATIENCE;
    while !daemon.log().contains("abandoned") {
        if Instant::now() > deadline {
            // Or it could not even be killed.
            slow.signal(libc::SIGCONT);
            return Err(format!("it waits for what hangs: {}", daemon.log()).into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(daemon.log().contains("'second'"), "{}", daemon.log());
    // From here on the daemon does nothing more; the kernel may let it end with its I/O alone.
    slow.signal(libc::SIGCONT);
    let status = daemon.wait_for_end()?;
    assert_eq!(status.code(), Some(1), "{}", daemon.log());
    images::wait_unlocked(&image)?;
    assert!(!images::check(&image)?, "clusters are lost");
    let found = images::read_owners(&image, "qcow2", &dir.path().join("scratch"))?;
    for owner in found.iter().take(16) {
        assert_eq!(*owner, Ok(7), "a write that had completed");
    }
    Ok(())
}

#[test]
fn a_job_that_hangs_costs_other_images_nothing_at_the_end() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let (image, mut setup) = bed(dir.path())?;
    let Some(slow) = Slow::mount(dir.path(), DISK)? else {
        return Ok(skip("no file systems in user space here")?);
    };
    let base = fs::File::options().write(true).open(&slow.file)?;
    base.write_all_at(&[5; 1 << 20], 0)?;
    drop(base);
    let overlay = dir.path().join("overlay.qcow2");
    images::create(&overlay, DISK, "compat=1.1", Some((&slow.file, "raw")))?;
    setup.qmp = Some(dir.path().join("qmp.sock"));
    setup.extra = [
        "--blockdev".to_owned(),
        format!(
            "qcow2,node-name=over,file.driver=file,file.filename={},backing.driver=raw,\
             backing.file.driver=file,backing.file.filename={},backing.file.locking=off",
            overlay.display(),
            slow.file.display()
        ),
    ]
    .to_vec();
    let mut daemon: Daemon = setup.start(&Program::under_test(), dir.path(), None)?;
    let mut first = daemon.connect(&setup.socket, 1, QUEUE, MEMORY)?;
    let data = [(0, 16 * SECTOR)];
    assert_eq!(first.queues[0].run(&Op::write(0, &data))?, OK);
    let control = setup.qmp.clone().ok_or("no control socket")?;
    let mut qmp = daemon.qmp(&control)?;
    slow.signal(libc::SIGSTOP);
    let job = serde_json::json!({"device": "over", "job-id": "stuck"});
    qmp.execute("block-stream", job)??;
    let deadline = Instant::now() + PATIENCE;
    while !waits_for_file_system(daemon.pid())? {
        assert!(Instant::now() < deadline, "the job never reads its base");
        std::thread::sleep(Duration::from_millis(1));
    }

    daemon.signal(libc::SIGTERM)?;
    let deadline = Instant::now() + PATIENCE;
    while !daemon.log().contains("abandoned") {
        if Instant::now() > deadline {
            slow.signal(libc::SIGCONT);
            return Err(format!("it waits for what hangs: {}", daemon.log()).into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let log = daemon.log();
    slow.signal(libc::SIGCONT);
    let status = daemon.wait_for_end()?;
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("job 'stuck' does not end"), "{log}");
    assert!(log.contains("'over' is flushed and not closed"), "{log}");
    assert!(!log.contains("'layer0' is flushed and not closed"), "{log}");
    assert!(!log.contains("control sockets do not end"), "{log}");
    images::wait_unlocked(&image)?;
    assert!(!images::check(&image)?, "clusters are lost");
    Ok(())
}
