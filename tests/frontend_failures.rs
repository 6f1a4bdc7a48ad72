//! What clients hear of requests that storage fails.
//!
//! What would be caught: a failed request that no client hears of, or with the wrong members; a guest
//! that fills its clients' queues with failures; a last failure that is left out; an event for what
//! the guest itself got wrong; one for a flush that fails again because an earlier one has.

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::Res;
use common::daemon::{Daemon, Program};
use common::frontend::{DISCARD, Frontend, IOERR, OK, Op, PATIENCE, Segment, WRITE_ZEROES};
use common::images;
use common::qmp::Qmp;
use serde_json::{Value, json};

const SIZE: usize = 1 << 20;

/// A daemon whose node `disk` fails by rules, on a raw file or an image.
fn serve(dir: &Path, format: &str, rules: &str) -> Res<(Daemon, Frontend, Qmp)> {
    let (socket, control) = (dir.join("disk.sock"), dir.join("qmp.sock"));
    let image = dir.join("disk");
    match format {
        "raw" => fs::write(&image, vec![7; SIZE])?,
        _ => images::create(&image, SIZE as u64, "cluster_size=64k", None)?,
    }
    let nodes = [
        format!(
            "driver=file,node-name=f,discard=unmap,filename={}",
            images::text(&image)?
        ),
        format!("driver=blkdebug,node-name=b,image=f,discard=unmap,{rules}"),
        format!("driver={format},node-name=disk,file=b,discard=unmap"),
    ];
    let mut args = Vec::new();
    for node in nodes {
        args.extend(["--blockdev".to_owned(), node]);
    }
    args.extend([
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={},writable=on",
            images::text(&socket)?
        ),
        format!("--qmp={}", images::text(&control)?),
    ]);
    let mut daemon = Daemon::start(&Program::under_test(), &args, dir, None)?;
    let qmp = daemon.qmp(&control)?;
    let frontend = daemon.connect(&socket, 1, 64, 1 << 20)?;
    Ok((daemon, frontend, qmp))
}

fn is_io_error(event: &Value) -> bool {
    event["event"] == "BLOCK_IO_ERROR"
}

fn members(operation: &str, errno: i32) -> Value {
    let reason = match errno {
        libc::ENOSPC => "No space left on device",
        _ => "Input/output error",
    };
    json!({"qom-path": "", "device": "e", "node-name": "disk", "operation": operation,
        "action": "report", "nospace": errno == libc::ENOSPC, "reason": reason})
}

#[test]
fn each_kind_of_request_is_told() -> Res<()> {
    let data = [(0, 4096)];
    let range = [Segment {
        sector: 8,
        count: 8,
        flags: 0,
    }];
    let cases = [
        (
            "raw",
            "none,inject-error.0.iotype=read",
            Op::read(0, &data),
            "read",
            libc::EIO,
        ),
        (
            "raw",
            "write_aio,inject-error.0.iotype=write",
            Op::write(0, &data),
            "write",
            libc::ENOSPC,
        ),
        (
            "raw",
            "none,inject-error.0.iotype=write-zeroes",
            Op::ranges(WRITE_ZEROES, &range),
            "write",
            libc::EIO,
        ),
        (
            "raw",
            "none,inject-error.0.iotype=discard",
            Op::ranges(DISCARD, &range),
            "write",
            libc::EIO,
        ),
        // A write that fails since a table cannot be read is a write.
        (
            "qcow2",
            "refblock_load",
            Op::write(0, &data),
            "write",
            libc::EIO,
        ),
        (
            "qcow2",
            "write_aio,inject-error.0.iotype=write",
            Op::write(0, &data),
            "write",
            libc::ENOSPC,
        ),
    ];
    for (format, event, request, operation, errno) in cases {
        let rules = format!(
            "inject-error.0.event={event},inject-error.0.errno={errno},inject-error.0.once=on"
        );
        let dir = tempfile::tempdir()?;
        let (daemon, mut frontend, mut qmp) = serve(dir.path(), format, &rules)?;
        let queue = frontend.queues.first_mut().ok_or("no queue")?;
        // The guest's own mistakes are none of the storage.
        let past = Op::read((SIZE / 512) as u64, &data);
        assert_eq!(queue.run(&past)?, IOERR);
        assert_eq!(queue.run(&request)?, IOERR, "{rules}");
        let told = qmp.event(is_io_error)?;
        assert_eq!(told["data"], members(operation, errno), "{rules}");
        drop(frontend);
        daemon.stop()?;
    }
    Ok(())
}

