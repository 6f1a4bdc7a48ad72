//! Copying the data of a stream without a back-end, by the programs that are there for that.

use crate::Options;
use crate::common::{Res, daemon, images};
use crate::disks::Disks;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// Seconds that the faster of `cp` and `qemu-img convert` takes to copy the image at the bottom,
/// until the copy is stable, on the CPU of the back-ends.
pub fn fastest(options: &Options, disks: &Disks, place: &str) -> Res<f64> {
    let (base, copy) = (disks.qcow2()?, disks.dir().join("copy"));
    let (from, to) = (images::text(&base)?, images::text(&copy)?);
    let cache = if place == "tmpfs" {
        "writeback"
    } else {
        "none"
    };
    let convert = [
        "convert", "-m", "16", "-W", "-T", cache, "-t", cache, "-f", "qcow2", "-O", "qcow2",
    ];
    let cp = timed(options, "cp", &[from, to], &copy)?;
    let convert = timed(
        options,
        "qemu-img",
        &[&convert[..], &[from, to]].concat(),
        &copy,
    )?;
    eprintln!("    cp {cp:.2} s, qemu-img convert {convert:.2} s");
    Ok(cp.min(convert))
}

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
