//! `resize`: another size for a disk while its guest runs.

use super::Failure;
use super::client::Client;
use super::units::{self, new_size};
use clap::Args;
use serde_json::{Map, Value, json};
use std::io::Write;

/// Options of `resize`.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// The export or node
    pub device: String,
    /// The new size: 10G, or with + or - how much more or less it is to be
    #[arg(allow_hyphen_values = true)]
    pub size: String,
    /// Let the disk become smaller, and lose what is above its new end. The guest must not need that
    /// any more
    #[arg(long)]
    pub shrink: bool,
}

/// Carries out `resize`.
pub fn resize(
    client: &mut Client,
    args: &ResizeArgs,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let (export, node) = find(client, &args.device)?;
    let old = size_of(client, &node)?.ok_or_else(|| {
        Failure::Usage(format!(
            "there is no export and no node '{}' (see 'stratactl info')",
            args.device
        ))
    })?;
    let size = new_size(&args.size, old)?;
    if size < old && !args.shrink {
        return Err(Failure::Usage(format!(
            "{size} bytes are fewer than the {old} that '{}' has, and what is above would be lost \
             (expected a larger size, or --shrink)",
            args.device
        )));
    }
    let mut arguments = Map::new();
    arguments.insert("node-name".to_owned(), json!(node));
    if export {
        arguments.insert("device".to_owned(), json!(args.device));
    }
    arguments.insert("size".to_owned(), json!(size));
    client.execute("block_resize", Value::Object(arguments))?;
    // A device has the size that it has.
    let size = size_of(client, &node)?.unwrap_or(size);
    if json {
        writeln!(out, "{}", json!({"old-size": old, "virtual-size": size}))?;
    } else {
        let (from, to) = (units::bytes(old), units::bytes(size));
        writeln!(
            out,
            "{}: {from} ({old}) to {to} ({size} bytes)",
            args.device
        )?;
    }
    Ok(())
}

/// Whether it is an export, and the node that it stands for.
fn find(client: &mut Client, device: &str) -> Result<(bool, String), Failure> {
    let exports = client.execute("query-block-exports", Value::Null)?;
    let mut exports = exports.as_array().into_iter().flatten();
    let export = exports.find(|export| export.get("id").and_then(Value::as_str) == Some(device));
    let node = export.and_then(|export| export.get("node-name")?.as_str());
    Ok((node.is_some(), node.unwrap_or(device).to_owned()))
}

/// The size of a node's disk, if there is such a node.
fn size_of(client: &mut Client, node: &str) -> Result<Option<u64>, Failure> {
    let nodes = client.execute("query-named-block-nodes", json!({"flat": true}))?;
    let mut nodes = nodes.as_array().into_iter().flatten();
    let found = nodes.find(|found| found.get("node-name").and_then(Value::as_str) == Some(node));
    Ok(found.and_then(|node| node.get("image")?.get("virtual-size")?.as_u64()))
}
