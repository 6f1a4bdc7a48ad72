//! Random graphs: nodes of every driver over files, what they are to hold, and the judgement of
//! QEMU's tools on their images.

use std::ops::Range;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stratablk::graph::Graph;
use stratablk::options::{BlockdevOptions, Dialect};
use stratablk::reactor::Reactor;

use crate::pairs::unfiltered;
use crate::support::*;

/// Makes the files of a graph.
pub struct Maker {
    dir: tempfile::TempDir,
    pub rng: StdRng,
    files: usize,
    /// Nodes with images.
    images: Vec<Value>,
    /// Nodes with a window over them: where it is, and all of their bytes.
    windows: Vec<(Value, Range<usize>, Vec<u8>)>,
    /// Files that are only read.
    fixed: Vec<String>,
}

impl Maker {
    pub fn new(seed: u64) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            rng: StdRng::seed_from_u64(seed),
            files: 0,
            images: Vec::new(),
            windows: Vec::new(),
            fixed: Vec::new(),
        }
    }

    /// The same graph over copies of its files, and `node` of it.
    pub fn copied(&self, node: &Value) -> (Self, Value) {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        let [old, new] = [&self.dir, &dir].map(|dir| dir.path().to_str().unwrap().to_owned());
        let moved = |node: &Value| -> Value {
            serde_json::from_str(&node.to_string().replace(&old, &new)).unwrap()
        };
        let windows = self.windows.iter();
        let windows =
            windows.map(|(below, window, all)| (moved(below), window.clone(), all.clone()));
        let fixed = self.fixed.iter().map(|file| file.replace(&old, &new));
        let copy = Self {
            rng: self.rng.clone(),
            files: self.files,
            images: self.images.iter().map(moved).collect(),
            windows: windows.collect(),
            fixed: fixed.collect(),
            dir,
        };
        let node = moved(node);
        (copy, node)
    }

    /// Sectors of a few values, zeros among them.
    pub fn pattern(&mut self, len: usize) -> Vec<u8> {
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

    /// A disk that can be written, and what it holds.
    pub fn disk(&mut self) -> (Value, Vec<u8>) {
        let len = 512 * self.rng.random_range(300..900);
        let bytes = self.pattern(len);
        let depth = self.rng.random_range(2..6);
        let node = match self.rng.random_range(0..4) {
            0 => self.window(&bytes, depth, true),
            1 => json!({"driver": "copy-on-read", "file": self.qcow2(&bytes, depth, true)}),
            _ => self.qcow2(&bytes, depth, true),
        };
        assert!(self.of_qemu(&node) == bytes, "made: {node}");
        (node, bytes)
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
            0 => {
                let file = self.file(bytes);
                if !written {
                    self.fixed.push(file.clone());
                }
                json!({"driver": "file", "filename": file})
            }
            // Its rules are about nothing that happens.
            1 if self.files.is_multiple_of(2) => json!({"driver": "blkdebug",
                "max-transfer": 8192, "inject-error": [{"event": "vmstate_load"}],
                "image": self.node(bytes, depth - 1, written)}),
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

    pub fn qcow2(&mut self, bytes: &[u8], depth: usize, written: bool) -> Value {
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
    pub fn of_qemu(&mut self, node: &Value) -> Vec<u8> {
        let (out, node) = (self.file(&[]), unfiltered(node));
        let name = format!("json:{node}");
        run("qemu-img", &["convert", "-O", "raw", &name, &out]);
        std::fs::read(out).unwrap()
    }

    /// Has QEMU write into a node, and `bytes` follow.
    pub fn write_by_qemu(&mut self, node: &Value, bytes: &mut [u8]) {
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

    /// The bytes of the files that are only read.
    pub fn fixed(&self) -> Vec<Vec<u8>> {
        let fixed = self.fixed.iter();
        fixed.map(|file| std::fs::read(file).unwrap()).collect()
    }

    /// Judges every image, and what lies beside the windows.
    pub fn judge(&mut self) {
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
    for role in ["file", "image", "backing", "data-file"] {
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

/// Opens a graph, some of its nodes by name.
pub fn open(node: &Value, flattened: bool, rng: &mut StdRng) -> Disk {
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
