//! Layers that are `read-only` for guests, as managers name them: jobs write them all the same, and a
//! guest that has moved to one goes on there.

use crate::common::Res;
use crate::scene::{CLUSTER, Chain, Life, NODES};
use serde_json::json;

/// How the layers under the guest's are named.
const WAYS: [&str; 2] = [
    "read-only=on,file.read-only=off,file.auto-read-only=on",
    "read-only=on,file.auto-read-only=on,file.node-name=file-of-NODE",
];

fn chain_of(dir: &std::path::Path, way: &'static str) -> Res<Chain> {
    let mut chain = Chain::create(dir, "qcow2", [24; 4])?;
    chain.lower = way;
    Ok(chain)
}

/// Whether each node is read-only, the guest's first.
fn read_only(life: &mut Life) -> Res<Vec<bool>> {
    let nodes = life.run("query-named-block-nodes", json!({"flat": true}))?;
    let nodes = nodes.as_array().ok_or("no list")?;
    let is_read_only = |name: &&str| {
        let node = nodes.iter().find(|node| node["node-name"] == *name);
        node.is_some_and(|node| node["ro"] == true)
    };
    Ok(NODES.iter().map(is_read_only).collect())
}

#[test]
fn jobs_write_layers_that_guests_may_not() -> Res<()> {
    for way in WAYS {
        let dir = tempfile::tempdir()?;
        let chain = chain_of(dir.path(), way)?;
        let expected = chain.contents("act")?;
        let mut life = Life::begin(&chain, &[])?;
        life.commit(json!({"top-node": "mid", "base-node": "base"}))?;
        assert_eq!(read_only(&mut life)?, [false, true, true, true], "{way}");
        life.run("block-stream", json!({"device": "top", "job-id": "j"}))?;
        life.end()?;
        assert_eq!(read_only(&mut life)?, [false, true, true, true], "{way}");
        let path = chain.path("top").display().to_string();
        let arguments = json!({"device": "disk", "image-node-name": "act", "backing-file": path});
        life.run("change-backing-file", arguments)?;
        // Guests still may not.
        let addr = json!({"type": "unix", "path": dir.path().join("other.sock")});
        let export = json!({"type": "vhost-user-blk", "id": "other", "node-name": "base",
            "writable": true, "addr": addr});
        let refusal = life.qmp.execute("block-export-add", export)?.unwrap_err();
        assert_eq!(refusal.desc, "Cannot export read-only node as writable");
        assert!(life.read_all()? == expected, "{way}");
        life.daemon.stop()?;
        assert!(chain.contents("act")? == expected, "{way}");
        chain.check()?;
    }
    Ok(())
}

#[test]
fn a_guest_goes_on_on_a_base_that_was_read_only() -> Res<()> {
    for way in WAYS {
        let dir = tempfile::tempdir()?;
        let chain = chain_of(dir.path(), way)?;
        let mut expected = chain.contents("act")?;
        let state = dir.path().join("state");
        std::fs::create_dir(&state)?;
        let words = ["--state", state.to_str().ok_or("no text")?];
        let mut life = Life::begin(&chain, &words)?;
        life.run("block-commit", json!({"device": "disk", "job-id": "j"}))?;
        life.qmp
            .event(|event| event["event"] == "BLOCK_JOB_READY")?;
        life.run("block-job-complete", json!({"device": "j"}))?;
        life.end()?;
        // Also in the next process, with the words of before.
        for byte in [0xee, 0xdd] {
            life.write(3, byte)?;
            let flushed = life.guest.queues[0].run(&crate::common::frontend::Op::flush())?;
            assert_eq!(flushed, crate::common::frontend::OK);
            let cluster = 3 * CLUSTER as usize..4 * CLUSTER as usize;
            expected[cluster].fill(byte);
            assert!(life.read_all()? == expected, "{way}");
            assert!(!read_only(&mut life)?[3], "{way}");
            life.kill(&chain)?;
            life = Life::begin(&chain, &words)?;
        }
        assert!(life.read_all()? == expected, "{way}");
        life.daemon.stop()?;
        assert!(chain.contents("base")? == expected, "{way}");
    }
    Ok(())
}
