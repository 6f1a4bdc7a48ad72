//! `qed`: QEMU's enhanced disk, which is only read.

use std::future::ready;
use std::sync::Arc;

use futures_util::future::LocalBoxFuture;

use super::image;
use crate::error::{Error, Result};
use crate::format::{Format, Qed};
use crate::graph::descent::Descent;
use crate::graph::driver::Driver;
use crate::graph::opening::{OpenNode, Opened, Opening};
use crate::graph::{Graph, Node, Role};
use crate::options::{BackingRef, BlockdevOptions, QedOptions};

impl Driver for QedOptions {
    fn backing(&self) -> Option<&BackingRef> {
        Some(&self.backing)
    }
}

impl OpenNode for QedOptions {
    fn open<'a>(
        &'a self,
        opening: &'a Opening<'_>,
        name: &'a str,
        options: &'a BlockdevOptions,
        descent: &'a mut Descent,
    ) -> LocalBoxFuture<'a, Result<Node>> {
        Box::pin(async move {
            let file = opening.open_whole(&self.file, descent).await?;
            let file = opening.node(&file)?;
            let storage = opening.bytes(&file)?;
            let opened = Qed::open(storage.clone()).await?;
            let named = opened.backing().cloned();
            let backing = opening
                .open_below(options, &file, &self.backing, named, descent)
                .await?;
            let format = Format::Qed(Arc::new(opened));
            let node = image(name, options, (format, storage), &file);
            Ok(node.over(Role::Backing, backing.as_deref()))
        })
    }

    fn reopen<'a>(
        &'a self,
        _graph: &'a Graph,
        node: &'a Node,
    ) -> LocalBoxFuture<'a, Result<Opened>> {
        Box::pin(ready(Err(Error::unsupported(
            node.layer.storage.name(),
            "QED images are only read: stream or convert it into a qcow2 image",
        ))))
    }
}
