//! `stratactl`: the control tool.
//!
//! A command connects to the daemon's control socket with a [`client::Client`], sends what it has
//! to say, and prints the answer for people or, with `--json`, for programs. Only the part of QMP
//! that qemu-storage-daemon has too is used, so that the tool drives that one as well.
//!
//! - [`client`]: the wire: greeting, commands, events;
//! - `args`: the words of the command line;
//! - `commands`: what each command sends and prints;
//! - `tracker`: what is known of running jobs, from polls and events;
//! - `watch`: showing it until they end;
//! - `jobs`: asking for jobs, and their table;
//! - `info`: the overview with its trees of layers;
//! - `send`: commands whose answers say nothing;
//! - `resize`: another size for a disk;
//! - `runtime`: nodes and exports that come and go;
//! - `image`: tools for image files, which need no daemon;
//! - `units`: sizes, rates and times as people write them.

mod args;
pub mod client;
mod commands;
mod image;
mod info;
mod jobs;
mod names;
mod resize;
mod runtime;
mod send;
mod snapshot;
mod stats;
mod table;
mod tracker;
mod units;
mod watch;

use client::{ClientError, QmpError};
use std::ffi::OsString;
use std::io::{self, Write};

/// Exit code: done.
pub const EXIT_OK: u8 = 0;
/// Exit code: the daemon answered an error.
pub const EXIT_ANSWER: u8 = 1;
/// Exit code: wrong options.
pub const EXIT_USAGE: u8 = 2;
/// Exit code: no connection to the daemon, or none any more.
pub const EXIT_CONNECTION: u8 = 3;
/// Exit code: the job that was waited for failed or was cancelled.
pub const EXIT_JOB: u8 = 4;

/// Why a command ended without success.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Client(#[from] ClientError),
    /// An operation on an image file failed.
    #[error("{error}")]
    Image {
        error: crate::error::Error,
        code: u8,
    },
    /// The outcome has been told; this is the exit code that goes with it.
    #[error("exit code {0}")]
    Outcome(u8),
    /// Already told to the user as the job's outcome.
    #[error("a job failed or was cancelled")]
    Job,
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

impl From<crate::error::Error> for Failure {
    fn from(error: crate::error::Error) -> Self {
        Failure::Image {
            error,
            code: EXIT_ANSWER,
        }
    }
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) => EXIT_USAGE,
            Failure::Client(ClientError::Answer(_)) => EXIT_ANSWER,
            Failure::Client(_) => EXIT_CONNECTION,
            Failure::Image { code, .. } | Failure::Outcome(code) => *code,
            Failure::Job => EXIT_JOB,
            // The reader has gone, as `head` does: nothing is wrong with the daemon.
            Failure::Output(_) => EXIT_ANSWER,
        }
    }
}

/// Runs the program with its arguments, the first being its own name, and returns its exit code.
pub fn run<I, T>(args: I) -> u8
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let cli = match args::parse(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to standard output and is no error; clap knows which is which.
            let code = if error.use_stderr() {
                EXIT_USAGE
            } else {
                EXIT_OK
            };
            let _ = error.print();
            return code;
        }
    };
    let json = cli.json;
    let mut out = io::stdout().lock();
    let result = commands::execute(cli, &mut out).and_then(|()| Ok(out.flush()?));
    match result {
        Ok(()) => EXIT_OK,
        Err(failure) => {
            report(&failure, json);
            failure.exit_code()
        }
    }
}

fn report(failure: &Failure, json: bool) {
    let quiet = match failure {
        Failure::Job | Failure::Outcome(_) => true,
        Failure::Output(error) => error.kind() == io::ErrorKind::BrokenPipe,
        _ => false,
    };
    if quiet {
        return;
    }
    // Nothing can be done about a standard error that is closed.
    let mut err = io::stderr().lock();
    let _ = if json {
        let class = match failure {
            Failure::Client(ClientError::Answer(QmpError { class, .. })) => class.as_str(),
            Failure::Client(_) => "ConnectionError",
            _ => "GenericError",
        };
        let error = serde_json::json!({"error": {"class": class, "desc": failure.to_string()}});
        writeln!(err, "{error}")
    } else {
        writeln!(err, "stratactl: {failure}")
    };
}
