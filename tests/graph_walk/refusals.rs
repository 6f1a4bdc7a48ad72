//! Commands that are refused.

use serde_json::{Value, json};

use crate::common::Res;
use crate::scene::Scene;
use crate::world;

/// How many kinds of refused commands there are.
pub const REFUSALS: u64 = 11;
/// The one that is refused whatever there is.
const NO_DISK: u64 = 6;

impl Scene {
    /// A command that is refused, by the number of its kind, and what it is about.
    pub fn refusal(&mut self, kind: u64) -> Res<(&'static str, Value)> {
        let mut exports = self.world.exports.keys();
        // Without its export nothing is in the way of what is asked of a disk.
        let served = exports.clone().find(|id| !self.down.contains(*id));
        let kind = served.map_or(NO_DISK, |_| kind % REFUSALS);
        let export = served.or(exports.next()).ok_or("no export")?.clone();
        let top = self.top(&export)?;
        let file = self.file_of(&top)?;
        // A power cut may bring back one that was removed.
        let new = self.name("never");
        let new = self.file(&format!("{new}.qcow2"))?;
        let sync = |node: &str| {
            json!({"node-name": node, "snapshot-file": new, "snapshot-node-name": "never",
                "format": "qcow2"})
        };
        let action = |kind: &str, data: Value| json!({"type": kind, "data": data});
        Ok(match kind {
            0 => ("blockdev-add", world::options(&top, &new, None)),
            1 => ("blockdev-add", world::options("never", &new, Some(&top))),
            // Nobody has the top of one that was removed.
            2 if self.down.contains(&export) => ("object-del", json!({"id": "never"})),
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
                ("block-export-add", twice)
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
