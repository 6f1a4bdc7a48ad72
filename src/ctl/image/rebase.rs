//! `rebase` and `set-backing`: another backing file for an image.

use super::open::{Images, Purpose};
use super::status::Mapper;
use crate::chain::{Chain, View};
use crate::ctl::Failure;
use crate::error::{Error, Result};
use crate::format::qcow2::{Backing, Clear};
use crate::format::{Format, Qcow2};
use crate::graph::Role;
use crate::storage::{AlignedBuf, IoBufs};
use clap::Args;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

/// Bytes of both chains that are compared at a time; at least a cluster.
const STEP: u64 = 2 << 20;

/// What stands under the help of `set-backing`.
pub const SET_BACKING_HELP: &str = "\
This is for a backing file that was moved or renamed, or whose copy is elsewhere. With a file that \
reads differently the image is damaged; 'rebase' is for that.";

/// What `rebase` and `set-backing` have in common.
#[derive(Debug, Args)]
pub struct Common {
    /// The image
    file: PathBuf,
    /// The new backing file's format
    #[arg(short = 'F', long, value_name = "FORMAT")]
    backing_format: Option<String>,
    /// The image's format [default: found out by looking]
    #[arg(short, long)]
    format: Option<String>,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

/// Options of `rebase`.
#[derive(Debug, Args)]
pub struct RebaseArgs {
    #[command(flatten)]
    common: Common,
    /// The new backing file, as the image is to name it: relative to the image's own folder
    /// [default: none; the image stands alone]
    #[arg(
        short,
        long,
        value_name = "FILE",
        default_value = "",
        hide_default_value = true
    )]
    backing: String,
    /// Change the name alone, as 'set-backing' does
    #[arg(short, long)]
    r#unsafe: bool,
}

/// Options of `set-backing`.
#[derive(Debug, Args)]
pub struct SetBackingArgs {
    #[command(flatten)]
    common: Common,
    /// The name to write into it; '' for none
    backing: String,
}

/// Carries out `rebase`.
pub fn run(args: &RebaseArgs, json: bool, out: &mut dyn Write) -> std::result::Result<(), Failure> {
    if args.r#unsafe {
        return write_name(&args.common, &args.backing, json, out);
    }
    let (args, backing) = (&args.common, &args.backing);
    let backing = named(backing, args.backing_format.as_deref())?;
    let images = Images::new()?;
    let name = images.open(&args.file, args.format.as_deref(), Purpose::Write)?;
    let old = match images.graph.node(&name)?.child(Role::Backing) {
        Some(below) => Some(images.chain(below)?),
        None => None,
    };
    // Opened before anything is changed: it must exist, and not have the image under it.
    let new = match &backing {
        Some(backing) => {
            let below = images.run(images.graph.open_as_backing(&name, backing))?;
            Some(images.chain(&below)?)
        }
        None => None,
    };
    images.run(images.graph.make_writable(&name))?;
    let top = images.chain(&name)?;
    let image = qcow2(&top)?;
    if let Some(backing) = &backing {
        // Before anything is copied.
        image.check_backing(backing)?;
    }
    let copied = images.run(async {
        let copied = copy_differences(&top, old, new).await?;
        image.set_backing(backing.as_ref()).await?;
        image.close().await?;
        Ok::<_, Error>(copied)
    })?;
    tell(args.quiet, json, backing.as_ref(), Some(copied), out)
}

/// Carries out `set-backing`.
pub fn set_backing(
    args: &SetBackingArgs,
    json: bool,
    out: &mut dyn Write,
) -> std::result::Result<(), Failure> {
    write_name(&args.common, &args.backing, json, out)
}

/// Changes the name of the backing file, and nothing else.
fn write_name(
    args: &Common,
    backing: &str,
    json: bool,
    out: &mut dyn Write,
) -> std::result::Result<(), Failure> {
    let backing = named(backing, args.backing_format.as_deref())?;
    let images = Images::new()?;
    // The backing file that it has may be gone.
    let name = images.open_alone(&args.file, args.format.as_deref(), Purpose::Write)?;
    images.run(images.graph.make_writable(&name))?;
    let top = images.chain(&name)?;
    let image = qcow2(&top)?;
    images.run(async {
        image.set_backing(backing.as_ref()).await?;
        image.close().await
    })?;
    tell(args.quiet, json, backing.as_ref(), None, out)
}

fn named(name: &str, format: Option<&str>) -> std::result::Result<Option<Backing>, Failure> {
    if name.is_empty() {
        return Ok(None);
    }
    let Some(format) = format else {
        return Err(Failure::Usage(format!(
            "backing file '{name}': its format must be named (expected -F raw, qcow2 or qed)"
        )));
    };
    Ok(Some(Backing {
        name: name.to_owned(),
        format: Some(format.to_owned()),
    }))
}

fn qcow2(chain: &Chain) -> Result<Arc<Qcow2>> {
    let top = chain.top();
    match &top.format {
        Format::Qcow2(image) => {
            if image.header().data_file_is_raw() {
                return Err(Error::unsupported(
                    top.storage.name(),
                    "a raw data file holds the whole disk: it can have no backing file",
                ));
            }
            Ok(image.clone())
        }
        other => Err(Error::unsupported(
            top.storage.name(),
            format!(
                "{} images have no backing file that could be changed (expected qcow2)",
                other.name()
            ),
        )),
    }
}

