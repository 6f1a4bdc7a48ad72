//! What would be caught: bytes at another place of the disk below, operations past its end, blocks
//! that are cut; a flush that stays above, or one that succeeds though the file below failed; what
//! was flushed and is not there after a power cut, or after a kill since a journal maps what the
//! disk below has lost; two disks that wait for each other's room; an error that does not say where
//! it happened.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::rc::Rc;

use super::super::Layer;
use super::*;
use crate::format::qcow2::create::{CreateOptions, create};
use crate::format::qcow2::journal::Folder;
use crate::format::{Qcow2, Raw, qcow2};
use crate::storage::fault::FaultStorage;
use crate::storage::memory::{MemoryStorage, Step};
use crate::storage::{AlignedBuf, Window, io as storage_io};

const INNER: u64 = 4 << 20;
const OUTER: u64 = 2 << 20;
const CLUSTER: usize = 64 << 10;

fn reactor() -> Reactor {
    Reactor::for_this_thread().unwrap()
}

fn now<T>(answer: Answer<'_, T>) -> T {
    reactor().block_on(answer)
}

fn window_of(storage: Arc<dyn Storage>, offset: u64, size: u64) -> Arc<dyn Storage> {
    let window = Window::of(storage, offset, Some(size));
    reactor().block_on(window).unwrap()
}

/// A disk whose layers are given, top first.
fn root(layers: Vec<(Format, Arc<dyn Storage>)>) -> Arc<Root> {
    let layers = layers.into_iter().map(|(format, storage)| {
        Arc::new(Layer {
            name: "inner".into(),
            format,
            storage,
            read_only: false,
            discard: true,
            copy_on_read: false,
        })
    });
    Root::new(Chain::new(layers.collect()).unwrap())
}

fn image_in(storage: Arc<dyn Storage>) -> (Format, Arc<dyn Storage>) {
    opened(storage, None).unwrap()
}

fn opened(
    storage: Arc<dyn Storage>,
    journal: Option<Arc<Folder>>,
) -> Result<(Format, Arc<dyn Storage>)> {
    let options = qcow2::Options {
        writable: true,
        discard: true,
        journal,
        ..Default::default()
    };
    let image = reactor().block_on(Qcow2::open(storage, options))?;
    let storage = image.data_storage().clone();
    Ok((Format::Qcow2(Arc::new(image)), storage))
}

/// A disk in a new image of `size` bytes, and options of its own.
fn new_image(
    storage: &Arc<dyn Storage>,
    size: u64,
    more: impl Fn(&mut CreateOptions),
) -> Arc<Root> {
    let mut options = CreateOptions::new(size);
    more(&mut options);
    reactor().block_on(create(&**storage, &options)).unwrap();
    root(vec![image_in(storage.clone())])
}

/// An image that is laid out in the disk of another one, which is in `bottom`.
fn nested(bottom: &Arc<MemoryStorage>) -> (Arc<Root>, Arc<Root>) {
    let bottom: Arc<dyn Storage> = bottom.clone();
    let inner = new_image(&bottom, INNER, |_| ());
    let disk: Arc<dyn Storage> = Arc::new(Backed::new(inner.clone()).unwrap());
    (new_image(&disk, OUTER, |_| ()), inner)
}

fn write(root: &Root, offset: u64, bytes: &[u8]) -> Result<()> {
    let buffer = AlignedBuf::copy_of(bytes);
    let request = async |view: Rc<View>| {
        // SAFETY: `buffer` outlives the write.
        let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
        view.write(offset, bufs).await
    };
    reactor().block_on(with_room(View::of(root.chain()), || root.chain(), request))
}

fn read(root: &Root, offset: u64, len: usize) -> Vec<u8> {
    let buffer = AlignedBuf::zeroed(len);
    // SAFETY: `buffer` outlives the read.
    let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
    reactor()
        .block_on(View::of(root.chain()).read(offset, bufs))
        .unwrap();
    buffer.to_vec()
}

fn flush(root: &Root) -> Result<()> {
    reactor().block_on(root.chain().flush())
}

