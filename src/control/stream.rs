//! `block-stream`: the arguments.

use serde_json::json;

use super::args::Args;
use super::command::{Control, Done};
use super::error::CommandError;
use crate::engine::stream::{Base, StreamRequest};
use crate::job::OnError;

/// Starts a stream job.
pub(super) fn block_stream(control: &Control, args: &Args) -> Done {
    let text = |name: &str| args.str(name).map(str::to_owned);
    let request = StreamRequest {
        device: args.required_str("device")?.to_owned(),
        base: base(args)?,
        backing_file: text("backing-file"),
        compress: args.bool("compress").unwrap_or(false),
        job_id: text("job-id"),
        filter_node_name: text("filter-node-name"),
        speed: args.int("speed").unwrap_or(0),
        on_error: on_error(args),
        auto_finalize: args.bool("auto-finalize").unwrap_or(true),
        auto_dismiss: args.bool("auto-dismiss").unwrap_or(true),
    };
    control.engine.start_stream(&request)?;
    Ok(json!({}).into())
}

/// What says where the stream ends.
fn base(args: &Args) -> Result<Option<Base>, CommandError> {
    for (one, other) in [
        ("base", "base-node"),
        ("base", "bottom"),
        ("bottom", "base-node"),
    ] {
        if args.str(one).is_some() && args.str(other).is_some() {
            return Err(CommandError::generic(format!(
                "'{one}' and '{other}' cannot be specified at the same time"
            )));
        }
    }
    let given = |name: &str| args.str(name).map(str::to_owned);
    Ok(given("base")
        .map(Base::File)
        .or_else(|| given("base-node").map(Base::Node))
        .or_else(|| given("bottom").map(Base::Bottom)))
}

/// What a job does about errors.
pub(super) fn on_error(args: &Args) -> OnError {
    match args.str("on-error") {
        Some("ignore") => OnError::Ignore,
        Some("stop") => OnError::Stop,
        Some("enospc") => OnError::Enospc,
        // `auto` is for devices; a job does with it what QEMU's does.
        Some("auto") => OnError::Enospc,
        _ => OnError::Report,
    }
}
