//! The qcow2 engine: several threads write, read, discard and flush one image, most of whose
//! mapping is not in memory.

use std::rc::Rc;
use std::sync::Arc;

use stratablk_model::chain::{Chain, Layer, Span, View};
use stratablk_model::disk::Disk;
use stratablk_model::format::{Format, Qcow2, Raw, qcow2};
use stratablk_model::reactor::Reactor;
use stratablk_model::shuttle::future::block_on;
use stratablk_model::shuttle::thread;
use stratablk_model::storage::{AlignedBuf, IoBufs};

use crate::many_orders;
use crate::qcow2::Image;
use crate::support::{create, run};

/// Bytes that one slice of the mapping covers: 64 entries of clusters of 512 bytes.
const SLICE: u64 = 64 * 512;
/// So many slices are in use; 8 are kept in memory.
const SLICES: u64 = 11;
const SIZE: usize = (SLICES * SLICE) as usize;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Offset, length, value.
    Write(u64, u64, u8),
    /// Offset, length, the value that is there.
    Read(u64, u64, u8),
    /// Offset, length: reads as zeros from then on.
    Zero(u64, u64),
    /// Offset, length: a job's copy from below, compressed.
    Pack(u64, u64),
    Flush,
}
use Step::{Flush, Pack, Read, Write, Zero};

/// An image, and what a guest reads from it.
struct Start {
    image: Vec<u8>,
    disk: Vec<u8>,
    /// A raw file lies below the image: what the guest reads at first.
    base: bool,
    /// What is done before the threads begin.
    first: &'static [Step],
}

/// An image with one cluster of value 1 in each slice, and what `more` commands of `qemu-io` make
/// of it.
fn image(options: &str, more: &[String]) -> Start {
    let dir = tempfile::tempdir().unwrap();
    let (path, raw) = (dir.path().join("image.qcow2"), dir.path().join("raw"));
    create(&path, options, SIZE as u64);
    let (name, raw_name) = (path.to_str().unwrap(), raw.to_str().unwrap());
    let mut words = vec!["-f", "qcow2", "-d", "unmap"];
    let each = (0..SLICES).map(|slice| format!("write -q -P 1 {} 512", slice * SLICE));
    let commands: Vec<String> = each.chain(more.iter().cloned()).collect();
    for command in &commands {
        words.extend(["-c", command]);
    }
    words.push(name);
    run("qemu-io", &words);
    run("qemu-img", &["convert", "-O", "raw", name, raw_name]);
    Start {
        image: std::fs::read(&path).unwrap(),
        disk: std::fs::read(&raw).unwrap(),
        base: false,
        first: &[],
    }
}

fn layer(format: Format, disk: &Arc<Disk>, writable: bool) -> Arc<Layer> {
    Arc::new(Layer {
        name: "layer".into(),
        format,
        storage: disk.clone(),
        read_only: !writable,
        discard: true,
        copy_on_read: false,
    })
}

async fn open(start: &Start, disk: &Arc<Disk>, writable: bool) -> (Arc<Qcow2>, Arc<Chain>) {
    let options = qcow2::Options {
        writable,
        discard: true,
        cache_bytes: 0,
        ..Default::default()
    };
    let image = Arc::new(Qcow2::open(disk.clone(), options).await.unwrap());
    let mut layers = vec![layer(Format::Qcow2(image.clone()), disk, writable)];
    if start.base {
        let raw = Format::Raw(Raw::new(SIZE as u64));
        layers.push(layer(raw, &Disk::new(start.disk.clone()), false));
    }
    (image, Arc::new(Chain::new(layers).unwrap()))
}

