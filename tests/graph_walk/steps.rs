//! The steps of a walk: which there are, and what each changes.
//!
//! A step is chosen among those that must work as things are. Most are one command, which may be
//! carried out in full or be overtaken by the end of the process.
//!
//! New kinds of steps (another size of a disk, internal snapshots, events of nodes) are a variant of
//! [`Step`], a line in [`choose`](crate::choose), and a function here that says which command it is and
//! what is different afterwards.

use serde_json::{Value, json};

use crate::common::{Res, images};
use crate::scene::{CLUSTERS, DISK, Scene, make_stable};
use crate::world::{self, Job, Node, Work, World};

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
    /// A command that is refused, by the number of a kind.
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
                after.nodes.insert(name.clone(), node(&file, None, &header));
                ("blockdev-add", world::options(&name, &file, None))
            }
            Step::Del(name) => {
                after.remove(name);
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

    fn file_of(&self, node: &str) -> Res<String> {
        let found = self.world.nodes.get(node);
        Ok(found
            .ok_or_else(|| format!("no node '{node}'"))?
            .file
            .clone())
    }

    fn top(&self, export: &str) -> Res<String> {
        let top = self.world.exports.get(export);
        Ok(top.ok_or_else(|| format!("no export '{export}'"))?.clone())
    }

    /// A new image over the top of an export's disk: name, file, and the file under it.
    fn new_image(&mut self, export: &str) -> Res<(String, String, String)> {
        let below = self.file_of(&self.top(export)?)?;
        self.new_image_over(&below)
    }

    fn new_image_over(&mut self, below: &str) -> Res<(String, String, String)> {
        let name = self.name("n");
        let file = self.file(&format!("{name}.qcow2"))?;
        let options = CLUSTERS[self.rng.below(CLUSTERS.len() as u64) as usize];
        let size = DISK.to_string();
        images::qemu_img(&[
            "create", "-q", "-f", "qcow2", "-o", options, "-u", "-b", below, "-F", "qcow2", &file,
            &size,
        ])?;
        make_stable(file.as_ref())?;
        Ok((name, file, below.to_owned()))
    }

    fn snapshot(
        &mut self,
        after: &mut World,
        covers: &[(String, Option<String>)],
    ) -> Res<(&'static str, Value)> {
        let mut actions = Vec::new();
        for (export, overlay) in covers {
            let old = self.top(export)?;
            let header = self.file_of(&old)?;
            let device = if self.down.contains(export) || self.rng.one_in(2) {
                &old
            } else {
                export
            };
            if let Some(overlay) = overlay {
                // Its header stays as it was made: another image may have been on top then.
                let header = self
                    .world
                    .nodes
                    .get(overlay)
                    .and_then(|node| node.header.clone());
                after.cover(&old, overlay, header.unwrap_or_default());
                let data = json!({"node": device, "overlay": overlay});
                actions.push(("blockdev-snapshot", data));
                continue;
            }
            let name = self.name("n");
            let file = self.file(&format!("{name}.qcow2"))?;
            let mut made = node(&file, None, &header);
            made.by_snapshot = true;
            after.nodes.insert(name.clone(), made);
            after.cover(&old, &name, header);
            let key = if *device == old {
                "node-name"
            } else {
                "device"
            };
            let data = json!({key: device, "snapshot-file": file, "snapshot-node-name": name,
                "format": "qcow2"});
            actions.push(("blockdev-snapshot-sync", data));
        }
        if let [(command, data)] = actions.as_slice() {
            return Ok((command, data.clone()));
        }
        let actions = actions
            .iter()
            .map(|(kind, data)| json!({"type": kind, "data": data}));
        Ok((
            "transaction",
            json!({"actions": actions.collect::<Vec<_>>()}),
        ))
    }

    fn job(&mut self, after: &mut World, step: &Step) -> Res<(&'static str, Value)> {
        let id = self.name("j");
        let speed = match self.rng.one_in(2) {
            true => 0,
            false => self.rng.between(1, 16) << 20,
        };
        let mut arguments = json!({"job-id": id, "speed": speed});
        let (command, work, nodes) = match step {
            Step::Stream {
                export,
                target,
                base,
            } => {
                arguments["device"] = json!(target);
                if let Some(base) = base {
                    arguments["base-node"] = json!(base);
                }
                let chain = self.world.chain(&self.top(export)?).into_iter();
                let from = chain.skip_while(|name| name != target);
                let nodes = from.take_while(|name| Some(name) != base.as_ref());
                let work = Work::Stream {
                    target: target.clone(),
                    base: base.clone(),
                };
                ("block-stream", work, nodes.collect::<Vec<_>>())
            }
            Step::Commit { export, top, base } => {
                arguments["device"] = json!(self.top(export)?);
                arguments["top-node"] = json!(top);
                arguments["base-node"] = json!(base);
                let chain = self.world.chain(&self.top(export)?);
                let at = chain.iter().position(|name| name == top).unwrap_or(0);
                let end = chain.iter().position(|name| name == base).unwrap_or(at);
                let above = at.checked_sub(1).and_then(|at| chain.get(at));
                let above = above.ok_or("nothing over the layers")?.clone();
                let nodes = chain.get(at - 1..=end).unwrap_or_default().to_vec();
                let (top, base) = (top.clone(), base.clone());
                ("block-commit", Work::Commit { above, top, base }, nodes)
            }
            Step::Active { export, base } => {
                let top = self.top(export)?;
                arguments["device"] = json!(top);
                arguments["base-node"] = json!(base);
                let chain = self.world.chain(&top);
                let end = chain.iter().position(|name| name == base).unwrap_or(0);
                let nodes = chain.get(..=end).unwrap_or_default().to_vec();
                let work = Work::Active {
                    top,
                    base: base.clone(),
                    completing: false,
                };
                ("block-commit", work, nodes)
            }
            _ => return Err("no job".into()),
        };
        let paused = false;
        after.jobs.insert(
            id,
            Job {
                work,
                nodes,
                paused,
            },
        );
        Ok((command, arguments))
    }

    /// The options of `above` with another node under it.
    fn reopen(
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

    /// An empty image goes under `above`: two commands.
    pub fn insert(&mut self, above: &str) -> Res<()> {
        let below = self
            .world
            .nodes
            .get(above)
            .and_then(|node| node.backing.clone());
        let below = below.ok_or("nothing under it")?;
        let (name, file, header) = self.new_image_over(&self.file_of(&below)?)?;
        let options = world::options(&name, &file, Some(&below));
        self.get("blockdev-add", options)?;
        let mut new = node(&file, Some(&below), &header);
        new.empty = true;
        self.world.nodes.insert(name.clone(), new);
        let mut after = self.world.clone();
        let (command, arguments) = self.reopen(&mut after, above, Some(name))?;
        self.get(command, arguments)?;
        self.world = after;
        Ok(())
    }

    /// An image that `blockdev-create` makes, and its node.
    pub fn add_by_jobs(&mut self, export: &str) -> Res<()> {
        let below = self.file_of(&self.top(export)?)?;
        let name = self.name("n");
        let file = self.file(&format!("{name}.qcow2"))?;
        let made = json!({"driver": "file", "filename": file, "size": 0});
        self.create(made)?;
        let (of, path) = (format!("{name}f"), file.clone());
        let under = json!({"driver": "file", "node-name": of, "filename": path});
        self.get("blockdev-add", under)?;
        let made = json!({"driver": "qcow2", "file": of, "size": DISK, "backing-file": below,
            "backing-fmt": "qcow2", "cluster-size": 65536});
        self.create(made)?;
        self.get("blockdev-del", json!({"node-name": of}))?;
        self.get("blockdev-add", world::options(&name, &file, None))?;
        self.world.nodes.insert(name, node(&file, None, &below));
        Ok(())
    }

    fn create(&mut self, options: Value) -> Res<()> {
        let id = self.name("j");
        self.get("blockdev-create", json!({"job-id": id, "options": options}))?;
        self.until("blockdev-create does not end", |scene| {
            Ok(scene.job_status(&id)?.as_deref() == Some("concluded"))
        })?;
        let jobs = self.get("query-jobs", json!({}))?;
        let mut jobs = jobs.as_array().into_iter().flatten();
        if let Some(job) = jobs.find(|job| job["id"] == *id && !job["error"].is_null()) {
            return Err(format!("blockdev-create fails: {job}").into());
        }
        self.get("job-dismiss", json!({"id": id}))?;
        Ok(())
    }

    /// A command that is refused, and what it is about.
    pub fn refusal(&mut self, kind: u64) -> Res<(&'static str, Value)> {
        let exports = self.world.exports.clone();
        let export = exports.keys().next().ok_or("no export")?.clone();
        let top = self.top(&export)?;
        let file = self.file_of(&top)?;
        let new = self.file("never.qcow2")?;
        let sync = |node: &str| {
            json!({"node-name": node, "snapshot-file": new, "snapshot-node-name": "never",
                "format": "qcow2"})
        };
        let action = |kind: &str, data: Value| json!({"type": kind, "data": data});
        Ok(match kind {
            0 => ("blockdev-add", world::options(&top, &new, None)),
            1 => ("blockdev-add", world::options("never", &new, Some(&top))),
            2 => ("blockdev-del", json!({"node-name": top})),
            3 => {
                let actions = [
                    action("blockdev-snapshot-sync", sync(&top)),
                    action("abort", json!({})),
                ];
                ("transaction", json!({"actions": actions}))
            }
            4 => {
                let other = sync("nowhere");
                let actions = [
                    action("blockdev-snapshot-sync", sync(&top)),
                    action("blockdev-snapshot-sync", other),
                ];
                ("transaction", json!({"actions": actions}))
            }
            5 => {
                let mut taken = sync(&top);
                taken["snapshot-file"] = json!(file);
                ("blockdev-snapshot-sync", taken)
            }
            6 => (
                "block-stream",
                json!({"device": top, "job-id": "never", "base-node": "nowhere"}),
            ),
            7 => (
                "block-commit",
                json!({"device": top, "job-id": "never", "base-node": top}),
            ),
            8 => {
                let mut twice = self.export_options(&export, &top)?;
                twice["id"] = json!("never");
                twice["writable"] = json!(false);
                match self.down.contains(&export) {
                    true => ("object-del", json!({"id": "never"})),
                    false => ("block-export-add", twice),
                }
            }
            9 => {
                let mut options = world::options(&top, &new, None);
                options["backing"] =
                    json!(self.world.nodes.get(&top).and_then(|n| n.backing.clone()));
                ("blockdev-reopen", json!({"options": [options]}))
            }
            _ => (
                "change-backing-file",
                json!({"device": top, "image-node-name": "nowhere", "backing-file": new}),
            ),
        })
    }
}

/// How many kinds of refused commands there are.
pub const REFUSALS: u64 = 11;

fn node(file: &str, backing: Option<&str>, header: &str) -> Node {
    Node {
        file: file.to_owned(),
        backing: backing.map(str::to_owned),
        header: Some(header.to_owned()),
        empty: false,
        left: false,
        covered: false,
        by_snapshot: false,
    }
}
