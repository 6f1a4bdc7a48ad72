//! `copy-on-read`: a filter that copies into its child what it had to read from further below.

use futures_util::future::LocalBoxFuture;

use crate::chain::Layer;
use crate::error::Result;
use crate::graph::compile::filter;
use crate::graph::descent::Descent;
use crate::graph::driver::Driver;
use crate::graph::opening::{OpenNode, Opening};
use crate::graph::{Demand, Node, Rights, Role};
use crate::options::{BlockdevOptions, CopyOnReadOptions};

impl Driver for CopyOnReadOptions {
    /// Copies are written where the image is open for writing anyway.
    fn demand(&self, own: Demand, _role: Role) -> Demand {
        let does = own.does | Rights::WRITE_UNCHANGED;
        Demand { does, ..own }
    }

    fn attribute(&self) -> Option<fn(&mut Layer)> {
        Some(set)
    }
}

impl OpenNode for CopyOnReadOptions {
    fn open<'a>(
        &'a self,
        opening: &'a Opening<'_>,
        name: &'a str,
        options: &'a BlockdevOptions,
        descent: &'a mut Descent,
    ) -> LocalBoxFuture<'a, Result<Node>> {
        Box::pin(async move {
            let file = opening.open_ref(&self.file, descent).await?;
            let below = opening.node(&file)?;
            let layer = filter(name, set, &below.layer);
            let node = Node::new(options.clone(), layer, below.filename.clone());
            Ok(node.over(Role::Filtered, Some(&file)))
        })
    }
}

fn set(layer: &mut Layer) {
    layer.copy_on_read = true;
}
