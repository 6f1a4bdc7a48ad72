//! From reading to writing and back: what an export or a job that writes asks for.
//!
//! The writer's locks are taken first, then the image is opened anew, and only then is anything
//! written to it. A file that was opened to be read gets a second descriptor for that, under the
//! locks of the first.

use std::path::Path;
use std::sync::Arc;

use super::open::text;
use super::{Graph, Node};
use crate::chain::Layer;
use crate::error::{Error, Result};
use crate::format::{Format, Qcow2};
use crate::options::Driver;
use crate::storage::{Access, Storage, Window};

impl Graph {
    /// Makes a node's image ready to be written: takes the writer's locks and opens it anew.
    ///
    /// # Errors
    /// When the node is read-only, somebody else uses the image, or its state forbids it.
    pub async fn make_writable(&self, name: &str) -> Result<()> {
        self.check_write(name)?;
        let node = self.image_node(name)?;
        // A filter may be read-only too.
        if node.fixed_read_only || self.node(name)?.fixed_read_only {
            return Err(Error::Invalid("Block node is read-only".into()));
        }
        if !node.layer.read_only {
            return Ok(());
        }
        let (format, storage) = match &node.layer.format {
            Format::Raw(raw) => {
                let storage = self.writable_bytes(&node.name).await?;
                (storage.set_access(Access::Write).await.map_err(text))
                    .map_err(|error| self.explain(error, &node))?;
                (Format::Raw(*raw), storage)
            }
            Format::Qcow2(image) => {
                let image = (self.reopen_qcow2(&node, image).await)
                    .map_err(|error| self.explain(error, &node))?;
                let image = Arc::new(image);
                let storage = image.data_storage().clone();
                (Format::Qcow2(image), storage)
            }
            Format::Qed(_) => {
                return Err(Error::unsupported(
                    node.layer.storage.name(),
                    "QED images are only read: stream or convert it into a qcow2 image",
                ));
            }
        };
        let layer = Layer {
            format,
            storage,
            read_only: false,
            ..(*node.layer).clone()
        };
        self.replace_layer(&node.name, Arc::new(layer))
    }

    /// Opens an image anew, to write it. When that fails, others may go on reading it.
    async fn reopen_qcow2(&self, node: &Node, image: &Qcow2) -> Result<Qcow2> {
        let writable = async |storage: &Arc<dyn Storage>, below: &Option<String>| match below {
            Some(below) if !storage.writable() => self.writable_bytes(below).await,
            _ => Ok(storage.clone()),
        };
        let storage = writable(image.storage(), &node.file).await?;
        let data = match &node.data_file {
            Some(_) => Some(writable(image.data_storage(), &node.data_file).await?),
            None => None,
        };
        let files: Vec<_> = [&storage].into_iter().chain(&data).cloned().collect();
        let opened = async {
            for file in &files {
                file.set_access(Access::Write).await.map_err(text)?;
            }
            Qcow2::open_with_data(storage, data, self.image_options(&node.options, true)).await
        }
        .await
        .map(|opened| opened.in_place_of(image));
        if opened.is_err() {
            for file in &files {
                let _ = self.lower(node, file).await;
            }
        }
        opened
    }

    /// The bytes of a node without a format of its own, open for writing: those of the file at the
    /// bottom, through the same windows.
    async fn writable_bytes(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let node = self.node(name)?;
        if node.fixed_read_only {
            return Err(Error::Invalid(format!("Block node '{name}' is read-only")));
        }
        if node.layer.storage.writable() {
            return Ok(node.layer.storage.clone());
        }
        match (&node.options.driver, &node.file) {
            (Driver::Raw(raw), Some(file)) => {
                let bytes = Box::pin(self.writable_bytes(file)).await?;
                Window::of(bytes, raw.offset, raw.size).await
            }
            (_, Some(file)) => Box::pin(self.writable_bytes(file)).await,
            (_, None) => node.layer.storage.open_writable().await.map_err(text),
        }
    }

    /// Names the other node, where it is one of this process that stands in the way.
    fn explain(&self, error: Error, node: &Node) -> Error {
        let Error::Busy(text) = error else {
            return error;
        };
        let is_other = |other: &Node| {
            other.name != node.name
                && other.file.is_some()
                && other.file != node.file
                && same_file(&other.filename, &node.filename)
        };
        match self.nodes().iter().find(|other| is_other(other)) {
            Some(other) => Error::Busy(format!(
                "Could not open '{}': Failed to get \"write\" lock: node '{}' reads it, too",
                node.filename.display(),
                other.name
            )),
            None => Error::Busy(text),
        }
    }

    /// Gives a node's image back to its readers, since nobody writes it any longer.
    ///
    /// # Errors
    /// When what was written cannot be made stable; it stays writable then.
    pub async fn make_read_only(&self, name: &str) -> Result<()> {
        let node = self.image_node(name)?;
        if node.layer.read_only {
            return Ok(());
        }
        // Before it is closed: a guest that only reads may write, too, by copy-on-read.
        let layer = Layer {
            read_only: true,
            ..(*node.layer).clone()
        };
        self.replace_layer(&node.name, Arc::new(layer))?;
        let closed = match &node.layer.format {
            Format::Raw(_) => node.layer.flush().await,
            Format::Qcow2(qcow2) => qcow2.close().await,
            Format::Qed(_) => Ok(()),
        };
        if let Err(error) = closed {
            self.replace_layer(&node.name, node.layer.clone())?;
            return Err(error);
        }
        if let Format::Qcow2(image) = &node.layer.format {
            self.lower(&node, image.storage()).await?;
        }
        self.lower(&node, &node.layer.storage).await
    }

    /// Lets other programs read what a node is in, unless another node goes on writing through the
    /// same descriptor: windows of one file share it.
    async fn lower(&self, node: &Node, storage: &Arc<dyn Storage>) -> Result<()> {
        let bottom = self.bottom(node)?;
        for other in self.nodes() {
            let writes = !other.layer.read_only && other.driver != "copy-on-read";
            if writes && other.name != node.name && self.bottom(&other)? == bottom {
                return Ok(());
            }
        }
        storage.set_access(reading(node)).await.map_err(text)
    }

    /// The node at the bottom of a node's file children.
    pub(super) fn bottom(&self, node: &Node) -> Result<String> {
        let mut node = node.clone();
        while let Some(file) = &node.file {
            node = self.node(file)?;
        }
        Ok(node.name)
    }
}

/// What a node asks of others while it is not written.
fn reading(node: &Node) -> Access {
    match node.options.force_share {
        true => Access::ReadShared,
        false => Access::Read,
    }
}

fn same_file(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;

    let id = |path: &Path| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.dev(), found.ino()))
    };
    id(one).is_some() && id(one) == id(other)
}
