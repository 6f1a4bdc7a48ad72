//! What lies under an image according to its header, and how a header is to name a node.
//!
//! A header comes from the writer of the image, a guest perhaps. It names local image files, as
//! QEMU's own images do, and nothing else: no other host, no program, no node of another disk, and
//! no option that changes what is durable, or who may use the file. Drivers beyond that are for the
//! administrator to allow ([`Allowed`]).

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::driver::WHOLE;
use super::{Graph, Node, Role, State, resolve};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::format::qcow2::Backing;
use crate::options::keys;
use crate::options::{
    AutoOptions, BackingRef, BlkdebugOptions, BlockRef, BlockdevOptions, Dialect, Driver,
    Qcow2Options, QedOptions, RawOptions,
};
use crate::storage::blkdebug::Settings;

/// Drivers of nodes that lead out of this machine.
const REMOTE: &[&str] = &[
    "nbd", "http", "https", "ftp", "ftps", "rbd", "ssh", "iscsi", "iser", "gluster", "nfs",
    "sheepdog", "tftp", "vxhs", "s3",
];

/// What a `json:` name may say: what QEMU writes into one, and so what makes the bytes.
const DRIVERS: &[&str] = &[
    "file",
    "host_device",
    "raw",
    "qcow2",
    "qed",
    "null-co",
    "null-aio",
];
const CHILDREN: &[&str] = &["file", "backing", "data-file"];
const KEYS: &[&str] = &["driver", "filename", "offset", "size", "read-zeroes"];
/// Nodes inside nodes that a name may have.
const MAX_NESTED: usize = 24;

/// What headers may name besides local image files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// `blkdebug`: files whose operations fail by rules.
    pub blkdebug: bool,
}

impl Allowed {
    /// The drivers that can be allowed.
    pub const DRIVERS: &[&str] = &["blkdebug"];

    /// With this driver, too. `None`: it cannot be allowed.
    #[must_use]
    pub fn with(mut self, driver: &str) -> Option<Self> {
        match driver {
            "blkdebug" => self.blkdebug = true,
            _ => return None,
        }
        Some(self)
    }
}

/// As [`backing_options_with`], with local image files alone.
///
/// # Errors
/// As there.
pub fn backing_options(
    above: &BlockdevOptions,
    image: &Path,
    backing: &Backing,
) -> Result<BlockdevOptions> {
    backing_options_with(above, image, backing, Allowed::default())
}

/// The options of the node for a backing file that the header of the file `image` names; `above`
/// are those of its own node.
///
/// # Errors
/// When the name or the format makes no sense, or the name leads to something else than local files
/// and what is allowed.
pub(super) fn backing_options_with(
    above: &BlockdevOptions,
    image: &Path,
    backing: &Backing,
    allowed: Allowed,
) -> Result<BlockdevOptions> {
    if let Some(json) = backing.name.strip_prefix("json:") {
        let value = serde_json::from_str(json)
            .map_err(|error| Error::Invalid(format!("backing file name '{json}': {error}")))?;
        let mut value = nested(value);
        if let Value::Object(map) = &mut value
            && let Some(format) = &backing.format
        {
            map.entry("driver").or_insert_with(|| json!(format));
        }
        check_named(image, &value, allowed, MAX_NESTED)?;
        let mut options = BlockdevOptions::from_nested(&value, above, Dialect::Json)
            .map_err(|error| Error::Invalid(error.to_string()))?;
        options.read_only = true;
        return Ok(options);
    }
    if allowed.blkdebug
        && let Some(name) = backing.name.strip_prefix("blkdebug:")
    {
        return blkdebug_options(above, name, backing);
    }
    let path = file_named(image, &backing.name, "backing file")?;
    let placeholder = above.backing_node(Driver::Auto(AutoOptions {
        file: BlockRef::Name(String::new()),
        copy_on_read: false,
    }));
    layer_options(placeholder, &path, backing.format.as_deref())
}

