//! New memory for files on tmpfs, at a steady price.
//!
//! A virtual machine may give free memory back to its host within seconds (free page reporting).
//! Whatever takes it next waits for the host, page by page: on one such machine a file grew at a
//! sixth of its usual speed then, or did not, as it happened.

use crate::Options;
use crate::common::{Res, daemon};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;

/// Memory that this system has taken from its host, and has ready for other programs, for as long
/// as this lives.
///
/// One page of each 512 KiB stays in use. What is free between them never becomes a block large
/// enough to be given back (2 MiB), and the kernel hands out the smallest blocks first.
#[derive(Debug)]
pub struct Memory {
    _kept: File,
}

const BLOCK: usize = 512 << 10;
const PAGE: usize = 4096;

impl Memory {
    /// `bytes` of it, by a file without a name in `dir`, which is on tmpfs.
    pub fn take(options: &Options, dir: &Path, bytes: u64) -> Res<Self> {
        let file = tempfile::tempfile_in(dir)?;
        thread::scope(|scope| {
            // Each CPU keeps much of what is freed there to itself: it is for the back-ends.
            let take = || {
                daemon::pin_this_thread(options.cpu_backend)?;
                warm(&file, bytes)
            };
            // An error of the bench cannot cross threads, its text can.
            let thread = scope.spawn(move || take().map_err(|error| error.to_string()));
            thread.join().map_err(|_| "taking memory panicked")?
        })?;
        Ok(Memory { _kept: file })
    }
}

/// Fills `bytes` of a file, and frees most of them again.
fn warm(mut file: &File, bytes: u64) -> Res<()> {
    let block = vec![1; BLOCK];
    let blocks = bytes.div_ceil(BLOCK as u64);
    for _ in 0..blocks {
        file.write_all(&block)?;
    }
    for number in 0..blocks {
        punch(file, number * BLOCK as u64 + PAGE as u64, BLOCK - PAGE)?;
    }
    Ok(())
}

/// Frees the memory of a part of a file.
fn punch(file: &File, at: u64, len: usize) -> Res<()> {
    let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no memory is passed, and the descriptor is open.
    match unsafe { libc::fallocate(file.as_raw_fd(), how, at.try_into()?, len.try_into()?) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error().into()),
    }
}
