//! The words of the command line themselves.
//!
//! clap splits the line, says what an option is for and finds misspelt ones; the values of the
//! structured options are read here with [`keyval`] or as JSON.

use super::disk::{self, DiskArgs};
use super::{Action, Config, check, help};
use crate::graph::Allowed;
use crate::options::keyval::Notation;
use crate::options::{
    BlockdevOptions, ChardevOptions, ConfigError, Dialect, ExportOptions, MonitorOptions,
    ObjectOptions, TraceOptions, is_well_formed_id, read_text, size,
};
use crate::state::StateOptions;
use clap::error::ErrorKind as ClapKind;
use clap::{CommandFactory, FromArgMatches, Parser};
use serde_json::Value;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// The options in clap's terms.
#[derive(Debug, Parser)]
#[command(
    name = "stratablk",
    version,
    about = "Serves layered disk images to virtual machines over vhost-user, and streams them \
             together while the guest runs",
    infer_long_args = true,
    disable_help_flag = true,
    disable_version_flag = true,
    override_usage = "stratablk --socket-path=PATH --blk-file=PATH [--qmp PATH] [OPTIONS]\n       \
                      stratablk --blockdev ... --export ... [--chardev ... --monitor ...] [OPTIONS]",
    after_help = "'--help' says more about each option, and shows examples.",
    after_long_help = help::DETAILS
)]
struct Args {
    #[command(flatten)]
    disk: DiskArgs,

    /// Control socket to listen on (QMP). Short for a --chardev and a --monitor; may be given
    /// several times
    #[arg(long, value_name = "PATH", help_heading = help::CONTROL)]
    qmp: Vec<PathBuf>,

    /// Socket for a monitor: socket,id=NAME,path=PATH,server=on,wait=off
    #[arg(long, value_name = "OPTIONS", help_heading = help::CONTROL)]
    chardev: Vec<String>,

    /// Control socket on a --chardev: [chardev=]NAME[,mode=control][,pretty=on|off]
    #[arg(long, value_name = "OPTIONS", help_heading = help::CONTROL)]
    monitor: Vec<String>,

    /// Block node: [driver=]DRIVER,node-name=NAME[,...], or a JSON object
    #[arg(long, value_name = "OPTIONS", help_heading = help::NODES)]
    blockdev: Vec<String>,

    /// Device for a virtual machine: [type=]vhost-user-blk,id=NAME,node-name=NODE,
    /// addr.type=unix,addr.path=PATH[,writable=on][,...]
    #[arg(long, value_name = "OPTIONS", help_heading = help::NODES)]
    export: Vec<String>,

    /// Let the headers of images name backing files of this driver, too ('blkdebug:CONFIG:FILE'); may
    /// be given several times. For tests: a header may come from a guest
    #[arg(long, value_name = "DRIVER", help_heading = help::NODES)]
    allow_backing: Vec<String>,

    /// Helper object: [qom-type=]iothread,id=NAME
    #[arg(long, value_name = "OPTIONS", help_heading = help::NODES)]
    object: Vec<String>,

    /// Not supported: there is no NBD server
    #[arg(long, value_name = "OPTIONS", hide = true)]
    nbd_server: Option<String>,

    /// Record jobs, chains and failed flushes in this folder, so that the next process goes on with
    /// them. On a disk, not in memory; it must exist
    #[arg(long, value_name = "DIR", help_heading = help::PROCESS)]
    state: Option<PathBuf>,

    /// What the daemon's own file in the --state folder is called; daemons that share a folder
    /// need names of their own [default: the first export's id]
    #[arg(long, value_name = "NAME", requires = "state", help_heading = help::PROCESS)]
    state_name: Option<String>,

    /// Write the process id to this file when all is ready; removed at exit
    #[arg(long, value_name = "PATH", help_heading = help::PROCESS)]
    pidfile: Option<PathBuf>,

    /// Folder on a tmpfs for journals: writes that have completed outlive the daemon, however it
    /// ends. The daemon that is started next needs the same folder
    #[arg(long, value_name = "DIR", help_heading = help::PROCESS)]
    journal: Option<PathBuf>,

