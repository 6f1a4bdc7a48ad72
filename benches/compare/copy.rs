//! Copying the data of a stream without a back-end, by the programs that are there for that.

use crate::Options;
use crate::common::{Res, daemon, images};
use crate::disks::Disks;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// Seconds that the fastest of `cp`, `qemu-img convert` and, on a disk, `dd` takes to copy the image
/// at the bottom, until the copy is stable, on the CPU of the back-ends.
///
/// A stream reads a disk past the page cache. There `qemu-img` and `dd` do so as well, and none
/// begins with pages that the making of the image, or the copy before, has left in the cache.
pub fn fastest(options: &Options, disks: &Disks, place: &str) -> Res<f64> {
    let (base, copy) = (disks.qcow2()?, disks.dir().join("copy"));
    let (from, to) = (images::text(&base)?, images::text(&copy)?);
    let on_disk = place != "tmpfs";
    let cache = if on_disk { "none" } else { "writeback" };
    let convert = [
        "convert", "-m", "16", "-W", "-T", cache, "-t", cache, "-f", "qcow2", "-O", "qcow2", from,
        to,
    ];
    let by = |program: &str, args: &[&str]| -> Res<f64> {
        if on_disk {
            forget(&base)?;
        }
        let seconds = timed(options, program, args, &copy)?;
        eprintln!("    {program} {seconds:.2} s");
        Ok(seconds)
    };
    let fastest = by("cp", &[from, to])?.min(by("qemu-img", &convert)?);
    if !on_disk {
        return Ok(fastest);
    }
    let (input, output) = (format!("if={from}"), format!("of={to}"));
    let direct = ["bs=1M", "iflag=direct", "oflag=direct", "status=none"];
    let dd = by("dd", &[&[input.as_str(), &output], &direct[..]].concat())?;
    Ok(fastest.min(dd))
}

/// Drops a file's pages from the page cache.
fn forget(path: &Path) -> Res<()> {
    let file = File::open(path)?;
    // Pages that are not yet on the disk would stay.
    file.sync_all()?;
    // SAFETY: no memory is passed, and the descriptor is open.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error).into()),
    }
}

/// Seconds that a program takes to make `copy`, and to have it stable; removes the copy.
fn timed(options: &Options, program: &str, args: &[&str], copy: &Path) -> Res<f64> {
    let cpu = options.cpu_backend;
    let mut command = Command::new(program);
    command.args(args);
    // SAFETY: between fork and exec only a system call is made, which touches no memory of the
    // parent.
    unsafe { command.pre_exec(move || daemon::pin_this_thread(cpu)) };
    let begin = Instant::now();
    let status = command.status()?;
    File::open(copy)?.sync_all()?;
    let seconds = begin.elapsed().as_secs_f64();
    fs::remove_file(copy)?;
    if !status.success() {
        return Err(format!("{program} {args:?}: {status}").into());
    }
    Ok(seconds)
}
