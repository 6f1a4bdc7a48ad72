//! What other states of the same folder say of the images that this daemon serves.
//!
//! Daemons share a folder under names of their own. One that is started with another name than the
//! last time would not hear what was recorded of its images.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::recorded::{is_same_image, is_same_place};
use crate::graph::{Graph, Role};
use crate::job::records::identity;
use crate::options::ExportOptions;
use crate::state::record::{self, Identity, State};
use crate::state::{self, StateOptions, Store};
use crate::storage::is_same_file;

/// Refuses to serve images that another state of the folder has something to say about: under
/// another name that would not be heard.
///
/// # Errors
/// Says which state that is, and what to do.
pub fn check(
    exports: &[ExportOptions],
    options: Option<&StateOptions>,
    graph: &Graph,
    store: Option<&Arc<Store>>,
) -> Result<()> {
    let (Some(options), Some(store)) = (options, store) else {
        return Ok(());
    };
    let others = state::others(&options.dir, &options.name)?;
    if others.is_empty() {
        return Ok(());
    }
    let served = served(exports, graph)?;
    for other in others {
        let found = match &other.state {
            Ok(state) => served.iter().find_map(|image| {
                let what = image.matter_in(state, other.running)?;
                Some((image, what))
            }),
            Err(error) => {
                // What cannot be understood may be about it where it names it.
                if let Some(image) = served.iter().find(|image| image.is_named_in(&other.text)) {
                    return Err(Error::Invalid(format!(
                        "export '{}': another daemon's state in the same folder may be about \
                         '{}', and cannot be understood: {error}",
                        image.export, image.file
                    )));
                }
                log::warn!("another daemon's state: {error}");
                None
            }
        };
        let Some((image, what)) = found else {
            continue;
        };
        let name = other.path.file_stem().unwrap_or_default().to_string_lossy();
        let instead = match &what {
            Matter::Flush(file) => format!(
                "when the image is known to be good: stratactl image clear-error '{file}' \
                 --state '{}'",
                options.dir.display()
            ),
            _ => "remove the former to forget it".to_owned(),
        };
        return Err(Error::Invalid(format!(
            "export '{}': '{}' records {what}, and this daemon's state is '{}' (start it with \
             --state-name={name}, or {instead})",
            image.export,
            other.path.display(),
            store.path().display()
        )));
    }
    Ok(())
}

/// What another state says of an image.
enum Matter {
    /// A job that changes it.
    Job(String),
    /// Something else lies under it than what was opened.
    Chain(String),
    /// Another image is on top of it, and its guest writes there.
    Covered(String, String),
    /// Its guest writes another image.
    Left(String),
    /// It could not be made stable.
    Flush(String),
}

impl std::fmt::Display for Matter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Job(file) => write!(f, "a job that changes '{file}'"),
            Self::Chain(file) => write!(f, "another chain under '{file}' than what was opened"),
            Self::Covered(file, top) => {
                write!(
                    f,
                    "that '{top}' is on top of '{file}', which would be served"
                )
            }
            Self::Left(file) => write!(f, "that the guest of '{file}' writes another image"),
            Self::Flush(file) => write!(f, "a failed flush of '{file}'"),
        }
    }
}

/// An image in the chain of an export.
struct Served {
    export: String,
    format: &'static str,
    file: String,
    path: PathBuf,
    identity: Identity,
    /// The guest writes it.
    is_top: bool,
    /// Format and place of what was opened under it.
    below: Option<(&'static str, String)>,
    /// The files that a flush of it makes stable.
    files: Vec<(PathBuf, Identity)>,
}

impl Served {
    /// Why another daemon's `state` must not be passed over. One that is `running` sees to failed
    /// flushes itself.
    fn matter_in(&self, state: &State, running: bool) -> Option<Matter> {
        let under_way = state.jobs.iter().filter(|job| job.end.is_none());
        let mut changed = under_way.flat_map(|job| job.work.changed());
        if changed.any(|(node, identity)| self.is((&node.file, identity))) {
            return Some(Matter::Job(self.file.clone()));
        }
        let commits = state.jobs.iter().filter_map(|job| job.commit.as_ref());
        let mut links = commits.map(|commit| &commit.link).chain(&state.links);
        if links.any(|link| self.differs_from(link)) {
            return Some(Matter::Chain(self.file.clone()));
        }
        let mut tops = state.tops.iter().filter(|_| self.is_top);
        let is_covered = |top: &&record::Top| {
            self.is((&top.covered.file, top.identity)) && !state.has_let_go(top)
        };
        if let Some(top) = tops.find(is_covered) {
            let (file, top) = (self.file.clone(), top.top.file.clone());
            return Some(Matter::Covered(file, top));
        }
        if state.moved_from((&self.file, self.identity)).is_some() {
            return Some(Matter::Left(self.file.clone()));
        }
        let mut failed = state.failed_syncs.iter().filter(|_| !running);
        let failed = failed.find(|failed| {
            let recorded = (Path::new(&failed.file), failed.identity);
            let is_it = |file: &(PathBuf, Identity)| is_same_file(recorded, (&file.0, file.1));
            self.files.iter().any(is_it)
        })?;
        Some(Matter::Flush(failed.file.clone()))
    }

    fn is(&self, image: (&str, Identity)) -> bool {
        is_same_image(image, (&self.file, self.identity))
    }

    /// Whether `link` is about it and says that something else lies under it.
    fn differs_from(&self, link: &record::Link) -> bool {
        let same = match (&self.below, &link.below) {
            (None, None) => true,
            (Some((format, file)), Some(below)) => {
                *format == below.node.format && is_same_place(file, &below.node.file)
            }
            _ => false,
        };
        !same && self.format == link.node.format && self.is((&link.node.file, link.identity))
    }

    /// Whether its file's name is anywhere in `text`, as the end of a path.
    fn is_named_in(&self, text: &[u8]) -> bool {
        let name = self.path.file_name().unwrap_or_default().as_encoded_bytes();
        let name = [b"/", name].concat();
        text.windows(name.len()).any(|part| part == name)
    }
}

/// All images that the exports serve.
fn served(exports: &[ExportOptions], graph: &Graph) -> Result<Vec<Served>> {
    let (state, mut served) = (graph.state(), Vec::new());
    for export in exports {
        let top = &state.image_node(&export.node_name)?.name;
        for chain in state.suppliers(&export.node_name)?.into_iter().rev() {
            let mut below = None;
            for node in chain.into_iter().rev() {
                let file = state.file_of(node)?;
                let mut files = vec![(node.filename.clone(), identity(node))];
                if let Some(data) = node.child(Role::DataFile) {
                    let data = state.node(data)?;
                    let identity = data.layer.storage.identity();
                    files.push((data.filename.clone(), identity.unwrap_or_default()));
                }
                served.push(Served {
                    export: export.id.clone(),
                    format: node.format_name(),
                    identity: identity(node),
                    is_top: node.name == *top,
                    below: below.replace((node.format_name(), file.clone())),
                    file,
                    path: node.filename.clone(),
                    files,
                });
            }
        }
    }
    // The one on top is the one that people know.
    served.reverse();
    Ok(served)
}