async fn perform(chain: &Arc<Chain>, step: Step) {
    let view = View::of(chain.clone());
    match step {
        Write(offset, len, value) => {
            let mut buffer = AlignedBuf::zeroed(len as usize);
            buffer.fill(value);
            // SAFETY: `buffer` outlives the operation.
            let bufs = unsafe { IoBufs::of(&buffer, 0, len as usize) };
            view.write(offset, bufs).await.unwrap();
        }
        Read(offset, len, value) => {
            let buffer = AlignedBuf::zeroed(len as usize);
            // SAFETY: `buffer` outlives the operation.
            let bufs = unsafe { IoBufs::of(&buffer, 0, len as usize) };
            Rc::clone(&view).read(offset, bufs).await.unwrap();
            assert!(buffer.iter().all(|byte| *byte == value), "{step:?}");
        }
        Zero(offset, len) => view.write_zeroes(offset, len, true).await.unwrap(),
        Pack(offset, len) => {
            let span = Span::new(0, chain.layers().len()).compressed(true);
            view.copy(span, offset, len).await.unwrap();
        }
        Flush => chain.flush().await.unwrap(),
    }
}

/// Runs the threads, which do not touch one another's bytes, and looks at what is left.
fn work(start: &Start, threads: &'static [&'static [Step]]) {
    work_on(Disk::new(start.image.clone()), start, threads);
}

fn work_on(disk: Arc<Disk>, start: &Start, threads: &'static [&'static [Step]]) {
    let _reactor = Reactor::for_this_thread().unwrap();
    let (image, chain) = block_on(open(start, &disk, true));
    for step in start.first {
        block_on(perform(&chain, *step));
    }
    let running: Vec<_> = threads
        .iter()
        .map(|steps| {
            let chain = chain.clone();
            thread::spawn(move || {
                for step in *steps {
                    block_on(perform(&chain, *step));
                }
            })
        })
        .collect();
    running.into_iter().for_each(|t| t.join().unwrap());
    block_on(image.close()).unwrap();
    let mut expected = start.disk.clone();
    for step in start.first.iter().chain(threads.iter().copied().flatten()) {
        let (offset, len, value) = match *step {
            Write(offset, len, value) => (offset, len, value),
            Zero(offset, len) => (offset, len, 0),
            _ => continue,
        };
        expected[offset as usize..][..len as usize].fill(value);
    }
    let bytes = disk.snapshot();
    let found = Image::new(&bytes).and_then(|image| image.check());
    assert_eq!(found, Ok(0), "clusters leaked, or what is wrong");
    let (_image, chain) = block_on(open(start, &Disk::new(bytes), false));
    let buffer = AlignedBuf::zeroed(SIZE);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, SIZE) };
    block_on(View::of(chain).read(0, bufs)).unwrap();
    for (sector, (got, expected)) in buffer.chunks(512).zip(expected.chunks(512)).enumerate() {
        assert_eq!(got[..4], expected[..4], "sector {sector}");
        assert!(got == expected, "sector {sector} is torn");
    }
}

fn orders(options: &str, runs: usize, threads: &'static [&'static [Step]]) {
    orders_of(image(options, &[]), runs, threads);
}

fn orders_of(start: Start, runs: usize, threads: &'static [&'static [Step]]) {
    let start = Arc::new(start);
    many_orders(runs, move || work(&start, threads));
}

#[test]
fn parts_of_one_new_cluster() {
    const THREADS: &[&[Step]] = &[
        &[Write(4096, 512, 2), Flush, Read(4096, 512, 2)],
        &[Write(4608, 512, 3), Read(4608, 512, 3)],
        &[Write(5120, 1024, 4)],
    ];
    orders("cluster_size=4k", 600, THREADS);
}

#[test]
fn slices_that_come_and_go() {
    const THREADS: &[&[Step]] = &[
        &[
            Write(512, 512, 2),
            Write(SLICE + 512, 512, 3),
            Flush,
            Write(2 * SLICE + 512, 512, 4),
            Read(512, 512, 2),
        ],
        &[
            Read(5 * SLICE, 512, 1),
            Read(6 * SLICE, 512, 1),
            Read(7 * SLICE, 512, 1),
            Read(8 * SLICE, 512, 1),
            Read(9 * SLICE, 512, 1),
            Read(10 * SLICE, 512, 1),
        ],
        &[
            Write(3 * SLICE + 512, 512, 5),
            Flush,
            Write(4 * SLICE + 512, 512, 6),
            Read(3 * SLICE + 512, 512, 5),
        ],
    ];
    orders("cluster_size=512", 500, THREADS);
}

