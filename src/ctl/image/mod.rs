//! `stratactl image`: tools for image files that no daemon serves at the moment.
//!
//! They work on the files themselves, with the daemon's own engine and QEMU's image locks: what
//! is in use elsewhere is not changed.
//!
//! - `create`, with its `options`: new images;
//! - `info`: what the headers say (`describe`), as `qemu-img info` tells it;
//! - `map`: where the bytes of a disk are (`status`);
//! - `resize`, `rebase`, `compare`, `snapshot`: the commands of these names;
//! - `check`: consistency check and repair;
//! - `clear_error`: a failed flush that a daemon has recorded;
//! - `forget`: giving up a journal;
//! - `open`: opening images for all of them.

mod check;
mod clear_error;
mod compare;
mod create;
mod describe;
mod forget;
mod info;
mod map;
mod open;
mod options;
mod rebase;
mod resize;
mod snapshot;
mod status;

use super::Failure;
use clap::{Args, Subcommand};
use std::io::Write;
use std::path::PathBuf;

/// Options of `image`.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// No daemon is asked: this stands here so that '-s' is free for the commands.
    #[arg(long, global = true, hide = true)]
    socket: Option<PathBuf>,
    /// As above.
    #[arg(long, global = true, hide = true, default_value_t = 60)]
    timeout: u32,
    /// What to do with the image.
    #[command(subcommand)]
    command: ImageCommand,
}

/// What to do with an image file.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Make an image
    Create(create::CreateArgs),
    /// Say what an image is: size, format, features, backing files
    Info(info::InfoArgs),
    /// Say where the bytes of a disk are: which file of the chain, and where in it
    Map(map::MapArgs),
    /// Change the size of a disk
    Resize(resize::ResizeArgs),
    /// Put an image on another backing file, or on none, without changing what it reads as
    Rebase(rebase::RebaseArgs),
    /// Change only the name of the backing file in an image, which is not looked at
    #[command(after_help = rebase::SET_BACKING_HELP)]
    SetBacking(rebase::SetBackingArgs),
    /// Say whether two images read the same: exit code 0, or 1 if they differ
    Compare(compare::CompareArgs),
    /// List the internal snapshots of an image
    Snapshot(snapshot::SnapshotArgs),
    /// Look for contradictions and lost space in an image, and repair them
    #[command(after_help = check::HELP)]
    Check(check::CheckArgs),
    /// Let flushes of a file be tried again that failed for a daemon which has ended
    #[command(after_help = clear_error::HELP)]
    ClearError(clear_error::ClearErrorArgs),
    /// Give up the journal of an image: writes that completed and were not flushed
    #[command(after_help = forget::HELP)]
    ForgetJournal(forget::ForgetArgs),
}

/// Carries out a command.
pub fn execute(args: ImageArgs, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    match args.command {
        ImageCommand::Create(args) => create::run(&args, json, out),
        ImageCommand::Info(args) => info::run(&args, json, out),
        ImageCommand::Map(args) => map::run(&args, json, out),
        ImageCommand::Resize(args) => resize::run(&args, json, out),
        ImageCommand::Rebase(args) => rebase::run(&args, json, out),
        ImageCommand::SetBacking(args) => rebase::set_backing(&args, json, out),
        ImageCommand::Compare(args) => compare::run(&args, json, out),
        ImageCommand::Snapshot(args) => snapshot::run(&args, json, out),
        ImageCommand::Check(args) => check::run(&args, json, out),
        ImageCommand::ClearError(args) => clear_error::run(&args, json, out),
        ImageCommand::ForgetJournal(args) => forget::run(&args, json, out),
    }
}
