//! Commits of the layer that the guest writes: it goes on on the base.

use crate::common::Res;
use crate::common::frontend::{self, OK, Op, PATIENCE, Segment};
use crate::common::rng::Rng;
use crate::common::stamp::SECTOR;
use crate::scene::{CLUSTER, Chain, Life};
use serde_json::{Value, json};
use std::time::Instant;

/// Requests in flight.
const DEPTH: usize = 8;
/// Bytes of a request's part of the guest's memory.
const PART: usize = 8192;

/// A guest that writes all over its disk, and knows what is there.
struct Writer {
    rng: Rng,
    disk: Vec<u8>,
}

impl Writer {
    /// Carries out some requests at once, each on bytes of its own.
    fn burst(&mut self, life: &mut Life) -> Res<()> {
        let sectors = self.disk.len() / SECTOR;
        let mut used: Vec<(usize, usize)> = Vec::new();
        let queue = &mut life.guest.queues[0];
        for slot in 0..DEPTH {
            let at = self.rng.below(sectors as u64) as usize;
            let count = 1 + self.rng.below((PART / SECTOR) as u64) as usize;
            let count = count.min(sectors - at);
            if used
                .iter()
                .any(|(start, end)| at < *end && *start < at + count)
            {
                continue;
            }
            used.push((at, at + count));
            let bytes = at * SECTOR..(at + count) * SECTOR;
            if self.rng.below(5) == 0 {
                let segment = Segment {
                    sector: at as u64,
                    count: count as u32,
                    flags: self.rng.below(2) as u32,
                };
                let op = [segment];
                queue.submit(&Op::ranges(frontend::WRITE_ZEROES, &op), slot as u64)?;
                self.disk[bytes].fill(0);
            } else {
                let byte = self.rng.below(255) as u8 + 1;
                let place = slot * PART;
                life.guest.memory.write(place, &vec![byte; bytes.len()]);
                let data = [(place, bytes.len())];
                queue.submit(&Op::write(at as u64, &data), slot as u64)?;
                self.disk[bytes].fill(byte);
            }
        }
        queue.kick()?;
        while queue.in_flight() > 0 {
            if queue.arm() {
                queue.wait()?;
            }
            queue.disarm()?;
            while let Some(done) = queue.pop()? {
                if done.status != OK {
                    return Err(format!("a write ended with {}", done.status).into());
                }
            }
        }
        Ok(())
    }

    /// Writes until an event of this name has come.
    fn until(&mut self, life: &mut Life, name: &str) -> Res<Value> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            let events = life.qmp.pending_events()?;
            if let Some(event) = events.iter().find(|event| event["event"] == name) {
                return Ok(event.clone());
            }
            self.burst(life)?;
        }
        Err(format!("no {name} came: {}", life.daemon.log()).into())
    }
}

fn writer(life: &mut Life) -> Res<Writer> {
    Ok(Writer {
        rng: Rng::new(3),
        disk: life.read_all()?,
    })
}

fn start(life: &mut Life) -> Res<()> {
    let arguments = json!({"device": "disk", "job-id": "j"});
    life.run("block-commit", arguments).map(drop)
}

/// The node that the export shows.
fn shown(life: &mut Life) -> Res<Value> {
    let exports = life.run("query-block-exports", json!({}))?;
    Ok(exports[0]["node-name"].clone())
}

/// Whether this is the filter of a job that has no name of a client's.
fn is_filter(name: &Value) -> bool {
    name.as_str().is_some_and(|name| name.starts_with("#block"))
}

#[test]
fn a_guest_that_writes_all_the_while_goes_on_on_the_base() -> Res<()> {
    for (base, sizes) in [
        ("qcow2", [24, 24, 24, 24]),
        ("raw", [24, 24, 24, 24]),
        ("qcow2", [40, 20, 30, 10]),
        ("raw", [40, 20, 30, 10]),
    ] {
        let dir = tempfile::tempdir()?;
        let chain = Chain::create(dir.path(), base, sizes)?;
        let mut life = Life::begin(&chain, &[])?;
        let mut writer = writer(&mut life)?;
        start(&mut life)?;
        writer.until(&mut life, "BLOCK_JOB_READY")?;
        for _ in 0..50 {
            writer.burst(&mut life)?;
        }
        life.run("block-job-complete", json!({"device": "j"}))?;
        let end = writer.until(&mut life, "BLOCK_JOB_COMPLETED")?;
        assert_eq!(end["data"].get("error"), None, "{}", life.daemon.log());
        assert_eq!(shown(&mut life)?, "base");
        // The layers are no longer needed by anybody.
        for node in ["act", "top", "mid"] {
            std::fs::remove_file(chain.path(node))?;
        }
        for _ in 0..50 {
            writer.burst(&mut life)?;
        }
        assert!(life.read_all()? == writer.disk, "{base} {sizes:?}");
        let stats = life.run("query-blockstats", json!({}))?;
        assert_eq!(stats[0]["node-name"], "base");
        life.daemon.stop()?;
        assert!(chain.contents("base")? == writer.disk, "{base} {sizes:?}");
        if base == "qcow2" {
            assert!(!crate::common::images::check(&chain.path("base"))?);
        }
    }
    Ok(())
}

