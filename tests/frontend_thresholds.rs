//! Writes past a threshold, as qemu-storage-daemon tells of them.
//!
//! What would be caught: a write past a threshold that is not told, that is told with another amount
//! or for another node, or twice; a write up to the threshold that is told; one that counts by one
//! way through the program and not by another: in place by the data path, by a task that allocates, as
//! zeros, as a discard, in several pieces, through a window, a filter or a failing node, as metadata,
//! by a job; a threshold that is lost when the file is opened once more to be written, or when
//! another chain is published; one that stays armed after it was told or taken away.
//!
//! Skipped, with a word about it, where qemu-storage-daemon is not installed.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::Res;
use common::daemon::{Daemon, Program};
use common::frontend::{DISCARD, Frontend, OK, Op, Segment, WRITE_ZEROES};
use common::images;
use common::qmp::Qmp;
use common::skips::skip;
use serde_json::{Value, json};

const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;

/// What a guest or a client does.
#[derive(Clone, Debug)]
enum Step {
    /// Sets thresholds, by the names of their nodes.
    Set(&'static [(&'static str, u64)]),
    /// Writes this many sectors at a sector.
    Write(u64, u64),
    Zero(u64, u32),
    Discard(u64, u32),
    Flush,
    /// Runs a job to its end.
    Job(&'static str, Value),
    Command(&'static str, Value),
}

use Step::{Command, Discard, Flush, Job, Set, Write, Zero};

/// What came of a step: the data of the events, and the thresholds of all nodes.
type Outcome = (Vec<Value>, Value);

struct Scene {
    daemon: Daemon,
    frontend: Frontend,
    qmp: Qmp,
}

impl Scene {
    /// A daemon that serves node `disk`.
    fn start(program: &Program, dir: &Path, nodes: &[String]) -> Res<Self> {
        let (socket, control) = (dir.join("disk.sock"), dir.join("qmp.sock"));
        let mut args = Vec::new();
        for node in nodes {
            args.extend(["--blockdev".to_owned(), node.clone()]);
        }
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={},writable=on",
            images::text(&socket)?
        );
        let chardev = format!(
            "socket,id=c,path={},server=on,wait=off",
            images::text(&control)?
        );
        let more = ["--export", &export, "--chardev", &chardev];
        args.extend(more.map(str::to_owned));
        args.extend(["--monitor".to_owned(), "chardev=c".to_owned()]);
        let mut daemon = Daemon::start(program, &args, dir, None)?;
        let qmp = daemon.qmp(&control)?;
        let frontend = daemon.connect(&socket, 1, 64, 16 * MIB as usize)?;
        // No data is zeros.
        frontend.memory.write(0, &vec![7; 16 * MIB as usize]);
        Ok(Self {
            daemon,
            frontend,
            qmp,
        })
    }

    fn run(&mut self, request: &Op) -> Res<()> {
        let queue = self.frontend.queues.first_mut().ok_or("no queue")?;
        assert_eq!(queue.run(request)?, OK);
        Ok(())
    }

    fn do_step(&mut self, step: &Step) -> Res<()> {
        let range = |sector: u64, count: u32| {
            [Segment {
                sector,
                count,
                flags: 0,
            }]
        };
        match step {
            Set(thresholds) => {
                for (node, at) in *thresholds {
                    let set = json!({"node-name": node, "write-threshold": at});
                    self.qmp.execute("block-set-write-threshold", set)??;
                }
                Ok(())
            }
            Write(sector, count) => {
                // In pieces, as a driver has pages of memory.
                let len = (count * SECTOR) as usize;
                let pieces = len.div_ceil(MIB as usize);
                let piece = |n: usize| (n << 20, (len - (n << 20)).min(MIB as usize));
                let data: Vec<_> = (0..pieces).map(piece).collect();
                self.run(&Op::write(*sector, &data))
            }
            Zero(sector, count) => self.run(&Op::ranges(WRITE_ZEROES, &range(*sector, *count))),
            Discard(sector, count) => self.run(&Op::ranges(DISCARD, &range(*sector, *count))),
            Flush => self.run(&Op::flush()),
            Command(name, arguments) => {
                self.qmp.execute(name, arguments.clone())??;
                Ok(())
            }
            Job(name, arguments) => {
                self.qmp.execute(name, arguments.clone())??;
                Ok(())
            }
        }
    }

    /// The thresholds of all nodes.
    fn thresholds(&mut self) -> Res<Value> {
        let nodes = self.qmp.execute("query-named-block-nodes", json!({}))??;
        let nodes = nodes.as_array().ok_or("no list")?.iter();
        let named =
            nodes.filter(|node| !node["node-name"].as_str().unwrap_or("#").starts_with('#'));
        let pairs = named.map(|node| {
            let name = node["node-name"].as_str().unwrap_or_default();
            (name.to_owned(), node["write_threshold"].clone())
        });
        Ok(pairs.collect::<serde_json::Map<_, _>>().into())
    }

    /// Does all steps. The events of each are waited for if it is known how many there are.
    fn play(mut self, steps: &[Step], wanted: Option<&[Outcome]>) -> Res<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        for (at, step) in steps.iter().enumerate() {
            self.do_step(step)?;
            let mut seen = Vec::new();
            if let Job(..) = step {
                // What the job has written is told before its end.
                loop {
                    let event = self.qmp.event(|_| true)?;
                    let ended = event["event"] == "BLOCK_JOB_COMPLETED";
                    if ended {
                        assert_eq!(event["data"].get("error"), None, "{event}");
                    }
                    seen.push(event);
                    if ended {
                        break;
                    }
                }
            }
            let thresholds = self.thresholds()?;
            seen.extend(self.qmp.pending_events()?);
            seen.retain(is_about_a_threshold);
            if let Some(wanted) = wanted {
                while seen.len() < wanted[at].0.len() {
                    seen.push(self.qmp.event(is_about_a_threshold)?);
                }
            }
            let data = seen.iter().map(|event| event["data"].clone());
            outcomes.push((data.collect(), thresholds));
        }
        // Whatever was told too much has come by then, since what is told now comes behind it.
        let set = json!({"node-name": "disk", "write-threshold": 1});
        self.qmp.execute("block-set-write-threshold", set)??;
        self.do_step(&Write(8, 1))?;
        let last = self.qmp.event(is_about_a_threshold)?;
        assert_eq!(
            last["data"],
            json!({"node-name": "disk", "amount-exceeded": 9 * SECTOR - 1, "write-threshold": 1})
        );
        drop(self.frontend);
        drop(self.qmp);
        self.daemon.stop()?;
        Ok(outcomes)
    }
}

