//! Another size for a disk that guests may be using.
//!
//! A size is changed where the disk's bytes are counted: in an image, or in a file. Nodes above that
//! pass on all of its bytes (filters, raw nodes without `offset` and `size`, blkdebug) have their
//! size from it, and change in the same transaction: whoever serves one of them serves the new size
//! from one request to the next.
//!
//! ```text
//!   to grow:    room in the mapping ─▶ (a) ─▶ zeros, header, stable ─▶ publish
//!   to shrink:  publish ─▶ older requests end ─▶ header, stable ─▶ what is above is freed
//!
//!   (a) where the disk ends within a cluster: publish chains for which that cluster goes on, and
//!       wait for requests to end that take it for the last
//! ```
//!
//! So no request is on its way to what is not there, and none that clears the last cluster as a whole
//! while another one writes behind the old end. Guests are not held up meanwhile.

use std::sync::Arc;

use super::grants::Grant;
use super::nodes::State;
use super::{Graph, Released, Role};
use crate::chain::resize::{begin_growing, finish_growing, shrink_in_use};
use crate::chain::{Layer, Root};
use crate::error::{Action, Error, Result, errno_text};
use crate::format::qcow2::bitmaps::check_resize;
use crate::format::{Format, Qcow2, Raw};
use crate::options::Driver;
use crate::storage::Storage;

/// The nodes that get another size together.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stack {
    /// Where the bytes are counted: an image, or a file.
    base: String,
    /// Where they are changed: the base itself if that is an image, or a part of the file.
    place: String,
    /// Where the place begins in the file.
    offset: u64,
    /// Raw nodes whose size follows, children first. The base is one of them if it is a file.
    raw: Vec<String>,
    /// Filters over one of these.
    filters: Vec<String>,
}

impl State {
    /// What changes if node `name` gets another size.
    ///
    /// # Errors
    /// When it has its size for good, or is under another image.
    fn stack(&self, name: &str) -> Result<Stack> {
        let mut node = self.image_node(name)?;
        let (place, mut offset) = (node.name.clone(), 0u64);
        loop {
            let child = match &node.options.driver {
                Driver::Raw(raw) if raw.size.is_some() => {
                    let text = "Cannot resize fixed-size raw disks";
                    return Err(Error::Invalid(text.into()));
                }
                Driver::Raw(raw) => {
                    offset = offset.saturating_add(raw.offset);
                    node.child(Role::File)
                }
                Driver::Blkdebug(_) => node.child(Role::Image),
                Driver::NullCo(_) | Driver::NullAio(_) => {
                    let text = "Image format driver does not support resize";
                    return Err(Error::Invalid(text.into()));
                }
                _ => None,
            };
            let Some(child) = child else { break };
            node = self.image_node(child)?;
        }
        let mut stack = Stack {
            base: node.name.clone(),
            place,
            offset,
            raw: Vec::new(),
            filters: Vec::new(),
        };
        if matches!(node.layer.format, Format::Raw(_)) {
            stack.raw.push(node.name.clone());
        } else {
            stack.place.clone_from(&stack.base);
        }
        self.follow(&node.name, &mut stack)?;
        Ok(stack)
    }

    /// Adds the nodes over `name` whose size follows.
    fn follow(&self, name: &str, stack: &mut Stack) -> Result<()> {
        for (above, role) in self.all_over(name) {
            if stack.raw.contains(&above.name) || stack.filters.contains(&above.name) {
                continue;
            }
            match role {
                Role::Backing => return Err(super::transaction::in_use(name, above, role)),
                Role::Filtered => stack.filters.push(above.name.clone()),
                Role::Image => stack.raw.push(above.name.clone()),
                Role::File if matches!(above.options.driver, Driver::Raw(_)) => {
                    stack.raw.push(above.name.clone());
                }
                // These do not tolerate it: the grant says so.
                Role::File | Role::DataFile => continue,
            }
            self.follow(&above.name, stack)?;
        }
        Ok(())
    }

    /// The bytes of raw node `name`, where a disk or file `base` has `len` of them.
    fn bytes_of(&self, name: &str, (base, len): (&str, u64)) -> Result<u64> {
        let mut node = self.image_node(name)?;
        let mut offset = 0u64;
        while node.name != base {
            if let Driver::Raw(raw) = &node.options.driver {
                offset = offset.saturating_add(raw.offset);
            }
            let Some(child) = node.file() else { break };
            node = self.image_node(child)?;
        }
        Ok(len.saturating_sub(offset))
    }
}

