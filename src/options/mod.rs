//! Options: what nodes, exports, objects and monitors are made of, and how they are written.
//!
//! The command line, the control socket and the image tools write them in two ways: as text
//! ([`keyval`], with sizes as [`size`] reads them) and as JSON. Both become a JSON value, and the
//! value typed options ([`BlockdevOptions::from_value`] and its siblings), strictly, with an error
//! that names the word at fault. Nothing is opened or changed here.

mod blkdebug;
mod blockdev;
mod blockdev_read;
mod create;
mod error;
mod export;
mod fields;
pub mod keys;
pub mod keyval;
mod object;
pub mod size;
mod text;
mod write;

pub use blkdebug::parse_config as parse_blkdebug_config;
pub use blockdev::{
    Aio, AutoOptions, BackingRef, BlkdebugOptions, BlockRef, BlockdevOptions, CacheOptions,
    CopyOnReadOptions, DetectZeroes, Discard, Driver, FileOptions, Locking, NullOptions,
    OverlapCheck, Qcow2Options, QedOptions, RawOptions,
};

pub use create::{Allocate, ImageOptions, NewFileOptions, NewQcow2Options};
pub use error::{ConfigError, ErrorKind, closest};
pub use export::{ExportOptions, MAX_SERIAL, SocketAddress, check_serial, check_socket_path};

pub use blockdev_read::check_node_name;
pub use fields::{Dialect, is_well_formed_id};
pub use keys::{DRIVERS, OBJECT_TYPES};
pub use object::{ChardevOptions, IothreadOptions, MonitorOptions, ObjectOptions, TraceOptions};
pub use text::read_text;
