//! What there is, as it should be: nodes, exports, jobs and objects, as a value that steps change.
//!
//! A job ends when it likes, and a process that is killed may or may not have carried out its command.
//! So there are several worlds that may be found, of which what is found chooses one.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

/// A node that a client has named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its file.
    pub file: String,
    /// The node under it.
    pub backing: Option<String>,
    /// What the header says lies under it: a file.
    pub header: Option<String>,
    /// Nothing has ever been written to it.
    pub empty: bool,
    /// It was committed away, or is what is left of a chain: it is of no more use.
    pub left: bool,
    /// Bytes of its disk when it was made.
    pub size: u64,
    /// Snapshots inside of it.
    pub snapshots: BTreeSet<String>,
}

/// What a job does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Into a node, down to a base.
    Stream {
        /// The node.
        target: String,
        /// What stays under it.
        base: Option<String>,
    },
    /// Of layers, into a base.
    Commit {
        /// The node over the layers.
        above: String,
        /// The first of them.
        top: String,
        /// The base.
        base: String,
    },
    /// Of a guest's own layer.
    Active {
        /// The layer.
        top: String,
        /// The base.
        base: String,
        /// A client has told it to complete.
        completing: bool,
    },
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// What it does.
    pub work: Work,
    /// The nodes that it has.
    pub nodes: Vec<String>,
    /// A client has paused it.
    pub paused: bool,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct World {
    /// Nodes by name.
    pub nodes: BTreeMap<String, Node>,
    /// The node of each export.
    pub exports: BTreeMap<String, String>,
    /// Jobs by name.
    pub jobs: BTreeMap<String, Job>,
    /// Objects.
    pub objects: BTreeSet<String>,
    /// Bytes of the disk of each export.
    pub sizes: BTreeMap<String, u64>,
}

/// What a client sees of a world.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// File and backing node of each named node.
    pub nodes: BTreeMap<String, (String, Option<String>)>,
    /// The node of each export.
    pub exports: BTreeMap<String, String>,
    /// The jobs.
    pub jobs: BTreeSet<String>,
    /// The objects.
    pub objects: BTreeSet<String>,
    /// Snapshots inside of each named node.
    pub snapshots: BTreeMap<String, BTreeSet<String>>,
    /// Bytes of the disk of each export.
    pub sizes: BTreeMap<String, u64>,
    /// Bytes of each named node's disk.
    all_sizes: BTreeMap<String, u64>,
}

impl Seen {
    /// What the answers of the queries say.
    pub fn of(nodes: &Value, exports: &Value, jobs: &Value, objects: &Value) -> Self {
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut seen = Seen::default();
        // Each job is a node over the one that it works on, which is what counts here.
        let jobs_filters: BTreeMap<String, String> = list(nodes)
            .iter()
            .filter(|node| {
                let drivers = ["copy-on-read", "commit_top", "mirror_top"];
                text(&node["node-name"]).starts_with('#')
                    && drivers.contains(&text(&node["drv"]).as_str())
            })
            .filter_map(|filter| {
                let below = filter["children"].as_array()?.first()?;
                Some((text(&filter["node-name"]), text(&below["node-name"])))
            })
            .collect();
        let under = |mut name: String| {
            while let Some(below) = jobs_filters.get(&name) {
                name.clone_from(below);
            }
            name
        };
        for node in list(nodes) {
            let name = text(&node["node-name"]);
            if name.starts_with('#') {
                continue;
            }
            let children = list(&node["children"]);
            let below = children.iter().find(|child| child["child"] == "backing");
            let below = below.map(|child| under(text(&child["node-name"])));
            let inside = list(&node["image"]["snapshots"]);
            let inside = inside.iter().map(|one| text(&one["name"])).collect();
            seen.snapshots.insert(name.clone(), inside);
            let size = node["image"]["virtual-size"].as_u64();
            seen.all_sizes.insert(name.clone(), size.unwrap_or(0));
            seen.nodes.insert(name, (text(&node["file"]), below));
        }
        for export in list(exports) {
            seen.put_export(text(&export["id"]), under(text(&export["node-name"])));
        }
        seen.jobs = list(jobs).iter().map(|job| text(&job["id"])).collect();
        seen.objects = list(objects).iter().map(|one| text(&one["id"])).collect();
        seen
    }

