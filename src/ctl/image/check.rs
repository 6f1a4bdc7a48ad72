//! `stratactl image check`: consistency check and repair, with the numbers, the exit codes and
//! the JSON of `qemu-img check`.

use super::super::Failure;
use super::open::{Images, probe};
use crate::error::Error;
use crate::format::qcow2::check::{self, Finding, Summary};
use crate::format::qcow2::journal;
use crate::storage::OpenFlags;
use crate::storage::{Access, FileStorage, Storage};
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};
use std::io::{self, Write};
use std::path::PathBuf;

/// Exit code: the check could not be completed.
const EXIT_FAILED: u8 = 1;
/// Exit code: the image is corrupt.
const EXIT_CORRUPT: u8 = 2;
/// Exit code: space is lost, but no harm done.
const EXIT_LEAKS: u8 = 3;
/// Exit code: nothing is to be checked in this format.
const EXIT_NO_CHECK: u8 = 63;

/// What stands below the options in `--help`.
pub const HELP: &str = "\
What is found goes to standard error, the outcome to standard output; with --json it is the object
that 'qemu-img check --output=json' prints. The image must not be in use.

A repair never changes what the disk reads as: where it cannot tell what is right, it says so and
leaves the file as it is. One that is interrupted leaves an image that is no worse than before. What
cannot be read any more stays as it is, and the image stays marked as corrupt if it was. A clean
image loses its dirty and corrupt marks.

Exit codes:
  0   the image is clean (now)
  1   the check could not be completed
  2   the image is corrupt (still)
  3   clusters are leaked: space is lost, but no harm is done
  63  images of this format cannot be checked";

/// Options of `image check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The image
    pub file: PathBuf,
    /// Its format [default: what it looks like]
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Repair what is found
    #[arg(short, long, value_enum, value_name = "WHAT")]
    pub repair: Option<Repair>,
    /// Check an image that is in use; what is being changed looks like damage
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub force_share: bool,
}

/// What to repair.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Repair {
    /// Free leaked clusters
    Leaks,
    /// Everything that can be repaired
    All,
}

impl From<Repair> for check::Repair {
    fn from(repair: Repair) -> Self {
        match repair {
            Repair::Leaks => Self::Leaks,
            Repair::All => Self::All,
        }
    }
}

/// Checks and repairs an image, and says what was found.
pub fn run(args: &CheckArgs, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let storage = open(args)?;
    let images = Images::new()?;
    let format = match &args.format {
        Some(format) => format,
        None => probe(&args.file).map_err(|error| failed(error, EXIT_FAILED))?,
    };
    if format != "qcow2" {
        let file = args.file.display().to_string();
        let error = Error::unsupported(&file, format!("{format} images cannot be checked"));
        return Err(failed(error, EXIT_NO_CHECK));
    }
    if !args.force_share {
        let adopted = images.run(journal::require_none(&storage));
        adopted.map_err(|error| failed(error, EXIT_FAILED))?;
    }
    let mut report = |finding: Finding| {
        // Nothing can be done about a standard error that is closed.
        let _ = writeln!(io::stderr(), "{finding}");
    };
    let summary = match args.repair {
        None => images.run(check::check(&storage, &mut report)),
        Some(what) => {
            images
                .run(storage.set_access(Access::Write))
                .map_err(busy)?;
            images.run(check::repair(&storage, what.into(), &mut report))
        }
    };
    let summary = summary.map_err(|error| failed(error, EXIT_FAILED))?;
    if json {
        writeln!(out, "{}", object(args, &summary))?;
    } else {
        tell(&summary, out)?;
    }
    match (summary.corruptions, summary.leaks) {
        (0, 0) => Ok(()),
        (0, _) => Err(Failure::Outcome(EXIT_LEAKS)),
        _ => Err(Failure::Outcome(EXIT_CORRUPT)),
    }
}

fn open(args: &CheckArgs) -> Result<FileStorage, Failure> {
    let flags = OpenFlags {
        writable: args.repair.is_some(),
        force_share: args.force_share,
        ..OpenFlags::default()
    };
    FileStorage::open(&args.file, flags).map_err(busy)
}

fn failed(error: Error, code: u8) -> Failure {
    Failure::Image { error, code }
}

/// The file cannot be opened, or somebody else uses it.
fn busy(error: io::Error) -> Failure {
    failed(Error::Busy(error.to_string()), EXIT_FAILED)
}

/// The outcome as `qemu-img` gives it: numbers that are 0 are left out.
fn object(args: &CheckArgs, summary: &Summary) -> Value {
    let mut object = Map::new();
    object.insert("filename".into(), json!(args.file.display().to_string()));
    object.insert("format".into(), json!("qcow2"));
    object.insert("check-errors".into(), json!(0));
    for (name, number) in [
        ("image-end-offset", summary.image_end),
        ("corruptions", summary.corruptions),
        ("leaks", summary.leaks),
        ("corruptions-fixed", summary.corruptions_fixed),
        ("leaks-fixed", summary.leaks_fixed),
        ("total-clusters", summary.total_clusters),
        ("allocated-clusters", summary.allocated_clusters),
        ("fragmented-clusters", summary.fragmented_clusters),
        ("compressed-clusters", summary.compressed_clusters),
    ] {
        if number > 0 {
            object.insert(name.into(), json!(number));
        }
    }
    object.into()
}

fn tell(summary: &Summary, out: &mut dyn Write) -> io::Result<()> {
    if summary.corruptions_fixed > 0 || summary.leaks_fixed > 0 {
        writeln!(
            out,
            "Repaired: {} corruptions, {} leaked clusters.",
            summary.corruptions_fixed, summary.leaks_fixed
        )?;
    }
    if summary.is_clean() {
        writeln!(out, "No errors were found on the image.")?;
    }
    if summary.corruptions > 0 {
        writeln!(
            out,
            "{} errors were found on the image: data may be lost, and writing to it may destroy \
             more.",
            summary.corruptions
        )?;
    }
    if summary.leaks > 0 {
        writeln!(
            out,
            "{} leaked clusters were found on the image: space is lost, but no data.",
            summary.leaks
        )?;
    }
    let percent = |part: u64, of: u64| part as f64 * 100.0 / of.max(1) as f64;
    if summary.allocated_clusters > 0 {
        writeln!(
            out,
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            summary.allocated_clusters,
            summary.total_clusters,
            percent(summary.allocated_clusters, summary.total_clusters),
            percent(summary.fragmented_clusters, summary.allocated_clusters),
            percent(summary.compressed_clusters, summary.allocated_clusters),
        )?;
    }
    writeln!(out, "Image end offset: {}", summary.image_end)
}
