//! A guest with its VMM, which both live on when the back-end dies: memory, rings, requests in
//! flight, the inflight region, and the messages in the order in which QEMU sends them.
//!
//! As in QEMU, a broken connection takes nothing from the guest: it goes on putting requests into
//! its rings. On a new connection the base of each ring is the used index in memory, the inflight
//! region is the one of before, and the descriptors for kicks and calls are new, with one kick in
//! them. The guest looks at a ring when it is signalled, and kicks when it is asked to.

use crate::common::Res;
use crate::common::frontend::{self, UNWRITTEN};
use crate::common::memory::Memory;
use crate::common::rng::Rng;
use crate::common::stamp::{Owner, SECTOR};
use crate::model::{LONGEST, Range};
use crate::ring::{GUEST_BASE, Piece, RING_BYTES, Ring};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight,
    VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_driver::{VirtioBlkFeatureFlags as Blk, VirtioFeatureFlags as Virtio};
use vmm_sys_util::eventfd::EventFd;

/// Requests in flight in each queue.
pub const DEPTH: usize = 32;
/// Descriptors that a queue has at most, as QEMU's front-end says to the back-end.
const DESCRIPTORS: u16 = 128;
/// Bytes of data of the longest request.
const SLOT: usize = LONGEST as usize * SECTOR;
/// What lies next to the data of each request: header, range, status, indirect table.
const SIDE: usize = 128;
/// Bytes of shared memory for one queue.
const QUEUE_BYTES: usize = RING_BYTES + DEPTH * (SIDE + SLOT);
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// A message that is not answered in this time is not answered any more.
const ANSWER: Duration = Duration::from_secs(20);

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Its type.
    pub kind: u32,
    /// Its sectors; for types that have none, nothing.
    pub range: Range,
    /// For writes, discards and write-zeroes: whose data is there afterwards.
    pub owner: Owner,
    /// The status that a correct device gives it.
    pub status: u8,
}

/// A request that was answered.
pub struct Answer {
    /// The request.
    pub request: Request,
    /// Where its data lies.
    pub data: usize,
    /// The status byte.
    pub status: u8,
}

/// What stands in the used ring.
pub enum Used {
    /// The answer to a request.
    Answer(Answer),
    /// Something that no request is waiting for: an answer of before, once more.
    Stray(u32),
}

/// What the guest's driver made of the device.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    /// Queues that it uses.
    pub queues: usize,
    /// Entries of each ring.
    pub ring: u16,
    /// Indirect descriptors.
    pub indirect: bool,
    /// Event indices.
    pub event_idx: bool,
    /// Where the rings begin.
    pub index: u16,
    /// Its VMM knows inflight regions.
    pub region: bool,
}

struct Queue {
    ring: Ring,
    base: usize,
    /// By slot.
    requests: Vec<Option<(Request, u16)>>,
    /// What was made available up to the last look at whether to kick.
    announced: u16,
    /// The guest waits for a signal, and does not look at the ring before that.
    armed: bool,
    kick: EventFd,
    call: EventFd,
}

impl Queue {
    fn side(&self, slot: usize) -> usize {
        self.base + RING_BYTES + slot * SIDE
    }

    fn data(&self, slot: usize) -> usize {
        self.base + RING_BYTES + DEPTH * SIDE + slot * SLOT
    }

    fn in_flight(&self) -> usize {
        self.requests.iter().flatten().count()
    }
}

struct Link {
    front: Frontend,
    socket: UnixStream,
    /// All messages have been sent.
    complete: bool,
}

/// The guest and its VMM.
pub struct Guest {
    /// Shared memory.
    pub memory: Arc<Memory>,
    driver: Driver,
    queues: Vec<Queue>,
    region: Option<(VhostUserInflight, File)>,
    link: Option<Link>,
    /// The configuration has been read: once, as QEMU does.
    configured: bool,
}

