//! The graph of nodes: names, files and backing links.

/// All nodes.
#[derive(Debug, Default)]
pub struct Graph {}
