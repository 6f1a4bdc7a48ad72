//! The commands.

use serde_json::{Value, json};

use crate::common::Res;
use crate::scene::{DISK, Scene, file};
use crate::{Case, fail_each};

fn plain(command: &'static str, arguments: Value) -> Case {
    Case {
        before: Vec::new(),
        command,
        arguments,
        job: None,
    }
}

impl Case {
    fn after(mut self, command: &'static str, arguments: Value) -> Self {
        self.before.push((command, arguments));
        self
    }

    fn with_job(mut self, job: &'static str) -> Self {
        self.job = Some(job);
        self.arguments["job-id"] = json!(job);
        self
    }
}

fn qcow2(scene: &Scene, name: &str, image: &str) -> Res<Value> {
    Ok(json!({"driver": "qcow2", "node-name": name, "file": file(&scene.file(image)?)}))
}

fn export(scene: &Scene, id: &str, node: &str) -> Res<Value> {
    let addr = json!({"type": "unix", "path": scene.socket(&format!("{id}.sock"))?});
    Ok(
        json!({"type": "vhost-user-blk", "id": id, "node-name": node, "writable": true,
            "addr": addr}),
    )
}

#[test]
fn blockdev_add() -> Res<()> {
    fail_each(|scene| Ok(plain("blockdev-add", qcow2(scene, "o", "other")?)))
}

#[test]
fn blockdev_add_with_layers_in_place() -> Res<()> {
    fail_each(|scene| {
        let mut top = qcow2(scene, "n", "raw")?;
        top["driver"] = json!("raw");
        let mut over = qcow2(scene, "o", "other")?;
        over["backing"] = top;
        Ok(plain("blockdev-add", over))
    })
}

#[test]
fn blockdev_del() -> Res<()> {
    fail_each(|scene| {
        let case = plain("blockdev-del", json!({"node-name": "o"}));
        Ok(case.after("blockdev-add", qcow2(scene, "o", "other")?))
    })
}

#[test]
fn blockdev_reopen() -> Res<()> {
    fail_each(|scene| {
        let mut over = qcow2(scene, "o", "other")?;
        let mut now = over.clone();
        (over["backing"], now["backing"]) = (json!(null), json!("base"));
        now["read-only"] = json!(true);
        let case = plain("blockdev-reopen", json!({"options": [now]}));
        Ok(case.after("blockdev-add", over))
    })
}

#[test]
fn block_export_add() -> Res<()> {
    fail_each(|scene| {
        let case = plain("block-export-add", export(scene, "e", "o")?);
        Ok(case.after("blockdev-add", qcow2(scene, "o", "other")?))
    })
}

#[test]
fn object_add() -> Res<()> {
    fail_each(|_| {
        Ok(plain(
            "object-add",
            json!({"qom-type": "iothread", "id": "io"}),
        ))
    })
}

#[test]
fn change_backing_file() -> Res<()> {
    fail_each(|scene| {
        let below = scene.file("mid")?;
        let arguments = json!({"device": "top", "image-node-name": "top", "backing-file": below});
        Ok(plain("change-backing-file", arguments))
    })
}

#[test]
fn block_resize_to_more() -> Res<()> {
    // Another table of mappings as well.
    let arguments = json!({"node-name": "top", "size": DISK << 14});
    fail_each(|_| Ok(plain("block_resize", arguments.clone())))
}

#[test]
fn block_resize_to_less() -> Res<()> {
    fail_each(|scene| {
        let case = plain("block_resize", json!({"node-name": "o", "size": DISK / 2}));
        let case = case.after("blockdev-add", qcow2(scene, "o", "other")?);
        Ok(case.after("block_resize", json!({"node-name": "o", "size": DISK * 2})))
    })
}

#[test]
fn block_resize_of_a_file() -> Res<()> {
    fail_each(|scene| {
        let case = plain("block_resize", json!({"node-name": "r", "size": DISK * 2}));
        let mut raw = qcow2(scene, "r", "raw")?;
        raw["driver"] = json!("raw");
        Ok(case.after("blockdev-add", raw))
    })
}

#[test]
fn blockdev_snapshot() -> Res<()> {
    fail_each(|scene| {
        let mut over = qcow2(scene, "n", "new")?;
        over["backing"] = json!(null);
        let case = plain("blockdev-snapshot", json!({"node": "top", "overlay": "n"}));
        Ok(case.after("blockdev-add", over))
    })
}

fn snapshot_sync(scene: &Scene) -> Res<Value> {
    let file = scene.file("made")?;
    Ok(
        json!({"node-name": "top", "snapshot-file": file, "snapshot-node-name": "made",
        "format": "qcow2"}),
    )
}

#[test]
fn blockdev_snapshot_sync() -> Res<()> {
    fail_each(|scene| Ok(plain("blockdev-snapshot-sync", snapshot_sync(scene)?)))
}

#[test]
fn blockdev_snapshot_internal_sync() -> Res<()> {
    let arguments = json!({"device": "disk", "name": "s"});
    fail_each(|_| Ok(plain("blockdev-snapshot-internal-sync", arguments.clone())))
}

#[test]
fn blockdev_snapshot_delete_internal_sync() -> Res<()> {
    let arguments = json!({"device": "disk", "name": "s"});
    fail_each(|_| {
        let case = plain("blockdev-snapshot-delete-internal-sync", arguments.clone());
        Ok(case.after("blockdev-snapshot-internal-sync", arguments.clone()))
    })
}

#[test]
fn transaction() -> Res<()> {
    fail_each(|scene| {
        let action = |kind: &str, data: Value| json!({"type": kind, "data": data});
        let actions = json!([
            action(
                "blockdev-snapshot-internal-sync",
                json!({"device": "other", "name": "s"})
            ),
            action("blockdev-snapshot-sync", snapshot_sync(scene)?),
        ]);
        let case = plain("transaction", json!({"actions": actions}));
        let case = case.after("blockdev-add", qcow2(scene, "o", "other")?);
        Ok(case.after("block-export-add", export(scene, "other", "o")?))
    })
}

#[test]
fn block_stream() -> Res<()> {
    fail_each(|_| Ok(plain("block-stream", json!({"device": "top"})).with_job("j")))
}

#[test]
fn block_commit_between_layers() -> Res<()> {
    let arguments = json!({"device": "top", "top-node": "mid", "base-node": "base"});
    fail_each(|_| Ok(plain("block-commit", arguments.clone()).with_job("j")))
}

#[test]
fn block_commit_of_the_active_layer() -> Res<()> {
    let arguments = json!({"device": "top", "base-node": "mid"});
    fail_each(|_| Ok(plain("block-commit", arguments.clone()).with_job("j")))
}

#[test]
fn blockdev_create() -> Res<()> {
    fail_each(|scene| {
        let options = json!({"driver": "file", "filename": scene.file("made")?, "size": 0});
        Ok(plain("blockdev-create", json!({"options": options})).with_job("j"))
    })
}
