//! What the daemon records of its disks and jobs, and how the next one goes on with it.
//!
//! At the start what is recorded decides what lies under images ([`recorded`]), and is compared with
//! the nodes that the command line has made ([`plan`]): a job or a chain of another image is
//! nothing to guess about. Then jobs go on ([`Engine::go_on`]).

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::{Engine, Setup};
use crate::error::SyncFailure;
use crate::error::{Error, Result};
use crate::format::Format;
use crate::format::qcow2::Backing;
use crate::graph::Node;
use crate::graph::recorded::{is_same_image, is_same_place, other_file};
use crate::graph::{Graph, Recorded, RecordedLink, RecordedNode};
use crate::job::commit::CommitSpec;
use crate::job::handle::HoldsNodes;
use crate::job::records::{files_of, header, identity};
use crate::job::stream::StreamSpec;
use crate::job::{Refused, Untold};
use crate::options::ExportOptions;
use crate::state::record::{self, Identity, State, Work, are_different};
use crate::state::{StateError, StateOptions, Store};
use crate::storage::identity::contents_of;
use crate::storage::{Syncs, is_same_path};

impl From<StateError> for Error {
    fn from(error: StateError) -> Self {
        Self::Invalid(error.to_string())
    }
}

/// Opens the state that the configuration names, if it names one.
///
/// # Errors
/// When it cannot be read, or belongs to another process.
pub fn open(options: Option<&StateOptions>) -> Result<Option<Arc<Store>>> {
    let Some(StateOptions { dir, name }) = options else {
        return Ok(None);
    };
    let store = Store::open(dir, name)?;
    for failed in &store.state().failed_syncs {
        keep_failure(failed);
    }
    Ok(Some(Arc::new(store)))
}

/// What there is to be, where this is what the command line names. What the command line has learnt
/// of the changes that are recorded is taken out of the record.
///
/// # Errors
/// When the two do not fit together, or the record cannot be written.
pub fn setup(store: Option<&Arc<Store>>, named: &Setup) -> Result<Setup> {
    let Some(store) = store else {
        return Ok(named.clone());
    };
    let mut changes = store.state().changes;
    let setup = named.with(&mut changes, &store.path().display().to_string())?;
    store.change(|state| state.changes = changes)?;
    Ok(setup)
}

/// What [`setup`] is going to say, as far as is known while another process may have the state.
#[must_use]
pub fn expected(options: Option<&StateOptions>, named: &Setup) -> Setup {
    let state = options.and_then(|options| crate::state::peek(&options.dir, &options.name).ok());
    // What is wrong with it is told when it is opened.
    let setup = state.and_then(|mut state| named.with(&mut state.changes, "").ok());
    setup.unwrap_or_else(|| named.clone())
}

/// A flush that failed for an earlier process has failed for this one.
fn keep_failure(failed: &record::FailedSync) {
    let failure = SyncFailure {
        file: failed.file.clone(),
        errno: failed.errno,
        at: UNIX_EPOCH + Duration::from_secs(failed.at),
    };
    Syncs::keep(failure, failed.identity);
}

/// The record of a failed flush.
pub fn failed_sync(failure: &SyncFailure, identity: Identity) -> record::FailedSync {
    let path = std::path::absolute(&failure.file).unwrap_or_else(|_| failure.file.clone().into());
    let at = failure.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    record::FailedSync {
        file: path.display().to_string(),
        identity,
        errno: failure.errno,
        at: at.as_secs(),
    }
}

