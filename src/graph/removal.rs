//! Nodes that go at a client's word, and what stands in the way.

use super::transaction::in_use;
use super::{Graph, Role};
use crate::error::{Error, Result};

impl Graph {
    /// Whether node `name` may go as far as is known now, in QEMU's words and order: a guest or a
    /// job has it, it supplies what another one lacks, nobody asked for it by name, or another one is
    /// laid out in it.
    ///
    /// # Errors
    /// Why it may not.
    pub fn check_removal(&self, name: &str) -> Result<()> {
        let refuse = |text: String| Err(Error::Invalid(text));
        if let Some(filter) = self.filter(name) {
            return refuse(match &filter.overlay {
                Some(overlay) => filter.is_backing_of(overlay),
                None => format!("Node {name} is in use"),
            });
        }
        let state = self.state();
        let Ok(node) = state.node(name) else {
            return refuse(format!("Failed to find node with node-name='{name}'"));
        };
        if let Some(text) = self.user_of(name) {
            return refuse(text);
        }
        let mut above = state.all_over(name);
        if let Some((above, role)) = above.find(|(_, role)| *role == Role::Backing) {
            return Err(in_use(name, above, role));
        }
        if node.implicit {
            return refuse(format!("Node {name} is not owned by the monitor"));
        }
        match state.over(name) {
            Some(_) => refuse(format!("Block device {name} is in use")),
            None => Ok(()),
        }
    }

    /// Closes the images of `name` and of all under it that are open to be written and that nobody
    /// writes: a job or an export that could not make them stable has left them so.
    ///
    /// # Errors
    /// When what was written cannot be made stable.
    pub async fn close_unwritten(&self, name: &str) -> Result<()> {
        // By name: a state that is held while storage is waited for keeps the files of all nodes open.
        let names = self.state().below(vec![name.to_owned()]);
        for name in names {
            if !self.node(&name)?.layer.read_only {
                self.lower_unwritten(&name).await?;
            }
        }
        Ok(())
    }
}
