//! Disks in disks.
//!
//! What would be caught: a disk below that is served through a chain of another time, one that is
//! closed while an image in it has still to write, while that is being closed, or before it.

use std::time::Instant;

use super::*;
use crate::chain::{Backed, View};
use crate::format::qcow2::create::{CreateOptions, create};
use crate::format::{Qcow2, qcow2};
use crate::graph::compile::compile;
use crate::reactor::Reactor;
use crate::storage::fault::{Call, FaultStorage, Gate};
use crate::storage::memory::Step;
use crate::storage::{AlignedBuf, IoBufs, Storage};

const CLUSTER: usize = 64 << 10;

/// A node whose chain was made in a graph that has changed by the time it is published.
#[test]
fn a_disk_below_has_the_chain_of_the_graph_that_it_is_published_in() {
    let graph = Graph::default();
    graph.add(node("base", 1)).unwrap();
    graph
        .add(node("image", 2).over(Role::Backing, Some("base")))
        .unwrap();
    let mut late = graph.transaction();
    let root = Root::new(compile(late.state(), "image").unwrap());
    late.keep_inner(&root, "image").unwrap();
    late.add(node("above", 1).over(Role::File, Some("image")))
        .unwrap();
    let replace = |sectors| {
        let layer = Arc::new(layer("image", sectors));
        graph.replace_layer("image", layer).unwrap();
    };
    replace(7);
    assert_eq!(sectors(&root), [2, 1], "nobody knows it yet");
    graph.commit(late).unwrap();
    assert_eq!(sectors(&root), [7, 1]);
    replace(8);
    assert_eq!(sectors(&root), [8, 1]);
    graph.set_backing("image", None).unwrap();
    assert_eq!(sectors(&root), [8]);
}

/// Image `top` in the disk of image `inner`, which is in a file; both are open to be written, and
/// nobody has a grant.
struct Nest {
    graph: Graph,
    reactor: Reactor,
    /// Where calls of the file may hang.
    gate: Arc<Gate>,
    /// And those of the disk in between.
    between: Arc<Gate>,
    bottom: Arc<MemoryStorage>,
}

impl Drop for Nest {
    fn drop(&mut self) {
        Reactor::leave_thread();
    }
}

fn image_in(reactor: &Reactor, storage: Arc<dyn Storage>, name: &str) -> Node {
    let options = qcow2::Options {
        writable: true,
        ..Default::default()
    };
    let opened = Qcow2::open(storage.clone(), options);
    let format = Format::Qcow2(Arc::new(reactor.block_on(opened).unwrap()));
    let layer = Layer {
        format,
        storage,
        read_only: false,
        ..layer(name, 1)
    };
    let options = options_of(name, "qcow2");
    Node::new(options, layer, PathBuf::from("/disk"))
}

fn options_of(name: &str, driver: &str) -> BlockdevOptions {
    options(&json!({"driver": driver, "node-name": name, "file": "x"}))
}

impl Nest {
    fn new() -> Self {
        let reactor = Reactor::for_this_thread().unwrap();
        let (gate, graph) = (Arc::new(Gate::default()), Graph::default());
        let bottom = Arc::new(MemoryStorage::new(Vec::new()));
        let file = FaultStorage::over(bottom.clone()).with_gate(&gate);
        let file: Arc<dyn Storage> = Arc::new(file);
        let new_image = |storage: &dyn Storage, size| {
            let options = CreateOptions::new(size);
            reactor.block_on(create(storage, &options)).unwrap();
        };
        new_image(&*file, 4 << 20);
        graph.add(node("file", 1)).unwrap();
        let inner = image_in(&reactor, file, "inner");
        graph.add(inner.over(Role::File, Some("file"))).unwrap();
        let mut transaction = graph.transaction();
        let root = Root::new(compile(transaction.state(), "inner").unwrap());
        transaction.keep_inner(&root, "inner").unwrap();
        let disk = Backed::new(root).unwrap();
        new_image(&disk, 1 << 20);
        let between = Arc::new(Gate::default());
        let disk = FaultStorage::over(Arc::new(disk)).with_gate(&between);
        let top = image_in(&reactor, Arc::new(disk), "top");
        transaction
            .add(top.over(Role::File, Some("inner")))
            .unwrap();
        graph.commit(transaction).unwrap();
        Self {
            graph,
            reactor,
            gate,
            between,
            bottom,
        }
    }

    fn grant(&self) -> Grant {
        let request = Request::disk(Holder::Tool, "top", true);
        self.graph.grant(request).unwrap()
    }

