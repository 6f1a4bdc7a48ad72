//! `compare`: whether two images read the same.

use super::open::{Images, Purpose};
use super::status::{Mapper, RangeStatus};
use crate::chain::View;
use crate::ctl::Failure;
use crate::error::Result;
use crate::storage::{AlignedBuf, IoBufs};
use clap::Args;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

/// Bytes that are compared at a time.
const STEP: u64 = 2 << 20;
/// Exit code: the images could not be compared. 1 is taken by those that differ.
const EXIT_ERROR: u8 = 2;

/// Options of `compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// The first image
    first: PathBuf,
    /// The second image
    second: PathBuf,
    /// The first image's format [default: found out by looking]
    #[arg(short, long)]
    format: Option<String>,
    /// The second image's format [default: found out by looking]
    #[arg(short = 'F', long)]
    second_format: Option<String>,
    /// Sizes, and what is allocated, must be the same too
    #[arg(short, long)]
    strict: bool,
    /// Read the images even while others write them
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

/// How two images compare.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Identical,
    Content(u64),
    Size,
    Allocation(u64),
}

impl Outcome {
    fn text(&self) -> String {
        match self {
            Self::Identical => "Images are identical.".to_owned(),
            Self::Content(offset) => format!("Content mismatch at offset {offset}!"),
            Self::Size => "Strict mode: Image size mismatch!".to_owned(),
            Self::Allocation(offset) => {
                format!("Strict mode: Offset {offset} block status mismatch!")
            }
        }
    }

    fn offset(&self) -> Option<u64> {
        match self {
            Self::Content(offset) | Self::Allocation(offset) => Some(*offset),
            Self::Identical | Self::Size => None,
        }
    }
}

/// Carries out `compare`.
pub fn run(
    args: &CompareArgs,
    json: bool,
    out: &mut dyn Write,
) -> std::result::Result<(), Failure> {
    let failed = |error| Failure::Image {
        error,
        code: EXIT_ERROR,
    };
    let images = Images::new().map_err(failed)?;
    let outcome = compare(&images, args).map_err(failed)?;
    if json {
        let value = json!({
            "identical": outcome == Outcome::Identical,
            "offset": outcome.offset(),
            "text": outcome.text(),
        });
        writeln!(out, "{value}")?;
    } else if !args.quiet {
        writeln!(out, "{}", outcome.text())?;
    }
    match outcome {
        Outcome::Identical => Ok(()),
        _ => Err(Failure::Outcome(1)),
    }
}

fn compare(images: &Images, args: &CompareArgs) -> Result<Outcome> {
    let purpose = Purpose::reading(args.force_share);
    let first = images.open(&args.first, args.format.as_deref(), purpose)?;
    let second = images.open(&args.second, args.second_format.as_deref(), purpose)?;
    let (first, second) = (images.chain(&first)?, images.chain(&second)?);
    images.run(async {
        let a = Mapper::new(first).await?;
        let b = Mapper::new(second).await?;
        let (size_a, size_b) = (a.chain().size(), b.chain().size());
        if args.strict && size_a != size_b {
            return Ok(Outcome::Size);
        }
        let common = size_a.min(size_b);
        let outcome = compare_common(&a, &b, common, args.strict).await?;
        if outcome != Outcome::Identical {
            return Ok(outcome);
        }
        let longer = if size_a > size_b { &a } else { &b };
        Ok(match first_data(longer, common).await? {
            None => Outcome::Identical,
            Some(offset) => Outcome::Content(offset),
        })
    })
}

/// Compares what both have.
async fn compare_common(a: &Mapper, b: &Mapper, end: u64, strict: bool) -> Result<Outcome> {
    let mut at = 0;
    while at < end {
        let one = a.status(at, end - at).await?;
        let two = b.status(at, one.len).await?;
        let len = one.len.min(two.len);
        if strict && allocation(&one) != allocation(&two) {
            return Ok(Outcome::Allocation(at));
        }
        if !(one.zero && two.zero)
            && let Some(offset) = first_difference(a, b, at, len).await?
        {
            return Ok(Outcome::Content(offset));
        }
        at += len;
    }
    Ok(Outcome::Identical)
}

/// What QEMU compares: a place that is kept for zeros counts, wherever it is.
fn allocation(status: &RangeStatus) -> (bool, bool, bool, bool) {
    let has_place = status.offset.is_some();
    (status.present, status.data, status.zero, has_place)
}

async fn first_difference(a: &Mapper, b: &Mapper, start: u64, len: u64) -> Result<Option<u64>> {
    let mut done = 0;
    while done < len {
        let now = (len - done).min(STEP);
        let one = read(a, start + done, now).await?;
        let two = read(b, start + done, now).await?;
        if *one != *two {
            let same = one.iter().zip(two.iter()).take_while(|(x, y)| x == y);
            return Ok(Some(start + done + same.count() as u64));
        }
        done += now;
    }
    Ok(None)
}

/// The first byte from `start` on that is not zero.
async fn first_data(mapper: &Mapper, start: u64) -> Result<Option<u64>> {
    let size = mapper.chain().size();
    let mut at = start;
    while at < size {
        let status = mapper.status(at, size - at).await?;
        let len = if status.zero {
            status.len
        } else {
            status.len.min(STEP)
        };
        if !status.zero {
            let bytes = read(mapper, at, len).await?;
            if let Some(place) = bytes.iter().position(|&byte| byte != 0) {
                return Ok(Some(at + place as u64));
            }
        }
        at += len;
    }
    Ok(None)
}

async fn read(mapper: &Mapper, offset: u64, len: u64) -> Result<AlignedBuf> {
    let buffer = AlignedBuf::zeroed(len as usize);
    // SAFETY: `buffer` outlives the read.
    let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
    View::of(mapper.chain().clone()).read(offset, bufs).await?;
    Ok(buffer)
}