    /// An export, and its node.
    pub fn put_export(&mut self, id: String, node: String) {
        let size = self.size_of(&node);
        self.sizes.insert(id.clone(), size);
        self.exports.insert(id, node);
    }

    /// Bytes of a node's disk, 0 if there is no such node.
    pub fn size_of(&self, node: &str) -> u64 {
        self.all_sizes.get(node).copied().unwrap_or(0)
    }

    /// As what there should be says it.
    fn without_all_sizes(&self) -> Seen {
        Seen {
            all_sizes: BTreeMap::new(),
            ..self.clone()
        }
    }
}

impl World {
    /// What a client should see.
    pub fn seen(&self) -> Seen {
        let nodes = self.nodes.iter();
        Seen {
            nodes: nodes
                .map(|(name, node)| (name.clone(), (node.file.clone(), node.backing.clone())))
                .collect(),
            exports: self.exports.clone(),
            jobs: self.jobs.keys().cloned().collect(),
            objects: self.objects.clone(),
            snapshots: self
                .nodes
                .iter()
                .map(|(name, node)| (name.clone(), node.snapshots.clone()))
                .collect(),
            sizes: self.sizes.clone(),
            all_sizes: BTreeMap::new(),
        }
    }

    /// The nodes of a disk, the guest's first.
    pub fn chain(&self, top: &str) -> Vec<String> {
        let mut chain = Vec::new();
        let mut next = Some(top.to_owned());
        while let Some(name) = next {
            next = self.nodes.get(&name).and_then(|node| node.backing.clone());
            chain.push(name);
        }
        chain
    }

    /// The nodes over `name`.
    pub fn over(&self, name: &str) -> Vec<String> {
        let nodes = self.nodes.iter();
        let over = nodes.filter(|(_, node)| node.backing.as_deref() == Some(name));
        over.map(|(name, _)| name.clone()).collect()
    }

    /// A job has the node.
    pub fn is_busy(&self, name: &str) -> bool {
        let mut jobs = self.jobs.values();
        jobs.any(|job| job.nodes.iter().any(|node| node == name))
    }

    /// The node is in the disk of an export.
    pub fn is_served(&self, name: &str) -> bool {
        let mut tops = self.exports.values();
        tops.any(|top| self.chain(top).iter().any(|node| node == name))
    }

    /// The chain of a node is the one that its headers name.
    pub fn is_as_headers_say(&self, top: &str) -> bool {
        let same = |header: &Option<String>, file: Option<String>| {
            header.as_ref().map(|name| name.replace("/./", "/")) == file
        };
        let chain = self.chain(top);
        let mut nodes = chain.iter().filter_map(|name| self.nodes.get(name));
        nodes.all(|node| same(&node.header, self.file(node.backing.as_ref())))
    }

    fn file(&self, node: Option<&String>) -> Option<String> {
        Some(self.nodes.get(node?)?.file.clone())
    }

    /// The new node `overlay` is on top of `old`.
    pub fn cover(&mut self, old: &str, overlay: &str, header: String) {
        if let Some(node) = self.nodes.get_mut(overlay) {
            node.backing = Some(old.to_owned());
            node.header = Some(header);
            node.empty = false;
        }
        for top in self.exports.values_mut().filter(|top| *top == old) {
            overlay.clone_into(top);
        }
        for name in self.chain(old) {
            if let Some(node) = self.nodes.get_mut(&name) {
                node.empty = false;
            }
        }
    }

    /// Puts `base` under `target`, which its header says as well.
    fn relink(&mut self, target: &str, base: Option<&String>) {
        let header = self.file(base);
        if let Some(node) = self.nodes.get_mut(target) {
            node.backing = base.cloned();
            node.header = header;
        }
    }

    /// The job has ended well.
    pub fn finish(&mut self, id: &str) {
        let Some(job) = self.jobs.remove(id) else {
            return;
        };
        let before = self.clone();
        match &job.work {
            Work::Stream { target, base } => self.relink(target, base.as_ref()),
            Work::Commit { above, base, .. } => self.relink(above, Some(base)),
            Work::Active { top, base, .. } => {
                for node in self.exports.values_mut().filter(|node| *node == top) {
                    base.clone_into(node);
                }
            }
        }
        for name in before.nodes.keys() {
            if before.is_served(name) && !self.is_served(name) {
                self.nodes.entry(name.clone()).and_modify(|n| n.left = true);
            }
        }
        self.touched(&job);
    }

