//! Memory that a front-end shares with a back-end: the "RAM of the guest".

use super::Res;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// Bytes on both sides of the memory that belong to nothing, so that an address just outside is
/// not inside something else.
const GUARD: usize = 1 << 20;

/// A memfd, mapped. Bytes go in and out by copy, never by reference: the back-end may write to
/// this memory at any time, which a Rust reference does not allow.
pub struct Memory {
    file: File,
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping lives as long as the value, and every access is a bounds-checked copy.
unsafe impl Send for Memory {}
// SAFETY: as above. Two threads copying to the same place would race in what is stored there, as
// two CPUs of a guest would; the front-end gives each request bytes of its own.
unsafe impl Sync for Memory {}

impl Memory {
    /// Shared memory of `len` bytes, all present, so that no page fault lands in a measurement.
    pub fn new(len: usize) -> Res<Self> {
        // SAFETY: the name is a valid C string and the result is checked.
        let fd = unsafe { libc::memfd_create(c"front-end".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len as u64)?;
        // SAFETY: a fresh reservation at an address of the kernel's choosing; checked below.
        let reserved = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len + 2 * GUARD,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: this replaces the middle of the reservation above, which nobody else uses.
        let base = unsafe {
            libc::mmap(
                reserved.byte_add(GUARD),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE | libc::MAP_FIXED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        Ok(Memory {
            file,
            base: base.cast(),
            len,
        })
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The address of the byte at `offset`, for a descriptor.
    pub fn address(&self, offset: usize) -> usize {
        assert!(offset <= self.len, "an offset outside the shared memory");
        self.base as usize + offset
    }

    /// The descriptor to send to the back-end.
    pub fn raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// Copies `data` to `offset`.
    pub fn write(&self, offset: usize, data: &[u8]) {
        assert!(
            offset + data.len() <= self.len,
            "a write outside the shared memory"
        );
        // SAFETY: the range lies inside the mapping (checked above), and `data` is another object.
        unsafe {
            std::ptr::copy_nonoverlapping(data.as_ptr(), self.base.add(offset), data.len());
        }
    }

    /// Copies the bytes at `offset` into `data`.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        assert!(
            offset + data.len() <= self.len,
            "a read outside the shared memory"
        );
        // SAFETY: the range lies inside the mapping (checked above), and `data` is another object.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base.add(offset), data.as_mut_ptr(), data.len());
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the reservation was made in `new` with this place and length, and is not used after this.
        unsafe {
            libc::munmap(self.base.byte_sub(GUARD).cast(), self.len + 2 * GUARD);
        }
    }
}
