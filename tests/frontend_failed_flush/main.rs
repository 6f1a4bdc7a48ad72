//! A guest, a job and an operator, when one `fdatasync` of the daemon has failed: with a page cache
//! the kernel would let the next one succeed. And the end of the daemon, when its last ones fail, or
//! take long.
//!
//! What would be caught: a flush or a job's end that succeeds after one that failed, reads or writes
//! that do not go on, a failure that no client is told of, one that cannot be cleared, or that a
//! word for another device clears; an end that says that all is well though a last flush has failed,
//! and one that abandons an image whose disk is only slow.
//!
//! Files are on tmpfs, where the daemon makes its calls in line: a library that is loaded before the
//! others has one fail, or take three seconds.

#[path = "../common/mod.rs"]
mod common;

use common::Res;
use common::daemon::{Program, Setup};
use common::frontend::{IOERR, OK, Op};
use common::images;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

const SIZE: u64 = 1 << 20;

/// The file that makes a sync fail.
fn fail_file(dir: &Path) -> PathBuf {
    dir.join("fail")
}

/// The file that makes a sync take three seconds.
fn slow_file(dir: &Path) -> PathBuf {
    dir.join("slow")
}

/// The daemon with the library: a script.
fn program(dir: &Path) -> Res<Program> {
    let (fail, slow) = (fail_file(dir), slow_file(dir));
    let names = [
        ("FAIL_SYNC", images::text(&fail)?),
        ("SLOW_SYNC", images::text(&slow)?),
    ];
    Program::with_library("tests/frontend_failed_flush/fail_sync.c", &names, dir)
}

fn is_io_error(event: &Value) -> bool {
    event["event"] == "BLOCK_IO_ERROR"
}

fn failed_flush(layers: &[(PathBuf, &'static str)], dir: &Path) -> Res<()> {
    let fail = fail_file(dir);
    let setup = Setup::new(dir, layers);
    let mut daemon = setup.start(&program(dir)?, dir, None)?;
    let mut frontend = daemon.connect(&setup.socket, 1, 16, 8192)?;
    let control = setup.qmp.as_deref().ok_or("no control socket")?;
    let mut qmp = daemon.qmp(control)?;
    let memory = &frontend.memory;
    let queue = frontend.queues.first_mut().ok_or("no queue")?;
    memory.write(0, &[7; 4096]);
    assert_eq!(queue.run(&Op::write(0, &[(0, 4096)]))?, OK);
    assert_eq!(queue.run(&Op::flush())?, OK);

    fs::write(&fail, "")?;
    assert_eq!(queue.run(&Op::flush())?, IOERR);
    assert!(!fail.exists(), "no sync was tried");
    let event = qmp.event(is_io_error)?;
    let data = json!({"qom-path": "", "device": "disk", "node-name": "layer0",
        "operation": "write", "action": "report", "nospace": false,
        "reason": "Input/output error"});
    assert_eq!(event["data"], data);
    for _ in 0..3 {
        assert_eq!(
            queue.run(&Op::flush())?,
            IOERR,
            "a flush after one that failed"
        );
    }
    memory.write(0, &[8; 4096]);
    assert_eq!(queue.run(&Op::write(8, &[(0, 4096)]))?, OK);
    assert_eq!(queue.run(&Op::read(8, &[(4096, 4096)]))?, OK);
    let mut bytes = [0; 4096];
    memory.read(4096, &mut bytes);
    assert_eq!(bytes, [8; 4096]);
    if layers.len() > 1 {
        qmp.execute("block-stream", json!({"device": "disk"}))??;
        let end = qmp.job_end("disk")?;
        let error = end["data"]["error"].as_str().unwrap_or_default();
        assert!(error.contains("a flush failed at "), "{end}");
    }

    let mut clear = |device: &str| qmp.execute("x-clear-sync-error", json!({"device": device}));
    let refused = clear("nothing")?.err().ok_or("there is no such device")?;
    assert!(refused.desc.contains("nothing"), "{refused}");
    assert_eq!(queue.run(&Op::flush())?, IOERR);
    clear("disk")??;
    assert_eq!(queue.run(&Op::flush())?, OK);
    let refused = clear("disk")?.err().ok_or("nothing was left to clear")?;
    assert_eq!(refused.desc, "No flush of node 'layer0' has failed");
    let again = qmp.pending_events()?.into_iter().find(is_io_error);
    assert_eq!(again, None, "one event for one failure");
    if layers.len() > 1 {
        qmp.execute("block-stream", json!({"device": "disk"}))??;
        let end = qmp.job_end("disk")?;
        assert_eq!(end["data"].get("error"), None, "{end}");
    }
    let lines = daemon.log().matches("a flush failed at ").count();
    // The failure, the jobs' report of it and the clearing; not the guest's every flush.
    assert!(lines <= 4, "{}", daemon.log());
    daemon.stop()
}

#[test]
fn of_a_raw_image() -> Res<()> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let image = dir.path().join("disk.raw");
    fs::File::create(&image)?.set_len(SIZE)?;
    failed_flush(&[(image, "raw")], dir.path())
}

#[test]
fn of_an_overlay() -> Res<()> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let (base, top) = (dir.path().join("base"), dir.path().join("top.qcow2"));
    fs::write(&base, vec![5; SIZE as usize])?;
    images::create(&top, SIZE, "cluster_size=64k", Some((&base, "raw")))?;
    failed_flush(&[(top.clone(), "qcow2"), (base, "raw")], dir.path())?;
    assert!(!images::check(&top)?, "clusters leaked");
    Ok(())
}