    /// The job is gone, and has changed nothing but the bytes of layers.
    pub fn cancel(&mut self, id: &str) {
        if let Some(job) = self.jobs.remove(id) {
            self.touched(&job);
        }
    }

    fn touched(&mut self, job: &Job) {
        let written = match &job.work {
            Work::Stream { target, .. } => target,
            Work::Commit { base, .. } | Work::Active { base, .. } => base,
        };
        if let Some(node) = self.nodes.get_mut(written) {
            node.empty = false;
        }
    }

    /// As the next process may find it: what lies under nodes of no more use may be what their options
    /// say. `seen` decides.
    pub fn restarted(&self, seen: &Seen) -> World {
        let mut world = self.clone();
        for (name, node) in world.nodes.iter_mut().filter(|(_, node)| node.left) {
            if let Some((_, backing)) = seen.nodes.get(name) {
                node.backing.clone_from(backing);
            }
        }
        world
    }

    /// The worlds that this one may have become by itself.
    fn later(&self) -> Vec<World> {
        let mut worlds = vec![self.clone()];
        for (id, job) in &self.jobs {
            let waits = matches!(&job.work, Work::Active { completing, .. } if !completing);
            if waits || job.paused {
                continue;
            }
            let ended = worlds.iter().map(|world| {
                let mut world = world.clone();
                world.finish(id);
                world
            });
            worlds.extend(ended.collect::<Vec<_>>());
        }
        worlds
    }
}

/// As [`find`], of the worlds that a process before this one may have left.
pub fn find_restarted(worlds: &[World], seen: &Seen) -> Result<World, String> {
    let later = worlds.iter().flat_map(World::later);
    let later: Vec<World> = later.map(|world| world.restarted(seen)).collect();
    find(&later, seen)
}

/// The one of `worlds`, as they may have become, that is `seen`; the first of them if several are.
pub fn find(worlds: &[World], seen: &Seen) -> Result<World, String> {
    let later: Vec<World> = worlds.iter().flat_map(World::later).collect();
    let seen = seen.without_all_sizes();
    match later.iter().find(|world| world.seen() == seen) {
        Some(world) => Ok(world.clone()),
        None => Err(differences(&later, &seen)),
    }
}

fn differences(worlds: &[World], seen: &Seen) -> String {
    let mut text = "there is something else than there should be".to_owned();
    for world in worlds {
        let wanted = world.seen();
        text += "\n  or";
        for (name, node) in &wanted.nodes {
            if seen.nodes.get(name) != Some(node) {
                text += &format!(" node {name} {:?}, not {node:?};", seen.nodes.get(name));
            }
        }
        for name in seen.nodes.keys().filter(|n| !wanted.nodes.contains_key(*n)) {
            text += &format!(" node {name} that should not be there;");
        }
        if wanted.exports != seen.exports {
            text += &format!(" exports {:?}, not {:?};", seen.exports, wanted.exports);
        }
        for (name, inside) in &wanted.snapshots {
            let found = seen.snapshots.get(name);
            if found.is_some_and(|found| found != inside) {
                text += &format!(" snapshots {found:?} in {name}, not {inside:?};");
            }
        }
        if wanted.sizes != seen.sizes {
            text += &format!(" sizes {:?}, not {:?};", seen.sizes, wanted.sizes);
        }
        if wanted.jobs != seen.jobs {
            text += &format!(" jobs {:?}, not {:?};", seen.jobs, wanted.jobs);
        }
        if wanted.objects != seen.objects {
            text += &format!(" objects {:?}, not {:?};", seen.objects, wanted.objects);
        }
    }
    text
}

/// The options of an image's node.
pub fn options(name: &str, file: &str, backing: Option<&str>) -> Value {
    let file = json!({"driver": "file", "filename": file, "discard": "unmap"});
    json!({"driver": "qcow2", "node-name": name, "discard": "unmap", "file": file,
        "backing": backing})
}
