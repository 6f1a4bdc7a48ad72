//! A turning switch: a guest's write before, through or after it, while another request copies its
//! cluster into the new top.
//!
//! What would be caught: a write that lands in the old top when a copy of its cluster hides it; a
//! copy that waits for a write that has ended, or for itself.

use std::sync::Arc;

use stratablk_model::chain::turn::{Share, Turn};
use stratablk_model::chain::{Chain, Layer, Root, Span, View};
use stratablk_model::disk::Disk;
use stratablk_model::format::{Format, Qcow2, Raw, qcow2};
use stratablk_model::reactor::Reactor;
use stratablk_model::shuttle::future::block_on;
use stratablk_model::shuttle::thread;
use stratablk_model::storage::{AlignedBuf, IoBufs, Storage};
use stratablk_model::sync::Mutex;
use stratablk_model::sync::atomic::{AtomicBool, Ordering};

use crate::many_orders;
use crate::support::create;

/// One cluster is worked on.
const CLUSTER: usize = 4096;
const SIZE: usize = 4 * CLUSTER;
/// Points between a request's admission and its write at which others may go on.
const DELAY: usize = 40;

fn layer(format: Format, storage: Arc<dyn Storage>) -> Arc<Layer> {
    Arc::new(Layer {
        name: "layer".into(),
        format,
        storage,
        read_only: false,
        discard: true,
        copy_on_read: false,
    })
}

fn empty_image() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    create(&path, "cluster_size=4k", SIZE as u64);
    std::fs::read(path).unwrap()
}

async fn open(image: &[u8]) -> (Arc<Qcow2>, Arc<Layer>) {
    let options = qcow2::Options {
        writable: true,
        discard: true,
        ..Default::default()
    };
    let disk = Disk::new(image.to_vec());
    let opened = Arc::new(Qcow2::open(disk.clone(), options).await.unwrap());
    (opened.clone(), layer(Format::Qcow2(opened), disk))
}

/// What a queue knows: whether it admits requests, and what it has begun.
#[derive(Default)]
struct Queue {
    held: bool,
    /// The sectors of requests that are on their way.
    begun: Vec<u64>,
    late: Vec<Share<u64>>,
}

/// What another request does meanwhile.
#[derive(Clone, Copy, Debug)]
enum Other {
    /// It writes another sector of the cluster.
    Write,
    /// It copies the cluster up, as a job or a read does.
    Copy,
    /// It writes all of the cluster but the sector in which the first one writes, in two parts.
    Around,
}

async fn write(chain: Arc<Chain>, sector: u64, count: usize, value: u8) {
    let mut buffer = AlignedBuf::zeroed(count * 512);
    buffer.fill(value);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, count * 512) };
    View::of(chain).write(sector * 512, bufs).await.unwrap();
}

/// A write of one sector by the rules of a queue: it is admitted, takes its view, and ends.
fn guest(queue: &Mutex<Queue>, root: &Root, sector: u64, value: u8) {
    loop {
        let mut state = queue.lock();
        if !state.held {
            state.begun.push(sector);
            break;
        }
        drop(state);
        thread::yield_now();
    }
    let chain = root.chain();
    // Storage takes its time: most orders have something happen meanwhile.
    let point = AtomicBool::new(false);
    for _ in 0..DELAY {
        point.load(Ordering::SeqCst);
    }
    block_on(write(chain, sector, 1, value));
    let mut state = queue.lock();
    state.begun.retain(|begun| *begun != sector);
    let (ended, late) = std::mem::take(&mut state.late)
        .into_iter()
        .partition::<Vec<_>, _>(|share| share.request == sector);
    state.late = late;
    drop(state);
    drop(ended);
}

fn switch(queue: &Mutex<Queue>, root: &Arc<Root>, top: (Arc<Qcow2>, Arc<Layer>), hand_over: bool) {
    let turn = Turn {
        root: root.clone(),
        images: vec![top.0],
        in_place: false,
    };
    {
        let mut state = queue.lock();
        state.held = true;
        for sector in state.begun.clone() {
            if hand_over {
                let range = sector * 512..(sector + 1) * 512;
                let writes = turn.hand_over(&range);
                state.late.push(Share::new(sector, writes));
            }
        }
    }
    let old = root.chain();
    let layers = vec![top.1, old.top().clone()];
    let next = Chain::new(layers).unwrap();
    root.publish(Arc::new(next.closing(vec![old.top().clone()])));
    queue.lock().held = false;
    block_on(turn.late_writes_end());
    assert!(queue.lock().late.is_empty());
}

fn work(image: &[u8], old_is_raw: bool, other: Other, hand_over: bool) {
    let _reactor = Reactor::for_this_thread().unwrap();
    let old = match old_is_raw {
        true => layer(Format::Raw(Raw::new(SIZE as u64)), Disk::new(vec![0; SIZE])),
        false => block_on(open(image)).1,
    };
    let root = Root::new(Chain::new(vec![old]).unwrap());
    block_on(write(root.chain(), 0, 8, 1));
    let top = block_on(open(image));
    let queue = Arc::new(Mutex::new(Queue::default()));
    let first = {
        let (queue, root) = (queue.clone(), root.clone());
        thread::spawn(move || guest(&queue, &root, 1, 2))
    };
    let second = {
        let (queue, root) = (queue.clone(), root.clone());
        thread::spawn(move || match other {
            Other::Write => guest(&queue, &root, 5, 3),
            Other::Copy => {
                let view = View::of(root.chain());
                let span = Span::new(0, view.chain.layers().len());
                block_on(view.copy(span, 0, CLUSTER as u64)).unwrap();
            }
            Other::Around => {
                guest(&queue, &root, 0, 3);
                guest(&queue, &root, 7, 3);
            }
        })
    };
    switch(&queue, &root, top, hand_over);
    first.join().unwrap();
    second.join().unwrap();
    let buffer = AlignedBuf::zeroed(CLUSTER);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, CLUSTER) };
    block_on(View::of(root.chain()).read(0, bufs)).unwrap();
    let others: &[usize] = match other {
        Other::Write => &[5],
        Other::Copy => &[],
        Other::Around => &[0, 7],
    };
    for (sector, bytes) in buffer.chunks(512).enumerate() {
        let wanted = match sector {
            1 => 2,
            sector if others.contains(&sector) => 3,
            _ => 1,
        };
        assert!(bytes.iter().all(|byte| *byte == wanted), "sector {sector}");
    }
}

fn orders(runs: usize, old_is_raw: bool, other: Other) {
    let image = Arc::new(empty_image());
    many_orders(runs, move || work(&image, old_is_raw, other, true));
}

#[test]
fn a_late_write_and_a_copy_on_write() {
    orders(1500, true, Other::Write);
    orders(1000, false, Other::Write);
}

#[test]
fn a_late_write_and_the_copy_of_a_job() {
    orders(1500, true, Other::Copy);
    orders(1000, false, Other::Copy);
}

#[test]
fn a_late_write_and_two_copies_on_write() {
    orders(1500, false, Other::Around);
}

/// That the model can tell: what is not handed over is lost in some order.
#[test]
fn a_late_write_that_is_not_handed_over_is_lost() {
    let image = Arc::new(empty_image());
    let lost = std::panic::catch_unwind(move || {
        many_orders(4_000, move || work(&image, true, Other::Write, false));
    });
    let found = lost.expect_err("no order was found");
    let words = found.downcast_ref::<String>().map_or("", String::as_str);
    assert!(
        words.contains("sector"),
        "something else went wrong: {words}"
    );
}
