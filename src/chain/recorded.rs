//! Chains as an earlier process has left them.
//!
//! A stream's end changes what lies under an image. The options that the next process is started with
//! may still say what lay there before, and from then on that would be wrong: the image may have
//! discarded clusters since, through which the old layers would come to light. So what was recorded
//! wins over the options, as long as the image's header is as the stream has left it.

use std::collections::HashSet;
use std::time::{Duration, UNIX_EPOCH};

use super::below::backing_options;
use super::descent::Descent;
use super::graph::{Graph, Node};
use super::open::Origin;
use crate::error::{Error, Result, utc};
use crate::format::qcow2::Backing;
use crate::options::{BackingRef, BlockRef, BlockdevOptions, Driver, FileOptions};
use crate::storage::{Identity, are_different};

/// What is recorded of chains.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// Where it is recorded, for messages.
    pub place: String,
    /// What lies under images.
    pub links: Vec<RecordedLink>,
    /// Names of nodes that lay under them before. They need not be there any longer.
    pub released: HashSet<String>,
}

/// What lies under an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedLink {
    /// The image's format.
    pub format: String,
    /// What the image is in, as [`Graph::file_of`] tells it.
    pub file: String,
    /// The file; zeros where that is not known.
    pub identity: Identity,
    /// What its header says when this holds.
    pub header: Option<Backing>,
    /// This held for sure: a header that says something else was changed by somebody else.
    pub certain: bool,
    /// What lies under it.
    pub below: Option<RecordedNode>,
}

/// A node under an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedNode {
    /// Its name, if somebody gave it one.
    pub name: Option<String>,
    /// Its format.
    pub format: String,
    /// What its bytes are in.
    pub file: String,
    /// How a header would name it.
    pub open_as: Backing,
}

impl RecordedNode {
    fn is(&self, graph: &Graph, node: &Node) -> bool {
        node.format_name() == self.format && graph.file_of(node).is_ok_and(|file| file == self.file)
    }
}

impl Recorded {
    /// What is recorded of the image in `file`, whose header names `header`.
    fn link(
        &self,
        format: &str,
        file: &str,
        identity: Identity,
        header: Option<&Backing>,
    ) -> Result<Option<&RecordedLink>> {
        let is_it = |link: &&RecordedLink| link.format == format && link.file == file;
        for link in self.links.iter().filter(is_it) {
            if are_different(link.identity, identity) {
                return Err(Error::Invalid(format!(
                    "{}, and '{}' records what lies under that one (put it back, or remove that \
                     file to go by the options and the header; look at the images' backing files \
                     first)",
                    other_file(file, identity, link.identity),
                    self.place
                )));
            }
            if link.header.as_ref() == header {
                return Ok(Some(link));
            }
            if link.certain {
                let name = |backing: Option<&Backing>| match backing {
                    Some(backing) => format!("'{}'", backing.name),
                    None => "no backing file".to_owned(),
                };
                return Err(Error::Invalid(format!(
                    "{file}: the image's header names {}, and '{}' records that it named {} when \
                     a stream had ended: something else has changed the image since (remove that \
                     file to go by the options and the header)",
                    name(header),
                    self.place,
                    name(link.header.as_ref())
                )));
            }
        }
        Ok(None)
    }

    /// Those of `list` that are to be opened: nodes that a stream has let go of may be gone with
    /// their files, and so may those that are over them alone.
    pub(super) fn present<'a>(&self, list: &'a [BlockdevOptions]) -> Vec<&'a BlockdevOptions> {
        let mut gone: HashSet<&str> = HashSet::new();
        let mut present = Vec::with_capacity(list.len());
        for options in list {
            match &options.node_name {
                Some(name) if self.released.contains(name) && is_gone(options, &gone) => {
                    log::warn!(
                        "node '{name}' is left out: its file is gone, and '{}' records that a \
                         stream has let go of it",
                        self.place
                    );
                    gone.insert(name);
                }
                _ => present.push(options),
            }
        }
        present
    }
}

/// Says that another file has the path of the one that is meant.
#[must_use]
pub fn other_file(file: &str, found: Identity, wanted: Identity) -> String {
    let text = |[inode, birth]: Identity| {
        let at = UNIX_EPOCH + Duration::from_nanos(birth);
        format!("inode {inode}, made at {}", utc(at))
    };
    format!(
        "{file} is another file ({}) than the one that was there before ({}): it was made anew, or \
         restored from a copy",
        text(found),
        text(wanted)
    )
}

