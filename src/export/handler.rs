//! The vhost-user protocol: what each message of a front-end does to the device.
//!
//! A queue runs when its front-end has given a size, addresses and a kick, has enabled it, and
//! its rings lie in memory that is mapped. Every message that touches one of these stops the
//! queue first if it runs (draining it), changes the state, and starts it again if it still
//! should run: [`Handler::while_stopped`]. So nothing in use is ever changed, and messages that
//! must answer after the last request has completed do so.

mod messages;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Error as VhostError, Result};

use super::back_end_channel::BackEndChannel;
use super::config::{self, Geometry};
use super::features;
use super::inflight::{Again, Layout, Refusal, Region, RingKind};
use super::limit::{Log, Topic};
use super::memory::GuestMemory;
use super::queue::{Kick, Left, QueueSetup, Worker};
use super::ring::{RingAddresses, SplitRing};
use super::write_cache::{Kept, WriteCache};
use crate::chain::Root;
use crate::reactor::Reactor;

/// What the front-end has said about one queue.
#[derive(Debug, Default)]
struct Vring {
    size: u16,
    at: Option<RingAddresses>,
    base: u16,
    kick: Option<Kick>,
    call: Option<Arc<File>>,
    error: Option<Arc<File>>,
    enabled: bool,
    /// The worker has it.
    running: bool,
    /// The worker has had it since it was set up.
    served: bool,
}

/// The state of one front-end's session.
pub(super) struct Handler {
    log: Arc<Log>,
    root: Arc<Root>,
    geometry: Geometry,
    workers: Arc<Vec<Worker>>,
    offered: u64,
    acked: u64,
    /// Those of the protocol that the front-end has taken.
    protocol: u64,
    channel: Arc<BackEndChannel>,
    /// The front-end has been told to read the configuration space anew.
    told: bool,
    has_cache: bool,
    /// Whether the guest has switched it off.
    cache: WriteCache,
    memory: Arc<GuestMemory>,
    /// Where what is in flight is written, if the front-end has given such a region.
    inflight: Option<Region>,
    /// The device was reset, and no region has been handed over since then.
    reset: bool,
    vrings: Vec<Vring>,
}

impl Handler {
    pub(super) fn new(
        log: &Arc<Log>,
        root: &Arc<Root>,
        geometry: &Geometry,
        workers: &Arc<Vec<Worker>>,
        (writable, has_cache): (bool, bool),
        (kept, channel): (&Kept, &Arc<BackEndChannel>),
    ) -> Self {
        Self {
            log: log.clone(),
            root: root.clone(),
            geometry: geometry.clone(),
            vrings: workers.iter().map(|_| Vring::default()).collect(),
            workers: workers.clone(),
            offered: features::offered(writable, has_cache),
            acked: 0,
            protocol: 0,
            channel: channel.clone(),
            told: false,
            has_cache,
            cache: WriteCache::new(kept),
            memory: Arc::default(),
            inflight: None,
            reset: false,
        }
    }

    /// Ends the session: all queues are drained and given back, all memory is unmapped.
    pub(super) fn disconnect(&mut self) {
        if let Err(error) = self.stop_queues(Left::Marked) {
            self.log
                .error(Topic::Session, format_args!("ending a session: {error}"));
        }
        self.vrings.iter_mut().for_each(|v| *v = Vring::default());
        self.channel.close();
        self.memory = Arc::default();
        self.inflight = None;
    }

    /// Whether writes are stable before they complete: the guest sends no flushes. Who cannot switch
    /// the cache off has not.
    fn write_through(&self) -> bool {
        let can_switch = self.acked & features::BLK_CONFIG_WCE != 0;
        let off = can_switch && !self.cache.is_on();
        !self.has_cache || self.acked & features::BLK_FLUSH == 0 || off
    }

    fn space(&self) -> [u8; config::CONFIG_LEN] {
        let wce = self.has_cache && self.cache.is_on();
        self.geometry.space(&self.root.chain(), wce)
    }

