//! The options of `create -o`, in qemu-img's words.

use crate::ctl::{Failure, units};
use crate::format::qcow2::Preallocation;
use crate::format::qcow2::create::CreateOptions;
use crate::format::qcow2::header::{Backing, Compression};
use crate::options::keyval::{self, Notation};
use crate::options::size;
use serde_json::{Map, Value};

/// What stands under the help of `create`.
pub const HELP: &str = "\
Options for -o, several with commas between (',,' is a comma in a name):
  size=SIZE              size of the disk, instead of SIZE at the end
  preallocation=MODE     off; metadata: every cluster has its place (qcow2); falloc: and its
                         space in the file system; full: and zeros written to it
for qcow2:
  backing_file=FILE      the backing file (-b)
  backing_fmt=FORMAT     its format (-F)
  cluster_size=SIZE      512 to 2M, a power of two [64K]
  compat=LEVEL           v3 (or 1.1), or v2 (or 0.10) for old programs [v3]
  compression_type=TYPE  how clusters will be compressed: zlib or zstd [zlib]
  data_file=FILE         keep the guest's data in this file, which is made too
  data_file_raw=on|off   it is by itself a raw image of the disk [off]
  extended_l2=on|off     allocate in 32nds of a cluster [off]
  lazy_refcounts=on|off  put off refcount updates [off]
  refcount_bits=BITS     1 to 64, a power of two [16]

SIZE is in bytes, or with a suffix: 512K, 20G, 1.5T (powers of 1024).

Examples:
  stratactl image create -f qcow2 disk.qcow2 20G
  stratactl image create -f qcow2 -b golden.qcow2 -F qcow2 overlay.qcow2
  stratactl image create -f qcow2 -o cluster_size=2M,preallocation=falloc disk.qcow2 100G";

const RAW_KEYS: &[&str] = &["preallocation", "size"];
const QCOW2_KEYS: &[&str] = &[
    "backing_file",
    "backing_fmt",
    "cluster_size",
    "compat",
    "compression_type",
    "data_file",
    "data_file_raw",
    "extended_l2",
    "lazy_refcounts",
    "preallocation",
    "refcount_bits",
    "size",
];

/// What is to be made, as far as the options say.
#[derive(Debug, Default)]
pub struct Options {
    values: Map<String, Value>,
}

impl Options {
    /// Reads the values of all `-o` for an image of `format`; of two equal keys the later wins.
    pub fn parse(texts: &[String], format: &str) -> Result<Self, Failure> {
        let keys = if format == "raw" {
            RAW_KEYS
        } else {
            QCOW2_KEYS
        };
        let mut values = Map::new();
        for text in texts {
            let parsed = keyval::parse(text, Notation::default())
                .map_err(|error| Failure::Usage(format!("-o {text}: {error}")))?;
            let Value::Object(parsed) = parsed else {
                continue;
            };
            for (key, value) in parsed {
                if !keys.contains(&key.as_str()) {
                    return Err(Failure::Usage(format!(
                        "-o {key}: unknown option for {format} (expected one of: {})",
                        keys.join(", ")
                    )));
                }
                values.insert(key, value);
            }
        }
        Ok(Self { values })
    }

    /// Sets an option that has a switch of its own, unless `-o` has it too.
    pub fn set(&mut self, key: &'static str, switch: &str, value: &str) -> Result<(), Failure> {
        if let Some(other) = self.text(key) {
            return Err(Failure::Usage(format!(
                "{switch} {value}: given a second time, as -o {key}={other}"
            )));
        }
        self.values.insert(key.to_owned(), value.into());
        Ok(())
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.values.get(key).and_then(Value::as_str)
    }

    fn size_of(&self, key: &str) -> Result<Option<u64>, Failure> {
        self.text(key)
            .map(|text| {
                size::parse(text).ok_or_else(|| Failure::Usage(units::size_error(key, text)))
            })
            .transpose()
    }

    fn switch(&self, key: &str) -> Result<bool, Failure> {
        match self.text(key) {
            None | Some("off" | "no" | "false" | "n") => Ok(false),
            Some("on" | "yes" | "true" | "y") => Ok(true),
            Some(other) => Err(bad_value(key, other, "on or off")),
        }
    }

    /// The size of the disk.
    pub fn size(&self) -> Result<Option<u64>, Failure> {
        self.size_of("size")
    }

    /// The backing file.
    pub fn backing(&self) -> Option<Backing> {
        self.text("backing_file")
            .filter(|name| !name.is_empty())
            .map(|name| Backing {
                name: name.to_owned(),
                format: self.text("backing_fmt").map(str::to_owned),
            })
    }

    /// What is to be allocated ahead.
    pub fn preallocation(&self) -> Result<Preallocation, Failure> {
        match self.text("preallocation") {
            None => Ok(Preallocation::Off),
            Some(text) => {
                preallocation(text).map_err(|expected| bad_value("preallocation", text, &expected))
            }
        }
    }

    /// The options of a qcow2 image of `size` bytes.
    pub fn qcow2(&self, size: u64) -> Result<CreateOptions, Failure> {
        let defaults = CreateOptions::new(size);
        let version = match self.text("compat") {
            None | Some("1.1" | "v3") => 3,
            Some("0.10" | "v2") => 2,
            Some(other) => return Err(bad_value("compat", other, "v2, 0.10, v3 or 1.1")),
        };
        let compression = match self.text("compression_type") {
            None | Some("zlib") => Compression::Zlib,
            Some("zstd") => Compression::Zstd,
            Some(other) => return Err(bad_value("compression_type", other, "zlib or zstd")),
        };
        let refcount_bits = match self.text("refcount_bits") {
            None => defaults.refcount_bits,
            Some(text) => text
                .parse()
                .map_err(|_| bad_value("refcount_bits", text, "1, 2, 4, 8, 16, 32 or 64"))?,
        };
        Ok(CreateOptions {
            version,
            cluster_size: self
                .size_of("cluster_size")?
                .unwrap_or(defaults.cluster_size),
            refcount_bits,
            lazy_refcounts: self.switch("lazy_refcounts")?,
            extended_l2: self.switch("extended_l2")?,
            compression,
            backing: self.backing(),
            data_file: self.text("data_file").map(str::to_owned),
            data_file_raw: self.switch("data_file_raw")?,
            ..defaults
        })
    }
}

/// Reads a preallocation mode; the error says what was expected.
pub fn preallocation(text: &str) -> Result<Preallocation, String> {
    match text {
        "off" => Ok(Preallocation::Off),
        "metadata" => Ok(Preallocation::Metadata),
        "falloc" => Ok(Preallocation::Falloc),
        "full" => Ok(Preallocation::Full),
        _ => Err("off, metadata, falloc or full".to_owned()),
    }
}

fn bad_value(key: &str, value: &str, expected: &str) -> Failure {
    Failure::Usage(format!(
        "-o {key}={value}: not possible (expected {expected})"
    ))
}
