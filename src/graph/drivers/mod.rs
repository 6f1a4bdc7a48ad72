//! The drivers of nodes: what each needs, and what it opens.
//!
//! A new one is a file here, which implements [`Driver`](super::driver::Driver) and [`OpenNode`] for
//! its options, a line in [`of`], and one in [`driver::of`](super::driver::of).

mod blkdebug;
mod copy_on_read;
mod file;
mod null;
mod probed;
mod qcow2;
mod qed;
mod raw;

use std::sync::Arc;

use super::edges::Role;
use super::nodes::Node;
use super::opening::OpenNode;
use crate::chain::Layer;
use crate::format::Format;
use crate::options::{self, BlockdevOptions, Discard};
use crate::storage::Storage;

/// How a node with these options is opened.
pub(super) fn of(options: &options::Driver) -> &dyn OpenNode {
    match options {
        options::Driver::File(file) | options::Driver::HostDevice(file) => file,
        options::Driver::Raw(raw) => raw,
        options::Driver::Qcow2(qcow2) => &**qcow2,
        options::Driver::Qed(qed) => qed,
        options::Driver::CopyOnRead(filter) => filter,
        options::Driver::Blkdebug(blkdebug) => &**blkdebug,
        options::Driver::NullCo(null) | options::Driver::NullAio(null) => null,
        options::Driver::Auto(probed) => probed,
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
