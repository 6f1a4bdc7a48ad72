//! `forget-journal`: the image as its last flush left it.

use super::super::Failure;
use super::open::Images;
use crate::error::{Error, Result};
use crate::format::qcow2::journal;
use crate::storage::OpenFlags;
use crate::storage::{Access, FileStorage, Storage};
use clap::Args;
use serde_json::json;
use std::io::{self, Write};
use std::path::PathBuf;

/// What stands below the options in `--help`.
pub const HELP: &str = "\
A daemon that was started with --journal and was killed leaves writes in the journal that its guest
saw complete. The next daemon with the same --journal takes them over; until then the image is not
used. This command is for a journal that is gone, or that the image no longer goes with, as after
another program has written it or an older copy was put back. The image is sound as it is; what the
guest wrote since its last flush is lost. A guest that still runs must be ended.";

/// Options of `forget-journal`.
#[derive(Debug, Args)]
pub struct ForgetArgs {
    /// The image
    file: PathBuf,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

/// Carries out `forget-journal`.
pub fn run(args: &ForgetArgs, json: bool, out: &mut dyn Write) -> std::result::Result<(), Failure> {
    let images = Images::new()?;
    let storage = open(&images, args)?;
    let forgotten = images.run(journal::forget(&storage))?;
    if json {
        let file = forgotten.map(|mark| mark.file_name());
        writeln!(
            out,
            "{}",
            json!({"forgotten": file.is_some(), "file": file})
        )?;
    } else if !args.quiet {
        match forgotten {
            Some(mark) => writeln!(
                out,
                "The journal is given up. If the daemon's journal folder still has its file, {}, \
                 that can be removed.",
                mark.file_name()
            )?,
            None => writeln!(out, "The image has no journal.")?,
        }
    }
    Ok(())
}

fn open(images: &Images, args: &ForgetArgs) -> Result<FileStorage> {
    let flags = OpenFlags {
        writable: true,
        ..OpenFlags::default()
    };
    let busy = |error: io::Error| Error::Busy(error.to_string());
    let storage = FileStorage::open(&args.file, flags).map_err(busy)?;
    images
        .run(storage.set_access(Access::Write))
        .map_err(busy)?;
    Ok(storage)
}