impl Guest {
    /// A guest that has just loaded its driver.
    pub fn new(driver: Driver) -> Res<Self> {
        let memory = Arc::new(Memory::new(driver.queues * QUEUE_BYTES)?);
        let mut guest = Guest {
            memory,
            driver,
            queues: Vec::new(),
            region: None,
            link: None,
            configured: false,
        };
        guest.load_driver(driver)?;
        Ok(guest)
    }

    fn load_driver(&mut self, driver: Driver) -> Res<()> {
        self.driver = driver;
        self.queues.clear();
        for i in 0..driver.queues {
            let base = i * QUEUE_BYTES;
            self.queues.push(Queue {
                ring: Ring::new(self.memory.clone(), base, driver.ring, driver.index),
                base,
                requests: vec![None; DEPTH],
                announced: driver.index,
                armed: false,
                kick: EventFd::new(libc::EFD_NONBLOCK)?,
                call: EventFd::new(libc::EFD_NONBLOCK)?,
            });
        }
        Ok(())
    }

    /// Number of queues.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Requests in flight, in all queues.
    pub fn in_flight(&self) -> usize {
        self.queues.iter().map(Queue::in_flight).sum()
    }

    /// Whether a back-end is connected, as far as the front-end knows.
    pub fn is_linked(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.complete)
    }

    /// Connects, and starts the device if its driver has. An error leaves no connection behind.
    pub fn connect(&mut self, path: &Path) -> Res<()> {
        self.link = None;
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(ANSWER))?;
        socket.set_write_timeout(Some(ANSWER))?;
        let mut front = Frontend::from_stream(socket.try_clone()?, self.queues.len() as u64);
        front.set_owner()?;
        front.get_features()?;
        let wanted = Protocol::MQ
            | Protocol::CONFIG
            | Protocol::REPLY_ACK
            | Protocol::RESET_DEVICE
            | Protocol::INFLIGHT_SHMFD;
        let offered = front.get_protocol_features()?;
        front.set_protocol_features(wanted & offered)?;
        if (wanted & offered).contains(Protocol::MQ) {
            front.get_queue_num()?;
        }
        if !std::mem::replace(&mut self.configured, true) {
            front.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60])?;
        }
        let link = Link {
            front,
            socket,
            complete: false,
        };
        self.start_device(link)
    }

    /// From the driver's "ready" to the first request.
    fn start_device(&mut self, mut link: Link) -> Res<()> {
        let front = &mut link.front;
        let offered = front.get_features()?;
        let features = self.features() & offered;
        let protocol = front.get_protocol_features()?;
        front.set_features(features)?;
        if self.driver.region && protocol.contains(Protocol::INFLIGHT_SHMFD) {
            if self.region.is_none() {
                let asked = VhostUserInflight::new(0, 0, self.queues.len() as u16, DESCRIPTORS);
                self.region = Some(front.get_inflight_fd(&asked)?);
            }
            if let Some((region, file)) = &self.region {
                front.set_inflight_fd(region, file.as_raw_fd())?;
            }
        }
        front.set_features(features)?;
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: self.memory.len() as u64,
            userspace_addr: self.memory.address(0) as u64,
            mmap_offset: 0,
            mmap_handle: self.memory.raw_fd(),
        }])?;
        front.set_hdr_flags(VhostUserHeaderFlag::empty());
        for (i, queue) in self.queues.iter_mut().enumerate() {
            queue.kick = EventFd::new(libc::EFD_NONBLOCK)?;
            queue.kick.write(1)?;
            queue.call = EventFd::new(libc::EFD_NONBLOCK)?;
            queue.announced = queue.ring.avail_index();
            let (table, avail, used) = queue.ring.parts();
            front.set_vring_num(i, queue.ring.size())?;
            front.set_vring_base(i, queue.ring.used_index())?;
            front.set_vring_addr(
                i,
                &VringConfigData {
                    queue_max_size: DESCRIPTORS,
                    queue_size: queue.ring.size(),
                    flags: 0,
                    desc_table_addr: self.memory.address(table) as u64,
                    used_ring_addr: self.memory.address(used) as u64,
                    avail_ring_addr: self.memory.address(avail) as u64,
                    log_addr: None,
                },
            )?;
            front.set_vring_kick(i, &queue.kick)?;
            front.set_vring_call(i, &queue.call)?;
        }
        for i in 0..self.queues.len() {
            front.set_vring_enable(i, true)?;
        }
        for (i, queue) in self.queues.iter().enumerate() {
            front.set_vring_call(i, &queue.call)?;
        }
        link.complete = true;
        self.link = Some(link);
        Ok(())
    }

    fn features(&self) -> u64 {
        let mut features = PROTOCOL_FEATURES
            | Virtio::VERSION_1.bits()
            | (Blk::SEG_MAX | Blk::BLK_SIZE | Blk::FLUSH | Blk::TOPOLOGY | Blk::CONFIG_WCE).bits()
            | (Blk::MQ | Blk::DISCARD | Blk::WRITE_ZEROES).bits();
        if self.driver.indirect {
            features |= Virtio::RING_INDIRECT_DESC.bits();
        }
        if self.driver.event_idx {
            features |= Virtio::RING_EVENT_IDX.bits();
        }
        features
    }

    /// The back-end is gone, or is left.
    pub fn disconnect(&mut self) {
        self.link = None;
    }

    /// The guest stops its device properly: the back-end answers what is in flight first. The
    /// answers are in the rings then.
    pub fn stop_device(&mut self, reset: bool) -> Res<usize> {
        let queues = self.queues.len();
        let link = self.link.as_mut().ok_or("no connection")?;
        for i in 0..queues {
            link.front.set_vring_enable(i, false)?;
        }
        let mut untaken = 0;
        for (i, queue) in self.queues.iter().enumerate() {
            let base = link.front.get_vring_base(i)? as u16;
            untaken += usize::from(queue.announced.wrapping_sub(base));
        }
        if reset
            && link
                .front
                .get_protocol_features()?
                .contains(Protocol::RESET_DEVICE)
        {
            link.front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            link.front.reset_device()?;
            link.front.set_hdr_flags(VhostUserHeaderFlag::empty());
        }
        Ok(untaken)
    }

    /// The guest forgets all that it had in flight, and begins anew with `driver`, as after a
    /// reboot; on the same connection if there is one. Returns what was in flight.
    pub fn reboot(&mut self, driver: Driver) -> Res<Vec<Request>> {
        let driver = Driver {
            queues: self.driver.queues,
            ..driver
        };
        let requests = self.queues.iter().flat_map(|q| q.requests.iter().flatten());
        let forgotten = requests.map(|&(request, _)| request).collect();
        self.region = None;
        self.load_driver(driver)?;
        if let Some(link) = self.link.take() {
            self.start_device(link)?;
        }
        Ok(forgotten)
    }

    /// A place for a request of `queue`, if one is free: its number and where its data lies.
    pub fn free_slot(&self, queue: usize) -> Option<(usize, usize)> {
        let queue = self.queues.get(queue)?;
        let slot = queue.requests.iter().position(Option::is_none)?;
        Some((slot, queue.data(slot)))
    }

    /// Makes a request available, with its data in place. False if the ring is full.
    pub fn submit(&mut self, queue: usize, slot: usize, request: Request, rng: &mut Rng) -> bool {
        let Some(queue) = self.queues.get_mut(queue) else {
            return false;
        };
        let side = queue.side(slot);
        let mut header = [0; 33];
        let ranges = request.kind == frontend::DISCARD || request.kind == frontend::WRITE_ZEROES;
        let sector = if ranges { 0 } else { request.range.start };
        let unmap = u32::from(request.kind == frontend::WRITE_ZEROES && rng.one_in(2));
        let fields: [(usize, &[u8]); 5] = [
            (0, &request.kind.to_le_bytes()),
            (8, &sector.to_le_bytes()),
            (16, &request.range.start.to_le_bytes()),
            (24, &(request.range.count as u32).to_le_bytes()),
            (28, &unmap.to_le_bytes()),
        ];
        for (at, bytes) in fields {
            for (to, from) in header.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        }
        if let Some(status) = header.last_mut() {
            *status = UNWRITTEN;
        }
        self.memory.write(side, &header);
        let piece = |at, len, device_writes| Piece {
            at,
            len,
            device_writes,
        };
        let mut pieces = vec![piece(side, 16, false)];
        match request.kind {
            frontend::DISCARD | frontend::WRITE_ZEROES => pieces.push(piece(side + 16, 16, false)),
            frontend::GET_ID => pieces.push(piece(queue.data(slot), 20, true)),
            kind => {
                let len = request.range.count as usize * SECTOR;
                if len > 0 {
                    pieces.push(piece(queue.data(slot), len, kind == frontend::IN));
                }
            }
        }
        pieces.push(piece(side + 32, 1, true));
        let table = self.driver.indirect.then_some(side + 48);
        let Some(head) = queue.ring.push(&pieces, table, rng) else {
            return false;
        };
        if let Some(place) = queue.requests.get_mut(slot) {
            *place = Some((request, head));
        }
        true
    }

    /// Tells the back-end about new requests where it wants to be told.
    pub fn kick(&mut self) -> Res<()> {
        for queue in &mut self.queues {
            if queue.ring.avail_index() != queue.announced
                && queue
                    .ring
                    .kick_wanted(queue.announced, self.driver.event_idx)
            {
                queue.kick.write(1)?;
            }
            queue.announced = queue.ring.avail_index();
        }
        Ok(())
    }

    /// The next element of the used ring of `queue`. An error: its index cannot be right.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Used>, String> {
        let Some(queue) = self.queues.get_mut(queue) else {
            return Ok(None);
        };
        if queue.armed {
            return Ok(None);
        }
        if queue.ring.waiting() > queue.ring.size() {
            return Err(format!(
                "the used index is {} elements ahead of what was seen",
                queue.ring.waiting()
            ));
        }
        let Some(id) = queue.ring.pop() else {
            return Ok(None);
        };
        let slot = queue
            .requests
            .iter()
            .position(|r| r.is_some_and(|(_, head)| u32::from(head) == id));
        let taken = slot.and_then(|slot| Some((slot, queue.requests.get_mut(slot)?.take()?)));
        let Some((slot, (request, head))) = taken else {
            return Ok(Some(Used::Stray(id)));
        };
        queue.ring.release(head);
        let mut status = [0];
        self.memory.read(queue.side(slot) + 32, &mut status);
        let [status] = status;
        Ok(Some(Used::Answer(Answer {
            request,
            data: queue.data(slot),
            status,
        })))
    }

    /// Waits until a queue is signalled, the back-end hangs up, or the time is over.
    pub fn sleep(&mut self, patience: Duration) -> Res<Woken> {
        let Some(link) = &self.link else {
            return Ok(Woken::HungUp);
        };
        for queue in &mut self.queues {
            queue.armed = queue.armed || queue.ring.arm();
        }
        let ready = self.queues.iter().any(|queue| !queue.armed);
        let patience = if ready { Duration::ZERO } else { patience };
        let mut fds: Vec<i32> = self.queues.iter().map(|q| q.call.as_raw_fd()).collect();
        fds.push(link.socket.as_raw_fd());
        let signalled = frontend::poll(&fds, patience)?;
        if signalled && frontend::poll(&[link.socket.as_raw_fd()], Duration::ZERO)? {
            return Ok(Woken::HungUp);
        }
        for queue in &mut self.queues {
            if queue.call.read().is_ok() {
                queue.armed = false;
            }
        }
        Ok(if ready || signalled {
            Woken::Signalled
        } else {
            Woken::TimedOut
        })
    }

    /// Looks at all rings, signalled or not. Returns in how many there was something to see: after
    /// a long wait these are signals that never came.
    pub fn look(&mut self) -> usize {
        let mut missed = 0;
        for queue in &mut self.queues {
            missed += usize::from(queue.armed && queue.ring.waiting() > 0);
            queue.armed = false;
        }
        missed
    }
}

/// Why [`Guest::sleep`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// There may be answers.
    Signalled,
    /// The back-end is gone.
    HungUp,
    /// Neither.
    TimedOut,
}
