//! Block nodes: `--blockdev` and the arguments of QMP's `blockdev-add`.
//!
//! The options of a node and of the nodes written inside it come out with every default filled
//! in, inheritance included: a node written inside another one takes over its parent's cache
//! mode, `force-share` and, unless it is a backing file, `read-only`, as in QEMU. The
//! code that opens the nodes has no rule left to apply.

use std::path::{Path, PathBuf};

use crate::storage::blkdebug::Settings;

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
    /// A QED image, which is only read.
    Qed(QedOptions),
    /// A filter that copies into its child what it had to read from further below.
    CopyOnRead(CopyOnReadOptions),
    /// Storage that keeps nothing.
    NullCo(NullOptions),
    /// The same under its other name.
    NullAio(NullOptions),
    /// Another node's bytes, with operations that fail by rules.
    Blkdebug(Box<BlkdebugOptions>),
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

/// Options of a QED image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QedOptions {
    /// What it is stored in.
    pub file: BlockRef,
    /// What lies under it.
    pub backing: BackingRef,
}

/// Options of the copy-on-read filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyOnReadOptions {
    /// The node that gets the copies.
    pub file: BlockRef,
    /// The lowest node to copy from; everything when not given.
    pub bottom: Option<String>,
}

/// Options of storage that keeps nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NullOptions {
    /// Its size in bytes.
    pub size: u64,
    /// How long each operation takes, in nanoseconds.
    pub latency_ns: u64,
    /// It is known to be zeros before it is read.
    pub read_zeroes: bool,
}

impl Default for NullOptions {
    fn default() -> Self {
        Self {
            size: 1 << 30,
            latency_ns: 0,
            read_zeroes: false,
        }
    }
}

/// Options of a node whose operations fail by rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlkdebugOptions {
    /// The node whose bytes it has.
    pub image: BlockRef,
    /// A file with more rules, which come first.
    pub config: Option<PathBuf>,
    /// What it is told.
    pub settings: Settings,
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

impl BackingRef {
    /// The node, if there is to be one and it is said which.
    pub fn node_mut(&mut self) -> Option<&mut BlockRef> {
        match self {
            Self::Node(node) => Some(node),
            Self::Default | Self::None => None,
        }
    }
}

/// What a node written inside another one takes over from it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Inherited {
    pub read_only: bool,
    pub auto_read_only: bool,
    pub force_share: bool,
    pub discard: Discard,
    pub cache: CacheOptions,
}

impl BlockdevOptions {
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
            Driver::File(_) | Driver::HostDevice(_) | Driver::NullCo(_) | Driver::NullAio(_) => {
                Vec::new()
            }
            Driver::Raw(RawOptions { file, .. })
            | Driver::CopyOnRead(CopyOnReadOptions { file, .. })
            | Driver::Auto(AutoOptions { file, .. }) => vec![("file", file)],
            Driver::Blkdebug(options) => vec![("image", &options.image)],
            Driver::Qed(options) => {
                let mut children = vec![("file", &options.file)];
                if let BackingRef::Node(backing) = &options.backing {
                    children.push(("backing", backing));
                }
                children
            }
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
    /// What it is stored in, or filters.
    pub fn file_mut(&mut self) -> Option<&mut BlockRef> {
        match self {
            Driver::File(_) | Driver::HostDevice(_) | Driver::NullCo(_) | Driver::NullAio(_) => {
                None
            }
            Driver::Raw(RawOptions { file, .. })
            | Driver::CopyOnRead(CopyOnReadOptions { file, .. })
            | Driver::Auto(AutoOptions { file, .. })
            | Driver::Qed(QedOptions { file, .. }) => Some(file),
            Driver::Qcow2(options) => Some(&mut options.file),
            Driver::Blkdebug(options) => Some(&mut options.image),
        }
    }

    /// The children, as far as options name them.
    pub fn children_mut(&mut self) -> Vec<&mut BlockRef> {
        let children = match self {
            Driver::Qcow2(options) => {
                let options = &mut **options;
                let backing = options.backing.node_mut();
                [Some(&mut options.file), options.data_file.as_mut(), backing]
            }
            Driver::Qed(QedOptions { file, backing }) => [Some(file), backing.node_mut(), None],
            other => [other.file_mut(), None, None],
        };
        children.into_iter().flatten().collect()
    }

    /// The driver's name, as in `driver=`.
    pub fn name(&self) -> &'static str {
        match self {
            Driver::File(_) => "file",
            Driver::HostDevice(_) => "host_device",
            Driver::Raw(_) => "raw",
            Driver::Qcow2(_) => "qcow2",
            Driver::Qed(_) => "qed",
            Driver::CopyOnRead(_) => "copy-on-read",
            Driver::NullCo(_) => "null-co",
            Driver::NullAio(_) => "null-aio",
            Driver::Blkdebug(_) => "blkdebug",
            Driver::Auto(_) => "auto",
        }
    }
}

impl Inherited {
    pub fn for_file(parent: &BlockdevOptions) -> Self {
        Self {
            read_only: parent.read_only,
            auto_read_only: parent.auto_read_only,
            force_share: parent.force_share,
            // The upper node decides what becomes of a discard; the lower one obeys.
            discard: Discard::Unmap,
            cache: parent.cache,
        }
    }

    pub fn for_backing(parent: &BlockdevOptions) -> Self {
        Self {
            read_only: true,
            auto_read_only: false,
            ..Self::for_file(parent)
        }
    }
}

impl Qcow2Options {
    /// An image stored in `file`, with nothing else said.
    pub fn new(file: BlockRef) -> Self {
        Self {
            file,
            backing: BackingRef::Default,
            data_file: None,
            copy_on_read: false,
            lazy_refcounts: None,
            pass_discard_request: None,
            pass_discard_snapshot: true,
            pass_discard_other: false,
            discard_no_unref: false,
            overlap_check: OverlapCheck::default(),
            cache_size: None,
            l2_cache_size: None,
            l2_cache_entry_size: None,
            refcount_cache_size: None,
            cache_clean_interval: None,
        }
    }
}
