//! A daemon that is killed and started again with the same words, and what its guest reads then.
//!
//! What would be caught: a chain that comes back as the command line has it and not as a stream has
//! left it, where discarded clusters show a base that was streamed away; layers that are taken off
//! though no stream has ended; a failed start that has changed something.

mod common;

use common::Res;
use common::daemon::{Daemon, Program, Setup};
use common::frontend::{self, Frontend, OK, Op, Segment};
use common::images;
use common::qmp::Qmp;
use common::stamp::SECTOR;
use serde_json::json;
use std::path::Path;

const DISK: u64 = 1 << 20;
const CLUSTER: usize = 64 << 10;
const SECTORS: u32 = (CLUSTER / SECTOR) as u32;
/// What each layer is full of, the guest's first; that one has nothing of its own.
const BYTES: [u8; 4] = [0, 0x33, 0x22, 0x11];

/// Four named layers, the guest's on top, and a folder for the state.
fn bed(dir: &Path) -> Res<Setup> {
    let mut layers = Vec::new();
    for (depth, byte) in BYTES.iter().enumerate().rev() {
        let path = dir.join(format!("layer{depth}.qcow2"));
        let below = layers
            .first()
            .map(|(path, format): &(std::path::PathBuf, &'static str)| (path.clone(), *format));
        images::create(
            &path,
            DISK,
            "compat=1.1",
            below.as_ref().map(|(p, f)| (p.as_path(), *f)),
        )?;
        if *byte != 0 {
            // The lower it is, the more of it is there: each has something that no other one hides.
            let len = (depth as u64) * DISK / 4;
            let write = format!("write -q -P {byte} 0 {len}");
            images::run(
                "qemu-io",
                &["-f", "qcow2", "-c", &write, images::text(&path)?],
            )?;
        }
        layers.insert(0, (path, "qcow2"));
    }
    let mut setup = Setup::new(dir, &layers);
    let state = dir.join("state");
    std::fs::create_dir(&state)?;
    setup.extra = vec!["--state".to_owned(), images::text(&state)?.to_owned()];
    Ok(setup)
}

struct Life {
    daemon: Daemon,
    guest: Frontend,
    qmp: Qmp,
}

impl Life {
    fn begin(setup: &Setup, dir: &Path) -> Res<Self> {
        let mut daemon = setup.start(&Program::under_test(), dir, None)?;
        let guest = daemon.connect(&setup.socket, 1, 64, CLUSTER)?;
        let qmp = daemon.qmp(setup.qmp.as_ref().ok_or("no control socket")?)?;
        Ok(Life { daemon, guest, qmp })
    }

    /// Dies, and the locks on its images with it.
    fn kill(mut self, setup: &Setup) -> Res<()> {
        self.daemon.kill()?;
        drop((self.guest, self.qmp));
        for (path, _) in &setup.layers {
            images::wait_unlocked(path)?;
        }
        Ok(())
    }

    fn stream(&mut self, arguments: serde_json::Value) -> Res<()> {
        self.qmp.execute("block-stream", arguments)??;
        let end = self.qmp.job_end("j")?;
        assert_eq!(end["event"], "BLOCK_JOB_COMPLETED");
        assert!(end["data"].get("error").is_none(), "{end}");
        Ok(())
    }

    /// What a cluster is full of.
    fn read(&mut self, cluster: u64) -> Res<u8> {
        let sector = cluster * u64::from(SECTORS);
        assert_eq!(
            self.guest.queues[0].run(&Op::read(sector, &[(0, CLUSTER)]))?,
            OK
        );
        let mut bytes = vec![0; CLUSTER];
        self.guest.memory.read(0, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        Ok(bytes[0])
    }

    fn discard(&mut self, cluster: u64) -> Res<()> {
        let segment = Segment {
            sector: cluster * u64::from(SECTORS),
            count: SECTORS,
            flags: 0,
        };
        assert_eq!(
            self.guest.queues[0].run(&Op::ranges(frontend::DISCARD, &[segment]))?,
            OK
        );
        assert_eq!(self.guest.queues[0].run(&Op::flush())?, OK);
        Ok(())
    }
}

/// What a cluster of the untouched disk is full of: of the last layer three quarters are there,
/// of the one above it two.
fn untouched(cluster: u64) -> u8 {
    BYTES[(cluster / 4 + 1).min(3) as usize] * u8::from(cluster < 12)
}

fn is_untouched(life: &mut Life) -> Res<()> {
    for cluster in 0..16 {
        assert_eq!(life.read(cluster)?, untouched(cluster), "cluster {cluster}");
    }
    Ok(())
}

#[test]
fn discards_after_a_stream_show_no_base_to_the_next_process() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let setup = bed(dir.path())?;
    let mut life = Life::begin(&setup, dir.path())?;
    is_untouched(&mut life)?;
    life.stream(json!({"device": "disk", "job-id": "j"}))?;
    life.discard(0)?;
    life.kill(&setup)?;
    for _ in 0..2 {
        let mut life = Life::begin(&setup, dir.path())?;
        assert_eq!(life.read(0)?, 0, "a layer that was streamed away");
        life.discard(5)?;
        assert_eq!(life.read(5)?, 0, "a layer that was streamed away");
        for cluster in (1..16).filter(|cluster| *cluster != 5) {
            assert_eq!(life.read(cluster)?, untouched(cluster), "cluster {cluster}");
        }
        life.kill(&setup)?;
    }
    // Not even the files are needed any more.
    for (path, _) in setup.layers.iter().skip(1) {
        std::fs::remove_file(path)?;
    }
    let mut daemon = setup.start(&Program::under_test(), dir.path(), None)?;
    let mut guest = daemon.connect(&setup.socket, 1, 64, CLUSTER)?;
    assert_eq!(guest.queues[0].run(&Op::read(0, &[(0, CLUSTER)]))?, OK);
    let mut bytes = vec![1; CLUSTER];
    guest.memory.read(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0));
    Ok(())
}

#[test]
fn after_a_part_was_streamed_the_base_is_all_that_is_below() -> Res<()> {
    for words in [json!({"base-node": "layer3"}), json!({"bottom": "layer2"})] {
        let dir = tempfile::tempdir()?;
        let setup = bed(dir.path())?;
        let mut life = Life::begin(&setup, dir.path())?;
        let mut arguments = json!({"device": "disk", "job-id": "j"});
        for (key, value) in words.as_object().ok_or("no words")? {
            arguments[key] = value.clone();
        }
        life.stream(arguments)?;
        life.kill(&setup)?;
        let mut life = Life::begin(&setup, dir.path())?;
        is_untouched(&mut life)?;
        let nodes = life
            .qmp
            .execute("query-named-block-nodes", json!({"flat": true}))??;
        let top = nodes.as_array().into_iter().flatten();
        let mut top = top.filter(|node| node["node-name"] == "layer0");
        let children = top.next().ok_or("no layer0")?["children"].clone();
        let below = json!({"child": "backing", "node-name": "layer3"});
        let mut children = children.as_array().into_iter().flatten();
        assert!(children.any(|child| *child == below), "what is under it");
        // With something under it, an image keeps zeros in mind.
        life.discard(0)?;
        assert_eq!(life.read(0)?, 0);
        life.kill(&setup)?;
    }
    Ok(())
}

#[test]
fn a_lower_layer_that_took_in_those_below_it_stands_alone() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let mut setup = bed(dir.path())?;
    let mut life = Life::begin(&setup, dir.path())?;
    // Named read-only it is not for jobs.
    let refused = life
        .qmp
        .execute("block-stream", json!({"device": "layer1", "job-id": "j"}))?;
    assert!(refused.is_err());
    life.kill(&setup)?;
    // Only the two upper ones are named: what is below them comes from a header.
    setup.layers.truncate(1);
    let mut life = Life::begin(&setup, dir.path())?;
    let nodes = life
        .qmp
        .execute("query-named-block-nodes", json!({"flat": true}))??;
    let lower = dir.path().join("layer1.qcow2");
    let lower = nodes
        .as_array()
        .into_iter()
        .flatten()
        .find(|node| node["file"] == lower.display().to_string() && node["drv"] == "qcow2");
    let lower = lower.ok_or("no layer1")?["node-name"].clone();
    life.stream(json!({"device": lower, "job-id": "j"}))?;
    life.kill(&setup)?;
    for gone in ["layer2.qcow2", "layer3.qcow2"] {
        std::fs::remove_file(dir.path().join(gone))?;
    }
    let mut life = Life::begin(&setup, dir.path())?;
    is_untouched(&mut life)?;
    life.kill(&setup)
}

#[test]
fn layers_stay_where_no_stream_has_ended() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let setup = bed(dir.path())?;
    let mut life = Life::begin(&setup, dir.path())?;
    let arguments = json!({"device": "disk", "job-id": "j", "auto-finalize": false});
    life.qmp.execute("block-stream", arguments)??;
    life.qmp
        .event(|event| event["event"] == "BLOCK_JOB_PENDING")?;
    life.kill(&setup)?;
    let mut life = Life::begin(&setup, dir.path())?;
    is_untouched(&mut life)?;
    let finalize = |life: &mut Life| life.qmp.execute("job-finalize", json!({"id": "j"}));
    if finalize(&mut life)?.is_err() {
        // It has not come so far again.
        life.qmp
            .event(|event| event["event"] == "BLOCK_JOB_PENDING")?;
        finalize(&mut life)??;
    }
    life.qmp.job_end("j")?;
    life.discard(0)?;
    life.kill(&setup)?;
    let mut life = Life::begin(&setup, dir.path())?;
    assert_eq!(life.read(0)?, 0);
    life.kill(&setup)
}
