//! What operations on storage are for, as the storage hears it.
//!
//! What would be caught: an operation that comes with another purpose, or none, so that a rule about
//! purposes chooses the wrong ones; an error that does not say what could not be read or written.

use std::rc::Rc;
use std::sync::Arc;

use stratablk::chain::{Chain, Layer, Span, View};
use stratablk::error::Result;
use stratablk::format::qcow2::create::{CreateOptions, create};
use stratablk::format::{Format, Qcow2, Raw, qcow2};
use stratablk::reactor::Reactor;
use stratablk::storage::fault::{Call, FaultStorage, Faults, Rule};
use stratablk::storage::memory::MemoryStorage;
use stratablk::storage::{AlignedBuf, IoBufs, Purpose, Storage};

const CLUSTER: usize = 64 << 10;
const SIZE: u64 = 1 << 20;

/// An overlay over a raw base, freshly opened, with its first cluster allocated. The rules are for the
/// overlay and the base alike.
struct Disk {
    reactor: Reactor,
    faults: Arc<Faults>,
    chain: Arc<Chain>,
}

fn layer(name: &str, format: Format, storage: Arc<dyn Storage>) -> Arc<Layer> {
    Arc::new(Layer {
        name: name.into(),
        format,
        storage,
        read_only: false,
        discard: true,
        copy_on_read: false,
    })
}

impl Disk {
    fn new() -> Self {
        let reactor = Reactor::for_this_thread().unwrap();
        let faults = Arc::new(Faults::default());
        let memory = Arc::new(MemoryStorage::new(Vec::new()));
        let options = CreateOptions::new(SIZE);
        reactor.block_on(create(&*memory, &options)).unwrap();
        let base = MemoryStorage::new(vec![5; SIZE as usize]);
        let base = Arc::new(FaultStorage::over(Arc::new(base)).with_faults(&faults));
        let chain = |storage: Arc<dyn Storage>| {
            let options = qcow2::Options {
                writable: true,
                discard: true,
                ..qcow2::Options::default()
            };
            let image = reactor.block_on(Qcow2::open(storage.clone(), options));
            let top = Format::Qcow2(Arc::new(image.unwrap()));
            let layers = vec![
                layer("top", top, storage),
                layer("base", Format::Raw(Raw::new(SIZE)), base.clone()),
            ];
            Arc::new(Chain::new(layers).unwrap())
        };
        let storage = |faults| Arc::new(FaultStorage::over(memory.clone()).with_faults(faults));
        let disk = Self {
            chain: chain(storage(&faults)),
            reactor: reactor.clone(),
            faults: faults.clone(),
        };
        disk.write(0, CLUSTER).unwrap();
        disk.flush().unwrap();
        // Nothing of its mapping is in memory.
        Self {
            chain: chain(storage(&faults)),
            reactor,
            faults,
        }
    }

    fn view(&self) -> Rc<View> {
        View::of(self.chain.clone())
    }

    fn write(&self, at: usize, len: usize) -> Result<()> {
        let mut buffer = AlignedBuf::zeroed(len);
        buffer.fill(9);
        // SAFETY: nobody changes the buffer.
        let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
        self.reactor.block_on(self.view().write(at as u64, bufs))
    }

    fn read(&self, at: usize) -> Result<()> {
        let buffer = AlignedBuf::zeroed(CLUSTER);
        // SAFETY: nobody looks at the buffer meanwhile.
        let bufs = unsafe { IoBufs::of(&buffer, 0, CLUSTER) };
        self.reactor.block_on(self.view().read(at as u64, bufs))
    }

    fn flush(&self) -> Result<()> {
        self.reactor.block_on(self.chain.flush())
    }

    fn copy(&self) -> Result<()> {
        let view = self.view();
        let copied = view.copy(Span::new(0, 2), 8 * CLUSTER as u64, CLUSTER as u64);
        self.reactor.block_on(copied).map(drop)
    }
}

type Work = fn(&Disk) -> Result<()>;

/// What is done; the operation that fails in it, and what it is for; what the error says.
const CASES: [(&str, Work, Call, Purpose, &str); 11] = [
    (
        "load",
        |disk| disk.read(0),
        Call::Read,
        Purpose::L2Table,
        "read of an L2 table at",
    ),
    (
        "read",
        |disk| disk.read(0),
        Call::Read,
        Purpose::Data,
        ": read at",
    ),
    (
        "read of the base",
        |disk| disk.read(CLUSTER),
        Call::Read,
        Purpose::Data,
        ": read at",
    ),
    (
        "write in place",
        |disk| disk.write(0, 512),
        Call::Write,
        Purpose::Data,
        ": write at",
    ),
    (
        "new cluster",
        |disk| disk.write(CLUSTER, CLUSTER),
        Call::Write,
        Purpose::Data,
        ": write at",
    ),
    (
        "copy on write, read",
        |disk| disk.write(CLUSTER + 512, 512),
        Call::Read,
        Purpose::CopyOnWrite,
        "read for copy-on-write at",
    ),
    (
        "copy on write, write",
        |disk| disk.write(CLUSTER + 512, 512),
        Call::Write,
        Purpose::CopyOnWrite,
        "write for copy-on-write at",
    ),
    (
        "copy, read",
        Disk::copy,
        Call::Read,
        Purpose::Copy,
        ": read at",
    ),
    (
        "copy, write",
        Disk::copy,
        Call::Write,
        Purpose::Copy,
        ": write at",
    ),
    (
        "flush of the mapping",
        |disk| disk.write(CLUSTER, CLUSTER).and_then(|()| disk.flush()),
        Call::Write,
        Purpose::L2Table,
        "write of an L2 table at",
    ),
    (
        "flush",
        |disk| disk.write(CLUSTER, CLUSTER).and_then(|()| disk.flush()),
        Call::Sync,
        Purpose::Flush,
        ": flush at",
    ),
];

#[test]
fn operations_come_with_their_purpose() {
    for (what, work, call, purpose, words) in CASES {
        let disk = Disk::new();
        disk.faults.add(Rule {
            call,
            purpose: Some(purpose),
            errno: libc::EIO,
            times: 1,
        });
        let error = work(&disk).unwrap_err().to_string();
        assert!(error.contains(words), "{what}: {error}");
        // With the rule used up it is done.
        work(&disk).unwrap_or_else(|error| panic!("{what}, again: {error}"));
        // None of it is for anything else than what an image of this kind needs.
        let disk = Disk::new();
        disk.faults.add(Rule {
            call,
            purpose: Some(Purpose::Other),
            errno: libc::EIO,
            times: u32::MAX,
        });
        work(&disk).unwrap_or_else(|error| panic!("{what} has no purpose: {error}"));
    }
    Reactor::leave_thread();
}
