//! The exports: what guests are served.
//!
//! An export is listed from when it serves until all that it held has been given back. Its name is
//! taken before it is made: two commands see each other although neither waits for the other.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::export::Export;
use crate::graph::Grant;
use crate::job::Refused;
use crate::options::ExportOptions;
use crate::sched;

/// An export, and what it was made with.
#[derive(Clone, Debug)]
pub struct Served {
    /// The export.
    pub export: Arc<Export>,
    /// What it was made with.
    pub options: ExportOptions,
    life: Arc<Life>,
}

/// What an export holds, until it has ended.
#[derive(Debug)]
struct Life {
    /// What it may do with its node.
    grant: Mutex<Option<Grant>>,
    /// Somebody ends it.
    ending: AtomicBool,
    ended: Mutex<bool>,
    changed: Condvar,
}

impl Served {
    /// An export that has been made, and holds `grant`.
    #[must_use]
    pub fn new(export: Export, options: ExportOptions, grant: Grant) -> Self {
        Self {
            export: Arc::new(export),
            options,
            life: Arc::new(Life {
                grant: Mutex::new(Some(grant)),
                ending: AtomicBool::new(false),
                ended: Mutex::new(false),
                changed: Condvar::new(),
            }),
        }
    }

    /// Takes it upon the caller to end it. False: somebody else does.
    pub(super) fn begin_to_end(&self) -> bool {
        !self.life.ending.swap(true, Ordering::SeqCst)
    }

    /// It goes on after all.
    pub(super) fn goes_on(&self) {
        self.life.ending.store(false, Ordering::SeqCst);
    }

    /// What it may do with its node, for who ends it.
    pub(super) fn take_grant(&self) -> Option<Grant> {
        self.life.grant.lock().take()
    }

    /// All that it held has been given back: wakes the threads that wait for that.
    pub(super) fn has_ended(&self) {
        *self.life.ended.lock() = true;
        self.life.changed.notify_all();
    }

    /// Waits until it has ended, for as long as `patience`.
    pub(super) fn wait_for_end(&self, patience: Option<Duration>) {
        let deadline = patience.map(|patience| Instant::now() + patience);
        let mut ended = self.life.ended.lock();
        while !*ended {
            match deadline {
                None => self.life.changed.wait(&mut ended),
                Some(deadline) => {
                    if self
                        .life
                        .changed
                        .wait_until(&mut ended, deadline)
                        .timed_out()
                    {
                        return;
                    }
                }
            }
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    list: Vec<Served>,
    /// Names of those that are being made.
    making: HashSet<String>,
    /// The process ends: there are no more.
    closed: bool,
}

/// All exports.
#[derive(Debug, Default)]
pub struct Exports {
    inner: Mutex<Inner>,
    /// Held while guests get other images.
    turning: Mutex<()>,
}

/// The name of an export that is being made. It is free again when this is dropped, if the export
/// has not come to be.
pub(super) struct ClaimedName<'a> {
    exports: &'a Exports,
    name: String,
}

impl Drop for ClaimedName<'_> {
    fn drop(&mut self) {
        self.exports.inner.lock().making.remove(&self.name);
    }
}

impl Exports {
    /// Adds one that serves.
    pub fn add(&self, export: Export, options: ExportOptions, grant: Grant) {
        let served = Served::new(export, options, grant);
        self.inner.lock().list.push(served);
    }

    /// Takes a name for an export that is to be made.
    pub(super) fn claim(&self, name: &str) -> Result<ClaimedName<'_>, Refused> {
        let mut inner = self.inner.lock();
        check_open(&inner)?;
        let listed = inner.list.iter().any(|served| served.options.id == name);
        if listed || !inner.making.insert(name.to_owned()) {
            return Err(Refused(format!(
                "Block export id '{name}' is already in use"
            )));
        }
        Ok(ClaimedName {
            exports: self,
            name: name.to_owned(),
        })
    }

    /// Lists an export whose name has been claimed.
    ///
    /// # Errors
    /// When the process ends.
    pub(super) fn put(&self, served: &Served, name: ClaimedName<'_>) -> Result<(), Refused> {
        {
            let mut inner = self.inner.lock();
            check_open(&inner)?;
            inner.list.push(served.clone());
        }
        drop(name);
        Ok(())
    }

    /// Takes one that has ended off the list. False: it was not listed.
    pub(super) fn ended(&self, served: &Served) -> bool {
        let mut inner = self.inner.lock();
        let before = inner.list.len();
        let is_it = |other: &Served| Arc::ptr_eq(&other.life, &served.life);
        inner.list.retain(|other| !is_it(other));
        inner.list.len() < before
    }

    /// Takes the right to give guests other images, until it is dropped.
    ///
    /// # Errors
    /// When the process ends: what is opened from then on, nobody would close.
    pub(super) fn turn(&self) -> Result<MutexGuard<'_, ()>, Refused> {
        let turning = self.turning.lock();
        check_open(&self.inner.lock())?;
        Ok(turning)
    }

    /// From here on none is added, and none gets another image.
    pub fn close(&self) {
        self.inner.lock().closed = true;
        drop(self.turning.lock());
    }

    /// Gives an export another grant in the place of the one that it has. One that is being ended has
    /// given that back, and needs none.
    pub(super) fn regrant(&self, of: &Arc<Export>, grant: Grant) {
        let inner = self.inner.lock();
        let mut found = inner.list.iter();
        let found = found.find(|served| Arc::ptr_eq(&served.export, of));
        let before = found.and_then(|served| {
            let mut held = served.life.grant.lock();
            held.as_mut().map(|held| std::mem::replace(held, grant))
        });
        drop(inner);
        drop(before);
    }

    /// All exports as they are now, in the order of their making.
    #[must_use]
    pub fn list(&self) -> Vec<Served> {
        self.inner.lock().list.clone()
    }

    /// The export of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Served> {
        let inner = self.inner.lock();
        let found = inner.list.iter().find(|served| served.options.id == name);
        found.cloned()
    }

    /// The requests that guests have made so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        let inner = self.inner.lock();
        let queues = inner.list.iter().flat_map(|served| served.export.stats());
        queues.map(|queue| queue.requests()).sum()
    }

    /// How long the threads that serve guests have been ready to run without a processor.
    #[must_use]
    pub fn waited(&self) -> Duration {
        let inner = self.inner.lock();
        let queues = inner.list.iter().flat_map(|served| served.export.stats());
        queues
            .filter_map(|queue| sched::waited(queue.thread.load(Ordering::Relaxed)))
            .sum()
    }
}

fn check_open(inner: &Inner) -> Result<(), Refused> {
    match inner.closed {
        true => Err(Refused("The daemon is shutting down".to_owned())),
        false => Ok(()),
    }
}
