//! The stream job: copies into a layer what it takes from the layers below, down to a base, so that
//! the layers between are no longer needed.
//!
//! The copying is the [`copier`]'s. Here is what a range needs and how it is copied, and what makes
//! the result count: everything copied is stable, then the image's header names the base, then the
//! graph has the base under the image.

use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::LocalBoxFuture;

use super::context::JobContext;
use super::records::{self, Recording};
use super::source::{CopySource, GuestLoad, Guests, JobIoError};
use super::{Body, JobError, copier};
use crate::chain::{Chain, CopyStatus, Root, Span, View, with_room};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::format::qcow2::{Backing, Qcow2};
use crate::graph::{Grant, Graph, Node, resolve};
use crate::state::record;

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

fn io_error(error: &Error) -> JobIoError {
    JobIoError {
        errno: error.errno(),
        write: error.is_write(),
        text: error.to_string(),
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
        Box::pin(async move {
            let found = self.find_status(offset, max_len).await;
            found.map_err(|error| io_error(&error))
        })
    }

    fn copy(
        &self,
        offset: u64,
        len: u64,
    ) -> LocalBoxFuture<'_, std::result::Result<u64, JobIoError>> {
        Box::pin(async move {
            let copied = self.copy_range(offset, len).await;
            copied.map_err(|error| io_error(&error))
        })
    }

    fn settle(&self) -> LocalBoxFuture<'_, std::result::Result<(), JobIoError>> {
        Box::pin(async move {
            let chain = self.root.chain();
            let flushed = chain.top().flush().await;
            flushed.map_err(|error| io_error(&error))
        })
    }
}

/// The body of a stream job.
pub struct Stream {
    graph: Arc<Graph>,
    layers: Layers,
    target: String,
    /// What to write into the header, where the base's own name is not wanted.
    backing_file: Option<String>,
    /// To write the target, and that the layers stay as they are, until the end.
    grant: Option<Grant>,
    /// Where the result is recorded.
    recording: Option<Recording>,
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
            graph,
            target: spec.target.clone(),
            backing_file: spec.backing_file.clone(),
            grant: Some(grant),
            recording,
        })
    }

    /// The order matters: everything copied is stable before the header changes, and the header
    /// is stable before anybody hears of it. What the header will say is recorded before, so that a
    /// process that finds it knows that the stream has ended; and that it does say so is recorded
    /// before the layers between are let go of, since what is discarded from then on must never be
    /// read through to them.
    async fn put_in_force(&self) -> Result<()> {
        let chain = self.layers.root.chain();
        let Format::Qcow2(image) = &chain.top().format else {
            // A raw layer has nothing under it, and no header that could say so.
            return Ok(());
        };
        let backing = match &self.layers.base {
            None => None,
            Some(base) => Some(backing(
                &self.graph,
                &self.target,
                base,
                self.backing_file.clone(),
            )?),
        };
        let Some(recording) = &self.recording else {
            image.set_backing(backing.as_ref()).await?;
            return self.let_go();
        };
        let mut commit = self.commit(image, backing.as_ref())?;
        // A header that stays as it is tells nothing: then the record is what counts.
        let shows = image.backing() != backing;
        if shows {
            recording.commit(&commit)?;
        }
        image.set_backing(backing.as_ref()).await?;
        commit.done = true;
        match shows {
            true => recording.in_force(&commit),
            false => recording.commit(&commit)?,
        }
        self.let_go()
    }

    /// Puts the base under the target.
    fn let_go(&self) -> Result<()> {
        let base = self.layers.base.as_deref();
        match &self.grant {
            Some(grant) => grant.set_backing(&self.target, base),
            None => Err(Error::Invalid("the stream has been closed".into())),
        }
    }

    /// The stream's result, as it is recorded, where the header is to name `backing`. It stays
    /// recorded when the job is gone: the options of a later start may name other layers, whatever
    /// those of this one say.
    fn commit(&self, image: &Qcow2, backing: Option<&Backing>) -> Result<record::Commit> {
        let nodes = self.graph.chain_nodes(&self.target)?;
        let base = nodes
            .iter()
            .find(|node| Some(&node.name) == self.layers.base.as_ref());
        let target = self.graph.node(&self.target)?;
        let below = base
            .map(|base| records::below(&self.graph, base))
            .transpose()?;
        let streamed = nodes.iter().skip(1);
        let streamed = streamed.take_while(|node| Some(&node.name) != self.layers.base.as_ref());
        let released_files = streamed.clone().map(|node| self.graph.file_of(node));
        Ok(record::Commit {
            link: record::Link {
                node: records::node(&self.graph, &target)?,
                identity: image.storage().identity().unwrap_or_default(),
                header: backing.map(records::header),
                below,
                released_files: released_files.collect::<Result<_>>()?,
                let_go: false,
                released: records::names_of(&self.graph, streamed),
            },
            done: false,
        })
    }
}

