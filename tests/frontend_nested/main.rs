//! Images in the disks of images, and raw disks in them: all that is done with a disk in a file,
//! done with a disk in a disk.
//!
//! What would be caught: a request, a job, a query or a failure that stops at the disk in between,
//! or reaches the wrong one of them; a flush that does not reach the file, so that a kill takes what
//! was flushed; a stream that copies holes, or whose end is forgotten by the next process; a journal
//! that promises what the disk below does not keep; images that are closed in the wrong order.

#[path = "../common/mod.rs"]
mod common;
mod scene;

use common::Res;
use common::daemon::Program;
use common::frontend::{IOERR, OK, Op};
use common::images::{self, text};
use common::rng::{self, Rng};
use scene::{Life, Part, SECTOR, SIZE, STACKS, Scene};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Files of these tests, unless they are to be on a tmpfs.
fn folder() -> PathBuf {
    std::env::temp_dir()
}

/// All stacks; with a base, those alone that can be over one.
fn scenes(over_base: bool, folder: &Path) -> impl Iterator<Item = Res<Scene>> {
    let stacks = STACKS.iter();
    let stacks = stacks.filter(move |stack| !over_base || stack[0] == Part::Image);
    stacks.map(move |stack| Scene::new(stack, over_base, folder))
}

fn random() -> Rng {
    let seed = rng::seed_from_environment();
    println!("STRATABLK_SEED={seed}");
    Rng::new(seed)
}

fn stream(life: &mut Life, arguments: Value) -> Res<()> {
    life.qmp.execute("block-stream", arguments)??;
    let end = life.qmp.job_end("j")?;
    assert_eq!(end["event"], "BLOCK_JOB_COMPLETED");
    assert_eq!(end["data"].get("error"), None, "{end}");
    Ok(())
}

#[test]
fn a_guest_has_all_of_its_disk() -> Res<()> {
    let mut rng = random();
    for over_base in [false, true] {
        for scene in scenes(over_base, &folder()) {
            let mut scene = scene?;
            let what = scene.what();
            for _ in 0..2 {
                let mut life = scene.start()?;
                life.read_all(&scene.model, &what)?;
                life.work(&mut scene.model, &mut rng, &what)?;
                life.read_all(&scene.model, &what)?;
                life.stop()?;
                scene.judge()?;
            }
        }
    }
    Ok(())
}

#[test]
fn what_was_read_is_copied_up() -> Res<()> {
    let mut rng = random();
    for scene in scenes(true, &folder()) {
        let mut scene = scene?;
        scene.copies = true;
        let what = scene.what();
        let mut life = scene.start()?;
        life.work(&mut scene.model, &mut rng, &what)?;
        life.read_all(&scene.model, &what)?;
        life.stop()?;
        scene.judge()?;
        assert!(scene.by_qemu(true)? == scene.by_qemu(false)?, "{what}");
    }
    Ok(())
}

