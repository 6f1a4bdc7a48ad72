//! Opening images as the daemon does, and asking QEMU's tools about them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;
use std::sync::Arc;

use serde_json::json;
use stratablk::chain::{Chain, Layer, Root, View};
use stratablk::format::{Format, Qcow2, qcow2};
use stratablk::graph::Graph;
use stratablk::options::{BlockdevOptions, Dialect};
use stratablk::reactor::Reactor;
use stratablk::storage::memory::MemoryStorage;
use stratablk::storage::{AlignedBuf, IoBufs, Storage};

/// Runs a tool; anything but success ends the test with its output.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = output(program, args);
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn output(program: &str, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"))
}

/// Fails unless `qemu-img check` finds no error. Leaks are told apart: they are allowed after
/// a kill, not after a clean close.
pub fn check(path: &Path, leaks_allowed: bool) {
    let output = output(
        "qemu-img",
        &["check", "-f", "qcow2", path.to_str().unwrap()],
    );
    let code = output.status.code();
    let fine = code == Some(0) || (leaks_allowed && code == Some(3));
    assert!(
        fine,
        "qemu-img check {}: {code:?}\n{}{}",
        path.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

pub fn create(path: &Path, options: &str, size: u64) {
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            path.to_str().unwrap(),
            &size.to_string(),
        ],
    );
}

pub fn create_over(path: &Path, options: &str, backing: &Path, format: &str) {
    let mut args = vec![
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        backing.to_str().unwrap(),
        "-F",
    ];
    args.push(format);
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.push(path.to_str().unwrap());
    run("qemu-img", &args);
}

/// An image opened for writing, with everything under it.
pub struct Disk {
    pub graph: Graph,
    pub root: Arc<Root>,
    pub name: String,
    pub reactor: Reactor,
}

impl Disk {
    pub fn open(path: &Path, driver: &str, more: serde_json::Value) -> Self {
        Self::try_open(path, driver, more).unwrap()
    }

    pub fn try_open(
        path: &Path,
        driver: &str,
        more: serde_json::Value,
    ) -> stratablk::error::Result<Self> {
        let mut value = json!({
            "driver": driver, "node-name": "top", "discard": "unmap",
            "file": {"driver": "file", "filename": path.to_str().unwrap()},
        });
        for (key, option) in more.as_object().into_iter().flatten() {
            value[key] = option.clone();
        }
        let options = BlockdevOptions::from_value(&value, Dialect::Json).unwrap();
        let reactor = Reactor::for_this_thread().unwrap();
        let graph = Graph::default();
        let name = reactor.block_on(graph.open(&options))?;
        if !options.read_only {
            reactor.block_on(graph.make_writable(&name))?;
        }
        let root = graph.root(&name)?;
        Ok(Self {
            graph,
            root,
            name,
            reactor,
        })
    }

    pub fn view(&self) -> Rc<View> {
        View::of(self.root.chain())
    }

    pub fn size(&self) -> u64 {
        self.root.chain().size()
    }

    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let buffer = AlignedBuf::zeroed(len);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
        self.reactor
            .block_on(self.view().read(offset, bufs))
            .unwrap();
        buffer.to_vec()
    }

    pub fn try_write(&self, offset: u64, bytes: &[u8]) -> stratablk::error::Result<()> {
        let buffer = AlignedBuf::copy_of(bytes);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, bytes.len()) };
        self.reactor.block_on(self.view().write(offset, bufs))
    }

    pub fn close(self) {
        self.reactor.block_on(self.graph.close());
    }
}

/// A file name in a folder of the test's own.
pub fn in_dir(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    dir.path().join(name)
}

/// Writes `bytes` as a raw image and compares it with `path` as the guest sees it.
pub fn compare(path: &Path, format: &str, bytes: &[u8]) {
    let expected = path.with_extension("expected");
    std::fs::write(&expected, bytes).unwrap();
    run(
        "qemu-img",
        &[
            "compare",
            "-f",
            format,
            "-F",
            "raw",
            path.to_str().unwrap(),
            expected.to_str().unwrap(),
        ],
    );
}

/// Opens an image in memory for writing, with nothing under it.
pub fn open_memory(reactor: &Reactor, storage: &Arc<MemoryStorage>) -> (Arc<Qcow2>, Arc<Chain>) {
    open_memory_with(reactor, storage, qcow2::DEFAULT_CACHE_BYTES)
}

/// As [`open_memory`], with as many bytes for metadata in memory.
pub fn open_memory_with(
    reactor: &Reactor,
    storage: &Arc<MemoryStorage>,
    cache_bytes: u64,
) -> (Arc<Qcow2>, Arc<Chain>) {
    let options = qcow2::Options {
        writable: true,
        cache_bytes,
        ..Default::default()
    };
    let image = reactor
        .block_on(Qcow2::open(storage.clone(), options))
        .unwrap();
    let image = Arc::new(image);
    let layer = Layer {
        name: "top".into(),
        format: Format::Qcow2(image.clone()),
        storage: storage.clone() as Arc<dyn Storage>,
        read_only: false,
        discard: false,
        copy_on_read: false,
    };
    (image, Arc::new(Chain::new(vec![Arc::new(layer)]).unwrap()))
}

/// Writes `len` bytes of `value`; the error number if it fails.
pub fn write_value(
    reactor: &Reactor,
    chain: &Arc<Chain>,
    offset: u64,
    len: usize,
    value: u8,
) -> Result<(), i32> {
    let mut buffer = AlignedBuf::zeroed(len);
    buffer.fill(value);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
    reactor
        .block_on(View::of(chain.clone()).write(offset, bufs))
        .map_err(|error| error.errno())
}
