//! Storage that fails: each request gets its own error, nothing is half allocated, and work goes
//! on when the storage does.

use std::sync::Arc;

use stratablk::chain::{Chain, Layer, View};
use stratablk::format::{Format, Qcow2, qcow2};
use stratablk::reactor::Reactor;
use stratablk::storage::memory::MemoryStorage;
use stratablk::storage::{AlignedBuf, IoBufs, Storage};

use crate::support::*;

const SIZE: u64 = 4 << 20;

fn write(reactor: &Reactor, chain: &Arc<Chain>, offset: u64, value: u8) -> Result<(), i32> {
    let mut buffer = AlignedBuf::zeroed(8192);
    buffer.fill(value);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, 8192) };
    reactor
        .block_on(View::of(chain.clone()).write(offset, bufs))
        .map_err(|e| e.errno())
}

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
        let options = qcow2::Options {
            writable: true,
            ..Default::default()
        };
        let image = reactor
            .block_on(Qcow2::open(storage.clone(), options))
            .unwrap();
        let layer = Layer {
            name: "top".into(),
            format: Format::Qcow2(Arc::new(image)),
            storage: storage.clone() as Arc<dyn Storage>,
            read_only: false,
            discard: false,
            copy_on_read: false,
        };
        let chain = Arc::new(Chain::new(vec![Arc::new(layer)]).unwrap());
        write(&reactor, &chain, 0, 1).unwrap();
        storage.fail_after(fail_at, libc::ENOSPC);
        let mut failed = 0;
        for index in 1..8 {
            match write(&reactor, &chain, index * 100_352, 2) {
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
            write(&reactor, &chain, index * 100_352, 3).unwrap();
        }
        let Format::Qcow2(image) = &chain.top().format else {
            panic!()
        };
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
