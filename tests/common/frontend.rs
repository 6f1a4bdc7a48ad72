//! A vhost-user-blk front-end without a guest. The transport and the rings are those of the
//! `virtio-driver` crate, written by others; the requests are laid out here, so that a test can
//! also send what a well-behaved driver would not: unknown types, several segments, odd lengths.

use super::Res;
use super::memory::Memory;
use super::tracked::Tracked;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{
    IovaTranslator, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags,
    VirtioFeatureFlags, VirtioTransport, iovec,
};

/// Request types of virtio-blk.
pub const IN: u32 = 0;
/// Write.
pub const OUT: u32 = 1;
/// Flush.
pub const FLUSH: u32 = 4;
/// Get the serial.
pub const GET_ID: u32 = 8;
/// Discard.
pub const DISCARD: u32 = 11;
/// Write zeroes.
pub const WRITE_ZEROES: u32 = 13;

/// The status bytes of virtio-blk.
pub const OK: u8 = 0;
/// An input or output error.
pub const IOERR: u8 = 1;
/// Not supported.
pub const UNSUPP: u8 = 2;
/// What the status byte holds before the back-end writes it.
pub const UNWRITTEN: u8 = 0xff;

/// How long to wait for something that takes milliseconds before calling it lost.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A range of a discard or write-zeroes request, as the device reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Segment {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub count: u32,
    /// Bit 0: unmap.
    pub flags: u32,
}

/// The part of a request that lies in shared memory next to the ring.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Shared {
    kind: u32,
    reserved: u32,
    sector: u64,
    segments: [Segment; 2],
    status: u8,
}

/// A request to send. `data` lies in the front-end's shared memory: (offset, length) pieces.
#[derive(Clone, Copy, Debug)]
pub struct Op<'a> {
    /// Request type.
    pub kind: u32,
    /// First sector, for types that have one.
    pub sector: u64,
    /// Data pieces.
    pub data: &'a [(usize, usize)],
    /// Ranges of discard and write-zeroes (at most two).
    pub segments: &'a [Segment],
}

impl<'a> Op<'a> {
    /// A read into `data`.
    pub fn read(sector: u64, data: &'a [(usize, usize)]) -> Self {
        Op {
            kind: IN,
            sector,
            data,
            segments: &[],
        }
    }

    /// A write from `data`.
    pub fn write(sector: u64, data: &'a [(usize, usize)]) -> Self {
        Op {
            kind: OUT,
            sector,
            data,
            segments: &[],
        }
    }

    /// A flush.
    pub fn flush() -> Self {
        Op {
            kind: FLUSH,
            sector: 0,
            data: &[],
            segments: &[],
        }
    }

    /// A discard or write-zeroes of `segments`.
    pub fn ranges(kind: u32, segments: &'a [Segment]) -> Self {
        Op {
            kind,
            sector: 0,
            data: &[],
            segments,
        }
    }
}

/// A completed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// What the caller gave with the request.
    pub token: u64,
    /// The status byte.
    pub status: u8,
}

type Driver = VhostUser<VirtioBlkConfig, Shared>;

/// What keeps the connection and the memory of the rings.
enum Transport {
    /// The crate's own.
    Driver(Arc<Driver>),
    /// One that can be connected again, and knows inflight regions.
    Tracked(Box<Tracked>),
}

/// One virtqueue, used by one thread.
pub struct Queue {
    ring: Virtqueue<'static, Shared>,
    kick: Box<dyn QueueNotifier>,
    call: File,
    tokens: Vec<Option<u64>>,
    in_flight: usize,
    memory: Arc<Memory>,
    // Keeps the memory of the rings: dropped after `ring`, which lies in it.
    _transport: Arc<dyn Send + Sync>,
}

impl Queue {
    /// Puts a request into the ring; `kick` tells the back-end.
    pub fn submit(&mut self, op: &Op, token: u64) -> Res<()> {
        let memory = &self.memory;
        let data: Vec<_> = op
            .data
            .iter()
            .map(|&(offset, len)| piece(memory.address(offset), len))
            .collect();
        self.submit_at(op, &data, token)
    }

