//! Faults that a debug build of the daemon can be told to have (`src/planted.rs`), and that walks find.
//!
//! `contrib/test planted` plants one after the other and says at which seed and step each was found.
//! What would be caught: a walk that has gone blind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::common::Res;
use crate::common::daemon::Program;
use crate::common::images;
use crate::walk::{Found, Walk};

/// Name, whether it takes a power cut to show, and what it is.
pub const FAULTS: [(&str, bool, &str); 12] = [
    (
        "LateWrite",
        false,
        "late writes of the old top are not handed over at the switch",
    ),
    (
        "TopNotFlushed",
        true,
        "the old top is not flushed before it is read-only",
    ),
    (
        "RecordLate",
        false,
        "which image is on top is recorded after guests write there",
    ),
    (
        "TapRounded",
        false,
        "the write to a commit's base is rounded to blocks of 4 KiB",
    ),
    (
        "BaseNotFlushed",
        true,
        "the base is not flushed around the switch to it",
    ),
    (
        "HeaderEarly",
        true,
        "a stream changes the header before its data is stable",
    ),
    (
        "JournalDropped",
        false,
        "the journal lacks some changes of the mapping",
    ),
    (
        "DiscardUnmaps",
        false,
        "discards unmap clusters over a backing file",
    ),
    ("GrantKept", false, "a stream does not give its grant back"),
    ("NoFence", false, "an export that is added has no fence"),
    (
        "HeaderStays",
        false,
        "the header over layers that a job took away is not changed",
    ),
    (
        "RefusedLeaves",
        false,
        "a refused transaction leaves its nodes",
    ),
];

/// Steps of a walk that is to find a fault.
const STEPS: u64 = 60;

/// The daemon with a fault: a script in `dir`.
fn daemon_with(fault: &str, dir: &Path) -> Res<Program> {
    let path = dir.join("daemon");
    let daemon = Program::under_test().path;
    let script = format!(
        "#!/bin/sh\nSTRATABLK_PLANTED={fault} exec '{}' \"$@\"\n",
        images::text(&daemon)?
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(Program { path })
}

/// Walks with a fault until it is found, or all `seeds` are used up.
pub fn find(fault: &str, power: bool, seeds: std::ops::Range<u64>) -> Res<Option<(u64, Found)>> {
    let dir = tempfile::tempdir()?;
    let program = daemon_with(fault, dir.path())?;
    for seed in seeds {
        let walk = Walk {
            seed,
            steps: STEPS,
            power,
        };
        if let Some(found) = walk.run(&program)? {
            return Ok(Some((seed, found)));
        }
    }
    Ok(None)
}
