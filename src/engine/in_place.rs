//! The options of a node with the nodes that it refers to written in place, so that another process
//! opens the same.

use crate::graph::{Node, Role, State};
use crate::options::{BackingRef, BlockRef, BlockdevOptions, Driver};

/// Nodes that nobody asked for by name: the names that they have now the next process may give to
/// others.
pub(super) fn unnamed(node: &Node) -> bool {
    node.implicit
}

/// The options, in which nodes that are referred to by name and `are_meant` are written in place.
pub(super) fn in_place(
    state: &State,
    options: &BlockdevOptions,
    are_meant: fn(&Node) -> bool,
) -> BlockdevOptions {
    let mut options = options.clone();
    options.node_name = options.node_name.filter(|name| !name.starts_with('#'));
    for child in options.driver.children_mut() {
        let inner = match &*child {
            BlockRef::Inline(inner) => in_place(state, inner, are_meant),
            BlockRef::Name(name) => match state.node(name) {
                Ok(node) if are_meant(node) => in_place(state, &with_backing(node), are_meant),
                _ => continue,
            },
        };
        *child = BlockRef::Inline(Box::new(inner));
    }
    options
}

/// The options of a node, with what lies under it since it was put there.
fn with_backing(node: &Node) -> BlockdevOptions {
    let mut options = node.options.clone();
    let backing = match &mut options.driver {
        Driver::Qcow2(qcow2) => &mut qcow2.backing,
        Driver::Qed(qed) => &mut qed.backing,
        _ => return options,
    };
    if let (BackingRef::None, Some(below)) = (&*backing, node.child(Role::Backing)) {
        *backing = BackingRef::Node(BlockRef::Name(below.to_owned()));
    }
    options
}
