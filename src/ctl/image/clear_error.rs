//! `clear-error`: forgets a failed flush that a daemon has recorded.

use crate::ctl::Failure;
use crate::error::{Error, errno_text};
use crate::state::record::FailedSync;
use crate::state::{self, StateError, Store};
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
    let concerns = |failed: &FailedSync| is_same(Path::new(&failed.file), &args.file);
    let mut cleared = Vec::new();
    for name in names {
        if !state::peek(&args.state, &name)
            .map_err(cannot)?
            .failed_syncs
            .iter()
            .any(concerns)
        {
            continue;
        }
        let store = Store::open(&args.state, &name).map_err(|error| match error {
            StateError::Locked { .. } => Error::Busy(format!(
                "the daemon that uses '{name}' in '{}' runs: use 'stratactl clear-sync-error'",
                args.state.display()
            )),
            error => cannot(error),
        })?;
        let before = store.state().failed_syncs;
        cleared.extend(before.into_iter().filter(concerns));
        store
            .change(|state| state.failed_syncs.retain(|failed| !concerns(failed)))
            .map_err(cannot)?;
    }
    if cleared.is_empty() {
        return Err(Error::Invalid(format!(
            "no failed flush of '{}' is recorded in '{}'",
            args.file.display(),
            args.state.display()
        ))
        .into());
    }
    for failed in &cleared {
        if json {
            writeln!(out, "{}", described(failed))?;
        } else if !args.quiet {
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
