//! Random graphs of every driver: the bytes of a disk depend on its nodes' options and children
//! alone, whether windows and filters are flattened or served through a chain, and they are those
//! that QEMU reads and writes with the same options.
//!
//! Windows over formats, formats over windows over formats, copy-on-read as the top, as a backing
//! node and as a file, data files, chains of layers of different lengths, nodes by name and in
//! place, QED below. Guests write, zero, discard and flush; the graph is closed and opened again,
//! flattened or not; QEMU reads it and writes in between; `qemu-img check` judges each image, and
//! what lies beside a window is as it was.
//!
//! What would be caught: a window's offset that is ignored, a disk in an image taken for the
//! image, a write that goes past a window's end, a flush or a close that stays in the upper image,
//! zeros and discards at another place than writes, a base that comes to light, an image that is
//! closed before one that is laid out in it.
//!
//! `STRATABLK_GRAPHS` says how many graphs; a seed makes one of them.

use std::path::Path;
use std::rc::Rc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stratablk::chain::resize::Resize;
use stratablk::graph::{Graph, Holder, Request};
use stratablk::options::{BlockdevOptions, Dialect};
use stratablk::reactor::Reactor;

use crate::graph_maker::{Maker, open};
use crate::model::{Kind, Model, operate, seed};
use crate::support::*;

/// Graphs of a run that is to take seconds.
const GRAPHS: u64 = 5;
/// Times that a graph is opened.
const SESSIONS: u64 = 4;
/// Operations of a session, in rounds of so many at a time.
const ROUNDS: usize = 6;
const AT_ONCE: usize = 16;

/// Has a guest work on the disk and closes it. Returns what it is to hold.
fn session(disk: Disk, bytes: Vec<u8>, seed: u64, rng: &mut StdRng) -> Vec<u8> {
    let len = bytes.len();
    assert!(disk.read(0, len) == bytes, "seed {seed}: opened");
    let model = Model::new(bytes, seed);
    let disk = Rc::new(disk);
    for _ in 0..ROUNDS {
        for _ in 0..AT_ONCE {
            let kind = match rng.random_range(0..20) {
                0..8 => Kind::Write,
                8..13 => Kind::Read,
                13 | 14 => Kind::Zero,
                15 => Kind::Unmap,
                16..19 => Kind::Discard,
                _ => Kind::Flush,
            };
            let (disk, model) = (disk.clone(), model.clone());
            let reactor = disk.reactor.clone();
            reactor.spawn(async move { operate(&disk, &model, kind, seed).await });
        }
        while disk.reactor.tasks() > 0 {
            if !disk.reactor.turn() {
                disk.reactor.wait(None);
            }
        }
    }
    let seen = disk.read(0, len);
    model.borrow_mut().verify(0, &seen, seed);
    let Ok(disk) = Rc::try_unwrap(disk) else {
        panic!("a task has it");
    };
    disk.close();
    seen
}

fn one_graph(seed: u64) {
    let mut maker = Maker::new(seed);
    let mut rng = StdRng::seed_from_u64(seed ^ 1);
    let (node, mut bytes) = maker.disk();
    println!("seed {seed}: {node}");
    for round in 0..SESSIONS {
        let flattened = rng.random();
        let disk = open(&node, flattened, &mut rng);
        bytes = session(disk, bytes, seed ^ (round << 8), &mut rng);
        assert!(
            maker.of_qemu(&node) == bytes,
            "seed {seed}, session {round}, flattened: {flattened}: QEMU reads something else"
        );
        maker.judge();
        maker.write_by_qemu(&node, &mut bytes);
    }
    let disk = open(&node, true, &mut rng);
    assert!(disk.read(0, bytes.len()) == bytes, "seed {seed}: by QEMU");
    disk.close();
    maker.judge();
}

#[test]
fn a_graph_reads_and_writes_the_same_however_it_is_built() {
    let count = std::env::var("STRATABLK_GRAPHS").ok();
    let count = count.map_or(GRAPHS, |count| count.parse().unwrap());
    let seed = seed();
    println!("STRATABLK_SEED={seed}");
    for number in 0..count {
        one_graph(seed.wrapping_add(number));
    }
}

/// A node that cannot be opened leaves none of those under it.
#[test]
fn a_graph_that_cannot_be_opened_leaves_nothing() {
    let mut maker = Maker::new(1);
    let bytes = maker.pattern(64 << 10);
    let inner = maker.qcow2(&bytes, 0, true);
    let node = json!({"driver": "qcow2", "node-name": "top", "file": inner});
    let graph = Graph::default();
    let reactor = Reactor::for_this_thread().unwrap();
    let options = BlockdevOptions::from_value(&node, Dialect::Json).unwrap();
    let error = reactor.block_on(graph.open(&options)).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("the disk in node"), "{text}");
    assert!(graph.nodes().is_empty());
}

