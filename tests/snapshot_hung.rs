//! A snapshot while a write of the guest hangs in the old top.
//!
//! What would be caught: a guest that waits for the switch, or for storage that its request does not
//! need; a copy of the hung write's cluster that is made before it has landed, which would hide it; a
//! command that answers, or a record that calls the old top closed, while that may still be written.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Instant;

use common::Res;
use common::frontend::{Frontend, OK, Op, PATIENCE};
use common::images;
use common::stamp::SECTOR;
use serde_json::json;
use stratablk::chain::Layer;
use stratablk::engine::snapshot::Action;
use stratablk::engine::{Engine, Exports, Runtime, control_thread};
use stratablk::export::{Export, ExportConfig, SocketSource};
use stratablk::format::qcow2::create::{CreateOptions, create};
use stratablk::format::qcow2::{Options, Qcow2};
use stratablk::format::{Format, Raw};
use stratablk::graph::{Graph, Holder, Node, Request, Role};
use stratablk::job::{Manager, ParkRunner, Refused, SystemClock};
use stratablk::options::{BlockdevOptions, Dialect, ExportOptions};
use stratablk::reactor::Reactor;
use stratablk::state::Store;
use stratablk::storage::fault::{Call, FaultStorage, Gate};
use stratablk::storage::memory::MemoryStorage;
use stratablk::storage::{Purpose, Storage};

const DISK: u64 = 1 << 20;
const CLUSTER: usize = 64 << 10;
const SECTORS: u64 = (CLUSTER / SECTOR) as u64;

/// Adds a node whose writes hang at `gate`.
async fn add(graph: &Graph, name: &str, format: &str, gate: &Arc<Gate>) -> Arc<MemoryStorage> {
    let memory = MemoryStorage::new(match format {
        "raw" => vec![0; DISK as usize],
        _ => Vec::new(),
    });
    if format == "qcow2" {
        create(&memory, &CreateOptions::new(DISK)).await.unwrap();
    }
    let memory = Arc::new(memory);
    let file: Arc<dyn Storage> = Arc::new(FaultStorage::over(memory.clone()).with_gate(gate));
    let image = match format {
        "raw" => Format::Raw(Raw::new(DISK)),
        _ => {
            let image = Qcow2::open(file.clone(), Options::default()).await;
            Format::Qcow2(Arc::new(image.unwrap()))
        }
    };
    let options = json!({"driver": format, "node-name": name, "discard": "unmap",
        "file": {"driver": "file", "filename": format!("/{name}")}});
    let layer = Layer {
        name: name.to_owned(),
        format: image,
        storage: file,
        read_only: true,
        discard: true,
        copy_on_read: false,
    };
    let options = BlockdevOptions::from_value(&options, Dialect::Json).unwrap();
    let path = PathBuf::from(format!("/{name}"));
    // Each is in a file of its own, by which it is recorded.
    let below = format!("{name}-file");
    let options_below = json!({"driver": "file", "node-name": below, "filename": path});
    let options_below = BlockdevOptions::from_value(&options_below, Dialect::Json).unwrap();
    let layer_below = Layer {
        name: below.clone(),
        format: Format::Raw(Raw::new(DISK)),
        storage: layer.storage.clone(),
        ..layer.clone()
    };
    let file_node = Node::new(options_below, layer_below, path.clone());
    graph.add(file_node).unwrap();
    let node = Node::new(options, layer, path).over(Role::File, Some(&below));
    graph.add(node).unwrap();
    memory
}

struct Bed {
    engine: Arc<Engine>,
    old: Arc<Gate>,
    /// What the old top is in.
    file: Arc<MemoryStorage>,
    guest: Frontend,
}

