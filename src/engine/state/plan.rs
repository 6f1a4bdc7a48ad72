//! What is recorded beside the nodes there are: what becomes of the jobs.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use super::find;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::graph::recorded::{is_same_image, is_same_place, other_file};
use crate::graph::{Graph, Node};
use crate::job::commit::CommitSpec;
use crate::job::handle::HoldsNodes;
use crate::job::records::{header_of, identity};
use crate::job::stream::StreamSpec;
use crate::job::{Refused, Untold};
use crate::state::record::{self, State, Work, are_different};
use crate::state::{StateOptions, Store};
use crate::storage::{Syncs, is_same_path};

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
