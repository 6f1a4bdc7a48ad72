//! Requests of a virtio block device: from a descriptor chain to what is wanted.
//!
//! A chain is a header that the device reads, data in one direction, and a status byte that it
//! writes. Legal drivers may cut these into descriptors as they like, so the chain is first
//! collected into two lists of host ranges, readable and writable, and the header and the status
//! are then cut off their ends. Data is never copied here.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::memory::{self, GuestMemory};
use super::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, SplitRing, Table};

/// The unit of sector numbers, whatever the logical block size.
pub const SECTOR: u64 = 512;
/// Ranges of one request: as many as the kernel takes in one call.
pub const MAX_RANGES: usize = 1024;
/// Bytes of one request: what the kernel and other devices allow.
pub const MAX_LEN: u64 = (1 << 31) - SECTOR;
/// Descriptors of one chain: the largest ring that virtio knows.
const MAX_CHAIN: u32 = 32768;
const HEADER: usize = 16;
const SEGMENT: usize = 16;
/// Length of the string that `GET_ID` answers.
pub const ID_LEN: usize = 20;

const FLAG_UNMAP: u32 = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

/// The status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RequestStatus {
    /// Done.
    Ok = 0,
    /// Failed.
    IoError = 1,
    /// The device does not know such requests.
    Unsupported = 2,
}

/// What a request wants. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read the disk.
    In {
        /// Position on the disk.
        offset: u64,
    },
    /// Write the disk.
    Out {
        /// Position on the disk.
        offset: u64,
    },
    /// Make what was written stable.
    Flush,
    /// The disk's serial number.
    GetId,
    /// The guest needs a range no longer.
    Discard {
        /// Position on the disk.
        offset: u64,
        /// Length.
        len: u64,
    },
    /// A range is to read as zeros.
    WriteZeroes {
        /// Position on the disk.
        offset: u64,
        /// Length.
        len: u64,
        /// Its space may be given back.
        unmap: bool,
    },
}

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A request to carry out.
    Request {
        /// What is wanted.
        kind: Kind,
        /// Host address of the status byte.
        status: usize,
    },
    /// A request that is answered at once.
    Refused {
        /// The answer.
        with: RequestStatus,
        /// Host address of the status byte.
        status: usize,
    },
    /// Not even a place for the status was found.
    Malformed,
}

/// The host ranges of one chain. Kept with its request slot, so that nothing is allocated once
/// it has grown to the size of the guest's requests.
#[derive(Debug, Default)]
pub struct Ranges {
    iovecs: Vec<libc::iovec>,
    /// The first writable range.
    writable: usize,
    readable_len: u64,
    writable_len: u64,
    /// The data among the ranges, without header and status.
    data: std::ops::Range<usize>,
    data_len: u64,
}

impl Ranges {
    /// No ranges, and room for those of a usual request: header, two of data, status.
    #[must_use]
    pub fn with_room() -> Self {
        Self {
            iovecs: Vec::with_capacity(4),
            ..Self::default()
        }
    }

    /// The ranges of the data.
    #[must_use]
    pub fn data(&self) -> &[libc::iovec] {
        self.iovecs.get(self.data.clone()).unwrap_or(&[])
    }

