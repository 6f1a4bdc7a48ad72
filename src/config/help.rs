//! The texts behind `--help`.

/// Heading of the options for one disk.
pub(super) const DISK: &str = "One disk";
/// Heading of the options that define nodes and exports.
pub(super) const NODES: &str = "Nodes and exports (as in qemu-storage-daemon)";
/// Heading of the options for control sockets.
pub(super) const CONTROL: &str = "Control sockets";
/// Heading of the options for the process itself.
pub(super) const PROCESS: &str = "Process";

/// `--blockdev help`.
pub(super) const BLOCKDEV: &str = "x";
pub(super) const EXPORT: &str = "x";
pub(super) const CHARDEV: &str = "x";
pub(super) const OBJECT: &str = "x";
pub(super) const TRACE: &str = "x";
pub(super) const DETAILS: &str = "x";
