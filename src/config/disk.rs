//! The conventions of vhost-user back-ends: one disk, described by a handful of options.
//!
//! The disk becomes what the other dialect would have said: a file node inside a format node,
//! and an export of it.

use super::{Config, help};
use crate::options::ConfigError;
use crate::options::{
    AutoOptions, BlockRef, BlockdevOptions, CacheOptions, Discard, Driver, Qcow2Options, RawOptions,
};
use crate::options::{ChardevOptions, ExportOptions, MonitorOptions, SocketAddress};
use crate::options::{check_serial, check_socket_path};
use clap::ValueEnum;
use std::path::{Path, PathBuf};

/// The options of the one disk, in clap's terms.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = help::DISK)]
pub(super) struct DiskArgs {
    /// Listen for the virtual machine on this Unix socket
    #[arg(
        long,
        value_name = "PATH",
        requires = "blk_file",
        conflicts_with = "fd"
    )]
    socket_path: Option<PathBuf>,

    /// Use the socket that is open as this file descriptor, listening or connected
    #[arg(long, value_name = "N", requires = "blk_file",
          value_parser = clap::value_parser!(i32).range(0..))]
    fd: Option<i32>,

    /// The disk image
    #[arg(long, value_name = "PATH")]
    blk_file: Option<PathBuf>,

    /// Let the guest read only
    #[arg(long, requires = "blk_file")]
    read_only: bool,

    /// Format of the image. Name it for raw images: a guest that writes a raw disk can make it
    /// look like another format
    #[arg(long, value_name = "FORMAT", value_enum, requires = "blk_file",
          default_value_t = ImageFormat::Auto)]
    image_format: ImageFormat,

    /// Number of virtqueues, each served by a thread of its own
    #[arg(long, value_name = "N", requires = "blk_file", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..))]
    num_queues: u16,

    /// Serial number that the guest sees, of at most 20 bytes [default: made from the disk's
    /// name]
    #[arg(
        long,
        value_name = "S",
        requires = "blk_file",
        allow_hyphen_values = true
    )]
    serial: Option<String>,

    /// How writes reach the image
    #[arg(long, value_name = "MODE", value_enum, requires = "blk_file",
          default_value_t = CacheMode::Writeback)]
    cache: CacheMode,

    /// Copy into the image what the guest reads from the layers below it
    #[arg(long, requires = "blk_file")]
    copy_on_read: bool,

    /// What becomes of space that the guest discards
    #[arg(long, value_name = "MODE", value_enum, requires = "blk_file",
          default_value_t = DiscardMode::Unmap)]
    discard: DiscardMode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ImageFormat {
    /// Found out by looking at the image
    Auto,
    /// The bytes of the disk and nothing else
    Raw,
    /// QEMU's image format, with layers
    Qcow2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CacheMode {
    /// Stable at the guest's flush; past the host's page cache (O_DIRECT)
    None,
    /// Stable at the guest's flush
    Writeback,
    /// Every write is stable before it completes
    Writethrough,
    /// Never made stable: fast, and lost when the host goes down
    Unsafe,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DiscardMode {
    /// It is freed in the image
    Unmap,
    /// Nothing
    Ignore,
}

/// Adds the disk to the configuration, if one was described.
pub(super) fn add_disk(config: &mut Config, args: &DiskArgs) -> Result<(), ConfigError> {
    let Some(image) = &args.blk_file else {
        return Ok(());
    };
    let addr = match (&args.socket_path, args.fd) {
        (Some(path), _) => {
            check_socket_path("--socket-path", path)?;
            SocketAddress::Unix(path.clone())
        }
        (None, Some(fd)) => SocketAddress::Fd(fd),
        (None, None) => {
            let text = "--blk-file: say where to serve it: --socket-path=PATH or --fd=N";
            return Err(ConfigError::other(text));
        }
    };
    if let Some(serial) = &args.serial {
        check_serial(serial).map_err(|error| error.in_option("--serial", serial))?;
    }
    if args.copy_on_read && args.image_format == ImageFormat::Raw {
        let text = "--copy-on-read: a raw image has no layers below it to copy from";
        return Err(ConfigError::other(text));
    }
    let id = free_name("disk", |name| {
        config.exports.iter().any(|export| export.id == name)
            || config
                .blockdevs
                .iter()
                .any(|node| node.node_name.as_deref() == Some(name))
    });
    config.blockdevs.push(disk_node(args, image, &id));
    config.exports.push(ExportOptions {
        node_name: format_node_name(&id),
        id,
        addr,
        writable: !args.read_only,
        writethrough: args.cache == CacheMode::Writethrough,
        num_queues: args.num_queues,
        logical_block_size: 512,
        iothread: None,
        serial: args.serial.clone(),
    });
    Ok(())
}

/// The node has a name other than the export's, so that each can be told from the other.
fn format_node_name(id: &str) -> String {
    format!("{id}-top")
}

fn disk_node(args: &DiskArgs, image: &Path, id: &str) -> BlockdevOptions {
    let mut node = BlockdevOptions {
        node_name: Some(format_node_name(id)),
        read_only: args.read_only,
        discard: match args.discard {
            DiscardMode::Unmap => Discard::Unmap,
            DiscardMode::Ignore => Discard::Ignore,
        },
        cache: CacheOptions {
            direct: args.cache == CacheMode::None,
            no_flush: args.cache == CacheMode::Unsafe,
        },
        // Replaced below: the file node takes its options over from this one.
        ..BlockdevOptions::new(Driver::Auto(AutoOptions {
            file: BlockRef::Name(String::new()),
            copy_on_read: false,
        }))
    };
    let mut file = node.child_file(image);
    file.node_name = Some(format!("{id}-file"));
    let file = BlockRef::Inline(Box::new(file));
    let copy_on_read = args.copy_on_read;
    node.driver = match args.image_format {
        ImageFormat::Auto => Driver::Auto(AutoOptions { file, copy_on_read }),
        ImageFormat::Raw => Driver::Raw(RawOptions {
            file,
            offset: 0,
            size: None,
        }),
        ImageFormat::Qcow2 => Driver::Qcow2(Box::new(Qcow2Options {
            copy_on_read,
            ..Qcow2Options::new(file)
        })),
    };
    node
}

/// Adds a monitor with its socket for every `--qmp`.
pub(super) fn add_control_sockets(
    config: &mut Config,
    paths: &[PathBuf],
) -> Result<(), ConfigError> {
    for path in paths {
        check_socket_path("--qmp", path)?;
        let id = free_name("qmp", |name| {
            config.chardevs.iter().any(|chardev| chardev.id == name)
        });
        config.monitors.push(MonitorOptions {
            id: None,
            chardev: id.clone(),
            pretty: false,
        });
        config.chardevs.push(ChardevOptions {
            id,
            addr: Some(SocketAddress::Unix(path.clone())),
            server: true,
            wait: false,
        });
    }
    Ok(())
}

/// The first of `stem0`, `stem1`, ... that is not taken.
fn free_name(stem: &str, taken: impl Fn(&str) -> bool) -> String {
    let mut number = 0_usize;
    loop {
        let name = format!("{stem}{number}");
        if !taken(&name) {
            return name;
        }
        number += 1;
    }
}