#[test]
fn what_is_cancelled_leaves_both_disks_good() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [24, 24, 24, 20])?;
    let mut life = Life::begin(&chain, &[])?;
    let mut writer = writer(&mut life)?;
    // At once, when it is ready, and without giving up the copy.
    for (ready, command, arguments, event) in [
        (
            false,
            "job-cancel",
            json!({"id": "j"}),
            "BLOCK_JOB_CANCELLED",
        ),
        (
            true,
            "job-cancel",
            json!({"id": "j"}),
            "BLOCK_JOB_CANCELLED",
        ),
        (
            true,
            "block-job-cancel",
            json!({"device": "j", "force": true}),
            "BLOCK_JOB_CANCELLED",
        ),
        (
            true,
            "block-job-cancel",
            json!({"device": "j"}),
            "BLOCK_JOB_COMPLETED",
        ),
    ] {
        let mut commit = json!({"device": "disk", "job-id": "j"});
        if !ready {
            commit["speed"] = json!(1);
        }
        life.run("block-commit", commit)?;
        if ready {
            writer.until(&mut life, "BLOCK_JOB_READY")?;
        }
        for _ in 0..20 {
            writer.burst(&mut life)?;
        }
        life.run(command, arguments)?;
        let end = writer.until(&mut life, event)?;
        assert_eq!(end["data"].get("error"), None);
        assert_eq!(shown(&mut life)?, "act");
        for _ in 0..20 {
            writer.burst(&mut life)?;
        }
        assert!(life.read_all()? == writer.disk, "after {command}");
    }
    life.daemon.stop()?;
    assert!(chain.contents("act")? == writer.disk);
    chain.check()
}

#[test]
fn its_states_and_verbs_are_those_of_qemu() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [24; 4])?;
    let mut life = Life::begin(&chain, &[])?;
    let size = 24 * CLUSTER;
    life.run(
        "block-commit",
        json!({"device": "disk", "auto-finalize": false, "auto-dismiss": false, "speed": 1}),
    )?;
    let refusal = life
        .qmp
        .execute("job-complete", json!({"id": "disk"}))?
        .unwrap_err();
    assert_eq!(
        refusal.desc,
        "Job 'disk' in state 'running' cannot accept command verb 'complete'"
    );
    life.run("block-job-set-speed", json!({"device": "disk", "speed": 0}))?;
    life.state("ready")?;
    let ready = life.qmp.event(|_| true)?;
    assert_eq!(ready["event"], "BLOCK_JOB_READY");
    assert_eq!(
        ready["data"],
        json!({"device": "disk", "len": size, "offset": size, "speed": 0, "type": "commit"})
    );
    let job = life.run("query-block-jobs", json!({}))?[0].clone();
    assert_eq!(
        (&job["ready"], &job["status"]),
        (&json!(true), &json!("ready"))
    );
    assert_eq!(job["busy"], false);
    life.run("block-job-pause", json!({"device": "disk"}))?;
    life.state("standby")?;
    life.run("block-job-complete", json!({"device": "disk"}))?;
    life.run("block-job-resume", json!({"device": "disk"}))?;
    for state in ["ready", "waiting", "pending"] {
        life.state(state)?;
    }
    assert!(is_filter(&shown(&mut life)?));
    life.run("job-finalize", json!({"id": "disk"}))?;
    life.state("concluded")?;
    assert_eq!(shown(&mut life)?, "base");
    life.run("job-dismiss", json!({"id": "disk"}))?;
    life.state("null")?;
    // The base is a disk as any other now.
    let refusal = life
        .qmp
        .execute("block-commit", json!({"device": "disk"}))?
        .unwrap_err();
    assert_eq!(refusal.desc, "Need a root block node");
    life.daemon.stop()
}

fn flush(life: &mut Life) -> Res<()> {
    match life.guest.queues[0].run(&Op::flush())? {
        OK => Ok(()),
        status => Err(format!("a flush ended with {status}").into()),
    }
}

#[test]
fn a_killed_daemon_leaves_the_guest_where_it_was() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [24, 24, 24, 20])?;
    let state = dir.path().join("state");
    std::fs::create_dir(&state)?;
    let state = ["--state", state.to_str().ok_or("not text")?];
    let mut life = Life::begin(&chain, &state)?;
    let mut writer = writer(&mut life)?;
    start(&mut life)?;
    writer.until(&mut life, "BLOCK_JOB_READY")?;
    writer.burst(&mut life)?;
    flush(&mut life)?;
    life.kill(&chain)?;
    // It goes on, with a new pass.
    let mut life = Life::begin(&chain, &state)?;
    assert!(life.read_all()? == writer.disk, "killed while it was ready");
    assert!(is_filter(&shown(&mut life)?));
    let is_ready = |life: &mut Life| -> Res<bool> {
        Ok(life.run("query-block-jobs", json!({}))?[0]["ready"] == true)
    };
    let start = Instant::now();
    while !is_ready(&mut life)? {
        assert!(start.elapsed() < PATIENCE, "it is never ready");
        writer.burst(&mut life)?;
    }
    life.run("block-job-complete", json!({"device": "j"}))?;
    let end = writer.until(&mut life, "BLOCK_JOB_COMPLETED")?;
    assert_eq!(end["data"].get("error"), None, "{}", life.daemon.log());
    for _ in 0..2 {
        for _ in 0..20 {
            writer.burst(&mut life)?;
        }
        flush(&mut life)?;
        life.kill(&chain)?;
        // The options still say that the guest's layer is on top.
        life = Life::begin(&chain, &state)?;
        assert_eq!(shown(&mut life)?, "base");
        assert!(life.read_all()? == writer.disk, "killed after the commit");
        assert_eq!(life.run("query-jobs", json!({}))?, json!([]));
    }
    life.daemon.stop()?;
    assert!(chain.contents("base")? == writer.disk);
    Ok(())
}
