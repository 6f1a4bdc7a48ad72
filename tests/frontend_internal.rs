//! Internal snapshots of disks that a guest is using, with the daemon, files and a front-end.
//!
//! What would be caught: a write that completed before the command and is not in the snapshot, or one
//! that began after its answer and is; a write that is lost to the guest; snapshots that `qemu-img`
//! lists, reads or checks otherwise; disks whose snapshots are not of one instant; a failed command
//! that leaves something behind; a snapshot that the next process does not have after a kill.

mod common;

use common::Res;
use common::daemon::{Daemon, Program, Setup};
use common::frontend::{Frontend, OK, Op};
use common::images;
use common::qmp::Qmp;
use common::rng::Rng;
use common::stamp::SECTOR;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::sync::mpsc;

const TAKE: &str = "blockdev-snapshot-internal-sync";
const DELETE: &str = "blockdev-snapshot-delete-internal-sync";

const QUEUE: u16 = 64;
/// The guest writes blocks of so many bytes, each with a version.
const BLOCK: usize = 4096;
const BLOCKS: usize = 512;
const DISK: u64 = (BLOCK * BLOCKS) as u64;
/// Writes in flight.
const DEPTH: usize = 16;

fn block(version: u32) -> Vec<u8> {
    version.to_le_bytes().repeat(BLOCK / 4)
}

/// The version that a block of an image has; `None`: it is torn.
fn version(bytes: &[u8]) -> Option<u32> {
    let first: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
    let same = bytes.chunks(4).all(|word| word == first);
    same.then(|| u32::from_le_bytes(first))
}

/// What a block of a snapshot may hold: from the version that had completed when the command was sent
/// to the one that had begun when it was answered.
struct Taken {
    name: String,
    from: Vec<u32>,
    to: Vec<u32>,
}

/// A guest that writes all the time.
struct Writer {
    guest: Frontend,
    rng: Rng,
    begun: Vec<u32>,
    done: Vec<u32>,
    /// The block of each place in memory.
    busy: Vec<Option<usize>>,
}

impl Writer {
    fn new(guest: Frontend, seed: u64) -> Self {
        Self {
            guest,
            rng: Rng::new(seed),
            begun: vec![0; BLOCKS],
            done: vec![0; BLOCKS],
            busy: vec![None; DEPTH],
        }
    }

    /// Begins a write wherever there is room, and takes what has ended.
    fn step(&mut self) -> Res<()> {
        for place in 0..DEPTH {
            if self.busy[place].is_some() {
                continue;
            }
            let at = self.rng.below(BLOCKS as u64) as usize;
            if self.busy.contains(&Some(at)) {
                continue;
            }
            self.begun[at] += 1;
            self.guest
                .memory
                .write(place * BLOCK, &block(self.begun[at]));
            let data = [(place * BLOCK, BLOCK)];
            let op = Op::write((at * BLOCK / SECTOR) as u64, &data);
            self.guest.queues[0].submit(&op, place as u64)?;
            self.busy[place] = Some(at);
        }
        self.guest.queues[0].kick()?;
        self.reap()
    }

    fn reap(&mut self) -> Res<()> {
        self.guest.queues[0].wait()?;
        while let Some(done) = self.guest.queues[0].pop()? {
            assert_eq!(done.status, OK);
            let at = self.busy[done.token as usize].take().ok_or("unknown")?;
            self.done[at] = self.begun[at];
        }
        Ok(())
    }

    fn drain(&mut self) -> Res<()> {
        while self.busy.iter().any(Option::is_some) {
            self.reap()?;
        }
        Ok(())
    }
}

fn contents(path: &Path, name: Option<&str>) -> Res<Vec<u8>> {
    let raw = path.with_extension("raw");
    let (from, to) = (images::text(path)?, images::text(&raw)?);
    let option = name.map(|name| format!("snapshot.name={name}"));
    let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
    if let Some(option) = &option {
        args.extend(["-l", option]);
    }
    args.extend([from, to]);
    images::qemu_img(&args)?;
    Ok(fs::read(raw)?)
}