    /// As `submit`, but with the data at any addresses, be they shared memory or not.
    pub fn submit_at(&mut self, op: &Op, data: &[iovec], token: u64) -> Res<()> {
        let id = self.ring.add_request(|shared, add| {
            let mut segments = [Segment::default(); 2];
            for (slot, segment) in segments.iter_mut().zip(op.segments) {
                *slot = *segment;
            }
            *shared = Shared {
                kind: op.kind,
                reserved: 0,
                sector: op.sector,
                segments,
                status: UNWRITTEN,
            };
            let from_device = op.kind == IN || op.kind == GET_ID;
            add(piece(&raw mut shared.kind as usize, 16), false)?;
            if !op.segments.is_empty() {
                let len = size_of::<Segment>() * op.segments.len().min(2);
                add(piece(&raw mut shared.segments as usize, len), false)?;
            }
            for &piece in data {
                add(piece, from_device)?;
            }
            add(piece(&raw mut shared.status as usize, 1), true)
        })?;
        let slot = self
            .tokens
            .get_mut(usize::from(id))
            .ok_or("no such descriptor")?;
        if slot.replace(token).is_some() {
            return Err("a descriptor in flight was used again".into());
        }
        self.in_flight += 1;
        Ok(())
    }

    /// Tells the back-end about new requests, unless it said that it needs no telling.
    pub fn kick(&mut self) -> Res<()> {
        // The crate has no barrier between its store and the load that decides.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if self.ring.avail_notif_needed() {
            self.kick.notify()?;
        }
        Ok(())
    }

    /// The next completed request, if there is one.
    pub fn pop(&mut self) -> Res<Option<Done>> {
        let Some(done) = self.ring.completions().next() else {
            return Ok(None);
        };
        let slot = self
            .tokens
            .get_mut(usize::from(done.id))
            .ok_or("no such descriptor")?;
        let token = slot
            .take()
            .ok_or("the back-end completed a request that was not sent")?;
        self.in_flight -= 1;
        Ok(Some(Done {
            token,
            status: done.req.status,
        }))
    }

    /// True if a completed request waits in the ring.
    pub fn ready(&mut self) -> bool {
        self.ring.completions().has_next()
    }

    /// How many requests are with the back-end.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Asks for a signal at the next completion; false if there is one already.
    pub fn arm(&mut self) -> bool {
        self.ring.set_used_notif_enabled(true);
        // The crate has no barrier between its store and the load that decides.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        !self.ready()
    }

    /// Asks for no more signals and forgets the one that came.
    pub fn disarm(&mut self) -> Res<()> {
        self.ring.set_used_notif_enabled(false);
        // A back-end may have made the descriptor non-blocking, or not: poll before reading.
        if poll(&[self.call.as_raw_fd()], Duration::ZERO)? {
            self.call.read_exact(&mut [0; 8])?;
        }
        Ok(())
    }

    /// Waits on the call descriptor until a request completes. An error means that none did.
    pub fn wait(&mut self) -> Res<()> {
        wait_any(&mut [self])
    }

    /// Waits for one completion without any descriptor.
    pub fn spin(&mut self) -> Res<()> {
        let start = Instant::now();
        while !self.ready() {
            std::hint::spin_loop();
            if start.elapsed() > PATIENCE {
                return Err("the back-end completed nothing for a minute".into());
            }
        }
        Ok(())
    }

    /// The call descriptor.
    pub fn call_fd(&self) -> i32 {
        self.call.as_raw_fd()
    }

    /// Sends one request and waits for its status. Nothing else may be in flight.
    pub fn run(&mut self, op: &Op) -> Res<u8> {
        self.submit(op, u64::MAX)?;
        self.kick()?;
        loop {
            if let Some(done) = self.pop()? {
                return Ok(done.status);
            }
            self.wait()?;
        }
    }
}

