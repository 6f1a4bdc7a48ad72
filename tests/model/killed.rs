//! A process that is killed at any step, while one queue writes in place through what another one
//! has just mapped, and a third one flushes.
//!
//! What would be caught: an entry that is seen before the journal has it; a journal that begins
//! behind what a flush has taken, or before that flush has succeeded; references that it does not
//! have; a next process that hands out what its predecessor had.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stratablk_model::chain::{Chain, Layer, Pieces, Source, View};
use stratablk_model::disk::Disk;
use stratablk_model::format::qcow2::journal::Folder;
use stratablk_model::format::{Format, Qcow2, qcow2};
use stratablk_model::reactor::{Reactor, Token};
use stratablk_model::shared_memory::Gate;
use stratablk_model::shuttle::future::block_on;
use stratablk_model::shuttle::rand::{Rng, thread_rng};
use stratablk_model::shuttle::thread;
use stratablk_model::storage::{
    AlignedBuf, Answer, IoBufs, Limits, Op, Storage, Submission, Syncs,
};
use stratablk_model::sync::atomic::{AtomicBool, Ordering};

use crate::many_orders;
use crate::qcow2::Image;
use crate::support::create;

const SECTOR: usize = 512;
const SIZE: usize = 16 << 10;
/// Steps of the process until it is killed, at most: about as many as there are.
const STEPS: usize = 400;

/// A write of one sector, with that many as its value; or a flush.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(usize),
    Flush,
}
use Step::{Flush, Write};

/// What a kill leaves.
#[derive(Clone)]
struct Left {
    image: Vec<u8>,
    journals: BTreeMap<PathBuf, Vec<u8>>,
    /// Sectors whose write had completed.
    completed: Vec<usize>,
}

/// A process, and what is left of it at some of its steps.
#[derive(Debug)]
struct Process {
    disk: Arc<Disk>,
    folder: PathBuf,
    state: Mutex<State>,
    point: AtomicBool,
    /// A sector that another queue writes in place as soon as its cluster is seen to be mapped.
    other: Mutex<Option<(usize, Arc<Chain>)>>,
}

#[derive(Debug, Default)]
struct State {
    /// Steps until it is killed.
    left: usize,
    completed: Vec<usize>,
    ends: Vec<Left>,
}

impl std::fmt::Debug for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} completed", self.completed)
    }
}

fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .map(|path| {
            (
                path.file_name().unwrap().into(),
                std::fs::read(&path).unwrap(),
            )
        })
        .collect()
}

impl Process {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Were it killed now, this would be left.
    fn left(&self, state: &State) -> Left {
        Left {
            image: self.disk.snapshot(),
            journals: files(&self.folder),
            completed: state.completed.clone(),
        }
    }

    /// Another thread may go on here, or the process end.
    fn step(&self) {
        self.point.load(Ordering::SeqCst);
        let mut state = self.state();
        state.left = state.left.wrapping_sub(1);
        if state.left == 0 {
            let left = self.left(&state);
            state.ends.push(left);
        }
    }

    /// It may be killed just now: what has completed is certain.
    fn complete(&self, step: Step) {
        let mut state = self.state();
        if let Write(sector) = step {
            state.completed.push(sector);
        }
        let left = self.left(&state);
        state.ends.push(left);
    }
}

impl Process {
    /// Were another queue to write in place now, and the process to be killed then.
    fn write_in_place(&self) {
        let other = self.other.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((sector, chain)) = &*other else {
            return;
        };
        let mut pieces = Pieces::new();
        let planned = chain.plan_read((sector * SECTOR) as u64, SECTOR, &mut pieces);
        if let (true, [piece]) = (planned, pieces.as_slice())
            && let Source::Storage { offset, .. } = piece.source
        {
            let mut state = self.state();
            let mut left = self.left(&state);
            let end = offset as usize + SECTOR;
            left.image.resize(left.image.len().max(end), 0);
            left.image[offset as usize..end].fill(*sector as u8);
            left.completed.push(*sector);
            state.ends.push(left);
        }
    }
}

impl Gate for Process {
    fn is_open(&self) -> bool {
        self.step();
        self.write_in_place();
        true
    }
}

/// The disk as the process uses it.
#[derive(Debug)]
struct Watched(Arc<Process>);

impl Storage for Watched {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        self.0.step();
        // SAFETY: passed on to the caller.
        let submission = unsafe { self.0.disk.submit(reactor, op, token) };
        self.0.step();
        submission
    }

    fn len(&self) -> Answer<'_, std::io::Result<u64>> {
        self.0.disk.len()
    }

    fn set_len(&self, len: u64) -> Answer<'_, std::io::Result<()>> {
        self.0.disk.set_len(len)
    }

    fn limits(&self) -> Limits {
        self.0.disk.limits()
    }

    fn name(&self) -> &str {
        self.0.disk.name()
    }

    fn outlives_process(&self) -> bool {
        true
    }

    fn writable(&self) -> bool {
        true
    }

    fn syncs(&self) -> Option<&Arc<Syncs>> {
        self.0.disk.syncs()
    }
}

async fn open(storage: Arc<dyn Storage>, folder: Arc<Folder>) -> (Arc<Qcow2>, Arc<Chain>) {
    let options = qcow2::Options {
        writable: true,
        discard: true,
        journal: Some(folder),
        ..Default::default()
    };
    let image = Arc::new(Qcow2::open(storage.clone(), options).await.unwrap());
    let layer = Layer {
        name: "layer".into(),
        format: Format::Qcow2(image.clone()),
        storage,
        read_only: false,
        discard: true,
        copy_on_read: false,
    };
    (image, Arc::new(Chain::new(vec![Arc::new(layer)]).unwrap()))
}

