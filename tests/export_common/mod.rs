//! What the export tests share: a disk behind an export, and front-ends for it.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod hand;
pub mod held;

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use stratablk::chain::{Chain, Layer, Root};
use stratablk::export::{Export, ExportConfig, SocketSource};
use stratablk::format::{Format, Raw};
use stratablk::storage::memory::MemoryStorage;
use stratablk::storage::{FileStorage, OpenFlags, Storage};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

/// Long enough for any machine; a test that meets it has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The path of a socket in a fresh directory.
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("vhost.sock")
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn config(&self) -> ExportConfig {
        ExportConfig {
            writable: true,
            ..ExportConfig::new("disk0", SocketSource::Path(self.socket()))
        }
    }
}

/// A raw disk of `size` bytes on `storage`.
pub fn raw_root(storage: Arc<dyn Storage>, size: u64, read_only: bool) -> Arc<Root> {
    let layer = Layer {
        name: "node0".into(),
        format: Format::Raw(Raw::new(size)),
        storage,
        read_only,
        discard: true,
        copy_on_read: false,
    };
    Root::new(Chain::new(vec![Arc::new(layer)]).unwrap())
}

/// A disk in memory.
pub fn memory_root(bytes: Vec<u8>) -> (Arc<Root>, Arc<MemoryStorage>) {
    let size = bytes.len() as u64;
    let storage = Arc::new(MemoryStorage::new(bytes));
    (raw_root(storage.clone(), size, false), storage)
}

/// A disk in a file.
pub fn file_root(path: &Path, flags: OpenFlags) -> Arc<Root> {
    let storage = Arc::new(FileStorage::open(path, flags).unwrap());
    let size = std::fs::metadata(path).unwrap().len();
    raw_root(storage, size, false)
}

/// Memory that can be shared with a device.
pub struct Shared {
    pub file: OwnedFd,
    pub map: MmapMut,
}

impl Shared {
    pub fn new(len: usize) -> Self {
        // SAFETY: a fresh descriptor of our own.
        let file = unsafe {
            use std::os::fd::FromRawFd;
            let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            std::fs::File::from_raw_fd(fd)
        };
        file.set_len(len as u64).unwrap();
        // SAFETY: nobody truncates the file.
        let map = unsafe { MmapMut::map_mut(&file) }.unwrap();
        Self {
            file: file.into(),
            map,
        }
    }

    pub fn addr(&self) -> u64 {
        self.map.as_ptr() as u64
    }

    /// A part of it, not borrowed: the device uses it at the same time.
    pub fn part(&mut self, at: usize, len: usize) -> &'static mut [u8] {
        let part = &mut self.map[at..at + len];
        // SAFETY: tests keep the memory for as long as they use its parts.
        unsafe { std::slice::from_raw_parts_mut(part.as_mut_ptr(), len) }
    }
}

/// The virtio-driver crate as a guest.
pub struct Guest {
    // Dropped first: queues live in the transport's memory.
    pub queues: Vec<VirtioBlkQueue<'static, u64>>,
    pub transport: Box<VirtioBlkTransport>,
    pub memory: Shared,
    /// Times that requests completed and no signal came.
    unsignalled: u32,
}

pub const BLK_FEATURES: u64 = (1 << 2)
    | (1 << 5)
    | (1 << 6)
    | (1 << 9)
    | (1 << 10)
    | (1 << 11)
    | (1 << 12)
    | (1 << 13)
    | (1 << 14);

impl Guest {
    pub fn connect(socket: &Path, queues: usize) -> Self {
        Self::with_features(
            socket,
            queues,
            BLK_FEATURES,
            VirtioFeatureFlags::RING_EVENT_IDX,
        )
    }

    pub fn with_features(socket: &Path, queues: usize, blk: u64, ring: VirtioFeatureFlags) -> Self {
        let features = blk | (VirtioFeatureFlags::VERSION_1 | ring).bits();
        let transport = VhostUser::new(socket.to_str().unwrap(), features).unwrap();
        let mut transport = Box::new(transport) as Box<VirtioBlkTransport>;
        let memory = Shared::new(16 << 20);
        transport
            .map_mem_region(
                memory.addr() as usize,
                memory.map.len(),
                memory.file.as_raw_fd(),
                0,
            )
            .unwrap();
        let queues = VirtioBlkQueue::setup_queues(&mut *transport, queues, 128).unwrap();
        let mut guest = Self {
            queues,
            transport,
            memory,
            unsignalled: 0,
        };
        for queue in &mut guest.queues {
            queue.set_used_notif_enabled(true);
        }
        guest
    }

    pub fn kick(&mut self, queue: usize) {
        // The crate has no barrier between showing requests and looking whether the device wants
        // to hear of them.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if self.queues[queue].avail_notif_needed() {
            self.transport
                .get_submission_notifier(queue)
                .notify()
                .unwrap();
        }
    }

    /// Waits until `count` more requests have completed: contexts and results.
    pub fn wait(&mut self, queue: usize, count: usize) -> Vec<(u64, i32)> {
        let start = Instant::now();
        let event = self.transport.get_completion_fd(queue);
        let mut done = Vec::new();
        loop {
            done.extend(self.queues[queue].completions().map(|c| (c.context, c.ret)));
            if done.len() >= count {
                return done;
            }
            assert!(start.elapsed() < PATIENCE, "got {done:?} of {count}");
            // It may be one whose read waits.
            if wait_readable(event.as_raw_fd()) {
                let _ = event.read();
                continue;
            }
            let late = done.len();
            done.extend(self.queues[queue].completions().map(|c| (c.context, c.ret)));
            if done.len() > late && !wait_readable(event.as_raw_fd()) {
                // The crate may miss one now and then, for want of a barrier. A device that gives
                // none fails here, and does not make every wait a long one.
                self.unsignalled += 1;
                assert!(self.unsignalled < 5, "requests complete without signals");
            }
        }
    }

    /// Runs one request to its end.
    pub fn run(
        &mut self,
        queue: usize,
        submit: impl FnOnce(&mut VirtioBlkQueue<'static, u64>) -> std::io::Result<()>,
    ) -> i32 {
        submit(&mut self.queues[queue]).unwrap();
        self.kick(queue);
        self.wait(queue, 1)[0].1
    }
}

/// Waits for input on `fd`, at most for a second.
pub fn wait_readable(fd: i32) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd is passed.
    unsafe { libc::poll(&mut poll, 1, 1000) > 0 }
}

/// Waits until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        std::thread::yield_now();
    }
}

pub fn start(config: ExportConfig, root: Arc<Root>) -> Export {
    Export::start(config, root).unwrap()
}