/// One operation, as the data path submits it.
fn submit(storage: &dyn Storage, op: Op<'_>) -> io::Result<u32> {
    let reactor = reactor();
    // SAFETY: the memory lives until the completion has been taken below.
    let result = match unsafe { storage.submit(&reactor, op, Token::client(7)) } {
        Submission::Ready(result) => result,
        Submission::Pending => {
            assert!(
                reactor.next_completion().is_none(),
                "it is to be a task, always"
            );
            let completion = loop {
                match reactor.next_completion() {
                    Some(completion) => break completion,
                    None if !reactor.turn() => reactor.wait(None),
                    None => {}
                }
            };
            assert_eq!(completion.value, 7);
            completion.result
        }
    };
    assert_eq!(reactor.tasks(), 0);
    result
}

fn errno(result: io::Result<u32>) -> i32 {
    Error::io(crate::error::Action::Read, "", 0, &result.unwrap_err()).errno()
}

#[test]
fn it_is_a_device_with_an_end_and_blocks() {
    let bottom = Arc::new(MemoryStorage::new(Vec::new()));
    let file: Arc<dyn Storage> = Arc::new(FaultStorage::over(bottom).with_blocks(512, 4096));
    let root = new_image(&file, 256 << 10, |_| ());
    let disk = Backed::new(root.clone()).unwrap();
    let size = 256 << 10;
    assert_eq!(now(disk.len()).unwrap(), size);
    assert_eq!(now(disk.capacity()).unwrap(), Some(size));
    assert_eq!(disk.limits().offset_align, 4096);
    now(disk.set_len(size)).unwrap();
    assert_eq!(
        now(disk.set_len(size + 1)).unwrap_err().raw_os_error(),
        Some(libc::ENOSPC)
    );
    write(&root, size - 8192, &[7; 8192]).unwrap();
    let buffer = AlignedBuf::zeroed(16384);
    let at = |len: usize| {
        [libc::iovec {
            iov_base: buffer.as_ptr().cast_mut().cast(),
            iov_len: len,
        }]
    };
    let read = |len, offset| {
        let iovecs = &at(len)[..];
        submit(&disk, Op::Read { iovecs, offset })
    };
    let write = |len, offset| {
        let iovecs = &at(len)[..];
        submit(&disk, Op::Write { iovecs, offset })
    };
    let zero = |offset, len, unmap| submit(&disk, Op::Zero { offset, len, unmap });
    assert_eq!(read(16384, size - 8192).unwrap(), 8192);
    assert!(buffer[..8192] == [7; 8192] && buffer[8192..] == [0; 8192]);
    assert_eq!(read(4096, size).unwrap(), 0);
    assert_eq!(read(4096, u64::MAX / 4096 * 4096).unwrap(), 0);
    assert_eq!(write(8192, size - 8192).unwrap(), 8192);
    for (offset, len) in [(size - 4096, 8192), (size, 4096)] {
        assert_eq!(errno(write(len as usize, offset)), libc::ENOSPC);
        assert_eq!(errno(zero(offset, len, false)), libc::ENOSPC);
        zero(offset, len, true).unwrap();
    }
    for (offset, len) in [(512, 4096), (4096, 512)] {
        assert_eq!(errno(read(len as usize, offset)), libc::EINVAL);
        assert_eq!(errno(write(len as usize, offset)), libc::EINVAL);
        assert_eq!(errno(zero(offset, len, false)), libc::EINVAL);
    }
    let reserve = Op::Reserve {
        offset: 0,
        len: 4096,
    };
    assert_eq!(errno(submit(&disk, reserve)), libc::EOPNOTSUPP);
    assert_eq!(submit(&disk, Op::Sync).unwrap(), 0);
    Reactor::leave_thread();
}