/// What is recorded of chains, for those who open images.
pub fn recorded(store: Option<&Arc<Store>>) -> Recorded {
    let Some(store) = store else {
        return Recorded::default();
    };
    let state = store.state();
    let commits = state.jobs.iter().filter_map(|job| job.commit.as_ref());
    // A job's comes first: the same image's older link is not in force any more.
    let links: Vec<(&record::Link, bool)> = commits
        .map(|commit| (&commit.link, commit.done))
        .chain(state.links.iter().map(|link| (link, true)))
        .collect();
    let mut superseding: Vec<&record::Link> = Vec::new();
    let mut released = HashSet::new();
    let mut recorded = Vec::new();
    for (link, certain) in &links {
        // Unless it is not certain: then either may be in force, and the header tells.
        if superseding.iter().any(|newer| newer.supersedes(link)) {
            continue;
        }
        if *certain {
            superseding.push(link);
        }
        released.extend(link.released.iter().cloned());
        recorded.push(RecordedLink {
            format: link.node.format.clone(),
            file: link.node.file.clone(),
            identity: link.identity,
            header: link.header.as_ref().map(backing),
            certain: *certain,
            let_go: link.let_go
                || links.iter().any(|(other, certain)| {
                    *certain && other.released_files.contains(&link.node.file)
                }),
            below: link.below.as_ref().map(|below| RecordedNode {
                name: below.node.name.clone(),
                format: below.node.format.clone(),
                file: below.node.file.clone(),
                open_as: Backing {
                    name: below.open_as.clone(),
                    format: Some(below.node.format.clone()),
                },
            }),
        });
    }
    Recorded {
        place: store.path().display().to_string(),
        links: recorded,
        released,
    }
}

fn backing(header: &record::Header) -> Backing {
    Backing {
        name: header.name.clone(),
        format: header.format.clone(),
    }
}

/// Puts exports on the images that their guests write since commits have ended, whatever the options
/// say: what those have that they name is out of date.
///
/// `own` are the exports as the options have them, `exports` as they have been changed so far.
///
/// # Errors
/// When such an image is not among those that are open.
pub fn follow_moves(
    graph: &Graph,
    store: Option<&Arc<Store>>,
    own: &[ExportOptions],
    exports: &mut [ExportOptions],
) -> Result<()> {
    let Some(store) = store else {
        return Ok(());
    };
    let state = store.state();
    let named = own.iter().flat_map(|export| image_of(graph, export));
    let named: Vec<_> = named.collect();
    for export in exports {
        // A guest may have moved several times, and never in a circle.
        for _ in 0..state.moved.len() {
            let Ok(node) = graph.image_node(&export.node_name) else {
                // A client may have removed it, since its guest has left it; or it is one that is put
                // back only with what is on top of it.
                match left_for(graph, &state.moved, &export.node_name) {
                    Some(to) => export.node_name = to,
                    None => break,
                }
                continue;
            };
            let file = graph.file_of(&node)?;
            let Some(moved) = state.moved_from((&file, identity(&node))) else {
                break;
            };
            let any = record::Node {
                name: None,
                ..moved.to.clone()
            };
            let found = find(graph, &any, moved.to_identity);
            let to = found.ok().flatten().ok_or_else(|| {
                Error::Invalid(format!(
                    "export '{}': its guest has left node '{}' for '{}', as '{}' records, and that \
                     is not open (add it to the options, or remove that file to forget this: what \
                     '{file}' has is out of date)",
                    export.id,
                    node.name,
                    moved.to.file,
                    store.path().display()
                ))
            })?;
            check_left(graph, store, moved, (export, &node))?;
            log::warn!(
                "export '{}' shows node '{}' in place of '{}', which was committed into it: name it in \
                 the options",
                export.id,
                to.name,
                node.name
            );
            if export.node_name == node.name {
                export.node_name.clone_from(&to.name);
            }
            // Filters over it.
            let mut transaction = graph.transaction();
            transaction.replace(&node.name, &to.name)?;
            drop(graph.commit(transaction)?);
        }
    }
    forget_known(graph, store, &named)
}

/// The node that a guest writes since it has left the one called `name`, which is not open.
fn left_for(graph: &Graph, moved: &[record::Moved], name: &str) -> Option<String> {
    let mut moved = moved.iter();
    let moved = moved.find(|moved| moved.from.name.as_deref() == Some(name))?;
    let any = record::Node {
        name: None,
        ..moved.to.clone()
    };
    let to = find(graph, &any, moved.to_identity).ok().flatten()?;
    Some(to.name)
}

/// The file of the image that an export shows, and what tells it from others.
fn image_of(graph: &Graph, export: &ExportOptions) -> Result<(String, Identity)> {
    let node = graph.image_node(&export.node_name)?;
    Ok((graph.file_of(&node)?, identity(&node)))
}

