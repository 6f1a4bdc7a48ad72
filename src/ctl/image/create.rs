//! `create`: new images.

use super::open::{Images, Purpose, common};
use super::options::{HELP, Options};
use crate::chain::resize::preallocate_raw;
use crate::ctl::{Failure, units};
use crate::error::{Action, Error, Result};
use crate::format::Qcow2;
use crate::format::qcow2::create::{self, CreateOptions};
use crate::format::qcow2::header::Backing;
use crate::format::qcow2::{self, Preallocation};
use crate::graph::backing_options;
use crate::graph::resolve;
use crate::options::{BlockdevOptions, size};
use crate::storage::{NewFile, behind_links};
use clap::Args;
use serde_json::json;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Options of `create`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct CreateArgs {
    /// The image; what a file of this name holds is lost
    file: PathBuf,
    /// Size of the disk, such as 20G [default: the backing file's]
    size: Option<String>,
    /// The image's format: raw or qcow2
    #[arg(short, long, default_value = "raw", value_parser = ["raw", "qcow2"])]
    format: String,
    /// The backing file, as the image is to name it: relative to the image's own folder
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,
    /// The backing file's format
    #[arg(short = 'F', long, value_name = "FORMAT")]
    backing_format: Option<String>,
    /// Do not look at the backing file; the size must be given
    #[arg(short, long)]
    r#unsafe: bool,
    /// More options, see below
    #[arg(short, long, value_name = "KEY=VALUE,...")]
    options: Vec<String>,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

/// Carries out `create`.
pub fn run(args: &CreateArgs, json: bool, out: &mut dyn Write) -> std::result::Result<(), Failure> {
    let mut options = Options::parse(&args.options, &args.format)?;
    if let Some(name) = &args.backing {
        refuse_backing_of_raw(args)?;
        options.set("backing_file", "-b", name)?;
    }
    if let Some(format) = &args.backing_format {
        refuse_backing_of_raw(args)?;
        options.set("backing_fmt", "-F", format)?;
    }
    let images = Images::new()?;
    let size = find_size(&images, args, &options)?.next_multiple_of(512);
    let preallocation = options.preallocation()?;
    if args.format == "raw" {
        create_raw(&images, &args.file, size, preallocation)?;
    } else {
        let options = options.qcow2(size)?;
        let wanted = Wanted::new(options, preallocation)?;
        create_qcow2(&images, &args.file, &wanted)?;
    }
    let file = args.file.display().to_string();
    if json {
        let value = json!({"filename": file, "format": args.format, "virtual-size": size});
        writeln!(out, "{value}")?;
    } else if !args.quiet {
        let text = units::bytes(size);
        writeln!(
            out,
            "Created '{file}': {}, {text} ({size} bytes)",
            args.format
        )?;
    }
    Ok(())
}

fn refuse_backing_of_raw(args: &CreateArgs) -> std::result::Result<(), Failure> {
    if args.format == "raw" {
        return Err(Failure::Usage(
            "a raw image has no backing file (expected -f qcow2 with -b)".to_owned(),
        ));
    }
    Ok(())
}

/// The size that was asked for, or the backing file's, which is looked at in any case.
fn find_size(
    images: &Images,
    args: &CreateArgs,
    options: &Options,
) -> std::result::Result<u64, Failure> {
    let given = match (&args.size, options.size()?) {
        (Some(text), Some(_)) => {
            let text = format!("SIZE: {text} is given a second time, as -o size");
            return Err(Failure::Usage(text));
        }
        (Some(text), None) => {
            let size = size::parse(text).filter(|size| *size <= 1 << 62);
            Some(size.ok_or_else(|| Failure::Usage(units::size_error("SIZE", text)))?)
        }
        (None, size) => size,
    };
    let backing = match options.backing() {
        Some(backing) if !args.r#unsafe => Some(look_below(images, &args.file, &backing)?),
        Some(backing) => {
            needs_format(&backing, "?")?;
            None
        }
        None => None,
    };
    given.or(backing).ok_or_else(|| {
        Failure::Usage("the size is missing (expected SIZE, such as 20G, after FILE)".to_owned())
    })
}

/// Opens the backing file, as the users of the new image will. Returns its size.
fn look_below(
    images: &Images,
    file: &Path,
    backing: &Backing,
) -> std::result::Result<u64, Failure> {
    let context = |error: Error| match error {
        Error::Invalid(text) => Error::Invalid(format!("Could not open backing file: {text}")),
        other => other,
    };
    let options = backing_options(&common(Purpose::Read), file, backing).map_err(context)?;
    let options = BlockdevOptions {
        node_name: Some(images.graph.make_name()),
        ..options
    };
    let name = images.run(images.graph.open(&options)).map_err(context)?;
    let node = images.graph.node(&name)?;
    let same = std::fs::canonicalize(file).ok();
    if same.is_some() && same == std::fs::canonicalize(&node.filename).ok() {
        return Err(Failure::Usage(format!(
            "{}: the image would be its own backing file",
            file.display()
        )));
    }
    needs_format(backing, node.driver_name())?;
    Ok(images.chain(&name)?.size())
}

/// An image must say what its backing file is: a guest that writes a raw one could make it look
/// like another format.
fn needs_format(backing: &Backing, found: &str) -> std::result::Result<(), Failure> {
    if backing.format.is_some() {
        return Ok(());
    }
    Err(Failure::Usage(format!(
        "backing file '{}': its format must be named with -F (it looks like: {found})",
        backing.name
    )))
}

/// A qcow2 image that is to be made.
struct Wanted {
    options: CreateOptions,
    preallocation: Preallocation,
}

impl Wanted {
    fn new(options: CreateOptions, preallocation: Preallocation) -> Result<Self> {
        options.check()?;
        if preallocation != Preallocation::Off && options.backing.is_some() && !options.extended_l2
        {
            return Err(Error::Invalid(
                "preallocation: clusters allocated ahead would hide the backing file (expected \
                 preallocation=off, or extended_l2=on)"
                    .into(),
            ));
        }
        // A raw data file is read without a mapping by others, so all of it is mapped from the
        // start.
        let preallocation = match preallocation {
            Preallocation::Off if options.data_file_raw => Preallocation::Metadata,
            other => other,
        };
        Ok(Self {
            options,
            preallocation,
        })
    }
}

fn create_qcow2(images: &Images, file: &Path, wanted: &Wanted) -> Result<()> {
    let options = &wanted.options;
    let data = options.data_file.as_ref().map(|name| resolve(file, name));
    let backing = options.backing.as_ref().map(|b| resolve(file, &b.name));
    for (what, other) in [
        ("the image", Some(file)),
        ("the backing file", backing.as_deref()),
    ] {
        if let (Some(data), Some(other)) = (&data, other)
            && is_same(data, other)
        {
            return Err(Error::Invalid(format!(
                "data_file: '{}' is {what} (expected a file of its own)",
                data.display()
            )));
        }
    }
    // Both are open, and locked, before either is written to.
    let storage = images.run(NewFile::open(file))?;
    let data = data
        .map(|data| images.run(NewFile::open(&data)))
        .transpose()?;
    if let Some(data) = &data {
        images.run(data.set_size(options.size))?;
    }
    images.run(async {
        create::create(&*storage.storage(), &wanted.options).await?;
        if wanted.preallocation == Preallocation::Off {
            return Ok(());
        }
        let options = qcow2::Options {
            writable: true,
            ..qcow2::Options::default()
        };
        let data = data.as_ref().map(NewFile::storage);
        let image = Qcow2::open_with_data(storage.storage(), data, options).await?;
        image
            .preallocate(0, wanted.options.size, wanted.preallocation)
            .await?;
        image.close().await
    })?;
    storage.keep();
    if let Some(data) = data {
        data.keep();
    }
    Ok(())
}

fn create_raw(images: &Images, path: &Path, size: u64, mode: Preallocation) -> Result<()> {
    if mode == Preallocation::Metadata {
        return Err(Error::Invalid(
            "preallocation=metadata: a raw image has no metadata (expected off, falloc or full)"
                .into(),
        ));
    }
    let file = images.run(NewFile::open(path))?;
    images.run(file.set_size(size))?;
    images
        .run(preallocate_raw(&*file.storage(), 0, size, mode))
        .map_err(|error| Error::io(Action::Write, file.storage().name(), 0, &error))?;
    file.keep();
    Ok(())
}

/// Whether two names lead to one file, there or not yet.
fn is_same(one: &Path, other: &Path) -> bool {
    let inode = |path: &Path| {
        std::fs::metadata(path)
            .map(|file| (file.dev(), file.ino()))
            .ok()
    };
    if inode(one).is_some() {
        return inode(one) == inode(other);
    }
    let place = |path: &Path| {
        let path = behind_links(path);
        let parent = path.parent().filter(|parent| *parent != Path::new(""));
        let folder = parent.unwrap_or(Path::new(".")).canonicalize().ok()?;
        Some(folder.join(path.file_name()?))
    };
    let (one, other) = (place(one), place(other));
    one.is_some() && one == other
}
