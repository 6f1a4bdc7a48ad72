//! What an export is made of, and the configuration space that the guest reads.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::chain::Chain;
use crate::error::{Error, Result};

use super::failure::OnFailure;
use super::request::{ID_LEN, SECTOR};

/// Most queues of one export.
pub const MAX_QUEUES: u16 = 256;
/// Entries of a queue if nothing else is said.
pub const DEFAULT_QUEUE_SIZE: u16 = 1024;
/// The longest time of polling before a queue's thread sleeps, if nothing else is said.
pub const DEFAULT_POLL_MAX_US: u32 = 64;

/// Data descriptors of a request. It is read before the driver says how long its queues are,
/// and a chain may not be longer than a queue; 128 entries is what VMMs give them.
const SEG_MAX_QUEUE: u16 = 128;
/// Sectors of one discard: 1 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Sectors of one write-zeroes request, which may have to be written in full: 64 MiB.
const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 17;
/// Size of the structure in virtio 1.3.
pub const CONFIG_LEN: usize = 96;
/// Some front-ends read the structure from here on, as if it lay behind a header.
const CONFIG_ALIAS: u32 = 0x100;
/// The byte that switches the write cache.
const WCE: usize = 32;

/// Where an export's front-ends come from.
#[derive(Debug)]
pub enum SocketSource {
    /// A socket is made at this path, and removed at the end.
    Path(PathBuf),
    /// A socket that somebody else listens on.
    ListenFd(OwnedFd),
    /// The connection to the one front-end there will be.
    ConnectedFd(OwnedFd),
}

/// What an export is made of.
#[derive(Debug)]
pub struct ExportConfig {
    /// Its name.
    pub id: String,
    /// Where its front-ends come from.
    pub socket: SocketSource,
    /// How many queues it has; each has a thread.
    pub queues: u16,
    /// Most entries of a queue, a power of two.
    pub queue_size_max: u16,
    /// The guest may write.
    pub writable: bool,
    /// The serial number, up to 20 bytes; without one it is derived from the id.
    pub serial: Option<String>,
    /// The unit that the guest reads and writes in.
    pub logical_block_size: u32,
    /// The guest is told of a write cache and flushes it. Without: every write is stable before
    /// it completes.
    pub write_cache: bool,
    /// Longest time of polling before a queue's thread sleeps; 0: none.
    pub poll_max_us: u32,
    /// Writes of nothing but zeros are carried out as write-zeroes requests; true: with leave to
    /// give space back.
    pub detect_zeroes: Option<bool>,
    /// Is told of requests that storage has failed.
    pub on_failure: Option<OnFailure>,
}

impl ExportConfig {
    /// An export with the usual settings.
    #[must_use]
    pub fn new(id: impl Into<String>, socket: SocketSource) -> Self {
        Self {
            id: id.into(),
            socket,
            queues: 1,
            queue_size_max: DEFAULT_QUEUE_SIZE,
            writable: false,
            serial: None,
            logical_block_size: 512,
            write_cache: true,
            poll_max_us: DEFAULT_POLL_MAX_US,
            detect_zeroes: None,
            on_failure: None,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        let problem = if self.queues == 0 || self.queues > MAX_QUEUES {
            format!("num-queues must be 1 to {MAX_QUEUES}, not {}", self.queues)
        } else if !self.queue_size_max.is_power_of_two() || self.queue_size_max < 4 {
            format!(
                "queue-size must be a power of two from 4 to 32768, not {}",
                self.queue_size_max
            )
        } else if !self.logical_block_size.is_power_of_two()
            || !(512..=32768).contains(&self.logical_block_size)
        {
            format!(
                "logical-block-size must be a power of two from 512 to 32768, not {}",
                self.logical_block_size
            )
        } else if self.serial.as_ref().is_some_and(|s| s.len() > ID_LEN) {
            format!("a serial number has at most {ID_LEN} bytes")
        } else {
            return Ok(());
        };
        Err(Error::Invalid(format!("export '{}': {problem}", self.id)))
    }

    /// The serial number as `GET_ID` answers it.
    pub(super) fn serial_bytes(&self) -> [u8; ID_LEN] {
        let serial = match &self.serial {
            Some(serial) => serial.clone(),
            None => derived_serial(&self.id),
        };
        let mut bytes = [0; ID_LEN];
        for (to, from) in bytes.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        bytes
    }
}

/// A serial number that is the same at every start: the id, or what fits of it and a checksum.
fn derived_serial(id: &str) -> String {
    if id.len() <= ID_LEN && !id.is_empty() {
        return id.to_owned();
    }
    let checksum = crc32fast::hash(id.as_bytes());
    let fits = id
        .char_indices()
        .map(|(at, c)| at + c.len_utf8())
        .take_while(|&end| end <= ID_LEN - 9)
        .last()
        .unwrap_or(0);
    format!("{}-{checksum:08x}", id.get(..fits).unwrap_or_default())
}

/// The facts of a device that do not change.
#[derive(Clone, Debug)]
pub(super) struct Geometry {
    pub(super) queues: u16,
    pub(super) queue_size_max: u16,
    /// At least what the storage can write by itself: smaller writes would be read, changed and
    /// written back, and two of them in one block would lose each other's data.
    pub(super) block_size: u32,
}

impl Geometry {
    pub(super) fn new(config: &ExportConfig, chain: &Chain) -> Self {
        let align = u32::try_from(chain.limits().offset_align).unwrap_or(512);
        Self {
            queues: config.queues,
            queue_size_max: config.queue_size_max,
            block_size: config.logical_block_size.max(align),
        }
    }

