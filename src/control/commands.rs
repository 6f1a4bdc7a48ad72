//! What can be asked for: the table of commands, and those that fit in a few lines.

use std::sync::Arc;

use serde_json::{Value, json};

use super::args::{Arg, Args, Kind};
use super::command::{Answer, Command, Control, Done, NEGOTIATE, Returns, command, version};
use super::error::{CommandError, ErrorClass};
use super::exports::with_tops;
use super::nodes::{Nodes, io_status, sync_error};
use super::{blockdev, commit, exports, graph, hmp, objects, schema, snapshot, stats, stream};
use crate::engine::{Engine, Served};
use crate::job::Job;

const CAPABILITIES: Kind = Kind::EnumList("QMPCapability", &["oob"]);
const ON_ERROR: Kind = Kind::Enum(
    "BlockdevOnError",
    &["report", "ignore", "enospc", "stop", "auto"],
);

const NO_ARGS: &[Arg] = &[];
const DEVICE: &[Arg] = &[Arg::required("device", Kind::Str)];
const ID: &[Arg] = &[Arg::required("id", Kind::Str)];
const CANCEL: &[Arg] = &[
    Arg::required("device", Kind::Str),
    Arg::optional("force", Kind::Bool),
];
const SPEED: &[Arg] = &[
    Arg::required("device", Kind::Str),
    Arg::required("speed", Kind::Int),
];
const OLD_SPEED: &[Arg] = &[
    Arg::required("device", Kind::Str),
    Arg::required("value", Kind::Int),
];
const BLOCKDEV: &[Arg] = &[Arg::required("", Kind::Whole("BlockdevOptions"))];
const EXPORT: &[Arg] = &[Arg::required("", Kind::Whole("BlockExportOptions"))];
const REMOVE_MODE: Kind = Kind::Enum("BlockExportRemoveMode", &["safe", "hard"]);
const EXPORT_DEL: &[Arg] = &[
    Arg::required("id", Kind::Str),
    Arg::optional("mode", REMOVE_MODE),
];
const OBJECT: &[Arg] = &[Arg::required("", Kind::Whole("ObjectOptions"))];
const PATH: &[Arg] = &[Arg::required("path", Kind::Str)];
const PROPERTY: &[Arg] = &[
    Arg::required("path", Kind::Str),
    Arg::required("property", Kind::Str),
];
const SET_PROPERTY: &[Arg] = &[
    Arg::required("path", Kind::Str),
    Arg::required("property", Kind::Str),
    Arg::required("value", Kind::Any),
];
const THRESHOLD: &[Arg] = &[
    Arg::required("node-name", Kind::Str),
    Arg::required("write-threshold", Kind::Size),
];
const CREATE: &[Arg] = &[
    Arg::required("job-id", Kind::Str),
    Arg::required("options", Kind::Options("BlockdevCreateOptions")),
];
const BACKING_FILE: &[Arg] = &[
    Arg::required("device", Kind::Str),
    Arg::required("image-node-name", Kind::Str),
    Arg::required("backing-file", Kind::Str),
];
const RESIZE: &[Arg] = &[
    Arg::optional("device", Kind::Str),
    Arg::optional("node-name", Kind::Str),
    Arg::required("size", Kind::Int),
];
const STREAM: &[Arg] = &[
    Arg::optional("job-id", Kind::Str),
    Arg::required("device", Kind::Str),
    Arg::optional("base", Kind::Str),
    Arg::optional("base-node", Kind::Str),
    Arg::optional("backing-file", Kind::Str),
    Arg::optional("backing-mask-protocol", Kind::Bool),
    Arg::optional("bottom", Kind::Str),
    Arg::optional("speed", Kind::Int),
    Arg::optional("on-error", ON_ERROR),
    Arg::optional("filter-node-name", Kind::Str),
    Arg::optional("auto-finalize", Kind::Bool),
    Arg::optional("auto-dismiss", Kind::Bool),
    Arg::optional("compress", Kind::Bool),
];

