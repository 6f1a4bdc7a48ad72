//! Images that steps make, by `qemu-img`, by `blockdev-create`, or under others.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::common::{Res, images};
use crate::scene::{CLUSTERS, Scene, make_stable};
use crate::world::{self, Node};

impl Scene {
    /// A new image over the top of an export's disk: name, file, and the file under it.
    pub fn new_image(&mut self, export: &str) -> Res<(String, String, String)> {
        let below = self.file_of(&self.top(export)?)?;
        let size = self.size_of(export)?;
        self.new_image_over(&below, size)
    }

    fn new_image_over(&mut self, below: &str, size: u64) -> Res<(String, String, String)> {
        let name = self.name("n");
        let file = self.file(&format!("{name}.qcow2"))?;
        let options = CLUSTERS[self.rng.below(CLUSTERS.len() as u64) as usize];
        let size = size.to_string();
        images::qemu_img(&[
            "create", "-q", "-f", "qcow2", "-o", options, "-u", "-b", below, "-F", "qcow2", &file,
            &size,
        ])?;
        make_stable(file.as_ref())?;
        Ok((name, file, below.to_owned()))
    }

    /// An empty image goes under `above`: two commands.
    pub fn insert(&mut self, above: &str) -> Res<()> {
        let below = self
            .world
            .nodes
            .get(above)
            .and_then(|node| node.backing.clone());
        let below = below.ok_or("nothing under it")?;
        // What lies below is seen through it, to its end.
        let size = self.still()?.size_of(&below);
        let (name, file, header) = self.new_image_over(&self.file_of(&below)?, size)?;
        let options = world::options(&name, &file, Some(&below));
        self.get("blockdev-add", options)?;
        let mut new = node(&file, Some(&below), &header, size);
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
        let size = self.size_of(export)?;
        let made = json!({"driver": "qcow2", "file": of, "size": size, "backing-file": below,
            "backing-fmt": "qcow2", "cluster-size": 65536});
        self.create(made)?;
        self.get("blockdev-del", json!({"node-name": of}))?;
        self.get("blockdev-add", world::options(&name, &file, None))?;
        self.world
            .nodes
            .insert(name, node(&file, None, &below, size));
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
}

/// A node of a new image.
pub fn node(file: &str, backing: Option<&str>, header: &str, size: u64) -> Node {
    Node {
        file: file.to_owned(),
        backing: backing.map(str::to_owned),
        header: Some(header.to_owned()),
        empty: false,
        left: false,
        size,
        snapshots: BTreeSet::new(),
    }
}
