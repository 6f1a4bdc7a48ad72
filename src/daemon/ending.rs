//! The end of the daemon: everything is ended at the same time, and what hangs is left behind.
//!
//! Exports and jobs end on threads of their own. An image is closed as soon as all that use it have
//! ended, so that nothing waits for a neighbour. One whose users take long is flushed in between,
//! and closed when they have ended after all; if they never do it is flushed once more and left as
//! it is: it must not be called clean while somebody may still write. After a time whatever is
//! left is named and abandoned, since whoever asked the daemon to end would kill it.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};

/// How long the end may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For the users of an image, before it is flushed in spite of them.
    pub users: Duration,
    /// For them as well, before it is flushed for the last time.
    pub last: Duration,
    /// For all.
    pub all: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            users: Duration::from_secs(5),
            last: Duration::from_secs(8),
            all: Duration::from_secs(9),
        }
    }
}

/// Something that is to end.
pub struct Part {
    /// Names it in messages, and to those that wait for it.
    pub name: String,
    /// Whose end is to come first.
    pub after: Vec<String>,
    /// Ends it. True: all that it comes after have ended. After a false it is called once more.
    pub work: Box<dyn FnMut(bool) + Send>,
    /// What to say if it does not end.
    pub lament: Box<dyn Fn() -> String>,
}

/// What has not ended.
struct Board {
    left: Mutex<BTreeSet<String>>,
    changed: Condvar,
}

impl Board {
    /// Waits until none of `names` is left. False: some are.
    fn wait(&self, names: &[String], until: Instant) -> bool {
        let mut left = self.left.lock();
        while names.iter().any(|name| left.contains(name)) {
            if self.changed.wait_until(&mut left, until).timed_out() {
                return !names.iter().any(|name| left.contains(name));
            }
        }
        true
    }

    fn ended(&self, name: &str) {
        self.left.lock().remove(name);
        self.changed.notify_all();
    }
}

/// Ends all parts, which have different names, and each of which is behind those that it comes
/// after. When this returns an error, threads are still busy
/// with those that are left: the process has to end without waiting for them.
///
/// # Errors
/// What did not end in time, in the words of the parts.
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
    let names: Vec<String> = parts.iter().map(|part| part.name.clone()).collect();
    let board = Arc::new(Board {
        left: Mutex::new(names.iter().cloned().collect()),
        changed: Condvar::new(),
    });
    let mut laments = Vec::with_capacity(parts.len());
    let mut here = Vec::new();
    for part in parts {
        laments.push((part.name.clone(), part.lament));
        let board = board.clone();
        let (name, after, mut work) = (part.name.clone(), part.after, part.work);
        let run: Run = Box::new(move || {
            let alone = board.wait(&after, began + patience.users);
            work(alone);
            if !alone {
                // What they have completed since then is to last too.
                work(board.wait(&after, began + patience.last));
            }
            board.ended(&name);
        });
        // What is given to a thread that cannot be had is dropped.
        let run = Arc::new(Mutex::new(Some(run)));
        let given = run.clone();
        if let Err(error) = spawn(Box::new(move || run_once(&given))) {
            log::warn!("a thread for the end of {}: {error}", part.name);
            here.push(run);
        }
    }
    // Late, and one after the other, is better than not at all.
    here.iter().for_each(run_once);
    if board.wait(&names, began + patience.all) {
        return Ok(());
    }
    let left = board.left.lock().clone();
    let words = laments
        .iter()
        .filter(|(name, _)| left.contains(name))
        .map(|(_, lament)| lament())
        .collect::<Vec<_>>();
    Err(Error::Invalid(format!(
        "abandoned after {:?}: {}",
        patience.all,
        words.join("; ")
    )))
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
    //! that is closed under its users, or not at all since they took long; something abandoned
    //! without a word; a part without a thread that is not ended.

    use std::sync::mpsc::channel;

    use super::*;

    fn part(name: &str, after: &[&str], work: impl FnMut(bool) + Send + 'static) -> Part {
        let lament = format!("{name} hangs");
        Part {
            name: name.to_owned(),
            after: after.iter().map(|&name| name.to_owned()).collect(),
            work: Box::new(work),
            lament: Box::new(move || lament.clone()),
        }
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
            last: Duration::from_millis(100),
            all: Duration::from_millis(500),
        };
        let parts = vec![
            part("image a", &["a"], tell("image a")),
            part("image b", &["b", "jobs"], tell("image b")),
            part("image ab", &["a", "b"], tell("image ab")),
            part("a", &[], move |_| assert!(hang.recv().is_err())),
            part("b", &[], tell("b")),
            part("jobs", &[], tell("jobs")),
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
            ("jobs", true),
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
            last: Duration::from_secs(3600),
            all: Duration::from_secs(3600),
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
        end_on(parts, Patience::default(), |_| {
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
            users: Duration::from_secs(3600),
            last: Duration::from_secs(3600),
            all: Duration::from_secs(3600),
        };
        end(parts, forever).unwrap();
    }
}