    /// Size of the journal of each image that is written, a power of two from 256K to 1G [default:
    /// 256K to 4M, by the size of the image]
    #[arg(long, value_name = "SIZE", requires = "journal", help_heading = help::PROCESS)]
    journal_size: Option<String>,

    /// Go to the background when all is ready. The starting command then exits with 0, or with
    /// 1 when something failed
    #[arg(long, help_heading = help::PROCESS)]
    daemonize: bool,

    /// How long the end may take before what does not end is abandoned; guests' requests and jobs,
    /// and disks that did not answer before, have an eighth of it [default: 72]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..),
          help_heading = help::PROCESS)]
    stop_timeout: Option<u32>,

    /// How long to wait at the start until the I/O of a killed process that served the same
    /// socket has ended
    #[arg(long, value_name = "SECONDS", help_heading = help::PROCESS, default_value_t = 30)]
    fence_timeout: u32,

    /// What to log: [[enable=]PATTERN][,events=FILE][,file=FILE]
    #[arg(short = 'T', long, value_name = "OPTIONS", help_heading = help::PROCESS)]
    trace: Vec<String>,

    /// Print this text (-h: in short) and exit
    #[arg(short, long, action = clap::ArgAction::Help, help_heading = help::PROCESS)]
    help: Option<bool>,

    /// Print the version and exit
    #[arg(short = 'V', long, action = clap::ArgAction::Version, help_heading = help::PROCESS)]
    version: Option<bool>,

    /// Print what this program can do, as the vhost-user conventions define it, and exit. All
    /// other options are ignored
    #[arg(long, help_heading = help::PROCESS)]
    print_capabilities: bool,
}

/// Reads the arguments; the first one is the program's own name.
pub fn parse<I, T>(args: I) -> Result<Action, ConfigError>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString>,
{
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    // Before anything else: the rest of the line need not even be well formed.
    if args.iter().skip(1).any(|arg| arg == "--print-capabilities") {
        return Ok(Action::PrintCapabilities);
    }
    if args.len() < 2 {
        return Err(ConfigError::other(
            "nothing to serve: give --socket-path and --blk-file, or --blockdev and --export \
             (see --help)",
        ));
    }
    let parsed = Args::command()
        .try_get_matches_from(&args)
        .and_then(|matches| Args::from_arg_matches(&matches));
    match parsed {
        Ok(args) => to_action(&args),
        Err(error) => match error.kind() {
            ClapKind::DisplayHelp => {
                let mut text = error.render().to_string();
                text.truncate(text.trim_end().len());
                text.push('\n');
                Ok(Action::Help(text))
            }
            ClapKind::DisplayVersion => Ok(Action::Version),
            _ => Err(from_clap(&error)),
        },
    }
}

/// clap's message on one line, without its frame.
fn from_clap(error: &clap::Error) -> ConfigError {
    let rendered = error.render().to_string();
    let mut parts = Vec::new();
    for line in rendered
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
    {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        parts.push(line.strip_prefix("error: ").unwrap_or(line));
    }
    ConfigError::other(format!(
        "{} (see --help)",
        parts.join("; ").replace(":; ", ": ")
    ))
}

