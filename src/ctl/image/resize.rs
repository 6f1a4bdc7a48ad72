//! `resize`: another size for a disk.

use super::open::{Images, Purpose};
use super::options::preallocation;
use crate::chain::resize::Resize;
use crate::ctl::Failure;
use crate::ctl::units::{self, new_size};
use crate::format::qcow2::Preallocation;
use clap::Args;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

/// Options of `resize`.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// The image
    file: PathBuf,
    /// The new size, such as 20G; with '+' or '-' in front, by how much it changes
    #[arg(allow_hyphen_values = true)]
    size: String,
    /// The image's format [default: found out by looking]
    #[arg(short, long)]
    format: Option<String>,
    /// Let the disk become smaller; what is above the new end is lost
    #[arg(long)]
    shrink: bool,
    /// What to allocate ahead for the new part: off, metadata (qcow2), falloc or full
    #[arg(long, value_name = "MODE", default_value = "off", value_parser = preallocation)]
    preallocation: Preallocation,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

/// Carries out `resize`.
pub fn run(args: &ResizeArgs, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let images = Images::new()?;
    let name = images.open(&args.file, args.format.as_deref(), Purpose::Write)?;
    let old = images.chain(&name)?.size();
    let size = new_size(&args.size, old)?;
    let wanted = Resize {
        size,
        shrink: args.shrink,
        preallocation: args.preallocation,
    };
    let size = images.run(images.graph.resize(&name, wanted))?;
    if json {
        writeln!(out, "{}", json!({"old-size": old, "virtual-size": size}))?;
    } else if !args.quiet {
        let (from, to) = (units::bytes(old), units::bytes(size));
        writeln!(out, "Image resized: {from} ({old}) to {to} ({size} bytes)")?;
    }
    Ok(())
}
