//! An internal snapshot, while a queue and a task write to a cluster that it comes to share.
//!
//! What would be caught: a write in place that is lost, since its cluster was copied before it landed;
//! a write that begins after the snapshot and lands in it; one that completed before and does not; a
//! request that waits for itself.

use std::sync::Arc;
use std::time::SystemTime;

use stratablk_model::chain::turn::{Share, Turn};
use stratablk_model::chain::{Chain, Layer, Pieces, Root, Source, View};
use stratablk_model::disk::Disk;
use stratablk_model::format::{Format, Qcow2, qcow2};
use stratablk_model::reactor::Reactor;
use stratablk_model::shuttle::future::block_on;
use stratablk_model::shuttle::thread;
use stratablk_model::storage::{AlignedBuf, IoBufs, io};
use stratablk_model::sync::Mutex;
use stratablk_model::sync::atomic::{AtomicBool, Ordering};

use crate::many_orders;
use crate::support::create;

/// One cluster is worked on.
const CLUSTER: usize = 4096;
const SIZE: usize = 4 * CLUSTER;
/// Points between a plan and its write at which others may go on.
const DELAY: usize = 40;

fn empty_image() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    create(&path, "cluster_size=4k", SIZE as u64);
    std::fs::read(path).unwrap()
}

/// What a queue knows: whether it admits requests, and what it has in flight by a plan.
#[derive(Default)]
struct Queue {
    held: bool,
    planned: Vec<u64>,
    late: Vec<Share<u64>>,
}

struct Bed {
    disk: Arc<Disk>,
    image: Arc<Qcow2>,
    root: Arc<Root>,
    queue: Mutex<Queue>,
}

async fn fill(count: usize, value: u8, what: impl AsyncFnOnce(IoBufs)) {
    let mut buffer = AlignedBuf::zeroed(count * 512);
    buffer.fill(value);
    // SAFETY: `buffer` outlives the operation.
    what(unsafe { IoBufs::of(&buffer, 0, count * 512) }).await;
}

impl Bed {
    /// As a task does it.
    fn write(&self, sector: u64, count: usize, value: u8) {
        block_on(fill(count, value, async |bufs| {
            let view = View::of(self.root.chain());
            view.write(sector * 512, bufs).await.unwrap();
        }));
    }

    /// As a queue does it: by a plan if there is one, and else by a task.
    fn request(&self, sector: u64, value: u8) {
        let mut queue = loop {
            let queue = self.queue.lock();
            if !queue.held {
                break queue;
            }
            drop(queue);
            thread::yield_now();
        };
        let chain = self.root.chain();
        let mut pieces = Pieces::new();
        if !chain.plan_write(sector * 512, 512, &mut pieces) {
            drop(queue);
            return self.write(sector, 1, value);
        }
        queue.planned.push(sector);
        drop(queue);
        // Storage takes its time: most orders have something happen meanwhile.
        let point = AtomicBool::new(false);
        for _ in 0..DELAY {
            point.load(Ordering::SeqCst);
        }
        let Source::Storage { offset, .. } = pieces[0].source else {
            panic!("a write that goes nowhere");
        };
        block_on(fill(1, value, async |bufs| {
            io::write(&*self.disk, &bufs, offset).await.unwrap();
        }));
        let mut queue = self.queue.lock();
        queue.planned.retain(|planned| *planned != sector);
        let (ended, late) = std::mem::take(&mut queue.late)
            .into_iter()
            .partition::<Vec<_>, _>(|share| share.request == sector);
        queue.late = late;
        drop(queue);
        drop(ended);
    }

    /// Returns what the snapshot has of the cluster.
    fn snapshot(&self, hand_over: bool) -> Vec<u8> {
        let names = ["one".to_owned()];
        let taken = self.image.take_snapshots(&names, SystemTime::UNIX_EPOCH);
        let prepared = block_on(taken).unwrap();
        let turn = Turn {
            root: self.root.clone(),
            images: vec![self.image.clone()],
            in_place: true,
        };
        let host = self.host();
        {
            let mut queue = self.queue.lock();
            queue.held = true;
            for sector in queue.planned.clone() {
                if hand_over {
                    let writes = turn.hand_over(&(sector * 512..(sector + 1) * 512));
                    queue.late.push(Share::new(sector, writes));
                }
            }
        }
        let rest = prepared.take_effect();
        self.queue.lock().held = false;
        block_on(async {
            self.image.late().those_there_end().await;
            rest.finish().await.unwrap();
        });
        self.disk.snapshot()[host..host + CLUSTER].to_vec()
    }