impl Graph {
    /// The names of all nodes that get another size if node `name` does, with those between: no job
    /// may have one of them.
    ///
    /// # Errors
    /// When node `name` has its size for good, or is under another image.
    pub fn nodes_resized_with(&self, name: &str) -> Result<Vec<String>> {
        let stack = self.state().stack(name)?;
        let mut names = vec![name.to_owned()];
        for node in [stack.base]
            .into_iter()
            .chain(stack.raw)
            .chain(stack.filters)
        {
            if !names.contains(&node) {
                names.push(node);
            }
        }
        Ok(names)
    }

    /// Gives the disk of node `name` another size, while others may be using it. For the holder of
    /// `grant`, which is for resizing that node, and with no job on it.
    ///
    /// # Errors
    /// When the image, its format or its file forbid it, or they cannot be written. All is as before
    /// then.
    pub async fn resize_in_use(&self, grant: &Grant, name: &str, size: u64) -> Result<()> {
        let stack = self.state().stack(name)?;
        let _turn = {
            let names = std::iter::once(&stack.base).chain(&stack.raw);
            let nodes: Vec<_> = names.map(|name| self.node(name)).collect::<Result<_>>()?;
            self.turn_of(&nodes).await?
        };
        let change = InUse {
            graph: self,
            grant,
            name,
            stack,
        };
        let base = self.node(&change.stack.base)?;
        match &base.layer.format {
            Format::Raw(_) => change.raw(size).await,
            // A part of the image ends where that does, and begins behind its beginning.
            Format::Qcow2(image) => match size.checked_add(change.stack.offset) {
                Some(size) => change.qcow2(image, size).await,
                None => Err(Error::Invalid("The new size is too large".into())),
            },
            Format::Qed(_) => Err(Error::unsupported(
                base.layer.storage.name(),
                "QED images are only read",
            )),
        }
    }
}

/// A change of the size of a disk.
struct InUse<'a> {
    graph: &'a Graph,
    grant: &'a Grant,
    /// The node that it was asked of.
    name: &'a str,
    stack: Stack,
}

