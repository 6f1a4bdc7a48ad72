//! `info`: what an image is.

use super::describe::{Described, describe, place_below};
use super::open::Images;
use super::snapshot;
use crate::ctl::{Failure, units};
use crate::error::Error;
use clap::Args;
use serde_json::Value;
use std::collections::HashSet;
use std::io::{self, Write};
use std::path::PathBuf;

/// Options of `info`.
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// The image; it may be in use
    file: PathBuf,
    /// Its format: qcow2, raw or qed [default: found out by looking]
    #[arg(short, long)]
    format: Option<String>,
    /// Tell of the backing files too, down to the last
    #[arg(long)]
    backing_chain: bool,
    /// Does nothing: images in use are read in any case
    #[arg(short = 'U', long, hide = true)]
    force_share: bool,
}

/// Carries out `info`.
pub fn run(args: &InfoArgs, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let images = Images::new()?;
    let mut values = Vec::new();
    let mut seen = HashSet::new();
    let mut next = Some((args.file.clone(), args.format.clone()));
    while let Some((path, format)) = next {
        let real = std::fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        if !seen.insert(real) {
            return Err(Failure::from(Error::Invalid(format!(
                "{}: the image is under itself: the chain is a loop",
                path.display()
            ))));
        }
        let Described { value, backing } = images.run(describe(&path, format.as_deref()))?;
        values.push(value);
        let backing = backing.filter(|_| args.backing_chain);
        next = backing
            .map(|backing| place_below(&path, &backing))
            .transpose()?;
    }
    if json {
        let value = match (args.backing_chain, values.len()) {
            (false, 1) => values.swap_remove(0),
            _ => Value::Array(values),
        };
        writeln!(out, "{value}")?;
        return Ok(());
    }
    for (index, value) in values.iter().enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        write_image(value, out)?;
    }
    Ok(())
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key).and_then(Value::as_str)
}

fn number(value: &Value, key: &str) -> u64 {
    value.get(key).and_then(Value::as_u64).unwrap_or(0)
}

fn flag(value: &Value, key: &str) -> bool {
    value.get(key).and_then(Value::as_bool) == Some(true)
}

/// As `qemu-img info` has it.
fn write_image(value: &Value, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "image: {}", text(value, "filename").unwrap_or("?"))?;
    writeln!(out, "file format: {}", text(value, "format").unwrap_or("?"))?;
    match value.get("virtual-size").and_then(Value::as_u64) {
        Some(size) => writeln!(out, "virtual size: {} ({size} bytes)", units::bytes(size))?,
        None => writeln!(out, "virtual size: unknown (the format is not supported)")?,
    }
    let used = units::bytes(number(value, "actual-size"));
    writeln!(out, "disk size: {used}")?;
    if flag(value, "encrypted") {
        writeln!(out, "encrypted: yes")?;
    }
    if value.get("cluster-size").is_some() {
        writeln!(out, "cluster_size: {}", number(value, "cluster-size"))?;
    }
    if flag(value, "dirty-flag") {
        writeln!(out, "cleanly shut down: no")?;
    }
    if let Some(name) = text(value, "backing-filename") {
        match text(value, "full-backing-filename") {
            Some(full) if full != name => {
                writeln!(out, "backing file: {name} (actual path: {full})")?;
            }
            _ => writeln!(out, "backing file: {name}")?,
        }
    }
    if let Some(format) = text(value, "backing-filename-format") {
        writeln!(out, "backing file format: {format}")?;
    }
    if let Some(list) = value.get("snapshots").and_then(Value::as_array) {
        snapshot::write_table(list, out)?;
    }
    if let Some(data) = value.pointer("/format-specific/data") {
        writeln!(out, "Format specific information:")?;
        write_tree(data, 1, out)?;
    }
    Ok(())
}

/// Nested values, a line each.
fn write_tree(value: &Value, depth: usize, out: &mut dyn Write) -> io::Result<()> {
    let members: Vec<(String, &Value)> = match value {
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| (key.replace('-', " "), value))
            .collect(),
        Value::Array(list) => list
            .iter()
            .enumerate()
            .map(|(index, value)| (format!("[{index}]"), value))
            .collect(),
        _ => Vec::new(),
    };
    let indent = "    ".repeat(depth);
    for (key, value) in members {
        match value {
            Value::Object(_) | Value::Array(_) => {
                writeln!(out, "{indent}{key}:")?;
                write_tree(value, depth + 1, out)?;
            }
            Value::String(text) => writeln!(out, "{indent}{key}: {text}")?,
            other => writeln!(out, "{indent}{key}: {other}")?,
        }
    }
    Ok(())
}