async fn perform(chain: &Arc<Chain>, step: Step) {
    match step {
        Write(sector) => {
            let mut buffer = AlignedBuf::zeroed(SECTOR);
            buffer.fill(sector as u8);
            // SAFETY: `buffer` outlives the operation.
            let bufs = unsafe { IoBufs::of(&buffer, 0, SECTOR) };
            let view = View::of(chain.clone());
            view.write((sector * SECTOR) as u64, bufs).await.unwrap();
        }
        Flush => chain.flush().await.unwrap(),
    }
}

/// The values of a disk's sectors.
fn read(chain: &Arc<Chain>) -> Vec<u8> {
    let buffer = AlignedBuf::zeroed(SIZE);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, SIZE) };
    block_on(View::of(chain.clone()).read(0, bufs)).unwrap();
    let sectors = buffer.chunks(SECTOR);
    sectors
        .map(|sector| {
            assert!(
                sector.iter().all(|byte| *byte == sector[0]),
                "a torn sector"
            );
            sector[0]
        })
        .collect()
}

fn tmpfs() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// The next process has all that completed, also when it has written and flushed.
fn succeed(end: &Left) {
    Image::new(&end.image).unwrap().check().unwrap();
    let dir = tmpfs();
    for (name, bytes) in &end.journals {
        use std::io::Write as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let mut options = std::fs::OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600);
        let mut file = file.open(dir.path().join(name)).unwrap();
        file.write_all(bytes).unwrap();
    }
    let disk = Disk::new(end.image.clone());
    let folder = Folder::open(dir.path(), None).unwrap();
    let (image, chain) = block_on(open(disk.clone(), folder));
    let expect = |chain: &Arc<Chain>, own: &[usize], when: &str| {
        let seen = read(chain);
        for (sector, value) in seen.into_iter().enumerate() {
            let completed = end.completed.contains(&sector) || own.contains(&sector);
            let fine = value == sector as u8 || (!completed && value == 0);
            assert!(fine, "{when}: sector {sector} is {value}, {end:?}");
        }
    };
    expect(&chain, &[], "the next process");
    let last = SIZE / SECTOR - 1;
    block_on(perform(&chain, Write(last)));
    block_on(image.close()).unwrap();
    expect(&chain, &[last], "when it has written");
    let bytes = disk.snapshot();
    Image::new(&bytes).unwrap().check().unwrap();
    let dir = tmpfs();
    let folder = Folder::open(dir.path(), None).unwrap();
    let (_image, chain) = block_on(open(Disk::new(bytes), folder));
    expect(&chain, &[last], "when it has ended");
}

/// The threads of a process work, until it is killed.
fn work(image: &[u8], threads: &'static [&'static [Step]], other: Option<usize>) {
    let _reactor = Reactor::for_this_thread().unwrap();
    let dir = tmpfs();
    let process = Arc::new(Process {
        disk: Disk::new(image.to_vec()),
        folder: dir.path().to_owned(),
        state: Mutex::default(),
        point: AtomicBool::new(false),
        other: Mutex::default(),
    });
    let folder = Folder::open(dir.path(), None).unwrap();
    folder.set_gate(process.clone());
    let (_image, chain) = block_on(open(Arc::new(Watched(process.clone())), folder));
    process.state().left = thread_rng().gen_range(1..STEPS);
    *process.other.lock().unwrap() = other.map(|sector| (sector, chain.clone()));
    let running: Vec<_> = threads
        .iter()
        .map(|steps| {
            let (chain, process) = (chain.clone(), process.clone());
            thread::spawn(move || {
                for &step in *steps {
                    block_on(perform(&chain, step));
                    process.complete(step);
                }
            })
        })
        .collect();
    running.into_iter().for_each(|t| t.join().unwrap());
    let ends = std::mem::take(&mut process.state().ends);
    ends.iter().for_each(succeed);
}

fn orders(options: &str, runs: usize, threads: &'static [&'static [Step]]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    create(&path, options, SIZE as u64);
    let image = Arc::new(std::fs::read(&path).unwrap());
    many_orders(runs, move || work(&image, threads, None));
}

#[test]
fn a_write_in_place_through_what_another_queue_has_mapped() {
    const THREADS: &[&[Step]] = &[&[Write(1)], &[Write(2), Write(3)]];
    orders("cluster_size=4k", 400, THREADS);
}

/// At every store to the journal, whatever the order of the threads.
#[test]
fn a_mapping_that_is_seen_is_in_the_journal() {
    for options in [
        "cluster_size=4k",
        "cluster_size=4k,extended_l2=off,refcount_bits=1",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.qcow2");
        create(&path, options, SIZE as u64);
        let image = Arc::new(std::fs::read(&path).unwrap());
        const THREADS: &[&[Step]] = &[&[Write(1), Write(9), Flush, Write(17)]];
        for other in [2, 10, 18] {
            let image = image.clone();
            many_orders(4, move || work(&image, THREADS, Some(other)));
        }
    }
}

#[test]
fn writes_beside_a_flush() {
    const THREADS: &[&[Step]] = &[
        &[Write(1), Write(9)],
        &[Write(2), Flush],
        &[Flush, Write(17)],
    ];
    orders("cluster_size=4k", 300, THREADS);
}

#[test]
fn writes_in_place_of_entries_with_two_words() {
    const THREADS: &[&[Step]] = &[&[Write(1), Flush], &[Write(2), Write(3)]];
    orders("cluster_size=16k,extended_l2=on", 300, THREADS);
}
