//! Block nodes: `--blockdev` and the arguments of QMP's `blockdev-add`.
//!
//! The options of a node and of the nodes written inside it come out with every default filled
//! in, inheritance included: a node written inside another one takes over its parent's cache
//! mode, `force-share` and, unless it is a backing file, `read-only`, as in QEMU. Whoever opens
//! the nodes has no rule left to apply.

use super::error::ConfigError;
use super::fields::{Dialect, Fields};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Longest node name, as in QEMU.
const MAX_NODE_NAME: usize = 31;
/// Deepest nesting of nodes inside nodes; bounds the recursion.
const MAX_DEPTH: usize = 64;

/// The drivers that can be named, for messages.
pub const DRIVERS: &[&str] = &["file", "host_device", "raw", "qcow2", "copy-on-read"];

const COMMON_KEYS: &[&str] = &[
    "driver",
    "node-name",
    "read-only",
    "auto-read-only",
    "force-share",
    "discard",
    "detect-zeroes",
    "cache",
    "active",
];
const FILE_KEYS: &[&str] = &[
    "filename",
    "aio",
    "aio-max-batch",
    "locking",
    "drop-cache",
    "pr-manager",
    "x-check-cache-dropped",
];
const RAW_KEYS: &[&str] = &["file", "offset", "size"];
const COPY_ON_READ_KEYS: &[&str] = &["file", "bottom"];
const QCOW2_KEYS: &[&str] = &[
    "file",
    "backing",
    "copy-on-read",
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
    "data-file",
    "encrypt",
];

/// One block node, with all defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockdevOptions {
    /// The node's name. Always there on nodes that are not written inside another one.
    pub node_name: Option<String>,
    /// The node may not be written.
    pub read_only: bool,
    /// When the image cannot be opened for writing, open it read-only instead of failing.
    pub auto_read_only: bool,
    /// Let other programs write the image too (only with `read_only`).
    pub force_share: bool,
    /// What becomes of discard requests.
    pub discard: Discard,
    /// What becomes of writes of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// How the host caches the image.
    pub cache: CacheOptions,
    /// The driver and its own options.
    pub driver: Driver,
}

/// What becomes of discard requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Discard {
    /// They are dropped.
    #[default]
    Ignore,
    /// They free space in the image.
    Unmap,
}

/// What becomes of writes whose data is all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// They are written like any other.
    #[default]
    Off,
    /// They become write-zeroes requests.
    On,
    /// They become write-zeroes requests that may free space.
    Unmap,
}

/// How the host caches an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheOptions {
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Drop flushes: the data is lost when the host goes down.
    pub no_flush: bool,
}

/// A node's driver with the options that only it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Driver {
    /// A regular file.
    File(FileOptions),
    /// A block or character device of the host.
    HostDevice(FileOptions),
    /// A raw image, or a window of one.
    Raw(RawOptions),
    /// A qcow2 image.
    Qcow2(Box<Qcow2Options>),
    /// A filter that copies into its child what it had to read from further below.
    CopyOnRead(CopyOnReadOptions),
    /// An image whose format is found out by looking at it. Never named on a command line:
    /// it comes from `--blk-file` and from backing files without a recorded format.
    Auto(AutoOptions),
}

/// Options of a file or host device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileOptions {
    /// Where it is.
    pub filename: PathBuf,
    /// The interface for I/O that was asked for, if any.
    pub aio: Option<Aio>,
    /// Whether to take QEMU's image locks.
    pub locking: Locking,
}

/// Interfaces for I/O on files. Only a wish: every file is driven by io_uring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aio {
    /// A pool of threads.
    Threads,
    /// Linux AIO.
    Native,
    /// io_uring.
    IoUring,
}

/// Whether to take QEMU's image locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Locking {
    /// Where the system can.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// Options of a raw image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawOptions {
    /// What it is stored in.
    pub file: BlockRef,
    /// Where in `file` it begins.
    pub offset: u64,
    /// How long it is; to the end of `file` when not given.
    pub size: Option<u64>,
}

/// Options of the copy-on-read filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyOnReadOptions {
    /// The node that gets the copies.
    pub file: BlockRef,
    /// The lowest node to copy from; everything when not given.
    pub bottom: Option<String>,
}

