//! The keys of structured options: which there are, of which types, and which must be given.
//!
//! The readers take their keys from these tables, and `query-qmp-schema` describes them to clients.

use crate::storage::blkdebug::rules::{Event, IoType};

/// The drivers that can be named, for messages.
pub const DRIVERS: &[&str] = &[
    "file",
    "host_device",
    "raw",
    "qcow2",
    "qed",
    "copy-on-read",
    "null-co",
    "null-aio",
    "blkdebug",
];
/// The object types that can be named, for messages.
pub const OBJECT_TYPES: &[&str] = &["iothread"];

/// The type of a key's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyType {
    /// Text.
    Str,
    /// A whole number.
    Int,
    /// True or false.
    Bool,
    /// One of some words; the type's name comes first.
    Word(&'static str, &'static [&'static str]),
    /// An object of this type.
    Object(&'static str),
    /// A node: its name, or its options.
    Node,
    /// The same, or null for none.
    NodeOrNull,
    /// A list of such words.
    WordList(&'static str, &'static [&'static str]),
    /// A list of objects of this type.
    Objects(&'static str),
    /// One of the words of the first type, or an object of the second.
    WordOr(&'static str, &'static [&'static str], &'static str),
}

/// A key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// The type of its value.
    pub kind: KeyType,
    /// Whether it must be given.
    pub required: bool,
}

const fn key(name: &'static str, kind: KeyType) -> Key {
    Key {
        name,
        kind,
        required: false,
    }
}

const fn required(name: &'static str, kind: KeyType) -> Key {
    Key {
        name,
        kind,
        required: true,
    }
}

use KeyType::{Bool, Int, Node, NodeOrNull, Object, Objects, Str, Word, WordList, WordOr};

const DRIVER: KeyType = Word("BlockdevDriver", DRIVERS);
const DISCARD: KeyType = Word("BlockdevDiscardOptions", &["ignore", "unmap"]);
const ZEROES: KeyType = Word("BlockdevDetectZeroesOptions", &["off", "on", "unmap"]);
const AIO: KeyType = Word("BlockdevAioOptions", &["threads", "native", "io_uring"]);
const LOCKING: KeyType = Word("OnOffAuto", &["auto", "on", "off"]);
const OVERLAP: &[&str] = &["none", "constant", "cached", "all"];
const OVERLAP_MODE: KeyType = Word("Qcow2OverlapCheckMode", OVERLAP);
const PREALLOCATION: KeyType = Word("PreallocMode", &["off", "metadata", "falloc", "full"]);

/// Keys of every node.
pub const NODE: &[Key] = &[
    required("driver", DRIVER),
    key("node-name", Str),
    key("read-only", Bool),
    key("auto-read-only", Bool),
    key("force-share", Bool),
    key("discard", DISCARD),
    key("detect-zeroes", ZEROES),
    key("cache", Object("BlockdevCacheOptions")),
    key("active", Bool),
];
/// Members of a node's `cache`.
pub const CACHE: &[Key] = &[key("direct", Bool), key("no-flush", Bool)];
/// Keys of `file` and `host_device`.
pub const FILE: &[Key] = &[
    required("filename", Str),
    key("aio", AIO),
    key("aio-max-batch", Int),
    key("locking", LOCKING),
    key("drop-cache", Bool),
    key("pr-manager", Str),
    key("x-check-cache-dropped", Bool),
];
/// Keys of `raw`.
pub const RAW: &[Key] = &[required("file", Node), key("offset", Int), key("size", Int)];
/// Keys of `qed`.
pub const QED: &[Key] = &[required("file", Node), key("backing", NodeOrNull)];
/// Keys of `copy-on-read`.
pub const COPY_ON_READ: &[Key] = &[required("file", Node), key("bottom", Str)];
/// Keys of `null-co` and `null-aio`.
pub const NULL: &[Key] = &[
    key("size", Int),
    key("latency-ns", Int),
    key("read-zeroes", Bool),
];
const PERMISSIONS: KeyType = WordList(
    "BlockPermission",
    &["consistent-read", "write", "write-unchanged", "resize"],
);
const EVENT: KeyType = Word("BlkdebugEvent", Event::NAMES);
/// Keys of `blkdebug`.
pub const BLKDEBUG: &[Key] = &[
    required("image", Node),
    key("config", Str),
    key("align", Int),
    key("max-transfer", Int),
    key("opt-write-zero", Int),
    key("max-write-zero", Int),
    key("opt-discard", Int),
    key("max-discard", Int),
    key("inject-error", Objects("BlkdebugInjectErrorOptions")),
    key("set-state", Objects("BlkdebugSetStateOptions")),
    key("take-child-perms", PERMISSIONS),
    key("unshare-child-perms", PERMISSIONS),
];
/// Members of an item of `inject-error`.
pub const INJECT_ERROR: &[Key] = &[
    required("event", EVENT),
    key("state", Int),
    key("iotype", Word("BlkdebugIOType", IoType::NAMES)),
    key("errno", Int),
    key("sector", Int),
    key("once", Bool),
    key("immediately", Bool),
];
/// Members of an item of `set-state`.
pub const SET_STATE: &[Key] = &[
    required("event", EVENT),
    key("state", Int),
    required("new_state", Int),
];
/// Keys of what only records have.
pub const AUTO: &[Key] = &[required("file", Node), key("copy-on-read", Bool)];
/// Keys of `qcow2`. QEMU has no `copy-on-read` here; encrypted images are not supported, and
/// `encrypt` is known to be refused.
pub const QCOW2: &[Key] = &[
    required("file", Node),
    key("backing", NodeOrNull),
    key("copy-on-read", Bool),
    key("lazy-refcounts", Bool),
    key("pass-discard-request", Bool),
    key("pass-discard-snapshot", Bool),
    key("pass-discard-other", Bool),
    key("discard-no-unref", Bool),
    key(
        "overlap-check",
        WordOr("Qcow2OverlapCheckMode", OVERLAP, "Qcow2OverlapCheckFlags"),
    ),
    key("cache-size", Int),
    key("l2-cache-size", Int),
    key("l2-cache-entry-size", Int),
    key("refcount-cache-size", Int),
    key("cache-clean-interval", Int),
    key("data-file", Node),
];
/// Members of `overlap-check`.
pub const OVERLAP_FLAGS: &[Key] = &[
    key("template", OVERLAP_MODE),
    key("main-header", Bool),
    key("active-l1", Bool),
    key("active-l2", Bool),
    key("refcount-table", Bool),
    key("refcount-block", Bool),
    key("snapshot-table", Bool),
    key("inactive-l1", Bool),
    key("inactive-l2", Bool),
    key("bitmap-directory", Bool),
];

/// Keys of every export.
pub const EXPORT: &[Key] = &[
    required("type", Word("BlockExportType", &["vhost-user-blk"])),
    required("id", Str),
    required("node-name", Str),
    key("writable", Bool),
    key("writethrough", Bool),
    key("iothread", Str),
    key("fixed-iothread", Bool),
    key("allow-inactive", Bool),
];
/// Keys of `vhost-user-blk`. QEMU has no `serial`.
pub const VHOST_USER_BLK: &[Key] = &[
    required("addr", Object("SocketAddress")),
    key("num-queues", Int),
    key("logical-block-size", Int),
    key("serial", Str),
];
/// Keys of every socket.
pub const SOCKET: &[Key] = &[required("type", Word("SocketAddressType", &["unix", "fd"]))];
/// Keys of a socket with a path.
pub const SOCKET_UNIX: &[Key] = &[
    required("path", Str),
    key("abstract", Bool),
    key("tight", Bool),
];
/// Keys of a socket that is open.
pub const SOCKET_FD: &[Key] = &[required("str", Str)];

/// Keys of every object.
pub const OBJECT: &[Key] = &[
    required("qom-type", Word("ObjectType", OBJECT_TYPES)),
    required("id", Str),
];
/// Keys of `iothread`.
pub const IOTHREAD: &[Key] = &[
    key("poll-max-ns", Int),
    key("poll-grow", Int),
    key("poll-shrink", Int),
    key("aio-max-batch", Int),
    key("thread-pool-min", Int),
    key("thread-pool-max", Int),
];

/// Keys of every image that is to be made.
pub const CREATE: &[Key] = &[required(
    "driver",
    Word("BlockdevCreateDriver", &["file", "qcow2"]),
)];
/// Keys of a file that is to be made.
pub const CREATE_FILE: &[Key] = &[
    required("filename", Str),
    required("size", Int),
    key("preallocation", PREALLOCATION),
    key("nocow", Bool),
    key("extent-size-hint", Int),
];
/// Keys of a qcow2 image that is to be made.
pub const CREATE_QCOW2: &[Key] = &[
    required("file", Node),
    required("size", Int),
    key("version", Word("BlockdevQcow2Version", &["v2", "v3"])),
    key("backing-file", Str),
    key("backing-fmt", Str),
    key("cluster-size", Int),
    key("preallocation", PREALLOCATION),
    key("lazy-refcounts", Bool),
    key("refcount-bits", Int),
    key(
        "compression-type",
        Word("Qcow2CompressionType", &["zlib", "zstd"]),
    ),
    key("extended-l2", Bool),
];

/// A type of options whose further keys follow from one of them.
#[derive(Debug, Clone, Copy)]
pub struct Union {
    /// Its name.
    pub name: &'static str,
    /// The key on which the others depend.
    pub tag: &'static str,
    /// The keys that there are in any case.
    pub common: &'static [Key],
    /// What the tag may say, and the keys that there are then.
    pub variants: &'static [(&'static str, &'static [Key])],
}

/// All types of options that have variants.
pub const UNIONS: &[Union] = &[
    Union {
        name: "BlockdevOptions",
        tag: "driver",
        common: NODE,
        variants: &[
            ("file", FILE),
            ("host_device", FILE),
            ("raw", RAW),
            ("qcow2", QCOW2),
            ("qed", QED),
            ("copy-on-read", COPY_ON_READ),
            ("null-co", NULL),
            ("null-aio", NULL),
            ("blkdebug", BLKDEBUG),
        ],
    },
    Union {
        name: "BlockExportOptions",
        tag: "type",
        common: EXPORT,
        variants: &[("vhost-user-blk", VHOST_USER_BLK)],
    },
    Union {
        name: "SocketAddress",
        tag: "type",
        common: SOCKET,
        variants: &[("unix", SOCKET_UNIX), ("fd", SOCKET_FD)],
    },
    Union {
        name: "ObjectOptions",
        tag: "qom-type",
        common: OBJECT,
        variants: &[("iothread", IOTHREAD)],
    },
    Union {
        name: "BlockdevCreateOptions",
        tag: "driver",
        common: CREATE,
        variants: &[("file", CREATE_FILE), ("qcow2", CREATE_QCOW2)],
    },
];

/// All types of options that have the same keys in any case.
pub const OBJECTS: &[(&str, &[Key])] = &[
    ("BlockdevCacheOptions", CACHE),
    ("Qcow2OverlapCheckFlags", OVERLAP_FLAGS),
    ("BlkdebugInjectErrorOptions", INJECT_ERROR),
    ("BlkdebugSetStateOptions", SET_STATE),
];
