//! Every driver over every other, as file, backing and data-file child: a node's bytes follow from
//! its options and its children, however it was built.
//!
//! What would be caught: a format that is opened in the file at the bottom instead of in the node
//! under it, a window that is forgotten on the way (also by a file that is opened anew for
//! writing), a write that reaches past a window, and a container's bytes in place of the disk's.
//! QEMU, given the same options, is the judge; what cannot be written must be refused with the
//! reason.

use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stratablk::chain::View;
use stratablk::error::Result;
use stratablk::graph::Graph;
use stratablk::options::{AutoOptions, BlockRef, BlockdevOptions, Dialect, Driver};
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::support::*;

/// Size of the disks.
const SIZE: usize = 192 << 10;
/// Where windows begin: within a page.
const OFFSET: usize = 37 * 512;

/// What a node can be laid out in.
const LOWER: &[&str] = &[
    "file",
    "host_device",
    "raw",
    "raw,offset",
    "raw,size",
    "raw,offset,size",
    "window of a window",
    "copy-on-read",
    "qcow2",
    "qed",
    "copy-on-read of qcow2",
    "blkdebug",
    "blkdebug of qcow2",
    "blkdebug of raw,offset,size",
];
/// What is laid out in it.
const UPPER: &[&str] = &[
    "raw",
    "raw,offset",
    "raw,size",
    "raw,offset,size",
    "qcow2",
    "qed",
    "copy-on-read",
    "auto",
    "backing",
    "data-file",
    "blkdebug",
];

/// A loop device over a file, if this user may have one.
struct Loop(String);

impl Loop {
    fn new(path: &Path) -> Option<Self> {
        let args = ["--find", "--show", path.to_str().unwrap()];
        let output = std::process::Command::new("losetup").args(args).output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(Self(
            String::from_utf8(output.stdout).unwrap().trim().into(),
        ))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        output("losetup", &["--detach", &self.0]);
    }
}

/// A folder with files, and random bytes to fill them with.
struct Maker {
    dir: tempfile::TempDir,
    rng: StdRng,
    files: usize,
    /// Files in which nothing may change outside of this range.
    windows: Vec<(PathBuf, std::ops::Range<usize>)>,
    loops: Vec<Loop>,
}

