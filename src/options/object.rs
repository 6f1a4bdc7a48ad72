//! Everything around nodes and exports: `--object`, `--chardev`, `--monitor` and `--trace`.

use super::error::{ConfigError, ErrorKind};
use super::export::{SocketAddress, check_socket_path, parse_fd, refuse_abstract};
use super::fields::{Dialect, Fields};
use super::keys::{self, OBJECT_TYPES};
use serde_json::Value;
use std::path::PathBuf;

/// A named helper object: `--object` and the arguments of QMP's `object-add`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObjectOptions {
    /// A thread that exports can be tied to.
    Iothread(IothreadOptions),
}

/// Options of an I/O thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IothreadOptions {
    /// The object's name.
    pub id: String,
    /// Longest time to poll before sleeping, in nanoseconds; 0 is not at all.
    pub poll_max_ns: Option<u64>,
    /// Factor by which polling grows where it pays off.
    pub poll_grow: Option<u64>,
    /// Divisor by which it shrinks where it does not.
    pub poll_shrink: Option<u64>,
    /// Most requests handed to the kernel at once; 0 leaves it to the program.
    pub aio_max_batch: Option<u64>,
}

impl ObjectOptions {
    /// Reads the value of `--object`, or the arguments of `object-add`.
    pub fn from_value(value: &Value, dialect: Dialect) -> Result<Self, ConfigError> {
        let fields = Fields::new(value, "", dialect)?;
        match fields.string("qom-type")? {
            "iothread" => Ok(Self::Iothread(parse_iothread(&fields)?)),
            "throttle-group" => Err(ConfigError::other(
                "'throttle-group': limits for guests are not supported yet; the speed of a job \
                 is set with the job",
            )
            .near("throttle-group")),
            other => {
                let expected = format!("one of: {}", OBJECT_TYPES.join(", "));
                Err(ConfigError::bad_value("qom-type", other, expected))
            }
        }
    }

    /// The object's name.
    pub fn id(&self) -> &str {
        match self {
            ObjectOptions::Iothread(options) => &options.id,
        }
    }
}

fn parse_iothread(fields: &Fields<'_>) -> Result<IothreadOptions, ConfigError> {
    fields.only_keys(&[keys::OBJECT, keys::IOTHREAD])?;
    // There is no thread pool to size.
    fields.opt_u64("thread-pool-min")?;
    fields.opt_u64("thread-pool-max")?;
    let id = fields.id("id").map_err(|error| match error.kind() {
        ErrorKind::BadValue { .. } => error.said("Parameter 'id' expects an identifier"),
        _ => error,
    })?;
    Ok(IothreadOptions {
        id,
        poll_max_ns: property(fields, "poll-max-ns")?,
        poll_grow: property(fields, "poll-grow")?,
        poll_shrink: property(fields, "poll-shrink")?,
        aio_max_batch: property(fields, "aio-max-batch")?,
    })
}

/// A number that an object has as a property.
fn property(fields: &Fields<'_>, key: &str) -> Result<Option<u64>, ConfigError> {
    let most = i64::MAX.unsigned_abs();
    fields
        .opt_ranged(key, 0, most)
        .map_err(|error| match error.kind() {
            ErrorKind::BadValue { .. } => {
                error.said(format!("{key} value must be in range [0, {most}]"))
            }
            _ => error,
        })
}

/// A named socket that a monitor can use: `--chardev`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChardevOptions {
    /// The socket's name.
    pub id: String,
    /// Where it is; none: standard input and output.
    pub addr: Option<SocketAddress>,
    /// Listen for clients; otherwise connect to somebody who listens.
    pub server: bool,
    /// Do not start before the first client is there.
    pub wait: bool,
}

const CHARDEV_KEYS: &[&str] = &[
    "backend",
    "id",
    "path",
    "fd",
    "server",
    "wait",
    "abstract",
    "tight",
    "reconnect",
    "reconnect-ms",
];

