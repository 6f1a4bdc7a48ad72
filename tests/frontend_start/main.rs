//! A start that does not come to an end.
//!
//! What would be caught: a daemon that cannot be told to end while it waits for an image.

#[path = "../common/mod.rs"]
mod common;

use common::Res;
use common::daemon::{Program, Setup};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// It only decides how long a daemon that hangs takes to be noticed.
const PATIENCE: Duration = Duration::from_secs(60);

/// The daemon, for which the file called `name` never opens: a script.
fn program(dir: &Path, name: &str) -> Res<Program> {
    Program::with_library(
        "tests/frontend_start/hang_open.c",
        &[("HANG_OPEN", name)],
        dir,
    )
}

#[test]
fn a_start_that_hangs_can_be_ended() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("hangs.raw");
    fs::write(&image, vec![0; 1 << 20])?;
    let mut setup = Setup::new(dir.path(), &[(image, "raw")]);
    setup.extra.push("--stop-timeout=1".into());
    let mut daemon = setup.start(&program(dir.path(), "hangs.raw")?, dir.path(), None)?;
    let deadline = Instant::now() + PATIENCE;
    while !daemon.log().contains("hanging") {
        assert!(Instant::now() < deadline, "{}", daemon.log());
        std::thread::yield_now();
    }
    let status = daemon.terminate()?;
    assert_eq!(status.code(), Some(1), "{}", daemon.log());
    assert!(
        daemon.log().contains("told to end while starting"),
        "{}",
        daemon.log()
    );
    Ok(())
}