/// Waits until one of the queues has a completed request.
pub fn wait_any(queues: &mut [&mut Queue]) -> Res<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut ready = false;
        for queue in queues.iter_mut() {
            ready |= !queue.arm();
        }
        if !ready {
            let fds: Vec<i32> = queues.iter().map(|q| q.call_fd()).collect();
            if !poll(&fds, deadline.saturating_duration_since(Instant::now()))? {
                return Err("the back-end completed nothing for a minute".into());
            }
        }
        for queue in queues.iter_mut() {
            queue.disarm()?;
            ready |= queue.ready();
        }
        // A signal may also be a late one, for a completion that was already taken.
        if ready {
            return Ok(());
        }
    }
}

/// Waits until one of the descriptors is readable; false if none became so in time.
pub fn poll(fds: &[i32], patience: Duration) -> Res<bool> {
    let mut polled: Vec<libc::pollfd> = fds
        .iter()
        .map(|&fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let ms = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: the array is ours, and its length is given with it.
        let n = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, ms) };
        if n >= 0 {
            return Ok(n > 0);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error.into());
        }
    }
}

/// A connected front-end.
pub struct Frontend {
    /// The queues, in order. A test may move them to threads.
    pub queues: Vec<Queue>,
    /// The shared memory for data.
    pub memory: Arc<Memory>,
    transport: Transport,
}

/// The features that a Linux guest would take.
pub fn usual_features() -> u64 {
    (VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX).bits()
        | (VirtioBlkFeatureFlags::SEG_MAX
            | VirtioBlkFeatureFlags::BLK_SIZE
            | VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::TOPOLOGY
            | VirtioBlkFeatureFlags::CONFIG_WCE
            | VirtioBlkFeatureFlags::RO
            | VirtioBlkFeatureFlags::MQ
            | VirtioBlkFeatureFlags::DISCARD
            | VirtioBlkFeatureFlags::WRITE_ZEROES)
            .bits()
}

impl Frontend {
    /// Connects to the socket at `path`, sets up `queues` rings of `size` entries and `memory`
    /// bytes for data. Fails at once if nobody listens.
    pub fn connect(path: &Path, queues: usize, size: u16, memory: usize) -> Res<Self> {
        Self::connect_with(path, queues, size, memory, usual_features())
    }

    /// As [`Frontend::connect`], accepting only `features` of those that are offered.
    pub fn connect_with(
        path: &Path,
        queues: usize,
        size: u16,
        memory: usize,
        features: u64,
    ) -> Res<Self> {
        let path = path.to_str().ok_or("a socket path that is not text")?;
        let mut transport = Driver::new(path, features)?;
        // As front-ends do that have a new device.
        let _: VirtioBlkConfig = transport.get_config()?;
        let flags = VirtioFeatureFlags::from_bits_truncate(transport.get_features());
        let layout = VirtqueueLayout::new::<Shared>(queues, usize::from(size), flags)?;
        let base = transport.alloc_queue_mem(&layout)?.as_mut_ptr();
        let translator = || transport.iova_translator();
        let rings = rings(base, queues, size, flags, translator)?;
        transport.setup_queues(&rings)?;
        let memory = Arc::new(Memory::new(memory)?);
        transport.map_mem_region(memory.address(0), memory.len(), memory.raw_fd(), 0)?;
        let transport = Arc::new(transport);
        let queues = rings
            .into_iter()
            .enumerate()
            .map(|(i, ring)| {
                Ok(Queue {
                    ring,
                    kick: transport.get_submission_notifier(i),
                    call: duplicate(transport.get_completion_fd(i).as_raw_fd())?,
                    tokens: vec![None; usize::from(size)],
                    in_flight: 0,
                    memory: memory.clone(),
                    _transport: transport.clone(),
                })
            })
            .collect::<Res<_>>()?;
        Ok(Frontend {
            queues,
            memory,
            transport: Transport::Driver(transport),
        })
    }

