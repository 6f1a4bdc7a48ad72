//! What the kinds of file systems do: who keeps locks, and whether an operation may block the thread
//! that begins it.

use std::fs::File;
use std::os::fd::AsRawFd;

/// The number of a file system in memory that libc has no name for.
pub(super) const RAMFS: i64 = 0x8584_58f6;
const ZFS: i64 = 0x2fc1_2fc1;

/// The kind of the file system that a file is in; 0: not known.
pub(super) fn file_system(file: &File) -> i64 {
    // SAFETY: all-zero bytes are a valid statfs.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes one statfs.
    match unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } {
        0 => stat.f_type,
        _ => 0,
    }
}

/// Whether locks of files in such a file system are in the kernel's memory alone, and no server is
/// asked for them. Others are not known to be.
pub(super) fn is_local(file_system: i64) -> bool {
    matches!(
        file_system,
        libc::EXT4_SUPER_MAGIC
            | libc::XFS_SUPER_MAGIC
            | libc::BTRFS_SUPER_MAGIC
            | libc::F2FS_SUPER_MAGIC
            // Whatever it is over: the locks are its own.
            | libc::OVERLAYFS_SUPER_MAGIC
            | libc::TMPFS_MAGIC
            | RAMFS
            | ZFS
    )
}

/// Whether operations on files in such a file system do not block who submits them if they are not
/// to. In user space and over a network they do, and so they may where they are passed on to files
/// of another one.
pub(super) fn keeps_nowait(file_system: i64) -> bool {
    is_local(file_system) && file_system != libc::OVERLAYFS_SUPER_MAGIC
}

#[cfg(test)]
mod tests {
    //! What would be caught: an overlay that is taken for what it is over, in either question.

    use super::*;

    #[test]
    fn an_overlay_keeps_its_locks_and_may_block() {
        let overlay = libc::OVERLAYFS_SUPER_MAGIC;
        assert!(is_local(overlay) && !keeps_nowait(overlay));
        assert!(keeps_nowait(libc::EXT4_SUPER_MAGIC));
        assert!(!is_local(libc::NFS_SUPER_MAGIC) && !keeps_nowait(libc::NFS_SUPER_MAGIC));
    }
}
