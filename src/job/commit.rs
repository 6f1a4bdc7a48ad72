//! The commit job: copies what layers hold down into the base under them, so that they are no longer
//! needed.
//!
//! The base is written while disks read through the layers: it changes only where they hide it, so all
//! read the same meanwhile and wherever it ends. The layers are not written. When all that they hold is
//! stable in the base, the image over them is put over the base ([`relink`]); nothing that is read
//! changes by that, so guests are not held up. The job is over when the last request has ended that
//! goes through the layers.
//!
//! Where an image ends, what is above it reads as zeros, whatever the base has there: a base that is
//! shorter than the layers is made longer, and zeros that only the layers' end has said are recorded in
//! the image over them.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::LocalBoxFuture;

use super::context::JobContext;
use super::records::Recording;
use super::relink::{self, Relink};
use super::source::{CopySource, GuestLoad, Guests, JobIoError, answer};
use super::{Body, JobError, copier};
use crate::chain::{Chain, CopyStatus, Root, Span, Tap, View, with_room};
use crate::error::{Error, Result};
use crate::graph::{Grant, Graph};
use crate::planted::{Fault, is_planted};

/// What to commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitSpec {
    /// The node over the layers; none where the first of them is a guest's own.
    pub overlay: Option<String>,
    /// The layers that are committed, top first.
    pub layers: Vec<String>,
    /// The node that they are committed into.
    pub base: String,
    /// What to write into the overlay's header, where the base's own name is not wanted.
    pub backing_file: Option<String>,
}

impl CommitSpec {
    /// The first of the layers.
    #[must_use]
    pub fn top(&self) -> &str {
        self.layers.first().map_or("", String::as_str)
    }

    /// All nodes that it is about, top first, and then the image over them.
    #[must_use]
    pub fn nodes(&self) -> Vec<String> {
        let nodes = self.layers.iter().chain([&self.base]);
        nodes.chain(&self.overlay).cloned().collect()
    }
}

/// What is copied where.
pub(super) struct Layers {
    /// The disk whose top is the first of the layers.
    pub source: Arc<Root>,
    /// The disk whose top is the base.
    pub target: Arc<Root>,
    pub base: String,
    pub guests: Box<dyn Guests>,
    /// Where guests write the first of the layers meanwhile: what they write goes to the base as well.
    pub tap: Option<Arc<Tap>>,
}

/// The index of the layer `name`.
fn position(chain: &Chain, name: &str) -> Result<usize> {
    let found = chain.layers().iter().position(|layer| layer.name == name);
    found.ok_or_else(|| Error::Invalid(format!("base '{name}' has left the chain")))
}

/// The range of whole blocks that the bytes from `offset` on are in.
fn whole_blocks(offset: u64, len: u64, block: u64) -> Range<u64> {
    let start = offset / block * block;
    start..(offset + len).next_multiple_of(block)
}

impl Layers {
    /// Makes the base as long as the layers are.
    pub(super) async fn make_room(&self, graph: &Graph) -> Result<()> {
        let (size, block) = (
            self.source.chain().size(),
            View::of(self.target.chain()).block(),
        );
        if size % block != 0 {
            return Err(Error::Invalid(format!(
                "node '{}' is written in blocks of {block} bytes, and the layers have {size} bytes \
                 (expected cache.direct=off, or layers of whole blocks)",
                self.base
            )));
        }
        graph.grow(&self.base, size).await
    }

    async fn find_status(&self, offset: u64, max_len: u64) -> Result<(u64, CopyStatus)> {
        let chain = self.source.chain();
        let end = position(&chain, &self.base)?;
        let block = View::of(self.target.chain()).block();
        let (status, len) = chain.status_above(end, offset, max_len, block).await?;
        Ok((len, status))
    }

    async fn copy_range(&self, offset: u64, len: u64) -> Result<u64> {
        let renew = || self.target.chain();
        let copy = async |target: Rc<View>| {
            // Anew each time: it goes through the base, whose freed clusters it would hold up.
            let hold = match &self.tap {
                Some(tap) => Some(tap.hold(whole_blocks(offset, len, target.block())).await),
                None => None,
            };
            let source = View::of(self.source.chain());
            let end = position(&source.chain, &self.base)?;
            source.copy_onto(end, &target, (offset, len), hold).await
        };
        let copied = with_room(View::of(renew()), renew, copy).await?;
        self.guests.give_way();
        Ok(copied.data)
    }
}

