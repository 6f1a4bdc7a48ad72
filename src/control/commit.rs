//! `block-commit`: the arguments.

use serde_json::json;

use super::args::Args;
use super::command::{Control, Done};
use super::error::{CommandError, ErrorClass};
use super::stream::on_error;
use crate::engine::commit::{CommitRequest, NoCommit, Place};

/// Starts a commit job.
pub(super) fn block_commit(control: &Control, args: &Args) -> Done {
    let text = |name: &str| args.str(name).map(str::to_owned);
    let request = CommitRequest {
        device: args.required_str("device")?.to_owned(),
        top: place(args, "top", "top-node")?,
        base: place(args, "base", "base-node")?,
        backing_file: text("backing-file"),
        job_id: text("job-id"),
        filter_node_name: text("filter-node-name"),
        speed: args.int("speed").unwrap_or(0),
        on_error: on_error(args),
        auto_finalize: args.bool("auto-finalize").unwrap_or(true),
        auto_dismiss: args.bool("auto-dismiss").unwrap_or(true),
    };
    control.engine.start_commit(&request).map_err(refused)?;
    Ok(json!({}).into())
}

fn refused(why: NoCommit) -> CommandError {
    match why {
        NoCommit::NoDevice(desc) => CommandError {
            class: ErrorClass::DeviceNotFound,
            desc,
        },
        NoCommit::Refused(refused) => refused.into(),
    }
}

/// What names a layer: by the name of its file, or that of its node.
fn place(args: &Args, file: &str, node: &str) -> Result<Option<Place>, CommandError> {
    match (args.str(file), args.str(node)) {
        (Some(_), Some(_)) => Err(CommandError::generic(format!(
            "'{node}' and '{file}' are mutually exclusive"
        ))),
        (Some(file), None) => Ok(Some(Place::File(file.to_owned()))),
        (None, Some(node)) => Ok(Some(Place::Node(node.to_owned()))),
        (None, None) => Ok(None),
    }
}
