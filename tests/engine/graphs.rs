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

use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stratablk::chain::resize::Resize;
use stratablk::graph::{Graph, Holder, Request};
use stratablk::options::{BlockdevOptions, Dialect};
use stratablk::reactor::Reactor;

use crate::model::{Kind, Model, operate, seed};
use crate::pairs::unfiltered;
use crate::support::*;

/// Graphs of a run that is to take seconds.
const GRAPHS: u64 = 5;
/// Times that a graph is opened.
const SESSIONS: u64 = 4;
/// Operations of a session, in rounds of so many at a time.
const ROUNDS: usize = 6;
const AT_ONCE: usize = 16;

/// Makes the files of a graph.
struct Maker {
    dir: tempfile::TempDir,
    rng: StdRng,
    files: usize,
    /// Nodes with images.
    images: Vec<Value>,
    /// Nodes with a window over them: where it is, and all of their bytes.
    windows: Vec<(Value, Range<usize>, Vec<u8>)>,
}

impl Maker {
    fn new(seed: u64) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            rng: StdRng::seed_from_u64(seed),
            files: 0,
            images: Vec::new(),
            windows: Vec::new(),
        }
    }

    /// Sectors of a few values, zeros among them.
    fn pattern(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for area in bytes.chunks_mut(512 * self.rng.random_range(1..60)) {
            if self.rng.random_bool(0.6) {
                area.fill(self.rng.random());
            }
        }
        bytes
    }

    fn file(&mut self, bytes: &[u8]) -> String {
        self.files += 1;
        let path = in_dir(&self.dir, &format!("file{}", self.files));
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().into()
    }

    /// A node with these bytes, `depth` nodes above files at most. One that is to be written has
    /// nothing in it that cannot be.
    fn node(&mut self, bytes: &[u8], depth: usize, written: bool) -> Value {
        let kind = if depth == 0 {
            0
        } else {
            self.rng.random_range(0..12)
        };
        let mut node = match kind {
            0 => json!({"driver": "file", "filename": self.file(bytes)}),
            1 => json!({"driver": "raw", "file": self.node(bytes, depth - 1, written)}),
            2..5 => self.window(bytes, depth - 1, written),
            5 | 6 => json!({"driver": "copy-on-read",
                "file": self.node(bytes, depth - 1, written)}),
            7 if !written => self.qed(bytes, depth - 1),
            _ => self.qcow2(bytes, depth - 1, written),
        };
        if self.rng.random_bool(0.7) {
            node["discard"] = json!("unmap");
        }
        node
    }

    fn window(&mut self, bytes: &[u8], depth: usize, written: bool) -> Value {
        let front = 512 * self.rng.random_range(0..20);
        let back = 512 * self.rng.random_range(0..3);
        let mut all = self.pattern(front + bytes.len() + back);
        all[front..front + bytes.len()].copy_from_slice(bytes);
        let below = self.node(&all, depth, written);
        let window = front..front + bytes.len();
        self.windows.push((below.clone(), window, all));
        let mut node = json!({"driver": "raw", "offset": front, "file": below});
        if back > 0 || self.rng.random_bool(0.5) {
            node["size"] = json!(bytes.len());
        }
        node
    }

    fn qed(&mut self, bytes: &[u8], depth: usize) -> Value {
        let (raw, image) = (self.file(bytes), self.file(&[]));
        let args = ["convert", "-f", "raw", "-O", "qed", &raw, &image];
        run("qemu-img", &args);
        let image = whole(std::fs::read(image).unwrap(), 0);
        json!({"driver": "qed", "file": self.node(&image, depth, false)})
    }

    fn qcow2(&mut self, bytes: &[u8], depth: usize, written: bool) -> Value {
        let (raw, image) = (self.file(bytes), self.file(&[]));
        let mut options = vec![
            match self.rng.random_range(0..6) {
                0 => "compat=0.10,cluster_size=4k",
                1 => "compat=0.10,cluster_size=64k",
                2 => "compat=1.1,cluster_size=512",
                3 => "compat=1.1,cluster_size=16k,extended_l2=on",
                4 => "compat=1.1,cluster_size=64k,lazy_refcounts=on",
                _ => "compat=1.1,cluster_size=64k",
            }
            .to_owned(),
        ];
        let mut node = json!({"driver": "qcow2"});
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
        let (mut base, mut named) = (None, true);
        if self.rng.random_bool(0.4) {
            // Some of what the base has is hidden, and it may be shorter, or longer.
            let mut below = bytes.to_vec();
            let len = below.len() / 512 * self.rng.random_range(1..7) / 4 * 512;
            below.resize(len.max(512), 3);
            for _ in 0..3 {
                let at = self.rng.random_range(0..below.len() / 512) * 512;
                let end = below.len().min(at + 512 * self.rng.random_range(1..100));
                below[at..end].fill(self.rng.random());
            }
            base = Some(self.file(&below));
            named = self.rng.random_bool(0.3);
            if !named {
                node["backing"] = self.node(&below, depth, false);
            }
        } else if self.rng.random_bool(0.5) {
            node["backing"] = Value::Null;
        }
        let modern = options[0].starts_with("compat=1.1");
        let data = (modern && self.rng.random_bool(0.25)).then(|| self.file(&[]));
        if let Some(data) = &data {
            options.push(format!("data_file={data}"));
            if base.is_none() && self.rng.random_bool(0.5) {
                options.push("data_file_raw=on".into());
            }
        } else if base.is_none() && self.rng.random_bool(0.2) {
            args.push("-c");
        }
        let options = options.join(",");
        args.extend(["-o", &options]);
        if let Some(base) = &base {
            args.extend(["-B", base, "-F", "raw"]);
        }
        args.extend([raw.as_str(), image.as_str()]);
        run("qemu-img", &args);
        if !named {
            // QEMU mixes what the header names with the options.
            let args = ["rebase", "-u", "-f", "qcow2", "-b", "", &image];
            run("qemu-img", &args);
        }
        if let Some(data) = data {
            let mut data = std::fs::read(data).unwrap();
            data.resize(bytes.len().next_multiple_of(64 << 10), 0);
            node["data-file"] = self.node(&data, depth, written);
        }
        // A disk has its length for good, and the image in it is to have room for all.
        let image = whole(std::fs::read(image).unwrap(), bytes.len() + (2 << 20));
        node["file"] = self.node(&image, depth, written);
        self.images.push(node.clone());
        node
    }

    /// What QEMU reads from a node.
    fn of_qemu(&mut self, node: &Value) -> Vec<u8> {
        let (out, node) = (self.file(&[]), unfiltered(node));
        let name = format!("json:{node}");
        run("qemu-img", &["convert", "-O", "raw", &name, &out]);
        std::fs::read(out).unwrap()
    }

    /// Has QEMU write into a node, and `bytes` follow.
    fn write_by_qemu(&mut self, node: &Value, bytes: &mut [u8]) {
        let name = format!("json:{}", unfiltered(node));
        let mut args = Vec::new();
        for _ in 0..4 {
            let start = self.rng.random_range(0..bytes.len() / 512) * 512;
            let len = (512 * self.rng.random_range(1..200)).min(bytes.len() - start);
            let value: u8 = self.rng.random_range(1..=255);
            let (how, value) = match self.rng.random_range(0..4) {
                0 => ("-z".to_owned(), 0),
                1 => ("-z -u".to_owned(), 0),
                _ => (format!("-P {value}"), value),
            };
            args.extend(["-c".to_owned(), format!("write -q {how} {start} {len}")]);
            bytes[start..start + len].fill(value);
        }
        args.push(name);
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let output = run("qemu-io", &args);
        assert!(!output.contains("failed"), "qemu-io {args:?}: {output}");
    }

    /// Judges every image, and what lies beside the windows.
    fn judge(&mut self) {
        for image in &self.images {
            let mut image = unfiltered(image);
            image["backing"] = Value::Null;
            let name = format!("json:{image}");
            run("qemu-img", &["check", "-q", &name]);
        }
        for (below, window, all) in std::mem::take(&mut self.windows) {
            let now = self.of_qemu(&below);
            // A file may have become shorter, behind a window that ends where it does.
            let behind = now.get(window.end..all.len()).unwrap_or_default();
            let beside = now[..window.start] == all[..window.start] && behind == &all[window.end..];
            assert!(
                beside,
                "a write reached past the window {window:?} of {below}"
            );
            self.windows.push((below, window, all));
        }
    }
}