/// Compares what is in an image with what a guest has left there: who has made another disk of it since
/// means that one.
fn check_left(
    graph: &Graph,
    store: &Store,
    moved: &record::Moved,
    (export, node): (&ExportOptions, &Node),
) -> Result<()> {
    let (files, place) = (files_of(graph, node), store.path().display());
    let found = contents_of(&files).map_err(|error| {
        Error::Invalid(format!(
            "node '{}': when its files were changed is not known: {error}",
            node.name
        ))
    })?;
    match &moved.left {
        // The process was ended while the guest was leaving it.
        None => Ok(store.change(|state| state.keep_left(moved, found.clone()))?),
        Some(left) if *left == found => Ok(()),
        Some(_) => Err(Error::Invalid(format!(
            "export '{}': its guest has left node '{}' for '{}', as '{place}' records, and the file of that \
             node, '{}', has been changed since: it may hold another disk (expected the file as the commit \
             has left it; name the image that the guest is to have in a file of another name, or '{2}' in \
             the options without that node, or remove '{place}' to forget this)",
            export.id,
            node.name,
            moved.to.file,
            node.filename.display()
        ))),
    }
}

/// Forgets where guests have gone whose exports, which show the images of `named`, are there by their own
/// options: what was left is not open, and may become another disk.
fn forget_known(graph: &Graph, store: &Store, named: &[(String, Identity)]) -> Result<()> {
    let state = store.state();
    let known = state.moved.iter().filter(|moved| {
        let (from, to) = (
            (moved.from.file.as_str(), moved.identity),
            (moved.to.file.as_str(), moved.to_identity),
        );
        let any = record::Node {
            name: None,
            ..moved.from.clone()
        };
        let is_closed = || matches!(find(graph, &any, moved.identity), Ok(None));
        // How such a job has ended is known from it.
        let ends_a_job = || {
            state.jobs.iter().any(|job| match &job.work {
                Work::Commit(commit) => {
                    is_same_image((&commit.top.file, commit.identity), from)
                        && commit.overlay.is_none()
                }
                Work::Stream(_) => false,
            })
        };
        named
            .iter()
            .any(|(file, identity)| is_same_image((file, *identity), to))
            && is_closed()
            && !ends_a_job()
    });
    let known: Vec<_> = known.cloned().collect();
    if known.is_empty() {
        return Ok(());
    }
    let forget = |state: &mut State| state.moved.retain(|moved| !known.contains(moved));
    Ok(store.change(forget)?)
}

/// What becomes of a recorded job.
enum Next {
    /// It goes on.
    Stream(StreamSpec),
    /// It goes on.
    Commit(CommitSpec),
    /// It is listed.
    List(Option<Untold>),
}

/// The jobs to go on with.
#[derive(Default)]
pub struct Plan {
    jobs: Vec<(record::Job, Option<String>, Next)>,
}

/// Compares what is recorded with the nodes there are, and finds out what becomes of the jobs.
///
/// # Errors
/// What differs, and what to do about it.
pub fn plan(
    options: Option<&StateOptions>,
    graph: &Graph,
    store: Option<&Arc<Store>>,
) -> Result<Plan> {
    let (Some(store), Some(options)) = (store, options) else {
        return Ok(Plan::default());
    };
    let state = store.state();
    let differs = |what: String| {
        let jobs: Vec<_> = state.jobs.iter().map(|job| job.id.as_str()).collect();
        let jobs = match jobs.is_empty() {
            true => String::new(),
            false => format!(" and its jobs ({})", jobs.join(", ")),
        };
        Error::Invalid(format!(
            "the command line does not fit what '{}' records: {what} (start with the options as \
             they were, or remove that file to forget the chains{jobs}; look at the images' \
             backing files first)",
            store.path().display()
        ))
    };
    let released = released_files(graph, &state);
    // Version 1 knew the names alone.
    let old = state
        .links
        .iter()
        .filter(|link| link.released_files.is_empty());
    let left_out: HashSet<&String> = old
        .flat_map(|link| &link.released)
        .filter(|name| graph.node(name).is_err())
        .collect();
    for link in &state.links {
        let node = &link.node;
        // What lies under an image does so under any name.
        let any = record::Node {
            name: None,
            ..node.clone()
        };
        if find(graph, &any, link.identity).map_err(differs)?.is_some() {
            continue;
        }
        // Let go of since, and perhaps gone with its file. What it says of other nodes still holds.
        let gone = link.let_go
            || released.contains(&node.file)
            || node
                .name
                .as_ref()
                .is_some_and(|name| left_out.contains(name));
        if !gone {
            find(graph, node, link.identity).map_err(differs)?;
            log::warn!(
                "'{}' is not served: what lies under it stays recorded in '{}'",
                node.file,
                store.path().display()
            );
        }
    }
    let mut plan = Plan::default();
    for job in &state.jobs {
        let next = match is_left(job) {
            true => None,
            false => next(graph, job, (&released, &state.moved)).map_err(differs)?,
        };
        if let Some(in_force) = decided(graph, job) {
            // What the header says is in force from here on.
            let decided = store.happened(|state| state.decide(job.number, in_force));
            if let Err(error) = decided {
                log::error!(
                    "what became of job '{}' is not recorded yet: {error}",
                    job.id
                );
            }
        }
        match next {
            _ if is_left(job) => {}
            Some((target, next)) => plan.jobs.push((job.clone(), target, next)),
            None => log::warn!(
                "job '{}' stays recorded in '{}': the image that it is about is not served",
                job.id,
                store.path().display()
            ),
        }
    }
    check_failures(graph, options)?;
    Ok(plan)
}