fn is_about_a_threshold(event: &Value) -> bool {
    event["event"] == "BLOCK_WRITE_THRESHOLD"
}

/// Plays the steps on both daemons. `vague` are nodes in which each has its own layout: how far a
/// write goes is not compared.
fn compare(
    make: impl Fn(&Path) -> Res<Vec<String>>,
    steps: &[Step],
    vague: &[&str],
) -> Res<Vec<usize>> {
    let mut wanted: Option<Vec<Outcome>> = None;
    for program in [Program::reference(), Program::under_test()] {
        let dir = tempfile::tempdir()?;
        let nodes = make(dir.path())?;
        let scene = match Scene::start(&program, dir.path(), &nodes) {
            Err(error) if program.is_reference() && wanted.is_none() => {
                if images::run("qemu-storage-daemon", &["--version"]).is_ok() {
                    return Err(error);
                }
                skip(&format!("qemu-storage-daemon is needed: {error}"))?;
                return Ok(Vec::new());
            }
            other => other?,
        };
        let mut outcomes = scene.play(steps, wanted.as_deref())?;
        for event in outcomes.iter_mut().flat_map(|(events, _)| events) {
            if vague.iter().any(|name| event["node-name"] == *name) {
                assert!(event["amount-exceeded"].as_u64().is_some_and(|n| n > 0));
                event["amount-exceeded"] = json!("some");
            }
        }
        match &wanted {
            None => wanted = Some(outcomes),
            Some(wanted) => {
                for ((got, wanted), step) in outcomes.iter().zip(wanted).zip(steps) {
                    assert_eq!(got, wanted, "after {step:?}");
                }
            }
        }
    }
    let counts = wanted.iter().flatten().map(|(events, _)| events.len());
    Ok(counts.collect())
}

