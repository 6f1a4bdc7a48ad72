//! Images that are to be made: the `options` of QMP's `blockdev-create`.

use std::path::PathBuf;

use serde_json::Value;

use super::blockdev::{BlockRef, BlockdevOptions};
use super::error::ConfigError;
use super::fields::{Dialect, Fields};
use super::keys;

/// What of an image is to be allocated ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Allocate {
    /// Nothing.
    #[default]
    Off,
    /// The mapping.
    Metadata,
    /// And space in the file system.
    Falloc,
    /// And zeros written to it.
    Full,
}

/// An image that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageOptions {
    /// A file of zeros.
    File(NewFileOptions),
    /// An empty qcow2 image in a node.
    Qcow2(Box<NewQcow2Options>),
}

/// A file that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewFileOptions {
    /// Where.
    pub filename: PathBuf,
    /// How long it is to be, in bytes.
    pub size: u64,
    /// What is allocated ahead.
    pub preallocation: Allocate,
}

/// A qcow2 image that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewQcow2Options {
    /// What it is to be in.
    pub file: BlockRef,
    /// Size of the disk in bytes.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// The backing file, as the header is to name it.
    pub backing_file: Option<String>,
    /// Its format.
    pub backing_fmt: Option<String>,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// What is allocated ahead.
    pub preallocation: Allocate,
    /// Writers may put off refcount updates.
    pub lazy_refcounts: bool,
    /// Width of a refcount.
    pub refcount_bits: u64,
    /// L2 entries have a bitmap of subclusters.
    pub extended_l2: bool,
    /// Clusters are compressed with zstd, and not with zlib.
    pub zstd: bool,
}

impl ImageOptions {
    /// Reads the value of `options`.
    pub fn from_value(value: &Value) -> Result<Self, ConfigError> {
        let fields = Fields::new(value, "options", Dialect::Json)?;
        match fields.string("driver")? {
            "file" => Ok(Self::File(parse_file(&fields)?)),
            "qcow2" => Ok(Self::Qcow2(Box::new(parse_qcow2(&fields)?))),
            other => Err(ConfigError::bad_value(
                &fields.path("driver"),
                other,
                "one of: file, qcow2",
            )),
        }
    }
}

fn parse_allocation(fields: &Fields<'_>) -> Result<Allocate, ConfigError> {
    let words = [
        ("off", Allocate::Off),
        ("metadata", Allocate::Metadata),
        ("falloc", Allocate::Falloc),
        ("full", Allocate::Full),
    ];
    Ok(fields
        .opt_word("preallocation", &words)?
        .unwrap_or_default())
}

fn required(fields: &Fields<'_>, key: &str) -> Result<u64, ConfigError> {
    fields.opt_u64(key)?.ok_or_else(|| fields.missing(key))
}

fn parse_file(fields: &Fields<'_>) -> Result<NewFileOptions, ConfigError> {
    fields.only_keys(&[keys::CREATE, keys::CREATE_FILE])?;
    // Hints to file systems that this program does not give.
    fields.opt_bool("nocow")?;
    fields.opt_u64("extent-size-hint")?;
    Ok(NewFileOptions {
        filename: fields
            .opt_file("filename")?
            .ok_or_else(|| fields.missing("filename"))?,
        size: required(fields, "size")?,
        preallocation: parse_allocation(fields)?,
    })
}

fn parse_qcow2(fields: &Fields<'_>) -> Result<NewQcow2Options, ConfigError> {
    for key in ["encrypt", "data-file", "data-file-raw"] {
        if fields.get(key).is_some() {
            let text = format!("'{key}' is not supported here (stratactl image create may)");
            return Err(ConfigError::other(text));
        }
    }
    fields.only_keys(&[keys::CREATE, keys::CREATE_QCOW2])?;
    let file = match fields.get("file") {
        None => return Err(fields.missing("file")),
        Some(Value::String(name)) => BlockRef::Name(name.clone()),
        Some(value @ Value::Object(_)) => {
            let node = BlockdevOptions::from_unnamed(value, &fields.path("file"))?;
            BlockRef::Inline(Box::new(node))
        }
        Some(_) => return Err(fields.wrong_type("file", "object")),
    };
    let versions = [("v2", 2), ("v3", 3)];
    let types = [("zlib", false), ("zstd", true)];
    Ok(NewQcow2Options {
        file,
        size: required(fields, "size")?,
        version: fields.opt_word("version", &versions)?.unwrap_or(3),
        backing_file: fields.opt_owned("backing-file")?,
        backing_fmt: fields.opt_owned("backing-fmt")?,
        cluster_size: fields.opt_u64("cluster-size")?.unwrap_or(64 << 10),
        preallocation: parse_allocation(fields)?,
        lazy_refcounts: fields.bool_or("lazy-refcounts", false)?,
        refcount_bits: fields.opt_u64("refcount-bits")?.unwrap_or(16),
        extended_l2: fields.bool_or("extended-l2", false)?,
        zstd: fields
            .opt_word("compression-type", &types)?
            .unwrap_or(false),
    })
}
