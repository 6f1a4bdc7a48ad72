//! The messages, one function each.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::GpuBackend;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error as VhostError, Result, VhostUserBackendReqHandlerMut};

use super::super::config;
use super::super::event;
use super::super::features;
use super::super::inflight::Region;
use super::super::limit::Topic;
use super::super::memory::{GuestMemory, RegionInfo};
use super::super::queue::Kick;
use super::super::ring::RingAddresses;
use super::{Handler, Vring, failed, unknown};

/// The base address of a mapped region, which only postcopy migration asks for.
type RegionBase = vhost::VhostUserMemoryRegionBase;

/// Memory regions of one front-end.
const MAX_MEM_SLOTS: u64 = 509;

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// The specification recommends to disable all rings, and nothing else.
    fn reset_owner(&mut self) -> Result<()> {
        self.stop_all()?;
        self.vrings.iter_mut().for_each(|v| v.enabled = false);
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all()?;
        for vring in &mut self.vrings {
            // Signals may be needed before the front-end sets the descriptor again.
            let call = vring.call.take();
            *vring = Vring {
                call,
                ..Vring::default()
            };
        }
        self.acked = 0;
        // A front-end may hand it over again for rings that begin anew, or only then.
        if let Some(region) = self.inflight.take() {
            region.clear();
        }
        self.reset = true;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered != 0 {
            self.log.warn(
                Topic::Session,
                format_args!(
                    "the front-end wants features {:#x} that are not offered",
                    features & !self.offered
                ),
            );
            return Err(VhostError::InvalidParam);
        }
        if features == self.acked {
            return Ok(());
        }
        self.stop_all()?;
        self.acked = features;
        (0..self.vrings.len() as u32).try_for_each(|index| self.start_if_ready(index))
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<RegionBase>>> {
        let mut memory = GuestMemory::default();
        for (region, file) in regions.iter().zip(files) {
            memory = memory
                .with(region_info(region), file)
                .map_err(|error| self.refused(error))?;
        }
        self.replace_memory(memory)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let max = self.geometry.queue_size_max;
        let vring = self.vring(index)?;
        match u16::try_from(num) {
            Ok(size) if size.is_power_of_two() && size <= max => {
                if vring.running && vring.size != size {
                    return Err(VhostError::InvalidOperation("the queue is running"));
                }
                vring.size = size;
                Ok(())
            }
            _ => Err(VhostError::InvalidParam),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let at = RingAddresses {
            desc: descriptor,
            avail: available,
            used,
        };
        if self.vring(index)?.at == Some(at) {
            return Ok(());
        }
        self.while_stopped(index, |vring| vring.at = Some(at))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let vring = self.vring(index)?;
        if vring.running {
            return Err(VhostError::InvalidOperation("the queue is running"));
        }
        vring.base = u16::try_from(base).map_err(|_| VhostError::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.stop(index)?;
        let vring = self.vring(index)?;
        // It starts again with the next kick descriptor.
        vring.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(vring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = match fd {
            Some(file) => Kick::Event(Arc::new(event::accept(file).map_err(failed)?)),
            None => Kick::Polling,
        };
        self.while_stopped(u32::from(index), |vring| vring.kick = Some(kick))
    }

    /// The new descriptor is signalled once: what the old one was told may have been lost.
    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = u32::from(index);
        let call = fd
            .map(event::accept)
            .transpose()
            .map_err(failed)?
            .map(Arc::new);
        self.vring(index)?.call.clone_from(&call);
        self.worker(index)?.set_call(call).map_err(failed)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let error = fd
            .map(event::accept)
            .transpose()
            .map_err(failed)?
            .map(Arc::new);
        let index = u32::from(index);
        let vring = self.vring(index)?;
        vring.error.clone_from(&error);
        if vring.running {
            return self.worker(index)?.set_error(error).map_err(failed);
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(features::protocol())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !features::protocol().bits() != 0 {
            return Err(VhostError::InvalidParam);
        }
        self.protocol = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if self.vring(index)?.enabled == enable {
            return Ok(());
        }
        self.while_stopped(index, |vring| vring.enabled = enable)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        if config::has_wce(offset, size as usize) {
            self.cache.read();
        }
        Ok(config::read_space(&self.space(), offset, size))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        let wce = config::write_space(&self.space(), offset, bytes).ok_or(
            VhostError::InvalidOperation("only the write cache can be set"),
        )?;
        if !config::has_wce(offset, bytes.len()) {
            return Ok(());
        }
        self.set_wce(wce)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_MEM_SLOTS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<RegionBase>> {
        if self.memory.len() as u64 >= MAX_MEM_SLOTS {
            return Err(VhostError::InvalidParam);
        }
        let memory = self
            .memory
            .with(region_info(region), file)
            .map_err(|error| self.refused(error))?;
        self.memory = Arc::new(memory);
        // Nothing goes away: queues need not stop.
        for (worker, _) in self
            .workers
            .iter()
            .zip(&self.vrings)
            .filter(|(_, v)| v.running)
        {
            worker.set_memory(self.memory.clone()).map_err(failed)?;
        }
        self.start_where_ready();
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self.memory.without(&region_info(region)).map_err(failed)?;
        self.replace_memory(memory)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(unknown())
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(unknown())
    }

    /// A new region. It is used when the front-end hands it over.
    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        let layout = self.layout(inflight)?;
        let file = Region::create(&layout).map_err(|error| self.refused(error))?;
        let answer = VhostUserInflight {
            mmap_size: layout.len() as u64,
            mmap_offset: 0,
            num_queues: layout.queues(),
            queue_size: layout.size(),
        };
        Ok((answer, file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let layout = self.layout(inflight)?;
        let region = Region::map(layout, &file, inflight.mmap_offset, inflight.mmap_size)
            .map_err(|error| self.refused(error))?;
        self.stop_all()?;
        self.log.info(
            Topic::Session,
            format_args!(
                "what is in flight is kept in a region of the front-end's, for {} queues",
                layout.queues()
            ),
        );
        if std::mem::take(&mut self.reset) {
            region.clear();
        }
        if let Some(on) = region.write_cache() {
            self.cache.found(on);
        }
        self.inflight = Some(region);
        self.spread_cache()?;
        (0..self.vrings.len() as u32).try_for_each(|index| self.start_if_ready(index))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(unknown())
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(unknown())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(unknown())
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(unknown())
    }
}

fn region_info(region: &VhostUserMemoryRegion) -> RegionInfo {
    RegionInfo {
        guest: region.guest_phys_addr,
        len: region.memory_size,
        user: region.user_addr,
        file_offset: region.mmap_offset,
    }
}
