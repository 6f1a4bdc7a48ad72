//! What would be caught: a lock that is not waited for though nobody who runs holds it, a wait
//! that is not ended by the lock's release or by the deadline, a command that waits long for a
//! program that goes on, a failure that does not say who holds the lock; locks of our own that are
//! about to go and are not waited for; locks that are given
//! back before others are taken, so that another program gets in between, and an attempt that
//! failed and holds more or less than before.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::*;

fn open(path: &Path) -> ImageLock {
    let file = File::options().read(true).write(true).open(path).unwrap();
    ImageLock::new(Arc::new(file), path)
}

/// A world whose time passes with each pause.
struct Scripted<F> {
    holder: Holder,
    waited: Duration,
    at_pause: F,
}

impl<F: FnMut(Duration)> World for Scripted<F> {
    fn holder(&mut self, _file: &File, _byte: i64) -> Holder {
        self.holder.clone()
    }

    fn waited(&self) -> Duration {
        self.waited
    }

    fn pause(&mut self) {
        self.waited += Patience::LONGEST_PAUSE;
        (self.at_pause)(self.waited);
    }
}

const UNSEEN: Holder = Holder::Unknown { all_seen: true };
const ALL: [Access; 3] = [Access::Read, Access::ReadShared, Access::Write];

fn conflict(one: Access, other: Access) -> bool {
    (one == Access::Write && other != Access::ReadShared)
        || (other == Access::Write && one != Access::ReadShared)
}

/// A file with somebody else's locks, and our own descriptor of it.
fn held(access: Access) -> (tempfile::NamedTempFile, ImageLock, ImageLock) {
    let named = tempfile::NamedTempFile::new().unwrap();
    let (other, own) = (open(named.path()), open(named.path()));
    other.set(access).unwrap();
    (named, other, own)
}

#[test]
fn a_lock_that_nobody_is_seen_to_hold_is_waited_for() {
    for (theirs, ours) in ALL.iter().flat_map(|a| ALL.map(|b| (*a, b))) {
        let (_named, other, own) = held(theirs);
        let mut other = Some(other);
        let mut pauses = 0;
        let mut world = Scripted {
            holder: UNSEEN,
            waited: Duration::ZERO,
            at_pause: |_| {
                pauses += 1;
                if pauses == 3 {
                    other = None;
                }
            },
        };
        own.set_in(&mut world, ours).unwrap();
        let expected = if conflict(theirs, ours) { 3 } else { 0 };
        assert_eq!(pauses, expected, "{theirs:?}, {ours:?}");
    }
}

#[test]
fn the_wait_is_bounded_and_says_who_it_was() {
    let process = |pid| Holder::Process {
        pid,
        command: "qemu-io".into(),
    };
    for (holder, longest, said) in [
        (Holder::Own, Duration::ZERO, "This process uses it itself"),
        (
            process(4711),
            Patience::RUNNING,
            "Process 4711 (qemu-io) holds",
        ),
        (
            UNSEEN,
            Patience::UNKNOWN,
            "left over from one that was killed",
        ),
        (
            Holder::Ending {
                pid: 4711,
                command: "qemu-io".into(),
            },
            Patience::UNKNOWN,
            "Process 4711 (qemu-io), which has been killed",
        ),
        (
            Holder::Unknown { all_seen: false },
            Patience::UNKNOWN,
            "this user may look at",
        ),
    ] {
        let (named, _other, own) = held(Access::Write);
        let mut last = Duration::ZERO;
        let mut world = Scripted {
            holder,
            waited: Duration::ZERO,
            at_pause: |waited| last = waited,
        };
        let error = own.set_in(&mut world, Access::Read).unwrap_err();
        assert_eq!(last, longest, "{said}");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let text = error.to_string();
        let qemus = format!(
            "Could not open '{0}': Failed to get shared \"write\" lock: Is another process \
             using the image [{0}]? ",
            named.path().display()
        );
        assert!(text.starts_with(&qemus), "{text}");
        assert!(text.contains(said), "{text}");
    }
}

#[test]
fn locks_that_are_about_to_be_given_back_are_waited_for() {
    for local in [true, false] {
        let (_named, mut other, own) = held(Access::Write);
        Arc::get_mut(&mut other.all).unwrap().local = local;
        let leaving = other.leaving();
        assert_eq!(other.leave(), local);
        let mut other = Some((other, leaving));
        let mut pauses = 0;
        let mut world = Scripted {
            holder: Holder::Own,
            waited: Duration::ZERO,
            at_pause: |_| {
                pauses += 1;
                other = None;
            },
        };
        own.set_in(&mut world, Access::Write).unwrap();
        assert_eq!(pauses, u32::from(!local));
    }
}

#[test]
fn who_goes_on_in_the_place_of_a_dead_one_is_not_waited_for_long() {
    let (_named, _other, own) = held(Access::Write);
    let mut world = Scripted {
        holder: Holder::Process {
            pid: 1,
            command: "new".into(),
        },
        waited: Patience::RUNNING,
        at_pause: |_| panic!("waited"),
    };
    own.set_in(&mut world, Access::Write).unwrap_err();
}

#[test]
fn nobody_gets_in_while_a_reader_becomes_a_writer_and_back() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let ours = open(file.path());
    ours.set(Access::Read).unwrap();
    let (over, tries) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let theirs = open(file.path());
            while !over.load(Ordering::Relaxed) {
                assert!(theirs.set(Access::Write).is_err(), "two writers");
                tries.fetch_add(1, Ordering::Relaxed);
            }
        });
        while tries.load(Ordering::Relaxed) < 100 && !other.is_finished() {
            // What they have taken for their attempt may be in our way, too.
            let _ = ours.set(Access::Write);
            let _ = ours.set(Access::Read);
        }
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_failure_leaves_all_as_it_was() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (ours, theirs, third) = (open(file.path()), open(file.path()), open(file.path()));
    for before in [Access::Read, Access::ReadShared] {
        ours.set(before).unwrap();
        theirs.set(Access::Read).unwrap();
        assert!(ours.set(Access::Write).is_err());
        theirs.set(Access::ReadShared).unwrap();
        // A reader keeps writers out, and one that shares does not.
        assert_eq!(third.set(Access::Write).is_err(), before == Access::Read);
        third.set(Access::ReadShared).unwrap();
    }
    ours.set(Access::Write).unwrap();
    assert!(third.set(Access::Read).is_err());
    drop(ours);
    third.set(Access::Write).unwrap();
}

#[test]
fn one_writer_that_ends_takes_no_lock_from_another() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (first, theirs) = (open(file.path()), open(file.path()));
    first.set(Access::Read).unwrap();
    let (second, third) = (first.another(), first.another());
    for writer in [&second, &third] {
        writer.set(Access::Write).unwrap();
    }
    second.set(Access::Read).unwrap();
    theirs.set(Access::Read).unwrap_err();
    drop(third);
    theirs.set(Access::Read).unwrap();
    theirs.set(Access::Write).unwrap_err();
    drop((first, second));
    theirs.set(Access::Write).unwrap();
}
