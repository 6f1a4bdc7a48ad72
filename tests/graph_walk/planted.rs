//! Faults that a debug build of the daemon can be told to have (`src/planted.rs`), and that walks find.
//!
//! `contrib/test planted` plants one after the other and says at which seed and step each was found.
//! Walks of the same seeds without a fault come first, and must find nothing. What would be caught: a
//! walk that has gone blind, or finds something for another reason.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::common::Res;
use crate::common::daemon::Program;
use crate::common::images;
use crate::walk::{Found, Walk};

/// A fault, and how it shows.
pub struct Planted {
    /// Its name in `src/planted.rs`.
    pub name: &'static str,
    /// Walks need files whose power can fail.
    pub power: bool,
    /// What it is.
    pub what: &'static str,
    /// What is said of it, one of these: anything else is another fault.
    pub shows: &'static [&'static str],
}

/// A guest reads what it has not written.
const WRONG: &str = "sector ";
/// So it does after the power has failed.
const LOST: &str = "begins (AfterCut): sector ";
/// The graph is not what it should be.
const GRAPH: &str = "there is something else than there should be";

/// All of them.
pub const FAULTS: [Planted; 12] = [
    Planted {
        name: "LateWrite",
        power: true,
        what: "late writes of the old top are not handed over at the switch",
        shows: &[WRONG],
    },
    Planted {
        name: "TopNotFlushed",
        power: true,
        what: "the old top is not flushed before it is read-only",
        shows: &[LOST],
    },
    Planted {
        name: "TopNotRecorded",
        power: false,
        what: "which image is on top is not recorded",
        shows: &[GRAPH, WRONG],
    },
    Planted {
        name: "TapRounded",
        power: false,
        what: "the write to a commit's base is rounded to blocks of 4 KiB",
        shows: &[WRONG],
    },
    Planted {
        name: "BaseNotFlushed",
        power: true,
        what: "a commit does not make its base stable",
        shows: &[LOST],
    },
    Planted {
        name: "HeaderEarly",
        power: true,
        what: "a stream changes the header before its data is stable",
        shows: &[LOST],
    },
    Planted {
        name: "JournalDropped",
        power: false,
        what: "the journal lacks some changes of the mapping",
        shows: &[WRONG],
    },
    Planted {
        name: "DiscardUnmaps",
        power: false,
        what: "discards unmap clusters over a backing file",
        shows: &[WRONG],
    },
    Planted {
        name: "GrantKept",
        power: false,
        what: "a stream does not give its grant back",
        shows: &["is in use by block job: stream", "lock"],
    },
    Planted {
        name: "NoFence",
        power: false,
        what: "an export that is added has no fence",
        shows: &["the fence of export"],
    },
    Planted {
        name: "HeaderStays",
        power: false,
        what: "the header over layers that a job took away is not changed",
        shows: &["the header of node", GRAPH],
    },
    Planted {
        name: "RefusedLeaves",
        power: false,
        what: "a refused transaction leaves its nodes",
        shows: &["it holds", GRAPH],
    },
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
///
/// # Errors
/// Something else was found.
pub fn find(fault: &Planted, seeds: Range<u64>) -> Res<Option<(u64, Found)>> {
    let dir = tempfile::tempdir()?;
    let program = daemon_with(fault.name, dir.path())?;
    let found = first(&program, fault.power, seeds)?;
    if let Some((seed, found)) = &found
        && !fault.shows.iter().any(|shows| found.error.contains(shows))
    {
        let text = &found.text;
        return Err(format!("{}: seed {seed} fails otherwise: {text}", fault.name).into());
    }
    Ok(found)
}

/// Walks without a fault find nothing.
pub fn control(power: bool, seeds: Range<u64>) -> Res<()> {
    match first(&Program::under_test(), power, seeds)? {
        Some((seed, found)) => {
            Err(format!("no fault is planted, and seed {seed} fails: {}", found.text).into())
        }
        None => Ok(()),
    }
}

fn first(program: &Program, power: bool, seeds: Range<u64>) -> Res<Option<(u64, Found)>> {
    for seed in seeds {
        let steps = STEPS;
        let walk = Walk { seed, steps, power };
        if let Some(found) = walk.run(program)? {
            return Ok(Some((seed, found)));
        }
    }
    Ok(None)
}