#[test]
fn a_stream_of_failures_is_told_now_and_then_and_how_it_ended() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let rules = "inject-error.0.event=none,inject-error.0.iotype=read,\
        inject-error.1.event=write_aio,inject-error.1.iotype=write,inject-error.1.errno=28";
    let (daemon, mut frontend, mut qmp) = serve(dir.path(), "raw", rules)?;
    let queue = frontend.queues.first_mut().ok_or("no queue")?;
    let data = [(0, 4096)];
    let began = Instant::now();
    for _ in 0..2000 {
        assert_eq!(queue.run(&Op::read(0, &data))?, IOERR);
    }
    assert_eq!(queue.run(&Op::write(0, &data))?, IOERR);
    let mut told = Vec::new();
    // The last one is told, though nothing comes after it.
    while told.last() != Some(&members("write", libc::ENOSPC)) {
        assert!(began.elapsed() < PATIENCE, "{told:?}");
        told.push(qmp.event(is_io_error)?["data"].take());
    }
    let most = began.elapsed().as_secs() + 2;
    assert!((2..=most).contains(&(told.len() as u64)), "{told:?}");
    assert_eq!(told.first(), Some(&members("read", libc::EIO)));
    // It is well again after a while, and the next failure is told at once.
    let quiet = Instant::now();
    while quiet.elapsed() < Duration::from_secs(1) {
        assert_eq!(queue.run(&Op::flush())?, OK);
    }
    assert_eq!(qmp.pending_events()?.into_iter().find(is_io_error), None);
    assert_eq!(queue.run(&Op::write(0, &data))?, IOERR);
    let again = qmp.event(is_io_error)?;
    assert_eq!(again["data"], members("write", libc::ENOSPC));
    drop(frontend);
    daemon.stop()
}

/// What fails again since an earlier flush has failed is not told again.
#[test]
fn a_flush_that_fails_is_told_once() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let rules = "inject-error.0.event=none,inject-error.0.iotype=flush,inject-error.0.once=on,\
        inject-error.1.event=none,inject-error.1.iotype=read,inject-error.1.once=on";
    let (daemon, mut frontend, mut qmp) = serve(dir.path(), "raw", rules)?;
    let queue = frontend.queues.first_mut().ok_or("no queue")?;
    let data = [(0, 4096)];
    assert_eq!(queue.run(&Op::write(0, &data))?, OK);
    assert_eq!(queue.run(&Op::flush())?, IOERR);
    let told = qmp.event(is_io_error)?;
    assert_eq!(told["data"], members("write", libc::EIO));
    // By then one that was told would have come: failures are told each second.
    let quiet = Instant::now();
    while quiet.elapsed() < Duration::from_secs(2) {
        assert_eq!(queue.run(&Op::flush())?, IOERR);
    }
    assert_eq!(qmp.pending_events()?.into_iter().find(is_io_error), None);
    // Others are told as ever.
    assert_eq!(queue.run(&Op::read(0, &data))?, IOERR);
    let told = qmp.event(is_io_error)?;
    assert_eq!(told["data"], members("read", libc::EIO));
    qmp.execute("x-clear-sync-error", json!({"device": "e"}))??;
    assert_eq!(queue.run(&Op::flush())?, OK);
    drop(frontend);
    daemon.stop()
}
