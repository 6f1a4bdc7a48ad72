//! From the command line to a configuration.
//!
//! [`parse`] turns the program's arguments into an [`Action`]; it opens nothing and changes
//! nothing. Two dialects are understood and can be mixed:
//!
//! - the conventions of vhost-user back-ends (`--socket-path`, `--blk-file`, ...), which describe
//!   one disk and are translated into the lists of the other dialect;
//! - qemu-storage-daemon's `--blockdev`, `--export`, `--chardev`, `--monitor`, `--object`.
//!
//! How structured options are written and read is the part of [`crate::options`].
//!
//! What comes out of [`parse`] hangs together: names are unique and whatever is referred to has
//! been defined. Whether files exist and can be opened is for the daemon to find out.

mod args;
mod check;
mod disk;
mod help;

use crate::graph::Allowed;
use crate::options::{
    BlockdevOptions, ChardevOptions, ExportOptions, MonitorOptions, ObjectOptions, TraceOptions,
};
use crate::state::StateOptions;
pub use args::parse;
use std::path::PathBuf;
use std::time::Duration;

/// What `--print-capabilities` prints, as the vhost-user conventions want it.
pub const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

/// What the program was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Serve.
    Run(Box<Config>),
    /// Print [`CAPABILITIES`] and exit with 0.
    PrintCapabilities,
    /// Print this text and exit with 0.
    Help(String),
    /// Print [`version_line`] and exit with 0.
    Version,
}

/// Everything the daemon sets up at its start, in the order in which it is to be done:
/// objects, character devices, nodes, exports, monitors.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// Helper objects.
    pub objects: Vec<ObjectOptions>,
    /// Sockets for monitors.
    pub chardevs: Vec<ChardevOptions>,
    /// Nodes; one that refers to another by name comes after it.
    pub blockdevs: Vec<BlockdevOptions>,
    /// Devices for front-ends.
    pub exports: Vec<ExportOptions>,
    /// Control sockets.
    pub monitors: Vec<MonitorOptions>,
    /// What the headers of images may name besides local image files.
    pub allow_backing: Allowed,
    /// Written when all is set up, removed at exit.
    pub pidfile: Option<PathBuf>,
    /// Folder on a tmpfs in which the journals of images are kept.
    pub journal: Option<PathBuf>,
    /// Bytes of each journal, if that was said.
    pub journal_size: Option<u64>,
    /// Go to the background when all is set up.
    pub daemonize: bool,
    /// How long to wait for the end of a killed process's I/O.
    pub fence_timeout: Duration,
    /// What to log.
    pub trace: Vec<TraceOptions>,
    /// How long the end may take before what is left is abandoned, if that was said.
    pub stop_timeout: Option<Duration>,
    /// Where to record what is to outlive the process.
    pub state: Option<StateOptions>,
}

impl Config {
    /// The control sockets, each monitor with the character device that carries it.
    pub fn monitor_sockets(&self) -> impl Iterator<Item = (&MonitorOptions, &ChardevOptions)> {
        self.monitors.iter().filter_map(|monitor| {
            let chardev = self
                .chardevs
                .iter()
                .find(|chardev| chardev.id == monitor.chardev)?;
            Some((monitor, chardev))
        })
    }
}

/// The answer to `--version`.
pub fn version_line() -> String {
    format!("stratablk {}", env!("CARGO_PKG_VERSION"))
}
