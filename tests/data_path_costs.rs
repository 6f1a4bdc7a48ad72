//! What a request costs in the steady state, counted and not timed: allocations and system calls
//! of the queue's thread.
//!
//! What would be caught: a data path that allocates, enters the kernel for each request, or takes
//! the slow path for clusters whose mapping is in memory.

#![allow(clippy::unwrap_used)]

mod export_common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use export_common::*;
use stratablk::chain::{Chain, Layer, Root};
use stratablk::export::ExportConfig;
use stratablk::format::{Format, Qcow2, Raw, qcow2};
use stratablk::reactor::Reactor;
use stratablk::storage::Storage;
use stratablk::storage::{FileStorage, OpenFlags};

const SIZE: u64 = 8 << 20;
const DEPTH: usize = 32;
const ID: &str = "costs";

/// Allocations by threads of the export.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    /// 0: not known yet; 1: some thread; 2: one of the export.
    static KIND: Cell<u8> = const { Cell::new(0) };
}

fn is_exports() -> bool {
    let found = KIND.try_with(|kind| {
        if kind.get() == 0 {
            let mut name = [0u8; 16];
            // SAFETY: the call writes at most 16 bytes.
            unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
            kind.set(if name.starts_with(ID.as_bytes()) {
                2
            } else {
                1
            });
        }
        kind.get() == 2
    });
    found.unwrap_or(false)
}

// SAFETY: all calls go to the system's allocator as they are.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_exports() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// A disk on tmpfs, all of it written.
fn disk(dir: &Path, qcow2: bool) -> Arc<Root> {
    let raw = dir.join("disk.raw");
    std::fs::write(&raw, vec![7; SIZE as usize]).unwrap();
    let path = if qcow2 {
        dir.join("disk.qcow2")
    } else {
        raw.clone()
    };
    if qcow2 {
        let status = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .args([&raw, &path])
            .status();
        assert!(status.unwrap().success());
    }
    let flags = OpenFlags {
        writable: true,
        ..OpenFlags::default()
    };
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&path, flags).unwrap());
    let format = if qcow2 {
        let reactor = Reactor::for_this_thread().unwrap();
        let options = qcow2::Options {
            writable: true,
            ..qcow2::Options::default()
        };
        let image = reactor
            .block_on(Qcow2::open(storage.clone(), options))
            .unwrap();
        Format::Qcow2(Arc::new(image))
    } else {
        Format::Raw(Raw::new(SIZE))
    };
    let layer = Layer {
        name: "disk".into(),
        format,
        storage,
        read_only: false,
        discard: false,
        copy_on_read: false,
    };
    Root::new(Chain::new(vec![Arc::new(layer)]).unwrap())
}

/// What would be caught: vectors of nothing in a list, whose address is aligned to nothing, so that
/// all the rest is copied to where it is.
#[test]
fn a_part_of_nothing_does_not_make_a_list_unaligned() {
    use stratablk::storage::{AlignedBuf, IoBufs};

    let (nothing, block) = (AlignedBuf::zeroed(0), AlignedBuf::zeroed(4096));
    // SAFETY: no operation is started.
    let whole = |buffer: &AlignedBuf| unsafe { IoBufs::of(buffer, 0, buffer.len()) };
    let all = IoBufs::joined(&[whole(&nothing), whole(&block), whole(&nothing)]);
    assert!(all.is_aligned(4096));
    assert_eq!((all.len(), all.iovecs().len()), (4096, 1));
}