/// The names of an image's snapshots, as `qemu-img` lists them.
fn listed(path: &Path) -> Res<Vec<String>> {
    let info = images::qemu_img(&["info", "-U", "--output=json", images::text(path)?])?;
    let info: Value = serde_json::from_str(&info)?;
    let all = info["snapshots"].as_array().cloned().unwrap_or_default();
    let name = |snapshot: &Value| snapshot["name"].as_str().unwrap_or_default().to_owned();
    Ok(all.iter().map(name).collect())
}

fn setup(dir: &Path, options: &str) -> Res<Setup> {
    let top = dir.join("top.qcow2");
    images::create(&top, DISK, options, None)?;
    Ok(Setup::new(dir, &[(top, "qcow2")]))
}

fn start(setup: &Setup, dir: &Path) -> Res<(Daemon, Frontend, Qmp)> {
    let mut daemon = setup.start(&Program::under_test(), dir, None)?;
    let guest = daemon.connect(&setup.socket, 1, QUEUE, 1 << 20)?;
    let qmp = daemon.qmp(setup.qmp.as_ref().ok_or("no control socket")?)?;
    Ok((daemon, guest, qmp))
}

fn seed() -> u64 {
    let seed = std::env::var("STRATABLK_SEED").ok();
    let seed = seed.and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(rand::random);
    println!("STRATABLK_SEED={seed}");
    seed
}

/// Snapshots come and go while the guest writes all the time.
fn under_load(options: &str, rounds: usize) -> Res<()> {
    let dir = tempfile::tempdir()?;
    let setup = setup(dir.path(), options)?;
    let (daemon, guest, mut qmp) = start(&setup, dir.path())?;
    let node = Setup::node(0);
    let seed = seed();
    let mut writer = Writer::new(guest, seed);
    let mut rng = Rng::new(seed ^ 1);
    let mut taken: Vec<Taken> = Vec::new();
    for round in 0..rounds {
        for _ in 0..rng.below(60) {
            writer.step()?;
        }
        let delete = !taken.is_empty() && rng.below(3) == 0;
        let (command, name) = match delete {
            true => (
                DELETE,
                taken.remove(rng.below(taken.len() as u64) as usize).name,
            ),
            false => (TAKE, format!("s{round}")),
        };
        let from = writer.done.clone();
        let (tell, answer) = mpsc::channel();
        let to = std::thread::scope(|scope| -> Res<Vec<u32>> {
            let (qmp, node, name) = (&mut qmp, &node, &name);
            scope.spawn(move || {
                let arguments = json!({"device": node, "name": name});
                let answered = qmp.execute(command, arguments);
                let _ = tell.send(answered.and_then(|answer| Ok(answer?)).map(drop));
            });
            loop {
                match answer.try_recv() {
                    Ok(answered) => {
                        answered?;
                        return Ok(writer.begun.clone());
                    }
                    Err(_) => writer.step()?,
                }
            }
        })?;
        if !delete {
            taken.push(Taken { name, from, to });
        }
    }
    writer.drain()?;
    let last = writer.done.clone();
    drop((writer.guest, qmp));
    daemon.stop()?;
    let path = &setup.layers[0].0;
    assert!(!images::check(path)?, "leaked clusters");
    let names: Vec<_> = taken.iter().map(|taken| taken.name.clone()).collect();
    assert_eq!(listed(path)?, names);
    for (at, bytes) in contents(path, None)?.chunks(BLOCK).enumerate() {
        assert_eq!(version(bytes), Some(last[at]), "block {at}");
    }
    for Taken { name, from, to } in &taken {
        let bytes = contents(path, Some(name))?;
        for (at, bytes) in bytes.chunks(BLOCK).enumerate() {
            let is = version(bytes);
            let fits = is.is_some_and(|is| (from[at]..=to[at]).contains(&is));
            // In flight at the instant: its old bytes and its new ones.
            let torn = is.is_none() && from[at] < to[at];
            let (from, to) = (from[at], to[at]);
            assert!(
                fits || torn,
                "block {at} of {name}: {is:?}, may be {from} to {to}"
            );
        }
    }
    Ok(())
}