/// The options for `blkdebug:CONFIG:FILE`: where that is, and where the rules are, starts from the
/// folder that the program is in, as in QEMU.
fn blkdebug_options(
    above: &BlockdevOptions,
    name: &str,
    backing: &Backing,
) -> Result<BlockdevOptions> {
    let Some((config, file)) = name.split_once(':') else {
        return Err(Error::Invalid(format!(
            "backing file name 'blkdebug:{name}' (expected blkdebug:CONFIG:FILE)"
        )));
    };
    let image = BlockRef::Inline(Box::new(above.child_file(Path::new(file))));
    let file = above.backing_node(Driver::Blkdebug(Box::new(BlkdebugOptions {
        image,
        config: (!config.is_empty()).then(|| PathBuf::from(config)),
        settings: Settings::default(),
    })));
    let mut options = layer_options(file.clone(), Path::new(""), backing.format.as_deref())?;
    if let Some(place) = options.driver.file_mut() {
        *place = BlockRef::Inline(Box::new(file));
    }
    Ok(options)
}

/// Refuses what a `json:` name must not say.
fn check_named(image: &Path, value: &Value, allowed: Allowed, depth: usize) -> Result<()> {
    let refused = |what: String| {
        Err(Error::Invalid(format!(
            "{}: the image's header names a backing file by 'json:', {what} (to use it all the \
             same, name it in the image's 'backing' option)",
            image.display()
        )))
    };
    let Value::Object(map) = value else {
        return refused("which holds no object".into());
    };
    if depth == 0 {
        return refused(format!("with nodes nested more than {MAX_NESTED} deep"));
    }
    match map.get("driver") {
        Some(Value::String(driver)) if REMOTE.contains(&driver.as_str()) => {
            return refused(format!("a remote one, by driver '{driver}'"));
        }
        // Its own options are about failing; those of all nodes are not.
        Some(Value::String(driver)) if driver == "blkdebug" && allowed.blkdebug => {
            let common = keys::NODE.iter().map(|key| key.name);
            let mut common = common.filter(|name| *name != "driver" && map.contains_key(*name));
            if let Some(name) = common.next() {
                return refused(format!("with the option '{name}'"));
            }
            return match map.get("image") {
                Some(image_node @ Value::Object(_)) => {
                    check_named(image, image_node, allowed, depth - 1)
                }
                _ => refused("with driver 'blkdebug' and no node as its 'image'".into()),
            };
        }
        Some(Value::String(driver)) if !DRIVERS.contains(&driver.as_str()) => {
            return refused(format!(
                "with driver '{driver}' (expected one of: {}{})",
                DRIVERS.join(", "),
                allow_hint(driver)
            ));
        }
        _ => {}
    }
    for (key, value) in map {
        let child = CHILDREN.contains(&key.as_str());
        match value {
            Value::Object(_) if child => check_named(image, value, allowed, depth - 1)?,
            Value::Null if key == "backing" => {}
            Value::String(name) if child => {
                return refused(format!(
                    "with node '{name}' as its '{key}', which is another's"
                ));
            }
            _ if child || !KEYS.contains(&key.as_str()) => {
                return refused(format!("with '{key}', which is not for headers"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// How a driver is allowed, where it can be.
fn allow_hint(driver: &str) -> String {
    match Allowed::default().with(driver) {
        Some(_) => format!("; --allow-backing {driver} allows it"),
        None => String::new(),
    }
}

/// An object whose keys may be paths (`file.filename`), as QEMU has them in `json:` names, with
/// objects in their place.
fn nested(value: Value) -> Value {
    let Value::Object(flat) = value else {
        return value;
    };
    let mut map = Map::new();
    for (path, value) in flat {
        let mut place = &mut map;
        let mut keys = path.split('.').peekable();
        while let Some(key) = keys.next() {
            if keys.peek().is_none() {
                place.insert(key.to_owned(), nested(value));
                break;
            }
            let inner = place
                .entry(key)
                .or_insert_with(|| Value::Object(Map::new()));
            if !inner.is_object() {
                *inner = Value::Object(Map::new());
            }
            let Value::Object(inner) = inner else { break };
            place = inner;
        }
    }
    Value::Object(map)
}

/// The options of a node for the image in the file `path`: a node of `format` (probed if there is
/// none) over a file node. For all else both follow `common`, whose driver does not count.
///
/// # Errors
/// A format that is not known.
pub fn layer_options(
    common: BlockdevOptions,
    path: &Path,
    format: Option<&str>,
) -> Result<BlockdevOptions> {
    let file = BlockRef::Inline(Box::new(common.child_file(path)));
    let driver = match format {
        Some("raw" | "file" | "host_device") => Driver::Raw(RawOptions {
            file,
            offset: 0,
            size: None,
        }),
        Some("qcow2") => Driver::Qcow2(Box::new(Qcow2Options::new(file))),
        Some("qed") => Driver::Qed(QedOptions {
            file,
            backing: BackingRef::Default,
        }),
        None => Driver::Auto(AutoOptions {
            file,
            copy_on_read: false,
        }),
        Some(other) => {
            return Err(Error::Invalid(format!(
                "{}: Unknown driver '{other}' (expected raw, qcow2 or qed)",
                path.display()
            )));
        }
    };
    Ok(BlockdevOptions { driver, ..common })
}

/// The path of the file that the header of `image` names as its `what`.
pub(super) fn file_named(image: &Path, name: &str, what: &str) -> Result<PathBuf> {
    let plain = name.strip_prefix("file:").unwrap_or(name);
    let protocol = name.split_once(':').map(|(protocol, _)| protocol);
    if let Some(protocol) = protocol
        && plain == name
        && !protocol.is_empty()
        && !protocol.contains('/')
    {
        let scheme = protocol.split('+').next().unwrap_or(protocol);
        let kind = if REMOTE.contains(&scheme) {
            format!("a remote {what}")
        } else {
            format!("a {what} with the protocol '{protocol}'")
        };
        return Err(Error::Invalid(format!(
            "{}: the image's header names {kind}: '{name}' (expected a local file{})",
            image.display(),
            allow_hint(protocol)
        )));
    }
    Ok(resolve(image, plain))
}

impl Graph {
    /// As [`State::header_name`], now.
    ///
    /// # Errors
    /// When a node does not exist.
    pub fn header_name(&self, name: &str) -> Result<String> {
        self.state().header_name(name)
    }

    /// As [`State::is_whole_file`], now.
    ///
    /// # Errors
    /// When a node does not exist.
    pub fn is_whole_file(&self, node: &Node) -> Result<bool> {
        self.state().is_whole_file(node)
    }
}

impl State {
    /// How the header of an image in another folder is to name node `name`: by the path of its
    /// file, if an image of the node's format in that file is all there is to it.
    ///
    /// # Errors
    /// When a node does not exist.
    pub fn header_name(&self, name: &str) -> Result<String> {
        let node = self.image_node(name)?;
        if self.is_whole_file(node)? {
            return Ok(absolute(node));
        }
        let mut described = self.described(node, true)?;
        if node.layer.format.name() == "raw" && described.get("driver") != Some(&json!("raw")) {
            // A header names the format with it, which is that of the node then.
            described = json!({"driver": "raw", "file": described});
        }
        Ok(format!("json:{described}"))
    }

    /// Whether a node is what its file holds from its beginning to its end, with what the headers
    /// in it name.
    ///
    /// # Errors
    /// When a node does not exist.
    pub fn is_whole_file(&self, node: &Node) -> Result<bool> {
        let is_whole = node.driver().behind(&WHOLE) == WHOLE;
        let as_named = || -> Result<bool> {
            let backing = self.other_backing(node)?.is_none();
            Ok(backing && self.other_data_file(node)?.is_none())
        };
        match node.file() {
            _ if !is_whole || self.is_in_image(node)? || !as_named()? => Ok(false),
            Some(file) => self.is_whole_file(self.node(file)?),
            None => Ok(node.is_file()),
        }
    }

    /// Whether a node is laid out in the disk of an image.
    fn is_in_image(&self, node: &Node) -> Result<bool> {
        let Some(file) = node.file().filter(|_| !node.is_filter()) else {
            return Ok(false);
        };
        Ok(!matches!(self.node(file)?.layer.format, Format::Raw(_)))
    }

    /// What the bytes of node `name` are, whatever is laid out in them: as
    /// [`State::header_name`] has it, but for the disk in an image, which the path of its file would
    /// not tell from the image. What lies under that image does not count, since a stream changes
    /// it.
    pub(super) fn bytes_name(&self, name: &str) -> Result<String> {
        let mut node = self.image_node(name)?;
        while let Some(image) = node.child(Role::Image) {
            node = self.image_node(image)?;
        }
        match node.layer.format {
            Format::Raw(_) if !self.is_in_image(node)? => self.header_name(name),
            _ => Ok(format!("json:{}", self.described(node, false)?)),
        }
    }

    /// What is under an image where the options, and not its header, have put it: a node or
    /// nothing.
    fn other_backing(&self, node: &Node) -> Result<Option<Option<&Node>>> {
        let Some(options) = node.driver().backing() else {
            return Ok(None);
        };
        let header = match &node.layer.format {
            Format::Qcow2(image) => image.backing(),
            Format::Qed(image) => image.backing().cloned(),
            Format::Raw(_) => None,
        };
        let below = node.child(Role::Backing).map(|below| self.node(below));
        let below = below.transpose()?.map(|below| &**below);
        let named = match (options, &header, &below) {
            (BackingRef::Default, _, _) | (_, None, None) => true,
            (_, Some(header), Some(below)) => {
                resolve(&node.filename, &header.name) == below.filename
                    && self.is_whole_file(below)?
            }
            _ => false,
        };
        Ok((!named).then_some(below))
    }

    /// The data file of an image, where it is another than the header names.
    fn other_data_file(&self, node: &Node) -> Result<Option<&Node>> {
        let (true, Format::Qcow2(image), Some(data)) = (
            node.driver().has_own_data_file(),
            &node.layer.format,
            node.child(Role::DataFile),
        ) else {
            return Ok(None);
        };
        let data = self.node(data)?;
        let named = image
            .header()
            .data_file
            .as_ref()
            .is_some_and(|name| resolve(&node.filename, name) == data.filename);
        let named = named && self.is_whole_file(data)?;
        Ok((!named).then_some(&**data))
    }

    /// What makes the bytes of a node, in the form of its options; if not `with_backing`, without
    /// what images are over.
    fn described(&self, node: &Node, with_backing: bool) -> Result<Value> {
        let mut map = Map::new();
        let driver = match node.child(Role::Image) {
            Some(_) => "raw",
            None => node.driver_name(),
        };
        map.insert("driver".into(), json!(driver));
        let Some(file) = node.file() else {
            match node.is_file() {
                true => drop(map.insert("filename".into(), json!(absolute(node)))),
                false => node.driver().describe(&mut map),
            }
            return Ok(Value::Object(map));
        };
        let below = self.node(file)?;
        let file = self.described(below, with_backing)?;
        // That operations fail is no part of the bytes. A name in a header says with its own driver
        // that they are those of a disk.
        let is_plain = !(with_backing && self.is_disk(below));
        if node.is_filter() || (node.child(Role::Image).is_some() && is_plain) {
            return Ok(file);
        }
        node.driver().describe(&mut map);
        map.insert("file".into(), file);
        if with_backing && let Some(below) = self.other_backing(node)? {
            let below = below.map(|below| self.described(below, true));
            let below = below.transpose()?;
            map.insert("backing".into(), below.unwrap_or(Value::Null));
        }
        if let Some(data) = self.other_data_file(node)? {
            map.insert("data-file".into(), self.described(data, with_backing)?);
        }
        Ok(Value::Object(map))
    }
}

fn absolute(node: &Node) -> String {
    let path = std::path::absolute(&node.filename).unwrap_or_else(|_| node.filename.clone());
    path.display().to_string()
}
