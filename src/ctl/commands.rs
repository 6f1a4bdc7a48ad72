//! What each command sends, and how its answer is printed.

use super::args::{Cli, Command, CommitArgs, JobArgs, SOCKET_VARIABLE, StreamArgs};
use super::client::Client;
use super::names::free_name;
use super::resize::resize;
use super::send::send;
use super::tracker::Tracker;
use super::watch::watch;
use super::{Failure, image, info, jobs, runtime, snapshot, stats};
use crate::options::is_well_formed_id;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

/// Connects and carries out the command.
pub fn execute(cli: Cli, out: &mut dyn Write) -> Result<(), Failure> {
    if let Command::Image(args) = cli.command {
        return image::execute(args, cli.json, out);
    }
    let socket = socket_path(&cli)?;
    let mut client = Client::connect(&socket, cli.timeout())?;
    let json = cli.json;
    let client = &mut client;
    match cli.command {
        Command::Jobs { watch: false } => jobs::list(client, json, out),
        Command::Jobs { watch: true } => {
            let tracker = Tracker::new(None, Instant::now());
            watch(client, tracker, false, json, out)
        }
        Command::Stream(args) => {
            let own = stream_arguments(&args);
            let start = Start {
                command: "block-stream",
                device: &args.device,
                options: &args.job,
                complete: false,
            };
            begin(client, start, own, json, out)
        }
        Command::Commit(args) => {
            let own = commit_arguments(&args);
            let start = Start {
                command: "block-commit",
                device: &args.device,
                options: &args.job,
                complete: args.complete,
            };
            begin(client, start, own, json, out)
        }
        Command::Snapshot(args) => snapshot::snapshot(client, &args, json, out),
        Command::Speed { job, rate } => send(
            client,
            "block-job-set-speed",
            json!({"device": job, "speed": rate}),
            json,
            out,
        ),
        Command::Pause { job } => send(client, "job-pause", json!({"id": job}), json, out),
        Command::Resume { job } => send(client, "job-resume", json!({"id": job}), json, out),
        Command::Cancel { job, force } => {
            let arguments = json!({"device": job, "force": force});
            send(client, "block-job-cancel", arguments, json, out)?;
            jobs::wait_for_end(client, &job)
        }
        Command::Complete { job } => send(client, "job-complete", json!({"id": job}), json, out),
        Command::Finalize { job } => send(client, "job-finalize", json!({"id": job}), json, out),
        Command::Dismiss { job } => send(client, "job-dismiss", json!({"id": job}), json, out),
        Command::ClearSyncError { device } => {
            let arguments = json!({"device": device});
            send(client, "x-clear-sync-error", arguments, json, out)
        }
        Command::Resize(args) => resize(client, &args, json, out),
        Command::Node(command) => runtime::node(client, command, json, out),
        Command::Export(command) => runtime::export(client, command, json, out),
        Command::Info => info::show(client, json, out),
        Command::Stats => stats::show(client, json, out),
        Command::Qmp { command, arguments } => {
            let result = client.execute(&command, arguments.unwrap_or(Value::Null))?;
            if json {
                writeln!(out, "{result}")?
            } else {
                writeln!(out, "{result:#}")?
            }
            Ok(())
        }
        Command::Hmp { line } => human(client, &line, json, out),
        // Done above, before there was a daemon to talk to.
        Command::Image(_) => Ok(()),
        Command::Quit => send(client, "quit", Value::Null, json, out),
    }
}

fn socket_path(cli: &Cli) -> Result<PathBuf, Failure> {
    let variable = || std::env::var_os(SOCKET_VARIABLE).filter(|path| !path.is_empty());
    cli.socket
        .clone()
        .or_else(|| variable().map(PathBuf::from))
        .ok_or_else(|| {
            Failure::Usage(format!(
                "which daemon? Give its control socket with --socket or in {SOCKET_VARIABLE}"
            ))
        })
}

