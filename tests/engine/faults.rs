//! Storage that fails: each request gets its own error, nothing is half allocated, and work goes
//! on when the storage does.

use std::sync::Arc;

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

/// What would be caught: references that are counted only in a table which the header does not
/// name, after the replacement of the table has failed half-way.
#[test]
fn a_refcount_table_that_cannot_be_replaced_costs_no_data() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "cluster_size=512,refcount_bits=64", SIZE);
    let start = std::fs::read(&path).unwrap();
    let reactor = Reactor::for_this_thread().unwrap();
    let table_of = |bytes: &[u8]| bytes[48..56].to_vec();
    let mut judged = 0;
    // The table has room for 2 MiB: it is about to grow. The first failures that find another
    // table in the header are those in the middle of its replacement.
    for fail_at in 0.. {
        let storage = Arc::new(MemoryStorage::new(start.clone()));
        let (image, chain) = open_memory(&reactor, &storage);
        let before = 1_600 << 10;
        write_value(&reactor, &chain, 0, before, 1).unwrap();
        reactor.block_on(chain.flush()).unwrap();
        storage.fail_after(fail_at, libc::EIO);
        let mut replaced = false;
        for index in 0..200 {
            if index == 100 {
                replaced = table_of(&storage.snapshot()) != table_of(&start);
                storage.fail_after(usize::MAX, 0);
            }
            let offset = before as u64 + index * 8192;
            let _ = write_value(&reactor, &chain, offset, 8192, 2);
        }
        let _ = reactor.block_on(chain.flush());
        let _ = reactor.block_on(image.close());
        if !replaced {
            assert!(fail_at < 2000, "the table is never replaced");
            continue;
        }
        std::fs::write(&path, storage.snapshot()).unwrap();
        check(&path, true);
        let read = format!("read -P 1 0 {before}");
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
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "cluster_size=512,refcount_bits=64", SIZE);
    let start = std::fs::read(&path).unwrap();
    let reactor = Reactor::for_this_thread().unwrap();
    let table_of = |bytes: &[u8]| bytes[48..56].to_vec();
    let mut judged = 0;
    for fail_at in 0..2000 {
        let storage = Arc::new(MemoryStorage::new(start.clone()));
        let (image, chain) = open_memory(&reactor, &storage);
        let before = 1_600 << 10;
        write_value(&reactor, &chain, 0, before, 1).unwrap();
        reactor.block_on(chain.flush()).unwrap();
        storage.fail_after(fail_at, libc::EIO);
        let failed = (0..200u64).any(|index| {
            let offset = before as u64 + index * 8192;
            write_value(&reactor, &chain, offset, 8192, 2).is_err()
        });
        let changed = table_of(&storage.snapshot()) != table_of(&start);
        storage.fail_after(usize::MAX, 0);
        reactor.block_on(image.close()).unwrap();
        if failed && changed {
            std::fs::write(&path, storage.snapshot()).unwrap();
            check(&path, false);
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