impl Bed {
    /// A guest with a disk of ones in node `t`, and nodes `n` and `m` to cover it with.
    fn new(dir: &Path, format: &str) -> Res<Self> {
        let graph = Arc::new(Graph::default());
        control_thread::start(&graph)?;
        let reactor = Reactor::for_this_thread()?;
        let (old, new) = (Arc::new(Gate::default()), Arc::new(Gate::default()));
        let path = dir.join("e.sock");
        let options = json!({"type": "vhost-user-blk", "id": "e", "node-name": "t",
            "writable": true, "addr": {"type": "unix", "path": path}});
        let options = ExportOptions::from_value(&options, Dialect::Json)?;
        let request = Request::disk(Holder::Export("e".into()), "t", true);
        let (file, grant) = reactor.block_on(async {
            let file = add(&graph, "t", format, &old).await;
            add(&graph, "n", "qcow2", &new).await;
            add(&graph, "m", "qcow2", &new).await;
            (file, graph.access(request).await)
        });
        let grant = grant?;
        Reactor::leave_thread();
        let config = ExportConfig {
            writable: true,
            ..ExportConfig::new("e", SocketSource::Path(path.clone()))
        };
        let exports = Arc::new(Exports::default());
        let export = Export::start(config, graph.root("t")?)?;
        exports.add(export, options, grant);
        let jobs = Manager::new(
            Graph::clone(&graph),
            Arc::new(ParkRunner),
            Arc::new(SystemClock::new()),
            Arc::new(|_| {}),
        );
        let engine = Arc::new(Engine {
            graph,
            exports,
            jobs,
            store: Some(Arc::new(Store::open(dir, "d")?)),
            streams: Box::new(|_, _| Err(Refused("no streams here".into()))),
            runtime: Runtime::alone(Arc::new(|_| {})),
            quit: Box::new(|| {}),
        });
        // With an inflight region: without one, requests are answered in the order of their coming.
        let guest = Frontend::connect_tracked(&path, 1, 64, 1 << 20, true)?;
        let mut bed = Bed {
            engine,
            old,
            file,
            guest,
        };
        for cluster in 0..DISK / CLUSTER as u64 {
            bed.write(cluster * SECTORS, CLUSTER, 1)?;
        }
        bed.run(&Op::flush())?;
        Ok(bed)
    }

    fn run(&mut self, op: &Op) -> Res<()> {
        self.guest.queues[0].submit(op, 0)?;
        self.guest.queues[0].kick()?;
        assert_eq!(self.next()?, 0, "another request has ended");
        Ok(())
    }

    /// Flushes; whether that succeeds.
    fn flush(&mut self) -> Res<bool> {
        self.guest.queues[0].submit(&Op::flush(), 0)?;
        self.guest.queues[0].kick()?;
        loop {
            if let Some(done) = self.guest.queues[0].pop()? {
                assert_eq!(done.token, 0);
                return Ok(done.status == OK);
            }
            self.guest.queues[0].wait()?;
        }
    }

    /// Which of the old tops are recorded to be closed.
    fn closed(&self) -> Vec<bool> {
        let store = self.engine.store.as_ref();
        let tops = store.map(|store| store.state().tops).unwrap_or_default();
        tops.iter().map(|top| top.closed).collect()
    }

    /// Waits for the next request that ends; which it is.
    fn next(&mut self) -> Res<u64> {
        loop {
            if let Some(done) = self.guest.queues[0].pop()? {
                assert_eq!(done.status, OK);
                return Ok(done.token);
            }
            self.guest.queues[0].wait()?;
        }
    }

    fn write(&mut self, sector: u64, len: usize, byte: u8) -> Res<()> {
        self.guest.memory.write(0, &vec![byte; len]);
        self.run(&Op::write(sector, &[(0, len)]))
    }

    /// Begins to write a sector, whose data nobody else needs meanwhile.
    fn begin(&mut self, sector: u64, byte: u8, token: u64) -> Res<()> {
        let place = (512 << 10) + token as usize * SECTOR;
        self.guest.memory.write(place, &[byte; SECTOR]);
        self.guest.queues[0].submit(&Op::write(sector, &[(place, SECTOR)]), token)?;
        self.guest.queues[0].kick()
    }

