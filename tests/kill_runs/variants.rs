//! The disks and the circumstances that the kills rotate through.

/// What the guest's layer is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Top {
    /// A qcow2 image.
    Qcow2,
    /// A raw image, without a backing file.
    Raw,
    /// A qcow2 image with its data in a file of its own.
    DataFile,
    /// The same, where that file by itself reads as the disk; without a backing file.
    RawDataFile,
}

/// Where the guest's rings begin.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// At 0, as after a reboot.
    Zero,
    /// Anywhere, as after a migration.
    Anywhere,
    /// So that the indices wrap soon.
    BeforeTheWrap,
}

/// One kind of disk, with what happens to it.
#[derive(Clone, Copy)]
pub struct Variant {
    /// Its name, for reports.
    pub name: &'static str,
    /// Options of the layers, the guest's first, as [`crate::common::images::ChainPlan`] takes them.
    pub layers: &'static [&'static str],
    /// The guest's layer.
    pub top: Top,
    /// Exports in the process, each with an image and a guest of its own.
    pub exports: usize,
    /// Queues of each.
    pub queues: usize,
    /// A stream of the layers below the guest's.
    pub stream: bool,
    /// What the guest reads is copied into its layer.
    pub copy_on_read: bool,
    /// Writes of zeros are recorded as such.
    pub detect_zeroes: bool,
    /// The first kill comes before anything was answered.
    pub killed_at_once: bool,
    /// One kill in so many is followed by others while the next processes start.
    pub bursts: u64,
    /// The guest reboots at one kill in so many; 0 for never.
    pub reboots: u64,
    /// Where the rings begin.
    pub begin: Begin,
    /// The front-end knows inflight regions.
    pub region: bool,
}

const PLAIN: Variant = Variant {
    name: "overlay",
    layers: &["cluster_size=64k", "cluster_size=64k", "raw"],
    top: Top::Qcow2,
    exports: 1,
    queues: 2,
    stream: false,
    copy_on_read: false,
    detect_zeroes: false,
    killed_at_once: false,
    bursts: 8,
    reboots: 0,
    begin: Begin::Zero,
    region: true,
};

/// All of them, in the order of the rotation.
pub const VARIANTS: &[Variant] = &[
    Variant {
        name: "first kill before any answer",
        killed_at_once: true,
        ..PLAIN
    },
    Variant {
        name: "bursts",
        bursts: 1,
        queues: 3,
        ..PLAIN
    },
    Variant {
        name: "rings that begin anywhere",
        begin: Begin::Anywhere,
        killed_at_once: true,
        ..PLAIN
    },
    Variant {
        name: "indices that wrap",
        begin: Begin::BeforeTheWrap,
        layers: &["cluster_size=4k", "cluster_size=64k", "raw"],
        ..PLAIN
    },
    Variant {
        name: "no inflight region",
        region: false,
        begin: Begin::Anywhere,
        ..PLAIN
    },
    Variant {
        name: "reboots",
        reboots: 2,
        ..PLAIN
    },
    Variant {
        name: "8 layers",
        layers: &[
            "cluster_size=64k",
            "cluster_size=4k",
            "cluster_size=64k",
            "cluster_size=512",
            "cluster_size=64k",
            "cluster_size=2M",
            "cluster_size=64k",
            "raw",
        ],
        ..PLAIN
    },
    Variant {
        name: "raw",
        layers: &["raw"],
        top: Top::Raw,
        ..PLAIN
    },
    Variant {
        name: "data file",
        top: Top::DataFile,
        ..PLAIN
    },
    Variant {
        name: "raw data file",
        layers: &["cluster_size=64k"],
        top: Top::RawDataFile,
        ..PLAIN
    },
    Variant {
        name: "subclusters",
        layers: &["extended_l2=on,cluster_size=64k", "cluster_size=64k", "raw"],
        ..PLAIN
    },
    Variant {
        name: "compressed base",
        layers: &["cluster_size=64k", "compressed cluster_size=64k"],
        ..PLAIN
    },
    Variant {
        name: "stream",
        stream: true,
        ..PLAIN
    },
    Variant {
        name: "stream of a compressed base, subclusters",
        layers: &[
            "extended_l2=on,cluster_size=128k",
            "compressed cluster_size=64k",
        ],
        stream: true,
        bursts: 3,
        ..PLAIN
    },
    Variant {
        name: "two exports",
        exports: 2,
        ..PLAIN
    },
    Variant {
        name: "clusters of 512 bytes, refcounts of 1 bit",
        layers: &[
            "cluster_size=512,refcount_bits=1",
            "cluster_size=64k",
            "raw",
        ],
        ..PLAIN
    },
    Variant {
        name: "clusters of 2 MiB, refcounts of 64 bits",
        layers: &["cluster_size=2M,refcount_bits=64", "raw"],
        reboots: 4,
        ..PLAIN
    },
    Variant {
        name: "copy on read, detected zeros",
        copy_on_read: true,
        detect_zeroes: true,
        ..PLAIN
    },
];