#[test]
fn snapshots_under_load() -> Res<()> {
    under_load("cluster_size=64k", 14)
}

#[test]
fn snapshots_under_load_with_small_clusters() -> Res<()> {
    under_load("cluster_size=4k,compat=0.10", 14)
}

#[test]
fn snapshots_under_load_with_subclusters() -> Res<()> {
    under_load("cluster_size=64k,extended_l2=on", 14)
}

/// A disk that a guest writes, and one beside it.
struct Two {
    daemon: Daemon,
    guest: Frontend,
    qmp: Qmp,
}

impl Two {
    fn start(dir: &Path) -> Res<Self> {
        let mut setup = setup(dir, "cluster_size=64k")?;
        let other = dir.join("other.qcow2");
        images::create(&other, DISK, "cluster_size=64k", None)?;
        let (narrow, data) = (dir.join("narrow.qcow2"), dir.join("data.qcow2"));
        images::create(&narrow, DISK, "refcount_bits=1", None)?;
        images::qemu_io(&["-c", "write -P 9 0 64k", images::text(&narrow)?])?;
        let option = format!("data_file={}", dir.join("data.raw").display());
        images::create(&data, DISK, &option, None)?;
        let node = |name: &str, more: &str| {
            let file = dir.join(format!("{name}.qcow2"));
            let node = format!(
                "qcow2,node-name={name},file.driver=file,file.filename={}{more}",
                file.display()
            );
            ["--blockdev".to_owned(), node]
        };
        let raw = format!(
            ",data-file.driver=file,data-file.filename={}",
            dir.join("data.raw").display()
        );
        setup.extra = [node("other", ""), node("narrow", ""), node("data", &raw)].concat();
        let (daemon, guest, qmp) = start(&setup, dir)?;
        Ok(Self { daemon, guest, qmp })
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Res<Value> {
        Ok(self.qmp.execute(command, arguments)??)
    }

    fn refused(&mut self, command: &str, arguments: Value) -> Res<String> {
        match self.qmp.execute(command, arguments)? {
            Ok(answer) => Err(format!("{command}: {answer}").into()),
            Err(refusal) => Ok(refusal.to_string()),
        }
    }

    fn write(&mut self, sector: u64, byte: u8) -> Res<()> {
        self.guest.memory.write(0, &vec![byte; BLOCK]);
        let data = [(0, BLOCK)];
        assert_eq!(self.guest.queues[0].run(&Op::write(sector, &data))?, OK);
        Ok(())
    }

    /// All nodes; what they take on the disk may become more.
    fn nodes(&mut self) -> Res<Value> {
        let mut nodes = self.ask("query-named-block-nodes", json!({"flat": true}))?;
        for node in nodes.as_array_mut().into_iter().flatten() {
            node["image"]["actual-size"] = json!(0);
            if node["drv"] == "file" {
                node["image"]["virtual-size"] = json!(0);
            }
        }
        Ok(nodes)
    }

    fn snapshots(&mut self, node: &str) -> Res<Vec<Value>> {
        let nodes = self.ask("query-named-block-nodes", json!({"flat": true}))?;
        let nodes = nodes.as_array().cloned().unwrap_or_default();
        let node = nodes.iter().find(|one| one["node-name"] == node);
        let node = node.ok_or("no such node")?;
        Ok(node["image"]["snapshots"]
            .as_array()
            .cloned()
            .unwrap_or_default())
    }
}

#[test]
fn all_of_a_transaction_or_nothing() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let mut two = Two::start(dir.path())?;
    let top = Setup::node(0);
    two.write(0, 1)?;
    let internal =
        |device: &str, name: &str| json!({"type": TAKE, "data": {"device": device, "name": name}});
    let sync = json!({"type": "blockdev-snapshot-sync", "data": {"node-name": "other",
        "snapshot-file": dir.path().join("over.qcow2"), "snapshot-node-name": "over"}});
    let abort = json!({"type": "abort", "data": {}});
    let before = two.nodes()?;
    for (last, text) in [
        (abort, "Transaction aborted using Abort action"),
        (
            internal("nobody", "x"),
            "Cannot find device='nobody' nor node-name='nobody'",
        ),
        (
            internal(&top, "one"),
            "Snapshot with name 'one' already exists on device 'layer0'",
        ),
        (
            internal("data", "x"),
            "Failed to get a snapshot list: Operation not supported",
        ),
        (
            internal("narrow", "x"),
            "Failed to create snapshot 'x' on device 'narrow': ",
        ),
    ] {
        let actions = json!([internal(&top, "one"), sync, internal("other", "two"), last]);
        let error = two.refused("transaction", json!({"actions": actions}))?;
        // It is under another one by then.
        assert!(error.contains("Need a root block node"), "{error}");
        let actions = json!([internal(&top, "one"), sync, last]);
        let error = two.refused("transaction", json!({"actions": actions}))?;
        assert!(error.contains(text), "{error}");
        assert_eq!(two.nodes()?, before);
        assert!(!dir.path().join("over.qcow2").exists());
        two.write(8, 2)?;
    }
    let actions = json!([
        internal("disk", "one"),
        internal("disk", "two"),
        internal("narrow", "x")
    ]);
    let error = two.refused("transaction", json!({"actions": actions}))?;
    let text = "Failed to create snapshot 'x' on device 'narrow': ";
    assert!(error.contains(text), "{error}");
    assert!(listed(&dir.path().join("top.qcow2"))?.is_empty());
    let actions = json!([internal(&top, "one"), internal(&top, "two"), sync]);
    two.ask("transaction", json!({"actions": actions}))?;
    two.write(0, 3)?;
    let snapshots = two.snapshots(&top)?;
    let ids: Vec<_> = snapshots
        .iter()
        .map(|one| (one["id"].clone(), one["name"].clone()))
        .collect();
    assert_eq!(
        ids,
        [(json!("1"), json!("one")), (json!("2"), json!("two"))]
    );
    let gone = two.ask(DELETE, json!({"device": top, "id": "1"}))?;
    assert_eq!(gone, snapshots[0]);
    two.write(16, 4)?;
    drop((two.guest, two.qmp));
    two.daemon.stop()?;
    let path = dir.path().join("top.qcow2");
    assert_eq!(listed(&path)?, ["two"]);
    let (now, then) = (contents(&path, None)?, contents(&path, Some("two"))?);
    assert_eq!([now[0], now[8 * SECTOR], now[16 * SECTOR]], [3, 2, 4]);
    assert_eq!([then[0], then[8 * SECTOR], then[16 * SECTOR]], [1, 2, 0]);
    for name in ["top", "other", "over", "narrow", "data"] {
        assert!(
            !images::check(&dir.path().join(format!("{name}.qcow2")))?,
            "{name}"
        );
    }
    Ok(())
}