impl Maker {
    fn new(seed: u64) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            rng: StdRng::seed_from_u64(seed),
            files: 0,
            windows: Vec::new(),
            loops: Vec::new(),
        }
    }

    fn random(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.rng.fill(&mut bytes[..]);
        // Not the signature of anything.
        if let Some(first) = bytes.first_mut() {
            *first = 1;
        }
        bytes
    }

    fn file(&mut self, bytes: &[u8]) -> String {
        self.files += 1;
        let path = in_dir(&self.dir, &format!("file{}", self.files));
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().into()
    }

    /// An image of `format` that holds `disk`.
    fn image(&mut self, format: &str, disk: &[u8]) -> Vec<u8> {
        let (raw, image) = (self.file(disk), self.file(&[]));
        run(
            "qemu-img",
            &["convert", "-f", "raw", "-O", format, &raw, &image],
        );
        std::fs::read(image).unwrap()
    }

    /// Options of a node `kind` whose bytes are `payload`; at the start of the file at the bottom
    /// is `decoy`. `None`: it cannot be made here.
    fn lower(&mut self, kind: &str, payload: &[u8], decoy: &[u8]) -> Option<Value> {
        let around = |front: usize, back: usize, maker: &mut Self| {
            let mut bytes = maker.random(front + payload.len() + back);
            let decoy = &decoy[..decoy.len().min(front)];
            bytes[..decoy.len()].copy_from_slice(decoy);
            bytes[front..front + payload.len()].copy_from_slice(payload);
            let file = maker.file(&bytes);
            if back > 0 {
                let window = front..front + payload.len();
                maker.windows.push((file.clone().into(), window));
            }
            // A file that is opened anew meets the locks of the first descriptor.
            json!({"driver": "file", "filename": file, "locking": "off"})
        };
        let front = decoy.len().next_multiple_of(512) + OFFSET;
        let len = payload.len();
        Some(match kind {
            "file" => around(0, 0, self),
            "host_device" => {
                let file = self.file(payload);
                let device = Loop::new(Path::new(&file))?;
                let node = json!({"driver": "host_device", "filename": device.0,
                    "locking": "off"});
                self.loops.push(device);
                node
            }
            "raw" => json!({"driver": "raw", "file": around(0, 0, self)}),
            "raw,offset" => json!({"driver": "raw", "offset": front,
                "file": around(front, 0, self)}),
            "raw,size" => json!({"driver": "raw", "size": len, "file": around(0, 4096, self)}),
            "raw,offset,size" => json!({"driver": "raw", "offset": front, "size": len,
                "file": around(front, 4096, self)}),
            "window of a window" => json!({"driver": "raw", "offset": 512, "size": len,
                "file": {"driver": "raw", "offset": front - 512, "size": len + 1024,
                    "file": around(front, 4096, self)}}),
            "copy-on-read" => json!({"driver": "copy-on-read", "file": around(0, 0, self)}),
            "qcow2" | "qed" => {
                let image = self.image(kind, payload);
                let file = self.file(&image);
                json!({"driver": kind, "file": {"driver": "file", "filename": file}})
            }
            "copy-on-read of qcow2" => json!({"driver": "copy-on-read",
                "file": self.lower("qcow2", payload, decoy)?}),
            "blkdebug" => json!({"driver": "blkdebug", "image": around(0, 0, self)}),
            "blkdebug of qcow2" => json!({"driver": "blkdebug",
                "image": self.lower("qcow2", payload, decoy)?}),
            "blkdebug of raw,offset,size" => json!({"driver": "blkdebug", "align": 512,
                "max-transfer": 4096, "image": self.lower("raw,offset,size", payload, decoy)?}),
            other => panic!("{other}"),
        })
    }

    /// Options of a node `upper` laid out in a node `lower`.
    fn pair(&mut self, lower: &str, upper: &str) -> Option<Value> {
        let disk = self.random(SIZE);
        let wrong = self.random(SIZE);
        // The last cluster of an image may end behind its file's last sector.
        let whole = |mut bytes: Vec<u8>| {
            bytes.resize(bytes.len().next_multiple_of(64 << 10), 0);
            bytes
        };
        Some(match upper {
            "qcow2" | "qed" | "auto" => {
                let format = if upper == "auto" { "qcow2" } else { upper };
                let (payload, decoy) = (self.image(format, &disk), self.image(format, &wrong));
                let file = self.lower(lower, &whole(payload), &whole(decoy))?;
                json!({"driver": format, "file": file})
            }
            "backing" => {
                let below = self.lower(lower, &disk, &wrong)?;
                let file = self.file(&[]);
                create(Path::new(&file), "cluster_size=4k", SIZE as u64);
                json!({"driver": "qcow2", "backing": below,
                    "file": {"driver": "file", "filename": file}})
            }
            "data-file" => {
                let (image, data) = (self.file(&[]), self.file(&[]));
                let options = format!("data_file={data},data_file_raw=on");
                create(Path::new(&image), &options, SIZE as u64);
                let write = format!("write -q -P 7 0 {SIZE}");
                run("qemu-io", &["-f", "qcow2", "-c", &write, &image]);
                json!({"driver": "qcow2", "data-file": self.lower(lower, &disk, &wrong)?,
                    "file": {"driver": "file", "filename": image}})
            }
            "copy-on-read" => json!({"driver": "copy-on-read",
                "file": self.lower(lower, &disk, &wrong)?}),
            "raw" => json!({"driver": "raw", "file": self.lower(lower, &disk, &wrong)?}),
            "blkdebug" => json!({"driver": "blkdebug",
                "image": self.lower(lower, &disk, &wrong)?}),
            "raw,offset" => json!({"driver": "raw", "offset": 4096 + 512,
                "file": self.lower(lower, &disk, &wrong)?}),
            "raw,size" => json!({"driver": "raw", "size": 64 << 10,
                "file": self.lower(lower, &disk, &wrong)?}),
            "raw,offset,size" => json!({"driver": "raw", "offset": 4096 + 512, "size": 65_024,
                "file": self.lower(lower, &disk, &wrong)?}),
            other => panic!("{other}"),
        })
    }
}

/// The child of a node that the pair is about.
fn child(upper: &str) -> &str {
    match upper {
        "backing" | "data-file" => upper,
        "blkdebug" => "image",
        _ => "file",
    }
}

