//! `qcow2`: QEMU's images, with backing and data files.

use std::sync::Arc;

use futures_util::future::LocalBoxFuture;

use super::image;
use crate::chain::Layer;
use crate::error::{Error, Result};
use crate::format::qcow2::soundness::Reporter;
use crate::format::{Format, Qcow2, qcow2};
use crate::graph::below::file_named;
use crate::graph::descent::Descent;
use crate::graph::driver::Driver;
use crate::graph::opening::{OpenNode, Opened, Opening, text};
use crate::graph::{Graph, Node, Role};
use crate::options::{BackingRef, BlockRef, BlockdevOptions, Discard, Qcow2Options};
use crate::storage::{Access, Storage};

impl Driver for Qcow2Options {
    fn backing(&self) -> Option<&BackingRef> {
        Some(&self.backing)
    }

    fn has_own_data_file(&self) -> bool {
        self.data_file.is_some()
    }
}

impl OpenNode for Qcow2Options {
    fn open<'a>(
        &'a self,
        opening: &'a Opening<'_>,
        name: &'a str,
        options: &'a BlockdevOptions,
        descent: &'a mut Descent,
    ) -> LocalBoxFuture<'a, Result<Node>> {
        Box::pin(self.open_image(opening, name, options, descent))
    }

    fn reopen<'a>(
        &'a self,
        graph: &'a Graph,
        node: &'a Node,
    ) -> LocalBoxFuture<'a, Result<Opened>> {
        Box::pin(self.reopen_image(graph, node))
    }
}

impl Qcow2Options {
    async fn open_image(
        &self,
        opening: &Opening<'_>,
        name: &str,
        options: &BlockdevOptions,
        descent: &mut Descent,
    ) -> Result<Node> {
        let file = opening.open_whole(&self.file, descent).await?;
        let file = opening.node(&file)?;
        let bytes = opening.bytes(&file)?;
        let header = qcow2::read_header(&*bytes).await?;
        let data_file = match (&self.data_file, &header.data_file) {
            (Some(node), _) => Some(opening.open_whole(node, descent).await?),
            (None, Some(name)) => {
                let path = file_named(&file.filename, name, "data file")?;
                let node = BlockRef::Inline(Box::new(options.child_file(&path)));
                let opened = opening.open_whole(&node, descent).await;
                Some(opened.map_err(|error| match error {
                    Error::Busy(text) => Error::Busy(format!("Could not open data file: {text}")),
                    other => Error::Invalid(format!("Could not open data file: {other}")),
                })?)
            }
            (None, None) => None,
        };
        let data = match &data_file {
            Some(node) => Some(opening.bytes(&*opening.node(node)?)?),
            None => None,
        };
        let named = header.backing.clone();
        let how = self.how(opening.graph(), name, options, false);
        // Together, so that the tables of all layers are on their way at once: a long chain opens
        // in the time of its headers.
        let (opened, backing) = futures_util::join!(
            Qcow2::open_parsed(bytes, data, header, how),
            opening.open_below(options, &file, &self.backing, named, descent),
        );
        let (opened, backing) = (opened?, backing?);
        let storage = opened.data_storage().clone();
        let format = Format::Qcow2(Arc::new(opened));
        let node = image(name, options, (format, storage), &file);
        let layer = Layer {
            copy_on_read: self.copy_on_read,
            ..(*node.layer).clone()
        };
        let node = Node {
            layer: Arc::new(layer),
            ..node
        };
        Ok(node
            .over(Role::DataFile, data_file.as_deref())
            .over(Role::Backing, backing.as_deref()))
    }

    async fn reopen_image(&self, graph: &Graph, node: &Node) -> Result<Opened> {
        let Format::Qcow2(image) = &node.layer.format else {
            return Err(Error::Invalid(format!(
                "node '{}' has no qcow2 image",
                node.name
            )));
        };
        let writable = async |storage: &Arc<dyn Storage>, below: Option<&str>| match below {
            Some(below) if !storage.writable() => graph.writable_bytes(below).await,
            _ => Ok(storage.clone()),
        };
        let storage = writable(image.storage(), node.file()).await?;
        let data = match node.child(Role::DataFile) {
            Some(data) => Some(writable(image.data_storage(), Some(data)).await?),
            None => None,
        };
        let files: Vec<_> = [&storage].into_iter().chain(&data).cloned().collect();
        let opened = async {
            for file in &files {
                file.set_access(Access::Write).await.map_err(text)?;
            }
            Qcow2::open_with_data(
                storage,
                data,
                self.how(graph, &node.name, &node.options, true),
            )
            .await
        }
        .await
        .map(|opened| opened.in_place_of(image));
        if opened.is_err() {
            for file in &files {
                let _ = graph.lower(node, file).await;
            }
        }
        let opened = Arc::new(opened?);
        let storage = opened.data_storage().clone();
        Ok((Format::Qcow2(opened), storage))
    }

    /// How the image of node `name` with `options` is opened.
    fn how(
        &self,
        graph: &Graph,
        name: &str,
        options: &BlockdevOptions,
        writable: bool,
    ) -> qcow2::Options {
        let cache_bytes = self.l2_cache_size.or(self.cache_size);
        qcow2::Options {
            writable,
            discard: self
                .pass_discard_request
                .unwrap_or(options.discard == Discard::Unmap),
            cache_bytes: cache_bytes.unwrap_or(qcow2::DEFAULT_CACHE_BYTES),
            // Who reads what others may be writing has been told that it may be out of date.
            ignore_journal: options.force_share,
            journal: graph.journal(),
            reporter: Some(Reporter {
                node: name.into(),
                reports: graph.reports(),
            }),
            ..qcow2::Options::default()
        }
    }
}
