//! `raw`: a disk byte for byte as its file is, or a window of it.

use std::sync::Arc;

use futures_util::future::LocalBoxFuture;
use serde_json::{Map, Value};

use super::image;
use crate::error::Result;
use crate::format::{Format, Raw};
use crate::graph::descent::Descent;
use crate::graph::driver::{Driver, Extent};
use crate::graph::opening::{OpenNode, Opened, Opening, storage_len, text};
use crate::graph::{Demand, Graph, Node, Rights, Role};
use crate::options::{BlockdevOptions, RawOptions};
use crate::storage::{Access, Storage, Window};

impl Driver for RawOptions {
    /// It only passes on bytes, and minds no changes of them; but a part of them has its place.
    fn demand(&self, own: Demand, _role: Role) -> Demand {
        match self.offset == 0 && self.size.is_none() {
            true => own,
            false => Demand {
                tolerates: own.tolerates - Rights::RESIZE,
                ..own
            },
        }
    }

    fn describe(&self, options: &mut Map<String, Value>) {
        options.insert("offset".into(), self.offset.into());
        options.extend(self.size.map(|size| ("size".into(), size.into())));
    }

    fn behind(&self, of: &Extent) -> Extent {
        let end = self
            .size
            .map_or(u64::MAX, |size| self.offset.saturating_add(size));
        let start = of.start.saturating_add(self.offset).min(end);
        start..of.end.saturating_add(self.offset).min(end)
    }
}

impl OpenNode for RawOptions {
    fn open<'a>(
        &'a self,
        opening: &'a Opening<'_>,
        name: &'a str,
        options: &'a BlockdevOptions,
        descent: &'a mut Descent,
    ) -> LocalBoxFuture<'a, Result<Node>> {
        Box::pin(async move {
            let part = descent.wanted.clone();
            descent.wanted = self.behind(&part);
            let file = opening.open_ref(&self.file, descent).await?;
            descent.wanted = part;
            let file = opening.node(&file)?;
            let storage = self.bytes_in(opening.bytes(&file)?).await?;
            // What a file's last sector lacks reads as zeros; a window has whole sectors.
            let size = storage_len(&*storage).await?.next_multiple_of(512);
            let format = Format::Raw(Raw::new(size));
            Ok(image(name, options, (format, storage), &file))
        })
    }

    fn reopen<'a>(
        &'a self,
        graph: &'a Graph,
        node: &'a Node,
    ) -> LocalBoxFuture<'a, Result<Opened>> {
        Box::pin(reopen(graph, node))
    }

    fn bytes_in(&self, file: Arc<dyn Storage>) -> LocalBoxFuture<'_, Result<Arc<dyn Storage>>> {
        Box::pin(Window::of(file, self.offset, self.size))
    }
}

/// Opens a disk without a format anew, to write it.
pub(super) async fn reopen(graph: &Graph, node: &Node) -> Result<Opened> {
    let storage = graph.bytes_to_write(node).await?;
    storage.set_access(Access::Write).await.map_err(text)?;
    Ok((node.layer.format.clone(), storage))
}
