//! Helper objects: settings that exports refer to by name.
//!
//! There is no thread behind an `iothread` here, since each queue has one of its own: the object is
//! what its properties say.

use parking_lot::Mutex;

use crate::export::DEFAULT_POLL_MAX_US;
use crate::job::Refused;
use crate::options::{IothreadOptions, ObjectOptions};

/// How long a queue looks for work before it sleeps if nothing is said, in nanoseconds.
pub const DEFAULT_POLL_MAX_NS: u64 = DEFAULT_POLL_MAX_US as u64 * 1000;

#[derive(Debug, Default)]
struct Inner {
    list: Vec<ObjectOptions>,
    /// Names of those that exports in the making refer to, once for each.
    wanted: Vec<String>,
}

/// All objects.
#[derive(Debug, Default)]
pub struct Objects {
    inner: Mutex<Inner>,
}

/// An object that an export in the making refers to: it stays until this is dropped.
pub(super) struct Wanted<'a> {
    objects: &'a Objects,
    thread: IothreadOptions,
}

impl Wanted<'_> {
    pub(super) fn thread(&self) -> &IothreadOptions {
        &self.thread
    }
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        let mut inner = self.objects.inner.lock();
        let found = inner.wanted.iter().position(|name| *name == self.thread.id);
        found.map(|at| inner.wanted.swap_remove(at));
    }
}

impl Objects {
    /// Those that the command line names.
    #[must_use]
    pub fn new(list: Vec<ObjectOptions>) -> Self {
        let wanted = Vec::new();
        Self {
            inner: Mutex::new(Inner { list, wanted }),
        }
    }

    /// All objects as they are now, in the order of their making.
    #[must_use]
    pub fn list(&self) -> Vec<ObjectOptions> {
        self.inner.lock().list.clone()
    }

    /// The object of this name.
    #[must_use]
    pub fn find(&self, id: &str) -> Option<ObjectOptions> {
        let inner = self.inner.lock();
        inner.list.iter().find(|object| object.id() == id).cloned()
    }

    /// The `iothread` of this name, for an export that is to be made.
    pub(super) fn want(&self, id: &str) -> Option<Wanted<'_>> {
        let mut inner = self.inner.lock();
        let found = inner.list.iter().find(|object| object.id() == id);
        let ObjectOptions::Iothread(thread) = found.cloned()?;
        inner.wanted.push(thread.id.clone());
        Some(Wanted {
            objects: self,
            thread,
        })
    }

    /// Adds one, if `record` can.
    ///
    /// # Errors
    /// When its name is taken, or the error of `record`.
    pub(super) fn add(
        &self,
        object: ObjectOptions,
        record: impl FnOnce() -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        if self.find(object.id()).is_some() {
            return Err(Refused(format!(
                "attempt to add duplicate property '{}' to object (type 'container')",
                object.id()
            )));
        }
        record()?;
        self.inner.lock().list.push(object);
        Ok(())
    }

    /// Removes one that no export in the making wants and that `is_used` says is not used, if
    /// `record` can.
    ///
    /// # Errors
    /// When there is none of this name, or it is in use, or the error of `record`.
    pub(super) fn remove(
        &self,
        id: &str,
        is_used: impl FnOnce() -> bool,
        record: impl FnOnce() -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        let removed = {
            let mut inner = self.inner.lock();
            let found = inner.list.iter().position(|object| object.id() == id);
            let Some(at) = found else {
                return Err(Refused(format!("object '{id}' not found")));
            };
            if inner.wanted.iter().any(|name| name == id) || is_used() {
                return Err(Refused(format!(
                    "object '{id}' is in use, can not be deleted"
                )));
            }
            // From here on no export finds it.
            (at, inner.list.remove(at))
        };
        record().inspect_err(|_| {
            let (at, object) = removed;
            self.inner.lock().list.insert(at, object);
        })
    }

    /// Changes one, if `record` can record what it is then.
    ///
    /// # Errors
    /// When there is none of this name, or the error of `record`.
    pub(super) fn change(
        &self,
        id: &str,
        change: impl FnOnce(&mut IothreadOptions),
        record: impl FnOnce(&ObjectOptions) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        let gone = || Refused(format!("object '{id}' not found"));
        let mut changed = self.find(id).ok_or_else(gone)?;
        let ObjectOptions::Iothread(thread) = &mut changed;
        change(thread);
        record(&changed)?;
        let mut inner = self.inner.lock();
        let found = inner.list.iter_mut().find(|object| object.id() == id);
        *found.ok_or_else(gone)? = changed;
        Ok(())
    }
}

/// A property of an `iothread` that is a number, and can be set.
pub(super) struct Property {
    pub(super) name: &'static str,
    get: fn(&IothreadOptions) -> u64,
    pub(super) set: fn(&mut IothreadOptions, u64),
}

pub(super) const PROPERTIES: &[Property] = &[
    Property {
        name: "poll-max-ns",
        get: |thread| thread.poll_max_ns.unwrap_or(DEFAULT_POLL_MAX_NS),
        set: |thread, value| thread.poll_max_ns = Some(value),
    },
    Property {
        name: "poll-grow",
        get: |thread| thread.poll_grow.unwrap_or(0),
        set: |thread, value| thread.poll_grow = Some(value),
    },
    Property {
        name: "poll-shrink",
        get: |thread| thread.poll_shrink.unwrap_or(0),
        set: |thread, value| thread.poll_shrink = Some(value),
    },
    Property {
        name: "aio-max-batch",
        get: |thread| thread.aio_max_batch.unwrap_or(0),
        set: |thread, value| thread.aio_max_batch = Some(value),
    },
];

/// The properties of an object that are numbers, with their values.
#[must_use]
pub fn properties(object: &ObjectOptions) -> Vec<(&'static str, u64)> {
    let ObjectOptions::Iothread(thread) = object;
    let properties = PROPERTIES.iter();
    properties
        .map(|property| (property.name, (property.get)(thread)))
        .collect()
}

/// How long the queues of exports that name `thread` poll at most.
pub(super) fn poll_max_us(thread: &IothreadOptions) -> u32 {
    let ns = thread.poll_max_ns.unwrap_or(DEFAULT_POLL_MAX_NS);
    u32::try_from(ns.div_ceil(1000)).unwrap_or(u32::MAX)
}
