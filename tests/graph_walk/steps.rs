//! The steps of a walk: which there are, and what each changes.
//!
//! A step is chosen among those that must work as things are. Most are one command, which may be
//! carried out in full or be overtaken by the end of the process.
//!
//! A new kind of step is a variant of [`Step`], a line in [`choose`](crate::choose), and an arm of
//! [`Scene::act`] that says which command it is and what is different afterwards.

use serde_json::{Value, json};

use crate::common::Res;
use crate::new_images::node;
use crate::scene::Scene;
use crate::world::{self, Work, World};

/// A step.
#[derive(Clone, Debug)]
pub enum Step {
    /// `blockdev-add` of a new image over the top of a disk, which is not put there yet.
    Add {
        /// The export.
        export: String,
        /// The image is made by `blockdev-create`.
        by_jobs: bool,
    },
    /// `blockdev-del`.
    Del(String),
    /// `blockdev-snapshot`, `blockdev-snapshot-sync` or a `transaction` of several: exports, and the
    /// nodes that are put on top, if there are any.
    Snapshot(Vec<(String, Option<String>)>),
    /// `block-stream`.
    Stream {
        /// The export whose chain it is.
        export: String,
        /// The node streamed into.
        target: String,
        /// What stays.
        base: Option<String>,
    },
    /// `block-commit` between layers.
    Commit {
        /// The export whose chain it is.
        export: String,
        /// The first layer.
        top: String,
        /// What it goes into.
        base: String,
    },
    /// `block-commit` of the guest's own layer.
    Active {
        /// The export.
        export: String,
        /// What it goes into.
        base: String,
    },
    /// `job-complete`, and the end of the job.
    Complete(String),
    /// `job-cancel`, and the end of the job.
    Cancel(String),
    /// `job-pause` or `job-resume`.
    Pause(String),
    /// Waits for a job's end.
    Await(String),
    /// `blockdev-reopen`: an empty image is put under another one.
    Insert {
        /// The image over it.
        above: String,
    },
    /// `blockdev-reopen`: an empty image is taken from under another one.
    Extract {
        /// The image over it.
        above: String,
        /// The empty image.
        empty: String,
    },
    /// `change-backing-file`: the same file by another name.
    Rename {
        /// The export whose chain it is.
        export: String,
        /// The image.
        node: String,
    },
    /// `block-export-del`.
    ExportDel(String),
    /// `block-export-add` of one that was removed.
    ExportAdd(String),
    /// `object-add`.
    ObjectAdd,
    /// `object-del`.
    ObjectDel(String),
    /// `block_resize`: more bytes.
    Resize {
        /// The export.
        export: String,
        /// Bytes from then on.
        size: u64,
    },
    /// `blockdev-snapshot-internal-sync` of the top of an export's disk.
    Keep(String),
    /// `blockdev-snapshot-delete-internal-sync`.
    Forget {
        /// The node.
        node: String,
        /// The snapshot.
        name: String,
    },
    /// Commands that are refused, by the number of the first one's kind.
    Refused(u64),
    /// A kill, and another start.
    Kill,
    /// A kill while a command is carried out.
    KillDuring(Box<Step>),
    /// A power cut.
    Cut,
    /// A power cut while a command is carried out.
    CutDuring(Box<Step>),
    /// An end in order, and another start.
    Restart,
    /// All that the guests have is read.
    Verify,
    /// `qemu-img` looks at the images that are not written.
    Check,
}

/// What has been made for a step, and what it does.
pub struct Act {
    /// The command.
    pub command: &'static str,
    /// Its arguments.
    pub arguments: Value,
    /// What it changes.
    pub after: World,
}

