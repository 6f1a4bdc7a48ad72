//! A new image on top of another one: what the guests of that one write goes there from then on.
//!
//! Disks and filters that had the old top have the new one afterwards. What refers to the old one for
//! another reason (a job that copies from it) goes on with it.

use std::sync::Arc;

use super::edges::Role;
use super::nodes::{Node, State};
use super::transaction::Transaction;
use super::{Graph, driver};
use crate::chain::Root;
use crate::error::{Error, Result};
use crate::format::{Format, Qcow2};

impl State {
    /// Refuses to put an image on top of node `old` which something is laid out in, or which lies
    /// under another image already.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn check_covered(&self, old: &str) -> Result<()> {
        for node in self.nodes() {
            let mut edges = node.edges.iter();
            let Some(edge) = edges.find(|edge| edge.child == old) else {
                continue;
            };
            let what = match edge.role {
                Role::Filtered => continue,
                Role::Backing => "backing hd",
                role => role.key(),
            };
            return Err(Error::Invalid(format!(
                "Node '{old}' is busy: node is used as {what} of '{}'",
                node.name
            )));
        }
        Ok(())
    }

    /// Refuses an image that cannot be put on top of another one.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn check_overlay(&self, overlay: &str) -> Result<()> {
        let node = self.node(overlay)?;
        let mut roots = self.roots.iter();
        let in_use = || Err(Error::Invalid("The overlay is already in use".into()));
        if roots.any(|(root, top)| top == overlay && root.strong_count() > 0) {
            return in_use();
        }
        if node.child(Role::Backing).is_some() {
            return Err(Error::Invalid(
                "The overlay already has a backing image".into(),
            ));
        }
        if driver::of(&node.options.driver).backing().is_none() || node.is_filter() {
            return Err(Error::Invalid(
                "The overlay does not support backing images".into(),
            ));
        }
        if self.over(overlay).is_some() {
            return in_use();
        }
        Ok(())
    }

    /// The images that are above the image of node `old` in the chain of node `top`.
    ///
    /// # Errors
    /// When a node does not exist.
    pub fn images_above(&self, top: &str, old: &str) -> Result<Vec<Arc<Qcow2>>> {
        let old = self.image_node(old)?.clone();
        let mut images = Vec::new();
        let mut next = Some(self.image_node(top)?);
        while let Some(node) = next.filter(|node| node.name != old.name) {
            if let Format::Qcow2(image) = &node.layer.format {
                images.push(image.clone());
            }
            let below = node.child(Role::Backing);
            next = below.map(|name| self.image_node(name)).transpose()?;
        }
        Ok(images)
    }
}

impl Transaction {
    /// Puts node `overlay` on top of node `old`: filters of that one, and those of `disks` whose top
    /// it is, have the overlay from then on.
    ///
    /// # Errors
    /// When a node does not exist, or would be under itself.
    pub fn cover(&mut self, old: &str, overlay: &str, disks: &[Arc<Root>]) -> Result<()> {
        let is_filter_of = |node: &&Arc<Node>| node.child(Role::Filtered) == Some(old);
        let filters = self.state().nodes().iter().filter(is_filter_of);
        let filters: Vec<_> = filters.map(|node| node.name.clone()).collect();
        self.set_child(overlay, Role::Backing, Some(old))?;
        for filter in filters {
            self.set_child(&filter, Role::Filtered, Some(overlay))?;
        }
        for disk in disks {
            if self.state().top_of(disk) == Some(old) {
                self.set_top(disk, overlay)?;
            }
        }
        Ok(())
    }
}

impl Graph {
    /// As [`State::check_overlay`], now; nobody has been granted anything on the image either.
    ///
    /// # Errors
    /// As there.
    pub fn check_overlay(&self, overlay: &str) -> Result<()> {
        if self.node(overlay).is_ok() && self.is_granted(overlay) {
            return Err(Error::Invalid("The overlay is already in use".into()));
        }
        self.state().check_overlay(overlay)
    }
}
