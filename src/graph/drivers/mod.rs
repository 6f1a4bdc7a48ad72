//! The drivers of nodes: what each needs, and what it opens.
//!
//! A new one is a file here, which implements [`Driver`] for its options, and a line in [`of`].

mod copy_on_read;
mod file;
mod probed;
mod qcow2;
mod qed;
mod raw;

use std::fmt::Debug;
use std::future::ready;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::LocalBoxFuture;
use serde_json::{Map, Value};

use super::Graph;
use super::descent::{Descent, Extent};
use super::edges::{Demand, Role};
use super::nodes::Node;
use super::opening::Opening;
use crate::chain::Layer;
use crate::error::Result;
use crate::format::Format;
use crate::options::{self, BackingRef, BlockdevOptions, Discard};
use crate::storage::Storage;

/// The driver of a node with these options.
pub(super) fn of(options: &options::Driver) -> &dyn Driver {
    match options {
        options::Driver::File(file) | options::Driver::HostDevice(file) => file,
        options::Driver::Raw(raw) => raw,
        options::Driver::Qcow2(qcow2) => &**qcow2,
        options::Driver::Qed(qed) => qed,
        options::Driver::CopyOnRead(filter) => filter,
        options::Driver::Auto(probed) => probed,
    }
}

/// An image that is open, to be written.
pub(super) type Opened = (Format, Arc<dyn Storage>);

/// A node's driver, with the options that only it has.
pub(super) trait Driver: Debug {
    /// Opens node `name` with `options`, and nodes under it that are not open yet.
    fn open<'a>(
        &'a self,
        opening: &'a Opening<'_>,
        name: &'a str,
        options: &'a BlockdevOptions,
        descent: &'a mut Descent,
    ) -> LocalBoxFuture<'a, Result<Node>>;

    /// Opens the image of `node` anew, to write it. When that fails, others may go on reading it.
    fn reopen<'a>(&'a self, graph: &'a Graph, node: &'a Node)
    -> LocalBoxFuture<'a, Result<Opened>>;

    /// What a filter changes in the layer of what it filters; `None`: it is none.
    fn attribute(&self) -> Option<fn(&mut Layer)> {
        None
    }

    /// What a node demands of its child in this role, of which `own` is demanded in all.
    fn demand(&self, own: Demand, role: Role) -> Demand {
        Demand::of_image(own, role)
    }

    /// Where its bytes are, if it opens a file.
    fn path(&self) -> Option<&Path> {
        None
    }

    /// What is to lie under it, if anything can.
    fn backing(&self) -> Option<&BackingRef> {
        None
    }

    /// Whether the options, and not a header, say what its data file is.
    fn has_own_data_file(&self) -> bool {
        false
    }

    /// Adds its own options to a node's description, where they say which bytes it has.
    fn describe(&self, _options: &mut Map<String, Value>) {}

    /// The part of its file that is behind its own part `of`.
    fn behind(&self, of: &Extent) -> Extent {
        of.clone()
    }

    /// Its own bytes, where `file` has those of the node under it.
    ///
    /// # Errors
    /// When they are not within those.
    fn bytes_in(&self, file: Arc<dyn Storage>) -> LocalBoxFuture<'_, Result<Arc<dyn Storage>>> {
        Box::pin(ready(Ok(file)))
    }
}

/// The node for an image of `format`, laid out in `storage`, which are bytes of node `file`.
fn image(
    name: &str,
    options: &BlockdevOptions,
    (format, storage): (Format, Arc<dyn Storage>),
    file: &Node,
) -> Node {
    let layer = layer(name, options, (format, storage));
    Node::new(options.clone(), layer, file.filename.clone()).over(Role::File, Some(&file.name))
}

fn layer(
    name: &str,
    options: &BlockdevOptions,
    (format, storage): (Format, Arc<dyn Storage>),
) -> Layer {
    Layer {
        name: name.to_owned(),
        format,
        storage,
        read_only: true,
        discard: options.discard == Discard::Unmap,
        copy_on_read: false,
    }
}