fn raw_file(dir: &Path) -> Res<String> {
    let path = dir.join("disk.raw");
    File::create(&path)?.set_len(32 * MIB)?;
    Ok(images::text(&path)?.to_owned())
}

#[test]
fn of_a_raw_disk_and_its_file() -> Res<()> {
    let make = |dir: &Path| {
        Ok(vec![
            format!(
                "driver=file,node-name=f,discard=unmap,filename={}",
                raw_file(dir)?
            ),
            "driver=raw,node-name=disk,file=f,discard=unmap".to_owned(),
        ])
    };
    let steps = [
        Set(&[("f", 8192), ("disk", 4096)]),
        Write(0, 8),
        Write(7, 2),
        Write(8, 8),
        Write(8, 9),
        Write(0, 64),
        Set(&[("disk", 4096), ("f", 8192)]),
        Zero(2048, 128),
        Set(&[("disk", 4096), ("f", 8192)]),
        Discard(2048, 128),
        // Another in its place, and none.
        Set(&[("disk", 1), ("disk", 1 << 20), ("f", 1), ("f", 0)]),
        Write(0, 2049),
        Set(&[("disk", u64::MAX)]),
        Write(0, 1),
        Flush,
    ];
    let counts = compare(make, &steps, &[])?;
    if !counts.is_empty() {
        assert_eq!(counts, [0, 0, 1, 0, 1, 0, 0, 2, 0, 2, 0, 1, 0, 0, 0]);
    }
    Ok(())
}

#[test]
fn of_a_window_and_its_file() -> Res<()> {
    let make = |dir: &Path| {
        Ok(vec![
            format!("driver=file,node-name=f,filename={}", raw_file(dir)?),
            "driver=raw,node-name=disk,file=f,offset=1048576,size=16777216".to_owned(),
        ])
    };
    let steps = [
        Set(&[("disk", 4096), ("f", MIB + 8192)]),
        Write(0, 8),
        Write(8, 1),
        Write(8, 9),
        Set(&[("disk", 4096), ("f", MIB)]),
        Zero(64, 64),
    ];
    let counts = compare(make, &steps, &[])?;
    assert!(counts.is_empty() || counts == [0, 0, 1, 1, 0, 2]);
    Ok(())
}

/// The image's file is opened once more for it to be written, and so is the window.
#[test]
fn of_a_window_with_an_image() -> Res<()> {
    let make = |dir: &Path| {
        let (image, path) = (dir.join("image"), dir.join("disk"));
        images::create(&image, 32 * MIB, "cluster_size=64k", None)?;
        let file = File::create(&path)?;
        file.write_all_at(&fs::read(&image)?, MIB)?;
        file.set_len(64 * MIB)?;
        let file = images::text(&path)?;
        Ok(vec![
            format!("driver=file,node-name=f,filename={file}"),
            format!("driver=raw,node-name=w,file=f,offset={MIB},size=50331648"),
            "driver=qcow2,node-name=disk,file=w".to_owned(),
        ])
    };
    let steps = [
        Set(&[("w", 1 << 40), ("f", MIB + (1 << 17))]),
        Write(2048, 128),
        Flush,
        Set(&[("w", 1 << 17)]),
        Write(4096, 128),
        Flush,
    ];
    let counts = compare(make, &steps, &["f", "w"])?;
    assert!(
        counts.is_empty() || counts == [0, 1, 0, 0, 1, 0],
        "{counts:?}"
    );
    Ok(())
}

#[test]
fn of_an_image_a_filter_and_the_file() -> Res<()> {
    let make = |dir: &Path| {
        let path = dir.join("disk.qcow2");
        images::create(&path, 32 * MIB, "cluster_size=64k", None)?;
        let file = images::text(&path)?;
        Ok(vec![
            format!("driver=file,node-name=f,discard=unmap,filename={file}"),
            "driver=qcow2,node-name=image,file=f,discard=unmap".to_owned(),
            "driver=copy-on-read,node-name=disk,file=image,discard=unmap".to_owned(),
        ])
    };
    let steps = [
        Set(&[("disk", 4096), ("image", 2 * MIB)]),
        Write(0, 8),
        // It allocates, and then it is in place.
        Write(8, 1),
        Set(&[("disk", 4096)]),
        Write(8, 1),
        // More than a task does at a time.
        Write(2048, 12288),
        Set(&[("disk", 1), ("image", 1)]),
        Zero(2048, 128),
        Set(&[("disk", 1), ("image", 1)]),
        Discard(2048, 128),
        // Data that is new, and what only a flush writes.
        Set(&[("f", 1 << 40)]),
        Write(40960, 8),
        Flush,
        Set(&[("f", 1 << 18)]),
        Write(45056, 8),
        Flush,
    ];
    let counts = compare(make, &steps, &["f"])?;
    let known = [0, 0, 1, 0, 1, 1, 0, 2, 0, 2, 0, 0, 0, 0, 1, 0];
    assert!(counts.is_empty() || counts == known, "{counts:?}");
    Ok(())
}

