//! What would be caught: a panic, or a range outside the guest's memory, for any descriptors
//! whatever; and legal requests that are understood otherwise than they were cut.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::export::memory::RegionInfo;
use crate::export::ring::RingAddresses;

const BASE: u64 = 0x1_0000;
const LEN: usize = 0x1_0000;
const SIZE: u16 = 8;
/// Where tests put headers, data and status.
const FREE: u64 = BASE + 0x1000;

struct Memory {
    file: File,
    table: Arc<GuestMemory>,
}

impl Memory {
    /// One region of guest memory, whose first page holds the ring.
    fn new() -> Self {
        // SAFETY: the descriptor is new and ours.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0)) };
        file.set_len(LEN as u64).unwrap();
        let info = RegionInfo {
            guest: BASE,
            len: LEN as u64,
            user: BASE,
            file_offset: 0,
        };
        let table = GuestMemory::default().with(info, file.try_clone().unwrap());
        Self {
            file,
            table: Arc::new(table.unwrap()),
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        self.file.write_all_at(bytes, at - BASE).unwrap();
    }

    fn descriptor(&self, at: u64, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(at, &bytes);
    }

    fn ring(&self) -> SplitRing {
        let at = RingAddresses {
            desc: BASE,
            avail: BASE + 0x400,
            used: BASE + 0x800,
        };
        SplitRing::new(self.table.clone(), &at, SIZE, 0, false).unwrap()
    }

    /// True if the host range lies in the region.
    fn holds(&self, start: usize, len: usize) -> bool {
        let base = self.table.guest_to_host(BASE, LEN as u64).unwrap();
        start >= base && start + len <= base + LEN
    }
}

/// Addresses near anything of interest.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => BASE..BASE + LEN as u64,
        1 => (BASE + LEN as u64 - 64)..(BASE + LEN as u64 + 64),
        1 => (u64::MAX - 64)..=u64::MAX,
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0u32..64,
        2 => (1u32..16).prop_map(|n| n * 16),
        2 => (1u32..8).prop_map(|n| n * 512),
        1 => any::<u32>(),
    ]
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    (address(), length(), 0u16..8, 0u16..SIZE + 1)
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

proptest! {
    #[test]
    fn any_descriptors_stay_within_memory(
        ring in prop::collection::vec(descriptor(), SIZE as usize),
        tables in prop::collection::vec(descriptor(), 16),
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0u64..100, any::<u64>()],
        head in 0..SIZE + 2,
    ) {
        let memory = Memory::new();
        for (at, descriptor) in (0..).step_by(16).zip(ring) {
            memory.descriptor(BASE + at, descriptor);
        }
        for (at, descriptor) in (FREE..).step_by(16).zip(tables) {
            memory.descriptor(at, descriptor);
        }
        memory.write(BASE + LEN as u64 - 16, &header(kind, sector));
        let mut ranges = Ranges::default();
        match parse(&memory.ring(), &memory.table, head, &mut ranges) {
            Parsed::Request { kind, status } => {
                prop_assert!(memory.holds(status, 1));
                let data = ranges.data();
                prop_assert!(data.len() <= MAX_RANGES);
                prop_assert!(data.iter().all(|d| d.iov_len > 0
                    && memory.holds(d.iov_base as usize, d.iov_len)));
                if matches!(kind, Kind::In { .. } | Kind::Out { .. }) {
                    let sum: usize = data.iter().map(|d| d.iov_len).sum();
                    prop_assert_eq!(sum as u64, ranges.data_len());
                    prop_assert!(sum.is_multiple_of(512));
                }
            }
            Parsed::Refused { status, .. } => prop_assert!(memory.holds(status, 1)),
            Parsed::Malformed => {}
        }
    }

    #[test]
    fn a_legal_request_is_understood_however_it_is_cut(
        write in any::<bool>(),
        sectors in 1u32..5,
        sector in 0u64..1000,
        cuts in prop::collection::vec(1u32..600, 0..5),
        indirect in any::<bool>(),
        gap in 0u64..3,
    ) {
        let memory = Memory::new();
        let len = sectors * 512;
        // The readable and the writable bytes in a row, then cut.
        let (readable, writable) = if write { (16 + len, 1) } else { (16, len + 1) };
        let mut pieces = Vec::new();
        for (mut left, flags) in [(readable, 0), (writable, DESC_WRITE)] {
            for &cut in &cuts {
                let now = cut.min(left);
                if now > 0 && pieces.len() < 12 {
                    pieces.push((now, flags));
                    left -= now;
                }
            }
            if left > 0 {
                pieces.push((left, flags));
            }
        }
        prop_assume!(indirect || pieces.len() <= SIZE as usize);
        let table = if indirect { FREE } else { BASE };
        let bytes = header(u32::from(write), sector);
        let mut at = FREE + 0x1000;
        let mut seen = 0usize;
        for (index, &(len, flags)) in pieces.iter().enumerate() {
            let next = if index + 1 < pieces.len() { DESC_NEXT } else { 0 };
            let descriptor = (at, len, flags | next, index as u16 + 1);
            memory.descriptor(table + 16 * index as u64, descriptor);
            if seen < 16 {
                let end = bytes.len().min(seen + len as usize);
                memory.write(at, &bytes[seen..end]);
            }
            seen += len as usize;
            // Neighbours without a gap become one range.
            at += u64::from(len) + gap;
        }
        if indirect {
            memory.descriptor(BASE, (FREE, pieces.len() as u32 * 16, DESC_INDIRECT, 0));
        }
        let mut ranges = Ranges::default();
        let parsed = parse(&memory.ring(), &memory.table, 0, &mut ranges);
        let offset = sector * 512;
        let expected = if write { Kind::Out { offset } } else { Kind::In { offset } };
        let status = memory.table.guest_to_host(at - gap - 1, 1).unwrap();
        prop_assert_eq!(parsed, Parsed::Request { kind: expected, status });
        prop_assert_eq!(ranges.data_len(), u64::from(len));
        if gap == 0 {
            prop_assert_eq!(ranges.data().len(), 1);
        }
    }
}

/// Memory in several regions: a buffer may cross from one to the next, a ring may not.
#[test]
fn buffers_may_cross_regions_that_touch() {
    let memory = Memory::new();
    let second = RegionInfo {
        guest: BASE + LEN as u64,
        len: 4096,
        user: 1 << 40,
        file_offset: 0,
    };
    let table = memory
        .table
        .with(second, memory.file.try_clone().unwrap())
        .unwrap();
    let overlap = RegionInfo {
        guest: second.guest - 1,
        ..second
    };
    assert!(
        table
            .with(overlap, memory.file.try_clone().unwrap())
            .is_err()
    );
    let alias = RegionInfo {
        guest: 1 << 40,
        ..second
    };
    assert!(table.with(alias, memory.file.try_clone().unwrap()).is_ok());
    let mut parts = Vec::new();
    let end = BASE + LEN as u64;
    assert!(table.translate(end - 10, 30, |iovec| parts.push(iovec.iov_len)));
    assert_eq!(parts, [10, 20]);
    assert!(!table.translate(end + 4000, 100, |_| ()));
    assert_eq!(table.guest_to_host(end - 10, 30), None);
    assert_eq!(table.user_to_host(BASE + LEN as u64 - 1, 2), None);
    assert!(
        table
            .without(&second)
            .unwrap()
            .guest_to_host(end, 1)
            .is_none()
    );
}