#[test]
fn a_disk_that_ends_within_a_block_is_refused() {
    let bottom = Arc::new(MemoryStorage::new(Vec::new()));
    let file: Arc<dyn Storage> = bottom;
    let image = new_image(&file, (64 << 10) + 512, |_| ());
    assert!(Backed::new(image.clone()).is_ok());
    let chain = image.chain();
    let blocks = FaultStorage::over(Arc::new(MemoryStorage::new(Vec::new()))).with_blocks(1, 4096);
    let image = root(vec![(chain.top().format.clone(), Arc::new(blocks))]);
    let text = Backed::new(image).unwrap_err().to_string();
    assert!(
        text.contains("node 'inner'") && text.contains("4096"),
        "{text}"
    );
    Reactor::leave_thread();
}

/// Requests at random, on an image in a window of an image whose transfers are short and
/// interrupted.
#[test]
fn an_image_in_a_window_of_an_image_holds_what_is_written() {
    for seed in 0..8 {
        let bottom = Arc::new(MemoryStorage::new(Vec::new()));
        let file: Arc<dyn Storage> = bottom.clone();
        let inner = new_image(&file, INNER, |options| {
            options.cluster_size = 4096 << (seed % 3 * 2);
            options.version = 2 + (seed as u32 & 1);
        });
        let disk: Arc<dyn Storage> = Arc::new(Backed::new(inner.clone()).unwrap());
        write(&inner, 0, &[0xee; 512]).unwrap();
        let window = window_of(disk, 512, INNER - 1024);
        let outer = new_image(&window, OUTER, |options| options.cluster_size = 4096);
        bottom.uneven(Some(seed));
        let mut model = vec![0u8; OUTER as usize];
        let mut state = seed;
        let mut below = |end: u64| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> 33) % end
        };
        for step in 0..120u8 {
            let len = 512 * (1 + below(64));
            let offset = 512 * below((OUTER - len) / 512 + 1);
            let place = &mut model[offset as usize..(offset + len) as usize];
            let view = View::of(outer.chain());
            match below(4) {
                0 => {
                    place.fill(0);
                    let unmap = below(2) == 0;
                    reactor()
                        .block_on(view.write_zeroes(offset, len, unmap))
                        .unwrap();
                }
                1 => {
                    reactor().block_on(view.discard(offset, len)).unwrap();
                    place.copy_from_slice(&read(&outer, offset, len as usize));
                }
                _ => {
                    place.fill(step + 1);
                    write(&outer, offset, place).unwrap();
                }
            }
            if below(16) == 0 {
                flush(&outer).unwrap();
            }
        }
        assert!(read(&outer, 0, OUTER as usize) == model, "seed {seed}");
        for root in [&outer, &inner] {
            let Format::Qcow2(image) = &root.chain().top().format.clone() else {
                panic!("an image");
            };
            reactor().block_on(image.close()).unwrap();
        }
        // Opened anew, from what is in the file at the bottom.
        let anew = root(vec![image_in(Arc::new(MemoryStorage::new(
            bottom.snapshot(),
        )))]);
        assert!(
            read(&anew, 0, 512) == [0xee; 512],
            "written before the window"
        );
        let disk: Arc<dyn Storage> = Arc::new(Backed::new(anew).unwrap());
        let window = window_of(disk, 512, INNER - 1024);
        let again = root(vec![image_in(window)]);
        assert!(
            read(&again, 0, OUTER as usize) == model,
            "seed {seed}, again"
        );
    }
    Reactor::leave_thread();
}