/// What would be caught: copies on write that use a buffer once each, since a list has it when it is
/// given back. What it was filled with tells a used one from a new one.
#[test]
fn the_buffer_of_a_copy_on_write_is_used_again() {
    use stratablk::chain::View;
    use stratablk::format::qcow2::create::{CreateOptions, create};
    use stratablk::storage::memory::MemoryStorage;
    use stratablk::storage::{AlignedBuf, IoBufs, ScratchBuf};

    const CLUSTER: usize = 64 << 10;
    const BLOCK: usize = 4096;
    let reactor = Reactor::for_this_thread().unwrap();
    let image: Arc<dyn Storage> = Arc::new(MemoryStorage::new(Vec::new()));
    let size = CreateOptions::new(SIZE);
    let created = create(&*image, &size);
    reactor.block_on(created).unwrap();
    let options = qcow2::Options {
        writable: true,
        ..qcow2::Options::default()
    };
    let opened = reactor.block_on(Qcow2::open(image.clone(), options));
    let opened = Arc::new(opened.unwrap());
    let base = Arc::new(MemoryStorage::new(vec![5; SIZE as usize]));
    let layer = |format, storage| {
        Arc::new(Layer {
            name: "disk".into(),
            format,
            storage,
            read_only: false,
            discard: false,
            copy_on_read: false,
        })
    };
    let layers = vec![
        layer(Format::Qcow2(opened.clone()), image),
        layer(Format::Raw(Raw::new(SIZE)), base),
    ];
    let chain = Arc::new(Chain::new(layers).unwrap());
    let new = AlignedBuf::zeroed(BLOCK);
    // In the middle of a cluster, which is read at once, and at its start.
    for (at, copied) in [(BLOCK, CLUSTER), (CLUSTER, CLUSTER - BLOCK)] {
        // SAFETY: nobody changes the buffer.
        let bufs = unsafe { IoBufs::of(&new, 0, BLOCK) };
        let written = View::of(chain.clone()).write(at as u64, bufs);
        reactor.block_on(written).unwrap();
        let buffer = ScratchBuf::new(copied);
        assert!(buffer.iter().all(|&byte| byte == 5), "{copied} bytes, new");
    }
    reactor.block_on(opened.close()).unwrap();
}

/// Rounds of reads and writes, as many at a time as are in flight.
fn rounds(guest: &mut Guest, count: usize) {
    for round in 0..count {
        for slot in 0..DEPTH {
            let part = guest.memory.part(slot * 4096, 4096);
            let at = ((round * 37 + slot * 101) % (SIZE as usize / 4096) * 4096) as u64;
            let queue = &mut guest.queues[0];
            if (round + slot) % 2 == 0 {
                queue.read(at, part, 0).unwrap();
            } else {
                queue.write(at, part, 0).unwrap();
            }
        }
        guest.kick(0);
        for (_, result) in guest.wait(0, DEPTH) {
            assert_eq!(result, 0);
        }
    }
}

#[test]
fn the_steady_state_neither_allocates_nor_enters_the_kernel_for_each_request() {
    for qcow2 in [false, true] {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let place = Place::new();
        let config = ExportConfig {
            id: ID.into(),
            ..place.config()
        };
        let export = start(config, disk(dir.path(), qcow2));
        let mut guest = Guest::connect(&place.socket(), 1);
        rounds(&mut guest, 100);
        let stats = export.stats()[0].clone();
        let before = (
            ALLOCATIONS.load(Ordering::SeqCst),
            stats.slow.get(),
            stats.enters.get(),
            stats.sleeps.get(),
        );
        rounds(&mut guest, 300);
        let requests = 300 * DEPTH as u64;
        let allocations = ALLOCATIONS.load(Ordering::SeqCst) - before.0;
        assert_eq!(stats.slow.get(), before.1, "requests that needed a task");
        let (enters, sleeps) = (stats.enters.get() - before.2, stats.sleeps.get() - before.3);
        // One to sleep, one to learn of the kick, and at most one for a batch.
        assert!(
            enters <= 2 * sleeps + 300,
            "{enters} system calls of the ring and {sleeps} sleeps for {requests} requests"
        );
        // A thread that slept takes the chain anew: its view, and the era that it holds. It may have
        // been asleep when the counting began.
        assert!(
            allocations <= 2 * (sleeps + 1),
            "{allocations} allocations and {sleeps} sleeps for {requests} requests, qcow2: {qcow2}"
        );
        drop(guest);
        export.shutdown();
    }
}
