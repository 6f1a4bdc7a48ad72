//! The overview: version, exports with their layers, other nodes, jobs.

use super::Failure;
use super::client::Client;
use super::jobs;
use super::tracker::merge;
use super::units;
use serde_json::{Value, json};
use std::io::Write;

/// Most layers that are shown of one chain.
const MAX_LAYERS: usize = 10_000;

/// Prints the overview.
pub fn show(client: &mut Client, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let version = client.execute("query-version", Value::Null)?;
    let exports = client.execute("query-block-exports", Value::Null)?;
    let nodes = client.execute("query-named-block-nodes", Value::Null)?;
    let (jobs, block_jobs) = jobs::query(client)?;
    let overview = Overview::new(&exports, &nodes);
    if json {
        let value = json!({
            "version": version,
            "exports": overview.exports.iter().map(ExportInfo::to_json).collect::<Vec<_>>(),
            "nodes": nodes,
            "jobs": merge(&jobs, &block_jobs),
        });
        writeln!(out, "{value}")?;
        return Ok(());
    }
    writeln!(out, "Daemon: {}", version_text(&version))?;
    overview.write(out)?;
    writeln!(out, "Jobs:")?;
    let mut table = Vec::new();
    jobs::write(&jobs, &block_jobs, &mut table)?;
    for line in String::from_utf8_lossy(&table).lines() {
        writeln!(out, "  {line}")?;
    }
    Ok(())
}

/// `QMP 10.0.2 (stratablk 0.1.0)`.
fn version_text(version: &Value) -> String {
    let part = |key: &str| {
        let number = version.get("qemu").and_then(|qemu| qemu.get(key));
        number.and_then(Value::as_u64).unwrap_or(0)
    };
    let numbers = format!("{}.{}.{}", part("major"), part("minor"), part("micro"));
    match text(version, "package") {
        Some(package) if !package.is_empty() => format!("QMP {numbers} ({package})"),
        _ => format!("QMP {numbers}"),
    }
}

/// One layer of a chain.
struct Layer<'a> {
    node: Option<&'a Value>,
    image: &'a Value,
}

struct ExportInfo<'a> {
    export: &'a Value,
    layers: Vec<Layer<'a>>,
}

struct Overview<'a> {
    exports: Vec<ExportInfo<'a>>,
    others: Vec<Vec<Layer<'a>>>,
}

impl<'a> Overview<'a> {
    fn new(exports: &'a Value, nodes: &'a Value) -> Self {
        let nodes = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
        let exports: Vec<_> = exports
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default()
            .iter()
            .map(|export| ExportInfo {
                export,
                layers: layers(text(export, "node-name"), nodes),
            })
            .collect();
        let others = other_chains(&exports, nodes);
        Self { exports, others }
    }

    fn write(&self, out: &mut dyn Write) -> Result<(), Failure> {
        writeln!(out, "Exports:")?;
        if self.exports.is_empty() {
            writeln!(out, "  none")?;
        }
        for export in &self.exports {
            let id = text(export.export, "id").unwrap_or("?");
            let kind = text(export.export, "type").unwrap_or("?");
            writeln!(out, "  {id} ({kind})")?;
            write_chain(&export.layers, 2, out)?;
        }
        if !self.others.is_empty() {
            writeln!(out, "Other nodes:")?;
        }
        for chain in &self.others {
            write_chain(chain, 1, out)?;
        }
        Ok(())
    }
}

fn write_chain(layers: &[Layer<'_>], indent: usize, out: &mut dyn Write) -> Result<(), Failure> {
    for (depth, layer) in layers.iter().enumerate() {
        writeln!(out, "{}{}", "  ".repeat(depth + indent), layer.describe())?;
    }
    Ok(())
}

impl ExportInfo<'_> {
    fn to_json(&self) -> Value {
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|layer| {
                json!({
                    "node-name": layer.node.and_then(|node| node.get("node-name")),
                    "format": layer.image.get("format"),
                    "filename": layer.image.get("filename"),
                    "virtual-size": layer.image.get("virtual-size"),
                    "actual-size": layer.image.get("actual-size"),
                })
            })
            .collect();
        let mut value = self.export.clone();
        if let Some(map) = value.as_object_mut() {
            map.insert("layers".to_owned(), json!(layers));
        }
        value
    }
}