/// The bytes of an image, with `room` for more, in whole clusters.
fn whole(mut image: Vec<u8>, room: usize) -> Vec<u8> {
    image.resize((image.len() + room).next_multiple_of(64 << 10), 0);
    image
}

/// Nodes to be opened one after the other: some of those inside `node` get names.
fn with_names(node: &Value, rng: &mut StdRng, list: &mut Vec<Value>) -> Value {
    let mut node = node.clone();
    for role in ["file", "backing", "data-file"] {
        if !node[role].is_object() {
            continue;
        }
        let mut below = with_names(&node[role], rng, list);
        if rng.random_bool(0.3) {
            let name = format!("node{}", list.len());
            below["node-name"] = json!(name);
            list.push(below);
            below = json!(name);
        }
        node[role] = below;
    }
    node
}

fn open(node: &Value, flattened: bool, rng: &mut StdRng) -> Disk {
    let mut list = Vec::new();
    let mut top = with_names(node, rng, &mut list);
    top["node-name"] = json!("top");
    list.push(top);
    let graph = match flattened {
        true => Graph::default(),
        false => Graph::unflattened(),
    };
    let reactor = Reactor::for_this_thread().unwrap();
    let parse = |node: &Value| BlockdevOptions::from_value(node, Dialect::Json).unwrap();
    let list: Vec<_> = list.iter().map(parse).collect();
    reactor.block_on(graph.open_all(&list)).unwrap();
    reactor.block_on(graph.make_writable("top")).unwrap();
    Disk {
        root: graph.root("top").unwrap(),
        graph,
        name: "top".into(),
        reactor,
    }
}

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
    let len = 512 * maker.rng.random_range(300..900);
    let mut bytes = maker.pattern(len);
    let depth = maker.rng.random_range(2..6);
    let node = match rng.random_range(0..4) {
        0 => maker.window(&bytes, depth, true),
        1 => json!({"driver": "copy-on-read", "file": maker.qcow2(&bytes, depth, true)}),
        _ => maker.qcow2(&bytes, depth, true),
    };
    println!("seed {seed}: {node}");
    assert!(maker.of_qemu(&node) == bytes, "seed {seed}: made");
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