    /// Length of the data in bytes.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        self.data_len
    }

    fn clear(&mut self) {
        self.iovecs.clear();
        self.writable = 0;
        self.readable_len = 0;
        self.writable_len = 0;
        self.data = 0..0;
        self.data_len = 0;
    }

    /// Adds a range, to the one before if they touch.
    fn push(&mut self, iovec: libc::iovec, writable: bool) -> bool {
        let first = if writable { self.writable } else { 0 };
        if self.iovecs.len() > first
            && let Some(last) = self.iovecs.last_mut()
            && last.iov_base as usize + last.iov_len == iovec.iov_base as usize
        {
            last.iov_len += iovec.iov_len;
            return true;
        }
        if self.iovecs.len() == MAX_RANGES + 2 {
            return false;
        }
        self.iovecs.push(iovec);
        true
    }

    /// Cuts the status byte off the end of the writable ranges.
    fn cut_status(&mut self) {
        if let Some(last) = self.iovecs.last_mut() {
            last.iov_len -= 1;
            if last.iov_len == 0 {
                self.iovecs.pop();
            }
            self.writable_len -= 1;
        }
    }

    /// Cuts `header.len()` bytes off the front of the readable ranges. The result is the index
    /// of the first range that follows.
    fn cut_front(&mut self, from: usize, bytes: &mut [u8]) -> Option<usize> {
        let readable = self.iovecs.get_mut(from..self.writable)?;
        // SAFETY: the ranges come from the guest's memory, which the caller holds.
        if unsafe { memory::gather(readable, bytes) } < bytes.len() {
            return None;
        }
        let mut left = bytes.len();
        let mut first = from;
        for iovec in readable {
            if iovec.iov_len > left {
                iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(left).cast();
                iovec.iov_len -= left;
                break;
            }
            left -= iovec.iov_len;
            first += 1;
        }
        self.readable_len -= bytes.len() as u64;
        Some(first)
    }
}

/// What a walk along a chain found besides the ranges.
#[derive(Default)]
struct Walk {
    /// The chain breaks a rule, but its end was reached.
    bad: bool,
    /// Where the last writable byte is.
    last_writable: Option<usize>,
}

/// Parses the chain that begins at `head`, and leaves its data in `ranges`.
#[must_use]
pub fn parse(ring: &SplitRing, memory: &GuestMemory, head: u16, ranges: &mut Ranges) -> Parsed {
    ranges.clear();
    let Some(walk) = walk(ring.table(), memory, head, ranges) else {
        return Parsed::Malformed;
    };
    let Some(status) = walk.last_writable else {
        return Parsed::Malformed;
    };
    let refuse = |with| Parsed::Refused { with, status };
    if walk.bad || ranges.readable_len.max(ranges.writable_len) > MAX_LEN {
        return refuse(RequestStatus::IoError);
    }
    ranges.cut_status();
    let mut header = [0; HEADER];
    let Some(first) = ranges.cut_front(0, &mut header) else {
        return refuse(RequestStatus::IoError);
    };
    match decode(&header, first, ranges) {
        Ok(kind) => Parsed::Request { kind, status },
        Err(with) => refuse(with),
    }
}

/// Collects the chain's ranges. `None`: its end cannot be found (a loop, a table that is not
/// memory, a descriptor that does not exist).
fn walk(ring: Table<'_>, memory: &GuestMemory, head: u16, ranges: &mut Ranges) -> Option<Walk> {
    let mut walk = Walk::default();
    let mut table = ring;
    let mut indirect = false;
    let mut index = head;
    // No chain without a loop is longer than its table.
    let mut left = table.entries();
    loop {
        left = left.checked_sub(1)?;
        let descriptor = table.get(index)?;
        if descriptor.flags & DESC_INDIRECT != 0 {
            if indirect || descriptor.flags & DESC_NEXT != 0 {
                return None;
            }
            indirect = true;
            table = Table::indirect(memory, descriptor.addr, descriptor.len)?;
            left = table.entries().min(MAX_CHAIN);
            index = 0;
            continue;
        }
        let writable = descriptor.flags & DESC_WRITE != 0;
        add(
            &mut walk,
            ranges,
            memory,
            (descriptor.addr, descriptor.len),
            writable,
        );
        if descriptor.flags & DESC_NEXT == 0 {
            if ranges.writable_len == 0 {
                ranges.writable = ranges.iovecs.len();
            }
            return Some(walk);
        }
        index = descriptor.next;
    }
}

