//! `resize`: another size for a disk.

use super::open::{Images, Purpose};
use super::options::{preallocation, size_error};
use crate::chain::resize::Resize;
use crate::ctl::{Failure, units};
use crate::format::qcow2::Preallocation;
use crate::options::size;
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

fn new_size(text: &str, old: u64) -> Result<u64, Failure> {
    let (sign, number) = match text.split_at_checked(1) {
        Some((sign @ ("+" | "-"), number)) => (sign, number),
        _ => ("", text),
    };
    let invalid = || Failure::Usage(size_error("SIZE", text));
    let number = size::parse(number).ok_or_else(invalid)?;
    let size = match sign {
        "+" => old.checked_add(number),
        "-" => old.checked_sub(number),
        _ => Some(number),
    };
    size.filter(|size| *size <= 1 << 62).ok_or_else(|| {
        Failure::Usage(format!(
            "SIZE: '{text}' of a disk of {old} bytes (expected a result from 0 to 4E)"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Would catch a disk that becomes as large as it was to grow, or one that wraps around.
    #[test]
    fn relative_sizes() {
        assert_eq!(new_size("20G", 5).ok(), Some(20 << 30));
        assert_eq!(new_size("+1M", 1 << 20).ok(), Some(2 << 20));
        assert_eq!(new_size("-1K", 1 << 20).ok(), Some((1 << 20) - 1024));
        for bad in ["", "+", "-2M", "1X", "+16E", "--1"] {
            assert!(new_size(bad, 1 << 20).is_err(), "{bad}");
        }
    }
}