/// The machine stops at every step: what was flushed before is there, through both images.
#[test]
fn what_was_flushed_survives_a_power_cut_through_both_images() {
    let bottom = Arc::new(MemoryStorage::new(Vec::new()));
    let (outer, inner) = nested(&bottom);
    flush(&outer).unwrap();
    flush(&inner).unwrap();
    let start = bottom.snapshot();
    bottom.record();
    // Steps by which the value of each cluster was flushed.
    let mut flushed = Vec::new();
    for round in 1..6u8 {
        for cluster in 0..6 {
            if (cluster + round) % 3 != 0 {
                let at = u64::from(cluster) * CLUSTER as u64 * 4;
                write(&outer, at, &[round * 16 + cluster; CLUSTER]).unwrap();
            }
        }
        flush(&outer).unwrap();
        let values: Vec<u8> = (0..6u64)
            .map(|cluster| read(&outer, cluster * CLUSTER as u64 * 4, 1)[0])
            .collect();
        flushed.push((bottom.steps(), values));
    }
    let log = bottom.take_log();
    for (steps, values) in &flushed {
        // What came before the flush is stable; of what comes behind it, nothing.
        let mut left = start.clone();
        for step in &log[..*steps] {
            apply(&mut left, step);
        }
        let disk = root(vec![image_in(Arc::new(MemoryStorage::new(left)))]);
        let disk: Arc<dyn Storage> = Arc::new(Backed::new(disk).unwrap());
        let again = root(vec![image_in(disk)]);
        for (cluster, value) in (0..).zip(values) {
            let found = read(&again, cluster * CLUSTER as u64 * 4, CLUSTER);
            assert!(found == [*value; CLUSTER], "cluster {cluster} at {steps}");
        }
    }
    let syncs = log.iter().filter(|step| **step == Step::Sync).count();
    assert!(
        syncs >= flushed.len(),
        "only {syncs} barriers reached the file"
    );
    assert!(matches!(log.get(flushed[0].0 - 1), Some(Step::Sync)));
    Reactor::leave_thread();
}

fn apply(bytes: &mut Vec<u8>, step: &Step) {
    let mut reach = |end: u64| {
        if bytes.len() < end as usize {
            bytes.resize(end as usize, 0);
        }
    };
    match step {
        Step::Write { offset, bytes: new } => {
            reach(offset + new.len() as u64);
            bytes[*offset as usize..*offset as usize + new.len()].copy_from_slice(new);
        }
        Step::Zero { offset, len } => {
            let end = (offset + len).min(bytes.len() as u64) as usize;
            if let Some(range) = bytes.get_mut(*offset as usize..end) {
                range.fill(0);
            }
        }
        Step::SetLen(len) => bytes.resize(*len as usize, 0),
        Step::Grow(len) => reach(*len),
        Step::Sync => {}
    }
}

#[test]
fn a_failed_flush_of_the_file_at_the_bottom_stays_one_of_the_disk() {
    let memory = Arc::new(MemoryStorage::new(Vec::new()));
    let cached = Arc::new(FaultStorage::over(memory.clone()).with_page_cache());
    let file: Arc<dyn Storage> = cached;
    let inner = new_image(&file, INNER, |_| ());
    let syncs = Syncs::of(&file);
    let disk: Arc<dyn Storage> = Arc::new(Backed::new(inner).unwrap());
    let outer = new_image(&disk, OUTER, |_| ());
    let window = window_of(disk, 0, INNER / 2);
    let raw = root(vec![(Format::Raw(Raw::new(INNER / 2)), window)]);
    write(&outer, 0, &[1; CLUSTER]).unwrap();
    flush(&outer).unwrap();
    memory.fail_syncs(true);
    write(&outer, 0, &[2; CLUSTER]).unwrap();
    let text = flush(&outer).unwrap_err().to_string();
    assert!(text.starts_with("memory: a flush failed"), "{text}");
    memory.fail_syncs(false);
    // It would succeed, and say nothing of what was lost.
    for root in [&outer, &raw] {
        assert!(matches!(flush(root), Err(Error::Sync(_))));
    }
    assert_eq!(syncs.clear().unwrap().file, "memory");
    flush(&outer).unwrap();
    flush(&raw).unwrap();
    Reactor::leave_thread();
}

