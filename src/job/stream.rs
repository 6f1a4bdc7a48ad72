//! The stream job: copies into a layer what it takes from the layers below, down to a base, so that
//! the layers between are no longer needed.
//!
//! The copying is the [`copier`]'s, and what makes the result count is [`relink`]'s: everything copied
//! is stable, then the image's header names the base, then the graph has the base under the image.
//! Here is what a range needs and how it is copied.

use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::LocalBoxFuture;

use super::context::JobContext;
use super::records::Recording;
use super::relink::{self, Relink};
use super::source::{CopySource, GuestLoad, Guests, JobIoError, answer};
use super::{Body, JobError, copier};
use crate::chain::{Chain, CopyStatus, Root, Span, View, with_room};
use crate::error::{Error, Result};
use crate::graph::{Grant, Graph};
use crate::planted::{Fault, is_planted};

/// What to stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamSpec {
    /// The node of the layer to stream into.
    pub target: String,
    /// The node of the layer to stop above; none to stream the whole chain.
    pub base: Option<String>,
    /// The layers that are streamed, top first: `target` and all others above `base`.
    pub layers: Vec<String>,
    /// What to write into the header as the base's name, where its own is not wanted.
    pub backing_file: Option<String>,
    /// Clusters are to be compressed where that makes them smaller.
    pub compress: bool,
}

/// The layers of a stream.
///
/// It has a disk of its own whose top is the layer streamed into: what happens above that layer
/// does not concern it.
struct Layers {
    root: Arc<Root>,
    base: Option<String>,
    compress: bool,
    guests: Box<dyn Guests>,
}

impl Layers {
    /// The index of the base, or the number of layers.
    fn end(&self, chain: &Chain) -> Result<usize> {
        let Some(base) = &self.base else {
            return Ok(chain.layers().len());
        };
        chain
            .layers()
            .iter()
            .position(|layer| layer.name == *base)
            .ok_or_else(|| Error::Invalid(format!("base '{base}' has left the chain")))
    }

    async fn find_status(&self, offset: u64, max_len: u64) -> Result<(u64, CopyStatus)> {
        let chain = self.root.chain();
        let end = self.end(&chain)?;
        let (status, len) = chain
            .status(Span::new(0, end).sparse(), offset, max_len)
            .await?;
        Ok((len, status))
    }

    async fn copy_range(&self, offset: u64, len: u64) -> Result<u64> {
        let copy = async |view: Rc<View>| {
            let end = self.end(&view.chain)?;
            let span = Span::new(0, end).sparse().compressed(self.compress);
            view.copy(span, offset, len).await
        };
        let view = View::of(self.root.chain());
        let copied = with_room(view, || self.root.chain(), copy).await?;
        self.guests.give_way();
        Ok(copied.data)
    }
}

impl CopySource for Layers {
    fn len(&self) -> u64 {
        self.root.chain().size()
    }

    fn cluster_size(&self) -> u64 {
        self.root.chain().cluster_size()
    }

    fn guest_load(&self) -> GuestLoad {
        self.guests.load()
    }

    fn status(
        &self,
        offset: u64,
        max_len: u64,
    ) -> LocalBoxFuture<'_, std::result::Result<(u64, CopyStatus), JobIoError>> {
        answer(self.find_status(offset, max_len))
    }

    fn copy(
        &self,
        offset: u64,
        len: u64,
    ) -> LocalBoxFuture<'_, std::result::Result<u64, JobIoError>> {
        answer(self.copy_range(offset, len))
    }

    fn settle(&self) -> LocalBoxFuture<'_, std::result::Result<(), JobIoError>> {
        answer(async {
            match is_planted(Fault::HeaderEarly) {
                true => Ok(()),
                false => self.root.chain().top().flush().await,
            }
        })
    }
}

/// The body of a stream job.
pub struct Stream {
    layers: Layers,
    relink: Relink,
    /// To write the target, and that the layers stay as they are, until the end.
    grant: Option<Grant>,
}

impl Stream {
    /// A stream as `spec` wants it, by `grant`: the target can be written to.
    ///
    /// # Errors
    /// When the target does not exist.
    pub fn new(
        graph: Arc<Graph>,
        guests: Box<dyn Guests>,
        spec: &StreamSpec,
        grant: Grant,
        recording: Option<Recording>,
    ) -> Result<Self> {
        Ok(Self {
            layers: Layers {
                root: graph.root(&spec.target)?,
                base: spec.base.clone(),
                compress: spec.compress,
                guests,
            },
            relink: Relink {
                graph,
                target: spec.target.clone(),
                base: spec.base.clone(),
                backing_file: spec.backing_file.clone(),
                recording,
            },
            grant: Some(grant),
        })
    }
}

/// Checks that the header of the layer streamed into can name its base at the end, which may be
/// hours away.
///
/// # Errors
/// When it cannot.
pub fn check_base_name(graph: &Graph, spec: &StreamSpec) -> Result<()> {
    match &spec.base {
        Some(base) => relink::check_name(graph, &spec.target, base, spec.backing_file.clone()),
        None => Ok(()),
    }
}