    /// For a job that copies into the disk below, which reads the same all the while.
    fn job(&self) -> Grant {
        let layers = ["inner".to_owned()];
        let request = Request::stream(&self.graph.state(), "j", &layers);
        self.graph.grant(request).unwrap()
    }

    /// Begins to give a grant back.
    fn give_back(&self, grant: Grant) {
        self.reactor
            .spawn(async move { grant.give_back().await.unwrap() });
    }

    fn run_until(&self, done: impl Fn() -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !done() {
            assert!(Instant::now() < deadline, "it never comes");
            if !self.reactor.turn() {
                self.reactor.wait(Some(Duration::from_millis(1)));
            }
        }
    }

    fn is_open(&self, name: &str) -> bool {
        !self.graph.node(name).unwrap().layer.read_only
    }

    fn write(&self, value: u8) {
        let buffer = AlignedBuf::copy_of(&[value; CLUSTER]);
        // SAFETY: `buffer` outlives the write.
        let bufs = unsafe { IoBufs::of(&buffer, 0, CLUSTER) };
        let chain = self.graph.root("top").unwrap().chain();
        let at = u64::from(value) * CLUSTER as u64;
        self.reactor
            .block_on(View::of(chain).write(at, bufs))
            .unwrap();
    }

    /// What the file holds, opened anew.
    fn holds(&self, value: u8) -> bool {
        let left: Arc<dyn Storage> = Arc::new(MemoryStorage::new(self.bottom.snapshot()));
        let chain = |storage: Arc<dyn Storage>| {
            let node = image_in(&self.reactor, storage, "again");
            Chain::new(vec![node.layer]).unwrap()
        };
        let disk = Backed::new(Root::new(chain(left))).unwrap();
        let again = Arc::new(chain(Arc::new(disk)));
        let buffer = AlignedBuf::zeroed(CLUSTER);
        // SAFETY: `buffer` outlives the read.
        let bufs = unsafe { IoBufs::of(&buffer, 0, CLUSTER) };
        let at = u64::from(value) * CLUSTER as u64;
        self.reactor
            .block_on(View::of(again).read(at, bufs))
            .unwrap();
        *buffer == [value; CLUSTER]
    }
}

/// A job comes and goes while an image in the disk is being closed.
#[test]
fn a_disk_is_not_closed_while_an_image_in_it_is_being_closed() {
    let nest = Nest::new();
    let grant = nest.grant();
    nest.write(1);
    nest.gate.shut(&[Call::Sync]);
    nest.give_back(grant);
    nest.run_until(|| nest.gate.hung() > 0);
    assert!(!nest.is_open("top"), "it is being closed");
    // Nobody has the image in it any more.
    nest.give_back(nest.job());
    while nest.reactor.turn() {}
    assert!(nest.is_open("inner"), "closed under what is still written");
    // Somebody has the image in it again before the job's end goes on.
    let again = nest.grant();
    nest.gate.open();
    nest.run_until(|| nest.reactor.tasks() == 0);
    assert!(nest.is_open("inner"), "closed under a grant");
    nest.give_back(again);
    nest.run_until(|| nest.reactor.tasks() == 0);
    assert!(!nest.is_open("top") && !nest.is_open("inner"));
    assert!(nest.holds(1));
}

/// A grant that is dropped leaves its image open, and so what that is in.
#[test]
fn a_disk_is_not_closed_while_an_image_in_it_is_open() {
    let nest = Nest::new();
    let grant = nest.grant();
    nest.write(1);
    drop(grant);
    nest.give_back(nest.job());
    nest.run_until(|| nest.reactor.tasks() == 0);
    assert!(nest.is_open("top") && nest.is_open("inner"));
    let grant = nest.grant();
    nest.write(2);
    nest.give_back(grant);
    nest.run_until(|| nest.reactor.tasks() == 0);
    assert!(!nest.is_open("top") && !nest.is_open("inner"));
    assert!(nest.holds(1) && nest.holds(2));
}

/// The disk is closed behind what is in it: while an image hangs on its way down, the file is left
/// alone.
#[test]
fn the_graph_closes_an_image_before_the_disk_that_it_is_in() {
    let nest = Nest::new();
    nest.write(1);
    nest.bottom.record();
    nest.between.shut(&[Call::Sync]);
    let graph = nest.graph.clone();
    nest.reactor.spawn(async move { graph.close().await });
    nest.run_until(|| nest.between.hung() > 0);
    let log = nest.bottom.take_log();
    assert!(!log.contains(&Step::Sync), "the disk was closed before");
    nest.between.open();
    nest.run_until(|| nest.reactor.tasks() == 0);
    assert!(nest.holds(1));
}
