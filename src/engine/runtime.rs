//! What comes and goes while the daemon runs, and how the next process knows of it.
//!
//! The record is the difference to the command line ([`Changes`]): the options of what was added,
//! and those of what the command line names and is not there any more. So a start with the same
//! command line finds everything as it was ([`Setup::with`]), and one whose command line has learnt
//! of a change in the meantime does too. Anything else is nothing to guess about.
//!
//! Changes are put in force and recorded one after the other, and readers wait for none of them. A
//! change that cannot be recorded is taken back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use serde_json::Value;

use super::Engine;
use super::incidents::Incidents;
use super::objects::Objects;
use crate::error::{Error, Result};
use crate::job::{EventSink, Refused};
use crate::options::{
    BlockRef, BlockdevOptions, ConfigError, Dialect, ExportOptions, ObjectOptions,
};
use crate::state::StateOptions;
use crate::state::record::{Changed, Changes, Identity, Link, State};

/// How long one for whom guests wait waits for another change to be recorded.
const PATIENCE: Duration = Duration::from_secs(2);

/// What keeps a daemon from serving while an earlier one may still be at work on the same export.
pub trait Fences: Send + Sync {
    /// Takes the fence of an export that is to be made. May wait for the end of another process.
    ///
    /// # Errors
    /// When it cannot be had.
    fn take(&self, export: &ExportOptions) -> Result<()>;

    /// Gives the fence of an export back, all of whose requests have ended.
    fn give_back(&self, export: &str);
}

/// No fences: for a process that is alone with its files.
#[derive(Debug, Default)]
pub struct NoFences;

impl Fences for NoFences {
    fn take(&self, _export: &ExportOptions) -> Result<()> {
        Ok(())
    }

    fn give_back(&self, _export: &str) {}
}

/// What the daemon is made of, as options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// Helper objects.
    pub objects: Vec<ObjectOptions>,
    /// Nodes, each after those that it refers to.
    pub nodes: Vec<BlockdevOptions>,
    /// Exports.
    pub exports: Vec<ExportOptions>,
}

/// Options that have a name and can be recorded.
trait Named: Sized + Clone + PartialEq {
    /// What such a thing is, for messages.
    const WHAT: &'static str;
    /// Where the name stands in the options.
    const KEY: &'static str;

    fn name(&self) -> &str;
    fn write(&self) -> Value;
    fn read(value: &Value) -> std::result::Result<Self, ConfigError>;
}

impl Named for BlockdevOptions {
    const WHAT: &'static str = "node";
    const KEY: &'static str = "node-name";

    fn name(&self) -> &str {
        self.node_name.as_deref().unwrap_or_default()
    }

    fn write(&self) -> Value {
        self.clone().with_absolute_paths().to_value()
    }

    fn read(value: &Value) -> std::result::Result<Self, ConfigError> {
        Self::from_value(value, Dialect::Recorded)
    }
}

impl Named for ExportOptions {
    const WHAT: &'static str = "export";
    const KEY: &'static str = "id";

    fn name(&self) -> &str {
        &self.id
    }

    fn write(&self) -> Value {
        self.clone().with_absolute_paths().to_value()
    }

    fn read(value: &Value) -> std::result::Result<Self, ConfigError> {
        Self::from_value(value, Dialect::Recorded)
    }
}

impl Named for ObjectOptions {
    const WHAT: &'static str = "object";
    const KEY: &'static str = "id";

    fn name(&self) -> &str {
        self.id()
    }

    fn write(&self) -> Value {
        self.to_value()
    }

    fn read(value: &Value) -> std::result::Result<Self, ConfigError> {
        Self::from_value(value, Dialect::Recorded)
    }
}

/// What is recorded of one thing that the command line may name as well.
fn is_of<T: Named>(value: &Value, name: &str) -> bool {
    value.get(T::KEY).and_then(Value::as_str) == Some(name)
}

impl Changed {
    /// Something has come.
    fn add(&mut self, options: &impl Named) {
        self.added.push(options.write());
    }

    /// What is called `name` has gone. `own` is what the command line says of it.
    fn remove<T: Named>(&mut self, name: &str, own: Option<&T>) {
        let before = self.added.len();
        self.added.retain(|value| !is_of::<T>(value, name));
        if self.added.len() == before
            && let Some(own) = own
        {
            self.removed.push(own.write());
        }
    }

