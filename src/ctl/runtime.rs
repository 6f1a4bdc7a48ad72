//! `node` and `export`: what comes and goes while the daemon runs.

use super::Failure;
use super::args::{ExportCommand, NodeCommand};
use super::client::Client;
use super::send::send;
use super::table::write_table;
use crate::options::keyval::Notation;
use crate::options::{BlockdevOptions, ConfigError, Dialect, ExportOptions, read_text};
use serde_json::{Value, json};
use std::io::Write;

/// Carries out a command about nodes.
pub fn node(
    client: &mut Client,
    command: NodeCommand,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    match command {
        NodeCommand::Add { options } => {
            let read = read_text(&options, Notation::implied("driver"));
            let node = read.and_then(|(value, dialect)| {
                BlockdevOptions::from_value(&value, dialect)
                    .map(|node| given(value, dialect, || node.to_value()))
            });
            let node = node.map_err(|error| usage(error, "node add", &options))?;
            send(client, "blockdev-add", node, json, out)
        }
        NodeCommand::Del { node } => {
            let arguments = json!({"node-name": node});
            send(client, "blockdev-del", arguments, json, out)
        }
        NodeCommand::List => {
            let nodes = client.execute("query-named-block-nodes", json!({"flat": true}))?;
            list(
                &nodes,
                json,
                [("NODE", "node-name"), ("DRIVER", "drv"), ("FILE", "file")],
                out,
            )
        }
    }
}

/// Carries out a command about exports.
pub fn export(
    client: &mut Client,
    command: ExportCommand,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    match command {
        ExportCommand::Add { options } => {
            let read = read_text(&options, Notation::implied("type"));
            let export = read.and_then(|(value, dialect)| {
                ExportOptions::from_value(&value, dialect)
                    .map(|export| given(value, dialect, || export.to_value()))
            });
            let export = export.map_err(|error| usage(error, "export add", &options))?;
            send(client, "block-export-add", export, json, out)
        }
        ExportCommand::Del { export, force } => {
            let mode = if force { "hard" } else { "safe" };
            let arguments = json!({"id": export, "mode": mode});
            send(client, "block-export-del", arguments, json, out)
        }
        ExportCommand::List => {
            let exports = client.execute("query-block-exports", Value::Null)?;
            list(
                &exports,
                json,
                [("EXPORT", "id"), ("NODE", "node-name"), ("TYPE", "type")],
                out,
            )
        }
    }
}

/// What is sent: JSON as it was given, text with the types that its values have.
fn given(value: Value, dialect: Dialect, typed: impl FnOnce() -> Value) -> Value {
    match dialect {
        Dialect::Keyval => typed(),
        Dialect::Json | Dialect::Recorded => value,
    }
}

fn usage(error: ConfigError, option: &str, text: &str) -> Failure {
    Failure::Usage(error.in_option(option, text).to_string())
}

fn list<const N: usize>(
    items: &Value,
    json: bool,
    columns: [(&str, &str); N],
    out: &mut dyn Write,
) -> Result<(), Failure> {
    if json {
        writeln!(out, "{items}")?;
        return Ok(());
    }
    let mut rows = vec![columns.map(|(title, _)| title.to_owned())];
    for item in items.as_array().into_iter().flatten() {
        let text = |key| item.get(key).and_then(Value::as_str).unwrap_or_default();
        rows.push(columns.map(|(_, key)| text(key).to_owned()));
    }
    write_table(&rows, out)
}