#[test]
fn at_the_end_is_told_by_the_exit_status() -> Res<()> {
    for format in ["raw", "qcow2"] {
        let dir = tempfile::tempdir_in("/dev/shm")?;
        let image = dir.path().join("disk");
        match format {
            "raw" => fs::File::create(&image)?.set_len(SIZE)?,
            _ => images::create(&image, SIZE, "cluster_size=64k", None)?,
        }
        let setup = Setup::new(dir.path(), &[(image, format)]);
        let mut daemon = setup.start(&program(dir.path())?, dir.path(), None)?;
        let mut frontend = daemon.connect(&setup.socket, 1, 16, 8192)?;
        assert_eq!(frontend.queues[0].run(&Op::write(0, &[(0, 4096)]))?, OK);
        fs::write(fail_file(dir.path()), "")?;
        let status = daemon.terminate()?;
        assert!(
            !fail_file(dir.path()).exists(),
            "{format}: no sync was tried"
        );
        assert_eq!(status.code(), Some(1), "{format}: {}", daemon.log());
        for words in [
            "closing node 'layer0': ",
            "a flush failed at ",
            "may be lost",
        ] {
            assert!(daemon.log().contains(words), "{format}: {}", daemon.log());
        }
    }
    Ok(())
}

#[test]
fn that_is_slow_at_the_end_is_waited_for() -> Res<()> {
    for in_flight in [false, true] {
        let dir = tempfile::tempdir_in("/dev/shm")?;
        let image = dir.path().join("disk");
        images::create(&image, SIZE, "cluster_size=64k", None)?;
        let mut setup = Setup::new(dir.path(), &[(image.clone(), "qcow2")]);
        // Two seconds for what hangs: less than the sync takes.
        setup.extra = ["--stop-timeout=16".to_owned()].into();
        let mut daemon = setup.start(&program(dir.path())?, dir.path(), None)?;
        let mut frontend = daemon.connect(&setup.socket, 1, 16, 8192)?;
        let queue = &mut frontend.queues[0];
        frontend.memory.write(0, &[7; 4096]);
        assert_eq!(queue.run(&Op::write(0, &[(0, 4096)]))?, OK);
        let slow = slow_file(dir.path());
        fs::write(&slow, "")?;
        if in_flight {
            queue.submit(&Op::flush(), 1)?;
            queue.kick()?;
            daemon.retry(|| match slow.exists() {
                // The kind of error that is tried again.
                true => Err(std::io::Error::from(std::io::ErrorKind::NotFound).into()),
                false => Ok(()),
            })?;
        }
        let status = daemon.terminate()?;
        assert!(!slow.exists(), "no sync was tried");
        assert_eq!(status.code(), Some(0), "{in_flight}: {}", daemon.log());
        assert!(!images::check(&image)?, "clusters leaked");
    }
    Ok(())
}

/// What the state in the folder `state` records of failed flushes.
fn recorded(dir: &Path) -> Res<Vec<Value>> {
    let text = fs::read(dir.join("state/disk.state"))?;
    let state: Value = serde_json::from_slice(&text)?;
    let failed = state["state"]["failed-syncs"].as_array();
    Ok(failed.ok_or("no list of failed syncs")?.clone())
}

/// A folder for the state, and the words that name it.
fn with_state(setup: &mut Setup, dir: &Path) -> Res<()> {
    use std::os::unix::fs::DirBuilderExt;

    let state = dir.join("state");
    fs::DirBuilder::new().mode(0o700).create(&state)?;
    setup.extra = vec!["--state".to_owned(), images::text(&state)?.to_owned()];
    Ok(())
}

#[test]
fn at_the_end_is_recorded_before_the_process_is_gone() -> Res<()> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let image = dir.path().join("disk");
    images::create(&image, SIZE, "cluster_size=64k", None)?;
    let mut setup = Setup::new(dir.path(), &[(image.clone(), "qcow2")]);
    with_state(&mut setup, dir.path())?;
    let mut daemon = setup.start(&program(dir.path())?, dir.path(), None)?;
    let mut frontend = daemon.connect(&setup.socket, 1, 16, 8192)?;
    assert_eq!(frontend.queues[0].run(&Op::write(0, &[(0, 4096)]))?, OK);
    fs::write(fail_file(dir.path()), "")?;
    assert_eq!(daemon.terminate()?.code(), Some(1), "{}", daemon.log());
    let failed = recorded(dir.path())?;
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_eq!(failed[0]["file"], json!(images::text(&image)?));
    Ok(())
}

#[test]
fn while_the_daemon_starts_is_recorded() -> Res<()> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let image = dir.path().join("disk");
    images::create(&image, SIZE, "cluster_size=64k", None)?;
    let mut setup = Setup::new(dir.path(), &[(image.clone(), "qcow2")]);
    with_state(&mut setup, dir.path())?;
    // A journal is announced in the header, and that is made stable before anybody connects.
    let journal = dir.path().join("journal");
    fs::create_dir(&journal)?;
    setup
        .extra
        .extend(["--journal".to_owned(), images::text(&journal)?.to_owned()]);
    let program = program(dir.path())?;
    fs::write(fail_file(dir.path()), "")?;
    // It may serve what can be read, or not start at all.
    let mut daemon = setup.start(&program, dir.path(), None)?;
    match daemon.qmp(setup.qmp.as_ref().ok_or("no control socket")?) {
        Ok(_) => drop(daemon.terminate()?),
        Err(error) => assert!(daemon.log().contains("a flush failed"), "{error}"),
    }
    assert!(!fail_file(dir.path()).exists(), "no sync was tried");
    assert_eq!(recorded(dir.path())?.len(), 1);
    Ok(())
}