/// The files of images that streams have let go of.
fn released_files(graph: &Graph, state: &State) -> HashSet<String> {
    let commits = state.jobs.iter().filter_map(|job| job.commit.as_ref());
    let in_force = commits.filter(|commit| {
        let link = &commit.link;
        let shows = || find(graph, &link.node, link.identity).ok().flatten();
        commit.done || shows().is_some_and(|node| header_of(&node) == link.header)
    });
    let links = in_force.map(|commit| &commit.link).chain(&state.links);
    links
        .flat_map(|link| &link.released_files)
        .cloned()
        .collect()
}

/// Tells of failed flushes whose files were not opened; refuses to serve another file under the
/// path of one.
fn check_failures(graph: &Graph, options: &StateOptions) -> Result<()> {
    for (failure, wanted) in Syncs::waiting() {
        let nodes = graph.nodes();
        let other = nodes.iter().find(|node| {
            are_different(identity(node), wanted)
                && is_same_path(&node.filename, Path::new(&failure.file))
        });
        if let Some(node) = other {
            let dir = options.dir.display();
            return Err(Error::Invalid(format!(
                "{}, of which a failed flush is recorded (put that one back; or, when this one is \
                 known to be good: stratactl image clear-error '{}' --state '{dir}')",
                other_file(&failure.file, identity(node), wanted),
                failure.file
            )));
        }
        log::warn!(
            "a failed flush is recorded of '{}', and no image is in that file: the record stays \
             until one is, or until 'stratactl image clear-error'",
            failure.file
        );
    }
    Ok(())
}

/// The node that a record means: under whatever path its file is now. `None` if its image is not
/// open, and what is open is not in its place.
pub(super) fn find(
    graph: &Graph,
    wanted: &record::Node,
    of: Identity,
) -> std::result::Result<Option<Node>, String> {
    let file_of = |node: &Node| graph.file_of(node).unwrap_or_default();
    let is_named = |node: &Node| wanted.name.as_ref().is_none_or(|name| *name == node.name);
    // A file is a disk of its own only where the record is about that node.
    let is_meant = |node: &Node| !node.is_file() || (wanted.name.is_some() && is_named(node));
    let is_it = |node: &&Node| {
        is_meant(node) && is_same_image((&wanted.file, of), (&file_of(node), identity(node)))
    };
    let nodes = graph.nodes();
    let images: Vec<&Node> = nodes.iter().filter(is_it).collect();
    let fits = |node: &&&Node| node.format_name() == wanted.format && is_named(node);
    if let Some(node) = images.iter().find(fits) {
        return Ok(Some((*node).clone()));
    }
    let named = wanted.name.as_ref().and_then(|name| graph.node(name).ok());
    let image = images.first();
    let (found, image) = match (named, image) {
        (Some(node), _) => (node, image),
        (None, Some(image)) if wanted.name.is_none() => ((*image).clone(), Some(image)),
        (None, Some(image)) => {
            return Err(format!(
                "there is no node '{}', the {} image in '{}'; '{}' is",
                wanted.name.as_deref().unwrap_or_default(),
                wanted.format,
                wanted.file,
                image.name
            ));
        }
        (None, None) => return Ok(None),
    };
    let (name, file) = (&found.name, file_of(&found));
    Err(match image {
        Some(image) if image.name == *name => format!(
            "node '{name}' is of format {}, and was of format {}",
            found.format_name(),
            wanted.format
        ),
        _ if is_same_place(&file, &wanted.file) => other_file(&file, identity(&found), of),
        _ => format!("node '{name}' is in '{file}', and was in '{}'", wanted.file),
    })
}

