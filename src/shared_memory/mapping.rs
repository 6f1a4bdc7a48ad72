//! Files that front-ends share, mapped into this process so that none of them can harm it.
//!
//! A mapping consists of whole pages of its file, huge ones where the file has such, is guarded
//! against the file's shrinking, and needs no descriptor. Only files are mapped whose pages come
//! without anybody's help: a thread that touches a page of a file system in user space or on
//! another machine waits for as long as its server likes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::ptr;

use parking_lot::Mutex;

use super::sigbus::Guard;

/// Local disks, which `memory-backend-file` may be on.
const LOCAL_FILE_SYSTEMS: [&str; 6] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs"];

/// What the mappings of all front-ends together may use. A process has addresses for twice as
/// many bytes, and by default 65530 mappings, of which others need some.
const LIMIT: Use = Use {
    bytes: 64 << 40,
    mappings: 48 << 10,
};
static USED: Mutex<Use> = Mutex::new(Use {
    bytes: 0,
    mappings: 0,
});

#[derive(Clone, Copy, Debug)]
struct Use {
    bytes: usize,
    mappings: usize,
}

/// A part of a file, mapped and guarded.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Dropped first: what is unmapped is guarded no more.
    guard: Guard,
    _pages: Pages,
    start: usize,
}

impl Mapping {
    /// Maps `[offset, offset + len)` of `file`, which does not wrap and is not empty.
    ///
    /// # Errors
    /// When it is larger than its file, the file is none that can be mapped safely, or the
    /// process has no room for it.
    pub(crate) fn new(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        let page = check(file, offset, offset + len)?;
        let first = offset - offset % page;
        let end = (offset + len)
            .checked_next_multiple_of(page)
            .and_then(|end| usize::try_from(end - first).ok());
        let whole = end.ok_or_else(|| invalid("the memory region is too big".to_owned()))?;
        let pages = Pages::map(file, first, whole)?;
        Ok(Self {
            guard: Guard::new(pages.start, pages.len, page as usize)?,
            start: pages.start + (offset - first) as usize,
            _pages: pages,
        })
    }

    /// The address of the part's first byte.
    pub(crate) fn start(&self) -> usize {
        self.start
    }

    /// Whether some of it was taken away, and is zeros now.
    pub(crate) fn is_lost(&self) -> bool {
        self.guard.is_lost()
    }
}

/// Whole pages of a file, mapped until this is dropped.
#[derive(Debug)]
struct Pages {
    start: usize,
    len: usize,
}

impl Pages {
    fn map(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        let mut used = USED.lock();
        let bytes = used.bytes.saturating_add(len);
        if bytes > LIMIT.bytes || used.mappings >= LIMIT.mappings {
            return Err(invalid(format!(
                "the memory regions of all front-ends use {} bytes in {} mappings, and {len} \
                 bytes more are too much",
                used.bytes, used.mappings
            )));
        }
        let offset = libc::off_t::try_from(offset)
            .map_err(|_| invalid("the memory region is too far behind its file's begin".into()))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in
        // use.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            return Err(invalid(format!("mapping a memory region: {error}")));
        }
        used.bytes = bytes;
        used.mappings += 1;
        Ok(Self {
            start: start.expose_provenance(),
            len,
        })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let mut used = USED.lock();
        // SAFETY: the range is ours since `map`, in whole pages, and its owner is done with it.
        let result =
            unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.start), self.len) };
        if result < 0 {
            // It goes on to count.
            let error = io::Error::last_os_error();
            log::error!("unmapping a memory region: {error}");
            return;
        }
        used.bytes = used.bytes.saturating_sub(self.len);
        used.mappings = used.mappings.saturating_sub(1);
    }
}

/// Whether a part of a file that ends at `end` can be mapped; the size of the file's pages.
fn check(file: &File, offset: u64, end: u64) -> io::Result<u64> {
    // First: a file's server would be asked for its size, and may not answer.
    let memory = is_memory(file);
    if !memory {
        let kind = file_system(file)?;
        if !LOCAL_FILE_SYSTEMS.contains(&kind.as_deref().unwrap_or_default()) {
            let kind = kind.map_or_else(
                || "that is not mounted here".to_owned(),
                |kind| format!("of type '{kind}'"),
            );
            return Err(invalid(format!(
                "the memory region's descriptor is not a file, or one on a file system {kind}, on \
                 which an access may never end: share a memfd, or a file on tmpfs, hugetlbfs, {}",
                LOCAL_FILE_SYSTEMS.join(", ")
            )));
        }
    }
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(invalid(
            "the memory region's descriptor is not a file".to_owned(),
        ));
    }
    if metadata.size() < end {
        return Err(invalid(format!(
            "the memory region reaches from {offset:#x} to {end:#x} of its file, which has {:#x} \
             bytes",
            metadata.size()
        )));
    }
    if memory && let Some(page) = huge_page(file)? {
        return Ok(page);
    }
    // SAFETY: asks for a constant of the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(page).map_err(|_| io::Error::last_os_error())
}

/// Whether a file is memory: a memfd, or on tmpfs or hugetlbfs. Only these can have seals.
fn is_memory(file: &File) -> bool {
    // SAFETY: no memory is passed.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) >= 0 }
}

/// The type of the file system that a file is on, as the table of mounts says: asking the file
/// system itself could wait for its server. `None`: it is not mounted here.
fn file_system(file: &File) -> io::Result<Option<String>> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mount.and_then(|mount| type_of_mount(&mounts, mount.trim())))
}

/// The file system's type in a table of mounts (proc(5), `mountinfo`).
fn type_of_mount(mounts: &str, id: &str) -> Option<String> {
    let line = mounts
        .lines()
        .find(|line| line.split(' ').next() == Some(id))?;
    let (_, rest) = line.split_once(" - ")?;
    Some(rest.split(' ').next()?.to_owned())
}

/// The size of the pages of a file in memory, if they are huge ones.
fn huge_page(file: &File) -> io::Result<Option<u64>> {
    // SAFETY: all-zero bytes are a valid statfs.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes one statfs.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } < 0 {
        return Err(io::Error::last_os_error());
    }
    if stat.f_type != libc::HUGETLBFS_MAGIC {
        return Ok(None);
    }
    u64::try_from(stat.f_bsize)
        .ok()
        .filter(|page| page.is_power_of_two())
        .map(Some)
        .ok_or_else(|| invalid("the size of the region's huge pages is unknown".to_owned()))
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

#[cfg(test)]
mod tests {
    //! What would be caught: a file system that is taken for another one's.

    use super::*;

    #[test]
    fn the_table_of_mounts_tells_the_type() {
        let mounts = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n\
                      6 35 0:5 / /run rw - fuse.x - rw\n";
        assert_eq!(type_of_mount(mounts, "36").as_deref(), Some("ext3"));
        assert_eq!(type_of_mount(mounts, "6").as_deref(), Some("fuse.x"));
        assert_eq!(type_of_mount(mounts, "3"), None);
    }

    #[test]
    fn files_are_told_apart() {
        let null = File::open("/dev/null").unwrap();
        let proc = File::open("/proc/self/maps").unwrap();
        assert!(!is_memory(&null) && !is_memory(&proc));
        assert_eq!(file_system(&proc).unwrap().as_deref(), Some("proc"));
        // SAFETY: the name is a string.
        let fd = unsafe { libc::memfd_create(c"memory".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: the descriptor is new.
        let memory = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        assert!(is_memory(&memory));
        assert_eq!(huge_page(&memory).unwrap(), None);
        assert_eq!(file_system(&memory).unwrap(), None, "mounted nowhere");
    }
}
