//! Nodes and their failed flushes as answers: `query-named-block-nodes`, `query-block`.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};

use super::snapshot;
use crate::engine::{Engine, SyncError, sizes};
use crate::format::{Format, qcow2};
use crate::graph::{FilterKind, Node, Role, State, resolve};
use crate::options::{DetectZeroes, Driver};

/// All nodes as they are now.
pub(super) struct Nodes {
    nodes: Vec<Node>,
    /// What each takes on the disk, in bytes.
    sizes: Vec<u64>,
    /// Write thresholds, by the names of their nodes.
    thresholds: HashMap<String, u64>,
}

impl Nodes {
    /// Those of `engine`.
    pub fn of(engine: &Engine) -> Self {
        Self::shown(engine.graph.shown())
    }

    /// Those that guests' disks show.
    pub fn of_guests(engine: &Engine) -> Self {
        Self::shown(engine.graph.shown_named())
    }

    fn shown(state: State) -> Self {
        let nodes = state.nodes().iter();
        let nodes: Vec<_> = nodes.map(|node| Node::clone(node)).collect();
        let thresholds = state.thresholds();
        let thresholds = thresholds.map(|(name, at)| (name.to_owned(), at)).collect();
        // Who waits for storage must not hold a state of the graph meanwhile.
        drop(state);
        let sizes = sizes::of(&nodes);
        Self {
            nodes,
            sizes,
            thresholds,
        }
    }

    /// The node called `name`.
    pub fn find(&self, name: &str) -> Option<NodeView<'_>> {
        let node = self.nodes.iter().find(|node| node.name == name)?;
        Some(NodeView { node, all: self })
    }

    /// What is shown in the place of node `name`: a filter over it, if there is one.
    pub fn shown_at(&self, name: &str) -> Option<NodeView<'_>> {
        let mut nodes = self.nodes.iter();
        match nodes.find(|node| node.is_filter_over(name)) {
            Some(node) => Some(NodeView { node, all: self }),
            None => self.find(name),
        }
    }

    /// As QEMU writes it: the largest ones as negative numbers.
    fn threshold(&self, node: &Node) -> i64 {
        let at = self.thresholds.get(&node.name);
        at.copied().unwrap_or(0).cast_signed()
    }

    fn size(&self, node: &Node) -> u64 {
        let found = self.nodes.iter().position(|other| other.name == node.name);
        let size = found.and_then(|at| self.sizes.get(at));
        size.copied().unwrap_or(0)
    }

    /// Each node.
    pub fn each(&self) -> impl Iterator<Item = NodeView<'_>> {
        self.nodes.iter().map(|node| NodeView { node, all: self })
    }
}

/// A node among all nodes.
#[derive(Clone, Copy)]
pub(super) struct NodeView<'a> {
    node: &'a Node,
    all: &'a Nodes,
}

/// The backing file of an image.
struct Backing {
    /// What the node under it is called, which the image may know by another name.
    shown: String,
    /// Its name as the header has it.
    filename: String,
    /// Its name as seen from here.
    full_filename: String,
    format: String,
}

