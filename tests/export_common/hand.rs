//! A front-end and a driver by hand, for what no proper driver does.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::Instant;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::{PATIENCE, Shared, wait_readable};

pub const F_FLUSH: u64 = 1 << 9;
pub const F_CONFIG_WCE: u64 = 1 << 11;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_PROTOCOL: u64 = 1 << 30;
pub const F_VERSION_1: u64 = 1 << 32;
/// Everything but EVENT_IDX: every publication is signalled.
pub const PLAIN: u64 = F_VERSION_1 | F_PROTOCOL | F_FLUSH | F_INDIRECT | F_CONFIG_WCE;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Where guest memory begins in the guest's eyes.
pub const BASE: u64 = 0x4000_0000;
pub const MEMORY: usize = 1 << 20;
pub const SIZE: u16 = 16;
const DESC: usize = 0;
const AVAIL: usize = 0x1000;
const USED: usize = 0x2000;
/// Second set of rings.
pub const MOVED: usize = 0x4000;
/// Headers, one for each descriptor of the table.
pub const HEADER: u64 = BASE + 0x8000;
pub const STATUS: u64 = BASE + 0x9000;
pub const DATA: u64 = BASE + 0x1_0000;

pub struct Hand {
    pub front: Frontend,
    pub socket: UnixStream,
    pub memory: Shared,
    pub kick: EventFd,
    pub call: EventFd,
    pub rings: usize,
    pub size: u16,
    /// What is in flight, for the next device.
    pub inflight: Option<(VhostUserInflight, File)>,
    avail: u16,
    used: u16,
}

impl Hand {
    /// Connects and negotiates, and shares memory, but sets no queue up. As front-ends do that have
    /// a new device, it reads the configuration.
    pub fn connect(path: &Path, features: u64) -> Self {
        let (socket, mut front) = negotiate(path, features);
        let flags = VhostUserConfigFlags::WRITABLE;
        front.get_config(0, 60, flags, &[0; 60]).unwrap();
        let memory = Shared::new(MEMORY);
        let hand = Self {
            front,
            socket,
            memory,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            rings: 0,
            size: SIZE,
            inflight: None,
            avail: 0,
            used: 0,
        };
        hand.front.set_mem_table(&[hand.region()]).unwrap();
        hand
    }

    /// As [`Hand::connect`], with an inflight region for one queue.
    pub fn connect_tracked(path: &Path, features: u64) -> Self {
        let mut hand = Self::connect(path, features);
        let wanted = VhostUserInflight::new(0, 0, 1, SIZE);
        hand.inflight = Some(hand.front.get_inflight_fd(&wanted).unwrap());
        hand.set_inflight().unwrap();
        hand
    }

    /// Hands the inflight region over.
    pub fn set_inflight(&mut self) -> vhost::Result<()> {
        let (inflight, file) = self.inflight.as_ref().unwrap();
        self.front.set_inflight_fd(inflight, file.as_raw_fd())
    }

    /// Loses the connection and gets another one, with nothing but the memory table and the
    /// inflight region given to the device.
    pub fn reconnect(&mut self, path: &Path, features: u64) {
        self.socket.shutdown(std::net::Shutdown::Both).unwrap();
        (self.socket, self.front) = negotiate(path, features);
        if self.inflight.is_some() {
            self.set_inflight().unwrap();
        }
        self.front.set_mem_table(&[self.region()]).unwrap();
    }

    /// A number of the inflight region, of 16 bits.
    pub fn noted(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        let (_, file) = self.inflight.as_ref().unwrap();
        file.read_exact_at(&mut bytes, at).unwrap();
        u16::from_ne_bytes(bytes)
    }

    /// Writes a number into the inflight region.
    pub fn note(&self, at: u64, value: u16) {
        let (_, file) = self.inflight.as_ref().unwrap();
        file.write_all_at(&value.to_ne_bytes(), at).unwrap();
    }