    /// What there is, where the command line names `own`. What the command line has learnt of is no
    /// difference any more, and is taken out of the record.
    fn apply<T: Named>(&mut self, own: &[T], place: &str) -> Result<Vec<T>> {
        let differs = |name: &str| {
            Error::Invalid(format!(
                "the command line does not fit what '{place}' records of {} '{name}': it was \
                 changed while the daemon ran, and has other options on this command line (start \
                 with the options as they were, or as the record has them)",
                T::WHAT
            ))
        };
        let read = |value: &Value| {
            T::read(value).map_err(|error| {
                let name = value.get(T::KEY).and_then(Value::as_str);
                let name = name.unwrap_or_default();
                let what = T::WHAT;
                Error::Invalid(format!("'{place}' records {what} '{name}': {error}"))
            })
        };
        let mut list = own.to_vec();
        let mut removed = Vec::new();
        for value in self.removed.drain(..) {
            let gone = read(&value)?;
            let Some(at) = list.iter().position(|one| one.name() == gone.name()) else {
                continue;
            };
            let one = list.remove(at);
            // The command line may say by now what the record says.
            let learnt = self.added.iter().filter_map(|value| T::read(value).ok());
            let learnt = learnt.filter(|added| added.name() == gone.name());
            if one.write() == gone.write() {
                removed.push(value);
            } else if learnt
                .last()
                .is_some_and(|added| added.write() == one.write())
            {
                list.insert(at, one);
            } else {
                return Err(differs(gone.name()));
            }
        }
        self.removed = removed;
        let mut added = Vec::new();
        for value in self.added.drain(..) {
            let come = read(&value)?;
            match list.iter().find(|one| one.name() == come.name()) {
                None => {
                    list.push(come);
                    added.push(value);
                }
                Some(one) if one.write() == come.write() => {}
                Some(_) => return Err(differs(come.name())),
            }
        }
        self.added = added;
        Ok(list)
    }
}

impl Setup {
    /// What there is to be where this is the command line's and `changes` are recorded in `place`.
    ///
    /// # Errors
    /// What differs, and what to do about it.
    pub fn with(&self, changes: &mut Changes, place: &str) -> Result<Self> {
        let mut setup = Self {
            objects: changes.objects.apply(&self.objects, place)?,
            nodes: changes.nodes.apply(&self.nodes, place)?,
            exports: changes.exports.apply(&self.exports, place)?,
        };
        arrange(&mut setup.nodes);
        Ok(setup)
    }
}

/// Puts each node after those that it refers to: a node that was reopened may refer to one that was
/// added later. What refers to nothing that is here stays where it is.
fn arrange(nodes: &mut Vec<BlockdevOptions>) {
    let mut left: Vec<BlockdevOptions> = std::mem::take(nodes);
    while !left.is_empty() {
        let names: Vec<String> = left.iter().flat_map(names_in).collect();
        let is_ready = |node: &BlockdevOptions| {
            let own = names_in(node);
            let refers = references(node);
            !refers
                .iter()
                .any(|name| names.contains(name) && !own.contains(name))
        };
        // A circle is for those to refuse that open it.
        let at = left.iter().position(is_ready).unwrap_or(0);
        nodes.push(left.remove(at));
    }
}

/// The names of a node and of those that are written inside it.
pub(super) fn names_in(node: &BlockdevOptions) -> Vec<String> {
    let mut names: Vec<String> = node.node_name.iter().cloned().collect();
    for (_, child) in node.children() {
        if let BlockRef::Inline(child) = child {
            names.extend(names_in(child));
        }
    }
    names
}

/// The names of nodes that a node, or one written inside it, refers to.
pub(super) fn references(node: &BlockdevOptions) -> Vec<String> {
    let mut names = Vec::new();
    for (_, child) in node.children() {
        match child {
            BlockRef::Name(name) => names.push(name.clone()),
            BlockRef::Inline(child) => names.extend(references(child)),
        }
    }
    names
}

/// The rest of what operations at run time need.
pub struct Runtime {
    /// Helper objects.
    pub objects: Objects,
    /// Told of what happens to exports and nodes.
    pub events: EventSink,
    /// Tells of what happens to requests of guests.
    pub incidents: Incidents,
    /// The fences of exports.
    pub fences: Arc<dyn Fences>,
    /// Where the state is, if there is one.
    pub state: Option<StateOptions>,
    /// What the command line names.
    pub named: Setup,
    /// Held while a change is put in force and recorded.
    changing: Mutex<()>,
    /// It has been told that changes are forgotten.
    told: AtomicBool,
}

impl Runtime {
    /// What is needed by a daemon whose command line names `named`, with `objects`.
    #[must_use]
    pub fn new(
        named: Setup,
        objects: Vec<ObjectOptions>,
        events: EventSink,
        fences: Arc<dyn Fences>,
        state: Option<StateOptions>,
    ) -> Self {
        Self {
            objects: Objects::new(objects),
            incidents: Incidents::start(events.clone()),
            events,
            fences,
            state,
            named,
            changing: Mutex::default(),
            told: AtomicBool::new(false),
        }
    }

