//! A snapshot that is prepared and let go of, while others flush and write.
//!
//! What would be caught: changes that are written to tables which the header does not name; a flush
//! that is over while what was written before is not what the next process finds; locks that are taken
//! in two orders; clusters that leak.

use std::sync::Arc;
use std::time::SystemTime;

use stratablk_model::chain::{Chain, Layer, View};
use stratablk_model::disk::Disk;
use stratablk_model::format::{Format, Qcow2, qcow2};
use stratablk_model::reactor::Reactor;
use stratablk_model::shuttle::future::block_on;
use stratablk_model::shuttle::thread;
use stratablk_model::storage::{AlignedBuf, IoBufs};

use crate::many_orders;
use crate::qcow2::Image;
use crate::support::create;

const CLUSTER: usize = 4096;
const SIZE: usize = 4 * CLUSTER;

fn open(disk: &Arc<Disk>) -> (Arc<Qcow2>, Arc<Chain>) {
    let options = qcow2::Options {
        writable: true,
        ..Default::default()
    };
    let image = Arc::new(block_on(Qcow2::open(disk.clone(), options)).unwrap());
    let layer = Layer {
        name: "layer".into(),
        format: Format::Qcow2(image.clone()),
        storage: disk.clone(),
        read_only: false,
        discard: false,
        copy_on_read: false,
    };
    let chain = Chain::new(vec![Arc::new(layer)]).unwrap();
    (image, Arc::new(chain))
}

fn write(chain: &Arc<Chain>, cluster: usize, value: u8) {
    let mut buffer = AlignedBuf::zeroed(CLUSTER);
    buffer.fill(value);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, CLUSTER) };
    let view = View::of(chain.clone());
    block_on(view.write((cluster * CLUSTER) as u64, bufs)).unwrap();
}

/// What each cluster has that another process finds.
fn found(bytes: Vec<u8>) -> Vec<u8> {
    let (_image, chain) = open(&Disk::new(bytes));
    let buffer = AlignedBuf::zeroed(SIZE);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, SIZE) };
    block_on(View::of(chain).read(0, bufs)).unwrap();
    buffer.chunks(CLUSTER).map(|cluster| cluster[9]).collect()
}

fn work(bytes: &[u8]) {
    let _reactor = Reactor::for_this_thread().unwrap();
    let disk = Disk::new(bytes.to_vec());
    let (image, chain) = open(&disk);
    write(&chain, 0, 1);
    let flushing = {
        let image = image.clone();
        thread::spawn(move || block_on(image.flush()).unwrap())
    };
    let writing = {
        let (image, chain, disk) = (image.clone(), chain.clone(), disk.clone());
        thread::spawn(move || {
            write(&chain, 0, 2);
            write(&chain, 1, 3);
            block_on(image.flush()).unwrap();
            disk.snapshot()
        })
    };
    let names = ["one".to_owned()];
    let prepared = block_on(image.take_snapshots(&names, SystemTime::UNIX_EPOCH));
    drop(prepared.unwrap());
    flushing.join().unwrap();
    let flushed = writing.join().unwrap();
    assert_eq!(found(flushed), [2, 3, 0, 0], "what was flushed");
    write(&chain, 2, 4);
    drop(chain);
    block_on(image.close()).unwrap();
    let bytes = disk.snapshot();
    let checked = Image::new(&bytes).and_then(|image| image.check());
    assert_eq!(checked, Ok(0), "clusters leaked, or what is wrong");
    assert_eq!(found(bytes), [2, 3, 4, 0]);
    assert_eq!(image.header().snapshots, 0);
}

#[test]
fn a_snapshot_that_is_let_go_of_while_others_flush_and_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    create(&path, "cluster_size=4k", SIZE as u64);
    let bytes = Arc::new(std::fs::read(path).unwrap());
    many_orders(600, move || work(&bytes));
}
