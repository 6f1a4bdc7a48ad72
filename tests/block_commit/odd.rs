//! Commits in graphs that are not plain chains, and what a later process makes of their ends.
//!
//! What would be caught: a guest that is put on an image in place of another disk that has been made in
//! the file which it had left; a disk that is laid out in a layer and loses it; a filter that is linked
//! as if it were an image; nodes that nobody reads and that stand in the way; a raw base that ends within
//! a sector and cannot grow; a filter that is shown with the file that it had.

use crate::common::Res;
use crate::common::daemon::{Daemon, Program};
use crate::common::images;
use crate::scene::{Chain, Life};
use serde_json::{Value, json};

/// Turns a guest from `act` to the base.
fn turn(life: &mut Life) -> Res<()> {
    life.run("block-commit", json!({"device": "disk", "job-id": "j"}))?;
    life.state("ready")?;
    life.run("block-job-complete", json!({"device": "j"}))?;
    life.end().map(drop)
}

fn node(life: &mut Life, name: &str) -> Res<Value> {
    let nodes = life.run("query-named-block-nodes", json!({}))?;
    let nodes = nodes.as_array().ok_or("no list")?;
    let found = nodes.iter().find(|node| node["node-name"] == name);
    Ok(found.ok_or("no such node")?.clone())
}

#[test]
fn another_disk_in_the_file_that_a_guest_has_left_is_not_taken_for_it() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [9; 4])?;
    let state = images::text(dir.path())?.to_owned();
    let recorded = ["--state", state.as_str()];
    let mut life = Life::begin(&chain, &recorded)?;
    let before = life.read_all()?;
    turn(&mut life)?;
    life.daemon.stop()?;
    // As it was left, it is known to be out of date.
    let mut life = Life::begin(&chain, &recorded)?;
    assert!(life.read_all()? == before);
    let exports = life.run("query-block-exports", json!({}))?;
    assert_eq!(exports[0]["node-name"], "base");
    life.daemon.stop()?;
    // The same file, and another disk.
    let (act, base) = (chain.path("act"), chain.path("base"));
    images::create(&act, 9 * 65536, "compat=1.1", Some((&base, "qcow2")))?;
    let refused = Life::begin(&chain, &recorded);
    let text = match refused {
        Ok(_) => return Err("it is served".into()),
        Err(error) => error.to_string(),
    };
    assert!(text.contains("has been changed since"), "{text}");
    // Options that name the base alone have learnt of it.
    let socket = dir.path().join("vhost.sock");
    let _ = std::fs::remove_file(&socket);
    let node = format!(
        "driver=qcow2,node-name=base,file.driver=file,file.filename={}",
        base.display()
    );
    let export = format!(
        "type=vhost-user-blk,id=disk,node-name=base,addr.type=unix,addr.path={},writable=on",
        socket.display()
    );
    let words = ["--blockdev", &node, "--export", &export];
    let args: Vec<String> = words
        .iter()
        .chain(&recorded)
        .map(|word| (*word).to_owned())
        .collect();
    let mut daemon = Daemon::start(&Program::under_test(), &args, dir.path(), None)?;
    drop(daemon.connect(&socket, 1, 64, 65536)?);
    daemon.stop()?;
    let mut life = Life::begin(&chain, &recorded)?;
    let exports = life.run("query-block-exports", json!({}))?;
    assert_eq!(exports[0]["node-name"], "act");
    life.daemon.stop()?;
    Ok(())
}

#[test]
fn a_disk_that_others_are_laid_out_in_is_not_committed() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [9; 4])?;
    let inner = "driver=raw,node-name=inner,file=act";
    let filter = "driver=copy-on-read,node-name=F,file=act";
    let mut life = Life::begin(&chain, &["--blockdev", inner, "--blockdev", filter])?;
    for (device, expected) in [
        ("disk", "Need a root block node"),
        ("F", "is laid out in its disk"),
    ] {
        let refused = life
            .qmp
            .execute("block-commit", json!({"device": device, "job-id": "j"}))?;
        let text = refused.err().ok_or("it is committed")?.to_string();
        assert!(text.contains(expected), "{device}: {text}");
    }
    life.daemon.stop()?;
    Ok(())
}

#[test]
fn the_image_over_the_layers_may_be_under_a_filter() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let mut chain = Chain::create(dir.path(), "qcow2", [9; 4])?;
    chain.filter = true;
    let mut life = Life::begin(&chain, &[])?;
    let before = life.read_all()?;
    life.commit(json!({"top-node": "mid", "base-node": "base"}))?;
    let base = chain.path("base").display().to_string();
    assert_eq!(node(&mut life, "top")?["backing_file"], base.as_str());
    assert!(life.read_all()? == before);
    // A second one finds the chain as it is now.
    life.commit(json!({"top-node": "G", "base-node": "base"}))?;
    assert!(life.read_all()? == before);
    life.daemon.stop()?;
    assert_eq!(chain.backing("act")?.as_deref(), Some(base.as_str()));
    assert!(chain.contents("act")? == before);
    Ok(())
}

#[test]
fn nodes_that_nobody_reads_are_not_in_the_way() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [9; 4])?;
    let mut life = Life::begin(&chain, &[])?;
    let before = life.read_all()?;
    life.commit(json!({"top-node": "mid", "base-node": "base"}))?;
    life.commit(json!({"top-node": "top", "base-node": "base"}))?;
    turn(&mut life)?;
    assert!(life.read_all()? == before);
    life.daemon.stop()?;
    assert!(chain.contents("base")? == before);

    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [9; 4])?;
    let mut life = Life::begin(&chain, &[])?;
    let before = life.read_all()?;
    let onto_mid = json!({"device": "disk", "job-id": "j", "base-node": "mid"});
    life.run("block-commit", onto_mid)?;
    life.state("ready")?;
    life.run("block-job-complete", json!({"device": "j"}))?;
    life.end()?;
    // Nodes over the guest's layer go first, as in QEMU.
    for left in ["act", "top"] {
        life.run("blockdev-del", json!({"node-name": left}))?;
    }
    turn(&mut life)?;
    assert!(life.read_all()? == before);
    life.daemon.stop()?;
    assert!(chain.contents("base")? == before);
    Ok(())
}

#[test]
fn a_raw_base_that_ends_within_a_sector_grows() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "raw", [9, 9, 9, 4])?;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(chain.path("base"))?;
    file.set_len(3 * 65536 + 100)?;
    drop(file);
    let mut life = Life::begin(&chain, &[])?;
    let before = life.read_all()?;
    turn(&mut life)?;
    assert!(life.read_all()? == before);
    life.daemon.stop()?;
    assert!(chain.contents("base")? == before);
    Ok(())
}

#[test]
fn a_filter_is_shown_with_the_file_that_it_has() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [9; 4])?;
    let filter = "driver=copy-on-read,node-name=F,file=act";
    let mut life = Life::begin(&chain, &["--blockdev", filter])?;
    life.run("block-commit", json!({"device": "F", "job-id": "j"}))?;
    life.state("ready")?;
    life.run("block-job-complete", json!({"device": "j"}))?;
    life.end()?;
    let base = chain.path("base").display().to_string();
    let file = format!(
        "json:{{\"driver\": \"copy-on-read\", \"file\": {{\"driver\": \"qcow2\", \"file\": \
         {{\"driver\": \"file\", \"filename\": \"{base}\"}}}}}}"
    );
    assert_eq!(node(&mut life, "F")?["file"], file.as_str());
    let exports = life.run("query-block-exports", json!({}))?;
    assert_eq!(exports[0]["node-name"], "base");
    life.daemon.stop()?;
    Ok(())
}
