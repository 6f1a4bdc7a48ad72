//! Chains as an earlier process has left them.
//!
//! A stream's end changes what lies under an image. The options that the next process is started with
//! may still say what lay there before, and from then on that would be wrong: the image may have
//! discarded clusters since, through which the old layers would come to light. So what was recorded
//! wins over the options, as long as the image's header is as the stream has left it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use serde_json::Value;

use super::driver;
use super::{Graph, Node, State};
use crate::error::{Error, Result, utc};
use crate::format::qcow2::Backing;
use crate::options::{BlockRef, BlockdevOptions, Driver};
use crate::storage::{Identity, are_different, is_known, is_same_file};

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
    /// Another stream has let go of the image since.
    pub let_go: bool,
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
    pub(super) fn is(&self, graph: &State, node: &Node) -> bool {
        let is_here = |file: String| is_same_place(&file, &self.file);
        if node.format_name() == self.format && graph.file_of(node).is_ok_and(is_here) {
            return true;
        }
        // Filters used to be recorded as raw disks in the files of their images.
        let image = || graph.file_of(graph.image_node(&node.name)?);
        node.is_filter() && self.format == "raw" && image().is_ok_and(is_here)
    }
}

impl Recorded {
    /// What is recorded of the image in `file`, whose header names `header`: whatever path it had
    /// then.
    pub(super) fn link(
        &self,
        format: &str,
        file: &str,
        identity: Identity,
        header: Option<&Backing>,
    ) -> Result<Option<&RecordedLink>> {
        let links = || self.links.iter().filter(|link| link.format == format);
        let mut known = false;
        for link in links() {
            if !is_same_image((&link.file, link.identity), (file, identity)) {
                continue;
            }
            known = true;
            if link.header.as_ref() == header {
                return Ok(Some(link));
            }
            // Under the path of one that was let go of there may be a new one.
            let told_apart = is_known(link.identity) && is_known(identity);
            if link.certain && (told_apart || !link.let_go) {
                return Err(self.other_header(file, header, link));
            }
        }
        let other = links().find(|link| {
            // One that is sure to be no copy may take the place of one that was let go of.
            let may_be_meant = !link.let_go || link.header.as_ref() == header;
            may_be_meant
                && are_different(link.identity, identity)
                && is_same_place(&link.file, file)
        });
        match other {
            Some(link) if !known => Err(Error::Invalid(format!(
                "{}, and '{}' records what lies under that one (put it back, or remove that \
                 file to go by the options and the header; look at the images' backing files \
                 first)",
                other_file(file, identity, link.identity),
                self.place
            ))),
            _ => Ok(None),
        }
    }

    fn other_header(&self, file: &str, header: Option<&Backing>, link: &RecordedLink) -> Error {
        let name = |backing: Option<&Backing>| match backing {
            Some(backing) => format!("'{}'", backing.name),
            None => "no backing file".to_owned(),
        };
        Error::Invalid(format!(
            "{file}: the image's header names {}, and '{}' records that it named {} when a stream \
             had ended: something else has changed the image since (remove that file to go by the \
             options and the header)",
            name(header),
            self.place,
            name(link.header.as_ref())
        ))
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

/// Whether a record of an image is about another one, which is recorded or open: what they are in,
/// as [`Graph::file_of`] tells it, and its identity.
#[must_use]
pub fn is_same_image(one: (&str, Identity), other: (&str, Identity)) -> bool {
    let ((path, part), (other_path, other_part)) = (place(one.0), place(other.0));
    part == other_part && is_same_file((&path, one.1), (&other_path, other.1))
}

/// Whether two images are in the same place, as [`Graph::file_of`] tells it.
#[must_use]
pub fn is_same_place(one: &str, other: &str) -> bool {
    is_same_image((one, Identity::default()), (other, Identity::default()))
}

/// The path of a file, and which part of it is meant.
fn place(file: &str) -> (PathBuf, Value) {
    let described = file.strip_prefix("json:");
    let mut part = described
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default();
    let path = take_path(&mut part).unwrap_or_else(|| file.to_owned());
    (path.into(), part)
}

fn take_path(part: &mut Value) -> Option<String> {
    let members = part.as_object_mut()?;
    if let Some(Value::String(path)) = members.remove("filename") {
        return Some(path);
    }
    take_path(members.get_mut("file")?)
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
    if let Some(path) = driver::of(&options.driver).path() {
        return matches!(path.try_exists(), Ok(false));
    }
    let children = options.children();
    let mut own = children.iter().filter(|(key, _)| *key != "backing");
    own.any(|(_, child)| match child {
        BlockRef::Name(name) => gone.contains(name.as_str()),
        BlockRef::Inline(child) => is_gone(child, gone),
    })
}

impl Graph {
    /// As [`State::file_of`], now.
    ///
    /// # Errors
    /// When a node under it does not exist.
    pub fn file_of(&self, node: &Node) -> Result<String> {
        self.state().file_of(node)
    }
}

impl State {
    /// What the bytes of a node's image are in: the path of a file, or a part of one in the form
    /// of a header's `json:` name.
    ///
    /// # Errors
    /// When a node under it does not exist.
    pub fn file_of(&self, node: &Node) -> Result<String> {
        self.bytes_name(node.file().unwrap_or(&node.name))
    }

    /// Whether a node with these options is the recorded one.
    pub(super) fn describes(&self, options: &BlockdevOptions, node: &RecordedNode) -> bool {
        let (format, file) = match driver::of(&options.driver).path() {
            Some(path) => ("raw", absolute(path)),
            None => {
                // Failures that are told to happen change no bytes.
                let format = match options.driver {
                    Driver::Blkdebug(_) => "raw",
                    _ => options.driver.name(),
                };
                (format, self.place_of(options))
            }
        };
        let is_here = |file: String| is_same_place(&file, &node.file);
        (format == node.format || format == "auto") && file.is_some_and(is_here)
    }
}

impl State {
    /// What the bytes of a node with these options are in, where that is a whole file or a node.
    fn place_of(&self, options: &BlockdevOptions) -> Option<String> {
        if let Some(path) = driver::of(&options.driver).path() {
            return absolute(path);
        }
        let children = options.children();
        let mut own = children.into_iter();
        match own.find(|(key, _)| matches!(*key, "file" | "image"))?.1 {
            BlockRef::Name(name) => self.bytes_name(name).ok(),
            BlockRef::Inline(inner) => match inner.driver {
                Driver::Blkdebug(_) => self.place_of(inner),
                _ => driver::of(&inner.driver).path().and_then(absolute),
            },
        }
    }
}

fn absolute(path: &Path) -> Option<String> {
    let path = std::path::absolute(path).ok()?;
    Some(path.display().to_string())
}

#[cfg(test)]
mod tests;