impl CopySource for Layers {
    fn len(&self) -> u64 {
        self.source.chain().size()
    }

    fn cluster_size(&self) -> u64 {
        self.target.chain().cluster_size()
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
            match is_planted(Fault::BaseNotFlushed) {
                true => Ok(()),
                false => self.target.chain().top().flush().await,
            }
        })
    }
}

/// The body of a commit job.
pub struct Commit {
    graph: Arc<Graph>,
    overlay: String,
    layers: Layers,
    relink: Relink,
    /// To write the base and the overlay, and that the layers stay as they are, until the end.
    grant: Option<Grant>,
}

impl Commit {
    /// A commit as `spec` wants it, of layers under `overlay`, by `grant`: the base and the overlay can be
    /// written to.
    ///
    /// # Errors
    /// When a node does not exist.
    pub fn new(
        graph: Arc<Graph>,
        guests: Box<dyn Guests>,
        (spec, overlay): (&CommitSpec, &str),
        grant: Grant,
        recording: Option<Recording>,
    ) -> Result<Self> {
        // Filters over it have no header, and nothing under them but it.
        let overlay = graph.image_node(overlay)?.name;
        Ok(Self {
            layers: Layers {
                source: graph.root(spec.top())?,
                target: graph.root(&spec.base)?,
                base: spec.base.clone(),
                guests,
                tap: None,
            },
            relink: Relink {
                graph: graph.clone(),
                target: overlay.clone(),
                base: Some(spec.base.clone()),
                backing_file: spec.backing_file.clone(),
                recording,
            },
            graph,
            overlay,
            grant: Some(grant),
        })
    }

    /// Records zeros in the overlay that it has since the layers are shorter, where the base is not.
    async fn keep_ends(&self) -> Result<()> {
        let root = self.graph.root(&self.overlay)?;
        let chain = root.chain();
        let end = position(&chain, &self.layers.base)?;
        let start = self.layers.source.chain().size();
        let stop = chain.size().min(self.layers.target.chain().size());
        let mut at = start;
        while at < stop {
            let len = (stop - at).min(copier::MAX_COPY);
            let renew = || root.chain();
            let copy = async |view: Rc<View>| view.copy(Span::new(0, end), at, len).await;
            with_room(View::of(renew()), renew, copy).await?;
            at += len;
        }
        if start < stop {
            chain.top().flush().await?;
        }
        Ok(())
    }

    /// Lets go of the layers: those that nobody has named and nothing needs are closed.
    fn let_go(&mut self) {
        self.layers.source = self.layers.target.clone();
        let mut transaction = self.graph.transaction();
        transaction.sweep();
        if let Err(error) = self.graph.commit(transaction).map(drop) {
            log::error!(
                "node '{}', which was committed into: {error}",
                self.layers.base
            );
        }
    }

    async fn put_in_force(&self) -> Result<()> {
        let Some(grant) = &self.grant else {
            return Err(Error::Invalid("the commit has been closed".into()));
        };
        self.keep_ends().await?;
        let released = self.relink.put_in_force(grant).await?;
        let ended = released.ended();
        drop(released);
        // Those that go through the layers.
        for chain in ended {
            chain.ended().await;
        }
        Ok(())
    }
}

/// Checks that the header of the overlay can name the base at the end, which may be hours away.
///
/// # Errors
/// When it cannot.
pub fn check_base_name(graph: &Graph, spec: &CommitSpec) -> Result<()> {
    match &spec.overlay {
        Some(overlay) => {
            let name = spec.backing_file.clone();
            relink::check_name(graph, overlay, &spec.base, name)
        }
        None => Ok(()),
    }
}

impl Body for Commit {
    fn run<'a>(
        &'a mut self,
        context: &'a JobContext,
    ) -> LocalBoxFuture<'a, std::result::Result<(), JobError>> {
        Box::pin(async move {
            let grown = self.layers.make_room(&self.graph).await;
            grown.map_err(|error| JobError::new(error.to_string()))?;
            copier::run(&self.layers, context).await
        })
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
                log::error!("node '{}': back to read-only: {error}", self.layers.base);
            }
            self.let_go();
        })
    }
}