/// Whether this is what a failed job has left that nobody is to see.
fn is_left(job: &record::Job) -> bool {
    job.end.is_some() && job.auto_dismiss
}

/// Whether the result of a job that is over or goes on is in force, if that was open until now.
fn decided(graph: &Graph, job: &record::Job) -> Option<bool> {
    let commit = job.commit.as_ref().filter(|commit| !commit.done)?;
    let link = &commit.link;
    let any = record::Node {
        name: None,
        ..link.node.clone()
    };
    let node = find(graph, &any, link.identity).ok().flatten()?;
    let in_force = header_of(&node) == link.header;
    // That one has completed, and its end is told.
    (job.end.is_some() || !in_force).then_some(in_force)
}

/// What becomes of a job, and the name of the node that it is about; `None` if its image is not
/// open.
fn next(
    graph: &Graph,
    job: &record::Job,
    (released, moved): (&HashSet<String>, &[record::Moved]),
) -> std::result::Result<Option<(Option<String>, Next)>, String> {
    let (wanted, identity) = job.work.target();
    let target = find(graph, wanted, identity);
    if let Some(moved) = turn_of(job, moved) {
        // The image that it was about need not be there any more.
        let to = record::Node {
            name: None,
            ..moved.to.clone()
        };
        let to = find(graph, &to, moved.to_identity).ok().flatten();
        let untold = job.end.is_none().then_some(Untold::Completed);
        return Ok(Some((to.map(|node| node.name), Next::List(untold))));
    }
    let gone = !matches!(target, Ok(Some(_))) && released.contains(&wanted.file);
    if job.end.is_some() && (job.commit.is_none() || gone) {
        // It changed nothing, or not what is there now: there is nothing to compare.
        let target = target.ok().flatten();
        return Ok(Some((target.map(|node| node.name), Next::List(None))));
    }
    let target = target.map_err(|what| format!("job '{}': {what}", job.id))?;
    let Some(target) = target else {
        return Ok(None);
    };
    let name = Some(target.name.clone());
    if job.end.is_some() {
        return Ok(Some((name, Next::List(None))));
    }
    if let Some(commit) = &job.commit
        && header_of(&target) == commit.link.header
    {
        return Ok(Some((name, Next::List(Some(Untold::Completed)))));
    }
    if job.cancelled {
        return Ok(Some((name, Next::List(Some(Untold::Cancelled)))));
    }
    let chain = graph.chain_nodes(&target.name);
    let chain = chain.map_err(|error| error.to_string())?;
    let next = match &job.work {
        Work::Stream(stream) => Next::Stream(stream_spec(graph, &job.id, stream, &chain)?),
        Work::Commit(commit) => Next::Commit(commit_spec(graph, &job.id, commit, &chain)?),
    };
    Ok(Some((name, next)))
}

/// What is recorded of the turn of a commit of the layer that a guest wrote, if it has come to that.
fn turn_of<'m>(job: &record::Job, moved: &'m [record::Moved]) -> Option<&'m record::Moved> {
    let Work::Commit(commit) = &job.work else {
        return None;
    };
    let mut moved = moved.iter();
    let is_its = |moved: &&record::Moved| {
        is_same_place(&moved.to.file, &commit.base.file)
            && is_same_image(
                (&moved.from.file, moved.identity),
                (&commit.top.file, commit.identity),
            )
    };
    moved.find(is_its).filter(|_| commit.overlay.is_none())
}