    /// Where the cluster is that is worked on.
    fn host(&self) -> usize {
        let bytes = self.disk.snapshot();
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let l2 = word(word(40) as usize) & 0x00ff_ffff_ffff_fe00;
        (word(l2 as usize) & 0x00ff_ffff_ffff_fe00) as usize
    }

    fn read(&self) -> Vec<u8> {
        let buffer = AlignedBuf::zeroed(CLUSTER);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, CLUSTER) };
        block_on(View::of(self.root.chain()).read(0, bufs)).unwrap();
        buffer.to_vec()
    }
}

/// What another request does meanwhile.
#[derive(Clone, Copy, Debug)]
enum Other {
    /// It writes another sector of the cluster.
    Write,
    /// So does a task, which is not a queue's.
    Task,
    /// It writes two more, one after the other.
    Twice,
}

fn work(bytes: &[u8], other: Other, hand_over: bool) {
    let _reactor = Reactor::for_this_thread().unwrap();
    let disk = Disk::new(bytes.to_vec());
    let options = qcow2::Options {
        writable: true,
        discard: true,
        ..Default::default()
    };
    let image = Arc::new(block_on(Qcow2::open(disk.clone(), options)).unwrap());
    let layer = Arc::new(Layer {
        name: "layer".into(),
        format: Format::Qcow2(image.clone()),
        storage: disk.clone(),
        read_only: false,
        discard: true,
        copy_on_read: false,
    });
    let root = Root::new(Chain::new(vec![layer]).unwrap());
    let bed = Arc::new(Bed {
        disk,
        image,
        root,
        queue: Mutex::default(),
    });
    bed.write(0, 8, 1);
    let first = {
        let bed = bed.clone();
        thread::spawn(move || bed.request(1, 2))
    };
    let second = {
        let bed = bed.clone();
        thread::spawn(move || match other {
            Other::Write => bed.request(5, 3),
            Other::Task => bed.write(5, 1, 3),
            Other::Twice => {
                bed.request(5, 3);
                bed.request(7, 3);
            }
        })
    };
    let taken = bed.snapshot(hand_over);
    bed.request(2, 4);
    first.join().unwrap();
    second.join().unwrap();
    let host = taken.clone();
    for (sector, (now, taken)) in bed.read().chunks(512).zip(host.chunks(512)).enumerate() {
        let new = match (sector, other) {
            (1, _) => 2,
            (2, _) => 4,
            (5, _) | (7, Other::Twice) => 3,
            _ => 1,
        };
        assert!(now.iter().all(|byte| *byte == new), "sector {sector}");
        let fits = |byte: &u8| *byte == 1 || (*byte == new && sector != 2);
        assert!(taken.iter().all(fits), "sector {sector} of the snapshot");
    }
    // The second of two came after the first.
    assert!(
        taken[7 * 512] == 1 || taken[5 * 512] == 3,
        "a later write without an earlier one"
    );
}

#[test]
fn a_write_by_a_plan_and_another_one() {
    let image = Arc::new(empty_image());
    many_orders(1000, move || work(&image, Other::Write, true));
}

#[test]
fn a_write_by_a_plan_and_a_task() {
    let image = Arc::new(empty_image());
    many_orders(1000, move || work(&image, Other::Task, true));
}

#[test]
fn writes_one_after_the_other() {
    let image = Arc::new(empty_image());
    many_orders(1000, move || work(&image, Other::Twice, true));
}

/// That the model can tell: what is not handed over is lost in some order.
#[test]
fn a_write_by_a_plan_that_is_not_handed_over_is_lost() {
    let image = Arc::new(empty_image());
    let lost = std::panic::catch_unwind(move || {
        many_orders(4_000, move || work(&image, Other::Write, false));
    });
    let found = lost.expect_err("no order was found");
    let words = found.downcast_ref::<String>().map_or("", String::as_str);
    assert!(
        words.contains("sector"),
        "something else went wrong: {words}"
    );
}
