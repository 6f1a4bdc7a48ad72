//! A request that keeps the chain of before a stream's end, while another one uses the new chain.

use std::sync::Arc;

use stratablk_model::chain::{Chain, Layer, Root, Span, View};
use stratablk_model::disk::Disk;
use stratablk_model::format::{Format, Qcow2, Raw, qcow2};
use stratablk_model::reactor::Reactor;
use stratablk_model::shuttle::future::block_on;
use stratablk_model::shuttle::thread;
use stratablk_model::storage::{AlignedBuf, IoBufs, Storage};

use crate::many_orders;
use crate::support::create_over;

/// One cluster is worked on.
const CLUSTER: usize = 4096;
const SIZE: usize = 4 * CLUSTER;

fn layer(format: Format, storage: Arc<dyn Storage>, read_only: bool) -> Arc<Layer> {
    Arc::new(Layer {
        name: "layer".into(),
        format,
        storage,
        read_only,
        discard: true,
        copy_on_read: false,
    })
}

/// The image over a base of ones, and a stream that has copied all of it.
async fn streamed(image: Vec<u8>) -> Chain {
    let options = qcow2::Options {
        writable: true,
        discard: true,
        ..Default::default()
    };
    let top = Disk::new(image);
    let base = Disk::new(vec![1; SIZE]);
    let opened = Arc::new(Qcow2::open(top.clone(), options).await.unwrap());
    let chain = Chain::new(vec![
        layer(Format::Qcow2(opened), top, false),
        layer(Format::Raw(Raw::new(SIZE as u64)), base, true),
    ]);
    let chain = Arc::new(chain.unwrap());
    let view = View::of(chain.clone());
    view.copy(Span::new(0, 2), 0, SIZE as u64).await.unwrap();
    drop(view);
    Arc::into_inner(chain).unwrap()
}

async fn write(view: std::rc::Rc<View>, sector: u64, value: u8) {
    let mut buffer = AlignedBuf::zeroed(512);
    buffer.fill(value);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, 512) };
    view.write(sector * 512, bufs).await.unwrap();
}

/// One guest began before the stream's end, and writes a sector. Another one has the new chain, and
/// clears the cluster twice: the second time perhaps when the old chain is gone.
fn work(image: &[u8]) {
    let _reactor = Reactor::for_this_thread().unwrap();
    let root = Root::new(block_on(streamed(image.to_vec())));
    let old = root.chain();
    let top = old.top().clone();
    root.publish(Arc::new(Chain::new(vec![top]).unwrap()));
    let late = thread::spawn(move || block_on(write(View::of(old), 1, 3)));
    let clearing = root.clone();
    let clears = thread::spawn(move || {
        for _ in 0..2 {
            let view = View::of(clearing.chain());
            block_on(view.write_zeroes(0, CLUSTER as u64, true)).unwrap();
        }
    });
    late.join().unwrap();
    clears.join().unwrap();
    let buffer = AlignedBuf::zeroed(CLUSTER);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, CLUSTER) };
    block_on(View::of(root.chain()).read(0, bufs)).unwrap();
    for (sector, bytes) in buffer.chunks(512).enumerate() {
        let fine = |byte: &u8| *byte == 0 || (sector == 1 && *byte == 3);
        assert!(
            bytes.iter().all(fine),
            "sector {sector} is {}: the base is back",
            bytes[0]
        );
    }
}

#[test]
fn an_old_chain_beside_the_new_one() {
    for options in ["cluster_size=4k", "cluster_size=4k,compat=0.10"] {
        let dir = tempfile::tempdir().unwrap();
        let (top, base) = (dir.path().join("top.qcow2"), dir.path().join("base"));
        std::fs::write(&base, vec![1; SIZE]).unwrap();
        create_over(&top, options, &base, "raw");
        let image = Arc::new(std::fs::read(&top).unwrap());
        many_orders(300, move || work(&image));
    }
}