impl InUse<'_> {
    /// Publishes chains in which the base has `len` bytes.
    fn publish(&self, len: u64) -> Result<Released> {
        let state = self.graph.state();
        // With nodes that have come since.
        let now = state.stack(self.name);
        let stack = now.as_ref().unwrap_or(&self.stack);
        let mut transaction = self.graph.transaction().by(self.grant);
        let base = state.node(&stack.base)?;
        if !matches!(base.layer.format, Format::Raw(_)) {
            // Another value, of which other chains are composed: the image says how long it is.
            transaction.set_layer(&base.name, Arc::new(Layer::clone(&base.layer)))?;
        }
        for name in &stack.raw {
            let layer = &state.node(name)?.layer;
            let bytes = state.bytes_of(name, (&stack.base, len))?;
            let layer = Layer {
                format: Format::Raw(Raw::new(bytes.next_multiple_of(512))),
                ..Layer::clone(layer)
            };
            transaction.set_layer(name, Arc::new(layer))?;
        }
        self.graph.commit(transaction)
    }

    /// Publishes, and waits for all requests of the chains before.
    async fn publish_and_wait(&self, len: u64) -> Result<()> {
        let released = self.publish(len)?;
        let ended = released.ended();
        drop(released);
        for chain in ended {
            chain.ended().await;
        }
        Ok(())
    }

    /// Refuses to go on where somebody has put another node over this one, who may rely on its size.
    fn check_unchanged(&self) -> Result<()> {
        if self.graph.state().stack(self.name)? == self.stack {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "the nodes over node '{}' have changed while it was to get another size (try again)",
            self.stack.base
        )))
    }

    /// Refuses a size that a node over an image cannot have.
    fn check_blocks(&self, size: u64) -> Result<()> {
        let state = self.graph.state();
        for name in &self.stack.raw {
            let storage = &state.node(name)?.layer.storage;
            let align = storage.limits().offset_align.max(1);
            if !size.is_multiple_of(align) {
                return Err(Error::Invalid(format!(
                    "node '{name}' is written in blocks of {align} bytes, and {size} is not a \
                     multiple of that (expected a size of whole blocks, or cache.direct=off)"
                )));
            }
        }
        Ok(())
    }

    async fn raw(&self, size: u64) -> Result<()> {
        let place = self.graph.node(&self.stack.place)?;
        let storage = place.layer.storage.clone();
        let failed = |error| Error::io(Action::Write, storage.name(), 0, &error);
        let old = storage.len().await.map_err(failed)?;
        let file = |len: u64| len.saturating_add(self.stack.offset);
        if storage.capacity().await.map_err(failed)?.is_some() {
            // A device has the length that it has, which may have changed since it was opened.
            if size > old {
                return Err(Error::Invalid("Cannot grow device files".into()));
            }
            return self.publish(file(old)).map(drop);
        }
        self.check_unchanged()?;
        if size >= old {
            set_len(&*storage, (old, size)).await?;
            let published = match place.layer.flush().await {
                Ok(()) => self.publish(file(size)).map(drop),
                Err(error) => Err(error),
            };
            if published.is_err() {
                // The disk ends with a whole sector, and a guest may have written that.
                back(&*storage, old.next_multiple_of(512).min(size)).await;
            }
            return published;
        }
        self.publish_and_wait(file(size)).await?;
        let cut = set_len(&*storage, (old, size)).await;
        if cut.is_err() {
            self.take_back(file(old));
        } else if let Err(error) = place.layer.flush().await {
            // The file is shorter, on the disk or not yet.
            log::warn!("{error}");
        }
        cut
    }

    async fn qcow2(&self, image: &Qcow2, size: u64) -> Result<()> {
        let header = image.header();
        let file = image.storage().name();
        if !size.is_multiple_of(512) {
            let text = "The new size must be a multiple of 512";
            return Err(Error::Invalid(text.into()));
        }
        if header.snapshots > 0 && header.version < 3 {
            let text = "Can't resize a v2 image which has snapshots";
            return Err(Error::Invalid(text.into()));
        }
        self.check_blocks(size)?;
        check_resize(&**image.storage(), &header, size).await?;
        let old = header.size.next_multiple_of(512);
        if size >= old {
            image
                .check_mapping(size)
                .map_err(|error| Error::Invalid(format!("Failed to grow the L1 table: {error}")))?;
        }
        log::debug!("{file}: {old} bytes become {size}");
        match size.cmp(&old) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(image, (old, size)).await,
            std::cmp::Ordering::Less => self.shrink(image, (old, size)).await,
        }
    }

    async fn grow(&self, image: &Qcow2, (old, size): (u64, u64)) -> Result<()> {
        self.check_unchanged()?;
        begin_growing(image, size).await?;
        let grown = async {
            if !old.is_multiple_of(image.cluster_size()) {
                self.publish_and_wait(old).await?;
            }
            let root: Arc<Root> = self.graph.root(&self.stack.base)?;
            let chain = root.chain();
            drop(root);
            finish_growing(&chain, image, (old, size)).await
        };
        if let Err(error) = grown.await {
            image.settle_size();
            self.take_back(old);
            return Err(error);
        }
        self.publish(size).map(drop).map_err(|error| {
            Error::Invalid(format!(
                "the image has {size} bytes from now on, but the disk shows them only when it is \
                 opened again: {error}"
            ))
        })
    }

    async fn shrink(&self, image: &Qcow2, (old, size): (u64, u64)) -> Result<()> {
        self.check_unchanged()?;
        image.show(size);
        let shrunk = async {
            self.publish_and_wait(size).await?;
            shrink_in_use(image, size).await
        };
        if let Err(error) = shrunk.await {
            image.show(old);
            self.take_back(old);
            return Err(error);
        }
        // The mapping ends with the disk again. Otherwise it goes on behind it, where nobody asks.
        if let Err(error) = self.publish(size) {
            log::warn!("node '{}': {error}", self.stack.base);
        }
        Ok(())
    }

    /// Publishes what was there before, since the size stays.
    fn take_back(&self, old: u64) {
        if let Err(error) = self.publish(old) {
            log::error!("node '{}': back to {old} bytes: {error}", self.stack.base);
        }
    }
}

async fn set_len(storage: &dyn Storage, (old, len): (u64, u64)) -> Result<()> {
    if old == len {
        return Ok(());
    }
    storage.set_len(len).await.map_err(|error| {
        let text = errno_text(error.raw_os_error().unwrap_or(libc::EIO));
        Error::Invalid(format!("Could not resize file: {text}"))
    })
}

async fn back(storage: &dyn Storage, len: u64) {
    if let Err(error) = storage.set_len(len).await {
        log::warn!("{}: back to {len} bytes: {error}", storage.name());
    }
}