#[test]
fn an_error_names_the_place_in_the_file_at_the_bottom() {
    let bottom = Arc::new(MemoryStorage::new(Vec::new()));
    let (outer, _inner) = nested(&bottom);
    write(&outer, 0, &[1; CLUSTER]).unwrap();
    bottom.fail_after(0, libc::EIO);
    let buffer = AlignedBuf::zeroed(512);
    // SAFETY: `buffer` outlives the read.
    let bufs = unsafe { IoBufs::of(&buffer, 0, 512) };
    let error = reactor()
        .block_on(View::of(outer.chain()).read(0, bufs))
        .unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("memory: read at offset "), "{text}");
    assert_eq!(error.errno(), libc::EIO);
    // Many at once, of which the first fails: none holds up the thread.
    bottom.fail_after(3, libc::EIO);
    let buffer = AlignedBuf::zeroed(OUTER as usize);
    for cluster in (0..OUTER / CLUSTER as u64).step_by(2) {
        bottom.fail_after(usize::MAX, 0);
        write(&outer, cluster * CLUSTER as u64, &[1; CLUSTER]).unwrap();
    }
    bottom.fail_after(3, libc::EIO);
    // SAFETY: `buffer` outlives the read.
    let bufs = unsafe { IoBufs::of(&buffer, 0, OUTER as usize) };
    assert!(
        reactor()
            .block_on(View::of(outer.chain()).read(0, bufs))
            .is_err()
    );
    bottom.fail_after(usize::MAX, 0);
    Reactor::leave_thread();
}

/// All is on a device that is full: what is discarded above makes room below, and those that wait
/// for it do not wait for each other.
#[test]
fn room_is_found_again_in_both_layers() {
    for image in [false, true] {
        let memory = MemoryStorage::new(Vec::new());
        let size = 16 << 20;
        let options = CreateOptions::new(size);
        reactor().block_on(create(&memory, &options)).unwrap();
        let mut device = memory.snapshot();
        device.resize(2 << 20, 0);
        let inner = root(vec![image_in(Arc::new(MemoryStorage::device(device)))]);
        let disk: Arc<dyn Storage> = Arc::new(Backed::new(inner).unwrap());
        let outer = match image {
            true => new_image(&disk, size / 2, |_| ()),
            false => root(vec![(Format::Raw(Raw::new(size)), disk)]),
        };
        let clusters = outer.chain().size() / CLUSTER as u64;
        write(&outer, 0, &[5; CLUSTER]).unwrap();
        // The tables of the image above take room below, which they have from here on.
        flush(&outer).unwrap();
        let mut written = 1;
        let full = loop {
            match write(&outer, written * CLUSTER as u64, &[5; CLUSTER]) {
                Ok(()) => written += 1,
                Err(error) => break error,
            }
            assert!(written < clusters, "the device is smaller");
        };
        assert_eq!(full.errno(), libc::ENOSPC, "{full}");
        for round in 0..written / 2 {
            let view = View::of(outer.chain());
            let at = round * 2 * CLUSTER as u64;
            reactor()
                .block_on(view.discard(at, 2 * CLUSTER as u64))
                .unwrap();
            let at = (clusters - 1 - round) * CLUSTER as u64;
            write(&outer, at, &[6; CLUSTER])
                .unwrap_or_else(|error| panic!("{image}, round {round}: {error}"));
            assert!(read(&outer, at, CLUSTER) == [6; CLUSTER]);
        }
        flush(&outer).unwrap();
    }
    Reactor::leave_thread();
}

/// An image of version 2 over another one cannot record zeros: a discard writes nothing, and zeros
/// are zeros.
#[test]
fn zeros_over_a_base_are_zeros_whatever_the_version() {
    for version in [2, 3] {
        let base: Arc<dyn Storage> = Arc::new(MemoryStorage::new(vec![9; 1 << 20]));
        let bottom: Arc<dyn Storage> = Arc::new(MemoryStorage::new(Vec::new()));
        let mut options = CreateOptions::new(1 << 20);
        options.version = version;
        reactor().block_on(create(&*bottom, &options)).unwrap();
        let inner = root(vec![
            image_in(bottom),
            (Format::Raw(Raw::new(1 << 20)), base),
        ]);
        let disk = Backed::new(inner.clone()).unwrap();
        reactor()
            .block_on(storage_io::discard(&disk, 0, CLUSTER as u64))
            .unwrap();
        let kept = read(&inner, 0, CLUSTER);
        assert!(
            kept == [if version == 2 { 9 } else { 0 }; CLUSTER],
            "{version}"
        );
        reactor()
            .block_on(storage_io::zero(&disk, CLUSTER as u64, 700 << 10, true))
            .unwrap();
        let zeros = read(&inner, CLUSTER as u64, 700 << 10);
        assert!(zeros.iter().all(|&byte| byte == 0), "{version}");
        assert!(read(&inner, (700 << 10) + CLUSTER as u64, 512) == [9; 512]);
    }
    Reactor::leave_thread();
}

