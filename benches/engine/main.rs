//! How the image engine scales with requests in flight and with queues, on storage that takes its
//! time: each operation is answered after a set latency, however many others are under way. Or on a
//! real disk (`--latency 0 --dir target`).
//!
//! `cargo bench --bench engine` prints a table; `docs/benchmarks` has a run of it. What it
//! would show: a lock that is held across I/O (the figures stop growing with the depth), metadata
//! that is loaded one piece at a time, work that the queues do for one another.

mod delay;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use clap::Parser;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stratablk::chain::{Chain, Layer, View};
use stratablk::format::{Format, Qcow2, Raw, qcow2};
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs, Storage};
use stratablk::storage::{FileStorage, OpenFlags};

use delay::Delay;

type Res<T> = Result<T, Box<dyn std::error::Error>>;

/// Measure how the image engine scales.
#[derive(Parser, Debug)]
struct Options {
    /// What each operation of the storage takes, in microseconds; 0: as long as the disk takes that
    /// holds the folder, past the page cache
    #[arg(long, default_value_t = 200)]
    latency: u64,
    /// Seconds measured for each figure
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Folder for the images; on tmpfs, unless the latency is 0
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Given by `cargo bench`; without meaning here
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is done all the time.
#[derive(Clone, Copy, Debug)]
enum Load {
    /// Every block is written once, in random order of clusters, into an image of its own.
    Allocate { len: usize, overlay: bool },
    /// Reads at random over an image whose mapping is not in memory.
    ColdRead,
    /// Reads at random from allocated clusters under as many layers.
    Layers(usize),
}

impl Load {
    fn name(self) -> String {
        match self {
            Self::Allocate { len, overlay } => format!(
                "allocating write of {} KiB, {}",
                len / 1024,
                if overlay { "overlay" } else { "fresh image" }
            ),
            Self::ColdRead => "cold read of 4 KiB, image of 1 TiB".into(),
            Self::Layers(count) => format!("read of 4 KiB, chain of {count}"),
        }
    }

    fn len(self) -> usize {
        match self {
            Self::Allocate { len, .. } => len,
            _ => 4096,
        }
    }
}

/// Queues and requests in flight on each.
const SHAPES: [(usize, usize); 6] = [(1, 1), (1, 8), (1, 32), (2, 32), (4, 8), (4, 32)];
const DISK: u64 = 16 << 30;
const CLUSTER: u64 = 64 << 10;

fn qemu_img(args: &[&str]) -> Res<()> {
    let output = Command::new("qemu-img").args(args).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "qemu-img {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    )
    .into())
}

fn text(path: &Path) -> Res<&str> {
    path.to_str().ok_or_else(|| "a path that is no text".into())
}

/// Opens the layer in `path`, with the latency.
fn layer(path: &Path, options: &Options, writable: bool, cache_bytes: u64) -> Res<Arc<Layer>> {
    let flags = OpenFlags {
        writable,
        direct: options.latency == 0,
        no_lock: true,
        ..OpenFlags::default()
    };
    let mut storage: Arc<dyn Storage> = Arc::new(FileStorage::open(path, flags)?);
    if options.latency > 0 {
        let latency = Duration::from_micros(options.latency);
        storage = Arc::new(Delay::new(storage, latency));
    }
    let format = if path.extension().is_some_and(|e| e == "qcow2") {
        let reactor = Reactor::for_this_thread()?;
        let options = qcow2::Options {
            writable,
            discard: false,
            cache_bytes,
            ..qcow2::Options::default()
        };
        let image = reactor.block_on(Qcow2::open(storage.clone(), options))?;
        Format::Qcow2(Arc::new(image))
    } else {
        let reactor = Reactor::for_this_thread()?;
        Format::Raw(Raw::new(reactor.block_on(storage.len())?))
    };
    Ok(Arc::new(Layer {
        name: text(path)?.into(),
        format,
        storage,
        read_only: !writable,
        discard: false,
        copy_on_read: false,
    }))
}

/// The chain that a load runs on, made anew.
fn chain(load: Load, dir: &Path, options: &Options) -> Res<Arc<Chain>> {
    let top = dir.join("top.qcow2");
    let cache = qcow2::DEFAULT_CACHE_BYTES;
    let size = DISK.to_string();
    let layers = match load {
        Load::Allocate { overlay: false, .. } => {
            qemu_img(&["create", "-q", "-f", "qcow2", text(&top)?, &size])?;
            vec![layer(&top, options, true, cache)?]
        }
        Load::Allocate { overlay: true, .. } => {
            let base = dir.join("base.raw");
            if !base.exists() {
                // A file full of holes is copied like any other.
                std::fs::File::create(&base)?.set_len(DISK)?;
            }
            let names = (text(&base)?, text(&top)?);
            qemu_img(&[
                "create", "-q", "-f", "qcow2", "-b", names.0, "-F", "raw", names.1,
            ])?;
            vec![
                layer(&top, options, true, cache)?,
                layer(&base, options, false, cache)?,
            ]
        }
        Load::ColdRead => {
            let path = dir.join("large.qcow2");
            if !path.exists() {
                let preallocate = "preallocation=metadata";
                let name = text(&path)?;
                qemu_img(&["create", "-q", "-f", "qcow2", "-o", preallocate, name, "1T"])?;
            }
            vec![layer(&path, options, false, 1 << 20)?]
        }
        Load::Layers(count) => {
            let path = dir.join("full.qcow2");
            if !path.exists() {
                let preallocate = "preallocation=metadata";
                let name = text(&path)?;
                qemu_img(&[
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-o",
                    preallocate,
                    name,
                    &size,
                ])?;
            }
            let empty = dir.join("empty.qcow2");
            if !empty.exists() {
                qemu_img(&["create", "-q", "-f", "qcow2", text(&empty)?, &size])?;
            }
            let mut layers = vec![layer(&path, options, false, cache)?];
            for _ in 1..count {
                layers.push(layer(&empty, options, false, cache)?);
            }
            layers
        }
    };
    Ok(Arc::new(Chain::new(layers)?))
}

