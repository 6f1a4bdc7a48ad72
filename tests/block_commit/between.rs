//! Commits of layers that lie between the guest's and a base.

use crate::common::Res;
use crate::scene::{Chain, Life};
use serde_json::{Value, json};

/// Numbers of clusters of the images, the guest's first.
const SIZES: [[u64; 4]; 5] = [
    [24, 24, 24, 24],
    // A base that has to grow.
    [24, 20, 16, 10],
    // One with an end of its own, which shorter layers hide.
    [24, 14, 18, 30],
    [12, 20, 9, 16],
    [24, 9, 20, 24],
];

#[test]
fn a_commit_between_layers_changes_nothing_that_is_read() -> Res<()> {
    for base in ["qcow2", "raw"] {
        for sizes in SIZES {
            let dir = tempfile::tempdir()?;
            let chain = Chain::create(dir.path(), base, sizes)?;
            let expected = chain.contents("act")?;
            let mut life = Life::begin(&chain, &[])?;
            assert!(life.read_all()? == expected, "{base} {sizes:?}: before");
            life.commit(json!({"top-node": "top"}))?;
            assert!(life.read_all()? == expected, "{base} {sizes:?}: after");
            let base_file = chain.path("base").display().to_string();
            assert_eq!(chain.backing("act")?, Some(base_file));
            // The layers are no longer needed by anybody, not even by QEMU.
            for node in ["top", "mid"] {
                std::fs::rename(chain.path(node), dir.path().join(node))?;
            }
            life.write(1, 0xee)?;
            life.daemon.stop()?;
            let mut expected = expected;
            expected[65536..131_072].fill(0xee);
            assert!(chain.contents("act")? == expected, "{base} {sizes:?}: QEMU");
            for node in ["top", "mid"] {
                std::fs::rename(dir.path().join(node), chain.path(node))?;
            }
            chain.check()?;
        }
    }
    Ok(())
}

#[test]
fn parts_of_a_chain_are_committed_one_after_the_other() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [24; 4])?;
    let expected = chain.contents("act")?;
    let mut life = Life::begin(&chain, &[])?;
    // By file names: of the layer, and as the header above it has it.
    let mid = chain.path("mid").display().to_string();
    let top = chain.path("top").display().to_string();
    life.commit(json!({"top": top, "base": mid, "backing-file": "mid.img"}))?;
    assert_eq!(chain.backing("act")?, Some(mid));
    assert!(life.read_all()? == expected);
    life.commit(json!({"top-node": "mid", "base-node": "base", "speed": 1 << 30}))?;
    assert!(life.read_all()? == expected);
    life.daemon.stop()?;
    assert!(chain.contents("act")? == expected);
    chain.check()
}

#[test]
fn its_states_and_events_are_those_of_qemu() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [24; 4])?;
    let mut life = Life::begin(&chain, &[])?;
    life.run(
        "block-commit",
        json!({"device": "disk", "top-node": "top", "auto-finalize": false,
            "auto-dismiss": false, "filter-node-name": "filter"}),
    )?;
    life.qmp
        .event(|event| event["event"] == "BLOCK_JOB_PENDING")?;
    let jobs = life.run("query-block-jobs", json!({}))?;
    let expected = json!({"device": "disk", "type": "commit", "status": "pending",
        "len": 24 << 16, "offset": 24 << 16, "ready": false, "auto-finalize": false});
    for (key, value) in expected.as_object().ok_or("no members")? {
        assert_eq!(jobs[0][key], *value, "{key}");
    }
    let text = life.run(
        "human-monitor-command",
        json!({"command-line": "info block-jobs"}),
    )?;
    let expected = "Type commit, device disk: Completed 1572864 of 1572864 bytes, speed limit 0 \
                    bytes/s\r\n";
    assert_eq!(text, expected);
    let busy = |life: &mut Life, command: &str, arguments: Value| -> Res<String> {
        Ok(life.qmp.execute(command, arguments)?.unwrap_err().desc)
    };
    let in_use = |node: &str, kind: &str| {
        format!("Node '{node}' is busy: block device is in use by block job: {kind}")
    };
    let second = json!({"device": "act", "job-id": "k", "top-node": "mid"});
    assert_eq!(
        busy(&mut life, "block-commit", second)?,
        in_use("mid", "commit")
    );
    let stream = json!({"device": "act", "job-id": "k"});
    assert_eq!(
        busy(&mut life, "block-stream", stream)?,
        in_use("act", "commit")
    );
    life.run("job-finalize", json!({"id": "disk"}))?;
    let names = ["BLOCK_JOB_COMPLETED", "concluded"];
    for name in names {
        life.qmp
            .event(|event| event["event"] == name || event["data"]["status"] == name)?;
    }
    life.run("job-dismiss", json!({"id": "disk"}))?;
    life.daemon.stop()
}

#[test]
fn what_is_cancelled_leaves_the_chain_as_it_was() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [24, 24, 24, 10])?;
    let expected = chain.contents("act")?;
    let mut life = Life::begin(&chain, &[])?;
    let backing = chain.backing("act")?;
    for _ in 0..2 {
        life.run(
            "block-commit",
            json!({"device": "disk", "job-id": "j", "top-node": "top", "auto-finalize": false}),
        )?;
        life.state("pending")?;
        life.run("block-job-cancel", json!({"device": "j"}))?;
        let end = life.qmp.job_end("j")?;
        assert_eq!(end["event"], "BLOCK_JOB_CANCELLED");
    }
    assert!(life.read_all()? == expected);
    assert_eq!(chain.backing("act")?, backing);
    life.daemon.stop()?;
    assert!(chain.contents("act")? == expected);
    chain.check()
}

#[test]
fn the_next_process_goes_on_with_it() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [24, 24, 24, 10])?;
    let expected = chain.contents("act")?;
    let state = dir.path().join("state");
    std::fs::create_dir(&state)?;
    let state = ["--state", state.to_str().ok_or("not text")?];
    let mut life = Life::begin(&chain, &state)?;
    // It does not get far.
    life.run(
        "block-commit",
        json!({"device": "disk", "job-id": "j", "top-node": "top", "speed": 1}),
    )?;
    life.kill(&chain)?;
    let mut life = Life::begin(&chain, &state)?;
    let jobs = life.run("query-block-jobs", json!({}))?;
    assert_eq!(jobs[0]["type"], "commit");
    assert!(life.read_all()? == expected);
    life.run("block-job-set-speed", json!({"device": "j", "speed": 0}))?;
    life.end()?;
    life.kill(&chain)?;
    // The command line still has the layers; what was committed stays so.
    let mut life = Life::begin(&chain, &state)?;
    let nodes = life.run("query-named-block-nodes", json!({"flat": true}))?;
    let mut nodes = nodes.as_array().into_iter().flatten();
    let act = nodes
        .find(|node| node["node-name"] == "act")
        .ok_or("no act")?;
    let below = json!({"child": "backing", "node-name": "base"});
    let mut children = act["children"].as_array().into_iter().flatten();
    assert!(children.any(|child| *child == below), "what is under it");
    assert!(life.read_all()? == expected);
    life.daemon.stop()?;
    assert!(chain.contents("act")? == expected);
    chain.check()
}