/// Images in images, over a base full of nines, with a folder for journals. Dropped, a process has
/// been killed.
struct Journaled {
    bottom: Arc<MemoryStorage>,
    dir: tempfile::TempDir,
}

impl Journaled {
    /// With an image of `version` at the bottom, and in it what `inside` makes of its disk.
    fn new(version: u32, inside: impl Fn(&dyn Storage)) -> Self {
        let place = Self {
            bottom: Arc::new(MemoryStorage::new(Vec::new())),
            dir: tempfile::tempdir_in("/dev/shm").unwrap(),
        };
        let mut options = CreateOptions::new(INNER);
        options.version = version;
        let created = create(&*place.bottom, &options);
        reactor().block_on(created).unwrap();
        let image = root(vec![image_in(place.bottom.clone())]);
        inside(&Backed::new(image.clone()).unwrap());
        flush(&image).unwrap();
        place
    }

    /// The outer image is opened by a new process.
    fn start(&self) -> Result<Arc<Root>> {
        let folder = || Some(Folder::open(self.dir.path(), None).unwrap());
        let inner = root(vec![opened(self.bottom.clone(), folder())?]);
        let image = opened(Arc::new(Backed::new(inner)?), folder())?;
        let base: Arc<dyn Storage> = Arc::new(MemoryStorage::new(vec![9; OUTER as usize]));
        Ok(root(vec![image, (Format::Raw(Raw::new(OUTER)), base)]))
    }
}

fn make_outer(disk: &dyn Storage) {
    let options = CreateOptions::new(OUTER);
    reactor().block_on(create(disk, &options)).unwrap();
}

#[test]
fn a_kill_takes_nothing_that_was_flushed_from_an_image_in_an_image() {
    for version in [2, 3] {
        let place = Journaled::new(version, make_outer);
        let outer = place.start().unwrap();
        write(&outer, 0, &[1; CLUSTER]).unwrap();
        flush(&outer).unwrap();
        // Copies on write, which complete and are not flushed.
        for cluster in 1..4 {
            write(&outer, cluster * CLUSTER as u64, &[2; 512]).unwrap();
        }
        drop(outer);
        let outer = place.start().unwrap();
        assert!(read(&outer, 0, CLUSTER) == [1; CLUSTER], "{version}");
        for cluster in 1..4 {
            let found = read(&outer, cluster * CLUSTER as u64, CLUSTER);
            assert!(found[512..].iter().all(|&byte| byte == 9), "{version}");
        }
    }
    Reactor::leave_thread();
}

#[test]
fn a_live_journal_in_the_disk_of_an_image_is_refused() {
    // An image whose journal is live comes into a disk that keeps nothing.
    let alone = Arc::new(MemoryStorage::new(Vec::new()));
    make_outer(&*alone);
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let folder = Folder::open(dir.path(), None).unwrap();
    drop(opened(alone.clone(), Some(folder)).unwrap());
    let place = Journaled {
        dir,
        ..Journaled::new(3, |disk| {
            let bytes = AlignedBuf::copy_of(&alone.snapshot());
            let written = storage_io::write_buf(disk, 0, &bytes);
            reactor().block_on(written).unwrap();
        })
    };
    let text = place.start().unwrap_err().to_string();
    assert!(
        text.contains("does not keep what has not been flushed"),
        "{text}"
    );
    assert!(text.contains("forget-journal"), "{text}");
    Reactor::leave_thread();
}

mod holes;
