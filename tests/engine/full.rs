//! Images that grow as far as their format goes.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stratablk::chain::{Chain, Layer, View};
use stratablk::error::Error;
use stratablk::format::{Format, Qcow2, qcow2};
use stratablk::reactor::{Reactor, Token};
use stratablk::storage::OpenFlags;
use stratablk::storage::{
    AlignedBuf, Answer, FileStorage, IoBufs, Limits, Op, Storage, Submission,
};

use crate::support::*;

const CLUSTER: usize = 512;
/// Clusters that a refcount block covers.
const PER_BLOCK: usize = 64;
/// Entries of the longest refcount table.
const MOST: usize = (8 << 20) / 8;
/// Clusters, at least, that are left at the end of what the table covers.
const LEFT: usize = 128;

/// A file that counts what is written to it.
#[derive(Debug)]
struct Counting {
    file: FileStorage,
    written: AtomicU64,
}

impl Storage for Counting {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        if let Op::Write { iovecs, .. } = &op {
            let len: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
            self.written.fetch_add(len as u64, Ordering::Relaxed);
        }
        // SAFETY: passed on to the caller.
        unsafe { self.file.submit(reactor, op, token) }
    }

    fn len(&self) -> Answer<'_, io::Result<u64>> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> Answer<'_, io::Result<()>> {
        self.file.set_len(len)
    }

    fn limits(&self) -> Limits {
        self.file.limits()
    }

    fn name(&self) -> &str {
        self.file.name()
    }

    fn writable(&self) -> bool {
        true
    }
}

/// Makes an image whose refcount table has `entries`, and covers at least `LEFT` clusters more
/// than the file has: the table itself is at its end, behind the blocks that cover it.
fn make(path: &Path, entries: usize) {
    create(path, "cluster_size=512,refcount_bits=64", 16 << 20);
    let bytes = std::fs::read(path).unwrap();
    let be = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let old = be(48) as usize;
    let old_entries = (be(56) >> 32) as usize * CLUSTER / 8;
    let mut table = vec![0u64; entries];
    for (index, entry) in table.iter_mut().enumerate().take(old_entries) {
        *entry = be(old + index * 8);
    }
    let clusters = entries * 8 / CLUSTER;
    let blocks = clusters.div_ceil(PER_BLOCK - 1);
    let first = (entries * PER_BLOCK - LEFT - blocks - clusters) / PER_BLOCK * PER_BLOCK;
    let mut counts = Vec::new();
    for block in 0..blocks {
        table[first / PER_BLOCK + block] = ((first + block) * CLUSTER) as u64;
        for cluster in block * PER_BLOCK..(block + 1) * PER_BLOCK {
            counts.push(u64::from(cluster < blocks + clusters));
        }
    }
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_be_bytes()).collect();
    let put = |at: usize, bytes: Vec<u8>| file.write_all_at(&bytes, at as u64).unwrap();
    let at = (first + blocks) * CLUSTER;
    put(first * CLUSTER, words(&counts));
    put(at, words(&table));
    put(48, words(&[at as u64]));
    put(56, (clusters as u32).to_be_bytes().to_vec());
}

struct Opened {
    storage: Arc<Counting>,
    image: Arc<Qcow2>,
    chain: Arc<Chain>,
}

fn open(reactor: &Reactor, path: &Path) -> Opened {
    let flags = OpenFlags {
        writable: true,
        ..OpenFlags::default()
    };
    let storage = Arc::new(Counting {
        file: FileStorage::open(path, flags).unwrap(),
        written: AtomicU64::new(0),
    });
    let options = qcow2::Options {
        writable: true,
        discard: true,
        ..Default::default()
    };
    let image = reactor.block_on(Qcow2::open(storage.clone(), options));
    let image = Arc::new(image.unwrap());
    let layer = Layer {
        name: "top".into(),
        format: Format::Qcow2(image.clone()),
        storage: storage.clone(),
        read_only: false,
        discard: true,
        copy_on_read: false,
    };
    Opened {
        storage,
        image,
        chain: Arc::new(Chain::new(vec![Arc::new(layer)]).unwrap()),
    }
}

impl Opened {
    fn write(&self, reactor: &Reactor, cluster: usize) -> Result<(), Error> {
        let buffer = AlignedBuf::copy_of(&[7; CLUSTER]);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, CLUSTER) };
        let view = View::of(self.chain.clone());
        reactor.block_on(view.write((cluster * CLUSTER) as u64, bufs))
    }

    fn close(self, reactor: &Reactor) {
        reactor.block_on(self.image.close()).unwrap();
    }
}

/// Fails unless QEMU opens the image and reads what was written; and so do we.
fn judge(reactor: &Reactor, path: &Path, clusters: usize) {
    let read = format!("read -P 7 0 {}", clusters * CLUSTER);
    run(
        "qemu-io",
        &["-r", "-f", "qcow2", "-c", &read, path.to_str().unwrap()],
    );
    let again = open(reactor, path);
    let table = u64::from(again.image.header().reftable_clusters) * CLUSTER as u64;
    assert!(table <= 8 << 20, "a table of {table} bytes");
    again.close(reactor);
}

/// What would be caught: a table that grows past what anybody opens.
#[test]
fn a_refcount_table_grows_to_its_limit() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    // Half as much again would be 9 MiB.
    make(&path, MOST / 4 * 3);
    let reactor = Reactor::for_this_thread().unwrap();
    let disk = open(&reactor, &path);
    for cluster in 0..2 * LEFT {
        disk.write(&reactor, cluster).unwrap();
    }
    disk.close(&reactor);
    judge(&reactor, &path, 2 * LEFT);
}

/// What would be caught: an image that is full and says that it is corrupt, one that writes a table
/// in vain at each attempt, one that stays full when there is room again, or damages what it has.
#[test]
fn an_image_that_is_full_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    make(&path, MOST);
    let reactor = Reactor::for_this_thread().unwrap();
    let disk = open(&reactor, &path);
    let written = (0..2 * LEFT).take_while(|&cluster| match disk.write(&reactor, cluster) {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.errno(), libc::ENOSPC, "{error}");
            assert!(error.is_write());
            assert!(
                error.to_string().contains("image is full: the refcount"),
                "{error}"
            );
            false
        }
    });
    let written = written.count();
    assert!(
        written > LEFT / 2 && written < 2 * LEFT,
        "{written} clusters"
    );
    reactor.block_on(disk.chain.flush()).unwrap();
    let before = disk.storage.written.load(Ordering::Relaxed);
    for _ in 0..3 {
        disk.write(&reactor, written).unwrap_err();
    }
    assert_eq!(disk.storage.written.load(Ordering::Relaxed), before);
    // What is there can be written.
    disk.write(&reactor, 0).unwrap();
    // Room that becomes free is used.
    let view = View::of(disk.chain.clone());
    let last = ((written - 1) * CLUSTER) as u64;
    reactor
        .block_on(view.discard(last, CLUSTER as u64))
        .unwrap();
    for _ in 0..2 {
        reactor.block_on(disk.chain.flush()).unwrap();
    }
    disk.write(&reactor, written - 1).unwrap();
    disk.write(&reactor, written).unwrap_err();
    disk.close(&reactor);
    judge(&reactor, &path, written);
}
