//! Requests that go on while the disk under them changes.

use serde_json::json;
use stratablk::chain::View;
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
