//! The words of `stratactl`'s command line.

use super::image::ImageArgs;
use super::resize::ResizeArgs;
use super::units::parse_rate;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::Value;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// The variable that stands in for `--socket`.
pub const SOCKET_VARIABLE: &str = "STRATABLK_QMP";

/// Heading of the options that every command has.
const CONNECTION: &str = "With every command";

const AFTER_HELP: &str = "\
RATE is in bytes per second: 512K, 20M, 1G (powers of 1024), or 0 or 'unlimited' for no limit.

Exit codes:
  0  done
  1  the daemon answered with an error, or an image could not be worked on
  2  wrong options
  3  cannot connect, or the connection was lost
  4  a job that was waited for (--wait, --watch) failed or was cancelled

Examples:
  export STRATABLK_QMP=/run/vm1.qmp
  stratactl info                            what is served, with its layers
  stratactl stream disk0 --speed 20M        copy the layers below into the image, slowly
  stratactl jobs --watch                    look on, until all is done
  stratactl speed disk0 unlimited           now fast
  stratactl resize disk0 +10G               more room for the guest
  stratactl stream disk0 --base golden.raw --wait   keep golden.raw below, take in the rest
  stratactl image create -f qcow2 disk.qcow2 20G    a new image (see 'image --help')
  stratactl qmp query-named-block-nodes '{\"flat\": true}'";

/// Controls a running stratablk over its control socket, and works on image files
#[derive(Debug, Parser)]
#[command(name = "stratactl", version, after_help = AFTER_HELP, infer_subcommands = true)]
pub struct Cli {
    /// The daemon's control socket [default: the variable STRATABLK_QMP]
    #[arg(short, long, global = true, value_name = "PATH", help_heading = CONNECTION)]
    pub socket: Option<PathBuf>,

    /// Print JSON, one value a line; errors too, on standard error
    #[arg(long, global = true, help_heading = CONNECTION)]
    pub json: bool,

    /// Longest time to wait for an answer, in seconds; 0 is for ever
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 60,
          help_heading = CONNECTION)]
    pub timeout: u32,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// The longest wait for an answer.
    pub fn timeout(&self) -> Option<Duration> {
        (self.timeout > 0).then(|| Duration::from_secs(self.timeout.into()))
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the jobs
    Jobs {
        /// Show their progress until all have ended
        #[arg(short, long)]
        watch: bool,
    },
    /// Copy data from the layers below into an image while the guest runs
    Stream(StreamArgs),
    /// Copy what layers hold into the image under them while the guest runs
    Commit(CommitArgs),
    /// Put new images on top of disks, of all at one instant, while the guests run
    Snapshot(SnapshotArgs),
    /// Limit the speed of a job
    Speed {
        /// The job
        job: String,
        /// Bytes per second
        #[arg(value_parser = parse_rate)]
        rate: u64,
    },
    /// Halt a job
    Pause {
        /// The job
        job: String,
    },
    /// Let a paused job go on
    Resume {
        /// The job
        job: String,
    },
    /// End a job. What it copied is kept, and a new job goes on from there
    Cancel {
        /// The job
        job: String,
        /// Do not wait for a job that is ready to complete
        #[arg(long)]
        force: bool,
    },
    /// Complete a job that is ready
    Complete {
        /// The job
        job: String,
    },
    /// Make the outcome of a pending job effective (--no-auto-finalize)
    Finalize {
        /// The job
        job: String,
    },
    /// Remove an ended job from the list (--no-auto-dismiss)
    Dismiss {
        /// The job
        job: String,
    },
    /// Let flushes be tried again after one has failed
    ///
    /// What was written since the last good one may be lost: check the image first.
    ClearSyncError {
        /// The export or node
        device: String,
    },
    /// Give a disk another size while its guest runs, which sees it at once
    Resize(ResizeArgs),
    /// Add, remove and list nodes
    #[command(subcommand)]
    Node(NodeCommand),
    /// Add, remove and list exports
    #[command(subcommand)]
    Export(ExportCommand),
    /// Show the version, the exports with their layers, and the jobs
    Info,
    /// Show what guests have read and written, and how their queues waited for it
    Stats,
    /// Send any QMP command and print what it returns
    Qmp {
        /// The command's name
        command: String,
        /// Its arguments, a JSON object
        #[arg(value_parser = parse_object)]
        arguments: Option<Value>,
    },
    /// Send a line for people (human-monitor-command) and print the answer
    Hmp {
        /// The words of the line
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        line: Vec<String>,
    },
    /// Make, describe and change image files. No daemon is needed
    Image(ImageArgs),
    /// End the daemon
    Quit,
}

/// What to do with nodes.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Open a node
    Add {
        /// As for stratablk's --blockdev: [driver=]DRIVER,node-name=NAME[,...], or a JSON object
        options: String,
    },
    /// Remove a node that nothing uses, and the nodes without names under it
    Del {
        /// The node
        node: String,
    },
    /// List all nodes
    List,
}

/// What to do with exports.
#[derive(Debug, Subcommand)]
pub enum ExportCommand {
    /// Make an export
    Add {
        /// As for stratablk's --export: [type=]vhost-user-blk,id=NAME,node-name=NODE,
        /// addr.type=unix,addr.path=PATH[,...], or a JSON object
        options: String,
    },
    /// Remove an export that no virtual machine is connected to
    Del {
        /// The export
        export: String,
        /// Remove it in any case, and hang up on the virtual machine
        #[arg(long)]
        force: bool,
    },
    /// List all exports
    List,
}