    /// The configuration space.
    pub(super) fn space(&self, chain: &Chain, wce: bool) -> [u8; CONFIG_LEN] {
        let blocks = |bytes: u64| bytes / u64::from(self.block_size);
        let cluster = chain.cluster_size().max(u64::from(self.block_size));
        // A raw image has no unit that would be better than a block.
        let optimal = if chain.cluster_size() > 1 {
            blocks(cluster)
        } else {
            0
        };
        let discard_align = u32::try_from(cluster / SECTOR).unwrap_or(1);
        let mut space = Space([0; CONFIG_LEN]);
        space.put(0, &(chain.size() / SECTOR).to_le_bytes());
        let seg_max = self.queue_size_max.min(SEG_MAX_QUEUE) - 2;
        space.put(12, &u32::from(seg_max).to_le_bytes());
        space.put(20, &self.block_size.to_le_bytes());
        space.put(26, &saturate16(optimal.max(1)).to_le_bytes());
        space.put(28, &u32::try_from(optimal).unwrap_or(0).to_le_bytes());
        space.put(WCE, &[u8::from(wce)]);
        space.put(34, &self.queues.to_le_bytes());
        space.put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        space.put(40, &1u32.to_le_bytes());
        space.put(44, &discard_align.to_le_bytes());
        space.put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        space.put(52, &1u32.to_le_bytes());
        space.put(56, &[1]);
        space.0
    }
}

/// The longest discard in bytes.
pub(super) const MAX_DISCARD: u64 = MAX_DISCARD_SECTORS as u64 * SECTOR;
/// The longest request to write zeros, in bytes.
pub(super) const MAX_WRITE_ZEROES: u64 = MAX_WRITE_ZEROES_SECTORS as u64 * SECTOR;

struct Space([u8; CONFIG_LEN]);

impl Space {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.0.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }
}

fn saturate16(value: u64) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

/// `size` bytes of the space at `offset`; what lies behind its end is zero, since front-ends
/// know structures of other lengths.
pub(super) fn read_space(space: &[u8; CONFIG_LEN], offset: u32, size: u32) -> Vec<u8> {
    let offset = if offset >= CONFIG_ALIAS {
        offset - CONFIG_ALIAS
    } else {
        offset
    };
    let mut bytes = space
        .get(offset as usize..)
        .unwrap_or(&[])
        .iter()
        .take(size as usize)
        .copied()
        .collect::<Vec<u8>>();
    bytes.resize(size as usize, 0);
    bytes
}

/// Whether `len` bytes at `offset` have the switch of the write cache among them.
pub(super) fn has_wce(offset: u32, len: usize) -> bool {
    let offset = if offset >= CONFIG_ALIAS {
        offset - CONFIG_ALIAS
    } else {
        offset
    };
    WCE.checked_sub(offset as usize).is_some_and(|at| at < len)
}

/// What a write to the space means: the new state of the write cache.
///
/// `None`: the write would change something that cannot be written.
pub(super) fn write_space(space: &[u8; CONFIG_LEN], offset: u32, bytes: &[u8]) -> Option<bool> {
    let offset = if offset >= CONFIG_ALIAS {
        offset - CONFIG_ALIAS
    } else {
        offset
    } as usize;
    let mut wce = space.get(WCE) == Some(&1);
    for (at, &new) in (offset..).zip(bytes) {
        match space.get(at) {
            _ if at == WCE && new <= 1 => wce = new == 1,
            Some(&old) if old == new => {}
            None if new == 0 => {}
            _ => return None,
        }
    }
    Some(wce)
}

#[cfg(test)]
mod tests {
    //! What would be caught: fields at wrong offsets, reads that fail at odd places, writes
    //! that change what is fixed, serial numbers that are too long, equal or unstable.

    use super::*;

    const SPACE: [u8; CONFIG_LEN] = {
        let mut space = [0; CONFIG_LEN];
        space[0] = 7;
        space[WCE] = 1;
        space
    };

    #[test]
    fn reads_work_at_any_offset_and_length() {
        assert_eq!(read_space(&SPACE, 0, 2), [7, 0]);
        assert_eq!(read_space(&SPACE, 31, 3), [0, 1, 0]);
        assert_eq!(read_space(&SPACE, 0x100, 1), [7]);
        assert_eq!(read_space(&SPACE, 0x120, 1), [1]);
        assert_eq!(read_space(&SPACE, 90, 100).len(), 100);
        assert_eq!(read_space(&SPACE, 200, 4), [0; 4]);
    }

    #[test]
    fn only_the_write_cache_can_be_written() {
        assert_eq!(write_space(&SPACE, 32, &[0]), Some(false));
        assert_eq!(write_space(&SPACE, 0x120, &[0]), Some(false));
        assert_eq!(write_space(&SPACE, 0, &SPACE), Some(true));
        assert_eq!(write_space(&SPACE, 32, &[2]), None);
        assert_eq!(write_space(&SPACE, 0, &[8]), None);
        assert_eq!(write_space(&SPACE, 300, &[1, 2]), None);
    }

    #[test]
    fn the_write_cache_is_among_the_bytes_that_cover_it() {
        for (offset, len, found) in [
            (0, 32, false),
            (0, 33, true),
            (32, 1, true),
            (32, 0, false),
            (33, 60, false),
            (0x100, 96, true),
            (0x121, 60, false),
        ] {
            assert_eq!(has_wce(offset, len), found, "{len} at {offset}");
        }
    }

    #[test]
    fn serial_numbers_are_stable_distinct_and_fit() {
        let long = "a-very-long-export-identifier-ö";
        assert_eq!(derived_serial("disk0"), "disk0");
        assert!(derived_serial(long).len() <= ID_LEN);
        assert_eq!(derived_serial(long), derived_serial(long));
        assert_ne!(derived_serial(long), derived_serial(&format!("{long}1")));
        assert!(derived_serial(&"ö".repeat(30)).len() <= ID_LEN);
    }
}
