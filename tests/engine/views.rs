//! Requests that go on while the disk under them changes.

use std::sync::Arc;

use serde_json::json;
use stratablk::chain::{Chain, Span, View};
use stratablk::format::Format;
use stratablk::graph::Graph;
use stratablk::options::{BlockdevOptions, Dialect};
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::support::*;

const LEN: usize = 64 << 10;

/// What would be caught: a request that began when the image was open for reading, and sees the
/// clusters that it found used for something else, because the image was opened anew for writing
/// and knows nothing of it.
#[test]
fn a_reader_from_before_an_image_became_writable() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "cluster_size=4k", 1 << 20);
    let name = path.to_str().unwrap();
    let write = format!("write -q -P 7 0 {LEN}");
    run("qemu-io", &["-f", "qcow2", "-c", &write, name]);
    let value = json!({
        "driver": "qcow2", "node-name": "top", "discard": "unmap",
        "file": {"driver": "file", "filename": name},
    });
    let options = BlockdevOptions::from_value(&value, Dialect::Json).unwrap();
    let reactor = Reactor::for_this_thread().unwrap();
    let graph = Graph::default();
    reactor.block_on(graph.open(&options)).unwrap();
    let root = graph.root("top").unwrap();
    let read = |view: std::rc::Rc<View>| {
        let buffer = AlignedBuf::zeroed(LEN);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, LEN) };
        reactor.block_on(view.read(0, bufs)).unwrap();
        buffer.to_vec()
    };
    let old = View::of(root.chain());
    assert!(read(old.clone()) == [7; LEN]);
    reactor.block_on(graph.make_writable("top")).unwrap();
    let chain = root.chain();
    let discard = View::of(chain.clone()).discard(0, LEN as u64);
    reactor.block_on(discard).unwrap();
    for round in 1..4 {
        reactor.block_on(chain.flush()).unwrap();
        let at = (round * LEN) as u64;
        write_value(&reactor, &chain, at, LEN, 8).unwrap();
    }
    assert!(
        read(old.clone()) == [7; LEN],
        "its clusters were used again"
    );
    drop(old);
    assert!(read(View::of(chain.clone())) == [0; LEN]);
    drop(chain);
    reactor.block_on(graph.close());
    drop((graph, root));
    check(&path, false);
}

/// What would be caught: a unit that is copied up to the smaller size alone that a disk shows while it
/// is about to shrink, where the size then stays after all, and the rest of the unit reads as zeros.
#[test]
fn a_copy_while_a_disk_is_about_to_shrink() {
    const SIZE: u64 = 1 << 20;
    const SMALLER: u64 = (512 << 10) + 512;
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (in_dir(&dir, "base"), in_dir(&dir, "top"));
    std::fs::write(&base, vec![5; SIZE as usize]).unwrap();
    create_over(&top, "cluster_size=64k", &base, "raw");
    let disk = Disk::open(&top, "qcow2", json!({}));
    let view = disk.view();
    let Format::Qcow2(image) = &view.chain.top().format else {
        panic!("not qcow2");
    };
    image.show(SMALLER);
    let copied = disk
        .reactor
        .block_on(view.copy(Span::new(0, 2), 512 << 10, 512));
    assert!(copied.unwrap().data > 0);
    image.show(SIZE);
    assert!(disk.read(0, SIZE as usize) == vec![5; SIZE as usize]);
    drop(view);
    disk.close();
}

/// What would be caught: a change that waits for the requests of the last chain alone, where one
/// that began with a chain before it is still on its way.
#[test]
fn requests_of_all_chains_before_are_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let image = in_dir(&dir, "image");
    create(&image, "cluster_size=64k", 1 << 20);
    let disk = Disk::open(&image, "qcow2", json!({}));
    let request = disk.view();
    for _ in 0..2 {
        let next = Chain::new(request.chain.layers().to_vec()).unwrap();
        drop(disk.root.publish(Arc::new(next)));
    }
    let first = request.chain.grace().clone();
    let past = disk.root.past();
    assert!(past.iter().any(|grace| Arc::ptr_eq(grace, &first)));
    assert!(!first.is_over());
    drop(request);
    assert!(past.iter().all(|grace| grace.is_over()));
    disk.close();
}
