//! Exports: `--export` and the arguments of QMP's `block-export-add`.

use super::error::{ConfigError, ErrorKind};
use super::fields::{Dialect, Fields};
use super::keys;
use serde_json::Value;
use std::fmt;
use std::path::PathBuf;

/// Longest serial number that virtio-blk can carry.
pub const MAX_SERIAL: usize = 20;

/// A device offered to front-ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportOptions {
    /// The export's name.
    pub id: String,
    /// The node that it serves.
    pub node_name: String,
    /// Where front-ends find it.
    pub addr: SocketAddress,
    /// Whether the guest may write.
    pub writable: bool,
    /// Every write is stable before it completes.
    pub writethrough: bool,
    /// Number of virtqueues.
    pub num_queues: u16,
    /// Logical block size in bytes.
    pub logical_block_size: u32,
    /// The `iothread` object that is to serve it, if one was named.
    pub iothread: Option<String>,
    /// The serial number the guest sees; derived from the id when not given.
    pub serial: Option<String>,
}

/// A Unix stream socket, by path or already open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketAddress {
    /// In the file system.
    Unix(PathBuf),
    /// A file descriptor that the program was started with.
    Fd(i32),
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketAddress::Unix(path) => write!(f, "{}", path.display()),
            SocketAddress::Fd(fd) => write!(f, "fd {fd}"),
        }
    }
}

impl ExportOptions {
    /// Reads the value of `--export`, or the arguments of `block-export-add`.
    pub fn from_value(value: &Value, dialect: Dialect) -> Result<Self, ConfigError> {
        let fields = Fields::new(value, "", dialect)?;
        let kind = fields.string("type")?;
        if kind != "vhost-user-blk" {
            return Err(ConfigError::bad_value(
                "type",
                kind,
                "one of: vhost-user-blk",
            ));
        }
        fields.only_keys(&[keys::EXPORT, keys::VHOST_USER_BLK])?;
        if fields.opt_bool("allow-inactive")? == Some(true) {
            let text = "Export type does not support inactive exports";
            return Err(ConfigError::other(text).near("allow-inactive"));
        }
        fields.opt_bool("fixed-iothread")?;
        Ok(Self {
            id: fields.id("id").map_err(said_of_id)?,
            node_name: fields.string("node-name")?.to_owned(),
            addr: parse_address(&fields)?,
            writable: fields.bool_or("writable", false)?,
            writethrough: fields.bool_or("writethrough", false)?,
            num_queues: parse_num_queues(&fields)?,
            logical_block_size: parse_block_size(&fields)?,
            iothread: fields.opt_owned("iothread")?,
            serial: parse_serial(&fields)?,
        })
    }
}

/// A missing id is told as for any key.
fn said_of_id(error: ConfigError) -> ConfigError {
    match error.kind() {
        ErrorKind::BadValue { .. } => error.said("Invalid block export id"),
        _ => error,
    }
}

fn parse_num_queues(fields: &Fields<'_>) -> Result<u16, ConfigError> {
    let text = match fields.opt_u64("num-queues") {
        Ok(Some(0)) => "num-queues must be greater than 0",
        Ok(_) => "Parameter 'num-queues' expects uint16_t",
        Err(_) => "Parameter 'num-queues' expects uint64",
    };
    let number = fields
        .opt_ranged("num-queues", 1, u64::from(u16::MAX))
        .map_err(|error| error.said(text))?;
    Ok(number
        .and_then(|number| u16::try_from(number).ok())
        .unwrap_or(1))
}

fn parse_block_size(fields: &Fields<'_>) -> Result<u32, ConfigError> {
    let Some(size) = fields.opt_u64("logical-block-size")? else {
        return Ok(512);
    };
    match u32::try_from(size) {
        Ok(size) if size.is_power_of_two() && (512..=2 << 20).contains(&size) => Ok(size),
        _ => Err(ConfigError::bad_value(
            "logical-block-size",
            &size.to_string(),
            "a power of 2 between 512 and 2097152",
        )
        .said("parameter logical-block-size must be a power of 2 between 512 and 2097152")),
    }
}

fn parse_serial(fields: &Fields<'_>) -> Result<Option<String>, ConfigError> {
    let Some(serial) = fields.opt_str("serial")? else {
        return Ok(None);
    };
    check_serial(serial)?;
    Ok(Some(serial.to_owned()))
}

/// Refuses a serial number that the guest could not get whole.
///
/// # Errors
/// When it is too long; says how long it may be.
pub fn check_serial(serial: &str) -> Result<(), ConfigError> {
    if serial.len() > MAX_SERIAL || serial.contains('\0') {
        let expected = format!("at most {MAX_SERIAL} bytes");
        return Err(ConfigError::bad_value("serial", serial, expected));
    }
    Ok(())
}

fn parse_address(fields: &Fields<'_>) -> Result<SocketAddress, ConfigError> {
    let addr = fields
        .opt_object("addr")?
        .ok_or_else(|| fields.missing("addr"))?;
    match addr.string("type")? {
        "unix" => {
            addr.only_keys(&[keys::SOCKET, keys::SOCKET_UNIX])?;
            refuse_abstract(&addr)?;
            let path = addr.opt_file("path")?.ok_or_else(|| addr.missing("path"))?;
            check_socket_path(&addr.path("path"), &path)?;
            Ok(SocketAddress::Unix(path))
        }
        "fd" => {
            addr.only_keys(&[keys::SOCKET, keys::SOCKET_FD])?;
            let text = addr.string("str")?;
            let fd = parse_fd(text).ok_or_else(|| {
                ConfigError::bad_value(&addr.path("str"), text, "the number of an open descriptor")
            })?;
            Ok(SocketAddress::Fd(fd))
        }
        other => Err(
            ConfigError::bad_value(&addr.path("type"), other, "one of: unix, fd")
                .said("Only socket address types 'unix' and 'fd' are supported"),
        ),
    }
}

/// Sockets without a file are not offered: nothing guards who may connect to them.
pub(crate) fn refuse_abstract(fields: &Fields<'_>) -> Result<(), ConfigError> {
    fields.opt_bool("tight")?;
    if fields.opt_bool("abstract")? == Some(true) {
        return Err(ConfigError::other(
            "abstract socket addresses are not supported; use a path",
        ));
    }
    Ok(())
}

/// The longest path of a socket in bytes (`sockaddr_un` less the zero at its end).
pub(super) const SOCKET_PATH_MAX: usize = 107;

/// Refuses the path of a socket that the kernel would cut off, so that nobody would find it. `key`
/// is the option that has it.
///
/// # Errors
/// When it is too long.
pub fn check_socket_path(key: &str, path: &std::path::Path) -> Result<(), ConfigError> {
    if path.as_os_str().len() > SOCKET_PATH_MAX {
        let expected =
            format!("at most {SOCKET_PATH_MAX} bytes, the kernel's limit for a socket's path");
        return Err(
            ConfigError::bad_value(key, &path.to_string_lossy(), expected)
                .said(format!("UNIX socket path '{}' is too long", path.display())),
        );
    }
    Ok(())
}

/// Reads the number of a file descriptor.
pub(crate) fn parse_fd(text: &str) -> Option<i32> {
    // No sign: "+3" is no number that a shell would print.
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().ok() } else { None }
}