#[test]
fn of_a_node_that_fails_and_one_that_keeps_nothing() -> Res<()> {
    let make = |dir: &Path| {
        Ok(vec![
            format!("driver=file,node-name=f,filename={}", raw_file(dir)?),
            "driver=blkdebug,node-name=b,image=f,max-transfer=1024,align=512".to_owned(),
            "driver=raw,node-name=disk,file=b".to_owned(),
        ])
    };
    let steps = [
        Set(&[("disk", 512), ("b", 1024), ("f", 2048)]),
        Write(0, 1),
        Write(0, 8),
        Set(&[("disk", 512), ("b", 1024)]),
        Zero(8, 8),
    ];
    // What a node is given at once follows from how much that one does at once.
    let counts = compare(make, &steps, &["b", "f"])?;
    assert!(counts.is_empty() || counts == [0, 0, 3, 0, 2], "{counts:?}");
    let make = |_: &Path| {
        Ok(vec![
            "driver=null-co,node-name=disk,size=33554432".to_owned(),
        ])
    };
    let steps = [
        Set(&[("disk", 4096)]),
        Write(0, 8),
        Write(0, 9),
        Set(&[("disk", 4096)]),
        Zero(0, 16),
    ];
    let counts = compare(make, &steps, &[])?;
    assert!(counts.is_empty() || counts == [0, 0, 1, 0, 1], "{counts:?}");
    Ok(())
}

/// A commit writes to its base as a guest would; what a stream writes reads as before, and counts
/// in the file alone.
#[test]
fn of_images_that_jobs_write() -> Res<()> {
    let make = |dir: &Path| {
        let mut below: Option<std::path::PathBuf> = None;
        let mut nodes = Vec::new();
        for name in ["base", "mid", "disk"] {
            let path = dir.join(name);
            let backing = below.as_deref().map(|path| (path, "qcow2"));
            images::create(&path, 32 * MIB, "cluster_size=64k", backing)?;
            let file = images::text(&path)?.to_owned();
            if name == "mid" {
                images::qemu_io(&["-f", "qcow2", "-c", "write -P 5 16M 64k", &file])?;
            }
            let backing = match below {
                Some(_) => ",backing=".to_owned() + if name == "disk" { "mid" } else { "base" },
                None => String::new(),
            };
            nodes.push(format!("driver=file,node-name={name}-f,filename={file}"));
            nodes.push(format!(
                "driver=qcow2,node-name={name},file={name}-f{backing}"
            ));
            below = Some(path);
        }
        Ok(nodes)
    };
    let steps = [
        Set(&[
            ("base", 1),
            ("base-f", 1 << 18),
            ("disk", 1),
            ("disk-f", 1 << 18),
        ]),
        Job(
            "block-commit",
            json!({"device": "disk", "job-id": "j", "top-node": "mid", "base-node": "base"}),
        ),
        Job("block-stream", json!({"device": "disk", "job-id": "j"})),
        Command(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "n"}),
        ),
        Command(
            "block-set-write-threshold",
            json!({"node-name": "n", "write-threshold": 5}),
        ),
        Command("blockdev-del", json!({"node-name": "n"})),
        Command(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "n"}),
        ),
        Write(8, 1),
    ];
    let counts = compare(make, &steps, &["base-f", "disk-f"])?;
    assert!(
        counts.is_empty() || counts == [0, 2, 1, 0, 0, 0, 0, 1],
        "{counts:?}"
    );
    Ok(())
}