    fn read(&mut self, sector: u64, len: usize) -> Res<Vec<u8>> {
        self.run(&Op::read(sector, &[(0, len)]))?;
        let mut bytes = vec![0; len];
        self.guest.memory.read(0, &mut bytes);
        Ok(bytes)
    }

    /// Begins to cover `node`; its answer comes when it is there.
    fn cover(&self, node: &str, overlay: &str) -> Receiver<Result<(), Refused>> {
        let (tell, told) = channel();
        let action = Action::Snapshot {
            node: node.into(),
            overlay: overlay.into(),
        };
        let engine = self.engine.clone();
        std::thread::spawn(move || {
            let _ = tell.send(engine.transact(&[action]));
        });
        let deadline = Instant::now() + PATIENCE;
        while self.engine.exports.list()[0].export.node_name() != overlay {
            assert!(Instant::now() < deadline, "the guest never gets it");
            std::thread::yield_now();
        }
        told
    }
}

fn is_unanswered(told: &Receiver<Result<(), Refused>>) -> bool {
    matches!(told.try_recv(), Err(TryRecvError::Empty))
}

fn hang(format: &str) -> Res<()> {
    let dir = tempfile::tempdir()?;
    let mut bed = Bed::new(dir.path(), format)?;
    bed.old.shut(&[Call::Write]);
    bed.begin(8, 2, 1)?;
    let deadline = Instant::now() + PATIENCE;
    while bed.old.hung() == 0 {
        assert!(Instant::now() < deadline, "the write never hangs");
        std::thread::yield_now();
    }
    let told = bed.cover("t", "n");

    // One copy of the cluster has to wait. All that needs none goes on, and passes it.
    bed.begin(16, 3, 2)?;
    bed.write(SECTORS, CLUSTER, 4)?;
    assert!(bed.read(SECTORS, CLUSTER)?.iter().all(|byte| *byte == 4));
    bed.write(2 * SECTORS + 3, SECTOR, 5)?;
    let old = bed.read(0, CLUSTER)?;
    let hung = |at: usize| at / SECTOR == 8;
    let stays = old
        .iter()
        .enumerate()
        .all(|(at, byte)| hung(at) || *byte == 1);
    assert!(stays, "reads wait for nothing, and find what was there");
    bed.run(&Op::flush())?;
    assert!(is_unanswered(&told), "the old top may still be written");
    assert!(!bed.engine.graph.node("t")?.layer.read_only);

    // Another snapshot on top of that one: the same write is late for it as well.
    let second = bed.cover("n", "m");
    bed.begin(24, 6, 3)?;
    bed.write(3 * SECTORS, CLUSTER, 7)?;
    bed.run(&Op::flush())?;
    assert!(is_unanswered(&told));
    // A kill comes at any time.
    assert_eq!(bed.closed(), [false, false]);

    bed.old.open();
    let mut ended = [bed.next()?, bed.next()?, bed.next()?];
    assert_eq!(
        ended[0], 1,
        "the hung one first, and then those that had to wait"
    );
    ended.sort_unstable();
    assert_eq!(ended, [1, 2, 3]);
    told.recv_timeout(PATIENCE)??;
    second.recv_timeout(PATIENCE)??;
    assert_eq!(bed.closed(), [true, true]);
    assert!(bed.engine.graph.node("t")?.layer.read_only, "it is closed");
    assert!(bed.engine.graph.node("n")?.layer.read_only);
    let mut wanted = vec![1; CLUSTER];
    for (sector, byte) in [(8, 2), (16, 3), (24, 6)] {
        wanted[sector * SECTOR..(sector + 1) * SECTOR].fill(byte);
    }
    assert!(bed.read(0, CLUSTER)? == wanted, "nothing is lost");
    Ok(())
}

#[test]
fn only_a_copy_of_its_cluster_waits_for_a_write_that_hangs() -> Res<()> {
    hang("qcow2")
}