impl<'a> NodeView<'a> {
    /// Its name.
    pub fn name(self) -> &'a str {
        &self.node.name
    }

    /// The node as an item of `query-named-block-nodes`. With `nested`, the images below are
    /// described within the node's own.
    pub fn to_value(self, nested: bool) -> Value {
        let cache = self.node.options.cache;
        let mut value = json!({
            "iops_rd": 0,
            "detect_zeroes": self.detect_zeroes(),
            "active": true,
            "image": self.image(nested),
            "iops_wr": 0,
            "ro": self.node.options.read_only,
            "node-name": self.name(),
            "backing_file_depth": if nested { self.depth() } else { 0 },
            "drv": self.node.driver_name(),
            "iops": 0,
            "bps_wr": 0,
            "write_threshold": self.all.threshold(self.node),
            "encrypted": false,
            "bps": 0,
            "bps_rd": 0,
            "cache": {"no-flush": cache.no_flush, "direct": cache.direct, "writeback": true},
            "file": self.filename(),
            "children": self.children(),
        });
        if let Some(backing) = self.backing() {
            set(&mut value, "backing_file", backing.shown);
        }
        value
    }

    /// What `info block` says of the node, under a title.
    pub fn describe(self, title: &str) -> String {
        let cache = self.node.options.cache;
        let told = |yes: bool, text: &'static str| if yes { text } else { "" };
        let mut text = format!(
            "{title}: {} ({}{})\n    Cache mode:       writeback{}{}\n",
            self.filename(),
            self.node.driver_name(),
            told(self.node.options.read_only, ", read-only"),
            told(cache.direct, ", direct"),
            told(cache.no_flush, ", ignore flushes"),
        );
        if let Some(backing) = self.backing() {
            text += &format!(
                "    Backing file:     {} (chain depth: {})\n",
                backing.shown,
                self.depth()
            );
        }
        text
    }

    fn filename(self) -> String {
        let file = self.node.filename.display();
        match &self.node.options.driver {
            Driver::CopyOnRead(_) if self.is_written_out() => {
                format!("json:{}", self.written_out())
            }
            Driver::Blkdebug(options) => {
                let config = options.config.as_deref().unwrap_or(Path::new(""));
                format!("blkdebug:{}:{file}", config.display())
            }
            _ => file.to_string(),
        }
    }

    /// Whether its name says that it is a filter.
    fn is_written_out(self) -> bool {
        matches!(self.node.of_job, None | Some((FilterKind::Stream, true)))
    }

    /// What it is made of, with the white space that QEMU has.
    fn written_out(self) -> String {
        let file = self.node.file().and_then(|file| self.all.find(file));
        let (key, value) = match file {
            Some(file) => ("file", file.written_out()),
            None => {
                let path = self.node.filename.display().to_string();
                ("filename", Value::from(path).to_string())
            }
        };
        let driver = self.node.driver_name();
        format!("{{\"driver\": \"{driver}\", \"{key}\": {value}}}")
    }

    fn detect_zeroes(self) -> &'static str {
        match self.node.options.detect_zeroes {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        }
    }

    /// The nodes that it stands on, as QEMU has it from 10.1 on. Only here is told which node is
    /// below: several may be on the same file.
    fn children(self) -> Value {
        let roles = [
            Role::Filtered,
            Role::Image,
            Role::File,
            Role::Backing,
            Role::DataFile,
        ];
        let children = roles.iter().filter_map(|role| {
            let child = match self.node.of_job {
                Some((kind, _)) => kind.child(),
                None => role.key(),
            };
            Some(json!({"child": child, "node-name": self.node.child(*role)?}))
        });
        children.collect()
    }

    /// The node under it whose disk it shows, or that supplies what it lacks.
    fn below(self) -> Option<Self> {
        let child = self.node.child(Role::Filtered);
        self.all.find(child.or(self.node.child(Role::Backing))?)
    }

    /// The image under its own. A filter has none.
    fn backing(self) -> Option<Backing> {
        let below = self.all.find(self.node.child(Role::Backing)?)?;
        let shown = below.filename();
        let full_filename = match below.node.is_filter() {
            true => below.node.filename.display().to_string(),
            false => shown.clone(),
        };
        let header = self.node.layer.format.backing();
        // The header may name another file than the one that was asked for.
        let named = header.as_ref().map(|header| header.name.clone());
        let named = named.filter(|name| resolve(&self.node.filename, name) == below.node.filename);
        Some(Backing {
            filename: named.unwrap_or_else(|| full_filename.clone()),
            full_filename,
            format: header
                .and_then(|header| header.format)
                .unwrap_or_else(|| below.node.driver_name().to_owned()),
            shown,
        })
    }

    /// How many layers are under this one.
    fn depth(self) -> usize {
        let layers = std::iter::successors(Some(self), |view| view.below()).skip(1);
        layers.take(self.all.nodes.len()).count()
    }

    /// The image's internal snapshots, as a member of what is said of it, if it has any.
    fn snapshots(self) -> Value {
        match &self.node.layer.format {
            Format::Qcow2(image) if !self.node.is_filter() && !image.snapshots().is_empty() => {
                let snapshots = image.snapshots();
                let snapshots: Value = snapshots.iter().map(snapshot::describe).collect();
                json!({ "snapshots": snapshots })
            }
            _ => json!({}),
        }
    }

    fn image(self, nested: bool) -> Value {
        let format = &self.node.layer.format;
        let mut value = self.snapshots();
        for (member, content) in [
            ("virtual-size", json!(format.size())),
            ("filename", json!(self.filename())),
            ("format", json!(self.node.driver_name())),
            ("actual-size", json!(self.all.size(self.node))),
            ("dirty-flag", json!(false)),
        ] {
            set(&mut value, member, content);
        }
        if !matches!(format, Format::Raw(_)) {
            set(&mut value, "cluster-size", format.cluster_size());
        }
        if let Some(specific) = self.format_specific() {
            set(&mut value, "format-specific", specific);
        }
        if let Some(backing) = self.backing() {
            set(&mut value, "backing-filename", backing.filename);
            set(&mut value, "full-backing-filename", backing.full_filename);
            set(&mut value, "backing-filename-format", backing.format);
        }
        if let Some(below) = self.below().filter(|_| nested) {
            set(&mut value, "backing-image", below.image(true));
        }
        value
    }

    fn format_specific(self) -> Option<Value> {
        match (&self.node.layer.format, &self.node.options.driver) {
            _ if self.node.is_filter() => None,
            // The bitmaps would have to be read.
            (Format::Qcow2(image), _) => Some(qcow2::format_specific(&image.header(), &[], None)),
            (_, Driver::File(_)) => Some(json!({"type": "file", "data": {}})),
            _ => None,
        }
    }
}

/// The failed flushes of a device as QEMU names them.
pub(super) fn io_status(errors: &[SyncError]) -> &'static str {
    match errors {
        [] => "ok",
        errors if errors.iter().all(|error| error.no_space) => "nospace",
        _ => "failed",
    }
}

/// A failed flush as an item of `x-sync-errors`.
pub(super) fn sync_error(error: &SyncError) -> Value {
    json!({
        "node-name": error.node_name,
        "filename": error.filename,
        "desc": error.description,
    })
}

fn set(value: &mut Value, member: &str, content: impl Into<Value>) {
    if let Some(members) = value.as_object_mut() {
        members.insert(member.to_owned(), content.into());
    }
}
