//! The guest's memory as the front-end shares it: regions mapped into this process.
//!
//! A [`GuestMemory`] is an immutable table. The session builds a new one when the front-end
//! changes its regions; requests that use the old one keep it, and so its mappings,
//! alive through an `Arc`. Addresses from the guest or the front-end become host addresses here
//! and nowhere else, after a check that they lie within a region.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::shared_memory::mapping::Mapping;

/// Bytes that one front-end may share: several times what the largest guests have, and a part of
/// the addresses that the process has for all.
const MAX_BYTES: u64 = 16 << 40;

/// Where a region of the table is, in the three address spaces that matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest physical address.
    pub guest: u64,
    /// Length in bytes.
    pub len: u64,
    /// Address in the front-end's process, which ring addresses are given in.
    pub user: u64,
    /// Where the region begins in its file.
    pub file_offset: u64,
}

#[derive(Clone, Debug)]
struct Region {
    info: RegionInfo,
    /// Address in this process.
    host: usize,
    /// Keeps it mapped.
    mapping: Arc<Mapping>,
}

/// Up to so many regions are looked through one after the other.
const FEW: usize = 8;

/// A table of mapped regions, sorted by guest address and free of overlaps.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// How many regions there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// True without regions.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// A table that has the region `info` of `file` too. The file is closed.
    ///
    /// # Errors
    /// When it overlaps another region, is larger than its file, is not in a file that can be
    /// mapped safely, cannot be mapped, or is too much for one front-end.
    pub fn with(&self, info: RegionInfo, file: File) -> io::Result<Self> {
        check(&info)?;
        let shared = self.regions.iter().map(|region| region.info.len);
        if shared.fold(info.len, u64::saturating_add) > MAX_BYTES {
            return Err(invalid(&format!(
                "the memory regions have more than {MAX_BYTES} bytes together"
            )));
        }
        // Ends do not wrap: each region was checked when it came. The same memory may well be in
        // two places of the guest's address space.
        let overlaps = self.regions.iter().any(|region| {
            let old = &region.info;
            old.guest < info.guest + info.len && info.guest < old.guest + old.len
        });
        if overlaps {
            return Err(invalid("the memory region overlaps another"));
        }
        let mapping = Mapping::new(&file, info.file_offset, info.len)?;
        let mut regions = self.regions.clone();
        regions.push(Region {
            info,
            host: mapping.start(),
            mapping: Arc::new(mapping),
        });
        regions.sort_by_key(|region| region.info.guest);
        Ok(Self { regions })
    }

    /// Whether some of it was taken away by the front-end, so that zeros are in its place.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_lost())
    }

    /// A table without the region that `info` names.
    ///
    /// # Errors
    /// When there is no such region.
    pub fn without(&self, info: &RegionInfo) -> io::Result<Self> {
        let mut regions = self.regions.clone();
        let before = regions.len();
        regions.retain(|region| {
            (region.info.guest, region.info.len, region.info.user)
                != (info.guest, info.len, info.user)
        });
        if regions.len() == before {
            return Err(invalid("no such memory region"));
        }
        Ok(Self { regions })
    }

    /// The host address of `[user, user + len)`, given in the front-end's address space, if it
    /// lies in one region.
    #[must_use]
    pub fn user_to_host(&self, user: u64, len: u64) -> Option<usize> {
        self.regions.iter().find_map(|region| {
            let at = user.checked_sub(region.info.user)?;
            (at.checked_add(len)? <= region.info.len).then(|| region.host + at as usize)
        })
    }

    /// The host address of `[guest, guest + len)`, if it lies in one region.
    #[must_use]
    pub fn guest_to_host(&self, guest: u64, len: u64) -> Option<usize> {
        let region = self.find(guest)?;
        let at = guest - region.info.guest;
        (at.checked_add(len)? <= region.info.len).then(|| region.host + at as usize)
    }

    /// Calls `push` with the host ranges of `[guest, guest + len)`, in order. False: some of it
    /// is not memory; what was pushed must then not be used.
    #[must_use]
    #[inline]
    pub fn translate(&self, guest: u64, len: u32, mut push: impl FnMut(libc::iovec)) -> bool {
        // Nearly always.
        if len > 0
            && let Some(host) = self.guest_to_host(guest, u64::from(len))
        {
            push(libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(host),
                iov_len: len as usize,
            });
            return true;
        }
        self.translate_pieces(guest, len, &mut push)
    }

    fn translate_pieces(&self, guest: u64, len: u32, push: &mut dyn FnMut(libc::iovec)) -> bool {
        let mut guest = guest;
        let mut left = u64::from(len);
        while left > 0 {
            let Some(region) = self.find(guest) else {
                return false;
            };
            let at = guest - region.info.guest;
            let now = left.min(region.info.len - at);
            push(libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(region.host + at as usize),
                iov_len: now as usize,
            });
            left -= now;
            // Within the region's end, which was checked not to wrap.
            guest += now;
        }
        true
    }

    /// The region that holds the byte at `guest`.
    #[inline]
    fn find(&self, guest: u64) -> Option<&Region> {
        if self.regions.len() <= FEW {
            // The largest is mostly the last.
            let holds = |region: &&Region| guest.wrapping_sub(region.info.guest) < region.info.len;
            return self.regions.iter().rev().find(holds);
        }
        let after = self
            .regions
            .partition_point(|region| region.info.guest <= guest);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (guest - region.info.guest < region.info.len).then_some(region)
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn check(info: &RegionInfo) -> io::Result<()> {
    let ends = [info.guest, info.user, info.file_offset].map(|start| start.checked_add(info.len));
    if info.len == 0 || ends.contains(&None) {
        return Err(invalid("the memory region is empty or wraps around"));
    }
    Ok(())
}

/// Copies bytes out of guest memory until `target` is full; returns how many there were.
///
/// # Safety
/// The ranges come from a [`GuestMemory`] that is alive.
#[must_use]
pub unsafe fn gather(iovecs: &[libc::iovec], target: &mut [u8]) -> usize {
    let mut done = 0;
    for iovec in iovecs {
        let rest = target.get_mut(done..).unwrap_or(&mut []);
        let now = iovec.iov_len.min(rest.len());
        // SAFETY: the range is mapped by contract and at least `now` long; the target is ours.
        unsafe { std::ptr::copy(iovec.iov_base.cast::<u8>(), rest.as_mut_ptr(), now) };
        done += now;
        if done == target.len() {
            break;
        }
    }
    done
}

/// Copies `source` into guest memory, as far as there is room; returns how many bytes fitted.
///
/// # Safety
/// As for [`gather`].
pub unsafe fn scatter(iovecs: &[libc::iovec], source: &[u8]) -> usize {
    let mut done = 0;
    for iovec in iovecs {
        let rest = source.get(done..).unwrap_or(&[]);
        let now = iovec.iov_len.min(rest.len());
        // SAFETY: the range is mapped by contract and at least `now` long; the source is ours.
        unsafe { std::ptr::copy(rest.as_ptr(), iovec.iov_base.cast::<u8>(), now) };
        done += now;
        if rest.len() == now {
            break;
        }
    }
    done
}

/// Fills guest memory with zeros.
///
/// # Safety
/// As for [`gather`].
pub unsafe fn zero(iovecs: &[libc::iovec]) {
    for iovec in iovecs {
        // SAFETY: the range is mapped by contract.
        unsafe { std::ptr::write_bytes(iovec.iov_base.cast::<u8>(), 0, iovec.iov_len) };
    }
}

/// Writes one byte of guest memory.
///
/// # Safety
/// `at` is the address of a byte in a [`GuestMemory`] that is alive.
pub unsafe fn store_byte(at: usize, value: u8) {
    let at: *mut u8 = std::ptr::with_exposed_provenance_mut(at);
    // SAFETY: mapped by contract; volatile, since the guest may look at it at any time.
    unsafe { at.write_volatile(value) };
}
