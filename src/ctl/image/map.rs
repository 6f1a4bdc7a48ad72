//! `map`: where the bytes of a disk are.

use super::open::{Images, Purpose};
use super::status::{Mapper, RangeStatus};
use crate::chain::Chain;
use crate::ctl::Failure;
use clap::Args;
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;

/// Options of `map`.
#[derive(Debug, Args)]
pub struct MapArgs {
    /// The image
    file: PathBuf,
    /// Its format: qcow2, raw or qed [default: found out by looking]
    #[arg(short, long)]
    format: Option<String>,
    /// Read the image even while others write it; what is shown may be out of date
    #[arg(short = 'U', long)]
    force_share: bool,
}

struct Range {
    start: u64,
    status: RangeStatus,
}

/// Carries out `map`.
pub fn run(args: &MapArgs, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let images = Images::new()?;
    let purpose = Purpose::reading(args.force_share);
    let name = images.open(&args.file, args.format.as_deref(), purpose)?;
    let chain = images.chain(&name)?;
    let ranges = images.run(async {
        let mapper = Mapper::new(chain.clone()).await?;
        let mut ranges: Vec<Range> = Vec::new();
        let mut at = 0;
        while at < chain.size() {
            let status = mapper.status(at, chain.size() - at).await?;
            match ranges.last_mut() {
                Some(last) if continues(&last.status, &status) => last.status.len += status.len,
                _ => ranges.push(Range { start: at, status }),
            }
            at += status.len;
        }
        Ok::<_, crate::error::Error>(ranges)
    })?;
    if json {
        let list: Vec<Value> = ranges.iter().map(to_json).collect();
        writeln!(out, "{}", Value::Array(list))?;
        return Ok(());
    }
    write_table(&chain, &ranges, out)
}

/// Whether `next` goes on where `last` ends, in the same way.
fn continues(last: &RangeStatus, next: &RangeStatus) -> bool {
    let place = match (last.offset, next.offset) {
        (Some(last_offset), Some(offset)) => last_offset + last.len == offset,
        (None, None) => true,
        _ => false,
    };
    let alike = RangeStatus {
        offset: last.offset,
        len: last.len,
        ..*next
    };
    place && *last == alike
}

fn to_json(range: &Range) -> Value {
    let status = &range.status;
    let mut value = json!({
        "start": range.start,
        "length": status.len,
        "depth": status.depth,
        "present": status.present,
        "zero": status.zero,
        "data": status.data,
        "compressed": status.compressed,
    });
    if let (Some(map), Some(offset)) = (value.as_object_mut(), status.offset) {
        map.insert("offset".to_owned(), json!(offset));
    }
    value
}

fn write_table(chain: &Chain, ranges: &[Range], out: &mut dyn Write) -> Result<(), Failure> {
    writeln!(
        out,
        "{:<16}{:<16}{:<16}File",
        "Offset", "Length", "Mapped to"
    )?;
    for Range { start, status } in ranges {
        if !status.data || status.zero {
            continue;
        }
        let place = match status.offset {
            Some(offset) => format!("{offset:#x}"),
            None => "(compressed)".to_owned(),
        };
        let file = chain
            .storage(status.depth)
            .map_or("?", |storage| storage.name());
        let (start, len) = (format!("{start:#x}"), format!("{:#x}", status.len));
        writeln!(out, "{start:<16}{len:<16}{place:<16}{file}")?;
    }
    Ok(())
}