/// What would be caught: a slice that is loaded over a newer one, by a thread that began to miss it
/// before another had loaded and changed it.
#[test]
fn a_slice_that_two_miss() {
    const THREADS: &[&[Step]] = &[
        &[Write(512, 512, 2)],
        &[Read(0, 512, 1)],
        &[Read(0, 512, 1)],
    ];
    orders("cluster_size=512", 1000, THREADS);
}

/// What would be caught: the same of the refcounts: clusters that are in use, and count as free.
#[test]
fn refcounts_that_two_miss() {
    const THREADS: &[&[Step]] = &[
        &[Write(512, 512, 2)],
        &[Write(SLICE + 512, 512, 3)],
        &[Write(2 * SLICE + 512, 512, 4)],
    ];
    // A slice covers 64 clusters. Many in the first one are free; at the end of the file, where an
    // image is looked at when it is opened, is another.
    let more = [
        format!("write -q 512 {}", SLICE - 512),
        format!("write -q -P 7 {} 512", SIZE - 512),
        format!("discard -q 512 {}", SLICE - 512),
    ];
    let start = image("cluster_size=512,refcount_bits=64", &more);
    orders_of(start, 600, THREADS);
}

#[test]
fn clusters_that_are_freed_and_used_again() {
    const THREADS: &[&[Step]] = &[
        &[
            Zero(0, 512),
            Flush,
            Zero(SLICE, 512),
            Flush,
            Write(1024, 512, 2),
        ],
        &[
            Read(2 * SLICE, 512, 1),
            Write(2 * SLICE + 1024, 1024, 3),
            Read(2 * SLICE + 1024, 1024, 3),
        ],
        &[Flush, Write(3 * SLICE + 512, 1024, 4), Flush],
    ];
    orders("cluster_size=512", 500, THREADS);
}

/// What would be caught: a compressed cluster that goes to a host cluster whose old contents are
/// being given back to the file system.
#[test]
fn compressed_clusters_that_are_freed_and_shared() {
    const FIRST: &[Step] = &[Pack(0, 4096), Zero(0, 4096), Flush];
    const THREADS: &[&[Step]] = &[
        &[Flush],
        &[Pack(4096, 4096)],
        &[Zero(8192, 4096), Pack(12288, 4096)],
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    create(&path, "cluster_size=4k", SIZE as u64);
    let start = Start {
        image: std::fs::read(&path).unwrap(),
        disk: (0..SIZE).map(|at| (at / 512) as u8 | 1).collect(),
        base: true,
        first: FIRST,
    };
    orders_of(start, 600, THREADS);
}

/// What would be caught: on a device that is nearly full, and whose next clusters have no refcount
/// block, a block that two make, or clusters that two are given.
#[test]
fn the_last_clusters_of_a_device() {
    const THREADS: &[&[Step]] = &[
        &[Write(1024, 512, 2), Write(1536, 512, 3), Flush],
        &[Write(SLICE + 1024, 1024, 4), Read(SLICE + 1024, 1024, 4)],
        &[Write(2 * SLICE + 1024, 512, 5), Flush],
    ];
    let mut start = image("cluster_size=512,refcount_bits=64", &[]);
    // Room for what is written, and for two blocks of 64 clusters.
    let end = start.image.len().next_multiple_of(512) + 7 * 512;
    start.image.resize(end, 0xd5);
    let start = Arc::new(start);
    many_orders(300, move || {
        work_on(Disk::device(start.image.clone()), &start, THREADS);
    });
}

#[test]
fn entries_of_two_words() {
    // Subclusters of 512 bytes; one slice for the whole disk.
    const THREADS: &[&[Step]] = &[
        &[Write(512, 512, 2), Write(1024, 512, 3), Read(0, 512, 1)],
        &[Write(2048, 512, 4), Zero(2560, 512), Read(2048, 512, 4)],
        &[Read(0, 512, 1), Flush, Read(0, 512, 1)],
    ];
    orders("cluster_size=16k,extended_l2=on", 500, THREADS);
}
