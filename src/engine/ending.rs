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

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};

/// How long the end may take if the configuration does not say: less than the 90 seconds after
/// which a service manager kills by default.
const DEFAULT_BOUND: Duration = Duration::from_secs(72);

/// How long the end may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For the users of an image, before it is flushed in spite of them.
    pub users: Duration,
    /// For users that do not end though they wait for no sync.
    pub hung: Duration,
    /// For all.
    pub all: Duration,
}

impl Patience {
    /// An end that takes no longer than `bound`.
    #[must_use]
    pub fn within(bound: Option<Duration>) -> Self {
        let all = bound.unwrap_or(DEFAULT_BOUND);
        Self {
            users: all / 16,
            hung: all / 8,
            all,
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
    /// Of an image: whether a sync of it is under way, which its users may be waiting for.
    pub syncing: Option<Box<dyn Fn() -> bool + Send>>,
    /// What to say if it does not end.
    pub abandoned: Box<dyn Fn() -> String>,
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
    // Images are waited for until it is known that their users hang.
    let left = parts
        .iter()
        .map(|part| (part.name.clone(), part.syncing.is_some()));
    board.state.lock().left = left.collect();
    let mut abandoned_texts = Vec::with_capacity(parts.len());
    let mut here = Vec::new();
    for part in parts {
        let Part {
            name,
            after,
            work,
            syncing,
            abandoned,
        } = part;
        abandoned_texts.push((name.clone(), abandoned));
        let (board, own_name) = (board.clone(), name.clone());
        let run: Run = Box::new(move || {
            let result = end_part(&board, (&own_name, &after), work, syncing, began, patience);
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

/// Ends one part on its thread.
fn end_part(
    board: &Board,
    (name, after): (&String, &[String]),
    mut work: Box<dyn FnMut(bool) -> Result<()> + Send>,
    syncing: Option<Box<dyn Fn() -> bool + Send>>,
    began: Instant,
    patience: Patience,
) -> Result<()> {
    if board.wait_for(after, began + patience.users) {
        return work(true);
    }
    let mut bound = patience.hung;
    if let Some(syncing) = syncing {
        // Before its own flush, which would be one.
        let slow = syncing();
        if slow {
            bound = patience.all;
            board.give_time(after.iter(), true);
        }
        board.give_time(std::iter::once(name), slow);
    }
    if let Err(error) = work(false) {
        log::error!("{error}; it is tried once more");
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
mod tests {
    //! What would be caught: an end that waits for a neighbour that hangs, or for ever; an image
    //! that is closed under its users, or not at all since they took long; one that is abandoned
    //! while it is only slow, or since its users wait for a slow sync; something abandoned or gone
    //! wrong without a word; a part without a thread that is not ended.

    use std::sync::mpsc::channel;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn part(name: &str, after: &[&str], mut work: impl FnMut(bool) + Send + 'static) -> Part {
        let abandoned = format!("{name} hangs");
        let syncing: Box<dyn Fn() -> bool + Send> = Box::new(|| false);
        Part {
            name: name.to_owned(),
            after: after.iter().map(|&name| name.to_owned()).collect(),
            work: Box::new(move |alone| {
                work(alone);
                Ok(())
            }),
            syncing: name.starts_with("image").then_some(syncing),
            abandoned: Box::new(move || abandoned.clone()),
        }
    }

    /// Takes longer than users get here.
    fn be_slow() {
        std::thread::sleep(Duration::from_millis(300));
    }

    #[test]
    fn what_hangs_holds_up_nobody_but_its_own_image() {
        let (ended, seen) = channel();
        let (release, hang) = channel::<()>();
        let tell = |what: &'static str| {
            let ended = ended.clone();
            move |alone: bool| ended.send((what, alone)).unwrap()
        };
        // Nothing here is waited for but what hangs: in any other order this would not end.
        let all = Patience {
            users: Duration::from_millis(50),
            hung: Duration::from_secs(1),
            all: HOUR,
        };
        let parts = vec![
            part("image a", &["a"], tell("image a")),
            part("image b", &["b", "job"], tell("image b")),
            part("image ab", &["a", "b"], tell("image ab")),
            part("a", &[], move |_| assert!(hang.recv().is_err())),
            part("b", &[], tell("b")),
            part("job", &[], tell("job")),
        ];
        let error = end(parts, all).unwrap_err().to_string();
        assert!(error.ends_with(": a hangs"), "{error}");
        let mut seen: Vec<_> = seen.try_iter().collect();
        seen.sort_unstable();
        let expected = [
            ("b", true),
            ("image a", false),
            ("image a", false),
            ("image ab", false),
            ("image ab", false),
            ("image b", true),
            ("job", true),
        ];
        assert_eq!(seen, expected);
        drop(release);
    }

    #[test]
    fn an_image_whose_users_end_late_is_still_closed() {
        let (release, late) = channel::<()>();
        let (called, calls) = channel();
        let parts = vec![
            part("image", &["export"], move |alone| {
                called.send(alone).unwrap();
                // Its user ends only now that the first patience is over.
                let _ = release.send(());
            }),
            part("export", &[], move |_| late.recv().unwrap()),
        ];
        let patience = Patience {
            users: Duration::ZERO,
            hung: HOUR,
            all: HOUR,
        };
        end(parts, patience).unwrap();
        assert_eq!(calls.try_iter().collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn what_gets_no_thread_is_ended_all_the_same() {
        let (ended, seen) = channel();
        let tell = |what: &'static str| {
            let ended = ended.clone();
            move |alone: bool| ended.send((what, alone)).unwrap()
        };
        let parts = vec![
            part("export", &[], tell("export")),
            part("image", &["export"], tell("image")),
        ];
        end_on(parts, Patience::within(None), |_| {
            Err(io::Error::other("none"))
        })
        .unwrap();
        let seen: Vec<_> = seen.try_iter().collect();
        assert_eq!(seen, [("export", true), ("image", true)]);
    }

    #[test]
    fn what_ends_is_waited_for_no_longer_than_it_takes() {
        let (first, second) = channel();
        let parts = vec![
            part("image", &["export"], move |alone| {
                assert!(alone);
                assert_eq!(second.try_recv(), Ok(()), "before its user had ended");
            }),
            part("export", &[], move |_| first.send(()).unwrap()),
        ];
        let forever = Patience {
            users: HOUR,
            hung: HOUR,
            all: HOUR,
        };
        end(parts, forever).unwrap();
    }

    #[test]
    fn an_image_that_is_slow_is_not_abandoned() {
        let parts = vec![
            part("image", &["export"], |alone| {
                assert!(alone);
                be_slow();
            }),
            part("export", &[], |_| {}),
        ];
        let patience = Patience {
            users: HOUR,
            hung: Duration::ZERO,
            all: HOUR,
        };
        end(parts, patience).unwrap();
    }

    #[test]
    fn users_that_wait_for_a_slow_sync_do_not_hang() {
        let (called, calls) = channel();
        let (begin, begun) = channel::<()>();
        let mut image = part("image", &["export"], move |alone| {
            called.send(alone).unwrap()
        });
        image.syncing = Some(Box::new(move || {
            // What is waited for ends only after it was asked for.
            begin.send(()).unwrap();
            true
        }));
        let export = part("export", &[], move |_| {
            begun.recv().unwrap();
            be_slow();
        });
        let patience = Patience {
            users: Duration::ZERO,
            hung: Duration::from_millis(100),
            all: HOUR,
        };
        end(vec![image, export], patience).unwrap();
        assert_eq!(calls.try_iter().collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn all_the_time_there_is_has_an_end() {
        let (release, hang) = channel::<()>();
        let parts = vec![part("image", &[], move |_| assert!(hang.recv().is_err()))];
        let patience = Patience {
            users: Duration::ZERO,
            hung: Duration::ZERO,
            all: Duration::from_millis(50),
        };
        let error = end(parts, patience).unwrap_err().to_string();
        assert_eq!(error, "abandoned after 0 s: image hangs");
        drop(release);
    }

    #[test]
    fn what_goes_wrong_is_told() {
        let mut image = part("image", &[], |_| {});
        image.work = Box::new(|_| Err(Error::Invalid("image is full".into())));
        let parts = vec![image, part("export", &[], |_| {})];
        let error = end(parts, Patience::within(None)).unwrap_err();
        assert_eq!(error.to_string(), "image is full");
    }

    #[test]
    fn what_comes_last_has_what_is_left_of_the_bound() {
        let second = Duration::from_secs(1);
        let patience = Patience::within(Some(80 * second));
        assert_eq!(patience.left(Duration::ZERO), 10 * second);
        assert_eq!(patience.left(76 * second), 4 * second);
        for taken in [80, 81] {
            assert_eq!(patience.left(taken * second), second);
        }
        // However short the bound is.
        assert_eq!(Patience::within(Some(second)).left(Duration::ZERO), second);
    }

    #[test]
    fn hung_users_have_nine_seconds_unless_it_is_configured() {
        let patience = Patience::within(None);
        assert_eq!(patience.hung, Duration::from_secs(9));
        assert_eq!(last_flush(patience.hung), Duration::from_secs(8));
        let patience = Patience::within(Some(Duration::from_secs(8)));
        assert_eq!((patience.hung.as_secs(), patience.all.as_secs()), (1, 8));
    }
}