fn to_action(args: &Args) -> Result<Action, ConfigError> {
    if let Some(text) = requested_help(args) {
        return Ok(Action::Help(text.to_owned()));
    }
    if args.print_capabilities {
        return Ok(Action::PrintCapabilities);
    }
    if args.nbd_server.is_some() {
        return Err(ConfigError::other(
            "--nbd-server: exports over NBD are not supported",
        ));
    }
    let journal_size = match &args.journal_size {
        None => None,
        Some(text) => Some(size::parse(text).ok_or_else(|| {
            ConfigError::other(format!(
                "--journal-size: '{text}' is no size (expected {})",
                size::EXPECTED
            ))
        })?),
    };
    let mut config = Config {
        objects: read_all("--object", &args.object, OBJECT, ObjectOptions::from_value)?,
        chardevs: read_all(
            "--chardev",
            &args.chardev,
            CHARDEV,
            ChardevOptions::from_value,
        )?,
        blockdevs: read_all(
            "--blockdev",
            &args.blockdev,
            BLOCKDEV,
            BlockdevOptions::from_value,
        )?,
        exports: read_all("--export", &args.export, EXPORT, ExportOptions::from_value)?,
        monitors: read_all(
            "--monitor",
            &args.monitor,
            MONITOR,
            MonitorOptions::from_value,
        )?,
        allow_backing: allowed_backing(&args.allow_backing)?,
        pidfile: args.pidfile.clone(),
        journal: args.journal.clone(),
        journal_size,
        daemonize: args.daemonize,
        fence_timeout: Duration::from_secs(args.fence_timeout.into()),
        trace: read_all("--trace", &args.trace, TRACE, TraceOptions::from_value)?,
        stop_timeout: args.stop_timeout.map(|s| Duration::from_secs(s.into())),
        state: None,
    };
    disk::add_disk(&mut config, &args.disk)?;
    config.state = state_options(args, &config)?;
    disk::add_control_sockets(&mut config, &args.qmp)?;
    check::check(&config)?;
    Ok(Action::Run(Box::new(config)))
}

/// What headers may name besides local image files.
fn allowed_backing(drivers: &[String]) -> Result<Allowed, ConfigError> {
    drivers
        .iter()
        .try_fold(Allowed::default(), |allowed, driver| {
            allowed.with(driver).ok_or_else(|| {
                let expected = format!("one of: {}", Allowed::DRIVERS.join(", "));
                ConfigError::bad_value("--allow-backing", driver, expected)
            })
        })
}

/// Where the state is recorded. It is called after the first export, which the supervisor's options
/// name in any case.
fn state_options(args: &Args, config: &Config) -> Result<Option<StateOptions>, ConfigError> {
    let Some(dir) = &args.state else {
        return Ok(None);
    };
    let name = match (&args.state_name, config.exports.first()) {
        (Some(name), _) if !is_well_formed_id(name) => {
            let expected = "letters, digits, '-', '.' and '_', beginning with a letter";
            return Err(ConfigError::bad_value("--state-name", name, expected));
        }
        (Some(name), _) => name.clone(),
        (None, Some(export)) => export.id.clone(),
        (None, None) => {
            let text = "--state: without an export, give the state a name (--state-name)";
            return Err(ConfigError::other(text));
        }
    };
    Ok(Some(StateOptions {
        dir: dir.clone(),
        name,
    }))
}

const BLOCKDEV: Notation = Notation::implied("driver");
const EXPORT: Notation = Notation::implied("type");
const OBJECT: Notation = Notation::implied("qom-type");
const TRACE: Notation = Notation::implied("enable");
const MONITOR: Notation = Notation {
    implied_key: Some("chardev"),
    flags: &["pretty"],
};
const CHARDEV: Notation = Notation {
    implied_key: Some("backend"),
    flags: &["server", "wait", "tight", "abstract"],
};

/// Reads every occurrence of one structured option.
fn read_all<T>(
    option: &str,
    texts: &[String],
    notation: Notation,
    from_value: fn(&Value, Dialect) -> Result<T, ConfigError>,
) -> Result<Vec<T>, ConfigError> {
    texts
        .iter()
        .map(|text| {
            read_text(text, notation)
                .and_then(|(value, dialect)| from_value(&value, dialect))
                .map_err(|error| error.in_option(option, text))
        })
        .collect()
}

/// The text for `--object help`, `--export vhost-user-blk,help` and the like.
fn requested_help(args: &Args) -> Option<&'static str> {
    let asks = |texts: &[String]| {
        texts
            .iter()
            .any(|text| text == "help" || text == "?" || text.ends_with(",help"))
    };
    [
        (&args.blockdev, help::BLOCKDEV),
        (&args.export, help::EXPORT),
        (&args.chardev, help::CHARDEV),
        (&args.monitor, help::CHARDEV),
        (&args.object, help::OBJECT),
        (&args.trace, help::TRACE),
    ]
    .into_iter()
    .find(|(texts, _)| asks(texts))
    .map(|(_, help)| help)
}