/// An image in an image, and the file that both are in.
struct Nested {
    _dir: tempfile::TempDir,
    file: String,
    graph: Graph,
    reactor: Reactor,
}

impl Nested {
    fn new(inner_read_only: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (outer, file) = (in_dir(&dir, "outer"), in_dir(&dir, "file"));
        create(&outer, "cluster_size=4k", 128 << 10);
        std::fs::File::options()
            .write(true)
            .open(&outer)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let (outer, file) = (outer.to_str().unwrap(), file.to_str().unwrap());
        let convert = ["convert", "-f", "raw", "-O", "qcow2", outer, file];
        run("qemu-img", &convert);
        let list = [
            json!({"driver": "qcow2", "node-name": "inner", "read-only": inner_read_only,
                "file": {"driver": "file", "filename": file}}),
            json!({"driver": "qcow2", "node-name": "top", "file": "inner"}),
            json!({"driver": "raw", "node-name": "window", "file": "inner", "size": 65536}),
        ];
        let parse = |node: &Value| BlockdevOptions::from_value(node, Dialect::Json).unwrap();
        let list: Vec<_> = list.iter().map(parse).collect();
        let (graph, reactor) = (Graph::default(), Reactor::for_this_thread().unwrap());
        reactor.block_on(graph.open_all(&list)).unwrap();
        Self {
            file: file.to_owned(),
            _dir: dir,
            graph,
            reactor,
        }
    }

    fn write(&self, node: &str) -> stratablk::error::Result<stratablk::graph::Grant> {
        let request = Request::disk(Holder::Tool, node, true);
        self.reactor.block_on(self.graph.access(request))
    }

    fn is_read_only(&self, node: &str) -> bool {
        self.graph.node(node).unwrap().layer.read_only
    }

    /// Whether another program may read the file.
    fn is_shared(&self) -> bool {
        let args = ["-r", "-f", "qcow2", "-c", "read -q 0 512", &self.file];
        output("qemu-io", &args).status.success()
    }
}

/// What would be caught: a disk below that stays read-only, or is given back before or not at all;
/// one that is written beside what is laid out in it; a right that is kept after a failure.
#[test]
fn the_disk_below_follows_its_writer() {
    let nested = Nested::new(false);
    assert!(nested.is_shared());
    let grant = nested.write("top").unwrap();
    assert!(!nested.is_read_only("inner") && !nested.is_shared());
    for (node, child) in [("inner", "file"), ("window", "file")] {
        let text = nested.write(node).unwrap_err().to_string();
        let told = text.contains("Permission conflict on node 'inner'") && text.contains(child);
        assert!(told, "{node}: {text}");
    }
    assert!(!nested.is_read_only("top") && !nested.is_read_only("inner"));
    nested.reactor.block_on(grant.give_back()).unwrap();
    assert!(nested.is_read_only("top") && nested.is_read_only("inner"));
    assert!(nested.is_shared());
    check(Path::new(&nested.file), false);

    let fixed = Nested::new(true);
    let text = fixed.write("top").unwrap_err().to_string();
    assert!(text.contains("'inner' is read-only"), "{text}");
    assert!(fixed.is_shared() && fixed.is_read_only("top"));
}

/// What would be caught: an image in a disk that is taken for the image whose disk that is, in a
/// header or in a record of what lies under it; a disk that is resized by what is in it.
#[test]
fn a_disk_is_told_from_the_image_that_it_is_in() {
    let nested = Nested::new(false);
    let graph = &nested.graph;
    let [top, inner] = ["top", "inner"].map(|name| graph.node(name).unwrap());
    let (of_top, of_inner) = (graph.file_of(&top).unwrap(), graph.file_of(&inner).unwrap());
    assert!(
        of_inner == nested.file && of_top.starts_with("json:"),
        "{of_top}"
    );
    assert_eq!(graph.header_name("inner").unwrap(), nested.file);
    let name = graph.header_name("top").unwrap();
    let expected = json!({"driver": "qcow2", "file": {"driver": "qcow2",
        "file": {"driver": "file", "filename": nested.file}}});
    let described = name.strip_prefix("json:").unwrap();
    assert_eq!(serde_json::from_str::<Value>(described).unwrap(), expected);
    let wanted = Resize {
        size: 1 << 20,
        ..Resize::default()
    };
    let resized = nested.reactor.block_on(graph.resize("window", wanted));
    let text = resized.unwrap_err().to_string();
    assert!(text.contains("the disk of node 'inner'"), "{text}");
    // The image itself has room for a larger disk.
    nested
        .reactor
        .block_on(graph.resize("top", wanted))
        .unwrap();
    nested.reactor.block_on(graph.close());
    let Nested { _dir, graph, .. } = nested;
    drop((graph, top, inner));
    let info = run("qemu-img", &["info", &name]);
    assert!(info.contains("1 MiB"), "{info}");
}