    /// As [`Frontend::connect`], with a transport that outlives the back-end: see
    /// [`Frontend::reconnect`]. With `track` there is an inflight region.
    pub fn connect_tracked(
        path: &Path,
        queues: usize,
        size: u16,
        memory: usize,
        track: bool,
    ) -> Res<Self> {
        // The crate gives the one translator that it has to those who are connected.
        let text = path.to_str().ok_or("a socket path that is not text")?;
        let driver = Driver::new(text, usual_features())?;
        let translator = || driver.iova_translator();
        let flags = VirtioFeatureFlags::from_bits_truncate(driver.get_features());
        let layout = VirtqueueLayout::new::<Shared>(queues, usize::from(size), flags)?;
        let place = Arc::new(Memory::new(queues * layout.end_offset)?);
        let base = place.address(0) as *mut u8;
        let rings = rings(base, queues, size, flags, translator)?;
        let features = driver.get_features();
        drop(driver);
        let mut transport = Tracked::connect(path, features, track)?;
        transport.config()?;
        let memory = Arc::new(Memory::new(memory)?);
        transport.share(place.clone());
        transport.share(memory.clone());
        transport.set_up(&rings)?;
        let queues = rings
            .into_iter()
            .enumerate()
            .map(|(i, ring)| {
                Ok(Queue {
                    ring,
                    kick: transport.kick(i)?,
                    call: duplicate(transport.call(i)?)?,
                    tokens: vec![None; usize::from(size)],
                    in_flight: 0,
                    memory: memory.clone(),
                    _transport: place.clone(),
                })
            })
            .collect::<Res<_>>()?;
        Ok(Frontend {
            queues,
            memory,
            transport: Transport::Tracked(Box::new(transport)),
        })
    }

    /// Goes on with the next back-end, which listens at `path`: with all that is in flight.
    pub fn reconnect(&mut self, path: &Path) -> Res<()> {
        self.tracked()?.reconnect(path)
    }

    /// The transport of a front-end that outlives its back-end.
    pub fn tracked(&mut self) -> Res<&mut Tracked> {
        match &mut self.transport {
            Transport::Tracked(transport) => Ok(transport),
            Transport::Driver(_) => Err("a front-end that cannot connect again".into()),
        }
    }

    /// The configuration space.
    pub fn config(&self) -> Res<VirtioBlkConfig> {
        match &self.transport {
            Transport::Driver(transport) => Ok(transport.get_config()?),
            Transport::Tracked(transport) => transport.config(),
        }
    }

    /// The negotiated features.
    pub fn features(&self) -> u64 {
        match &self.transport {
            Transport::Driver(transport) => transport.get_features(),
            Transport::Tracked(transport) => transport.features(),
        }
    }
}

/// Rings in the memory at `base`.
fn rings(
    base: *mut u8,
    queues: usize,
    size: u16,
    flags: VirtioFeatureFlags,
    translator: impl Fn() -> Box<dyn IovaTranslator>,
) -> Res<Vec<Virtqueue<'static, Shared>>> {
    let layout = VirtqueueLayout::new::<Shared>(queues, usize::from(size), flags)?;
    (0..queues)
        .map(|i| {
            // SAFETY: the callers have `queues * end_offset` bytes there, and each ring gets its
            // own part. They stay mapped as long as what each queue keeps.
            let part = unsafe {
                std::slice::from_raw_parts_mut(base.add(i * layout.end_offset), layout.end_offset)
            };
            Ok(Virtqueue::new(translator(), part, size, flags)?)
        })
        .collect()
}

/// A descriptor of one's own for an eventfd.
fn duplicate(fd: RawFd) -> Res<File> {
    // SAFETY: the caller has it open.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(fd.try_clone_to_owned()?.into())
}

/// A piece of memory, as the rings take it.
pub fn piece(address: usize, len: usize) -> iovec {
    iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: len,
    }
}
