//! `block-stream`: from what the client named to a running job.

use std::path::Path;

use serde_json::json;

use super::args::Args;
use super::backend::{ChainView, LayerView};
use super::command::{Control, Done};
use super::error::CommandError;
use crate::job::handle::checked_speed;
use crate::job::stream::StreamSpec;
use crate::job::{JobSpec, Lease, OnError};

/// How often a chain may change under us before we give up.
const ATTEMPTS: usize = 8;

/// Starts a stream job.
pub(super) fn block_stream(control: &Control, args: &Args) -> Done {
    check_conflicts(args)?;
    let device = args.required_str("device")?;
    // Nobody else may take the nodes between the looking and the taking.
    let _starting = control.starting.lock();
    let (chain, spec, lease) = find_and_reserve(control, device, args)?;
    if spec.base.is_none() && args.str("backing-file").is_some() {
        return Err(CommandError::generic(
            "backing file specified, but streaming the entire chain",
        ));
    }
    if let Some(name) = args.str("filter-node-name") {
        check_filter_name(control, name)?;
    }
    if chain.layers.first().is_some_and(|layer| layer.read_only) {
        return Err(CommandError::generic("Block node is read-only"));
    }
    let job = JobSpec {
        work: control.backend.work(&spec)?,
        ..job_spec(args, &chain)?
    };
    control.jobs.check_id(&job.id)?;
    let body = control.backend.open_stream(&spec, &job.id)?;
    control.jobs.start(job, lease, body)?;
    Ok(json!({}).into())
}

fn check_conflicts(args: &Args) -> Result<(), CommandError> {
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
    Ok(())
}

fn job_spec(args: &Args, chain: &ChainView) -> Result<JobSpec, CommandError> {
    let default_id = chain.export.as_deref().unwrap_or_default();
    let speed = checked_speed(args.int("speed").unwrap_or(0));
    let id = args.str("job-id").unwrap_or(default_id);
    let on_error = match args.str("on-error") {
        Some("ignore") => OnError::Ignore,
        Some("stop") => OnError::Stop,
        Some("enospc") => OnError::Enospc,
        // `auto` is for devices; a job does with it what QEMU's does.
        Some("auto") => OnError::Enospc,
        _ => OnError::Report,
    };
    Ok(JobSpec {
        len: chain.len,
        speed: speed?,
        on_error,
        auto_finalize: args.bool("auto-finalize").unwrap_or(true),
        auto_dismiss: args.bool("auto-dismiss").unwrap_or(true),
        ..JobSpec::stream(id)
    })
}

/// Finds the layers concerned and takes them for the job.
fn find_and_reserve(
    control: &Control,
    device: &str,
    args: &Args,
) -> Result<(ChainView, StreamSpec, Lease), CommandError> {
    for _ in 0..ATTEMPTS {
        let chain = find_chain(control, device)?;
        let spec = find_layers(control, device, &chain, args)?;
        let lease = control
            .jobs
            .reserve(&spec.layers, "stream")
            .map_err(|busy| {
                let node = match busy.index {
                    // The first is what the client named, by whatever name.
                    0 => device,
                    index => spec.layers.get(index).map_or(device, String::as_str),
                };
                CommandError::generic(format!(
                    "Node '{node}' is busy: block device is in use by block job: {}",
                    busy.kind
                ))
            })?;
        // A job that ended just now may have changed the chain before we held its layers.
        if control.backend.chain(device).as_ref() == Some(&chain) {
            return Ok((chain, spec, lease));
        }
    }
    Err(CommandError::generic(format!(
        "The chain of '{device}' keeps changing"
    )))
}

fn find_chain(control: &Control, device: &str) -> Result<ChainView, CommandError> {
    match control.backend.chain(device) {
        Some(chain) if !chain.layers.is_empty() => Ok(chain),
        _ => Err(no_such_device(device, device)),
    }
}

fn no_such_device(device: &str, node: &str) -> CommandError {
    CommandError::generic(format!(
        "Cannot find device='{device}' nor node-name='{node}'"
    ))
}

/// Finds the layers from the first of `chain` down to the base that the client named.
fn find_layers(
    control: &Control,
    device: &str,
    chain: &ChainView,
    args: &Args,
) -> Result<StreamSpec, CommandError> {
    let position = |name: &str| {
        chain
            .layers
            .iter()
            .position(|layer| layer.node_name == name)
    };
    let known = |name: &str| {
        if control.backend.has_node(name) || position(name).is_some() {
            Ok(())
        } else {
            Err(no_such_device("", name))
        }
    };
    let base = if let Some(file) = args.str("base") {
        let below = chain.layers.iter().skip(1);
        let found = below
            .clone()
            .position(|layer| is_called(layer, file))
            .or_else(|| below.clone().position(|layer| is_file(layer, file)));
        Some(found.map(|at| at + 1).ok_or_else(|| {
            CommandError::generic(format!("Can't find '{file}' in the backing chain"))
        })?)
    } else if let Some(node) = args.str("base-node") {
        known(node)?;
        Some(position(node).filter(|&at| at > 0).ok_or_else(|| {
            CommandError::generic(format!(
                "Node '{node}' is not a backing image of '{device}'"
            ))
        })?)
    } else if let Some(node) = args.str("bottom") {
        known(node)?;
        Some(position(node).map(|at| at + 1).ok_or_else(|| {
            CommandError::generic(format!(
                "Node '{node}' is not in a chain starting from '{device}'"
            ))
        })?)
    } else {
        None
    };
    let end = base.unwrap_or(chain.layers.len()).min(chain.layers.len());
    let name = |layer: &LayerView| layer.node_name.clone();
    Ok(StreamSpec {
        target: chain.layers.first().map(name).unwrap_or_default(),
        base: chain.layers.get(end).map(name),
        layers: chain.layers.iter().take(end).map(name).collect(),
        backing_file: args.str("backing-file").map(str::to_owned),
        compress: args.bool("compress").unwrap_or(false),
    })
}

fn is_called(layer: &LayerView, file: &str) -> bool {
    layer.filenames.iter().any(|name| name == file)
}

/// Whether `file` is another name of the layer's file.
fn is_file(layer: &LayerView, file: &str) -> bool {
    let Ok(wanted) = Path::new(file).canonicalize() else {
        return false;
    };
    layer
        .filenames
        .iter()
        .any(|name| Path::new(name).canonicalize().is_ok_and(|n| n == wanted))
}

/// Our jobs put no filter into the graph, but a name for one is checked all the same.
fn check_filter_name(control: &Control, name: &str) -> Result<(), CommandError> {
    let mut characters = name.chars();
    let well_formed = characters
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic())
        && characters.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
    if !well_formed {
        return Err(CommandError::generic(format!(
            "Could not create node: Invalid node-name: '{name}'"
        )));
    }
    if control.backend.has_node(name) {
        return Err(CommandError::generic(format!(
            "Could not create node: Duplicate nodes with node-name='{name}'"
        )));
    }
    Ok(())
}
