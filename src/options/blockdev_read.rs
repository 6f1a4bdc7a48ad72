//! Reading [`BlockdevOptions`] from a JSON value.

use super::blkdebug;
use super::blockdev::{
    Aio, AutoOptions, BackingRef, BlockRef, BlockdevOptions, CopyOnReadOptions, DetectZeroes,
    Discard, Driver, FileOptions, Inherited, Locking, NullOptions, OverlapCheck, Qcow2Options,
    QedOptions, RawOptions,
};
use super::error::ConfigError;
use super::fields::{Dialect, Fields, is_well_formed_id};
use super::keys::{self, DRIVERS, Key, KeyType};
use serde_json::Value;
use std::path::PathBuf;

/// Longest node name, as in QEMU.
const MAX_NODE_NAME: usize = 31;
/// Largest disk in bytes, in whole sectors.
const MAX_SIZE: u64 = i64::MAX as u64 / 512 * 512;
/// Deepest nesting of nodes inside nodes; bounds the recursion.
const MAX_DEPTH: usize = 64;

impl BlockdevOptions {
    /// Reads a backing node that is written inside the image above it, `above` being its node
    /// (`json:` names).
    pub fn from_nested(value: &Value, above: &Self, dialect: Dialect) -> Result<Self, ConfigError> {
        parse_node(value, "", dialect, Inherited::for_backing(above), 0)
    }

    /// Reads a node that is the member at `path` of something else, and needs no name.
    ///
    /// # Errors
    /// As for [`from_value`](Self::from_value).
    pub fn from_unnamed(value: &Value, path: &str) -> Result<Self, ConfigError> {
        parse_node(value, path, Dialect::Json, Inherited::default(), 0)
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
    let own = driver_keys(driver, dialect).ok_or_else(|| unsupported_driver(&fields, driver))?;
    if driver == "qcow2" && fields.get("encrypt").is_some() {
        let text = "'encrypt': encrypted images are not supported";
        return Err(ConfigError::other(text));
    }
    fields.only_keys(&[keys::NODE, own])?;
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

fn driver_keys(driver: &str, dialect: Dialect) -> Option<&'static [Key]> {
    match driver {
        "auto" if dialect == Dialect::Recorded => Some(keys::AUTO),
        "file" | "host_device" => Some(keys::FILE),
        "raw" => Some(keys::RAW),
        "qcow2" => Some(keys::QCOW2),
        "qed" => Some(keys::QED),
        "copy-on-read" => Some(keys::COPY_ON_READ),
        "null-co" | "null-aio" => Some(keys::NULL),
        "blkdebug" => Some(keys::BLKDEBUG),
        _ => None,
    }
}

fn unsupported_driver(fields: &Fields<'_>, driver: &str) -> ConfigError {
    let expected = format!("one of: {}", DRIVERS.join(", "));
    ConfigError::bad_value(&fields.path("driver"), driver, expected)
}

/// Refuses what cannot be the name of a node.
///
/// # Errors
/// In QEMU's words.
pub fn check_node_name(name: &str) -> Result<(), String> {
    if !is_well_formed_id(name) {
        return Err(format!("Invalid node-name: '{name}'"));
    }
    match name.len() > MAX_NODE_NAME {
        true => Err("Node name too long".to_owned()),
        false => Ok(()),
    }
}

fn parse_common(fields: &Fields<'_>, inherited: Inherited) -> Result<BlockdevOptions, ConfigError> {
    let name = fields.opt_str("node-name")?.unwrap_or_default();
    let node_name = fields
        .opt_id("node-name")
        .map_err(|error| error.said(format!("Invalid node-name: '{name}'")))?;
    if let Some(name) = node_name
        .as_deref()
        .filter(|name| name.len() > MAX_NODE_NAME)
    {
        let expected = format!("at most {MAX_NODE_NAME} characters");
        return Err(
            ConfigError::bad_value(&fields.path("node-name"), name, expected)
                .said("Node name too long"),
        );
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
        object.only_keys(&[keys::CACHE])?;
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
        "auto" => Driver::Auto(AutoOptions {
            file: place.required_child("file")?,
            copy_on_read: fields.bool_or("copy-on-read", false)?,
        }),
        "blkdebug" => {
            let image = place.required_child("image")?;
            Driver::Blkdebug(Box::new(blkdebug::parse(fields, image)?))
        }
        "null-co" => Driver::NullCo(parse_null(fields)?),
        "null-aio" => Driver::NullAio(parse_null(fields)?),
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

fn parse_null(fields: &Fields<'_>) -> Result<NullOptions, ConfigError> {
    let default = NullOptions::default();
    let size = fields.opt_ranged("size", 0, MAX_SIZE)?;
    let latency = fields.opt_ranged("latency-ns", 0, i64::MAX as u64)?;
    Ok(NullOptions {
        size: size.unwrap_or(default.size),
        latency_ns: latency.unwrap_or(default.latency_ns),
        read_zeroes: fields.bool_or("read-zeroes", default.read_zeroes)?,
    })
}

fn parse_qcow2(place: &KeyPath<'_>) -> Result<Qcow2Options, ConfigError> {
    let fields = &place.fields;
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
    let word = if let Some(Value::Object(_)) = fields.get("overlap-check") {
        let Some(object) = fields.opt_object("overlap-check")? else {
            return Ok(OverlapCheck::default());
        };
        object.only_keys(&[keys::OVERLAP_FLAGS])?;
        let switches = keys::OVERLAP_FLAGS.iter();
        for switch in switches.filter(|key| key.kind == KeyType::Bool) {
            object.opt_bool(switch.name)?;
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