const COMMIT: &[Arg] = &[
    Arg::optional("job-id", Kind::Str),
    Arg::required("device", Kind::Str),
    Arg::optional("base-node", Kind::Str),
    Arg::optional("base", Kind::Str),
    Arg::optional("top-node", Kind::Str),
    Arg::optional("top", Kind::Str),
    Arg::optional("backing-file", Kind::Str),
    Arg::optional("backing-mask-protocol", Kind::Bool),
    Arg::optional("speed", Kind::Int),
    Arg::optional("on-error", ON_ERROR),
    Arg::optional("filter-node-name", Kind::Str),
    Arg::optional("auto-finalize", Kind::Bool),
    Arg::optional("auto-dismiss", Kind::Bool),
];

/// All commands, in the order in which `query-commands` lists them.
#[rustfmt::skip]
static COMMANDS: &[Command] = &[
    command(NEGOTIATE, &[Arg::optional("enable", CAPABILITIES)], Returns::Nothing, negotiate),
    command("query-version", NO_ARGS, Returns::Of("VersionInfo"), |_, _| Ok(version().into())),
    command("query-commands", NO_ARGS, Returns::Of("[CommandInfo]"), |c, _| Ok(schema::commands(c.commands).into())),
    command("query-qmp-schema", NO_ARGS, Returns::Of("[SchemaInfo]"), |c, _| Ok(schema::schema(c.commands).into())),
    command("quit", NO_ARGS, Returns::Nothing, |_, _| Ok(Answer { value: json!({}), quit: true })),
    command("human-monitor-command",
        &[Arg::required("command-line", Kind::Str), Arg::optional("cpu-index", Kind::Int)],
        Returns::Text, hmp::human_monitor_command),
    command("query-named-block-nodes", &[Arg::optional("flat", Kind::Bool)],
        Returns::Of("[BlockDeviceInfo]"), query_named_block_nodes),
    command("query-block-exports", NO_ARGS, Returns::Of("[BlockExportInfo]"), exports::query),
    command("block-export-add", EXPORT, Returns::Nothing, exports::add),
    command("block-export-del", EXPORT_DEL, Returns::Nothing, exports::del),
    command("blockdev-add", BLOCKDEV, Returns::Nothing, blockdev::blockdev_add),
    command("blockdev-del", &[Arg::required("node-name", Kind::Str)], Returns::Nothing,
        blockdev::blockdev_del),
    command("block-set-write-threshold", THRESHOLD, Returns::Nothing, blockdev::set_write_threshold),
    command("query-block", NO_ARGS, Returns::Of("[BlockInfo]"), query_block),
    command("x-debug-query-block-graph", NO_ARGS, Returns::Of("XDbgBlockGraph"), graph::query),
    command("query-blockstats", &[Arg::optional("query-nodes", Kind::Bool)], Returns::Of("[BlockStats]"), query_blockstats),
    command("object-add", OBJECT, Returns::Nothing, objects::add),
    command("object-del", ID, Returns::Nothing, objects::del),
    command("query-iothreads", NO_ARGS, Returns::Of("[IOThreadInfo]"), objects::query_iothreads),
    command("qom-list", PATH, Returns::Of("[ObjectPropertyInfo]"), objects::list),
    command("qom-get", PROPERTY, Returns::Any, objects::get),
    command("qom-set", SET_PROPERTY, Returns::Nothing, objects::set),
    command("query-block-jobs", NO_ARGS, Returns::BlockJobs, query_block_jobs),
    command("query-jobs", NO_ARGS, Returns::Of("[JobInfo]"), query_jobs),
    command("blockdev-reopen",
        &[Arg::required("options", Kind::OptionsList("BlockdevOptions"))],
        Returns::Nothing, blockdev::blockdev_reopen),
    command("change-backing-file", BACKING_FILE, Returns::Nothing, blockdev::change_backing_file),
    command("blockdev-create", CREATE, Returns::Nothing, blockdev::blockdev_create),
    command("block_resize", RESIZE, Returns::Nothing, block_resize),
    command("block-stream", STREAM, Returns::Nothing, stream::block_stream),
    command("block-commit", COMMIT, Returns::Nothing, commit::block_commit),
    command("block-job-set-speed", SPEED, Returns::Nothing, |c, a| set_speed(c, a, "speed")),
    command("block-job-cancel", CANCEL, Returns::Nothing, block_job_cancel),
    command("block-job-pause", DEVICE, Returns::Nothing, |c, a| on_block_job(c, a, Job::pause)),
    command("block-job-resume", DEVICE, Returns::Nothing, |c, a| on_block_job(c, a, Job::resume)),
    command("block-job-complete", DEVICE, Returns::Nothing,
        |c, a| on_block_job(c, a, Job::complete)),
    command("block-job-finalize", ID, Returns::Nothing, block_job_finalize),
    command("block-job-dismiss", ID, Returns::Nothing, block_job_dismiss),
    command("job-pause", ID, Returns::Nothing, |c, a| on_job(c, a, Job::pause)),
    command("job-resume", ID, Returns::Nothing, |c, a| on_job(c, a, Job::resume)),
    command("job-cancel", ID, Returns::Nothing, |c, a| on_job(c, a, Job::cancel)),
    command("job-complete", ID, Returns::Nothing, |c, a| on_job(c, a, Job::complete)),
    command("job-finalize", ID, Returns::Nothing, |c, a| on_job(c, a, Job::finalize)),
    command("job-dismiss", ID, Returns::Nothing, job_dismiss),
    command("blockdev-snapshot", snapshot::SNAPSHOT, Returns::Nothing, snapshot::blockdev_snapshot),
    command("blockdev-snapshot-sync", snapshot::SNAPSHOT_SYNC, Returns::Nothing,
        snapshot::blockdev_snapshot_sync),
    command("blockdev-snapshot-internal-sync", snapshot::INTERNAL, Returns::Nothing,
        snapshot::blockdev_snapshot_internal),
    command("blockdev-snapshot-delete-internal-sync", snapshot::DELETE_INTERNAL,
        Returns::Of("SnapshotInfo"), snapshot::blockdev_snapshot_delete_internal),
    command("transaction", snapshot::TRANSACTION, Returns::Nothing, snapshot::transaction),
    // Not in QEMU.
    command("x-clear-sync-error", DEVICE, Returns::Nothing, clear_sync_error),
    // The names of 2011.
    command("block_stream", STREAM, Returns::Nothing, stream::block_stream),
    command("block_job_set_speed", OLD_SPEED, Returns::Nothing, |c, a| set_speed(c, a, "value")),
    command("block_job_cancel", CANCEL, Returns::Nothing, block_job_cancel),
];