/// Copies into the top layer what reads differently from below it, once `new` takes the place of
/// `old`. Returns how many bytes that were.
async fn copy_differences(
    top: &Arc<Chain>,
    old: Option<Arc<Chain>>,
    new: Option<Arc<Chain>>,
) -> Result<u64> {
    let own = Mapper::new(Arc::new(Chain::new(vec![top.top().clone()])?)).await?;
    let old = Below::new(old).await?;
    let new = Below::new(new).await?;
    let step = STEP.max(top.cluster_size());
    let mut copied = 0;
    let mut at = 0;
    while at < top.size() {
        let status = own.status(at, (top.size() - at).min(step)).await?;
        let mut len = status.len;
        if !status.present {
            let (old_zero, old_len) = old.zeros(at, len).await?;
            let (new_zero, new_len) = new.zeros(at, old_len).await?;
            len = new_len;
            if !(old_zero && new_zero) {
                copied += replace(top, &old, &new, at, len).await?;
            }
        }
        at += len;
    }
    Ok(copied)
}

/// Writes into the top layer the units of a range, which it does not have, that read differently
/// from `old` than from `new`.
async fn replace(top: &Arc<Chain>, old: &Below, new: &Below, start: u64, len: u64) -> Result<u64> {
    let image = &qcow2(top)?;
    let unit = image.unit_size();
    // Whole units: what is written would otherwise bring along the rest, from the old chain.
    let first = start / unit * unit;
    let end = (start + len).next_multiple_of(unit).min(top.size());
    let was = old.read(first, end - first).await?;
    let is = new.read(first, end - first).await?;
    let mut copied = 0;
    for (index, (was_unit, is_unit)) in was
        .chunks(unit as usize)
        .zip(is.chunks(unit as usize))
        .enumerate()
    {
        if was_unit == is_unit {
            continue;
        }
        let at = index * unit as usize;
        let offset = first + at as u64;
        if was_unit.iter().all(|&byte| byte == 0) {
            set_zeros(top, image, offset, was_unit.len()).await?;
        } else {
            // SAFETY: `was` outlives the write.
            let bufs = unsafe { IoBufs::of(&was, at, was_unit.len()) };
            View::of(top.clone()).write(offset, bufs).await?;
        }
        copied += was_unit.len() as u64;
    }
    Ok(copied)
}

/// Makes units of zeros of the top layer's own, though they are zeros in the old chain too.
async fn set_zeros(top: &Arc<Chain>, image: &Qcow2, offset: u64, len: usize) -> Result<()> {
    if image.has_zero_clusters() {
        let _claim = image.claim(offset, len as u64).await;
        return image.clear(offset, len as u64, Clear::Zero).await.map(drop);
    }
    let zeros = AlignedBuf::zeroed(len);
    // SAFETY: `zeros` outlives the write.
    let bufs = unsafe { IoBufs::of(&zeros, 0, len) };
    View::of(top.clone()).write(offset, bufs).await
}

/// What lies, or is to lie, under an image: perhaps nothing.
struct Below(Option<Mapper>);

impl Below {
    async fn new(chain: Option<Arc<Chain>>) -> Result<Self> {
        Ok(Self(match chain {
            Some(chain) => Some(Mapper::new(chain).await?),
            None => None,
        }))
    }

    /// Whether a range is known to be zeros, and how far that goes.
    async fn zeros(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        match &self.0 {
            Some(mapper) if offset < mapper.chain().size() => {
                let len = len.min(mapper.chain().size() - offset);
                let status = mapper.status(offset, len).await?;
                Ok((status.zero, status.len))
            }
            _ => Ok((true, len)),
        }
    }

    /// Reads a range; past the end there are zeros.
    async fn read(&self, offset: u64, len: u64) -> Result<AlignedBuf> {
        let buffer = AlignedBuf::zeroed(len as usize);
        if let Some(mapper) = &self.0 {
            let within = mapper.chain().size().saturating_sub(offset).min(len);
            // SAFETY: `buffer` outlives the read.
            let bufs = unsafe { IoBufs::of(&buffer, 0, within as usize) };
            View::of(mapper.chain().clone()).read(offset, bufs).await?;
        }
        Ok(buffer)
    }
}

fn tell(
    quiet: bool,
    json: bool,
    backing: Option<&Backing>,
    copied: Option<u64>,
    out: &mut dyn Write,
) -> std::result::Result<(), Failure> {
    let name = backing.map(|backing| &backing.name);
    if json {
        let mut value = json!({"backing-filename": name});
        if let (Some(map), Some(copied)) = (value.as_object_mut(), copied) {
            map.insert("copied".to_owned(), json!(copied));
        }
        writeln!(out, "{value}")?;
    } else if !quiet {
        let what = match name {
            Some(name) => format!("Backing file: {name}"),
            None => "No backing file".to_owned(),
        };
        match copied {
            Some(bytes) => writeln!(out, "{what}; {bytes} bytes were copied into the image")?,
            None => writeln!(out, "{what}")?,
        }
    }
    Ok(())
}