    /// Takes the message on `stream` that brings a channel for messages of our own.
    ///
    /// # Errors
    /// When it brings something else, or nobody has asked for that.
    pub(super) fn take_channel(&self, stream: &UnixStream) -> Result<()> {
        let taken = |feature: VhostUserProtocolFeatures| self.protocol & feature.bits() != 0;
        if !taken(VhostUserProtocolFeatures::BACKEND_REQ) {
            return Err(VhostError::InvalidOperation(
                "a back-end's channel without its feature",
            ));
        }
        let may_reply = taken(VhostUserProtocolFeatures::REPLY_ACK);
        self.channel.take(stream, may_reply).map_err(failed)
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings
            .get_mut(index as usize)
            .ok_or(VhostError::InvalidParam)
    }

    fn worker(&self, index: u32) -> Result<&Worker> {
        self.workers
            .get(index as usize)
            .ok_or(VhostError::InvalidParam)
    }

    /// Changes a queue's state while its worker does not have it.
    fn while_stopped(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<()> {
        self.stop(index)?;
        change(self.vring(index)?);
        self.start_if_ready(index)
    }

    /// Takes a queue back from its worker, when it has completed its requests.
    fn stop(&mut self, index: u32) -> Result<()> {
        if !self.vring(index)?.running {
            return Ok(());
        }
        let base = self
            .worker(index)?
            .begin_stop(Left::Done)
            .wait()
            .map_err(failed)?;
        let vring = self.vring(index)?;
        vring.running = false;
        vring.base = base;
        Ok(())
    }

    fn stop_all(&mut self) -> Result<()> {
        self.stop_queues(Left::Done)
    }

    /// All at once: none takes more while another one is waited for.
    fn stop_queues(&mut self, left: Left) -> Result<()> {
        let stopping: Vec<_> = self
            .workers
            .iter()
            .zip(&mut self.vrings)
            .filter(|(_, vring)| vring.running)
            .map(|(worker, vring)| (worker.begin_stop(left), vring))
            .collect();
        for (base, vring) in stopping {
            vring.base = base.wait().map_err(failed)?;
            vring.running = false;
        }
        Ok(())
    }

    fn start_if_ready(&mut self, index: u32) -> Result<()> {
        let event_idx = self.acked & features::RING_EVENT_IDX != 0;
        let memory = self.memory.clone();
        // Without protocol features there is no message that enables a queue.
        let always_enabled = self.acked & features::PROTOCOL_FEATURES == 0;
        let vring = self.vring(index)?;
        if vring.running || vring.size == 0 || !(vring.enabled || always_enabled) {
            return Ok(());
        }
        let (Some(at), Some(kick)) = (vring.at, vring.kick.clone()) else {
            return Ok(());
        };
        if memory.is_lost() {
            return Err(failed(io::Error::other(
                "shared memory was taken away while in use",
            )));
        }
        let mut ring =
            SplitRing::new(memory, &at, vring.size, vring.base, event_idx).map_err(failed)?;
        let (call, error) = (vring.call.clone(), vring.error.clone());
        let again = self.take_over(index, &mut ring)?;
        self.begin_cache()?;
        let setup = QueueSetup {
            again,
            ring,
            kick,
            call,
            error,
            write_through: self.write_through(),
        };
        self.worker(index)?.start(setup).map_err(failed)?;
        let vring = self.vring(index)?;
        let goes_on = !vring.served && vring.base != 0;
        vring.running = true;
        vring.served = true;
        if goes_on && !std::mem::replace(&mut self.told, true) {
            // Another session or process may have shown the guest a disk of another size.
            self.channel.config_changed(&self.log);
        }
        Ok(())
    }

    /// A queue begins to be served: from now on it matters whether there is a write cache.
    fn begin_cache(&mut self) -> Result<()> {
        let goes_on = |vring: &Vring| !vring.served && vring.base != 0;
        let goes_on = self.vrings.iter().any(goes_on);
        if !self.cache.begin(goes_on) {
            return Ok(());
        }
        if self.has_cache && !self.cache.is_on() {
            self.log.warn(
                Topic::Session,
                format_args!(
                    "the guest may have switched its write cache off while another process served \
                     it: every write is made stable, until the guest switches it on"
                ),
            );
        }
        self.spread_cache()
    }

    /// Tells workers and region whether there is a write cache.
    fn spread_cache(&self) -> Result<()> {
        if let (Some(region), Some(on)) = (&self.inflight, self.cache.known()) {
            region.set_write_cache(on);
        }
        let write_through = self.write_through();
        let running = self.workers.iter().zip(&self.vrings);
        for (worker, _) in running.filter(|(_, vring)| vring.running) {
            worker.set_write_through(write_through).map_err(failed)?;
        }
        Ok(())
    }

    /// What a process that died has left of the queue to be done, the next request last.
    fn take_over(&self, index: u32, ring: &mut SplitRing) -> Result<Vec<Again>> {
        let region = u16::try_from(index)
            .ok()
            .and_then(|index| self.inflight.as_ref()?.queue(index));
        let Some(region) = region else {
            return Ok(Vec::new());
        };
        let mut again = ring.track(region).map_err(|refusal| {
            let text = format!("the inflight region of queue {index} is not used: {refusal}");
            self.refused(io::Error::new(io::ErrorKind::InvalidData, text))
        })?;
        if ring.region_is_lost() {
            let text = format!("the inflight region of queue {index} was taken away");
            return Err(self.refused(io::Error::other(text)));
        }
        if !again.is_empty() {
            let count = again.len();
            self.log.info(
                Topic::Session,
                format_args!("queue {index}: {count} requests were in flight and are done again"),
            );
        }
        again.reverse();
        Ok(again)
    }

    /// Where the parts of an inflight region are that the front-end speaks of.
    fn layout(&self, inflight: &VhostUserInflight) -> Result<Layout> {
        let most = self.vrings.len() as u16;
        // No others are offered.
        let kind = RingKind::Split;
        let layout = Layout::new(kind, inflight.num_queues, inflight.queue_size);
        layout
            .and_then(|layout| match layout.queues() {
                found if found > most => Err(Refusal::Queues { found, most }),
                _ => Ok(layout),
            })
            .map_err(|refusal| self.refused(io::Error::new(io::ErrorKind::InvalidInput, refusal)))
    }

    /// Puts another memory table in the place of the present one, which queues may be using.
    fn replace_memory(&mut self, memory: GuestMemory) -> Result<()> {
        self.stop_all()?;
        self.memory = Arc::new(memory);
        self.start_where_ready();
        Ok(())
    }

    /// The answer to a region that is not mapped or not used.
    fn refused(&self, error: io::Error) -> VhostError {
        self.log.warn(Topic::Session, format_args!("{error}"));
        failed(error)
    }

    /// Starts the queues that can, after memory has changed. Those whose rings are not in it
    /// wait for the next change.
    fn start_where_ready(&mut self) {
        for index in 0..self.vrings.len() as u32 {
            if let Err(error) = self.start_if_ready(index) {
                self.log.warn(
                    Topic::Session,
                    format_args!("queue {index} stays stopped: {error}"),
                );
            }
        }
    }

    /// Makes stable what has completed: a guest that has switched the write cache off sends no
    /// flush for what it wrote before.
    fn flush(&self) {
        let flushed = Reactor::for_this_thread().map(|reactor| {
            let chain = self.root.chain();
            reactor.block_on(async move { chain.flush().await })
        });
        match flushed {
            Ok(Ok(())) => {}
            // What the guest writes from now on fails as well, until it is seen to.
            Ok(Err(error)) => self.log.error(Topic::Disk, format_args!("{error}")),
            Err(error) => self
                .log
                .error(Topic::Disk, format_args!("a flush: {error}")),
        }
    }

    fn set_wce(&mut self, wce: bool) -> Result<()> {
        if self.has_cache && self.acked & features::BLK_CONFIG_WCE != 0 {
            let was_on = !self.write_through();
            self.cache.set(wce);
            self.spread_cache()?;
            if was_on && self.write_through() {
                self.flush();
            }
            return Ok(());
        }
        if wce == (self.has_cache && self.cache.is_on()) {
            return Ok(());
        }
        Err(VhostError::InvalidOperation("the write cache is fixed"))
    }
}

fn failed(error: io::Error) -> VhostError {
    VhostError::ReqHandlerError(error)
}

fn unknown() -> VhostError {
    VhostError::InvalidOperation("the device does not offer this")
}
