//! The types of answers, as `query-qmp-schema` declares them. Names are QEMU's where it has some.

use crate::export::QueueStats;

/// A member of an answer: its name, its type (that of a list in brackets), and whether it may be
/// missing.
pub(super) type Member = (&'static str, &'static str, bool);

const fn always(name: &'static str, kind: &'static str) -> Member {
    (name, kind, false)
}

const fn perhaps(name: &'static str, kind: &'static str) -> Member {
    (name, kind, true)
}

/// Types of answers with their members.
pub(super) const TYPES: &[(&str, &[Member])] = &[
    ("empty", &[]),
    (
        "VersionInfo",
        &[always("qemu", "VersionTriple"), always("package", "str")],
    ),
    (
        "VersionTriple",
        &[
            always("major", "int"),
            always("minor", "int"),
            always("micro", "int"),
        ],
    ),
    ("CommandInfo", &[always("name", "str")]),
    (
        "SchemaInfo",
        &[
            always("name", "str"),
            always("meta-type", "str"),
            perhaps("json-type", "str"),
            perhaps("element-type", "str"),
            perhaps("members", "[any]"),
            perhaps("values", "[str]"),
            perhaps("tag", "str"),
            perhaps("variants", "[any]"),
            perhaps("arg-type", "str"),
            perhaps("ret-type", "str"),
            perhaps("allow-oob", "bool"),
        ],
    ),
    (
        "BlockDeviceInfo",
        &[
            always("file", "str"),
            always("node-name", "str"),
            always("ro", "bool"),
            always("drv", "str"),
            perhaps("backing_file", "str"),
            always("backing_file_depth", "int"),
            always("children", "[BlockdevChild]"),
            always("active", "bool"),
            always("encrypted", "bool"),
            always("detect_zeroes", "str"),
            always("bps", "int"),
            always("bps_rd", "int"),
            always("bps_wr", "int"),
            always("iops", "int"),
            always("iops_rd", "int"),
            always("iops_wr", "int"),
            always("image", "ImageInfo"),
            always("cache", "BlockdevCacheInfo"),
            always("write_threshold", "int"),
        ],
    ),
    (
        "BlockdevChild",
        &[always("child", "str"), always("node-name", "str")],
    ),
    (
        "BlockdevCacheInfo",
        &[
            always("writeback", "bool"),
            always("direct", "bool"),
            always("no-flush", "bool"),
        ],
    ),
    (
        "ImageInfo",
        &[
            always("filename", "str"),
            always("format", "str"),
            always("virtual-size", "int"),
            always("actual-size", "int"),
            always("dirty-flag", "bool"),
            perhaps("cluster-size", "int"),
            perhaps("format-specific", "ImageInfoSpecific"),
            perhaps("backing-filename", "str"),
            perhaps("full-backing-filename", "str"),
            perhaps("backing-filename-format", "str"),
            perhaps("backing-image", "ImageInfo"),
            perhaps("snapshots", "[SnapshotInfo]"),
        ],
    ),
    (
        "SnapshotInfo",
        &[
            always("id", "str"),
            always("name", "str"),
            always("vm-state-size", "int"),
            always("date-sec", "int"),
            always("date-nsec", "int"),
            always("vm-clock-sec", "int"),
            always("vm-clock-nsec", "int"),
            perhaps("icount", "int"),
        ],
    ),
    (
        "ImageInfoSpecific",
        &[always("type", "str"), always("data", "any")],
    ),
    (
        "BlockInfo",
        &[
            always("device", "str"),
            always("type", "str"),
            always("removable", "bool"),
            always("locked", "bool"),
            perhaps("inserted", "BlockDeviceInfo"),
            always("io-status", "str"),
            perhaps("x-sync-errors", "[SyncErrorInfo]"),
        ],
    ),
    (
        "SyncErrorInfo",
        &[
            always("node-name", "str"),
            always("filename", "str"),
            always("desc", "str"),
        ],
    ),
    (
        "BlockStats",
        &[
            perhaps("device", "str"),
            always("node-name", "str"),
            always("stats", "BlockDeviceStats"),
            perhaps("parent", "BlockStats"),
            perhaps("backing", "BlockStats"),
            perhaps("elapsed-ns", "int"),
            perhaps("poll-max-ns", "int"),
            perhaps("queues", "[QueueStats]"),
        ],
    ),
    (
        "JobInfo",
        &[
            always("id", "str"),
            always("type", "str"),
            always("status", "str"),
            always("current-progress", "int"),
            always("total-progress", "int"),
            perhaps("error", "str"),
        ],
    ),
    (
        "BlockJobInfo",
        &[
            always("type", "str"),
            always("device", "str"),
            always("len", "int"),
            always("offset", "int"),
            always("busy", "bool"),
            always("paused", "bool"),
            always("speed", "int"),
            always("io-status", "str"),
            always("ready", "bool"),
            always("status", "str"),
            always("auto-finalize", "bool"),
            always("auto-dismiss", "bool"),
            always("copied", "int"),
            always("to-copy", "int"),
            always("to-copy-final", "bool"),
            perhaps("error", "str"),
        ],
    ),
    (
        "BlockExportInfo",
        &[
            always("id", "str"),
            always("type", "str"),
            always("node-name", "str"),
            always("shutting-down", "bool"),
        ],
    ),
    (
        "IOThreadInfo",
        &[
            always("id", "str"),
            always("thread-id", "int"),
            always("poll-max-ns", "int"),
            always("poll-grow", "int"),
            always("poll-shrink", "int"),
            always("aio-max-batch", "int"),
        ],
    ),
    (
        "ObjectPropertyInfo",
        &[always("name", "str"), always("type", "str")],
    ),
    (
        "XDbgBlockGraph",
        &[
            always("nodes", "[XDbgBlockGraphNode]"),
            always("edges", "[XDbgBlockGraphEdge]"),
        ],
    ),
    (
        "XDbgBlockGraphNode",
        &[
            always("id", "int"),
            always("type", "str"),
            always("name", "str"),
        ],
    ),
    (
        "XDbgBlockGraphEdge",
        &[
            always("parent", "int"),
            always("child", "int"),
            always("name", "str"),
            always("perm", "[str]"),
            always("shared-perm", "[str]"),
        ],
    ),
];