impl ChardevOptions {
    /// Reads the value of `--chardev`.
    pub fn from_value(value: &Value, dialect: Dialect) -> Result<Self, ConfigError> {
        let fields = Fields::new(value, "", dialect)?;
        let backend = fields.string("backend")?;
        if backend == "stdio" {
            fields.only(&[&["backend", "id", "signal"]])?;
            fields.opt_bool("signal")?;
            return Ok(Self {
                id: fields.id("id")?,
                addr: None,
                server: false,
                wait: false,
            });
        }
        if backend != "socket" {
            let expected = "one of: socket, stdio";
            return Err(ConfigError::bad_value("backend", backend, expected));
        }
        for key in ["host", "port"] {
            if fields.get(key).is_some() {
                let text = "only Unix sockets are supported: give 'path' or 'fd'";
                return Err(ConfigError::other(text).near(key));
            }
        }
        fields.only(&[CHARDEV_KEYS])?;
        refuse_abstract(&fields)?;
        fields.opt_u64("reconnect")?;
        fields.opt_u64("reconnect-ms")?;
        let server = fields.bool_or("server", false)?;
        let wait = fields.opt_bool("wait")?;
        if wait.is_some() && !server {
            let text = "'wait' is an option of listening sockets: add server=on";
            return Err(ConfigError::other(text));
        }
        Ok(Self {
            id: fields.id("id")?,
            addr: Some(parse_chardev_address(&fields)?),
            server,
            wait: wait.unwrap_or(server),
        })
    }
}

fn parse_chardev_address(fields: &Fields<'_>) -> Result<SocketAddress, ConfigError> {
    match (fields.opt_file("path")?, fields.opt_str("fd")?) {
        (Some(path), None) => {
            check_socket_path("path", &path)?;
            Ok(SocketAddress::Unix(path))
        }
        (None, Some(text)) => parse_fd(text)
            .map(SocketAddress::Fd)
            .ok_or_else(|| ConfigError::bad_value("fd", text, "the number of an open descriptor")),
        (None, None) => Err(ConfigError::other("one of 'path' and 'fd' must be given")),
        (Some(_), Some(_)) => Err(ConfigError::other("'path' and 'fd' exclude each other")),
    }
}

/// A control socket: `--monitor`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MonitorOptions {
    /// The monitor's name, if it has one.
    pub id: Option<String>,
    /// The character device that carries it.
    pub chardev: String,
    /// Whether answers are spread over several lines.
    pub pretty: bool,
}

impl MonitorOptions {
    /// Reads the value of `--monitor`.
    pub fn from_value(value: &Value, dialect: Dialect) -> Result<Self, ConfigError> {
        let fields = Fields::new(value, "", dialect)?;
        fields.only(&[&["chardev", "id", "mode", "pretty"]])?;
        if fields.opt_str("mode")? == Some("readline") {
            let text = "mode=readline: there is no monitor for typing; use mode=control and \
                        'stratactl hmp'";
            return Err(ConfigError::other(text).near("mode=readline"));
        }
        fields.opt_word("mode", &[("control", ())])?;
        Ok(Self {
            id: fields.opt_id("id")?,
            chardev: fields.string("chardev")?.to_owned(),
            pretty: fields.bool_or("pretty", false)?,
        })
    }
}

/// What to log: `--trace`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TraceOptions {
    /// A pattern of event names.
    pub enable: Option<String>,
    /// A file with one event name or pattern per line.
    pub events: Option<PathBuf>,
    /// Where the log goes; standard error when not given.
    pub file: Option<PathBuf>,
}

impl TraceOptions {
    /// Reads the value of `--trace`.
    pub fn from_value(value: &Value, dialect: Dialect) -> Result<Self, ConfigError> {
        let fields = Fields::new(value, "", dialect)?;
        fields.only(&[&["enable", "events", "file"]])?;
        Ok(Self {
            enable: fields.opt_owned("enable")?,
            events: fields.opt_file("events")?,
            file: fields.opt_file("file")?,
        })
    }
}