/// Options of an image with a format to find out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AutoOptions {
    /// What it is stored in.
    pub file: BlockRef,
    /// Copy into the image what reads had to take from its backing file.
    pub copy_on_read: bool,
}

/// Options of a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2Options {
    /// What it is stored in.
    pub file: BlockRef,
    /// What lies under it.
    pub backing: BackingRef,
    /// The external data file, when it is to be another one than the image names.
    pub data_file: Option<BlockRef>,
    /// Copy into the image what reads had to take from its backing file.
    pub copy_on_read: bool,
    /// Put off updates of refcounts; as the image says when not given.
    pub lazy_refcounts: Option<bool>,
    /// Free space in the file when the guest discards; as `discard` says when not given.
    pub pass_discard_request: Option<bool>,
    /// Free space in the file when a snapshot is deleted.
    pub pass_discard_snapshot: bool,
    /// Free space in the file whenever a cluster becomes free.
    pub pass_discard_other: bool,
    /// Keep the cluster of a discarded range, so that the file does not fragment.
    pub discard_no_unref: bool,
    /// How much to look out for writes over metadata.
    pub overlap_check: OverlapCheck,
    /// Limit of both metadata caches together, in bytes.
    pub cache_size: Option<u64>,
    /// Limit of the mapping cache, in bytes.
    pub l2_cache_size: Option<u64>,
    /// Size of one entry of the mapping cache, in bytes.
    pub l2_cache_entry_size: Option<u64>,
    /// Limit of the refcount cache, in bytes.
    pub refcount_cache_size: Option<u64>,
    /// Seconds after which an unused cache entry is dropped; 0 is never.
    pub cache_clean_interval: Option<u64>,
}

/// How much to look out for writes over qcow2 metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OverlapCheck {
    /// Not at all.
    None,
    /// What costs constant time.
    Constant,
    /// That, and what is in memory anyway.
    #[default]
    Cached,
    /// Everything.
    All,
}

/// A node under another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockRef {
    /// A node that exists already, by name.
    Name(String),
    /// A node written in place.
    Inline(Box<BlockdevOptions>),
}

/// What lies under a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackingRef {
    /// What the image's header says.
    Default,
    /// Nothing, whatever the header says.
    None,
    /// This node, whatever the header says.
    Node(BlockRef),
}

/// What a node written inside another one takes over from it.
#[derive(Debug, Clone, Copy, Default)]
struct Inherited {
    read_only: bool,
    auto_read_only: bool,
    force_share: bool,
    discard: Discard,
    cache: CacheOptions,
}

impl BlockdevOptions {
    /// Reads a whole node with a name of its own: the value of `--blockdev`, or the arguments of
    /// `blockdev-add`.
    pub fn from_value(value: &Value, dialect: Dialect) -> Result<Self, ConfigError> {
        let node = parse_node(value, "", dialect, Inherited::default(), 0)?;
        if node.node_name.is_none() {
            return Err(ConfigError::other(
                "'node-name' must be specified for the root node",
            ));
        }
        Ok(node)
    }

    /// A node with a driver and nothing else said.
    pub fn new(driver: Driver) -> Self {
        Self {
            node_name: None,
            read_only: false,
            auto_read_only: false,
            force_share: false,
            discard: Discard::Ignore,
            detect_zeroes: DetectZeroes::Off,
            cache: CacheOptions::default(),
            driver,
        }
    }

    /// The node for a backing file that the header of this one names: read-only, the rest as a
    /// backing node written inside this one gets it. `driver` is the layer's format over a file
    /// node made with [`BlockdevOptions::child_file`].
    pub fn backing_node(&self, driver: Driver) -> Self {
        let inherited = Inherited::for_backing(self);
        Self {
            read_only: inherited.read_only,
            force_share: inherited.force_share,
            discard: inherited.discard,
            cache: inherited.cache,
            ..Self::new(driver)
        }
    }

    /// The node for a file under this one, with what it takes over from it.
    pub fn child_file(&self, filename: &Path) -> Self {
        let inherited = Inherited::for_file(self);
        Self {
            read_only: inherited.read_only,
            auto_read_only: inherited.auto_read_only,
            force_share: inherited.force_share,
            discard: inherited.discard,
            cache: inherited.cache,
            ..Self::new(Driver::File(FileOptions {
                filename: filename.to_owned(),
                aio: None,
                locking: Locking::Auto,
            }))
        }
    }

