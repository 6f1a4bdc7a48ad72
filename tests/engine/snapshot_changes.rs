//! Snapshots that do not come to be, and what they find in an image on the way.
//!
//! What would be caught: clusters that leak where the refcount table becomes longer for a snapshot;
//! an image that goes on with other tables than its header names, since a prepared snapshot was
//! dropped; data that is not made stable since the image has been found corrupt; a contradiction that
//! nobody is told of.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::SystemTime;

use stratablk::chain::{Chain, View};
use stratablk::error::Result;
use stratablk::format::qcow2::check::{self, Summary};
use stratablk::format::qcow2::create::{CreateOptions, create};
use stratablk::format::qcow2::snapshots::change::Prepared;
use stratablk::format::qcow2::soundness::{Corruption, Reporter, Reports};
use stratablk::format::qcow2::{self, Qcow2};
use stratablk::reactor::Reactor;
use stratablk::storage::memory::{MemoryStorage, Step};
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::support::*;

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn made(reactor: &Reactor, options: &CreateOptions) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new(Vec::new()));
    reactor.block_on(create(&*storage, options)).unwrap();
    storage
}

fn take(reactor: &Reactor, image: &Arc<Qcow2>, name: &str) -> Result<Prepared> {
    let names = [name.to_owned()];
    reactor.block_on(image.take_snapshots(&names, SystemTime::UNIX_EPOCH))
}

fn read(reactor: &Reactor, chain: &Arc<Chain>) -> Vec<u8> {
    let buffer = AlignedBuf::zeroed(chain.size() as usize);
    // SAFETY: `buffer` outlives the read.
    let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
    let view = View::of(chain.clone());
    reactor.block_on(view.read(0, bufs)).unwrap();
    buffer.to_vec()
}

fn checked(reactor: &Reactor, bytes: Vec<u8>) -> Summary {
    let storage = MemoryStorage::new(bytes);
    let told = &mut |finding| println!("{finding}");
    reactor.block_on(check::check(&storage, told)).unwrap()
}

#[test]
fn a_refcount_table_that_grows_for_a_snapshot_leaves_nothing_behind() {
    // The table of one cluster counts 4096 clusters. It becomes too short in the midst of what a
    // snapshot allocates, each time at another place.
    const CLUSTER: u64 = 512;
    const BEFORE: u64 = 3700;
    let reactor = Reactor::for_this_thread().unwrap();
    let options = CreateOptions {
        cluster_size: CLUSTER,
        refcount_bits: 64,
        ..CreateOptions::new(4 << 20)
    };
    let storage = made(&reactor, &options);
    let (image, chain) = open_memory(&reactor, &storage);
    let len = (BEFORE * CLUSTER) as usize;
    write_value(&reactor, &chain, 0, len, 1).unwrap();
    drop(chain);
    reactor.block_on(image.close()).unwrap();
    let bytes = storage.snapshot();
    let mut grown = 0;
    for more in (5..270).step_by(5) {
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        let (image, chain) = open_memory(&reactor, &storage);
        let len = (more * CLUSTER) as usize;
        write_value(&reactor, &chain, BEFORE * CLUSTER, len, 2).unwrap();
        let clusters = image.header().reftable_clusters;
        let prepared = take(&reactor, &image, "one").unwrap();
        reactor.block_on(prepared.take_effect().finish()).unwrap();
        grown += u32::from(image.header().reftable_clusters > clusters);
        drop(chain);
        reactor.block_on(image.close()).unwrap();
        let summary = checked(&reactor, storage.snapshot());
        assert!(summary.is_clean(), "{more} clusters: {summary:?}");
    }
    assert!(grown > 0, "no table has become longer for a snapshot");
}

fn dropped(reactor: &Reactor, cluster: usize) {
    let size = 128 * cluster;
    let options = CreateOptions {
        cluster_size: cluster as u64,
        ..CreateOptions::new(size as u64)
    };
    let storage = made(reactor, &options);
    let (image, chain) = open_memory(reactor, &storage);
    let mut expected = vec![0; size];
    let mut write = |from: usize, to: usize, value: u8| {
        let len = (to - from) * cluster;
        write_value(reactor, &chain, (from * cluster) as u64, len, value).unwrap();
        expected[from * cluster..to * cluster].fill(value);
    };
    write(0, 40, 1);
    drop(take(reactor, &image, "dropped").unwrap());
    // In place, with new clusters, and with fewer.
    write(0, 10, 2);
    write(30, 70, 3);
    let zeroed = View::of(chain.clone()).write_zeroes((35 * cluster) as u64, cluster as u64, true);
    reactor.block_on(zeroed).unwrap();
    expected[35 * cluster..36 * cluster].fill(0);
    reactor.block_on(image.flush()).unwrap();
    assert!(read(reactor, &chain) == expected);
    // As the next process finds it.
    let bytes = storage.snapshot();
    let summary = checked(reactor, bytes.clone());
    assert_eq!(summary.corruptions, 0, "clusters of {cluster}");
    let found = Arc::new(MemoryStorage::new(bytes));
    let (again, disk) = open_memory(reactor, &found);
    assert!(read(reactor, &disk) == expected, "clusters of {cluster}");
    assert!(again.snapshots().is_empty());
    // The next snapshot is one, and nothing is lost to the image.
    let taken = take(reactor, &image, "taken").unwrap();
    reactor.block_on(taken.take_effect().finish()).unwrap();
    drop(chain);
    reactor.block_on(image.close()).unwrap();
    let summary = checked(reactor, storage.snapshot());
    assert!(summary.is_clean(), "clusters of {cluster}: {summary:?}");
    assert_eq!(image.snapshots().len(), 1);
}