/// Where requests go: all queues share it.
struct Places {
    load: Load,
    size: u64,
    next: AtomicU64,
}

impl Places {
    /// The next place; `None`: the image is full.
    fn next(&self, rng: &mut StdRng) -> Option<u64> {
        let len = self.load.len() as u64;
        match self.load {
            Load::Allocate { .. } => {
                let clusters = self.size / CLUSTER;
                let number = self.next.fetch_add(1, Ordering::Relaxed);
                // An odd step visits every cluster of a power of two once.
                let cluster = number.wrapping_mul(0x9e37_79b1) % clusters;
                (number < clusters)
                    .then(|| cluster * CLUSTER + rng.random_range(0..CLUSTER / len) * len)
            }
            _ => Some(rng.random_range(0..self.size / len) * len),
        }
    }
}

/// One figure: requests per second.
fn measure(load: Load, queues: usize, depth: usize, dir: &Path, options: &Options) -> Res<f64> {
    let chain = chain(load, dir, options)?;
    let places = Arc::new(Places {
        load,
        size: chain.size(),
        next: AtomicU64::new(0),
    });
    let (stop, done) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let barrier = Arc::new(Barrier::new(queues + 1));
    let threads: Vec<_> = (0..queues)
        .map(|queue| {
            let (chain, places) = (chain.clone(), places.clone());
            let (stop, done, barrier) = (stop.clone(), done.clone(), barrier.clone());
            std::thread::spawn(move || {
                let Ok(reactor) = Reactor::for_this_thread() else {
                    return;
                };
                barrier.wait();
                for slot in 0..depth {
                    let task = one_after_another(
                        chain.clone(),
                        places.clone(),
                        stop.clone(),
                        done.clone(),
                        (queue * 1000 + slot) as u64,
                    );
                    reactor.spawn(task);
                }
                while reactor.tasks() > 0 {
                    if !reactor.turn() {
                        reactor.wait(None);
                    }
                }
            })
        })
        .collect();
    barrier.wait();
    let begin = Instant::now();
    std::thread::sleep(Duration::from_secs_f64(options.seconds));
    let count = done.load(Ordering::Relaxed);
    let elapsed = begin.elapsed();
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().map_err(|_| "a queue's thread has panicked")?;
    }
    Ok(count as f64 / elapsed.as_secs_f64())
}

async fn one_after_another(
    chain: Arc<Chain>,
    places: Arc<Places>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    seed: u64,
) {
    let mut rng = StdRng::seed_from_u64(seed);
    let len = places.load.len();
    let mut buffer = AlignedBuf::zeroed(len);
    buffer.fill(seed as u8 | 1);
    while !stop.load(Ordering::Relaxed) {
        let Some(offset) = places.next(&mut rng) else {
            return;
        };
        // SAFETY: `buffer` outlives the request.
        let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
        let view: Rc<View> = View::of(chain.clone());
        let result = match places.load {
            Load::Allocate { .. } => view.write(offset, bufs).await,
            _ => view.read(offset, bufs).await,
        };
        if let Err(error) = result {
            eprintln!("engine: {error}");
            return;
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
}

fn main() -> Res<()> {
    let options = Options::parse();
    let dir = tempfile::Builder::new()
        .prefix("stratablk-bench-")
        .tempdir_in(&options.dir)?;
    let latency = match options.latency {
        0 => "as long as the disk takes".to_owned(),
        latency => format!("{latency} µs"),
    };
    println!("Each operation of the storage takes {latency}. 1000 requests per second:\n");
    let head: Vec<String> = SHAPES
        .iter()
        .map(|(queues, depth)| format!("{queues} × {depth}"))
        .collect();
    println!("| queues × in flight | {} |", head.join(" | "));
    println!("| --- |{}", " --- |".repeat(SHAPES.len()));
    let loads = [
        Load::Allocate {
            len: 4096,
            overlay: false,
        },
        Load::Allocate {
            len: 65536,
            overlay: false,
        },
        Load::Allocate {
            len: 4096,
            overlay: true,
        },
        Load::ColdRead,
        Load::Layers(1),
        Load::Layers(64),
    ];
    for load in loads {
        let mut cells = Vec::new();
        for (queues, depth) in SHAPES {
            let figure = measure(load, queues, depth, dir.path(), &options)?;
            cells.push(format!("{:.1}", figure / 1000.0));
        }
        println!("| {} | {} |", load.name(), cells.join(" | "));
    }
    Ok(())
}