/// Whether a file is missing that the node's own bytes are in.
fn is_gone(options: &BlockdevOptions, gone: &HashSet<&str>) -> bool {
    if let Driver::File(file) | Driver::HostDevice(file) = &options.driver {
        return matches!(file.filename.try_exists(), Ok(false));
    }
    let children = options.children();
    let mut own = children.iter().filter(|(key, _)| *key != "backing");
    own.any(|(_, child)| match child {
        BlockRef::Name(name) => gone.contains(name.as_str()),
        BlockRef::Inline(child) => is_gone(child, gone),
    })
}

impl Graph {
    /// What the bytes of a node's image are in: the path of a file, or a part of one in the form
    /// of a header's `json:` name.
    ///
    /// # Errors
    /// When a node under it does not exist.
    pub fn file_of(&self, node: &Node) -> Result<String> {
        self.header_name(node.file.as_deref().unwrap_or(&node.name))
    }

    /// What is recorded of the image in node `file`, whose header names `header`.
    pub(super) fn recorded_link(
        &self,
        format: &str,
        file: &Node,
        header: Option<&Backing>,
        descent: &Descent,
    ) -> Result<Option<RecordedLink>> {
        let Some(recorded) = descent.place.recorded().filter(|all| !all.links.is_empty()) else {
            return Ok(None);
        };
        let identity = file.layer.storage.identity().unwrap_or_default();
        let file = self.header_name(&file.name)?;
        Ok(recorded.link(format, &file, identity, header)?.cloned())
    }

    /// Opens the node that is recorded to lie under the image of a node with the options `above`,
    /// which is in `image`: as the options have it, where it is anywhere in the chain that they
    /// describe from `wanted` on; otherwise as it is recorded.
    pub(super) async fn open_recorded(
        &self,
        above: &BlockdevOptions,
        image: &Node,
        wanted: &BackingRef,
        below: &RecordedNode,
        descent: &mut Descent,
    ) -> Result<String> {
        if let Some(name) = &below.name {
            descent.place.wait_for(name).await;
            if let Ok(node) = self.node(name)
                && below.is(self, &node)
            {
                return Ok(node.name);
            }
        }
        let mut next = Some(wanted);
        while let Some(BackingRef::Node(node)) = next {
            match node {
                BlockRef::Name(name) => {
                    descent.place.wait_for(name).await;
                    let nodes = self.chain_nodes(name).unwrap_or_default();
                    if let Some(found) = nodes.iter().find(|node| below.is(self, node)) {
                        return Ok(found.name.clone());
                    }
                    break;
                }
                BlockRef::Inline(options) => {
                    if self.describes(options, below) {
                        return self.open_node(options, descent, Origin::Nested).await;
                    }
                    next = match &options.driver {
                        Driver::Qcow2(options) => Some(&options.backing),
                        Driver::Qed(options) => Some(&options.backing),
                        _ => None,
                    };
                }
            }
        }
        descent.step_down(&image.filename)?;
        let mut options = backing_options(above, &image.filename, &below.open_as)?;
        self.share_file(&mut options, image, descent)?;
        options.node_name = below.name.clone().filter(|name| self.node(name).is_err());
        self.open_node(&options, descent, Origin::Header).await
    }

    /// Whether a node with these options is the recorded one.
    fn describes(&self, options: &BlockdevOptions, node: &RecordedNode) -> bool {
        let (format, file) = match &options.driver {
            Driver::File(file) | Driver::HostDevice(file) => ("raw", absolute(file)),
            driver => {
                let children = options.children();
                let file = children.into_iter().find(|(key, _)| *key == "file");
                let file = file.and_then(|(_, file)| match file {
                    BlockRef::Name(name) => self.header_name(name).ok(),
                    BlockRef::Inline(file) => match &file.driver {
                        Driver::File(file) | Driver::HostDevice(file) => absolute(file),
                        _ => None,
                    },
                });
                (driver.name(), file)
            }
        };
        (format == node.format || format == "auto") && file.as_deref() == Some(&node.file)
    }
}

fn absolute(file: &FileOptions) -> Option<String> {
    let path = std::path::absolute(&file.filename).ok()?;
    Some(path.display().to_string())
}

#[cfg(test)]
mod tests;