/// The node `base` as the header of node `target`'s image is to name it: by `name`, if one is given.
fn backing(graph: &Graph, target: &str, base: &str, name: Option<String>) -> Result<Backing> {
    let nodes = graph.chain_nodes(target)?;
    let at = nodes
        .iter()
        .position(|node| node.name == base)
        .ok_or_else(|| Error::Invalid(format!("base '{base}' has left the chain")))?;
    let (Some(target), Some(node)) = (nodes.first(), nodes.get(at)) else {
        return Err(Error::Invalid(format!("base '{base}' has left the chain")));
    };
    let above = at.checked_sub(1).and_then(|index| nodes.get(index));
    let name = match name.or(named_above(graph, target, node, above)?) {
        Some(name) => name,
        None => graph.header_name(base)?,
    };
    Ok(Backing {
        name,
        format: Some(node.format_name().to_owned()),
    })
}

/// The name of `base` in the header of the image above it, if it means that node, and the same
/// from the folder of `target`.
fn named_above(
    graph: &Graph,
    target: &Node,
    base: &Node,
    above: Option<&Node>,
) -> Result<Option<String>> {
    let Some(above) = above.filter(|above| above.filename.parent() == target.filename.parent())
    else {
        return Ok(None);
    };
    let Format::Qcow2(image) = &above.layer.format else {
        return Ok(None);
    };
    let Some(backing) = image.backing() else {
        return Ok(None);
    };
    // The options may have put another node there than the header names.
    let means_it =
        resolve(&above.filename, &backing.name) == base.filename && graph.is_whole_file(base)?;
    Ok(means_it.then_some(backing.name))
}

/// Checks that the header of the layer streamed into can name its base at the end, which may be
/// hours away.
///
/// # Errors
/// When it cannot.
pub fn check_base_name(graph: &Graph, spec: &StreamSpec) -> Result<()> {
    let Some(base) = &spec.base else {
        return Ok(());
    };
    let Format::Qcow2(image) = &graph.image_node(&spec.target)?.layer.format else {
        return Ok(());
    };
    let backing = backing(graph, &spec.target, base, spec.backing_file.clone())?;
    image.check_backing(&backing).map_err(|error| {
        Error::Invalid(format!(
            "The image of node '{}' could not name its new backing file, node '{base}', at the \
             end: {error} (give a shorter name with 'backing-file', or files with shorter paths)",
            spec.target
        ))
    })
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
            let done = self.put_in_force().await;
            done.map_err(|error| JobError::new(error.to_string()))
        })
    }

    fn close(&mut self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            if let Some(grant) = self.grant.take()
                && let Err(error) = grant.give_back().await
            {
                log::error!("node '{}': back to read-only: {error}", self.target);
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
    use crate::format::Raw;
    use crate::format::qcow2::create::{CreateOptions, create};
    use crate::format::qcow2::{Options, Qcow2};
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