    /// The nodes directly under this one, with the key that leads to each.
    pub fn children(&self) -> Vec<(&'static str, &BlockRef)> {
        match &self.driver {
            Driver::File(_) | Driver::HostDevice(_) => Vec::new(),
            Driver::Raw(RawOptions { file, .. })
            | Driver::CopyOnRead(CopyOnReadOptions { file, .. })
            | Driver::Auto(AutoOptions { file, .. }) => vec![("file", file)],
            Driver::Qcow2(options) => {
                let mut children = vec![("file", &options.file)];
                if let BackingRef::Node(backing) = &options.backing {
                    children.push(("backing", backing));
                }
                children.extend(options.data_file.as_ref().map(|file| ("data-file", file)));
                children
            }
        }
    }
}

impl Driver {
    /// The driver's name, as in `driver=`.
    pub fn name(&self) -> &'static str {
        match self {
            Driver::File(_) => "file",
            Driver::HostDevice(_) => "host_device",
            Driver::Raw(_) => "raw",
            Driver::Qcow2(_) => "qcow2",
            Driver::CopyOnRead(_) => "copy-on-read",
            Driver::Auto(_) => "auto",
        }
    }
}

impl Inherited {
    fn for_file(parent: &BlockdevOptions) -> Self {
        Self {
            read_only: parent.read_only,
            auto_read_only: parent.auto_read_only,
            force_share: parent.force_share,
            // The upper node decides what becomes of a discard; the lower one obeys.
            discard: Discard::Unmap,
            cache: parent.cache,
        }
    }

    fn for_backing(parent: &BlockdevOptions) -> Self {
        Self {
            read_only: true,
            auto_read_only: false,
            ..Self::for_file(parent)
        }
    }
}

/// Where nodes inside a node are read.
struct Place<'a> {
    fields: Fields<'a>,
    parent: &'a BlockdevOptions,
    depth: usize,
}

fn parse_node(
    value: &Value,
    path: &str,
    dialect: Dialect,
    inherited: Inherited,
    depth: usize,
) -> Result<BlockdevOptions, ConfigError> {
    if depth > MAX_DEPTH {
        let text = format!("nodes are nested more than {MAX_DEPTH} levels deep");
        return Err(ConfigError::other(text));
    }
    let fields = Fields::new(value, path, dialect)?;
    let driver = fields.string("driver")?;
    let keys = driver_keys(driver).ok_or_else(|| unsupported_driver(&fields, driver))?;
    fields.only(&[COMMON_KEYS, keys])?;
    // The driver's part needs the common part, which its children inherit: a placeholder stands
    // for it until it is known.
    let common = parse_common(&fields, inherited)?;
    let driver = {
        let place = Place {
            fields,
            parent: &common,
            depth,
        };
        parse_driver(&place, driver)?
    };
    Ok(BlockdevOptions { driver, ..common })
}

fn driver_keys(driver: &str) -> Option<&'static [&'static str]> {
    match driver {
        "file" | "host_device" => Some(FILE_KEYS),
        "raw" => Some(RAW_KEYS),
        "qcow2" => Some(QCOW2_KEYS),
        "copy-on-read" => Some(COPY_ON_READ_KEYS),
        _ => None,
    }
}

fn unsupported_driver(fields: &Fields<'_>, driver: &str) -> ConfigError {
    let expected = format!("one of: {}", DRIVERS.join(", "));
    ConfigError::bad_value(&fields.path("driver"), driver, expected)
}