#[test]
fn what_was_answered_outlives_a_kill() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let setup = setup(dir.path(), "cluster_size=64k")?;
    let (mut daemon, guest, mut qmp) = start(&setup, dir.path())?;
    let mut writer = Writer::new(guest, seed());
    for _ in 0..20 {
        writer.step()?;
    }
    writer.drain()?;
    let then = writer.done.clone();
    qmp.execute(TAKE, json!({"device": Setup::node(0), "name": "kept"}))??;
    for _ in 0..20 {
        writer.step()?;
    }
    daemon.kill()?;
    let path = &setup.layers[0].0;
    images::wait_unlocked(path)?;
    assert!(images::check(path).is_ok());
    assert_eq!(listed(path)?, ["kept"]);
    for (at, bytes) in contents(path, Some("kept"))?.chunks(BLOCK).enumerate() {
        assert_eq!(version(bytes), Some(then[at]), "block {at}");
    }
    // The next process goes on with it.
    let (daemon, guest, mut qmp) = start(&setup, dir.path())?;
    qmp.execute(DELETE, json!({"device": Setup::node(0), "name": "kept"}))??;
    drop((guest, qmp));
    daemon.stop()?;
    assert!(listed(path)?.is_empty());
    assert!(images::check(path).is_ok());
    Ok(())
}
