//! The transport of a front-end that outlives its back-end: it keeps the rings and, if the back-end
//! offers that, the inflight region, and hands them to the next one. The `virtio-driver` crate's
//! own transport does neither; the messages are those of the `vhost` crate.

use super::Res;
use super::memory::Memory;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_driver::virtqueue::Virtqueue;
use virtio_driver::{ByteValued, QueueNotifier, VirtioBlkConfig};
use vmm_sys_util::eventfd::EventFd;

/// No answer takes that long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a ring is.
struct Ring {
    size: u16,
    desc: usize,
    avail: usize,
    used: usize,
    kick: EventFd,
    call: EventFd,
}

impl Ring {
    /// The used index: what a front-end goes on at when it has lost its back-end.
    fn used_index(&self) -> u16 {
        // SAFETY: the ring is in memory that the transport keeps mapped, and aligned.
        u16::from_le(unsafe { &*((self.used + 2) as *const AtomicU16) }.load(Ordering::Acquire))
    }
}

/// A device, served by any back-end.
pub struct Tracked {
    front: Frontend,
    features: u64,
    memory: Vec<Arc<Memory>>,
    rings: Vec<Ring>,
    inflight: Option<(VhostUserInflight, File)>,
    /// An inflight region is asked for.
    track: bool,
    /// Each back-end gets a channel for messages of its own.
    with_channel: bool,
    /// The end on which they come, of the one that the present back-end has got.
    channel: Option<UnixStream>,
}

struct Kick(EventFd);

impl QueueNotifier for Kick {
    fn notify(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

impl Tracked {
    /// Connects and negotiates those of `features` that are offered. With `track` there is an
    /// inflight region.
    pub fn connect(path: &Path, features: u64, track: bool) -> Res<Self> {
        let (front, features) = negotiate(path, features, track)?;
        Ok(Self {
            front,
            features,
            memory: Vec::new(),
            rings: Vec::new(),
            inflight: None,
            track,
            with_channel: false,
            channel: None,
        })
    }

    /// The negotiated features.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Shares memory, for the rings or for data, in which addresses are the front-end's own.
    pub fn share(&mut self, memory: Arc<Memory>) {
        self.memory.push(memory);
    }

    /// Sets up the queues, whose rings are in memory that has been shared.
    pub fn set_up<R: Copy>(&mut self, queues: &[Virtqueue<'_, R>]) -> Res<()> {
        for queue in queues {
            self.rings.push(Ring {
                size: queue.queue_size(),
                desc: queue.desc_table_ptr() as usize,
                avail: queue.driver_area_ptr() as usize,
                used: queue.device_area_ptr() as usize,
                kick: EventFd::new(libc::EFD_CLOEXEC)?,
                call: EventFd::new(libc::EFD_CLOEXEC)?,
            });
        }
        if self.track {
            let size = self.rings.first().map_or(0, |ring| ring.size);
            let wanted = VhostUserInflight::new(0, 0, queues.len() as u16, size);
            self.inflight = Some(self.front.get_inflight_fd(&wanted)?);
        }
        self.start()
    }

    /// Hands all that there is to the next back-end.
    pub fn reconnect(&mut self, path: &Path) -> Res<()> {
        let (front, features) = negotiate(path, self.features, self.track)?;
        if features != self.features {
            return Err(format!("features {features:#x}, {:#x} before", self.features).into());
        }
        self.front = front;
        if self.with_channel {
            self.channel = Some(self.hand_channel()?);
        }
        self.start()
    }

    /// In QEMU's order.
    fn start(&mut self) -> Res<()> {
        if let Some((inflight, file)) = &self.inflight {
            self.front.set_inflight_fd(inflight, file.as_raw_fd())?;
        }
        for memory in &self.memory {
            let at = memory.address(0) as u64;
            self.front.add_mem_region(&VhostUserMemoryRegionInfo {
                guest_phys_addr: at,
                memory_size: memory.len() as u64,
                userspace_addr: at,
                mmap_offset: 0,
                mmap_handle: memory.raw_fd(),
            })?;
        }
        for (index, ring) in self.rings.iter().enumerate() {
            self.front.set_vring_num(index, ring.size)?;
            self.front.set_vring_base(index, ring.used_index())?;
            let at = VringConfigData {
                queue_max_size: ring.size,
                queue_size: ring.size,
                flags: 0,
                desc_table_addr: ring.desc as u64,
                used_ring_addr: ring.used as u64,
                avail_ring_addr: ring.avail as u64,
                log_addr: None,
            };
            self.front.set_vring_addr(index, &at)?;
            self.front.set_vring_kick(index, &ring.kick)?;
            self.front.set_vring_call(index, &ring.call)?;
        }
        for index in 0..self.rings.len() {
            self.front.set_vring_enable(index, true)?;
        }
        Ok(())
    }

    /// The inflight region: what the front-end says of it, and its file.
    pub fn inflight(&self) -> Option<(VhostUserInflight, &File)> {
        self.inflight
            .as_ref()
            .map(|(inflight, file)| (*inflight, file))
    }

    /// What tells the back-end of requests.
    pub fn kick(&self, queue: usize) -> Res<Box<dyn QueueNotifier>> {
        let ring = self.rings.get(queue).ok_or("no such queue")?;
        Ok(Box::new(Kick(ring.kick.try_clone()?)))
    }

    /// What the back-end signals.
    pub fn call(&self, queue: usize) -> Res<RawFd> {
        let ring = self.rings.get(queue).ok_or("no such queue")?;
        Ok(ring.call.as_raw_fd())
    }

    /// The end of a channel on which the back-end's messages come. From now on each back-end gets one
    /// before the rings.
    pub fn channel(&mut self) -> Res<UnixStream> {
        self.with_channel = true;
        match self.channel.take() {
            Some(channel) => Ok(channel),
            None => self.hand_channel(),
        }
    }

    fn hand_channel(&mut self) -> Res<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.front.set_backend_request_fd(&theirs)?;
        ours.set_read_timeout(Some(PATIENCE))?;
        Ok(ours)
    }

    /// The configuration space.
    pub fn config(&self) -> Res<VirtioBlkConfig> {
        let len = size_of::<VirtioBlkConfig>();
        // The messages of a connection are behind a lock of its own.
        let mut front = self.front.clone();
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) = front.get_config(0, len as u32, flags, &vec![0; len])?;
        let config = VirtioBlkConfig::from_slice(&bytes).ok_or("a configuration cut short")?;
        Ok(*config)
    }
}

fn negotiate(path: &Path, features: u64, track: bool) -> Res<(Frontend, u64)> {
    let socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let mut front = Frontend::from_stream(socket, 64);
    front.set_owner()?;
    let protocol = 1 << 30;
    let features = front.get_features()? & (features | protocol);
    let mut wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    if track {
        wanted |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    }
    let offered = front.get_protocol_features()?;
    if !offered.contains(wanted) {
        return Err(format!("only {offered:?} is offered").into());
    }
    // For a channel, which need not be opened.
    wanted |= offered & VhostUserProtocolFeatures::BACKEND_REQ;
    front.set_protocol_features(wanted)?;
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front.set_features(features)?;
    Ok((front, features))
}