/// Where the image `wanted` is under the first of `chain`, which is job `id`'s.
fn place(
    graph: &Graph,
    id: &str,
    (what, wanted): (&str, &record::Node),
    chain: &[Node],
) -> std::result::Result<usize, String> {
    let found = chain.iter().skip(1).position(|node| {
        let is_there = |file: String| is_same_place(&file, &wanted.file);
        let image = graph.image_node(&node.name);
        let file = image.and_then(|image| graph.file_of(&image));
        node.format_name() == wanted.format && file.is_ok_and(is_there)
    });
    found.map(|at| at + 1).ok_or_else(|| {
        format!(
            "job '{id}': its {what}, the {} image in '{}', is not under node '{}'",
            wanted.format,
            wanted.file,
            chain.first().map_or("", |node| node.name.as_str())
        )
    })
}

fn names<'n>(nodes: impl Iterator<Item = &'n Node>) -> Vec<String> {
    nodes.map(|node| node.name.clone()).collect()
}

/// What is left of a stream into the first of `chain`.
fn stream_spec(
    graph: &Graph,
    id: &str,
    stream: &record::Stream,
    chain: &[Node],
) -> std::result::Result<StreamSpec, String> {
    let end = match &stream.base {
        None => chain.len(),
        Some(base) => place(graph, id, ("base", base), chain)?,
    };
    let layers = names(chain.iter().take(end));
    Ok(StreamSpec {
        target: layers.first().cloned().unwrap_or_default(),
        base: chain.get(end).map(|node| node.name.clone()),
        layers,
        backing_file: stream.backing_file.clone(),
        compress: stream.compress,
    })
}

/// What is left of a commit of layers under the first of `chain`.
fn commit_spec(
    graph: &Graph,
    id: &str,
    commit: &record::Committed,
    chain: &[Node],
) -> std::result::Result<CommitSpec, String> {
    let above = usize::from(commit.overlay.is_some());
    let top = match above {
        0 => 0,
        _ => place(graph, id, ("top", &commit.top), chain)?,
    };
    let base = place(graph, id, ("base", &commit.base), chain)?;
    let name = |at: usize| chain.get(at).map(|node| node.name.clone());
    match name(base) {
        Some(node) if top == above && base > top => Ok(CommitSpec {
            overlay: top.checked_sub(1).and_then(name),
            layers: names(chain.iter().take(base).skip(top)),
            base: node,
            backing_file: commit.backing_file.clone(),
        }),
        _ => Err(format!(
            "job '{id}': '{}' is not right under the image over it, with '{}' below (expected the \
             chain as it was)",
            commit.top.file, commit.base.file
        )),
    }
}

fn header_of(node: &Node) -> Option<record::Header> {
    match &node.layer.format {
        Format::Qcow2(image) => image.backing().as_ref().map(header),
        Format::Raw(_) | Format::Qed(_) => None,
    }
}

impl Engine {
    /// Goes on with the jobs.
    pub fn go_on(&self, plan: Plan) {
        for (job, target, next) in plan.jobs {
            let id = job.id.clone();
            let gone_on = match &next {
                Next::Stream(spec) => self.restore_stream(&job, spec),
                Next::Commit(spec) => self.restore_commit(&job, spec),
                Next::List(_) => Ok(()),
            };
            let untold = match (gone_on, next) {
                (Err(Refused(text)), _) => Some(Some(Untold::Failed(text))),
                (Ok(()), Next::List(untold)) => Some(untold),
                (Ok(()), _) => None,
            };
            let result = match untold {
                Some(untold) => self.list(&job, target, untold),
                None => Ok(()),
            };
            if let Err(error) = result {
                log::error!("job '{id}', which is recorded: {error}");
            }
        }
    }

    /// Lists a job that is over, and was about node `target`.
    fn list(
        &self,
        job: &record::Job,
        target: Option<String>,
        untold: Option<Untold>,
    ) -> std::result::Result<(), Refused> {
        let completed = job.end.as_ref().is_some_and(|end| end.error.is_none());
        let lease = match HoldsNodes::of(&job.work).after(completed) {
            true => self.jobs.reserve(target.as_slice(), job.work.kind()).ok(),
            false => None,
        };
        self.jobs.restore_over(job, lease, untold)
    }
}