impl Layer<'_> {
    /// `top: qcow2, 10.0 GiB (200.0 KiB used), overlay.qcow2, read-only`.
    fn describe(&self) -> String {
        let node = self
            .node
            .and_then(|node| text(node, "node-name"))
            .unwrap_or("(no node)");
        let format = self
            .node
            .and_then(|node| text(node, "drv"))
            .or(text(self.image, "format"))
            .unwrap_or("?");
        let mut line = format!("{node}: {format}");
        let number = |key: &str| self.image.get(key).and_then(Value::as_u64);
        if let Some(size) = number("virtual-size") {
            line.push_str(&format!(", {}", units::bytes(size)));
        }
        if let Some(used) = number("actual-size") {
            line.push_str(&format!(" ({} used)", units::bytes(used)));
        }
        if let Some(filename) = text(self.image, "filename") {
            line.push_str(&format!(", {filename}"));
        }
        if self
            .node
            .and_then(|node| node.get("ro"))
            .and_then(Value::as_bool)
            == Some(true)
        {
            line.push_str(", read-only");
        }
        line
    }
}

/// The layers from the node with this name downwards.
fn layers<'a>(top: Option<&str>, nodes: &'a [Value]) -> Vec<Layer<'a>> {
    let Some(top) = top.and_then(|name| named(name, nodes)) else {
        return Vec::new();
    };
    let mut layers = Vec::new();
    let mut next = Some((Some(top), top.get("image").unwrap_or(&Value::Null)));
    while let Some((node, image)) = next {
        layers.push(Layer { node, image });
        // A description that leads back into itself must not be followed for ever.
        next = if layers.len() < MAX_LAYERS {
            below(node, image, nodes)
        } else {
            None
        };
    }
    layers
}

fn named<'a>(name: &str, nodes: &'a [Value]) -> Option<&'a Value> {
    nodes
        .iter()
        .find(|node| text(node, "node-name") == Some(name))
}

/// The layer under a node, which has this image: its node, if it has one, and its image.
fn below<'a>(
    node: Option<&'a Value>,
    image: &'a Value,
    nodes: &'a [Value],
) -> Option<(Option<&'a Value>, &'a Value)> {
    let children = node
        .and_then(|node| node.get("children"))
        .and_then(Value::as_array);
    if let Some(children) = children {
        let child = |role: &str| {
            let child = children
                .iter()
                .find(|child| text(child, "child") == Some(role))?;
            named(text(child, "node-name")?, nodes)
        };
        // What a filter filters is in the place of a file.
        let below = child("backing").or(child("file").filter(|file| !is_file(file)))?;
        return Some((Some(below), below.get("image").unwrap_or(&Value::Null)));
    }
    // Daemons that do not tell the nodes below tell their files, which several nodes may share.
    let described = image.get("backing-image");
    let filename = described
        .and_then(|image| text(image, "filename"))
        .or(text(image, "full-backing-filename"))?;
    let mut on_it = nodes
        .iter()
        .filter(|node| !is_file(node) && text(node, "file") == Some(filename));
    let node = on_it.next().filter(|_| on_it.next().is_none());
    // The node knows its image whole; a description may end at some depth.
    let image = node.and_then(|node| node.get("image")).or(described)?;
    Some((node, image))
}

/// The chains of the nodes that no export shows, each from its top.
fn other_chains<'a>(exports: &[ExportInfo<'a>], nodes: &'a [Value]) -> Vec<Vec<Layer<'a>>> {
    let in_exports = |node| exports.iter().any(|export| shows(&export.layers, node));
    let left: Vec<&Value> = nodes.iter().filter(|node| !in_exports(node)).collect();
    let chains: Vec<_> = left
        .iter()
        .map(|node| layers(text(node, "node-name"), nodes))
        .collect();
    // A node that lies in the chain of another one is told there.
    let is_below = |this: usize, node| {
        let mut others = chains
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != this);
        others.any(|(_, chain)| shows(chain, node))
    };
    let tops: Vec<bool> = left
        .iter()
        .enumerate()
        .map(|(index, node)| !is_below(index, node))
        .collect();
    chains
        .into_iter()
        .zip(tops)
        .filter(|(_, top)| *top)
        .map(|(chain, _)| chain)
        .collect()
}

/// Whether the node is a layer of this chain, or the file of one.
fn shows(layers: &[Layer<'_>], node: &Value) -> bool {
    layers.iter().any(|layer| {
        let Some(known) = layer.node else {
            return false;
        };
        let same = text(known, "node-name") == text(node, "node-name");
        let its_file = !is_file(known)
            && is_file(node)
            && text(node, "file").is_some()
            && text(node, "file") == text(known, "file");
        same || its_file
    })
}

fn is_file(node: &Value) -> bool {
    matches!(text(node, "drv"), Some("file" | "host_device"))
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key).and_then(Value::as_str)
}
