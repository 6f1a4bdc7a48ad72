//! Requests that nobody waits for any more, on storage that hangs.
//!
//! What would be caught: a write whose cluster another one takes while it is on its way, or whose
//! memory and view go; a flush that is forgotten half-way, with what it was about to write; a read
//! that is answered while a part of it is still on its way into the guest's memory.

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};

use stratablk::chain::{Chain, Layer, View};
use stratablk::error::Result;
use stratablk::format::qcow2::create::{CreateOptions, create};
use stratablk::format::{Format, Qcow2, Raw, qcow2};
use stratablk::reactor::Reactor;
use stratablk::storage::fault::{Call, FaultStorage, Gate};
use stratablk::storage::memory::MemoryStorage;
use stratablk::storage::{AlignedBuf, IoBufs, Storage};

const CLUSTER: usize = 64 << 10;
const SIZE: u64 = 1 << 20;

/// An image whose calls hang while its gate is shut.
struct Disk {
    reactor: Reactor,
    gate: Arc<Gate>,
    memory: Arc<MemoryStorage>,
    image: Arc<Qcow2>,
    chain: Arc<Chain>,
}

fn layer(format: Format, storage: Arc<dyn Storage>) -> Arc<Layer> {
    Arc::new(Layer {
        name: "layer".into(),
        format,
        storage,
        read_only: false,
        discard: true,
        copy_on_read: false,
    })
}

fn open(reactor: &Reactor, storage: Arc<dyn Storage>) -> Arc<Qcow2> {
    let options = qcow2::Options {
        writable: true,
        discard: true,
        ..qcow2::Options::default()
    };
    let image = reactor.block_on(Qcow2::open(storage, options)).unwrap();
    Arc::new(image)
}

impl Disk {
    fn new(below: Option<Arc<Layer>>) -> Self {
        let reactor = Reactor::for_this_thread().unwrap();
        let memory = Arc::new(MemoryStorage::new(Vec::new()));
        let options = CreateOptions::new(SIZE);
        reactor.block_on(create(&*memory, &options)).unwrap();
        let gate = Arc::new(Gate::default());
        let storage = Arc::new(FaultStorage::over(memory.clone()).with_gate(&gate));
        let image = open(&reactor, storage.clone());
        let top = layer(Format::Qcow2(image.clone()), storage);
        let layers = [top].into_iter().chain(below).collect();
        Self {
            chain: Arc::new(Chain::new(layers).unwrap()),
            reactor,
            gate,
            memory,
            image,
        }
    }

    fn view(&self) -> Rc<View> {
        View::of(self.chain.clone())
    }

    /// Writes a cluster of `value`; the memory is let go of with the future.
    fn write(&self, at: usize, value: u8) -> impl Future<Output = Result<()>> + 'static {
        let mut buffer = AlignedBuf::zeroed(CLUSTER);
        buffer.fill(value);
        // SAFETY: nobody changes the buffer.
        let bufs = unsafe { IoBufs::of(&buffer, 0, CLUSTER) };
        self.view().write(at as u64, bufs)
    }

    fn read(&self, at: usize) -> Vec<u8> {
        let buffer = AlignedBuf::zeroed(CLUSTER);
        // SAFETY: nobody looks at the buffer meanwhile.
        let bufs = unsafe { IoBufs::of(&buffer, 0, CLUSTER) };
        self.reactor
            .block_on(self.view().read(at as u64, bufs))
            .unwrap();
        buffer.to_vec()
    }

    /// Begins something, and stops waiting for it when it hangs.
    fn begin_and_cancel<T>(&self, work: impl Future<Output = T>) {
        let hung = self.gate.hung();
        let mut work = Box::pin(work);
        let mut context = Context::from_waker(Waker::noop());
        while self.gate.hung() == hung {
            assert!(work.as_mut().poll(&mut context).is_pending());
            self.turn();
        }
        drop(work);
        self.turn();
    }

    /// Begins something that goes on by itself.
    fn spawn<T: 'static>(&self, work: impl Future<Output = T> + 'static) -> Rc<Cell<Option<T>>> {
        let done = Rc::new(Cell::new(None));
        let result = done.clone();
        self.reactor
            .spawn(async move { result.set(Some(work.await)) });
        self.turn();
        done
    }

    /// Goes as far as it goes without an answer of the storage.
    fn turn(&self) {
        while self.reactor.turn() {}
    }

    fn finish(&self) {
        self.gate.open();
        while self.reactor.tasks() > 0 {
            if !self.reactor.turn() {
                self.reactor.wait(None);
            }
        }
    }

    /// What a process that starts now would find.
    fn reread(&self, at: usize) -> Vec<u8> {
        let storage = Arc::new(MemoryStorage::new(self.memory.snapshot()));
        let image = open(&self.reactor, storage.clone());
        let top = layer(Format::Qcow2(image), storage);
        let other = Self {
            chain: Arc::new(Chain::new(vec![top]).unwrap()),
            reactor: self.reactor.clone(),
            gate: self.gate.clone(),
            memory: self.memory.clone(),
            image: self.image.clone(),
        };
        other.read(at)
    }

    fn close(self) {
        self.reactor.block_on(self.image.close()).unwrap();
        let mut findings = Vec::new();
        let mut report = |finding| findings.push(finding);
        let checked = qcow2::check::check(&*self.memory, &mut report);
        let summary = self.reactor.block_on(checked).unwrap();
        assert_eq!((summary.corruptions, summary.leaks), (0, 0));
        assert!(findings.is_empty());
    }
}

