//! The create job: makes an image, as `blockdev-create` wants it.
//!
//! Everything that can fail fails in the job. A file that was not there before goes again then; an
//! image that could not be made is in a file without a header. The node that an image is made in
//! is written under a grant, so that nobody loses what is in use.

use std::sync::Arc;

use futures_util::future::LocalBoxFuture;

use super::{Body, JobContext, JobError};
use crate::chain::Layer;
use crate::chain::resize::preallocate_raw;
use crate::error::{Action, Error, Result};
use crate::format::qcow2::create::{CreateOptions, create};
use crate::format::qcow2::header::{Backing, Compression};
use crate::format::qcow2::{self, Preallocation, Qcow2};
use crate::format::{Format, Raw};
use crate::graph::{Demand, Graph, Holder, Request, Rights};
use crate::options::{Allocate, BlockRef, ImageOptions, NewFileOptions, NewQcow2Options};
use crate::storage::NewFile;

/// The body of a create job.
pub struct Create {
    graph: Arc<Graph>,
    options: ImageOptions,
}

impl Create {
    /// Makes the image that `options` describe.
    #[must_use]
    pub fn new(graph: Arc<Graph>, options: ImageOptions) -> Self {
        Self { graph, options }
    }
}

impl Body for Create {
    fn run<'a>(
        &'a mut self,
        context: &'a JobContext,
    ) -> LocalBoxFuture<'a, std::result::Result<(), JobError>> {
        Box::pin(async move {
            let made = match &self.options {
                ImageOptions::File(options) => make_file(options).await,
                ImageOptions::Qcow2(options) => self.make_qcow2(options).await,
            };
            // As in QEMU, whatever has come of it.
            context.advance(1);
            made.map_err(|error| JobError::new(error.to_string()))
        })
    }

    fn commit<'a>(
        &'a mut self,
        _context: &'a JobContext,
    ) -> LocalBoxFuture<'a, std::result::Result<(), JobError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

fn invalid<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::Invalid(text.into()))
}

async fn make_file(options: &NewFileOptions) -> Result<()> {
    let mode = preallocation(options.preallocation);
    if mode == Preallocation::Metadata {
        return invalid("Unsupported preallocation mode: metadata");
    }
    let file = NewFile::open(&options.filename).await?;
    file.set_size(options.size).await?;
    let storage = file.storage();
    let failed = |error| Error::io(Action::Write, storage.name(), 0, &error);
    preallocate_raw(&*storage, 0, options.size, mode)
        .await
        .map_err(failed)?;
    crate::storage::io::sync(&*storage).await.map_err(failed)?;
    file.keep();
    Ok(())
}

fn preallocation(mode: Allocate) -> Preallocation {
    match mode {
        Allocate::Off => Preallocation::Off,
        Allocate::Metadata => Preallocation::Metadata,
        Allocate::Falloc => Preallocation::Falloc,
        Allocate::Full => Preallocation::Full,
    }
}

/// What is wrong with the options, in QEMU's words.
fn checked(options: &NewQcow2Options) -> Result<CreateOptions> {
    const NEWER: &str =
        "supported with compatibility level 1.1 and above (use version=v3 or greater)";
    let old = options.version < 3;
    if !options.size.is_multiple_of(512) {
        return invalid("Image size must be a multiple of 512 bytes");
    }
    let size = options.cluster_size;
    if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
        return invalid("Cluster size must be a power of two between 512 and 2048k");
    }
    if options.extended_l2 && old {
        return invalid(format!("Extended L2 entries are only {NEWER}"));
    }
    let known = options.preallocation == Allocate::Off || options.extended_l2;
    if options.backing_file.is_some() && !known {
        return invalid(
            "Backing file and preallocation can only be used at the same time if \
                        extended_l2 is on",
        );
    }
    if options.backing_fmt.is_some() && options.backing_file.is_none() {
        return invalid("Backing format cannot be used without backing file");
    }
    if options.lazy_refcounts && old {
        return invalid(format!("Lazy refcounts only {NEWER}"));
    }
    let bits = options.refcount_bits;
    if !bits.is_power_of_two() || bits > 64 {
        return invalid("Refcount width must be a power of two and may not exceed 64 bits");
    }
    if options.zstd && old {
        return invalid(format!("Non-zlib compression type is only {NEWER}"));
    }
    let checked = CreateOptions {
        version: options.version,
        cluster_size: size,
        refcount_bits: bits,
        lazy_refcounts: options.lazy_refcounts,
        extended_l2: options.extended_l2,
        compression: match options.zstd {
            true => Compression::Zstd,
            false => Compression::Zlib,
        },
        backing: options.backing_file.clone().map(|name| Backing {
            name,
            format: options.backing_fmt.clone(),
        }),
        ..CreateOptions::new(options.size)
    };
    checked.check()?;
    Ok(checked)
}

impl Create {
    async fn make_qcow2(&self, options: &NewQcow2Options) -> Result<()> {
        let graph = &self.graph;
        let (file, own) = match &options.file {
            BlockRef::Name(name) => {
                if graph.node(name).is_err() {
                    return invalid(format!(
                        "Cannot find device='{name}' nor node-name='{name}'"
                    ));
                }
                (name.clone(), false)
            }
            BlockRef::Inline(node) => (graph.open(node).await?, true),
        };
        let made = self.make_in(&file, options).await;
        if own && let Err(error) = graph.remove(&file) {
            log::error!("the node of a new image: {error}");
        }
        made
    }

    async fn make_in(&self, file: &str, options: &NewQcow2Options) -> Result<()> {
        let wanted = checked(options)?;
        let node = self.graph.node(file)?;
        if node.fixed_read_only {
            return invalid("Block node is read-only");
        }
        // QEMU would let a guest go on with a raw disk that is overwritten.
        let demand = Demand {
            does: Rights::WRITE | Rights::RESIZE,
            tolerates: Rights::NONE,
        };
        let request = Request::new(Holder::Tool).with(file, "root", demand);
        let grant = self.graph.access(request).await?;
        let made = self.write(file, &wanted, options).await;
        let given = grant.give_back().await;
        made.and(given)
    }

    /// Writes the image to node `file`, which is open to be written.
    async fn write(
        &self,
        file: &str,
        wanted: &CreateOptions,
        options: &NewQcow2Options,
    ) -> Result<()> {
        let node = self.graph.node(file)?;
        let storage = node.layer.storage.clone();
        create(&*storage, wanted).await?;
        let mode = preallocation(options.preallocation);
        if mode != Preallocation::Off {
            let how = qcow2::Options {
                writable: true,
                ..qcow2::Options::default()
            };
            let image = Qcow2::open_with_data(storage.clone(), None, how).await?;
            image.preallocate(0, wanted.size, mode).await?;
            image.close().await?;
        }
        let failed = |error| Error::io(Action::Read, storage.name(), 0, &error);
        let len = storage.len().await.map_err(failed)?;
        // The node has another length now.
        if let Format::Raw(_) = node.layer.format {
            let layer = Layer {
                format: Format::Raw(Raw::new(len.next_multiple_of(512))),
                ..(*node.layer).clone()
            };
            self.graph.replace_layer(&node.name, Arc::new(layer))?;
        }
        Ok(())
    }
}
