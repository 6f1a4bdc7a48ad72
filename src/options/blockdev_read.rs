//! Reading [`BlockdevOptions`] from a JSON value.

use super::blockdev::{
    Aio, BackingRef, BlockRef, BlockdevOptions, CopyOnReadOptions, DRIVERS, DetectZeroes, Discard,
    Driver, FileOptions, Inherited, Locking, OverlapCheck, Qcow2Options, QedOptions, RawOptions,
};
use super::error::ConfigError;
use super::fields::{Dialect, Fields};
use serde_json::Value;
use std::path::PathBuf;

/// Longest node name, as in QEMU.
const MAX_NODE_NAME: usize = 31;
/// Deepest nesting of nodes inside nodes; bounds the recursion.
const MAX_DEPTH: usize = 64;

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
const QED_KEYS: &[&str] = &["file", "backing"];
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

impl BlockdevOptions {
    /// Reads a backing node that is written inside the image above it, `above` being its node
    /// (`json:` names).
    pub fn from_nested(value: &Value, above: &Self, dialect: Dialect) -> Result<Self, ConfigError> {
        parse_node(value, "", dialect, Inherited::for_backing(above), 0)
    }

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
}

/// Where nodes inside a node are read.
struct KeyPath<'a> {
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
        let place = KeyPath {
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
        "qed" => Some(QED_KEYS),
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

fn parse_driver(place: &KeyPath<'_>, driver: &str) -> Result<Driver, ConfigError> {
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
        "qed" => Driver::Qed(QedOptions {
            file: place.required_child("file")?,
            backing: place.backing()?,
        }),
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

fn parse_qcow2(place: &KeyPath<'_>) -> Result<Qcow2Options, ConfigError> {
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

impl KeyPath<'_> {
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