impl Scene {
    /// What is to be done for a step that is one command. Files that it needs are made.
    pub fn act(&mut self, step: &Step) -> Res<Option<Act>> {
        let mut after = self.world.clone();
        let (command, arguments) = match step {
            Step::Add { export, .. } => {
                let (name, file, header) = self.new_image(export)?;
                let size = self.size_of(export)?;
                let made = node(&file, None, &header, size);
                after.nodes.insert(name.clone(), made);
                ("blockdev-add", world::options(&name, &file, None))
            }
            Step::Del(name) => {
                after.nodes.remove(name);
                ("blockdev-del", json!({"node-name": name}))
            }
            Step::Snapshot(covers) => self.snapshot(&mut after, covers)?,
            Step::Stream { .. } | Step::Commit { .. } | Step::Active { .. } => {
                self.job(&mut after, step)?
            }
            Step::Complete(id) => {
                if let Some(job) = after.jobs.get_mut(id)
                    && let Work::Active { completing, .. } = &mut job.work
                {
                    *completing = true;
                }
                ("job-complete", json!({"id": id}))
            }
            Step::Pause(id) => {
                let job = after.jobs.get_mut(id).ok_or("no such job")?;
                job.paused = !job.paused;
                let pause = job.paused;
                (
                    if pause { "job-pause" } else { "job-resume" },
                    json!({"id": id}),
                )
            }
            Step::Await(id) => {
                let speed = json!({"device": id, "speed": 0});
                ("block-job-set-speed", speed)
            }
            Step::Resize { export, size } => {
                after.sizes.insert(export.clone(), *size);
                ("block_resize", json!({"device": export, "size": size}))
            }
            Step::Keep(export) => {
                let (name, top) = (self.name("s"), self.top(export)?);
                let node = after.nodes.get_mut(&top).ok_or("no such node")?;
                node.snapshots.insert(name.clone());
                (
                    "blockdev-snapshot-internal-sync",
                    json!({"device": top, "name": name}),
                )
            }
            Step::Forget { node, name } => {
                let of = after.nodes.get_mut(node).ok_or("no such node")?;
                of.snapshots.remove(name);
                (
                    "blockdev-snapshot-delete-internal-sync",
                    json!({"device": node, "name": name}),
                )
            }
            Step::Extract { above, empty } => {
                let below = after.nodes.get(empty).and_then(|node| node.backing.clone());
                self.reopen(&mut after, above, below)?
            }
            Step::Rename { export, node } => self.rename(&mut after, export, node)?,
            Step::ExportAdd(id) => {
                let node = self.world.exports.get(id).ok_or("no such export")?;
                ("block-export-add", self.export_options(id, node)?)
            }
            Step::ObjectAdd => {
                let id = self.name("io");
                after.objects.insert(id.clone());
                ("object-add", json!({"qom-type": "iothread", "id": id}))
            }
            Step::ObjectDel(id) => {
                after.objects.remove(id);
                ("object-del", json!({"id": id}))
            }
            _ => return Ok(None),
        };
        Ok(Some(Act {
            command,
            arguments,
            after,
        }))
    }

    /// A node's file.
    pub fn file_of(&self, node: &str) -> Res<String> {
        let found = self.world.nodes.get(node);
        Ok(found
            .ok_or_else(|| format!("no node '{node}'"))?
            .file
            .clone())
    }

    /// Bytes of an export's disk.
    pub fn size_of(&self, export: &str) -> Res<u64> {
        let size = self.world.sizes.get(export);
        Ok(*size.ok_or_else(|| format!("no export '{export}'"))?)
    }

    /// The node of an export.
    pub fn top(&self, export: &str) -> Res<String> {
        let top = self.world.exports.get(export);
        Ok(top.ok_or_else(|| format!("no export '{export}'"))?.clone())
    }

    /// The options of `above` with another node under it.
    pub fn reopen(
        &self,
        after: &mut World,
        above: &str,
        below: Option<String>,
    ) -> Res<(&'static str, Value)> {
        let options = world::options(above, &self.file_of(above)?, below.as_deref());
        if let Some(node) = after.nodes.get_mut(above) {
            node.backing = below;
        }
        Ok(("blockdev-reopen", json!({"options": [options]})))
    }

    fn rename(&self, after: &mut World, export: &str, name: &str) -> Res<(&'static str, Value)> {
        let node = after.nodes.get_mut(name).ok_or("no such node")?;
        let below = node.backing.as_ref().ok_or("nothing under it")?;
        let file = self.file_of(below)?;
        let (folder, file) = file.rsplit_once('/').ok_or("a path without folders")?;
        let named = format!("{folder}/./{file}");
        node.header = Some(named.clone());
        let arguments = json!({"device": self.top(export)?, "image-node-name": name,
            "backing-file": named});
        Ok(("change-backing-file", arguments))
    }
}
