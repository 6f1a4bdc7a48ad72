//! What the control socket needs from the rest of the daemon.

use serde_json::{Value, json};

use crate::job::stream::StreamSpec;
use crate::job::{BodyFactory, Refused};
use crate::state::record::Work;

pub use super::stats::{ExportStats, QueueStats};

/// The rest of the daemon, as commands see it. Calls come from any client's thread.
pub trait Backend: Send + Sync {
    /// All nodes, for `query-named-block-nodes`.
    fn block_nodes(&self) -> Vec<BlockNode>;

    /// All exports, for `query-block-exports` and `query-block`.
    fn exports(&self) -> Vec<Export>;

    /// The counters of all exports, for `query-blockstats`.
    fn export_stats(&self) -> Vec<ExportStats>;

    /// The chain that `device` names: the id of an export, the name of a node, or of a drive.
    fn chain(&self, device: &str) -> Option<ChainView>;

    /// Whether there is a node of this name, of whatever kind.
    fn has_node(&self, name: &str) -> bool {
        self.block_nodes().iter().any(|node| node.node_name == name)
    }

    /// What is recorded of a stream that is about to be made; `None` if nobody can go on with it.
    fn work(&self, _spec: &StreamSpec) -> Result<Option<Work>, Refused> {
        Ok(None)
    }

    /// Gets ready to stream, for the job called `job`. The layers concerned are reserved for the job
    /// already, and stay as they are until it ends. What can fail early (making a layer writable, a
    /// header without room for the base's name) should fail here.
    fn open_stream(&self, spec: &StreamSpec, job: &str) -> Result<BodyFactory, Refused>;

    /// The flushes that have failed and stay failed, of the export's chain, top first.
    fn sync_errors(&self, export: &Export) -> Vec<SyncError>;

    /// Lets the flushes of a device be tried again, which fail since one of them has failed.
    /// Refused when there is no such device, or none of its flushes has failed.
    fn clear_sync_error(&self, device: &str) -> Result<(), Refused>;

    /// Ends the daemon, soon: the answer to `quit` is still to be sent.
    fn quit(&self);
}

/// A chain, seen from one of its layers downwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainView {
    /// The id of the export whose top the first layer is. Jobs on it are called after it.
    pub export: Option<String>,
    /// The length of the device in bytes.
    pub len: u64,
    /// The layers, the one that was asked for first, then those under it.
    pub layers: Vec<LayerView>,
}

/// A layer of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerView {
    /// The name of its (format) node.
    pub node_name: String,
    /// The file names by which clients may name it as a base: as it was opened, as the header of
    /// the layer above has it.
    pub filenames: Vec<String>,
    /// It cannot be written to, nor be made writable.
    pub read_only: bool,
}

/// An export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its id.
    pub id: String,
    /// Its type: `vhost-user-blk`.
    pub kind: String,
    /// The node it serves.
    pub node_name: String,
    /// It is going away.
    pub shutting_down: bool,
}

impl Export {
    /// The export as an item of `query-block-exports`.
    pub(super) fn to_value(&self) -> Value {
        json!({
            "node-name": self.node_name,
            "shutting-down": self.shutting_down,
            "type": self.kind,
            "id": self.id,
        })
    }
}

/// A flush that has failed, since which all flushes of its file fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncError {
    /// The node that is in the file.
    pub node_name: String,
    /// The file.
    pub filename: String,
    /// It failed for lack of space.
    pub no_space: bool,
    /// When and why it failed, what that means and what to do.
    pub description: String,
}

impl SyncError {
    /// The failures `errors` of a device as QEMU names them.
    pub(super) fn io_status(errors: &[SyncError]) -> &'static str {
        match errors {
            [] => "ok",
            errors if errors.iter().all(|error| error.no_space) => "nospace",
            _ => "failed",
        }
    }

    /// The failure as an item of `x-sync-errors`.
    pub(super) fn to_value(&self) -> Value {
        json!({
            "node-name": self.node_name,
            "filename": self.filename,
            "desc": self.description,
        })
    }
}

/// The backing file of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name as the header has it.
    pub filename: String,
    /// Its name as seen from here.
    pub full_filename: String,
    /// Its format, if the header says so.
    pub format: Option<String>,
    /// The node that stands for it.
    pub node_name: String,
}