fn human(
    client: &mut Client,
    line: &[String],
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let arguments = json!({"command-line": line.join(" ")});
    let result = client.execute("human-monitor-command", arguments)?;
    match result.as_str() {
        Some(text) if !json => {
            // The text has line ends of the wire's kind, and perhaps none at its end.
            for line in text.lines() {
                writeln!(out, "{line}")?;
            }
        }
        _ => writeln!(out, "{result}")?,
    }
    Ok(())
}

/// How a job begins.
struct Start<'a> {
    command: &'static str,
    device: &'a str,
    options: &'a JobArgs,
    /// It is completed when it is ready, and waited for.
    complete: bool,
}

/// Starts a job by a command with arguments of its own, and waits for its end if that is wanted.
fn begin(
    client: &mut Client,
    start: Start<'_>,
    mut arguments: Map<String, Value>,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let Start {
        device, options, ..
    } = start;
    // Always with a name for the job: it is the one to wait for.
    let job = match &options.job_id {
        Some(id) => id.clone(),
        None => job_id(client, device)?,
    };
    arguments.insert("device".to_owned(), json!(device));
    arguments.insert("job-id".to_owned(), json!(job));
    arguments.extend(job_arguments(options));
    // What came before the answer to this tells of other jobs, of the same name perhaps: a daemon
    // that was restarted tells how jobs of the one before ended.
    client.execute("query-version", Value::Null)?;
    client.queued_events();
    let began = Instant::now();
    client.execute(start.command, Value::Object(arguments))?;
    if options.wait || start.complete {
        let tracker = Tracker::new(Some(&job), began);
        return watch(client, tracker, start.complete, json, out);
    }
    if json {
        writeln!(out, "{}", json!({"job": job}))?;
    } else {
        writeln!(out, "job '{job}' started")?;
    }
    Ok(())
}

/// A name for a job on `device`: the same, where a job can have it. A node that nobody gave a name
/// has one that no job can have (`#block002`): its export's is taken then, or what is left of it.
fn job_id(client: &mut Client, device: &str) -> Result<String, Failure> {
    if is_well_formed_id(device) {
        return Ok(device.to_owned());
    }
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let list = |value: Value| value.as_array().cloned().unwrap_or_default();
    let exports = list(client.execute("query-block-exports", Value::Null)?);
    let export = exports
        .iter()
        .find(|export| text(export, "node-name").as_deref() == Some(device))
        .and_then(|export| text(export, "id"));
    if let Some(id) = export.filter(|id| is_well_formed_id(id)) {
        return Ok(id);
    }
    let jobs = list(client.execute("query-jobs", Value::Null)?);
    let taken = jobs.iter().filter_map(|job| text(job, "id")).collect();
    Ok(free_name(device, "job-", &taken))
}

/// The members that have a text.
fn texts<const N: usize>(members: [(&str, Option<&str>); N]) -> Map<String, Value> {
    let members = members.into_iter();
    let given = members.filter_map(|(key, text)| Some((key.to_owned(), json!(text?))));
    given.collect()
}

fn commit_arguments(args: &CommitArgs) -> Map<String, Value> {
    texts([
        ("top", args.top.as_deref()),
        ("top-node", args.top_node.as_deref()),
        ("base", args.base.as_deref()),
        ("base-node", args.base_node.as_deref()),
        ("backing-file", args.backing_file.as_deref()),
    ])
}

fn stream_arguments(args: &StreamArgs) -> Map<String, Value> {
    let mut map = texts([
        ("base", args.base.as_deref()),
        ("base-node", args.base_node.as_deref()),
        ("bottom", args.bottom.as_deref()),
        ("backing-file", args.backing_file.as_deref()),
    ]);
    if args.compress {
        map.insert("compress".to_owned(), json!(true));
    }
    map
}

fn job_arguments(args: &JobArgs) -> Map<String, Value> {
    let mut map = texts([("on-error", args.on_error.map(|action| action.word()))]);
    if let Some(speed) = args.speed {
        map.insert("speed".to_owned(), json!(speed));
    }
    for (key, off) in [
        ("auto-finalize", args.no_auto_finalize),
        ("auto-dismiss", args.no_auto_dismiss),
    ] {
        if off {
            map.insert(key.to_owned(), json!(false));
        }
    }
    map
}
