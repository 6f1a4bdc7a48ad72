//! What would be caught: an end that waits for a neighbour that hangs, or for ever; an image
//! that is closed under its users, or not at all since they took long; one that is abandoned
//! while it is only slow, or since its users wait for a slow sync; one on a disk that was dead before
//! which is waited for, or not even when the disk has come back; something abandoned or gone wrong
//! without a word; a part without a thread that is not ended.

use std::sync::mpsc::channel;

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

/// The storage of an image.
struct Disk {
    syncing: Box<dyn Fn() -> bool + Send + Sync>,
    silent: Mutex<Duration>,
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            syncing: Box::new(|| false),
            silent: Mutex::default(),
        }
    }
}

impl Disk {
    /// One with a sync under way.
    fn silent_for(time: Duration) -> Arc<Self> {
        Arc::new(Self {
            syncing: Box::new(|| true),
            silent: Mutex::new(time),
        })
    }
}

impl Activity for Disk {
    fn is_syncing(&self) -> bool {
        (self.syncing)()
    }

    fn silent_for(&self) -> Duration {
        *self.silent.lock()
    }
}

fn part(name: &str, after: &[&str], mut work: impl FnMut(bool) + Send + 'static) -> Part {
    let abandoned = format!("{name} hangs");
    let storage: Arc<dyn Activity> = Arc::new(Disk::default());
    Part {
        name: name.to_owned(),
        after: after.iter().map(|&name| name.to_owned()).collect(),
        work: Box::new(move |alone| {
            work(alone);
            Ok(())
        }),
        storage: name.starts_with("image").then_some(storage),
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
        silence: SILENCE,
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
        silence: SILENCE,
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
        silence: SILENCE,
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
        silence: SILENCE,
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
    // What is waited for ends only after it was asked for.
    let begin = Mutex::new(begin);
    image.storage = Some(Arc::new(Disk {
        syncing: Box::new(move || {
            let _ = begin.lock().send(());
            true
        }),
        silent: Mutex::default(),
    }));
    let export = part("export", &[], move |_| {
        begun.recv().unwrap();
        be_slow();
    });
    let patience = Patience {
        users: Duration::ZERO,
        hung: Duration::from_millis(100),
        all: HOUR,
        silence: SILENCE,
    };
    end(vec![image, export], patience).unwrap();
    assert_eq!(calls.try_iter().collect::<Vec<_>>(), [false, true]);
}

/// An image on a disk with a sync under way, and its export, which hang until the returned ends are
/// dropped.
fn hung(disk: &Arc<Disk>) -> (Vec<Part>, [std::sync::mpsc::Sender<()>; 2]) {
    let (release, hang) = channel::<()>();
    let (release_user, user_hangs) = channel::<()>();
    let mut image = part("image", &["export"], move |_| assert!(hang.recv().is_err()));
    image.storage = Some(disk.clone());
    let export = part("export", &[], move |_| assert!(user_hangs.recv().is_err()));
    (vec![image, export], [release, release_user])
}

/// Nothing that hangs ends by itself here, and nothing else than the short bound ends the end.
const SHORT: Patience = Patience {
    users: Duration::ZERO,
    hung: Duration::from_millis(50),
    all: HOUR,
    silence: SILENCE,
};

#[test]
fn a_disk_that_was_silent_before_is_not_waited_for() {
    let (parts, release) = hung(&Disk::silent_for(SILENCE));
    let (others, seen) = channel();
    let beside = part("image of another disk", &[], move |alone| {
        others.send(alone).unwrap();
    });
    let parts = parts.into_iter().chain([beside]).collect();
    let error = end(parts, SHORT).unwrap_err().to_string();
    assert_eq!(error, "abandoned after 0 s: image hangs; export hangs");
    assert_eq!(seen.try_iter().collect::<Vec<_>>(), [true]);
    drop(release);
}

#[test]
fn a_sync_that_began_with_the_end_is_slow() {
    let disk = Disk::silent_for(SILENCE - Duration::from_millis(1));
    let (parts, release) = hung(&disk);
    let waiting = std::thread::spawn(move || end(parts, SHORT));
    be_slow();
    // It is silent by now; it was not when the end began.
    *disk.silent.lock() = Duration::from_millis(300);
    assert!(!waiting.is_finished());
    drop(release);
    waiting.join().unwrap().unwrap();
}

#[test]
fn a_silent_disk_that_answers_after_all_has_all_the_time() {
    let disk = Disk::silent_for(SILENCE);
    let (parts, release) = hung(&disk);
    let patience = Patience {
        hung: Duration::from_millis(500),
        ..SHORT
    };
    let waiting = std::thread::spawn(move || end(parts, patience));
    // Before the short bound: one of its operations has ended.
    *disk.silent.lock() = Duration::ZERO;
    std::thread::sleep(Duration::from_millis(800));
    assert!(!waiting.is_finished());
    drop(release);
    waiting.join().unwrap().unwrap();
}

#[test]
fn an_image_that_is_used_and_whose_disk_comes_back_is_closed() {
    let disk = Disk::silent_for(SILENCE);
    let (called, calls) = channel();
    let (release, user_hangs) = channel::<()>();
    let back = disk.clone();
    let mut release = Some(release);
    let mut image = part("image", &["export"], move |alone| {
        called.send(alone).unwrap();
        if !alone {
            // Its flush ends when the disk is back; the user waits for the next sync.
            *back.silent.lock() = Duration::ZERO;
            let release = release.take();
            std::thread::spawn(move || {
                be_slow();
                drop(release);
            });
        }
    });
    image.storage = Some(disk);
    let export = part("export", &[], move |_| assert!(user_hangs.recv().is_err()));
    end(vec![image, export], SHORT).unwrap();
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
        silence: SILENCE,
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
    // A disk that is silent, for at most ten seconds, is not waited for any longer.
    for (bound, silence) in [(None, 10), (Some(8), 10), (Some(288), 36)] {
        let patience = Patience::within(bound.map(Duration::from_secs));
        assert_eq!(patience.silence.as_secs(), silence, "{bound:?}");
    }
}
