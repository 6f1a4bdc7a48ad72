//! From the graph to what the data path sees: flat chains of layers.
//!
//! A filter is no layer of its own: it becomes an attribute of the layer that it is over, under
//! the filter's name. A window of a file is a storage of its own. What is laid out in the disk of
//! an image is in a storage over the image's chain ([`Backed`](crate::chain::Backed)), which the
//! opening makes.

use std::sync::Arc;

use super::nodes::{Node, State};
use crate::chain::{Chain, Layer};
use crate::error::Result;

/// The chain of the disk whose top is node `top`.
///
/// # Errors
/// When there is no such node.
pub(super) fn compile(state: &State, top: &str) -> Result<Chain> {
    let nodes = state.chain_nodes(top)?;
    let layer = |node: &&Arc<Node>| node.layer.clone();
    let closing = nodes.iter().skip(1).filter(|node| node.closing);
    let closing = closing.map(layer).collect();
    let layers = nodes.iter().map(layer).collect();
    let chain = Chain::with_tap(layers, state.tap(top).cloned())?.closing(closing);
    Ok(chain.watched(state.watch(top)))
}

/// The layer of filter `name`, which has `attribute`, over `layer`.
pub(super) fn filter(name: &str, attribute: fn(&mut Layer), layer: &Layer) -> Layer {
    let mut layer = Layer {
        name: name.to_owned(),
        ..layer.clone()
    };
    attribute(&mut layer);
    layer
}

impl State {
    /// Gives filters that are not in `old` the layers of the nodes under them, and those over
    /// layers that have changed since.
    pub(super) fn settle_filters(&mut self, old: &State) -> Result<()> {
        let filters = self.children_first().into_iter();
        let filters = filters.filter(|node| node.is_filter());
        let filters: Vec<_> = filters.map(|node| node.name.clone()).collect();
        for name in filters {
            let node = self.node(&name)?;
            let (Some(child), Some(attribute)) = (node.file(), node.driver().attribute()) else {
                continue;
            };
            let child = self.node(child)?;
            let is_old = old.node(&name).is_ok_and(|old| Arc::ptr_eq(old, node));
            let below = old.node(&child.name).map(|old| &old.layer);
            if is_old && below.is_ok_and(|layer| Arc::ptr_eq(layer, &child.layer)) {
                continue;
            }
            let layer = filter(&name, attribute, &child.layer);
            let filename = child.filename.clone();
            let node = self.node_mut(&name)?;
            node.layer = Arc::new(layer);
            node.filename = filename;
        }
        Ok(())
    }
}