/// Opens the node with everything written inside it, or with the child as a node of its own.
fn open(
    graph: &Graph,
    reactor: &Reactor,
    node: &Value,
    upper: &str,
    by_name: bool,
) -> Result<String> {
    let parse = |node: &Value, name: &str| {
        let mut node = node.clone();
        node["node-name"] = json!(name);
        BlockdevOptions::from_value(&node, Dialect::Json).unwrap()
    };
    let mut node = node.clone();
    if by_name {
        let below = parse(&node[child(upper)], "below");
        reactor.block_on(graph.open(&below))?;
        node[child(upper)] = json!("below");
    }
    let mut options = parse(&node, "top");
    if upper == "auto"
        && let Driver::Qcow2(qcow2) = options.driver
    {
        let file: BlockRef = qcow2.file;
        let copy_on_read = false;
        options.driver = Driver::Auto(AutoOptions { file, copy_on_read });
    }
    reactor.block_on(graph.open(&options))
}

fn read(graph: &Graph, reactor: &Reactor, name: &str) -> Vec<u8> {
    let chain = graph.root(name).unwrap().chain();
    let buffer = AlignedBuf::zeroed(chain.size() as usize);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
    reactor.block_on(View::of(chain).read(0, bufs)).unwrap();
    buffer.to_vec()
}

/// The node without filters: they change no byte, and QEMU's reader cannot open one.
pub fn unfiltered(node: &Value) -> Value {
    match node {
        Value::Object(map) if node["driver"] == "copy-on-read" => unfiltered(&map["file"]),
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| (key.clone(), unfiltered(value)))
            .collect(),
        other => other.clone(),
    }
}

/// What QEMU reads from the node.
fn of_qemu(maker: &mut Maker, node: &Value) -> Vec<u8> {
    let (out, node) = (maker.file(&[]), unfiltered(node));
    run(
        "qemu-img",
        &["convert", "-O", "raw", &format!("json:{node}"), &out],
    );
    std::fs::read(out).unwrap()
}

#[test]
fn the_bytes_of_a_node_follow_from_its_options_and_children() {
    let reactor = Reactor::for_this_thread().unwrap();
    let mut maker = Maker::new(1);
    let mut served = 0;
    for lower in LOWER {
        for upper in UPPER {
            let Some(node) = maker.pair(lower, upper) else {
                eprintln!("SKIPPED: no loop devices for this user");
                continue;
            };
            let expected = of_qemu(&mut maker, &node);
            for by_name in [false, true] {
                let what = format!("{upper} over {lower}, by name: {by_name}");
                let graph = Graph::default();
                let opened = open(&graph, &reactor, &node, upper, by_name);
                let name = opened.unwrap_or_else(|error| panic!("{what}: {error}"));
                assert!(
                    read(&graph, &reactor, &name) == expected,
                    "{what}: other bytes"
                );
                served += 1;
            }
            maker.loops.clear();
        }
    }
    assert!(served > 200, "only {served} were served");
}

#[test]
fn writes_go_where_reads_come_from() {
    let reactor = Reactor::for_this_thread().unwrap();
    let mut maker = Maker::new(2);
    for lower in LOWER {
        // Backing files are not written; QED is only read.
        for upper in [
            "raw",
            "raw,offset",
            "raw,size",
            "raw,offset,size",
            "qcow2",
            "data-file",
            "blkdebug",
        ] {
            let Some(mut node) = maker.pair(lower, upper) else {
                continue;
            };
            // Opened for reading first, and anew when it is to be written.
            for reopened in [false, true] {
                let what = format!("{upper} over {lower}, reopened: {reopened}");
                node[child(upper)]["read-only"] = json!(reopened);
                let graph = Graph::default();
                let name = open(&graph, &reactor, &node, upper, false).unwrap();
                let before: Vec<_> = maker
                    .windows
                    .iter()
                    .map(|(path, _)| std::fs::read(path).unwrap())
                    .collect();
                let writable = reactor.block_on(graph.make_writable(&name));
                if lower == &"qed" {
                    let text = writable.expect_err(&what).to_string();
                    assert!(text.contains("QED images are only read"), "{what}: {text}");
                    continue;
                }
                writable.unwrap_or_else(|error| panic!("{what}: {error}"));
                let mut expected = read(&graph, &reactor, &name);
                let view = || View::of(graph.root(&name).unwrap().chain());
                let end = expected.len();
                for (start, len) in [(0, 512), (end / 1024 * 512, 5120), (end - 512, 512)] {
                    let bytes = AlignedBuf::copy_of(&maker.random(len));
                    // SAFETY: `bytes` outlives the operation.
                    let bufs = unsafe { IoBufs::of(&bytes, 0, len) };
                    reactor.block_on(view().write(start as u64, bufs)).unwrap();
                    expected[start..start + len].copy_from_slice(&bytes);
                }
                reactor
                    .block_on(view().write_zeroes(8192, 4096, true))
                    .unwrap();
                expected[8192..8192 + 4096].fill(0);
                assert!(read(&graph, &reactor, &name) == expected, "{what}");
                reactor.block_on(graph.close());
                drop(graph);
                node[child(upper)]
                    .as_object_mut()
                    .unwrap()
                    .remove("read-only");
                assert!(of_qemu(&mut maker, &node) == expected, "{what}, to QEMU");
                for ((path, window), before) in maker.windows.iter().zip(before) {
                    let after = std::fs::read(path).unwrap();
                    let beside = after[..window.start] == before[..window.start]
                        && after[window.end..] == before[window.end..];
                    assert!(beside, "{what}: a write reached past the window");
                }
            }
            maker.windows.clear();
            maker.loops.clear();
        }
    }
}

