//! Storage that fails: each request gets its own error, nothing is half allocated, and work goes
//! on when the storage does.

use std::path::PathBuf;
use std::sync::Arc;

use stratablk::chain::Chain;
use stratablk::format::Qcow2;
use stratablk::reactor::Reactor;
use stratablk::storage::memory::MemoryStorage;

use crate::support::*;

const SIZE: u64 = 4 << 20;

/// What would be caught: an error that ends the image, clusters mapped without data, references
/// without an owner, a full disk that stays full.
#[test]
fn a_write_that_fails_at_any_point_leaves_a_sound_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "cluster_size=4k", SIZE);
    let start = std::fs::read(&path).unwrap();
    let reactor = Reactor::for_this_thread().unwrap();
    for fail_at in 0..12 {
        let storage = Arc::new(MemoryStorage::new(start.clone()));
        let (image, chain) = open_memory(&reactor, &storage);
        write_value(&reactor, &chain, 0, 8192, 1).unwrap();
        storage.fail_after(fail_at, libc::ENOSPC);
        let mut failed = 0;
        for index in 1..8 {
            match write_value(&reactor, &chain, index * 100_352, 8192, 2) {
                Ok(()) => {}
                Err(errno) => {
                    assert_eq!(errno, libc::ENOSPC);
                    failed += 1;
                }
            }
        }
        let flushed = reactor.block_on(chain.flush());
        assert!(
            failed > 0 || flushed.is_err(),
            "nothing failed after {fail_at} operations"
        );
        storage.fail_after(usize::MAX, 0);
        for index in 1..8 {
            write_value(&reactor, &chain, index * 100_352, 8192, 3).unwrap();
        }
        reactor.block_on(image.close()).unwrap();
        std::fs::write(&path, storage.snapshot()).unwrap();
        check(&path, false);
        let mut expected = vec![0; SIZE as usize];
        expected[..8192].fill(1);
        for index in 1..8 {
            expected[index * 100_352..][..8192].fill(3);
        }
        compare(&path, "qcow2", &expected);
    }
}

/// Bytes that are written, and stable, before storage fails.
const BEFORE: usize = 1_600 << 10;

/// An image whose refcount table has room for 2 MiB: it is about to grow.
struct Growing {
    dir: tempfile::TempDir,
    start: Vec<u8>,
    reactor: Reactor,
}

impl Growing {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = in_dir(&dir, "image.qcow2");
        create(&path, "cluster_size=512,refcount_bits=64", SIZE);
        Self {
            start: std::fs::read(&path).unwrap(),
            reactor: Reactor::for_this_thread().unwrap(),
            dir,
        }
    }

    /// The image with [`BEFORE`] bytes in it, on storage of which operation `fail_at` fails, and
    /// all after it.
    fn failing_at(&self, fail_at: usize) -> (Arc<MemoryStorage>, Arc<Qcow2>, Arc<Chain>) {
        let storage = Arc::new(MemoryStorage::new(self.start.clone()));
        let (image, chain) = open_memory(&self.reactor, &storage);
        write_value(&self.reactor, &chain, 0, BEFORE, 1).unwrap();
        self.reactor.block_on(chain.flush()).unwrap();
        storage.fail_after(fail_at, libc::EIO);
        (storage, image, chain)
    }

    /// Write number `index` of those that make the table grow. Whether it succeeded.
    fn write(&self, chain: &Arc<Chain>, index: u64) -> bool {
        write_value(&self.reactor, chain, BEFORE as u64 + index * 8192, 8192, 2).is_ok()
    }

    /// Whether the header names another table than at first.
    fn has_another_table(&self, storage: &MemoryStorage) -> bool {
        storage.snapshot()[48..56] != self.start[48..56]
    }

    /// Judges the image: leaves it in a file.
    fn check(&self, storage: &MemoryStorage, leaks_allowed: bool) -> PathBuf {
        let path = in_dir(&self.dir, "image.qcow2");
        std::fs::write(&path, storage.snapshot()).unwrap();
        check(&path, leaks_allowed);
        path
    }
}

/// What would be caught: references that are counted only in a table which the header does not
/// name, after the replacement of the table has failed half-way.
#[test]
fn a_refcount_table_that_cannot_be_replaced_costs_no_data() {
    let growing = Growing::new();
    let mut judged = 0;
    // The first failures that find another table in the header are those in the middle of its
    // replacement.
    for fail_at in 0.. {
        let (storage, image, chain) = growing.failing_at(fail_at);
        (0..100).for_each(|index| _ = growing.write(&chain, index));
        let replaced = growing.has_another_table(&storage);
        storage.fail_after(usize::MAX, 0);
        (100..200).for_each(|index| _ = growing.write(&chain, index));
        let _ = growing.reactor.block_on(chain.flush());
        let _ = growing.reactor.block_on(image.close());
        if !replaced {
            assert!(fail_at < 2000, "the table is never replaced");
            continue;
        }
        let path = growing.check(&storage, true);
        let read = format!("read -P 1 0 {BEFORE}");
        let image = path.to_str().unwrap();
        run("qemu-io", &["-r", "-f", "qcow2", "-c", &read, image]);
        judged += 1;
        if judged == 10 {
            break;
        }
    }
}

/// What would be caught: a header that reached the disk although its change failed, so that the disk
/// and we mean different refcount tables, and one of them is lost when the image is closed.
#[test]
fn a_header_that_may_have_been_changed_is_written_again() {
    let growing = Growing::new();
    let mut judged = 0;
    for fail_at in 0..2000 {
        let (storage, image, chain) = growing.failing_at(fail_at);
        let failed = (0..200).any(|index| !growing.write(&chain, index));
        let changed = growing.has_another_table(&storage);
        storage.fail_after(usize::MAX, 0);
        growing.reactor.block_on(image.close()).unwrap();
        if failed && changed {
            growing.check(&storage, false);
            judged += 1;
        } else if judged > 0 {
            return;
        }
    }
    panic!("no failure met the change of the header");
}

/// What would be caught: writes that go on for ever where a disk that does not flush keeps the cache
/// full of changed metadata, or that fail on when it flushes again; changes that are lost with it.
#[test]
fn a_disk_that_does_not_flush_fails_writes_and_stops_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "cluster_size=512", SIZE);
    let storage = Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()));
    let reactor = Reactor::for_this_thread().unwrap();
    let (image, chain) = open_memory_with(&reactor, &storage, 0);
    // One to each slice of the mapping, which has room for eight of them.
    let places = || (0..SIZE).step_by(32 << 10);
    storage.fail_syncs(true);
    let failed = places()
        .filter(|&at| write_value(&reactor, &chain, at, 512, 1) == Err(libc::EIO))
        .count();
    assert!(failed > 8, "{failed}");
    storage.fail_syncs(false);
    let mut expected = vec![0; SIZE as usize];
    for at in places() {
        write_value(&reactor, &chain, at, 512, 2).unwrap();
        expected[at as usize..][..512].fill(2);
    }
    reactor.block_on(image.close()).unwrap();
    std::fs::write(&path, storage.snapshot()).unwrap();
    check(&path, false);
    compare(&path, "qcow2", &expected);
}