/// Whatever was flushed is there after a kill, and all else as it was or as it was written.
#[test]
fn a_kill_takes_nothing_that_was_flushed() -> Res<()> {
    let mut rng = random();
    for over_base in [false, true] {
        for scene in scenes(over_base, &folder()) {
            let mut scene = scene?;
            let what = scene.what();
            for round in 1..4 {
                let mut life = scene.start()?;
                life.read_all(&scene.model, &what)?;
                life.work(&mut scene.model, &mut rng, &what)?;
                life.flush()?;
                let mut later = scene.model.clone();
                life.write(&mut later, 64, 100, round)?;
                life.kill(&scene)?;
                let mut life = scene.start()?;
                let seen = life.read(64, 100)?;
                for (sector, seen) in (64..).zip(seen.chunks(SECTOR)) {
                    if seen != [round; SECTOR] {
                        scene.model.compare(sector, seen, &what);
                    }
                }
                life.write(&mut scene.model, 64, 100, round)?;
                life.flush()?;
                life.kill(&scene)?;
                scene.check(true)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_stream_into_it_ends_for_good() -> Res<()> {
    let mut rng = random();
    for scene in scenes(true, &folder()) {
        let mut scene = scene?;
        let what = scene.what();
        let state = scene.dir.path().join("state");
        fs::create_dir(&state)?;
        scene.words = vec!["--state".into(), text(&state)?.into()];
        let mut life = scene.start()?;
        life.work(&mut scene.model, &mut rng, &what)?;
        stream(&mut life, json!({"device": "disk", "job-id": "j"}))?;
        life.kill(&scene)?;
        // The options still name the base, which is full of something else by now.
        let base = scene.base.clone().ok_or("a base")?;
        fs::write(base, [0xbb; SIZE])?;
        for _ in 0..2 {
            let mut life = scene.start()?;
            life.read_all(&scene.model, &what)?;
            life.work(&mut scene.model, &mut rng, &what)?;
            life.read_all(&scene.model, &what)?;
            life.kill(&scene)?;
        }
        scene.model.compare(0, &scene.by_qemu(true)?, &what);
        scene.check(true)?;
    }
    Ok(())
}

/// Clusters of an image that have data of their own.
fn clusters_of(image: &Path) -> Res<u64> {
    let node = json!({"driver": "qcow2", "backing": null,
        "file": {"driver": "file", "filename": text(image)?}});
    let map = images::qemu_img(&["map", "--output=json", &format!("json:{node}")])?;
    let map: Vec<Value> = serde_json::from_str(&map)?;
    let data = map.iter().filter(|extent| extent["data"] == true);
    Ok(data
        .map(|extent| extent["length"].as_u64().unwrap_or(0))
        .sum::<u64>()
        >> 16)
}

#[test]
fn a_stream_from_it_copies_its_data_and_no_holes() -> Res<()> {
    for scene in scenes(false, &folder()) {
        let mut scene = scene?;
        let what = scene.what();
        let overlay = scene.dir.path().join("overlay");
        images::create(&overlay, SIZE as u64, "cluster_size=64k", None)?;
        let below = scene.node.clone();
        let mut named = below.clone();
        named["node-name"] = json!("below");
        scene.node = json!({"driver": "qcow2", "node-name": "n0", "discard": "unmap",
            "file": {"driver": "file", "node-name": "o", "filename": text(&overlay)?},
            "backing": named});
        let state = scene.dir.path().join("state");
        fs::create_dir(&state)?;
        scene.words = vec!["--state".into(), text(&state)?.into()];
        let before = fs::read(&scene.file)?;
        let mut life = scene.start()?;
        life.read_all(&scene.model, &what)?;
        stream(&mut life, json!({"device": "disk", "job-id": "j"}))?;
        life.read_all(&scene.model, &what)?;
        let nodes = json!({"flat": true});
        let nodes = life.qmp.execute("query-named-block-nodes", nodes)??;
        let names = nodes.as_array().into_iter().flatten();
        let mut names: Vec<_> = names
            .filter_map(|node| node["node-name"].as_str())
            .collect();
        names.sort_unstable();
        assert_eq!(names, ["n0", "o"], "{what}: what nobody needs");
        life.kill(&scene)?;
        assert!(
            fs::read(&scene.file)? == before,
            "{what}: a base was written"
        );
        assert_eq!(clusters_of(&overlay)?, 8, "{what}: holes are copied");
        scene.model.compare(0, &scene.by_qemu(true)?, &what);
        // The options still name what it is no longer over.
        let mut life = scene.start()?;
        life.write(&mut scene.model, 0, 1, 1)?;
        life.read_all(&scene.model, &what)?;
        life.stop()?;
        scene.model.compare(0, &scene.by_qemu(true)?, &what);
    }
    Ok(())
}

/// The image in the file has a journal; those in its disk have none, and say so.
#[test]
fn a_journal_is_for_the_image_in_the_file() -> Res<()> {
    let mut rng = random();
    for scene in scenes(false, Path::new("/dev/shm")) {
        let mut scene = scene?;
        let what = scene.what();
        let journals = scene.dir.path().join("journals");
        fs::create_dir(&journals)?;
        scene.words = vec!["--journal".into(), text(&journals)?.into()];
        let mut life = scene.start()?;
        let images = scene.stack.iter().filter(|part| **part == Part::Image);
        let expected = images.count() - 1;
        let log = life.daemon.log();
        let told = "an image in the disk of another one has no journal";
        assert_eq!(log.matches(told).count(), expected, "{what}: {log}");
        assert_eq!(fs::read_dir(&journals)?.count(), 1, "{what}: journals");
        life.work(&mut scene.model, &mut rng, &what)?;
        if expected == 0 {
            // Nothing is between the guest and that journal.
            life.write(&mut scene.model, 64, 100, 7)?;
        }
        life.kill(&scene)?;
        let mut life = scene.start()?;
        life.read_all(&scene.model, &what)?;
        life.stop()?;
        assert_eq!(fs::read_dir(&journals)?.count(), 0, "{what}: journals");
        scene.judge()?;
    }
    Ok(())
}

/// A sync of the file fails, once: the guest is told so until an operator says otherwise.
#[test]
fn a_failed_flush_reaches_the_guest() -> Res<()> {
    for scene in scenes(false, Path::new("/dev/shm")) {
        let mut scene = scene?;
        let what = scene.what();
        let fail = scene.dir.path().join("fail");
        let source = "tests/frontend_failed_flush/fail_sync.c";
        let names = [("FAIL_SYNC", text(&fail)?)];
        let program = Program::with_library(source, &names, scene.dir.path())?;
        let mut life = scene.start_program(&program)?;
        life.write(&mut scene.model, 0, 8, 7)?;
        life.flush()?;
        fs::write(&fail, "")?;
        assert_eq!(life.run(&Op::flush())?, IOERR, "{what}");
        assert!(!fail.exists(), "{what}: no sync was tried");
        let event = life.qmp.event(|event| event["event"] == "BLOCK_IO_ERROR")?;
        assert_eq!(event["data"]["device"], "disk", "{what}: {event}");
        // The image that is in the file.
        let image = scene.stack.iter().rposition(|part| *part == Part::Image);
        let image = format!("n{}", image.ok_or("no image")?);
        assert_eq!(event["data"]["node-name"], image, "{what}: {event}");
        assert_eq!(
            life.run(&Op::flush())?,
            IOERR,
            "{what}: after one that failed"
        );
        life.write(&mut scene.model, 8, 8, 8)?;
        life.read_all(&scene.model, &what)?;
        let devices = life.qmp.execute("query-block", json!({}))??;
        assert_eq!(devices[0]["io-status"], "failed", "{what}: {devices}");
        life.qmp
            .execute("x-clear-sync-error", json!({"device": "disk"}))??;
        assert_eq!(life.run(&Op::flush())?, OK, "{what}: cleared");
        life.stop()?;
        scene.judge()?;
    }
    Ok(())
}

#[test]
fn an_operator_sees_every_node() -> Res<()> {
    for scene in scenes(false, &folder()) {
        let mut scene = scene?;
        let what = scene.what();
        let mut life = scene.start()?;
        life.write(&mut scene.model, 0, 8, 7)?;
        let flat = json!({"flat": true});
        let nodes = life.qmp.execute("query-named-block-nodes", flat)??;
        let nodes = nodes.as_array().ok_or("no list")?;
        assert_eq!(nodes.len(), scene.stack.len() + 1, "{what}");
        let mut node = &scene.node;
        while node.is_object() {
            let name = &node["node-name"];
            let mut named = nodes.iter().filter(|found| found["node-name"] == *name);
            let found = named.next().ok_or_else(|| format!("{what}: no {name}"))?;
            assert_eq!(found["drv"], node["driver"], "{what}");
            assert_eq!(found["image"]["format"], node["driver"], "{what}");
            let below = &node["file"];
            let mut children = Vec::new();
            if below.is_object() {
                children.push(json!({"child": "file", "node-name": below["node-name"]}));
            }
            assert_eq!(found["children"], json!(children), "{what}: {name}");
            if !below["size"].is_null() {
                let size = nodes
                    .iter()
                    .find(|found| found["node-name"] == below["node-name"]);
                let size = size.map(|found| found["image"]["virtual-size"].clone());
                assert_eq!(size.as_ref(), Some(&below["size"]), "{what}: {name}");
            }
            node = below;
        }
        let devices = life.qmp.execute("query-block", json!({}))??;
        let inserted = &devices[0]["inserted"];
        assert_eq!(inserted["node-name"], "n0", "{what}: {devices}");
        assert_eq!(inserted["image"]["virtual-size"], json!(SIZE), "{what}");
        let stats = life.qmp.execute("query-blockstats", json!({}))??;
        assert_eq!(stats[0]["stats"]["wr_operations"], 1, "{what}: {stats}");
        assert_eq!(stats[0]["stats"]["wr_bytes"], 8 * SECTOR, "{what}: {stats}");
        life.stop()?;
    }
    Ok(())
}

/// The file, or the disk in it, becomes longer: what is laid out in there stays where it is.
#[test]
fn the_file_under_it_may_grow() -> Res<()> {
    let mut rng = random();
    for scene in scenes(false, &folder()) {
        let mut scene = scene?;
        let what = scene.what();
        let mut life = scene.start()?;
        let file = fs::File::options().write(true).open(&scene.file)?;
        file.set_len(file.metadata()?.len() + (1 << 20))?;
        life.work(&mut scene.model, &mut rng, &what)?;
        life.read_all(&scene.model, &what)?;
        life.stop()?;
        scene
            .model
            .compare(0, &scene.by_qemu(false)?[..SIZE], &what);
        if scene.stack.last() != Some(&Part::Image) {
            continue;
        }
        let info = |scene: &Scene| -> Res<u64> {
            let args = ["info", "-f", "qcow2", "--output=json", text(&scene.file)?];
            let info: Value = serde_json::from_str(&images::qemu_img(&args)?)?;
            Ok(info["virtual-size"].as_u64().ok_or("no size")?)
        };
        let size = (info(&scene)? + (1 << 20)).to_string();
        let args = ["image", "resize", text(&scene.file)?, &size];
        let output = images::run(env!("CARGO_BIN_EXE_stratactl"), &args)?;
        assert!(output.status.success(), "{what}: {output:?}");
        let mut life = scene.start()?;
        life.work(&mut scene.model, &mut rng, &what)?;
        life.read_all(&scene.model, &what)?;
        let capacity = life.guest.config()?.capacity.to_native();
        let grows = scene.stack.iter().take(scene.stack.len() - 1);
        let grows = grows.clone().all(|part| *part == Part::Raw);
        let expected = SIZE + if grows { 1 << 20 } else { 0 };
        assert_eq!(capacity, (expected / SECTOR) as u64, "{what}");
        life.stop()?;
        scene.check(false)?;
    }
    Ok(())
}
