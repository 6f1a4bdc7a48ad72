//! The end of the daemon: everything is ended at the same time, and what hangs is left behind.
//!
//! Exports, jobs and control sockets end on threads of their own. An image is closed as soon as all
//! that use it have ended, so that nothing waits for a neighbour. One whose users take long is
//! flushed in between, and closed when they have ended after all; if they never do it is flushed
//! once more and left as it is: it must not be called clean while somebody may still write.
//!
//! Nobody can tell a disk that is slow from one that is dead. So there are two bounds. Users that do
//! not end hang, after a short one: the service manager would kill the daemon otherwise. But an image that
//! nobody uses any more is being made stable, and that gets all the time there is; so do users that
//! wait for a sync that is under way. What is left then is named and abandoned.
//!
//! A disk that was silent already when the end began is taken for dead: its image and its users have
//! the short bound, sync or not. As soon as one of its operations ends it is a slow disk like any
//! other.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};

/// How long the end may take if the configuration does not say: less than the 90 seconds after
/// which a service manager kills by default.
const DEFAULT_BOUND: Duration = Duration::from_secs(72);

/// How long a disk is silent at least before it is taken for dead.
const SILENCE: Duration = Duration::from_secs(10);

/// How long the end may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For the users of an image, before it is flushed in spite of them.
    pub users: Duration,
    /// For users that do not end though they wait for no sync, and for images on silent disks.
    pub hung: Duration,
    /// For all.
    pub all: Duration,
    /// A disk is silent whose calls are under way for so long without any operation that ends.
    pub silence: Duration,
}

impl Patience {
    /// An end that takes no longer than `bound`. An administrator who gives the end more time than
    /// usual has disks whose syncs take long: they may be silent for longer, too.
    #[must_use]
    pub fn within(bound: Option<Duration>) -> Self {
        let all = bound.unwrap_or(DEFAULT_BOUND);
        let hung = all / 8;
        Self {
            users: all / 16,
            hung,
            all,
            silence: hung.max(SILENCE),
        }
    }

    /// For what is left to do when the rest took this long: what is left of the bound, but enough
    /// for a disk that answers.
    #[must_use]
    pub fn left(&self, taken: Duration) -> Duration {
        let left = self.all.saturating_sub(taken);
        left.min(self.hung).max(Duration::from_secs(1))
    }
}

/// When an image is flushed for the last time in spite of its users, who have until `bound`.
fn last_flush(bound: Duration) -> Duration {
    bound / 9 * 8
}

/// Something that is to end.
pub struct Part {
    /// Names it in messages, and to those that wait for it.
    pub name: String,
    /// Whose end is to come first.
    pub after: Vec<String>,
    /// Ends it. True: all that it comes after have ended. After a false it is called once more.
    /// Its last error is the end's too.
    pub work: Box<dyn FnMut(bool) -> Result<()> + Send>,
    /// Of an image: what its storage is doing.
    pub storage: Option<Arc<dyn Activity>>,
    /// What to say if it does not end.
    pub abandoned: Box<dyn Fn() -> String + Send>,
}

/// What the storage of an image is doing.
pub trait Activity: Send + Sync {
    /// Whether a sync of it is under way, which the image's users may be waiting for.
    fn is_syncing(&self) -> bool;

    /// For how long calls of it have been under way without any operation that has ended. Zero:
    /// none are under way.
    fn silent_for(&self) -> Duration;
}

#[derive(Default)]
struct State {
    /// What has not ended, and whether it may take all the time there is.
    left: BTreeMap<String, bool>,
    /// What went wrong with the others.
    failed: Vec<String>,
}

#[derive(Default)]
struct Board {
    state: Mutex<State>,
    changed: Condvar,
}

/// An image that was on a silent disk when the end began.
struct Silent {
    name: String,
    users: Vec<String>,
    storage: Arc<dyn Activity>,
}

impl Silent {
    /// Gives image and users all the time there is, if the disk has said something since.
    fn give_time(&self, board: &Board, patience: Patience) {
        if self.storage.silent_for() >= patience.silence {
            return;
        }
        board.give_time(std::iter::once(&self.name), true);
        if self.storage.is_syncing() {
            board.give_time(self.users.iter(), true);
        }
    }
}

impl Board {
    /// Waits until `done`. False: it was not, by then.
    fn wait(&self, until: Instant, mut done: impl FnMut(&State) -> bool) -> bool {
        let mut state = self.state.lock();
        while !done(&state) {
            if self.changed.wait_until(&mut state, until).timed_out() {
                return done(&state);
            }
        }
        true
    }

    /// Waits until none of `names` is left. False: some are.
    fn wait_for(&self, names: &[String], until: Instant) -> bool {
        self.wait(until, |state| {
            !names.iter().any(|name| state.left.contains_key(name))
        })
    }