fn add(
    walk: &mut Walk,
    ranges: &mut Ranges,
    memory: &GuestMemory,
    (addr, len): (u64, u32),
    writable: bool,
) {
    if len == 0 {
        return;
    }
    if writable {
        if ranges.writable_len == 0 {
            ranges.writable = ranges.iovecs.len();
        }
        ranges.writable_len += u64::from(len);
        walk.last_writable = None;
    } else {
        // The driver must place what the device writes last.
        walk.bad |= ranges.writable_len > 0;
        ranges.readable_len += u64::from(len);
    }
    let mut room = true;
    let mut end = 0;
    let mapped = memory.translate(addr, len, |iovec| {
        end = iovec.iov_base as usize + iovec.iov_len;
        room &= ranges.push(iovec, writable);
    });
    walk.bad |= !mapped || !room;
    if writable && mapped {
        walk.last_writable = end.checked_sub(1);
    }
}

/// Reads the header; `first` is the first range behind it.
fn decode(header: &[u8; HEADER], first: usize, ranges: &mut Ranges) -> Result<Kind, RequestStatus> {
    let (kind, sector) = split_header(header);
    let offset = sector.checked_mul(SECTOR);
    match kind {
        VIRTIO_BLK_T_IN => {
            ranges.data = ranges.writable..ranges.iovecs.len();
            ranges.data_len = ranges.writable_len;
            check_data(ranges)?;
            Ok(Kind::In {
                offset: offset.ok_or(RequestStatus::IoError)?,
            })
        }
        VIRTIO_BLK_T_OUT => {
            ranges.data = first..ranges.writable;
            ranges.data_len = ranges.readable_len;
            check_data(ranges)?;
            Ok(Kind::Out {
                offset: offset.ok_or(RequestStatus::IoError)?,
            })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Kind::Flush),
        VIRTIO_BLK_T_GET_ID => {
            ranges.data = ranges.writable..ranges.iovecs.len();
            ranges.data_len = ranges.writable_len;
            Ok(Kind::GetId)
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => segment(kind, first, ranges),
        _ => Err(RequestStatus::Unsupported),
    }
}

fn check_data(ranges: &Ranges) -> Result<(), RequestStatus> {
    if !ranges.data_len.is_multiple_of(SECTOR) || ranges.data.len() > MAX_RANGES {
        return Err(RequestStatus::IoError);
    }
    Ok(())
}

/// Reads the one segment of a discard or a write-zeroes request.
fn segment(kind: u32, first: usize, ranges: &mut Ranges) -> Result<Kind, RequestStatus> {
    if ranges.readable_len == 0 || !ranges.readable_len.is_multiple_of(SEGMENT as u64) {
        return Err(RequestStatus::IoError);
    }
    if ranges.readable_len > SEGMENT as u64 {
        // One segment is what the configuration offers.
        return Err(RequestStatus::Unsupported);
    }
    let mut bytes = [0; SEGMENT];
    ranges
        .cut_front(first, &mut bytes)
        .ok_or(RequestStatus::IoError)?;
    let [
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        n0,
        n1,
        n2,
        n3,
        f0,
        f1,
        f2,
        f3,
    ] = bytes;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let len = u64::from(u32::from_le_bytes([n0, n1, n2, n3])) * SECTOR;
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let allowed = if kind == VIRTIO_BLK_T_DISCARD {
        0
    } else {
        FLAG_UNMAP
    };
    if flags & !allowed != 0 {
        return Err(RequestStatus::Unsupported);
    }
    let offset = sector.checked_mul(SECTOR).ok_or(RequestStatus::IoError)?;
    Ok(if kind == VIRTIO_BLK_T_DISCARD {
        Kind::Discard { offset, len }
    } else {
        Kind::WriteZeroes {
            offset,
            len,
            unmap: flags & FLAG_UNMAP != 0,
        }
    })
}

fn split_header(header: &[u8; HEADER]) -> (u32, u64) {
    let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = *header;
    (
        u32::from_le_bytes([k0, k1, k2, k3]),
        u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
    )
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