    /// The used index in guest memory.
    pub fn set_used_index(&mut self, index: u16) {
        self.used = index;
        self.index(USED, 2).store(index, Ordering::SeqCst);
    }

    /// Connects and sets queue 0 up.
    pub fn ready(path: &Path, features: u64) -> Self {
        let mut hand = Self::connect(path, features);
        hand.set_up();
        hand
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: MEMORY as u64,
            userspace_addr: self.memory.addr(),
            mmap_offset: 0,
            mmap_handle: self.memory.file.as_raw_fd(),
        }
    }

    pub fn rings(&self) -> VringConfigData {
        let at = self.memory.addr() + self.rings as u64;
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: at + DESC as u64,
            used_ring_addr: at + USED as u64,
            avail_ring_addr: at + AVAIL as u64,
            log_addr: None,
        }
    }

    pub fn set_up(&mut self) {
        self.try_set_up().unwrap();
    }

    /// Sets queue 0 up, and says that it goes on at available index `base`.
    pub fn set_up_at(&mut self, base: u16) {
        self.set_up_with(base).unwrap();
    }

    /// As [`Hand::set_up`], which the device may refuse.
    pub fn try_set_up(&mut self) -> vhost::Result<()> {
        self.set_up_with(self.avail)
    }

    fn set_up_with(&mut self, base: u16) -> vhost::Result<()> {
        self.front.set_vring_num(0, self.size)?;
        self.front.set_vring_base(0, base)?;
        self.front.set_vring_addr(0, &self.rings())?;
        self.front.set_vring_kick(0, &self.kick)?;
        self.front.set_vring_call(0, &self.call)?;
        self.front.set_vring_enable(0, true)
    }

    /// Lets both rings begin at `index`, before the queue is set up.
    pub fn begin_at(&mut self, index: u16) {
        self.avail = index;
        self.used = index;
        self.index(AVAIL, 2).store(index, Ordering::SeqCst);
        self.index(USED, 2).store(index, Ordering::SeqCst);
    }

    /// Bytes of guest memory.
    pub fn bytes(&mut self, at: u64, len: usize) -> &'static mut [u8] {
        self.memory.part((at - BASE) as usize, len)
    }

    pub fn desc(&mut self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = BASE + (self.rings + DESC) as u64 + 16 * u64::from(index);
        self.desc_at(at, addr, len, flags, next);
    }

    pub fn desc_at(&mut self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let bytes = self.bytes(at, 16);
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
    }

    /// Writes a request's header into guest memory.
    pub fn header(&mut self, at: u64, kind: u32, sector: u64) {
        let bytes = self.bytes(at, 16);
        bytes.fill(0);
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
    }

    /// Builds a chain of header, data and status from descriptor `head` on. The status byte
    /// begins as 0xff.
    pub fn chain(&mut self, head: u16, kind: u32, sector: u64, data: &[(u64, u32, bool)]) {
        let header = HEADER + 16 * u64::from(head);
        let status = STATUS + u64::from(head);
        self.header(header, kind, sector);
        self.bytes(status, 1)[0] = 0xff;
        self.desc(head, header, 16, NEXT, head + 1);
        let mut index = head + 1;
        for &(addr, len, write) in data {
            let flags = NEXT | if write { WRITE } else { 0 };
            self.desc(index, addr, len, flags, index + 1);
            index += 1;
        }
        self.desc(index, status, 1, WRITE, 0);
    }

    fn index(&self, ring: usize, at: usize) -> &AtomicU16 {
        let address = self.memory.addr() as usize + self.rings + ring + at;
        // SAFETY: within the shared memory, and aligned.
        unsafe { &*(address as *const AtomicU16) }
    }

    /// Makes a chain available, without a kick.
    pub fn push(&mut self, head: u16) {
        let slot = usize::from(self.avail % self.size);
        self.index(AVAIL, 4 + 2 * slot)
            .store(head, Ordering::Relaxed);
        self.avail = self.avail.wrapping_add(1);
        self.index(AVAIL, 2).store(self.avail, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    pub fn set_avail_index(&mut self, index: u16) {
        self.index(AVAIL, 2).store(index, Ordering::SeqCst);
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    pub fn used_index(&self) -> u16 {
        self.index(USED, 2).load(Ordering::Acquire)
    }

    /// Whether all that was made available has come back.
    pub fn all_used(&self) -> bool {
        self.used_index() == self.avail
    }

    /// Whether the device wants no kicks (without EVENT_IDX): 1 then.
    pub fn used_flags(&self) -> u16 {
        self.index(USED, 0).load(Ordering::SeqCst)
    }

    /// The index that the device wants a kick at (EVENT_IDX).
    pub fn avail_event(&self) -> u16 {
        let at = 4 + 8 * usize::from(self.size);
        self.index(USED, at).load(Ordering::SeqCst)
    }

    /// Sets the index that the driver wants a signal at (EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        let at = 4 + 2 * usize::from(self.size);
        self.index(AVAIL, at).store(index, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Waits for the next used element: its head and length.
    pub fn next_used(&mut self) -> (u16, u32) {
        let start = Instant::now();
        while self.used_index() == self.used {
            assert!(start.elapsed() < PATIENCE, "nothing comes back");
            wait_readable(self.call.as_raw_fd());
            let _ = self.call.read();
        }
        let slot = usize::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let at = BASE + (self.rings + USED + 4 + 8 * slot) as u64;
        let bytes = self.bytes(at, 8);
        let id = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        let len = u32::from_le_bytes(bytes[4..].try_into().unwrap());
        (u16::try_from(id).unwrap(), len)
    }

    /// Waits for the next used element without the call descriptor.
    pub fn skip_used(&mut self) {
        let start = Instant::now();
        while self.used_index() == self.used {
            assert!(start.elapsed() < PATIENCE, "nothing comes back");
            std::thread::yield_now();
        }
        self.used = self.used.wrapping_add(1);
    }

    /// Runs one chain to its end: the length that was used and the status byte.
    pub fn run(&mut self, head: u16) -> (u32, u8) {
        self.push(head);
        self.kick();
        let (id, len) = self.next_used();
        assert_eq!(id, head);
        (len, self.bytes(STATUS + u64::from(head), 1)[0])
    }

    /// Runs a request of one data buffer.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u32, u8) {
        self.chain(0, kind, sector, data);
        self.run(0)
    }

    pub fn config(&mut self, offset: u32, len: usize) -> Vec<u8> {
        self.front
            .get_config(
                offset,
                len as u32,
                VhostUserConfigFlags::WRITABLE,
                &vec![0; len],
            )
            .unwrap()
            .1
    }

    /// Sends a message without the vhost crate: request number and payload.
    pub fn raw_message(&mut self, request: u32, payload: &[u8]) {
        let mut message = Vec::new();
        message.extend_from_slice(&request.to_le_bytes());
        message.extend_from_slice(&1u32.to_le_bytes());
        message.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        message.extend_from_slice(payload);
        self.socket.write_all(&message).unwrap();
    }

    /// Waits until the other side has closed the connection.
    pub fn expect_closed(&mut self) {
        use std::io::Read;
        self.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
}

/// Connects and negotiates.
fn negotiate(path: &Path, features: u64) -> (UnixStream, Frontend) {
    let socket = UnixStream::connect(path).unwrap();
    // A device that does not answer is a failure, and does not hang the test.
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut front = Frontend::from_stream(socket.try_clone().unwrap(), 8);
    front.set_owner().unwrap();
    let offered = front.get_features().unwrap();
    assert_eq!(features & !offered, 0, "not offered");
    let protocol = front.get_protocol_features().unwrap();
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    assert!(protocol.contains(wanted));
    front.set_protocol_features(wanted).unwrap();
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front.set_features(features).unwrap();
    (socket, front)
}
