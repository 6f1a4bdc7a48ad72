//! How the daemon begins and ends as a process.
//!
//! What would be caught: a daemon that keeps a service manager's soft limit of descriptors.

mod common;

use common::Res;
use common::daemon::{Program, Setup};
use common::images;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const DISK: u64 = 8 << 20;
const MEMORY: usize = 1 << 20;
const QUEUE: u16 = 128;

/// A daemon of a qcow2 image, to which others can be added.
fn bed(dir: &Path) -> Res<(PathBuf, Setup)> {
    let image = dir.join("disk.qcow2");
    images::create(&image, DISK, "compat=1.1", None)?;
    let mut setup = Setup::new(dir, &[(image.clone(), "qcow2")]);
    setup.qmp = None;
    Ok((image, setup))
}

#[test]
fn the_limit_of_descriptors_is_raised() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let (_, setup) = bed(dir.path())?;
    let script = dir.path().join("limited");
    let daemon = Program::under_test().path;
    let text = format!(
        "#!/bin/sh\nulimit -Sn 64\nexec '{}' \"$@\"\n",
        daemon.display()
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let mut daemon = setup.start(&Program { path: script }, dir.path(), None)?;
    let _frontend = daemon.connect(&setup.socket, 1, QUEUE, MEMORY)?;
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid()))?;
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .ok_or("no limit")?;
    let numbers: Vec<&str> = line.split_whitespace().skip(3).take(2).collect();
    assert_eq!(numbers.first(), numbers.get(1), "{line}");
    daemon.stop()
}