#[test]
fn a_prepared_snapshot_that_is_dropped_leaves_the_image_as_it_was() {
    let reactor = Reactor::for_this_thread().unwrap();
    for cluster in [512, 4096, 65536] {
        dropped(&reactor, cluster);
    }
}

#[test]
fn a_header_is_put_right_by_the_next_flush_though_nothing_was_written() {
    let reactor = Reactor::for_this_thread().unwrap();
    let storage = made(&reactor, &CreateOptions::new(16 << 20));
    let (image, chain) = open_memory(&reactor, &storage);
    write_value(&reactor, &chain, 0, 1 << 20, 1).unwrap();
    let prepared = take(&reactor, &image, "dropped").unwrap();
    let before = image.header();
    assert_eq!(before.snapshots, 1);
    drop(prepared);
    // No write has followed: the flush writes nothing but the header.
    reactor.block_on(image.flush()).unwrap();
    assert_eq!(image.header().snapshots, 0);
    let header = reactor.block_on(qcow2::read_header(&*storage)).unwrap();
    assert_eq!(header.snapshots, 0);
    assert_ne!(header.l1_offset, before.l1_offset);
}

/// An image of clusters of 64 KiB whose first two are written, as its words.
struct Damaged(Vec<u8>);

impl Damaged {
    fn new(reactor: &Reactor) -> Self {
        let storage = made(reactor, &CreateOptions::new(16 << 20));
        let (image, chain) = open_memory(reactor, &storage);
        write_value(reactor, &chain, 0, 128 << 10, 1).unwrap();
        drop(chain);
        reactor.block_on(image.close()).unwrap();
        Self(storage.snapshot())
    }

    fn word(&self, at: u64) -> u64 {
        let at = at as usize;
        u64::from_be_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    fn set(&mut self, at: u64, word: u64) {
        let at = at as usize;
        self.0[at..at + 8].copy_from_slice(&word.to_be_bytes());
    }

    fn l2(&self) -> u64 {
        self.word(self.word(40)) & OFFSET
    }

    /// Opened, with who is told what is wrong with it.
    fn open(self, reactor: &Reactor) -> (Arc<MemoryStorage>, Arc<Qcow2>, Receiver<Corruption>) {
        let (send, told) = channel();
        let reports = Arc::<Reports>::default();
        reports.listen(move |corruption| drop(send.send(corruption)));
        let options = qcow2::Options {
            writable: true,
            reporter: Some(Reporter {
                node: "disk".into(),
                reports,
            }),
            ..Default::default()
        };
        let storage = Arc::new(MemoryStorage::new(self.0));
        let image = Qcow2::open(storage.clone(), options);
        (storage, Arc::new(reactor.block_on(image).unwrap()), told)
    }
}

#[test]
fn a_contradiction_that_a_snapshot_finds_is_told() {
    let reactor = Reactor::for_this_thread().unwrap();
    let mut image = Damaged::new(&reactor);
    // An entry that nobody has looked at points into the midst of a cluster.
    let (at, first) = (image.l2() + 8 * 200, image.word(image.l2()));
    image.set(at, first + 512);
    let (_storage, image, told) = image.open(&reactor);
    let taken = take(&reactor, &image, "one").map(drop);
    let error = taken.unwrap_err().to_string();
    assert!(error.contains("multiple of the cluster"), "{error}");
    let told = told.try_recv().expect("it is told");
    assert!(told.message.contains("multiple of the cluster"), "{told:?}");
    assert_eq!((&*told.node, told.fatal), ("disk", false));
    assert!(image.snapshots().is_empty());
}

#[test]
fn what_was_written_is_made_stable_though_the_image_is_found_corrupt() {
    let reactor = Reactor::for_this_thread().unwrap();
    let mut image = Damaged::new(&reactor);
    // Its third cluster is where the refcount table is.
    let (at, table) = (image.l2() + 16, image.word(48));
    image.set(at, table | COPIED);
    let (storage, image, told) = image.open(&reactor);
    let rest = take(&reactor, &image, "one").unwrap().take_effect();
    // Found when a guest reads it.
    let format = stratablk::format::Format::Qcow2(image.clone());
    let loaded = reactor.block_on(format.load(128 << 10));
    assert!(loaded.is_err());
    assert!(told.try_recv().expect("it is told").fatal);
    storage.record();
    let error = reactor.block_on(rest.finish()).unwrap_err().to_string();
    assert!(error.contains("corrupt"), "{error}");
    assert!(storage.take_log().contains(&Step::Sync));
}
