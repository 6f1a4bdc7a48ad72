//! Snapshots and jobs: which command it is, and what is different afterwards.

use serde_json::{Value, json};

use crate::common::Res;
use crate::new_images::node;
use crate::scene::Scene;
use crate::steps::Step;
use crate::world::{Job, Work, World};

impl Scene {
    /// New tops for the disks of exports.
    pub fn snapshot(
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
            let made = node(&file, None, &header, self.size_of(export)?);
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

    /// A job.
    pub fn job(&mut self, after: &mut World, step: &Step) -> Res<(&'static str, Value)> {
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
}
