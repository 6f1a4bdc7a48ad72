//! The device as a guest sees it, driven by the `virtio-driver` crate: a front-end and a driver
//! that others wrote.

#![allow(clippy::unwrap_used)]

mod export_common;

use std::os::unix::net::{UnixListener, UnixStream};

use export_common::*;
use rand::prelude::*;
use stratablk::export::{Export, ExportConfig, SocketSource};
use stratablk::storage::FileStorage;
use stratablk::storage::OpenFlags;
use stratablk::storage::memory::{MemoryStorage, Step};
use virtio_driver::VirtioFeatureFlags;

fn writable_file(place: &Place, size: u64) -> std::path::PathBuf {
    let path = place.file("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

/// Catches: data that goes to the wrong place, or does not arrive, on either path.
#[test]
fn what_is_written_is_read_back_and_stands_in_the_file() {
    let place = Place::new();
    let path = writable_file(&place, 8 << 20);
    let root = file_root(
        &path,
        OpenFlags {
            writable: true,
            ..OpenFlags::default()
        },
    );
    let export = start(place.config(), root);
    let mut guest = Guest::connect(&place.socket(), 1);
    let out = guest.memory.part(0, 65536);
    let back = guest.memory.part(65536, 65536);
    rand::rng().fill_bytes(out);
    assert_eq!(guest.run(0, |q| q.write(1 << 20, out, 1)), 0);
    assert_eq!(guest.run(0, |q| q.read(1 << 20, back, 2)), 0);
    assert_eq!(out, back);
    assert_eq!(guest.run(0, |q| q.flush(3)), 0);
    let file = std::fs::read(&path).unwrap();
    assert_eq!(&file[1 << 20..(1 << 20) + 65536], out);
    assert_eq!(&file[..1 << 20], vec![0; 1 << 20]);
    drop(guest);
    export.shutdown();
    assert!(!place.socket().exists());
}

fn open(path: &std::path::Path, direct: bool) -> std::sync::Arc<stratablk::chain::Root> {
    let flags = OpenFlags {
        writable: true,
        direct,
        ..OpenFlags::default()
    };
    file_root(path, flags)
}

/// Catches: requests that get each other's data or go missing when many are in flight on two
/// queues, through the page cache or past it, with and without EVENT_IDX and polling.
#[test]
fn random_requests_on_two_queues_agree_with_a_model() {
    for (seed, direct, ring, poll) in [
        (1, false, VirtioFeatureFlags::RING_EVENT_IDX, 32),
        (2, true, VirtioFeatureFlags::RING_EVENT_IDX, 0),
        (3, true, VirtioFeatureFlags::empty(), 32),
        (4, false, VirtioFeatureFlags::RING_INDIRECT_DESC, 0),
    ] {
        let place = Place::new();
        let path = writable_file(&place, 8 << 20);
        let config = ExportConfig {
            queues: 2,
            poll_max_us: poll,
            ..place.config()
        };
        let _export = start(config, open(&path, direct));
        let mut guest = Guest::with_features(&place.socket(), 2, BLK_FEATURES, ring);
        let mut random = StdRng::seed_from_u64(seed);
        let mut model = vec![0u8; 8 << 20];
        for _ in 0..100 {
            round(&mut guest, &mut random, &mut model);
        }
        assert_eq!(guest.run(0, |q| q.flush(0)), 0);
        assert!(std::fs::read(&path).unwrap() == model, "seed {seed}");
    }
}

/// One batch of requests on different blocks of the disk, and what they should have done.
fn round(guest: &mut Guest, random: &mut StdRng, model: &mut [u8]) {
    const BLOCK: usize = 65536;
    let mut blocks: Vec<usize> = (0..128).collect();
    blocks.shuffle(random);
    let mut counts = [0, 0];
    let mut reads = Vec::new();
    for (slot, &block) in blocks.iter().take(40).enumerate() {
        let start = random.random_range(0..64) * 512;
        let len = random.random_range(1..=64) * 512;
        let at = block * BLOCK + start;
        // Not aligned for direct I/O at times.
        let skew = if random.random_bool(0.2) { 8 } else { 0 };
        let part = guest.memory.part(slot * 2 * BLOCK + skew, len);
        let target = &mut model[at..at + len];
        let queue = random.random_range(0..2);
        counts[queue] += 1;
        let queue = &mut guest.queues[queue];
        let at = at as u64;
        match random.random_range(0..10) {
            0 => {
                target.fill(0);
                queue.write_zeroes(at, len as u64, random.random(), 0)
            }
            1 => queue.flush(0),
            2..6 => {
                random.fill_bytes(part);
                target.copy_from_slice(part);
                queue.write(at, part, 0)
            }
            _ => {
                part.fill(0xaa);
                reads.push((
                    at as usize,
                    &*guest.memory.part(slot * 2 * BLOCK + skew, len),
                ));
                queue.read(at, part, 0)
            }
        }
        .unwrap();
    }
    for (queue, count) in counts.into_iter().enumerate() {
        guest.kick(queue);
        for (_, result) in guest.wait(queue, count) {
            assert_eq!(result, 0);
        }
    }
    for (at, part) in reads {
        assert!(model[at..at + part.len()] == *part, "read at {at}");
    }
}

/// Catches: large requests that are cut short, and reads behind the end of a file that is
/// shorter than its disk.
#[test]
fn large_requests_are_whole() {
    let place = Place::new();
    let path = writable_file(&place, 0);
    let storage = std::sync::Arc::new(
        FileStorage::open(
            &path,
            OpenFlags {
                writable: true,
                ..OpenFlags::default()
            },
        )
        .unwrap(),
    );
    let _export = start(place.config(), raw_root(storage, 16 << 20, false));
    let mut guest = Guest::connect(&place.socket(), 1);
    let all = guest.memory.part(0, 12 << 20);
    all.fill(1);
    assert_eq!(guest.run(0, |q| q.read(1 << 20, all, 0)), 0);
    assert!(
        all.iter().all(|&byte| byte == 0),
        "an empty file reads as zeros"
    );
    rand::rng().fill_bytes(all);
    assert_eq!(guest.run(0, |q| q.write(4096, all, 0)), 0);
    let expected = all.to_vec();
    all.fill(1);
    assert_eq!(guest.run(0, |q| q.read(4096, all, 0)), 0);
    assert!(all == expected);
}

/// Catches: zeros that are written although they were to be detected, and data that is taken for
/// zeros because only some of it is.
#[test]
fn zeros_are_detected_where_that_is_asked_for() {
    let place = Place::new();
    let (root, storage) = memory_root(vec![9; 1 << 20]);
    let config = ExportConfig {
        detect_zeroes: Some(true),
        ..place.config()
    };
    let _export = start(config, root);
    let mut guest = Guest::connect(&place.socket(), 1);
    storage.record();
    let part = guest.memory.part(0, 8192);
    part.fill(0);
    assert_eq!(guest.run(0, |q| q.write(4096, part, 0)), 0);
    part[8191] = 1;
    assert_eq!(guest.run(0, |q| q.write(65536, part, 0)), 0);
    let steps = storage.take_log();
    let zero = Step::Zero {
        offset: 4096,
        len: 8192,
    };
    let data = Step::Write {
        offset: 65536,
        bytes: part.to_vec(),
    };
    assert_eq!(steps, [zero, data]);
}

/// Catches: a disk whose blocks the storage cannot write one by one, where two small writes to
/// one block would lose each other's data.
#[test]
fn requests_keep_to_the_logical_block_size() {
    let place = Place::new();
    let path = writable_file(&place, 1 << 20);
    let config = ExportConfig {
        logical_block_size: 4096,
        ..place.config()
    };
    let _export = start(config, open(&path, false));
    let mut guest = Guest::connect(&place.socket(), 1);
    let config = guest.transport.get_config().unwrap();
    assert_eq!(u32::from(config.blk_size), 4096);
    let part = guest.memory.part(0, 4096);
    assert_eq!(guest.run(0, |q| q.write(4096, part, 0)), 0);
    assert_eq!(guest.run(0, |q| q.write(512, part, 0)), -libc::EIO);
    assert_eq!(guest.run(0, |q| q.write(4096, &part[..512], 0)), -libc::EIO);
}

/// Catches: a second front-end that disturbs the first, or that is never served.
#[test]
fn a_second_front_end_waits_for_the_first() {
    let place = Place::new();
    let (root, _) = memory_root(vec![9; 1 << 20]);
    let _export = start(place.config(), root);
    let mut first = Guest::connect(&place.socket(), 1);
    let second = std::thread::spawn({
        let socket = place.socket();
        move || {
            let mut guest = Guest::connect(&socket, 1);
            let part = guest.memory.part(0, 512);
            guest.run(0, |q| q.read(0, part, 0))
        }
    });
    for _ in 0..100 {
        let part = first.memory.part(0, 512);
        assert_eq!(first.run(0, |q| q.read(0, part, 0)), 0);
    }
    assert!(!second.is_finished());
    drop(first);
    assert_eq!(second.join().unwrap(), 0);
}

/// Catches: sockets that were handed down and are not served, and an export of one connection
/// that does not tell its end.
#[test]
fn sockets_can_be_handed_down() {
    let place = Place::new();
    let (root, _) = memory_root(vec![9; 1 << 20]);
    let listener = UnixListener::bind(place.socket()).unwrap();
    let source = SocketSource::from_fd(listener.into()).unwrap();
    assert!(matches!(source, SocketSource::ListenFd(_)));
    let export = start(ExportConfig::new("a", source), root.clone());
    for _ in 0..2 {
        let mut guest = Guest::connect(&place.socket(), 1);
        let part = guest.memory.part(0, 512);
        assert_eq!(guest.run(0, |q| q.read(0, part, 0)), 0);
    }
    export.shutdown();
    assert!(place.socket().exists(), "its maker removes it");

    let (ours, theirs) = UnixStream::pair().unwrap();
    let source = SocketSource::from_fd(ours.into()).unwrap();
    assert!(matches!(source, SocketSource::ConnectedFd(_)));
    let export = start(ExportConfig::new("b", source), root.clone());
    let (ended, end) = std::sync::mpsc::channel();
    export.on_end(move || ended.send(()).unwrap());
    assert!(end.try_recv().is_err());
    drop(theirs);
    end.recv_timeout(PATIENCE).unwrap();

    let file = std::fs::File::create(place.file("file")).unwrap();
    assert!(SocketSource::from_fd(file.into()).is_err());
}

/// Catches: a start that takes the socket of a daemon which lives, or that fails because of one
/// which was killed.
#[test]
fn only_a_dead_socket_is_replaced() {
    let place = Place::new();
    let (root, _) = memory_root(vec![9; 1 << 20]);
    drop(UnixListener::bind(place.socket()).unwrap());
    let export = start(place.config(), root.clone());
    let error = Export::start(place.config(), root.clone()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "Failed to bind socket to {}: Address already in use",
            place.socket().display()
        )
    );
    let mut guest = Guest::connect(&place.socket(), 1);
    let part = guest.memory.part(0, 512);
    assert_eq!(guest.run(0, |q| q.read(0, part, 0)), 0);
    export.shutdown();
    assert!(!place.socket().exists());
    let fixed = std::sync::Arc::new(MemoryStorage::new(vec![0; 4096]));
    let error = Export::start(place.config(), raw_root(fixed, 4096, true)).unwrap_err();
    assert_eq!(error.to_string(), "Block node is read-only");
    for bad in [
        ExportConfig {
            queues: 0,
            ..place.config()
        },
        ExportConfig {
            queue_size_max: 100,
            ..place.config()
        },
        ExportConfig {
            logical_block_size: 1000,
            ..place.config()
        },
        ExportConfig {
            serial: Some("x".repeat(21)),
            ..place.config()
        },
    ] {
        assert!(Export::start(bad, root.clone()).is_err());
    }
}

/// Catches: an end of the export under a guest that is hard at work which hangs, or leaves
/// requests half done.
#[test]
fn an_export_ends_under_load() {
    let place = Place::new();
    let path = writable_file(&place, 1 << 20);
    let export = start(place.config(), open(&path, true));
    let mut guest = Guest::connect(&place.socket(), 1);
    let part = guest.memory.part(0, 4096);
    for _ in 0..40 {
        guest.queues[0].read(0, part, 0).unwrap();
    }
    guest.kick(0);
    export.shutdown();
    let info = export.info();
    assert!(!info.connected && info.shutting_down);
    // What was taken is done, the rest untouched; both is fine, a hang is not.
    let done = guest.queues[0].completions().count();
    assert!(done <= 40);
    let reads: u64 = export.stats().iter().map(|stats| stats.reads.get()).sum();
    assert_eq!(reads, done as u64);
}