impl Body for Stream {
    fn run<'a>(
        &'a mut self,
        context: &'a JobContext,
    ) -> LocalBoxFuture<'a, std::result::Result<(), JobError>> {
        Box::pin(copier::run(&self.layers, context))
    }

    fn commit<'a>(
        &'a mut self,
        _context: &'a JobContext,
    ) -> LocalBoxFuture<'a, std::result::Result<(), JobError>> {
        Box::pin(async move {
            let Some(grant) = &self.grant else {
                return Err(JobError::new("the stream has been closed"));
            };
            let done = self.relink.put_in_force(grant).await.map(drop);
            done.map_err(|error| JobError::new(error.to_string()))
        })
    }

    fn close(&mut self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            if is_planted(Fault::GrantKept) {
                std::mem::forget(self.grant.take());
            }
            if let Some(grant) = self.grant.take()
                && let Err(error) = grant.give_back().await
            {
                log::error!("node '{}': back to read-only: {error}", self.relink.target);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a stream that fails for want of room, although the guest has discarded
    //! as much and the copy's own view is what holds it up; or one that waits in vain.

    use std::path::PathBuf;

    use serde_json::json;

    use super::super::source::NoGuests;
    use super::*;
    use crate::chain::Layer;
    use crate::format::Format;
    use crate::format::Raw;
    use crate::format::qcow2::Backing;
    use crate::format::qcow2::create::{CreateOptions, create};
    use crate::format::qcow2::{Options, Qcow2};
    use crate::graph::Node;
    use crate::graph::{Request, Role};
    use crate::options::{BlockdevOptions, Dialect};
    use crate::reactor::Reactor;
    use crate::storage::memory::MemoryStorage;
    use crate::storage::{AlignedBuf, IoBufs, Storage};

    const CLUSTER: u64 = 4096;
    const SIZE: u64 = 1 << 20;
    const DEVICE: usize = 256 << 10;

    fn add(graph: &Graph, name: &str, format: Format, storage: Arc<dyn Storage>, below: bool) {
        let options = json!({"driver": "raw", "node-name": name,
            "file": {"driver": "file", "filename": "/disk"}});
        let layer = Layer {
            name: name.to_owned(),
            format,
            storage,
            read_only: !below,
            discard: true,
            copy_on_read: false,
        };
        let options = BlockdevOptions::from_value(&options, Dialect::Json).unwrap();
        let node = Node::new(options, layer, PathBuf::from("/disk"));
        graph
            .add(node.over(Role::Backing, below.then_some("base")))
            .unwrap();
    }

    /// An image on a device smaller than the disk, over a disk of sevens.
    fn graph(reactor: &Reactor) -> Arc<Graph> {
        let blank = MemoryStorage::new(Vec::new());
        let options = CreateOptions {
            cluster_size: CLUSTER,
            backing: Some(Backing {
                name: "base".into(),
                format: Some("raw".into()),
            }),
            ..CreateOptions::new(SIZE)
        };
        reactor.block_on(create(&blank, &options)).unwrap();
        let mut bytes = blank.snapshot();
        bytes.resize(DEVICE, 0xd5);
        let storage = Arc::new(MemoryStorage::device(bytes));
        let options = Options {
            writable: true,
            discard: true,
            ..Options::default()
        };
        let image = reactor.block_on(Qcow2::open(storage.clone(), options));
        let image = Format::Qcow2(Arc::new(image.unwrap()));
        let base = Arc::new(MemoryStorage::new(vec![7; SIZE as usize]));
        let graph = Arc::new(Graph::default());
        add(&graph, "base", Format::Raw(Raw::new(SIZE)), base, false);
        add(&graph, "top", image, storage, true);
        graph
    }

    #[test]
    fn a_copy_takes_the_room_that_the_guest_has_just_given_up() {
        let reactor = Reactor::for_this_thread().unwrap();
        for compress in [false, true] {
            let graph = graph(&reactor);
            let spec = StreamSpec {
                target: "top".into(),
                base: None,
                layers: vec!["top".into()],
                backing_file: None,
                compress,
            };
            let guests = Box::new(NoGuests);
            let grant = Request::stream(&graph.state(), "j", &spec.layers);
            let grant = graph.grant(grant).unwrap();
            let stream = Stream::new(graph.clone(), guests, &spec, grant, None).unwrap();
            let source = &stream.layers;
            let root = graph.root("top").unwrap();
            let buffer = AlignedBuf::copy_of(&[1; CLUSTER as usize]);
            let write = |at: u64| {
                // SAFETY: `buffer` outlives the operation.
                let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
                reactor.block_on(View::of(root.chain()).write(at, bufs))
            };
            // From the end down, so that the stream finds what it has to copy at the start.
            let mut places = (0..SIZE / CLUSTER).rev().map(|cluster| cluster * CLUSTER);
            let full = places.find(|&at| write(at).is_err()).unwrap();
            let copied = reactor.block_on(source.copy(0, 4 * CLUSTER));
            assert_eq!(copied.map_err(|error| error.errno), Err(libc::ENOSPC));
            let given_up = View::of(root.chain()).discard(full + CLUSTER, 4 * CLUSTER);
            reactor.block_on(given_up).unwrap();
            let copied = reactor.block_on(source.copy(0, 4 * CLUSTER));
            assert_eq!(copied, Ok(4 * CLUSTER), "compressed: {compress}");
        }
    }
}
