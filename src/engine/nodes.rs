//! Nodes that come and go while the daemon runs.
//!
//! A node is opened on the thread of who wants it; nobody sees it, and nobody waits, before it is
//! published. What is removed is closed by who removes it.

use std::path::Path;
use std::slice::from_ref;

use super::in_place::{in_place, unnamed};
use super::runtime::Change;
use super::stream::no_such_device;
use super::{Engine, on_this_thread, state};
use crate::error::Error;
use crate::graph::recorded::other_file;
use crate::graph::{Node, Recorded, State, Transaction};
use crate::job::Refused;
use crate::job::records::identity;
use crate::options::{BlockRef, BlockdevOptions};
use crate::state::record::are_different;
use crate::storage::{Syncs, is_same_path};

impl Engine {
    /// Opens a node with everything under it.
    ///
    /// # Errors
    /// In QEMU's words where it has some. No node is added then.
    pub fn add_node(&self, options: &BlockdevOptions) -> Result<(), Refused> {
        let name = options.node_name.as_deref().unwrap_or_default();
        self.check_names(options)?;
        let options = &self.without_filters(options);
        // What a stream has let go of need not be there; but this is asked for.
        let recorded = Recorded {
            released: Default::default(),
            ..state::recorded(self.store.as_ref())
        };
        let opened = on_this_thread(|reactor| {
            reactor.block_on(self.graph.open_unseen(from_ref(options), recorded))
        });
        let transaction = opened.map_err(refused)?;
        check_flushes(&transaction, &self.graph.state())?;
        let _changing = self.runtime.change();
        let released = self.graph.commit(transaction).map_err(refused)?;
        let options = &in_place(&self.graph.state(), options, unnamed);
        if let Err(error) = self.record(&[Change::AddNode(options)]) {
            // Only an export or a job can use it by now, and it stays for that.
            if let Err(left) = self.graph.remove(name) {
                log::error!("node '{name}', which is not recorded, stays: {left}");
            }
            return Err(error);
        }
        drop(released);
        Ok(())
    }

    /// Refuses a node that refers to one that is not there, or has the name of one that is: those
    /// written inside it first, as they are opened.
    fn check_names(&self, options: &BlockdevOptions) -> Result<(), Refused> {
        for (key, child) in options.children() {
            let found = match child {
                BlockRef::Inline(child) => self.check_names(child),
                BlockRef::Name(name) if self.graph.has_name(name) => Ok(()),
                BlockRef::Name(name) => Err(no_such_device(name, name)),
            };
            found.map_err(|Refused(text)| match key {
                "backing" => Refused(format!("Could not open backing file: {text}")),
                _ => Refused(text),
            })?;
        }
        match &options.node_name {
            Some(name) if self.graph.has_name(name) => Err(duplicate(name)),
            _ => Ok(()),
        }
    }

    /// Removes a node, and those under it that nobody asked for by name.
    ///
    /// # Errors
    /// In QEMU's words, what uses it. Nothing has changed then.
    pub fn remove_node(&self, name: &str) -> Result<(), Refused> {
        self.graph.check_removal(name).map_err(refused)?;
        let closed = on_this_thread(|reactor| reactor.block_on(self.graph.close_unwritten(name)));
        closed.map_err(refused)?;
        let _changing = self.runtime.change();
        self.graph.check_removal(name).map_err(refused)?;
        let before = self.graph.state();
        let mut transaction = self.graph.transaction();
        transaction.remove(name).map_err(refused)?;
        let released = self.graph.commit(transaction).map_err(refused)?;
        if let Err(error) = self.record(&[Change::RemoveNode(name)]) {
            self.put_back(&before);
            return Err(error);
        }
        // What is closed here may take its time, and so it is no part of the change.
        drop(_changing);
        drop((before, released));
        Ok(())
    }

    /// Has clients told, once, when a write to a node reaches past offset `at`; 0: no longer.
    ///
    /// # Errors
    /// When there is no such node, in QEMU's words.
    pub fn set_write_threshold(&self, node: &str, at: u64) -> Result<(), Refused> {
        self.check_no_filter(node)?;
        if self.graph.node(node).is_err() {
            return Err(Refused(format!("Device '{node}' not found")));
        }
        let listener = self.runtime.incidents.of_thresholds(&self.graph);
        let set = self.graph.set_threshold(node, at, listener);
        set.map(drop).map_err(refused)
    }

    /// Adds the nodes again that were there `before` and have been removed since.
    fn put_back(&self, before: &State) {
        let mut transaction = self.graph.transaction();
        let gone = before.nodes_children_first();
        let gone = gone.filter(|node| self.graph.node(&node.name).is_err());
        let added = gone
            .map(|node| transaction.add(Node::clone(node)))
            .collect::<crate::error::Result<Vec<()>>>();
        let result = added.and_then(|_| self.graph.commit(transaction));
        if let Err(error) = result {
            log::error!("nodes whose removal is not recorded are gone all the same: {error}");
        }
    }
}

/// Refuses images in files under the paths of others, of which failed flushes are recorded.
fn check_flushes(transaction: &Transaction, now: &State) -> Result<(), Refused> {
    let waiting = Syncs::waiting();
    let is_new = |node: &&std::sync::Arc<Node>| now.node(&node.name).is_err();
    for node in transaction.state().nodes().iter().filter(is_new) {
        for (failure, wanted) in &waiting {
            if are_different(identity(node), *wanted)
                && is_same_path(&node.filename, Path::new(&failure.file))
            {
                return Err(Refused(format!(
                    "{}, of which a failed flush is recorded (put that one back; or, when this \
                     one is known to be good: stratactl image clear-error '{}')",
                    other_file(&failure.file, identity(node), *wanted),
                    failure.file
                )));
            }
        }
    }
    Ok(())
}

fn duplicate(name: &str) -> Refused {
    Refused(format!("Duplicate nodes with node-name='{name}'"))
}

pub(super) fn refused(error: Error) -> Refused {
    Refused(error.to_string())
}
