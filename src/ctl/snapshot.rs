//! `snapshot`: new images on top of disks, or snapshots inside their images, at one instant.

use super::Failure;
use super::args::SnapshotArgs;
use super::client::Client;
use super::send::send;
use serde_json::{Value, json};
use std::io::Write;

/// Carries out the command.
pub fn snapshot(
    client: &mut Client,
    args: &SnapshotArgs,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    if let Some(name) = &args.delete {
        let command = "blockdev-snapshot-delete-internal-sync";
        for device in &args.disks {
            let arguments = json!({"device": device, "name": name});
            send(client, command, arguments, json, out)?;
        }
        return Ok(());
    }
    let actions = match &args.internal {
        Some(name) => args.disks.iter().map(|disk| inside(name, disk)).collect(),
        None => on_top(client, args)?,
    };
    send(
        client,
        "transaction",
        json!({"actions": actions}),
        json,
        out,
    )
}

fn inside(name: &str, device: &str) -> Value {
    json!({
        "type": "blockdev-snapshot-internal-sync",
        "data": {"device": device, "name": name},
    })
}

fn on_top(client: &mut Client, args: &SnapshotArgs) -> Result<Vec<Value>, Failure> {
    let exports = client.execute("query-block-exports", Value::Null)?;
    let is_export = |name: &str| {
        let mut exports = exports.as_array().into_iter().flatten();
        exports.any(|export| export.get("id").and_then(Value::as_str) == Some(name))
    };
    if args.node_name.is_some() && args.disks.len() > 1 {
        return Err(Failure::Usage(
            "--node-name names one node: give one DEVICE=FILE with it".to_owned(),
        ));
    }
    args.disks
        .iter()
        .map(|disk| {
            let parts = disk
                .split_once('=')
                .filter(|(device, file)| !device.is_empty() && !file.is_empty());
            let (device, file) = parts.ok_or_else(|| {
                Failure::Usage(format!(
                    "'{disk}': expected DEVICE=FILE, such as disk0=overlay2.qcow2"
                ))
            })?;
            // The daemon has another working directory.
            let file = std::path::absolute(file)?;
            let file = file.to_str().ok_or_else(|| {
                Failure::Usage(format!("'{disk}': the path is not text in UTF-8"))
            })?;
            let device_key = if is_export(device) {
                "device"
            } else {
                "node-name"
            };
            let mut data = json!({device_key: device, "snapshot-file": file, "format": "qcow2"});
            if let (Some(name), Some(data)) = (&args.node_name, data.as_object_mut()) {
                data.insert("snapshot-node-name".to_owned(), json!(name));
            }
            if let (true, Some(data)) = (args.existing, data.as_object_mut()) {
                data.insert("mode".to_owned(), json!("existing"));
            }
            Ok(json!({"type": "blockdev-snapshot-sync", "data": data}))
        })
        .collect()
}
