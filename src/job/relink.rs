//! What makes the result of a job count that takes layers away: the image above them names what is
//! under it from then on.
//!
//! The end of a stream and of a commit between layers are the same here: everything copied is stable,
//! then the image's header names the base, then the graph has the base under the image.

use std::sync::Arc;

use super::records::{self, Recording};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::format::qcow2::{Backing, Qcow2};
use crate::graph::{Grant, Graph, Node, Released, resolve};
use crate::planted::{Fault, is_planted};
use crate::state::record;

/// An image that is to have another one under it, or none.
pub(super) struct Relink {
    pub graph: Arc<Graph>,
    /// The node of the image.
    pub target: String,
    /// What is to be under it.
    pub base: Option<String>,
    /// What to write into the header, where the base's own name is not wanted.
    pub backing_file: Option<String>,
    /// Where the result is recorded.
    pub recording: Option<Recording>,
}

impl Relink {
    /// The order matters: everything copied is stable before the header changes, and the header
    /// is stable before anybody hears of it. What the header will say is recorded before, so that a
    /// process that finds it knows that the stream has ended; and that it does say so is recorded
    /// before the layers between are let go of, since what is discarded from then on must never be
    /// read through to them.
    ///
    /// # Errors
    /// When the header cannot be written, or the graph has changed. Returns what is left of the graph
    /// before.
    pub async fn put_in_force(&self, grant: &Grant) -> Result<Released> {
        let node = self.graph.image_node(&self.target)?;
        let Format::Qcow2(image) = &node.layer.format else {
            // A raw layer has nothing under it, and no header that could say so.
            return Ok(Released::default());
        };
        let backing = match &self.base {
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
            return self.let_go(grant);
        };
        if is_planted(Fault::HeaderStays) {
            return self.let_go(grant);
        }
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
        self.let_go(grant)
    }

    /// Puts the base under the target.
    fn let_go(&self, grant: &Grant) -> Result<Released> {
        grant.set_backing(&self.target, self.base.as_deref())
    }

    /// The job's result, as it is recorded, where the header is to name `backing`. It stays
    /// recorded when the job is gone: the options of a later start may name other layers, whatever
    /// those of this one say.
    fn commit(&self, image: &Qcow2, backing: Option<&Backing>) -> Result<record::Commit> {
        let nodes = self.graph.chain_nodes(&self.target)?;
        let base = nodes
            .iter()
            .find(|node| Some(&node.name) == self.base.as_ref());
        let target = self.graph.node(&self.target)?;
        let below = base
            .map(|base| records::below(&self.graph, base))
            .transpose()?;
        let taken = nodes.iter().skip(1);
        let taken = taken.take_while(|node| Some(&node.name) != self.base.as_ref());
        let released_files = taken.clone().map(|node| self.graph.file_of(node));
        Ok(record::Commit {
            link: record::Link {
                node: records::node(&self.graph, &target)?,
                identity: image.storage().identity().unwrap_or_default(),
                header: backing.map(records::header),
                below,
                released_files: released_files.collect::<Result<_>>()?,
                let_go: false,
                released: records::names_of(&self.graph, taken),
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

/// Checks that the header of node `target`'s image can name `base` at the end, which may be hours away.
///
/// # Errors
/// When it cannot.
pub(super) fn check_name(
    graph: &Graph,
    target: &str,
    base: &str,
    name: Option<String>,
) -> Result<()> {
    let Format::Qcow2(image) = &graph.image_node(target)?.layer.format else {
        return Ok(());
    };
    let backing = backing(graph, target, base, name)?;
    image.check_backing(&backing).map_err(|error| {
        Error::Invalid(format!(
            "The image of node '{target}' could not name its new backing file, node '{base}', at \
             the end: {error} (give a shorter name with 'backing-file', or files with shorter paths)"
        ))
    })
}