    /// For a process that has no command line, and no other beside it.
    #[must_use]
    pub fn alone(events: EventSink) -> Self {
        let fences = Arc::new(NoFences);
        Self::new(Setup::default(), Vec::new(), events, fences, None)
    }

    /// No other change is put in force and recorded until this is dropped.
    pub(super) fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock()
    }

    /// As [`change`](Self::change), for one for whom guests wait.
    ///
    /// # Errors
    /// When another change is being recorded, and that takes too long.
    pub(super) fn change_soon(&self) -> Result<MutexGuard<'_, ()>> {
        self.changing.try_lock_for(PATIENCE).ok_or_else(|| {
            Error::Invalid(format!(
                "another change is not recorded within {} s (the disk with the state may not \
                 answer); nothing was changed",
                PATIENCE.as_secs()
            ))
        })
    }
}

/// A change that is to be recorded.
pub(super) enum Change<'a> {
    AddNode(&'a BlockdevOptions),
    RemoveNode(&'a str),
    AddExport(&'a ExportOptions),
    /// A client has had an export show the image in this file.
    Serve(&'a ExportOptions, (&'a str, Identity)),
    RemoveExport(&'a str),
    AddObject(&'a ObjectOptions),
    RemoveObject(&'a str),
    /// What lies under images by now, of which something else is recorded.
    Links(&'a [Link]),
}

impl Change<'_> {
    fn apply(&self, state: &mut State, named: &Setup) {
        fn find<'n, T: Named>(list: &'n [T], name: &str) -> Option<&'n T> {
            list.iter().find(|one| one.name() == name)
        }
        let changes = &mut state.changes;
        match self {
            Self::AddNode(options) => changes.nodes.add(*options),
            Self::AddExport(options) => changes.exports.add(*options),
            Self::AddObject(options) => changes.objects.add(*options),
            Self::RemoveNode(name) => {
                changes.nodes.remove(name, find(&named.nodes, name));
                state.forget_made(name);
            }
            Self::Serve(options, image) => state.serve(*image, (&options.id, options.writable)),
            Self::RemoveExport(name) => changes.exports.remove(name, find(&named.exports, name)),
            Self::Links(links) => {
                for link in *links {
                    state.links.retain(|other| !link.supersedes(other));
                    state.links.push(link.clone());
                }
            }
            Self::RemoveObject(name) => changes.objects.remove(name, find(&named.objects, name)),
        }
    }
}

impl Engine {
    /// Records what has changed together; what has no record is said once.
    ///
    /// # Errors
    /// When it cannot be recorded: then nothing is.
    pub(super) fn record(&self, list: &[Change<'_>]) -> std::result::Result<(), Refused> {
        let Some(store) = &self.store else {
            if !self.runtime.told.swap(true, Ordering::SeqCst) {
                log::warn!(
                    "without --state, what is added and removed at run time is gone with this \
                     process: the command line must say it at the next start"
                );
            }
            return Ok(());
        };
        store.change(|state| {
            for change in list {
                change.apply(state, &self.runtime.named);
            }
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a record that fits no command line with paths that begin in the folder of
    //! the process, or that means another file in another folder.

    use serde_json::json;

    use super::*;

    #[test]
    fn paths_that_begin_in_this_folder_are_known_again() {
        let node = |name: &str| {
            let value = json!({"driver": "blkdebug", "node-name": name, "config": "rules",
                "image": {"driver": "file", "filename": "x.raw"}});
            BlockdevOptions::from_value(&value, Dialect::Json).unwrap()
        };
        let named = [node("a"), node("b")];
        let mut changed = Changed::default();
        changed.remove("a", Some(&named[0]));
        changed.add(&node("c"));
        let here = std::env::current_dir().unwrap();
        for value in changed.added.iter().chain(&changed.removed) {
            assert_eq!(value["image"]["filename"], json!(here.join("x.raw")));
            assert_eq!(value["config"], json!(here.join("rules")));
        }
        let there = changed.apply(&named, "record").unwrap();
        let names = there.iter().map(Named::name);
        assert_eq!(names.collect::<Vec<_>>(), ["b", "c"]);
        // The command line has learnt of it.
        let learnt = [node("b"), node("c")];
        let there = changed.apply(&learnt, "record").unwrap();
        assert_eq!(there, learnt);
        assert_eq!(changed, Changed::default());
    }
}
