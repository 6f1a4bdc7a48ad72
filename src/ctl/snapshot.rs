//! `snapshot`: new images on top of disks, or snapshots inside their images, at one instant.

use super::Failure;
use super::args::SnapshotArgs;
use super::client::Client;
use super::names::free_name;
use super::send::send;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::io::Write;
use std::path::Path;

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
    if args.node_name.is_some() && args.disks.len() > 1 {
        return Err(Failure::Usage(
            "--node-name names one node: give one DEVICE=FILE with it".to_owned(),
        ));
    }
    let disks = args.disks.iter().map(|disk| read(disk));
    let disks = disks.collect::<Result<Vec<_>, _>>()?;
    let exports = client.execute("query-block-exports", Value::Null)?;
    let nodes = client.execute("query-named-block-nodes", json!({"flat": true}))?;
    let mut taken: HashSet<String> = items(&nodes)
        .filter_map(|node| text(node, "node-name"))
        .collect();
    // qemu-storage-daemon knows no exports where it takes devices.
    let knows_exports = client
        .version()
        .get("package")
        .and_then(Value::as_str)
        .is_some_and(|package| package.starts_with("stratablk"));
    let mut actions = Vec::with_capacity(disks.len());
    for (device, file) in disks {
        let mut data = json!({"snapshot-file": file, "format": "qcow2"});
        let export = items(&exports).find(|export| text(export, "id").as_deref() == Some(device));
        let (key, disk) = match export {
            Some(_) if knows_exports => ("device", device.to_owned()),
            Some(export) => ("node-name", text(export, "node-name").unwrap_or_default()),
            None => ("node-name", device.to_owned()),
        };
        let name = match &args.node_name {
            Some(name) => Some(name.clone()),
            // A node is put on top of a node by name only.
            None if key == "node-name" => {
                let stem = Path::new(&file).file_stem().unwrap_or_default();
                Some(free_name(&stem.to_string_lossy(), "snapshot-", &taken))
            }
            None => None,
        };
        if let Some(members) = data.as_object_mut() {
            members.insert(key.to_owned(), json!(disk));
            if let Some(name) = name {
                taken.insert(name.clone());
                members.insert("snapshot-node-name".to_owned(), json!(name));
            }
            if args.existing {
                members.insert("mode".to_owned(), json!("existing"));
            }
        }
        actions.push(json!({"type": "blockdev-snapshot-sync", "data": data}));
    }
    Ok(actions)
}

/// A device and the path of its new image, as the daemon finds it, which has another folder.
fn read(disk: &str) -> Result<(&str, String), Failure> {
    let parts = disk.split_once('=');
    let parts = parts.filter(|(device, file)| !device.is_empty() && !file.is_empty());
    let (device, file) = parts.ok_or_else(|| {
        let text = format!("'{disk}': expected DEVICE=FILE, such as disk0=overlay2.qcow2");
        Failure::Usage(text)
    })?;
    let file = std::path::absolute(file)?;
    let file = file
        .to_str()
        .ok_or_else(|| Failure::Usage(format!("'{disk}': the path is not text in UTF-8")))?;
    Ok((device, file.to_owned()))
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn text(of: &Value, key: &str) -> Option<String> {
    of.get(key).and_then(Value::as_str).map(str::to_owned)
}