fn parse_common(fields: &Fields<'_>, inherited: Inherited) -> Result<BlockdevOptions, ConfigError> {
    let node_name = fields.opt_id("node-name")?;
    if let Some(name) = node_name
        .as_deref()
        .filter(|name| name.len() > MAX_NODE_NAME)
    {
        let expected = format!("at most {MAX_NODE_NAME} characters");
        return Err(ConfigError::bad_value(
            &fields.path("node-name"),
            name,
            expected,
        ));
    }
    if fields.opt_bool("active")? == Some(false) {
        return Err(ConfigError::bad_value(
            &fields.path("active"),
            "off",
            "'on'",
        ));
    }
    let mut cache = inherited.cache;
    if let Some(object) = fields.opt_object("cache")? {
        object.only(&[&["direct", "no-flush"]])?;
        cache.direct = object.bool_or("direct", cache.direct)?;
        cache.no_flush = object.bool_or("no-flush", cache.no_flush)?;
    }
    let discard = [("ignore", Discard::Ignore), ("unmap", Discard::Unmap)];
    let zeroes = [
        ("off", DetectZeroes::Off),
        ("on", DetectZeroes::On),
        ("unmap", DetectZeroes::Unmap),
    ];
    let placeholder = FileOptions {
        filename: PathBuf::new(),
        aio: None,
        locking: Locking::Auto,
    };
    let node = BlockdevOptions {
        node_name,
        read_only: fields.bool_or("read-only", inherited.read_only)?,
        auto_read_only: fields.bool_or("auto-read-only", inherited.auto_read_only)?,
        force_share: fields.bool_or("force-share", inherited.force_share)?,
        discard: fields
            .opt_word("discard", &discard)?
            .unwrap_or(inherited.discard),
        detect_zeroes: fields
            .opt_word("detect-zeroes", &zeroes)?
            .unwrap_or_default(),
        cache,
        driver: Driver::File(placeholder),
    };
    check_common(&node)?;
    Ok(node)
}

fn check_common(node: &BlockdevOptions) -> Result<(), ConfigError> {
    if node.force_share && !node.read_only {
        let text = "force-share=on can only be used with read-only images";
        return Err(ConfigError::other(text));
    }
    if node.detect_zeroes == DetectZeroes::Unmap && node.discard != Discard::Unmap {
        let text = "setting detect-zeroes to unmap is not allowed without setting discard \
                    operation to unmap";
        return Err(ConfigError::other(text));
    }
    Ok(())
}

fn parse_driver(place: &Place<'_>, driver: &str) -> Result<Driver, ConfigError> {
    let fields = &place.fields;
    Ok(match driver {
        "file" => Driver::File(parse_file(fields)?),
        "host_device" => Driver::HostDevice(parse_file(fields)?),
        "raw" => Driver::Raw(RawOptions {
            file: place.required_child("file")?,
            offset: fields.opt_u64("offset")?.unwrap_or(0),
            size: fields.opt_u64("size")?,
        }),
        "qcow2" => Driver::Qcow2(Box::new(parse_qcow2(place)?)),
        "copy-on-read" => Driver::CopyOnRead(CopyOnReadOptions {
            file: place.required_child("file")?,
            bottom: fields.opt_owned("bottom")?,
        }),
        other => return Err(unsupported_driver(fields, other)),
    })
}

fn parse_file(fields: &Fields<'_>) -> Result<FileOptions, ConfigError> {
    let aio = [
        ("threads", Aio::Threads),
        ("native", Aio::Native),
        ("io_uring", Aio::IoUring),
    ];
    let locking = [
        ("auto", Locking::Auto),
        ("on", Locking::On),
        ("off", Locking::Off),
    ];
    // Accepted for their form: they tune QEMU's own I/O paths.
    fields.opt_u64("aio-max-batch")?;
    fields.opt_bool("drop-cache")?;
    fields.opt_bool("x-check-cache-dropped")?;
    if fields.opt_str("pr-manager")?.is_some() {
        return Err(ConfigError::other("'pr-manager' is not supported"));
    }
    Ok(FileOptions {
        filename: fields
            .opt_file("filename")?
            .ok_or_else(|| fields.missing("filename"))?,
        aio: fields.opt_word("aio", &aio)?,
        locking: fields.opt_word("locking", &locking)?.unwrap_or_default(),
    })
}