impl Control {
    /// Commands that act on `engine`.
    pub fn new(engine: Arc<Engine>) -> Arc<Self> {
        Arc::new(Self::with(engine, COMMANDS))
    }
}

fn nothing() -> Done {
    Ok(json!({}).into())
}

fn negotiate(_: &Control, args: &Args) -> Done {
    match args.words("enable").next() {
        Some(word) => Err(CommandError::generic(format!(
            "Capability {word} not available"
        ))),
        None => nothing(),
    }
}

fn query_named_block_nodes(control: &Control, args: &Args) -> Done {
    let nodes = Nodes::of(&control.engine);
    let nested = args.bool("flat") != Some(true);
    Ok(nodes
        .each()
        .map(|node| node.to_value(nested))
        .collect::<Value>()
        .into())
}

fn query_block(control: &Control, _: &Args) -> Done {
    let exports = with_tops(&control.engine);
    let nodes = Nodes::of_guests(&control.engine);
    let devices = exports.iter().map(|(node_name, served)| {
        let failed = control.engine.sync_errors(node_name);
        let mut device = json!({
            "device": served.options.id,
            "io-status": io_status(&failed),
            "locked": false,
            "removable": false,
            "type": "unknown",
        });
        if let Some(members) = device.as_object_mut() {
            if let Some(node) = nodes.shown_at(node_name) {
                members.insert("inserted".to_owned(), node.to_value(true));
            }
            if !failed.is_empty() {
                let failed = failed.iter().map(sync_error).collect();
                members.insert("x-sync-errors".to_owned(), failed);
            }
        }
        device
    });
    Ok(devices.collect::<Value>().into())
}

