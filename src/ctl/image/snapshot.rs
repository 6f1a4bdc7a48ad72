//! `snapshot`: the internal snapshots of an image.

use super::open::{Images, probe};
use crate::ctl::{Failure, units};
use crate::error::{Error, Result};
use crate::format::qcow2::snapshots::{self, Snapshot};
use crate::format::qcow2::{describe_header, header::Header};
use crate::storage::OpenFlags;
use crate::storage::{FileStorage, Storage};
use clap::Args;
use serde_json::{Value, json};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const NANOSECONDS: u64 = 1_000_000_000;

/// Options of `snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The image; it may be in use
    file: PathBuf,
    /// List them; this is all that there is so far
    #[arg(short, long)]
    list: bool,
}

/// Carries out `snapshot`.
pub fn run(
    args: &SnapshotArgs,
    json: bool,
    out: &mut dyn Write,
) -> std::result::Result<(), Failure> {
    if !args.list {
        return Err(Failure::Usage(
            "what to do with the snapshots? (expected -l, which lists them)".to_owned(),
        ));
    }
    let images = Images::new()?;
    let list = images.run(of_file(&args.file))?;
    if json {
        writeln!(out, "{}", Value::Array(list))?;
    } else if !list.is_empty() {
        write_table(&list, out)?;
    }
    Ok(())
}

async fn of_file(path: &Path) -> Result<Vec<Value>> {
    let format = probe(path)?;
    if format != "qcow2" {
        return Err(Error::unsupported(
            &path.display().to_string(),
            format!("{format} images have no internal snapshots (expected qcow2)"),
        ));
    }
    let flags = OpenFlags {
        force_share: true,
        ..OpenFlags::default()
    };
    let storage = FileStorage::open(path, flags).map_err(|e| Error::Invalid(e.to_string()))?;
    let header = describe_header(&storage).await?;
    of_image(&storage, &header).await
}

/// The snapshots of an image, each as QMP describes it.
pub async fn of_image(storage: &dyn Storage, header: &Header) -> Result<Vec<Value>> {
    let list = snapshots::list(storage, header).await?;
    Ok(list.iter().map(to_json).collect())
}

fn to_json(snapshot: &Snapshot) -> Value {
    let mut value = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": snapshot.vm_clock / NANOSECONDS,
        "vm-clock-nsec": snapshot.vm_clock % NANOSECONDS,
    });
    if let (Some(map), Some(count)) = (value.as_object_mut(), snapshot.instructions) {
        map.insert("icount".to_owned(), json!(count));
    }
    value
}

/// As `qemu-img snapshot -l` has it.
pub fn write_table(list: &[Value], out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "Snapshot list:")?;
    writeln!(
        out,
        "{:<7} {:<16} {:>10} {:>20} {:>15} {:>10}",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    )?;
    for snapshot in list {
        let text = |key: &str| snapshot.get(key).and_then(Value::as_str).unwrap_or("?");
        let number = |key: &str| snapshot.get(key).and_then(Value::as_u64);
        let clock = clock(
            number("vm-clock-sec").unwrap_or(0),
            number("vm-clock-nsec").unwrap_or(0),
        );
        let count = number("icount").map_or_else(String::new, |count| count.to_string());
        writeln!(
            out,
            "{:<7} {:<16} {:>10} {:>20} {:>15} {:>10}",
            text("id"),
            text("name"),
            units::bytes(number("vm-state-size").unwrap_or(0)),
            date(number("date-sec").unwrap_or(0)),
            clock,
            count,
        )?;
    }
    Ok(())
}

/// `0012:34:56.789`: hours, minutes, seconds.
fn clock(seconds: u64, nanoseconds: u64) -> String {
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let (seconds, thousandths) = (seconds % 60, nanoseconds / 1_000_000);
    format!("{hours:04}:{minutes:02}:{seconds:02}.{thousandths:03}")
}

/// `2026-11-23 09:05:33`, in local time.
fn date(seconds: u64) -> String {
    let Ok(seconds) = libc::time_t::try_from(seconds) else {
        return "?".to_owned();
    };
    // SAFETY: all-zero bytes are a valid tm.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: the call reads one time and writes one tm.
    if unsafe { libc::localtime_r(&raw const seconds, &raw mut tm) }.is_null() {
        return "?".to_owned();
    }
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        tm.tm_year + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec
    )
}