fn parse_qcow2(place: &Place<'_>) -> Result<Qcow2Options, ConfigError> {
    let fields = &place.fields;
    if fields.get("encrypt").is_some() {
        return Err(ConfigError::other(
            "'encrypt': encrypted images are not supported",
        ));
    }
    let options = Qcow2Options {
        file: place.required_child("file")?,
        backing: place.backing()?,
        data_file: place.child("data-file")?,
        copy_on_read: fields.bool_or("copy-on-read", false)?,
        lazy_refcounts: fields.opt_bool("lazy-refcounts")?,
        pass_discard_request: fields.opt_bool("pass-discard-request")?,
        pass_discard_snapshot: fields.bool_or("pass-discard-snapshot", true)?,
        pass_discard_other: fields.bool_or("pass-discard-other", false)?,
        discard_no_unref: fields.bool_or("discard-no-unref", false)?,
        overlap_check: parse_overlap_check(fields)?,
        cache_size: fields.opt_u64("cache-size")?,
        l2_cache_size: fields.opt_u64("l2-cache-size")?,
        l2_cache_entry_size: fields.opt_u64("l2-cache-entry-size")?,
        refcount_cache_size: fields.opt_u64("refcount-cache-size")?,
        cache_clean_interval: fields.opt_ranged("cache-clean-interval", 0, u32::MAX.into())?,
    };
    if let Some(size) = options.l2_cache_entry_size
        && !(size.is_power_of_two() && (512..=2 << 20).contains(&size))
    {
        let expected = "a power of two from 512 to the cluster size";
        let key = fields.path("l2-cache-entry-size");
        return Err(ConfigError::bad_value(&key, &size.to_string(), expected));
    }
    let all_caches = options.cache_size.is_some()
        && options.l2_cache_size.is_some()
        && options.refcount_cache_size.is_some();
    if all_caches {
        let text = "cache-size, l2-cache-size and refcount-cache-size may not be set at the same \
                    time";
        return Err(ConfigError::other(text));
    }
    Ok(options)
}

/// Either a word, or an object with the word as `template` and a switch for each structure.
fn parse_overlap_check(fields: &Fields<'_>) -> Result<OverlapCheck, ConfigError> {
    const WORDS: &[(&str, OverlapCheck)] = &[
        ("none", OverlapCheck::None),
        ("constant", OverlapCheck::Constant),
        ("cached", OverlapCheck::Cached),
        ("all", OverlapCheck::All),
    ];
    const SWITCHES: &[&str] = &[
        "main-header",
        "active-l1",
        "active-l2",
        "refcount-table",
        "refcount-block",
        "snapshot-table",
        "inactive-l1",
        "inactive-l2",
        "bitmap-directory",
    ];
    let word = if let Some(Value::Object(_)) = fields.get("overlap-check") {
        let Some(object) = fields.opt_object("overlap-check")? else {
            return Ok(OverlapCheck::default());
        };
        object.only(&[&["template"], SWITCHES])?;
        for switch in SWITCHES {
            object.opt_bool(switch)?;
        }
        object.opt_word("template", WORDS)?
    } else {
        fields.opt_word("overlap-check", WORDS)?
    };
    Ok(word.unwrap_or_default())
}

impl Place<'_> {
    fn required_child(&self, key: &str) -> Result<BlockRef, ConfigError> {
        self.child(key)?.ok_or_else(|| self.fields.missing(key))
    }

    fn child(&self, key: &str) -> Result<Option<BlockRef>, ConfigError> {
        self.reference(key, Inherited::for_file(self.parent))
    }

    fn backing(&self) -> Result<BackingRef, ConfigError> {
        match (self.fields.get("backing"), self.fields.dialect()) {
            (None, _) => Ok(BackingRef::Default),
            (Some(Value::Null), _) => Ok(BackingRef::None),
            (Some(Value::String(text)), _) if text.is_empty() => Ok(BackingRef::None),
            // Text has no other way to say null.
            (Some(Value::String(text)), Dialect::Keyval) if text == "null" => Ok(BackingRef::None),
            _ => {
                let node = self.reference("backing", Inherited::for_backing(self.parent))?;
                Ok(node.map_or(BackingRef::Default, BackingRef::Node))
            }
        }
    }

    fn reference(&self, key: &str, inherited: Inherited) -> Result<Option<BlockRef>, ConfigError> {
        let path = self.fields.path(key);
        match self.fields.get(key) {
            None => Ok(None),
            Some(Value::String(name)) if name.is_empty() => {
                let expected = "the name of a node";
                Err(ConfigError::bad_value(&path, name, expected))
            }
            Some(Value::String(name)) => Ok(Some(BlockRef::Name(name.clone()))),
            Some(value @ Value::Object(_)) => {
                let dialect = self.fields.dialect();
                let node = parse_node(value, &path, dialect, inherited, self.depth + 1)?;
                Ok(Some(BlockRef::Inline(Box::new(node))))
            }
            Some(_) => Err(self.fields.wrong_type(key, "object")),
        }
    }
}
