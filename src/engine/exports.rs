//! The exports: what guests are served.
//!
//! An export is listed from when it serves until all that it held has been given back. Its name is
//! taken before it is made: two commands see each other although neither waits for the other.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
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
    ending: Mutex<Ending>,
    changed: Condvar,
}

/// How far the end of an export is: `Not` and `Begun` may alternate, `Over` stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// It serves.
    Not,
    /// Somebody ends it.
    Begun,
    /// All that it held has been given back.
    Over,
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
                ending: Mutex::new(Ending::Not),
                changed: Condvar::new(),
            }),
        }
    }

    /// Takes it upon the caller to end it. False: somebody else does, or has.
    pub(super) fn begin_to_end(&self) -> bool {
        self.life.begin_to_end()
    }

    /// It goes on after all.
    pub(super) fn goes_on(&self) {
        self.life.becomes(Ending::Not);
    }

    /// What it may do with its node, for who ends it.
    pub(super) fn take_grant(&self) -> Option<Grant> {
        self.life.grant.lock().take()
    }

    /// All that it held has been given back.
    pub(super) fn has_ended(&self) {
        self.life.becomes(Ending::Over);
    }

    /// Waits until it has ended or goes on after all, for as long as `patience`.
    pub(super) fn wait_for_end(&self, patience: Option<Duration>) {
        self.life.wait(patience);
    }
}

impl Life {
    fn begin_to_end(&self) -> bool {
        let mut ending = self.ending.lock();
        let is_free = *ending == Ending::Not;
        if is_free {
            *ending = Ending::Begun;
        }
        is_free
    }

    fn becomes(&self, ending: Ending) {
        *self.ending.lock() = ending;
        self.changed.notify_all();
    }

    fn wait(&self, patience: Option<Duration>) {
        let deadline = patience.map(|patience| Instant::now() + patience);
        let mut ending = self.ending.lock();
        while *ending == Ending::Begun {
            match deadline {
                None => self.changed.wait(&mut ending),
                Some(deadline) => {
                    if self.changed.wait_until(&mut ending, deadline).timed_out() {
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

    /// Lists an export whose name its maker has claimed and still holds.
    ///
    /// # Errors
    /// When the process ends.
    pub(super) fn put(&self, served: &Served) -> Result<(), Refused> {
        let mut inner = self.inner.lock();
        check_open(&inner)?;
        inner.list.push(served.clone());
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Would catch an end of the daemon that waits for a removal which was refused.
    #[test]
    fn who_waits_for_an_end_hears_that_there_is_none() {
        let life = Life {
            grant: Mutex::new(None),
            ending: Mutex::new(Ending::Not),
            changed: Condvar::new(),
        };
        assert!(life.begin_to_end());
        assert!(!life.begin_to_end());
        let (sender, waited) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let life = &life;
            scope.spawn(move || {
                life.wait(None);
                sender.send(()).unwrap();
            });
            life.becomes(Ending::Not);
            let end = waited.recv_timeout(Duration::from_secs(20));
            // Whatever came of it, the thread is let go.
            life.becomes(Ending::Over);
            end.expect("it waits for an end that nobody makes");
        });
        assert!(!life.begin_to_end(), "what is over is ended once more");
    }
}
