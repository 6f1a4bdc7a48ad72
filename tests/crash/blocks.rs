//! Storage with blocks of 4 KiB: to write a part of a block, the rest must be read and written
//! back, over what others have written there meanwhile.
//!
//! What would be caught: a guest's request that becomes such a write, in a raw window or in an
//! image, and the end of a disk within a block that can no longer be copied.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use stratablk::chain::{Chain, Layer, Span, View};
use stratablk::format::{Format, Raw};
use stratablk::reactor::Reactor;
use stratablk::storage::fault::FaultStorage;
use stratablk::storage::{AlignedBuf, IoBufs, Storage, Window};

use crate::alone;
use crate::disk::{Below, Disk, Opened, Recipe, read_all};
use crate::history::{SECTOR, fill};
use crate::machine::{File, Machine};

const BLOCK: u64 = 4096;

/// A file of the machine with blocks of 4 KiB.
fn blocks(file: Arc<File>) -> Arc<dyn Storage> {
    Arc::new(FaultStorage::over(file).with_blocks(512, BLOCK))
}

fn raw(reactor: &Reactor, storage: Arc<dyn Storage>) -> Arc<Chain> {
    let size = reactor.block_on(storage.len()).unwrap();
    let layer = Layer {
        name: "raw".into(),
        format: Format::Raw(Raw::new(size)),
        storage,
        read_only: false,
        discard: true,
        copy_on_read: false,
    };
    Arc::new(Chain::new(vec![Arc::new(layer)]).unwrap())
}

/// Writes `len` bytes of `value`; the reactor must be turned.
fn spawn_write(
    reactor: &Reactor,
    chain: &Arc<Chain>,
    (offset, len, value): (u64, usize, u8),
    done: impl FnOnce(stratablk::error::Result<()>) + 'static,
) {
    let view = View::of(chain.clone());
    reactor.spawn(async move {
        let mut buffer = AlignedBuf::zeroed(len);
        buffer.fill(value);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
        done(view.write(offset, bufs).await);
    });
}

#[test]
fn neighbours_in_a_window_keep_their_bytes() {
    let _alone = alone();
    for seed in 0..40 {
        let reactor = Reactor::for_this_thread().unwrap();
        let mut rng = StdRng::seed_from_u64(seed);
        let machine = Machine::new(&[vec![9; 1 << 20]]);
        let storage = blocks(machine.file(0));
        // Each block of such a disk would lie in two of the storage's.
        for (offset, size) in [(512, 64 << 10), (BLOCK, (64 << 10) + 512)] {
            let window = Window::of(storage.clone(), offset, Some(size));
            let error = reactor.block_on(window).unwrap_err();
            assert!(error.to_string().contains("multiple of 4096"), "{error}");
        }
        let window = Window::of(storage, BLOCK, Some(64 << 10));
        let chain = raw(&reactor, reactor.block_on(window).unwrap());
        machine.hold(true);
        let done = Rc::new(Cell::new(0));
        for block in 0..4 {
            let done = done.clone();
            let write = (u64::from(block) * BLOCK, BLOCK as usize, block + 1);
            spawn_write(&reactor, &chain, write, move |result| {
                result.unwrap();
                done.set(done.get() + 1);
            });
        }
        machine.run(&reactor, &mut rng);
        assert_eq!(done.get(), 4, "seed {seed}");
        let mut expected = vec![9; 1 << 20];
        for block in 1..5 {
            expected[block * BLOCK as usize..][..BLOCK as usize].fill(block as u8);
        }
        assert!(machine.bytes(0) == expected, "seed {seed}: bytes are lost");
    }
}

/// An export refuses requests for parts of blocks; behind it nothing may read and write back.
#[test]
fn parts_of_blocks_are_refused() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::make(dir.path(), Recipe::new("cluster_size=4k", 128));
    let reactor = Reactor::for_this_thread().unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let files = [disk.files[0].clone(), vec![9; 64 << 10]];
    let machine = Machine::new(&files);
    let blocks = |index| blocks(machine.file(index));
    let opened = reactor.block_on(disk.open_files(blocks, true)).unwrap();
    // Whole blocks first, so that there is something to lose.
    for chain in [raw(&reactor, blocks(1)), opened.chain] {
        let failures = Rc::new(Cell::new(0));
        spawn_write(&reactor, &chain, (0, 8192, 5), |result| result.unwrap());
        machine.run(&reactor, &mut rng);
        let parts = [(512, 512), (0, 4608), (3584, 4608)];
        for (offset, len) in parts {
            let failures = failures.clone();
            spawn_write(&reactor, &chain, (offset, len, 6), move |result| {
                let text = result.unwrap_err().to_string();
                assert!(text.contains("not whole blocks"), "{text}");
                failures.set(failures.get() + 1);
            });
        }
        machine.run(&reactor, &mut rng);
        assert_eq!(failures.get(), parts.len());
        machine.hold(false);
        let buffer = AlignedBuf::zeroed(8192);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, 8192) };
        reactor.block_on(View::of(chain).read(0, bufs)).unwrap();
        assert!(buffer.iter().all(|&byte| byte == 5));
    }
}

/// A copy from below while guests write, of a disk that ends within a block.
#[test]
fn images_on_large_blocks_end_anywhere() {
    for options in [
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=128k,extended_l2=on",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let sectors = 8 * 48 + 3;
        let recipe = Recipe {
            below: Below::Raw,
            ..Recipe::new(options, sectors)
        };
        let disk = Disk::make(dir.path(), recipe);
        for seed in 0..10 {
            let _alone = alone();
            let reactor = Reactor::for_this_thread().unwrap();
            let mut rng = StdRng::seed_from_u64(seed);
            let machine = Machine::new(&disk.files);
            let blocks = |index| blocks(machine.file(index));
            let opened = reactor.block_on(disk.open_files(blocks, true)).unwrap();
            let Opened { chain, image } = opened;
            machine.hold(true);
            let mut expected: Vec<_> = disk.first.iter().copied().map(Some).collect();
            for block in [1, 2, 17, 46] {
                let (start, stamp) = (block * 8, 0xb000_0000 + block as u32 * 8);
                for (stamp, sector) in (stamp..).zip(&mut expected[start..start + 8]) {
                    *sector = Some(stamp);
                }
                let view = View::of(chain.clone());
                reactor.spawn(async move {
                    let mut buffer = AlignedBuf::zeroed(8 * SECTOR);
                    fill(&mut buffer, stamp);
                    // SAFETY: `buffer` outlives the operation.
                    let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
                    view.write((start * SECTOR) as u64, bufs).await.unwrap();
                });
            }
            let (view, size) = (View::of(chain.clone()), chain.size());
            reactor.spawn(async move {
                view.copy(Span::new(0, 2), 0, size).await.unwrap();
            });
            machine.run(&reactor, &mut rng);
            machine.hold(false);
            reactor.block_on(image.close()).unwrap();
            let context = format!("{options}, seed {seed}");
            assert!(read_all(&reactor, &chain).unwrap() == expected, "{context}");
            let alone = Arc::new(Chain::new(vec![chain.top().clone()]).unwrap());
            assert!(
                read_all(&reactor, &alone).unwrap() == expected,
                "{context}: not copied"
            );
            disk.qemu_check(&[machine.bytes(0)]).unwrap();
        }
    }
}