#[test]
fn a_cancelled_write_keeps_others_off_its_cluster() {
    // In a cluster of its own, which is linked in the end, and in place.
    for allocated in [false, true] {
        let disk = Disk::new(None);
        if allocated {
            disk.reactor.block_on(disk.write(0, 1)).unwrap();
        }
        disk.gate.shut(&[Call::Write]);
        let view = disk.view();
        let held = Rc::downgrade(&view);
        let mut buffer = AlignedBuf::zeroed(CLUSTER);
        buffer.fill(7);
        // SAFETY: nobody changes the buffer.
        let bufs = unsafe { IoBufs::of(&buffer, 0, CLUSTER) };
        disk.begin_and_cancel(view.write(0, bufs));
        drop(buffer);
        assert!(held.upgrade().is_some(), "its clusters are protected");
        let hung = disk.gate.hung();
        if !allocated {
            let second = disk.spawn(disk.write(0, 8));
            assert_eq!(disk.gate.hung(), hung, "overtaken");
            disk.finish();
            second.take().unwrap().unwrap();
            assert!(disk.read(0) == [8; CLUSTER]);
        } else {
            disk.finish();
            assert!(disk.read(0) == [7; CLUSTER], "its memory was kept");
        }
        assert!(held.upgrade().is_none());
        disk.close();
    }
}

#[test]
fn a_cancelled_flush_forgets_nothing() {
    for call in [Call::Write, Call::Sync] {
        let disk = Disk::new(None);
        disk.reactor.block_on(disk.write(0, 7)).unwrap();
        disk.gate.shut(&[call]);
        let chain = disk.chain.clone();
        disk.begin_and_cancel(async move { chain.flush().await });
        let hung = disk.gate.hung();
        let chain = disk.chain.clone();
        let flushed = disk.spawn(async move { chain.flush().await });
        assert_eq!(disk.gate.hung(), hung, "two flushes at a time");
        disk.finish();
        flushed.take().unwrap().unwrap();
        assert!(disk.reread(0) == [7; CLUSTER], "{call:?}");
        disk.close();
    }
}

#[test]
fn a_read_that_has_failed_waits_for_its_other_parts() {
    let gate = Arc::new(Gate::default());
    let base = Arc::new(MemoryStorage::new(vec![5; SIZE as usize]));
    let base = Arc::new(FaultStorage::over(base).with_gate(&gate));
    let below = layer(Format::Raw(Raw::new(SIZE)), base);
    let disk = Disk::new(Some(below));
    disk.reactor.block_on(disk.write(0, 7)).unwrap();
    let buffer = AlignedBuf::zeroed(2 * CLUSTER);
    // SAFETY: nobody looks at the buffer meanwhile.
    let bufs = unsafe { IoBufs::of(&buffer, 0, 2 * CLUSTER) };
    gate.shut(&[Call::Read]);
    disk.memory.fail_after(0, libc::EIO);
    let read = disk.spawn(disk.view().read(0, bufs));
    assert_eq!(gate.hung(), 1);
    let early = read.take();
    assert!(early.is_none(), "answered, and still on its way");
    gate.open();
    disk.finish();
    assert_eq!(read.take().unwrap().unwrap_err().errno(), libc::EIO);
    assert!(buffer[CLUSTER..] == [5; CLUSTER]);
    disk.memory.fail_after(usize::MAX, 0);
    disk.close();
}