/// Members of `BlockDeviceStats` that are numbers.
pub(super) const DEVICE_COUNTS: &[&str] = &[
    "rd_bytes",
    "rd_operations",
    "wr_bytes",
    "wr_operations",
    "flush_operations",
    "unmap_operations",
    "unmap_bytes",
    "zone_append_bytes",
    "zone_append_operations",
    "rd_total_time_ns",
    "wr_total_time_ns",
    "flush_total_time_ns",
    "unmap_total_time_ns",
    "zone_append_total_time_ns",
    "rd_merged",
    "wr_merged",
    "unmap_merged",
    "zone_append_merged",
    "wr_highest_offset",
    "failed_rd_operations",
    "failed_wr_operations",
    "failed_flush_operations",
    "failed_unmap_operations",
    "failed_zone_append_operations",
    "invalid_rd_operations",
    "invalid_wr_operations",
    "invalid_flush_operations",
    "invalid_unmap_operations",
    "invalid_zone_append_operations",
];

/// The types whose members are lists of counters.
pub(super) fn counted() -> Vec<(&'static str, Vec<Member>)> {
    let counts = DEVICE_COUNTS.iter().map(|name| always(name, "int"));
    let flags = ["account_invalid", "account_failed"].map(|name| always(name, "bool"));
    let timed = always("timed_stats", "[any]");
    let device = counts.chain(flags).chain([timed]).collect();
    let stats = QueueStats::default();
    let own = stats.counters().map(|(name, _)| always(name, "int"));
    let more = [always("thread-id", "int"), always("poll-share", "number")];
    let queue = own.chain(more).collect();
    vec![("BlockDeviceStats", device), ("QueueStats", queue)]
}