#[test]
fn only_a_copy_of_its_cluster_waits_for_a_write_that_hangs_in_a_raw_disk() -> Res<()> {
    hang("raw")
}

#[test]
fn a_whole_cluster_replaces_one_that_a_write_hangs_in() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let mut bed = Bed::new(dir.path(), "qcow2")?;
    bed.old.shut(&[Call::Write]);
    bed.begin(8, 2, 1)?;
    let deadline = Instant::now() + PATIENCE;
    while bed.old.hung() == 0 {
        assert!(Instant::now() < deadline, "the write never hangs");
        std::thread::yield_now();
    }
    let told = bed.cover("t", "n");
    bed.begin(16, 3, 2)?;
    bed.write(0, CLUSTER, 4)?;
    assert!(is_unanswered(&told));
    bed.old.open();
    let mut ended = [bed.next()?, bed.next()?];
    ended.sort_unstable();
    assert_eq!(ended, [1, 2]);
    told.recv_timeout(PATIENCE)??;
    let mut wanted = vec![4; CLUSTER];
    wanted[16 * SECTOR..17 * SECTOR].fill(3);
    assert!(bed.read(0, CLUSTER)? == wanted);
    Ok(())
}

/// What would be caught: a queue's write in place that an internal snapshot knows nothing of, so that its
/// cluster is copied before it has landed, or the command answers before.
#[test]
fn a_copy_within_the_image_waits_for_a_write_in_place_that_hangs() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let mut bed = Bed::new(dir.path(), "qcow2")?;
    bed.old.shut_for(Call::Write, Purpose::Data);
    bed.begin(8, 2, 1)?;
    let deadline = Instant::now() + PATIENCE;
    while bed.old.hung() == 0 {
        assert!(Instant::now() < deadline, "the write never hangs");
        std::thread::yield_now();
    }
    let (tell, told) = channel();
    let action = Action::Internal {
        device: "e".into(),
        name: "one".into(),
    };
    let engine = bed.engine.clone();
    std::thread::spawn(move || {
        let _ = tell.send(engine.transact(&[action]));
    });
    let node = bed.engine.graph.node("t")?;
    let Format::Qcow2(image) = &node.layer.format else {
        return Err("no qcow2 image".into());
    };
    while image.snapshots().is_empty() {
        assert!(Instant::now() < deadline, "its instant never comes");
        std::thread::yield_now();
    }
    // The copy of the cluster has to wait; others go on.
    bed.begin(16, 3, 2)?;
    bed.write(2 * SECTORS + 3, SECTOR, 5)?;
    assert!(bed.read(SECTORS, CLUSTER)?.iter().all(|byte| *byte == 1));
    bed.run(&Op::flush())?;
    assert!(is_unanswered(&told), "the snapshot may still be written");
    bed.old.open();
    let mut ended = [bed.next()?, bed.next()?];
    ended.sort_unstable();
    assert_eq!(ended, [1, 2]);
    told.recv_timeout(PATIENCE)??;
    let mut wanted = vec![1; CLUSTER];
    for (sector, byte) in [(8, 2), (16, 3)] {
        wanted[sector * SECTOR..(sector + 1) * SECTOR].fill(byte);
    }
    assert!(bed.read(0, CLUSTER)? == wanted, "nothing is lost");
    bed.run(&Op::flush())?;
    let taken = snapshot_of(&bed.file.snapshot(), "one")?;
    // What was in flight at the instant may be in it; what began later is not.
    for (sector, bytes) in taken.chunks(SECTOR).enumerate() {
        let fits = |byte: &u8| *byte == 1 || (sector == 8 && *byte == 2);
        assert!(bytes.iter().all(fits), "sector {sector} of the snapshot");
    }
    Ok(())
}