    /// Lets those of `names` that are left take all the time there is, or no more than users.
    fn give_time<'a>(&self, names: impl Iterator<Item = &'a String>, all: bool) {
        let mut state = self.state.lock();
        for name in names {
            if let Some(slow) = state.left.get_mut(name) {
                *slow = all;
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    fn ended(&self, name: &str, result: Result<()>) {
        let mut state = self.state.lock();
        state
            .failed
            .extend(result.err().map(|error| error.to_string()));
        state.left.remove(name);
        drop(state);
        self.changed.notify_all();
    }
}

/// Ends all parts, which have different names, and each of which is behind those that it comes
/// after. When this returns an error, threads may still be busy with those that are left: the
/// process has to end without waiting for them.
///
/// # Errors
/// What the parts could not do, and what did not end in time, in their words.
pub fn end(parts: Vec<Part>, patience: Patience) -> Result<()> {
    end_on(parts, patience, |run| {
        let thread = std::thread::Builder::new().name("end".into());
        thread.spawn(run).map(drop)
    })
}

/// What a thread does for one part.
type Run = Box<dyn FnOnce() + Send>;

fn end_on(
    parts: Vec<Part>,
    patience: Patience,
    spawn: impl Fn(Run) -> io::Result<()>,
) -> Result<()> {
    let began = Instant::now();
    let board = Arc::new(Board::default());
    let silent = silent_of(&parts, patience);
    // Images are waited for until it is known that their users hang.
    let left = parts.iter().map(|part| {
        let is_silent = silent.iter().any(|silent| silent.name == part.name);
        (part.name.clone(), part.storage.is_some() && !is_silent)
    });
    board.state.lock().left = left.collect();
    let mut abandoned_texts = Vec::with_capacity(parts.len());
    let mut here = Vec::new();
    for part in parts {
        let Part {
            name,
            after,
            work,
            storage,
            abandoned,
        } = part;
        abandoned_texts.push((name.clone(), abandoned));
        let (board, own_name) = (board.clone(), name.clone());
        let run: Run = Box::new(move || {
            let result = end_part(&board, (&own_name, &after), work, storage, began, patience);
            board.ended(&own_name, result);
        });
        // What is given to a thread that cannot be had is dropped.
        let run = Arc::new(Mutex::new(Some(run)));
        let given = run.clone();
        if let Err(error) = spawn(Box::new(move || run_once(&given))) {
            log::warn!("a thread for the end of {name}: {error}");
            here.push(run);
        }
    }
    // Late, and one after the other, is better than not at all.
    here.iter().for_each(run_once);
    board.wait(began + patience.hung, |state| state.left.is_empty());
    (silent.iter()).for_each(|silent| silent.give_time(&board, patience));
    board.wait(began + patience.all, |state| {
        !state.left.values().any(|&slow| slow)
    });
    let state = std::mem::take(&mut *board.state.lock());
    let mut words = state.failed;
    let abandoned_texts = abandoned_texts.iter();
    let late = abandoned_texts.filter(|(name, _)| state.left.contains_key(name));
    let late: Vec<_> = late.map(|(_, abandoned)| abandoned()).collect();
    if !late.is_empty() {
        let seconds = began.elapsed().as_secs();
        words.push(format!("abandoned after {seconds} s: {}", late.join("; ")));
    }
    match words.is_empty() {
        true => Ok(()),
        false => Err(Error::Invalid(words.join("; "))),
    }
}

/// The images on disks that are silent now.
fn silent_of(parts: &[Part], patience: Patience) -> Vec<Silent> {
    let on_silent = |part: &Part| {
        let storage = part.storage.clone()?;
        (storage.silent_for() >= patience.silence).then(|| Silent {
            name: part.name.clone(),
            users: part.after.clone(),
            storage,
        })
    };
    parts.iter().filter_map(on_silent).collect()
}

/// Ends one part on its thread.
fn end_part(
    board: &Board,
    (name, after): (&String, &[String]),
    mut work: Box<dyn FnMut(bool) -> Result<()> + Send>,
    storage: Option<Arc<dyn Activity>>,
    began: Instant,
    patience: Patience,
) -> Result<()> {
    if board.wait_for(after, began + patience.users) {
        return work(true);
    }
    let mut bound = patience.hung;
    let mut use_all_if = |slow: bool| {
        if slow {
            bound = patience.all;
            board.give_time(after.iter(), true);
        }
        board.give_time(std::iter::once(name), slow);
    };
    let is_slow = |storage: &Arc<dyn Activity>| {
        storage.is_syncing() && storage.silent_for() < patience.silence
    };
    // Before its own flush, which would be a sync.
    let slow = storage.as_ref().is_some_and(is_slow);
    use_all_if(slow);
    if let Err(error) = work(false) {
        log::error!("{error}; it is tried once more");
    }
    // Its disk may have been silent until now.
    if !slow && storage.as_ref().is_some_and(is_slow) {
        use_all_if(true);
    }
    // What they have completed since then is to last too.
    let alone = board.wait_for(after, began + last_flush(bound));
    if alone {
        board.give_time(std::iter::once(name), true);
    }
    work(alone)
}

fn run_once(run: &Arc<Mutex<Option<Run>>>) {
    let run = run.lock().take();
    if let Some(run) = run {
        run();
    }
}

#[cfg(test)]
mod tests;