fn query_blockstats(control: &Control, args: &Args) -> Done {
    if args.bool("query-nodes") == Some(true) {
        return Ok(stats::nodes(&control.engine.graph.shown()).into());
    }
    let exports = with_tops(&control.engine);
    let state = control.engine.graph.shown_named();
    let export = |(node, served): &(String, Served)| stats::export(&state, node, served);
    Ok(exports.iter().map(export).collect::<Value>().into())
}

fn query_block_jobs(control: &Control, _: &Args) -> Done {
    Ok(control
        .engine
        .jobs
        .list()
        .iter()
        .filter(|job| job.is_block_job())
        .map(|job| job.to_block_job())
        .collect::<Value>()
        .into())
}

fn query_jobs(control: &Control, _: &Args) -> Done {
    Ok(control
        .engine
        .jobs
        .list()
        .iter()
        .map(|job| job.to_job())
        .collect::<Value>()
        .into())
}

fn no_block_job(id: &str) -> CommandError {
    CommandError {
        class: ErrorClass::DeviceNotActive,
        desc: format!("Block job '{id}' not found"),
    }
}

fn no_job() -> CommandError {
    CommandError::generic("Job not found")
}

/// The job that the older commands call `device`.
fn block_job(control: &Control, id: &str) -> Result<Arc<Job>, CommandError> {
    let job = control.engine.jobs.job(id);
    job.filter(|job| job.is_block_job())
        .ok_or_else(|| no_block_job(id))
}

type JobVerb = fn(&Job) -> Result<(), crate::job::Refused>;

fn on_block_job(control: &Control, args: &Args, verb: JobVerb) -> Done {
    verb(&*block_job(control, args.required_str("device")?)?)?;
    nothing()
}

fn on_job(control: &Control, args: &Args, verb: JobVerb) -> Done {
    let job = control
        .engine
        .jobs
        .job(args.required_str("id")?)
        .ok_or_else(no_job)?;
    verb(&job)?;
    nothing()
}

fn set_speed(control: &Control, args: &Args, name: &str) -> Done {
    let job = block_job(control, args.required_str("device")?)?;
    job.set_speed(args.int(name).unwrap_or_default())?;
    nothing()
}

fn block_job_cancel(control: &Control, args: &Args) -> Done {
    let job = block_job(control, args.required_str("device")?)?;
    job.block_cancel(args.bool("force") == Some(true))?;
    nothing()
}

fn block_job_finalize(control: &Control, args: &Args) -> Done {
    block_job(control, args.required_str("id")?)?.finalize()?;
    nothing()
}

fn block_job_dismiss(control: &Control, args: &Args) -> Done {
    let id = args.required_str("id")?;
    block_job(control, id)?;
    control
        .engine
        .jobs
        .dismiss(id)
        .ok_or_else(|| no_block_job(id))??;
    nothing()
}

fn block_resize(control: &Control, args: &Args) -> Done {
    let size = args.int("size").unwrap_or_default();
    let (device, node) = (args.str("device"), args.str("node-name"));
    control.engine.resize(device, node, size)?;
    nothing()
}

fn clear_sync_error(control: &Control, args: &Args) -> Done {
    let device = args.required_str("device")?;
    control.engine.clear_sync_error(device)?;
    nothing()
}

fn job_dismiss(control: &Control, args: &Args) -> Done {
    control
        .engine
        .jobs
        .dismiss(args.required_str("id")?)
        .ok_or_else(no_job)??;
    nothing()
}
