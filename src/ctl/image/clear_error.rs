//! `clear-error`: forgets a failed flush that a daemon has recorded.

use crate::ctl::Failure;
use crate::error::{Error, errno_text};
use crate::state::record::FailedSync;
use crate::state::{self, StateError, Store};
use crate::storage::identity::identity_of;
use crate::storage::is_same_file;
use clap::Args;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What `--help` says below the options.
pub const HELP: &str = "\
A file that could not be made stable is not flushed any more, by any daemon that is started with
the same --state folder: what was written since the last good flush may be lost. Check the image
before this is cleared. While the daemon runs, use 'stratactl clear-sync-error'.";

/// Options of `clear-error`.
#[derive(Debug, Args)]
pub struct ClearErrorArgs {
    /// The image, or the data file of one
    file: PathBuf,
    /// The daemon's --state folder
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// The daemon's --state-name [default: all in the folder that record the file]
    #[arg(long, value_name = "NAME")]
    state_name: Option<String>,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

/// Carries out `clear-error`.
pub fn run(args: &ClearErrorArgs, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let cannot = |error: StateError| Error::Invalid(error.to_string());
    let names = match &args.state_name {
        Some(name) => vec![name.clone()],
        None => state::names(&args.state).map_err(cannot)?,
    };
    let mut cleared = Vec::new();
    let mut failures = Vec::new();
    for name in names {
        // One that is damaged does not keep the others from being cleared.
        match clear(args, &name) {
            Ok(list) => cleared.extend(list),
            Err(error) => failures.push(error),
        }
    }
    tell(&cleared, args.quiet, json, out)?;
    let Some(last) = failures.pop() else {
        return match cleared.is_empty() {
            true => Err(Error::Invalid(format!(
                "no failed flush of '{}' is recorded in '{}'",
                args.file.display(),
                args.state.display()
            ))
            .into()),
            false => Ok(()),
        };
    };
    for error in failures {
        eprintln!("stratactl: {error}");
    }
    Err(last.into())
}

/// Clears the failures of the file in the state called `name`, and returns them.
fn clear(args: &ClearErrorArgs, name: &str) -> Result<Vec<FailedSync>, Error> {
    let cannot = |error: StateError| Error::Invalid(error.to_string());
    let metadata = std::fs::metadata(&args.file).ok();
    let identity = metadata.and_then(|metadata| identity_of(&metadata));
    let file = (args.file.as_path(), identity.unwrap_or_default());
    let concerns = |failed: &FailedSync| {
        let recorded = Path::new(&failed.file);
        is_same(recorded, &args.file) || is_same_file((recorded, failed.identity), file)
    };
    let recorded = state::peek(&args.state, name).map_err(cannot)?;
    if !recorded.failed_syncs.iter().any(concerns) {
        return Ok(Vec::new());
    }
    // An operator may be another user than the daemon, whose file it stays.
    let store = Store::open_anybodys(&args.state, name).map_err(|error| match error {
        StateError::Locked { .. } => Error::Busy(format!(
            "the daemon that uses '{name}' in '{}' runs: use 'stratactl clear-sync-error'",
            args.state.display()
        )),
        error => cannot(error),
    })?;
    let before = store.state().failed_syncs;
    store
        .change(|state| state.failed_syncs.retain(|failed| !concerns(failed)))
        .map_err(cannot)?;
    Ok(before.into_iter().filter(concerns).collect())
}

fn tell(
    cleared: &[FailedSync],
    quiet: bool,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    for failed in cleared {
        if json {
            writeln!(out, "{}", described(failed))?;
        } else if !quiet {
            let why = errno_text(failed.errno);
            writeln!(out, "{}: flushes are tried again ({why})", failed.file)?;
        }
    }
    Ok(())
}

fn described(failed: &FailedSync) -> Value {
    json!({"file": failed.file, "errno": failed.errno, "at": failed.at})
}

/// Whether both paths lead to the same file, or are the same to one that is gone.
fn is_same(one: &Path, other: &Path) -> bool {
    if let (Ok(one), Ok(other)) = (one.canonicalize(), other.canonicalize()) {
        return one == other;
    }
    std::path::absolute(other).is_ok_and(|other| one == other)
}