/// Options of all commands that start a job on a disk.
#[derive(Debug, Args)]
pub struct JobArgs {
    /// Bytes per second
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub speed: Option<u64>,
    /// The job's name [default: DEVICE, or made from it where no job can have that name]
    #[arg(long, value_name = "NAME")]
    pub job_id: Option<String>,
    /// What to do when data cannot be read or written
    #[arg(long, value_enum, value_name = "ACTION")]
    pub on_error: Option<OnError>,
    /// Stay pending at the end until 'finalize'
    #[arg(long)]
    pub no_auto_finalize: bool,
    /// Stay in the list after the end until 'dismiss'
    #[arg(long)]
    pub no_auto_dismiss: bool,
    /// Show the progress and return when the job has ended. It goes on when this is interrupted
    #[arg(short, long)]
    pub wait: bool,
}

/// Options of `stream`.
#[derive(Debug, Args)]
pub struct StreamArgs {
    /// The export or node to copy into
    pub device: String,
    /// Stop above the layer in this file, which stays as the backing file. As it is written in
    /// the image above it
    #[arg(long, value_name = "FILE", group = "until")]
    pub base: Option<String>,
    /// Stop above this node
    #[arg(long, value_name = "NODE", group = "until")]
    pub base_node: Option<String>,
    /// Copy from this node and those above it only
    #[arg(long, value_name = "NODE", group = "until")]
    pub bottom: Option<String>,
    /// The name of the base to write into the image
    #[arg(long, value_name = "NAME", requires = "until")]
    pub backing_file: Option<String>,
    /// Compress what is copied, where that makes it smaller
    #[arg(long)]
    pub compress: bool,
    /// What jobs have in common.
    #[command(flatten)]
    pub job: JobArgs,
}

/// Options of `commit`.
#[derive(Debug, Args)]
pub struct CommitArgs {
    /// The export or node in whose chain the layers are
    pub device: String,
    /// The first of the layers, by its file [default: the guest's own; the job is ready when all is
    /// copied, and 'complete' puts the guest on the base]
    #[arg(long, value_name = "FILE", group = "from")]
    pub top: Option<String>,
    /// The first of the layers, by its node
    #[arg(long, value_name = "NODE", group = "from")]
    pub top_node: Option<String>,
    /// Where it goes, by its file [default: the last layer of the chain]
    #[arg(long, value_name = "FILE", group = "into")]
    pub base: Option<String>,
    /// Where it goes, by its node
    #[arg(long, value_name = "NODE", group = "into")]
    pub base_node: Option<String>,
    /// The name of the base to write into the image over the layers
    #[arg(long, value_name = "NAME", requires = "from")]
    pub backing_file: Option<String>,
    /// Wait, and put the guest on the base as soon as the base has all
    #[arg(long, conflicts_with = "from")]
    pub complete: bool,
    /// What jobs have in common.
    #[command(flatten)]
    pub job: JobArgs,
}

/// Options of `snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// An export or node, and the image that is made and that its guest writes from then on; with
    /// --internal and --delete DEVICE alone
    #[arg(required = true, value_name = "DEVICE=FILE")]
    pub disks: Vec<String>,
    /// The images are there already; each names the disk's present one as its backing file
    #[arg(long, conflicts_with_all = ["internal", "delete"])]
    pub existing: bool,
    /// The name of the new node. For one disk only
    #[arg(long, value_name = "NAME", conflicts_with_all = ["internal", "delete"])]
    pub node_name: Option<String>,
    /// Keep the snapshot inside the disks' qcow2 images, under this name
    #[arg(long, value_name = "NAME", conflicts_with = "delete")]
    pub internal: Option<String>,
    /// Remove the snapshot of this name from inside the images
    #[arg(long, value_name = "NAME")]
    pub delete: Option<String>,
}

/// What a job does about errors.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum OnError {
    /// End with the error (the default)
    Report,
    /// Go on, and end with the error
    Ignore,
    /// Pause; 'resume' tries again
    Stop,
    /// Pause when space ran out, else end with the error
    Enospc,
}

impl OnError {
    /// QMP's word for it.
    pub fn word(self) -> &'static str {
        match self {
            OnError::Report => "report",
            OnError::Ignore => "ignore",
            OnError::Stop => "stop",
            OnError::Enospc => "enospc",
        }
    }
}

/// Reads the arguments, the first being the program's own name.
pub fn parse<I, T>(args: I) -> Result<Cli, clap::Error>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    Cli::try_parse_from(args)
}

fn parse_object(text: &str) -> Result<Value, String> {
    match serde_json::from_str(text) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err("expected a JSON object such as '{\"device\": \"disk0\"}'".to_owned()),
        Err(error) => Err(format!("invalid JSON: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// Would catch options that clash, which clap finds only when they are used.
    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }

    /// Would catch wrong options that are sent to the daemon all the same.
    #[test]
    fn wrong_options() {
        for args in [
            &["stream"][..],
            &["stream", "d", "--base", "x", "--base-node", "y"],
            &["stream", "d", "--backing-file", "x"],
            &["stream", "d", "--on-error", "panic"],
            &["stream", "d", "--speed", "-1"],
            &["commit"],
            &["commit", "d", "--top", "x", "--top-node", "y"],
            &["commit", "d", "--base", "x", "--base-node", "y"],
            &["commit", "d", "--backing-file", "x"],
            &["commit", "d", "--top", "x", "--complete"],
            &["snapshot"],
            &["snapshot", "d", "--internal", "x", "--delete", "x"],
            &["snapshot", "d=f", "--internal", "x", "--existing"],
            &["speed", "j", "fast"],
            &["speed", "j"],
            &["clear-sync-error"],
            &["qmp", "x", "[1]"],
            &["hmp"],
            &["nonsense"],
            &[],
        ] {
            let error = parse(std::iter::once("stratactl").chain(args.iter().copied()))
                .expect_err(&format!("{args:?}"));
            assert!(error.use_stderr(), "{args:?}");
        }
    }
}
