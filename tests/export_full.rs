//! Guests on a full device, through several queues at once.
//!
//! What would be caught: a write that fails although the guest has just discarded as much: because
//! its own view, that of a request of another queue, or what a queue's thread keeps of the last
//! one, holds up what was freed; requests of two queues that wait for each other; a guest that is
//! not told in time that the device is full.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "crash/qcow2.rs"]
mod qcow2;
#[allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#[path = "engine/support.rs"]
mod support;

mod export_common;

use std::sync::Arc;

use export_common::*;
use stratablk::chain::{Chain, Layer, Root};
use stratablk::export::ExportConfig;
use stratablk::format::{Format, Qcow2, qcow2::Options};
use stratablk::reactor::Reactor;
use stratablk::storage::Storage;
use stratablk::storage::memory::MemoryStorage;

const DEVICE: usize = 1 << 20;
/// Of a disk that is larger than its device.
const DISK: u64 = 4 << 20;
const CLUSTER: usize = 4096;
const QUEUES: usize = 3;
/// Writes of each queue at a time.
const DEPTH: usize = 8;
/// Clusters that all of them need.
const STEP: usize = QUEUES * DEPTH;

struct Bench {
    guest: Guest,
    image: Arc<Qcow2>,
    storage: Arc<MemoryStorage>,
    reactor: Reactor,
    /// What each cluster holds.
    expected: Vec<u8>,
    export: stratablk::export::Export,
    _place: Place,
}

impl Bench {
    fn new() -> Self {
        let place = Place::new();
        let path = place.file("image.qcow2");
        support::create(&path, "cluster_size=4k", DISK);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.resize(DEVICE, 0xd5);
        let storage = Arc::new(MemoryStorage::device(bytes));
        let options = Options {
            writable: true,
            discard: true,
            ..Options::default()
        };
        let reactor = Reactor::for_this_thread().unwrap();
        let image = reactor.block_on(Qcow2::open(storage.clone(), options));
        let image = Arc::new(image.unwrap());
        let layer = Layer {
            name: "top".into(),
            format: Format::Qcow2(image.clone()),
            storage: storage.clone() as Arc<dyn Storage>,
            read_only: false,
            discard: true,
            copy_on_read: false,
        };
        let root = Root::new(Chain::new(vec![Arc::new(layer)]).unwrap());
        let config = ExportConfig {
            queues: QUEUES as u16,
            ..place.config()
        };
        let export = start(config, root);
        Self {
            guest: Guest::connect(&place.socket(), QUEUES),
            image,
            storage,
            reactor,
            expected: vec![0; DISK as usize / CLUSTER],
            export,
            _place: place,
        }
    }

    /// Writes clusters from `first` on through all queues at once; how many succeed.
    fn write(&mut self, first: usize, count: usize, value: u8) -> usize {
        let data = self.guest.memory.part(0, CLUSTER);
        data.fill(value);
        let mut submitted = [0; QUEUES];
        for cluster in first..first + count {
            let queue = cluster % QUEUES;
            let offset = (cluster * CLUSTER) as u64;
            let queue_of = &mut self.guest.queues[queue];
            queue_of.write(offset, data, cluster as u64).unwrap();
            submitted[queue] += 1;
        }
        for queue in 0..QUEUES {
            self.guest.kick(queue);
        }
        let mut done = 0;
        for (queue, count) in submitted.into_iter().enumerate() {
            for (cluster, result) in self.guest.wait(queue, count) {
                if result == 0 {
                    self.expected[cluster as usize] = value;
                    done += 1;
                }
            }
        }
        done
    }

    fn discard(&mut self, first: usize, count: usize) {
        let (offset, len) = ((first * CLUSTER) as u64, (count * CLUSTER) as u64);
        let result = self.guest.run(0, |q| q.discard(offset, len, 0));
        assert_eq!(result, 0);
        self.expected[first..first + count].fill(0);
    }

    /// Everything is there, and nothing is lost of the image.
    fn judge(mut self) {
        for (cluster, expected) in self.expected.iter().enumerate() {
            let data = self.guest.memory.part(0, CLUSTER);
            let offset = (cluster * CLUSTER) as u64;
            assert_eq!(self.guest.run(0, |q| q.read(offset, data, 0)), 0);
            let data = self.guest.memory.part(0, CLUSTER);
            assert!(data.iter().all(|byte| byte == expected), "{cluster}");
        }
        drop(self.guest);
        self.export.shutdown();
        drop(self.export);
        self.reactor.block_on(self.image.close()).unwrap();
        let bytes = self.storage.snapshot();
        assert_eq!(qcow2::Image::new(&bytes).unwrap().check(), Ok(0));
    }
}

#[test]
fn what_is_discarded_can_be_written_elsewhere_at_once() {
    let mut bench = Bench::new();
    let mut end = 0;
    while bench.write(end, 1, 1) == 1 {
        end += 1;
    }
    assert!(end > 8 * STEP, "{end} clusters");
    for round in 0..6 {
        bench.discard(round * STEP, STEP);
        let done = bench.write(end, STEP, 2 + round as u8);
        assert_eq!(done, STEP, "round {round}");
        end += STEP;
    }
    assert_eq!(bench.write(end, STEP, 0x77), 0, "the device is full");
    // What needs no room goes on, and room for a part is used by a part.
    assert_eq!(bench.write(end - STEP, STEP, 0x55), STEP);
    bench.discard(end - STEP, STEP / 2);
    assert_eq!(bench.write(end, STEP, 0x66), STEP / 2);
    bench.judge();
}