/// The disk of a snapshot inside of an image, as `qemu-img` reads it.
fn snapshot_of(image: &[u8], name: &str) -> Res<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let (path, raw) = (dir.path().join("image"), dir.path().join("raw"));
    std::fs::write(&path, image)?;
    let option = format!("snapshot.name={name}");
    let (from, to) = (images::text(&path)?, images::text(&raw)?);
    images::qemu_img(&[
        "convert", "-f", "qcow2", "-l", &option, "-O", "raw", from, to,
    ])?;
    Ok(std::fs::read(raw)?)
}

/// What would be caught: a guest's flush that makes the new top stable alone, while writes that it has
/// been told of are in the old one.
#[test]
fn a_flush_is_one_of_the_old_top_as_long_as_that_is_closing() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let mut bed = Bed::new(dir.path(), "raw")?;
    bed.old.shut(&[Call::Write]);
    bed.begin(8, 2, 1)?;
    let deadline = Instant::now() + PATIENCE;
    while bed.old.hung() == 0 {
        assert!(Instant::now() < deadline, "the write never hangs");
        std::thread::yield_now();
    }
    let told = bed.cover("t", "n");
    bed.write(SECTORS, CLUSTER, 4)?;
    assert!(bed.flush()?);
    bed.file.fail_syncs(true);
    assert!(!bed.flush()?, "the old top was left out");
    assert!(is_unanswered(&told));
    bed.old.open();
    assert_eq!(bed.next()?, 1);
    // It cannot be closed, and the guest is told so, and the client.
    let refused = told.recv_timeout(PATIENCE)?.err().ok_or("it is closed")?;
    let text = refused.to_string();
    assert!(text.contains("stays: guests write the new image"), "{text}");
    assert_eq!(bed.engine.exports.list()[0].export.node_name(), "n");
    assert!(!bed.flush()?, "what was written to it is not stable");
    assert!(!bed.engine.graph.node("t")?.layer.read_only);
    assert_eq!(bed.closed(), [false]);
    bed.file.fail_syncs(false);
    Ok(())
}

/// What would be caught: a disk that is covered while a job or another client has it under the name
/// of a filter, or of what that is over; one whose new guest would stay below; an image that is
/// opened for a guest when the daemon closes all; and what is left behind by that.
#[test]
fn a_disk_that_others_have_is_not_covered() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let mut bed = Bed::new(dir.path(), "qcow2")?;
    let (engine, graph) = (bed.engine.clone(), bed.engine.graph.clone());
    let filter = json!({"driver": "copy-on-read", "node-name": "f", "file": "t"});
    let filter = BlockdevOptions::from_value(&filter, Dialect::Json)?;
    let reactor = Reactor::for_this_thread()?;
    reactor.block_on(graph.open(&filter))?;
    Reactor::leave_thread();
    let refused = |node: &str| -> Res<String> {
        let action = Action::Snapshot {
            node: node.into(),
            overlay: "n".into(),
        };
        let refused = engine.transact(&[action]).err();
        assert_eq!(engine.exports.list()[0].export.node_name(), "t");
        assert!(graph.node("n")?.layer.read_only);
        Ok(refused.ok_or("it is covered")?.to_string())
    };
    let job = engine.jobs.reserve(&["t".to_owned()], "stream");
    for node in ["t", "e", "f"] {
        let text = refused(node)?;
        assert!(text.contains("Node 't' is busy"), "{node}: {text}");
    }
    drop(job);
    let other = graph.grant(Request::disk(Holder::Export("x".into()), "f", true))?;
    let text = refused("t")?;
    assert!(text.contains("export 'x' has changed"), "{text}");
    drop(other);
    assert!(bed.closed().is_empty(), "it is recorded");
    bed.write(8, SECTOR, 2)?;
    engine.exports.close();
    let text = refused("t")?;
    assert!(text.contains("shutting down"), "{text}");
    assert!(bed.closed().is_empty(), "it is recorded");
    bed.write(8, SECTOR, 3)?;
    bed.run(&Op::flush())
}