/// A size or an offset that is not whole blocks is refused; a file's odd end is not.
#[test]
fn windows_are_whole_blocks() {
    let reactor = Reactor::for_this_thread().unwrap();
    let mut maker = Maker::new(3);
    let bytes = maker.random(10_000);
    let file = maker.file(&bytes);
    let node = |more: Value| {
        let mut node = json!({"driver": "raw", "file": {"driver": "file", "filename": file}});
        node.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        node
    };
    for (more, expected) in [
        (
            json!({"size": 1000}),
            "size (1000) is not a multiple of 512 bytes",
        ),
        (
            json!({"size": 10_240}),
            "The sum of offset (0) and size (10240)",
        ),
        (
            json!({"offset": 10_001}),
            "Offset (10001) cannot be greater",
        ),
        (json!({"offset": u64::MAX - 511, "size": 1024}), "Offset"),
        (
            json!({"offset": 100, "cache": {"direct": true}}),
            "offset (100) is not a multiple of",
        ),
    ] {
        let error = open(&Graph::default(), &reactor, &node(more), "raw", false).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    // The last sector is completed by zeros, and by the first write to it.
    for offset in [0, 100] {
        let graph = Graph::default();
        let name = open(
            &graph,
            &reactor,
            &node(json!({"offset": offset})),
            "raw",
            false,
        )
        .unwrap();
        let mut expected = std::fs::read(&file).unwrap()[offset..].to_vec();
        expected.resize((10_000 - offset).next_multiple_of(512), 0);
        assert!(read(&graph, &reactor, &name) == expected);
    }
}

/// A filter of a filter writes through both.
#[test]
fn filters_of_filters_are_written() {
    let reactor = Reactor::for_this_thread().unwrap();
    let mut maker = Maker::new(4);
    let disk = maker.random(SIZE);
    let below = json!({"driver": "raw",
        "file": {"driver": "file", "filename": maker.file(&disk)}});
    let image = maker.file(&[]);
    create(Path::new(&image), "cluster_size=4k", SIZE as u64);
    let node = json!({"driver": "copy-on-read", "file": {"driver": "copy-on-read", "file":
        {"driver": "qcow2", "backing": below, "file": {"driver": "file", "filename": image}}}});
    let graph = Graph::default();
    let name = open(&graph, &reactor, &node, "copy-on-read", false).unwrap();
    reactor.block_on(graph.make_writable(&name)).unwrap();
    assert!(read(&graph, &reactor, &name) == disk);
    reactor.block_on(graph.close());
    drop(graph);
    // It was copied.
    let alone = json!({"driver": "qcow2", "backing": null,
        "file": {"driver": "file", "filename": image}});
    assert!(of_qemu(&mut maker, &alone) == disk);
}

/// What a user has made read-only is not written, whatever is over it.
#[test]
fn a_read_only_node_is_not_written_through_another() {
    let reactor = Reactor::for_this_thread().unwrap();
    let mut maker = Maker::new(5);
    let disk = maker.random(SIZE);
    let file = json!({"driver": "file", "filename": maker.file(&disk), "read-only": true});
    for node in [
        json!({"driver": "raw", "file": file}),
        json!({"driver": "raw", "offset": 512, "file": file}),
    ] {
        let graph = Graph::default();
        let name = open(&graph, &reactor, &node, "raw", true).unwrap();
        let error = reactor.block_on(graph.make_writable(&name)).unwrap_err();
        assert!(
            error.to_string().contains("'below' is read-only"),
            "{error}"
        );
    }
    let filter = json!({"driver": "copy-on-read", "read-only": true,
        "file": {"driver": "file", "filename": maker.file(&disk)}});
    let graph = Graph::default();
    let name = open(&graph, &reactor, &filter, "copy-on-read", false).unwrap();
    let error = reactor.block_on(graph.make_writable(&name)).unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");
}