/// A node.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockNode {
    /// Its name.
    pub node_name: String,
    /// Its driver: `qcow2`, `raw`, `file` …
    pub driver: String,
    /// The file it stands on.
    pub filename: String,
    /// It is not to be written to.
    pub read_only: bool,
    /// What a guest sees, in bytes.
    pub virtual_size: u64,
    /// What it takes on the disk, in bytes.
    pub actual_size: u64,
    /// The size of its clusters, if it has any.
    pub cluster_size: Option<u64>,
    /// The image was not closed properly, or is open.
    pub dirty: bool,
    /// The host's page cache is passed by.
    pub cache_direct: bool,
    /// Flushes are ignored.
    pub cache_no_flush: bool,
    /// Writes are complete before they are stable.
    pub cache_writeback: bool,
    /// `off`, `on` or `unmap`.
    pub detect_zeroes: String,
    /// The layer below.
    pub backing: Option<Backing>,
    /// The nodes that it stands on: what each is to it (`file`, `backing`, `data-file`), and its
    /// name.
    pub children: Vec<(&'static str, String)>,
    /// More about the image: `{"type": …, "data": {…}}`.
    pub format_specific: Option<Value>,
}

impl BlockNode {
    /// The node as an item of `query-named-block-nodes`. With `all`, the images below are described
    /// within the node's own.
    pub(super) fn to_value(&self, all: Option<&[BlockNode]>) -> Value {
        let depth = all.map_or(0, |all| self.depth(all));
        let mut value = json!({
            "iops_rd": 0,
            "detect_zeroes": self.detect_zeroes,
            "active": true,
            "image": self.image(all),
            "iops_wr": 0,
            "ro": self.read_only,
            "node-name": self.node_name,
            "backing_file_depth": depth,
            "drv": self.driver,
            "iops": 0,
            "bps_wr": 0,
            "write_threshold": 0,
            "encrypted": false,
            "bps": 0,
            "bps_rd": 0,
            "cache": {
                "no-flush": self.cache_no_flush,
                "direct": self.cache_direct,
                "writeback": self.cache_writeback,
            },
            "file": self.filename,
            "children": self.children(),
        });
        if let Some(backing) = &self.backing {
            set(&mut value, "backing_file", backing.full_filename.as_str());
        }
        value
    }

    /// As QEMU has it from 10.1 on. Only here is told which node is below: several may be on the
    /// same file.
    fn children(&self) -> Value {
        let children = self.children.iter();
        children
            .map(|(child, node)| json!({"child": child, "node-name": node}))
            .collect()
    }

    fn image(&self, all: Option<&[BlockNode]>) -> Value {
        let mut value = json!({
            "virtual-size": self.virtual_size,
            "filename": self.filename,
            "format": self.driver,
            "actual-size": self.actual_size,
            "dirty-flag": self.dirty,
        });
        if let Some(size) = self.cluster_size {
            set(&mut value, "cluster-size", size);
        }
        if let Some(specific) = &self.format_specific {
            set(&mut value, "format-specific", specific.clone());
        }
        if let Some(backing) = &self.backing {
            set(&mut value, "backing-filename", backing.filename.as_str());
            set(
                &mut value,
                "full-backing-filename",
                backing.full_filename.as_str(),
            );
            if let Some(format) = &backing.format {
                set(&mut value, "backing-filename-format", format.as_str());
            }
        }
        if let Some(all) = all
            && let Some(below) = self.below(all)
        {
            // Each step goes on with fewer nodes, so a loop in the data would end, too.
            let others: Vec<_> = all
                .iter()
                .filter(|node| node.node_name != self.node_name)
                .cloned()
                .collect();
            set(&mut value, "backing-image", below.image(Some(&others)));
        }
        value
    }

    fn below<'a>(&self, all: &'a [BlockNode]) -> Option<&'a BlockNode> {
        let backing = self.backing.as_ref()?;
        all.iter().find(|node| node.node_name == backing.node_name)
    }

    /// How many layers are under this one.
    pub(super) fn depth(&self, all: &[BlockNode]) -> usize {
        let mut depth = 0;
        let mut node = self;
        while let Some(below) = node.below(all)
            && depth < all.len()
        {
            node = below;
            depth += 1;
        }
        depth
    }
}

fn set(value: &mut Value, member: &str, content: impl Into<Value>) {
    if let Some(members) = value.as_object_mut() {
        members.insert(member.to_owned(), content.into());
    }
}
