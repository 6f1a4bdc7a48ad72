//! What would be caught: a start that fails for a process which only ends, one that waits for a
//! process which runs, or for ever; a refusal that does not say who it was and what to do; a lock on
//! a file that nobody else finds; an order to end that is not obeyed meanwhile; a walk through all
//! processes in the few milliseconds that a kill takes.

use std::path::PathBuf;
use std::sync::mpsc::channel;

use super::*;
use crate::options::SocketAddress;

/// A world whose time passes with each pause.
struct Scripted<F> {
    holder: Holder,
    looks: Vec<Duration>,
    waited: Duration,
    step: Duration,
    at_pause: F,
}

impl<F: FnMut(Duration) -> bool> World for Scripted<F> {
    fn holder(&mut self, _: &File) -> Holder {
        self.looks.push(self.waited);
        self.holder.clone()
    }

    fn waited(&self) -> Duration {
        self.waited
    }

    fn pause(&mut self) -> bool {
        self.waited += self.step;
        (self.at_pause)(self.waited)
    }
}

fn scripted<F: FnMut(Duration) -> bool>(holder: Holder, at_pause: F) -> Scripted<F> {
    Scripted {
        holder,
        looks: Vec::new(),
        waited: Duration::ZERO,
        step: Duration::from_millis(10),
        at_pause,
    }
}

const UNSEEN: Holder = Holder::Unknown { all_seen: true };
const LIMIT: Duration = Duration::from_secs(30);

/// A fence that another one holds, and a second file of it.
fn held() -> (tempfile::TempDir, PathBuf, FenceFile, FenceFile) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.sock.fence");
    let (first, second) = (
        FenceFile::open(&path).unwrap(),
        FenceFile::open(&path).unwrap(),
    );
    assert!(first.try_lock().unwrap());
    (dir, path, first, second)
}

#[test]
fn io_that_ends_is_waited_for() {
    let killed = Holder::Ending {
        pid: 4711,
        command: "stratablk".into(),
    };
    for (holder, ends, looks) in [
        (UNSEEN, 50, vec![]),
        (UNSEEN, 1000, vec![200, 400, 800]),
        (
            killed,
            29_990,
            vec![200, 400, 800, 1600, 3200, 6400, 12_800, 25_600],
        ),
    ] {
        let (_dir, _, first, second) = held();
        let (mut first, ends) = (Some(first), Duration::from_millis(ends));
        let mut world = scripted(holder, |waited| {
            if waited >= ends {
                first = None;
            }
            true
        });
        let fence = take(second, LIMIT, &mut world).unwrap().unwrap();
        assert!(fence.is_in_place());
        assert_eq!(world.waited, ends);
        assert_eq!(
            world.looks,
            looks
                .into_iter()
                .map(Duration::from_millis)
                .collect::<Vec<_>>()
        );
    }
}

#[test]
fn a_process_that_does_not_let_go_is_named() {
    let process = |runs| {
        let (pid, command) = (4711, "stratablk".to_owned());
        match runs {
            true => Holder::Process { pid, command },
            false => Holder::Ending { pid, command },
        }
    };
    let unseen = Holder::Unknown { all_seen: false };
    for (holder, limit, waited, said) in [
        (
            process(true),
            30_000,
            200,
            "process 4711 (stratablk), which runs: end it",
        ),
        (
            process(true),
            0,
            0,
            "process 4711 (stratablk), which runs: end it",
        ),
        (Holder::Own, 30_000, 200, "by this process itself"),
        (
            process(false),
            3000,
            3000,
            "process 4711 (stratablk) has been killed",
        ),
        (
            UNSEEN,
            3000,
            3000,
            "after 3000 ms: I/O of a process that has ended has not ended",
        ),
        (UNSEEN, 0, 0, "--fence-timeout=SECONDS"),
        (unseen, 100, 100, "or another user's"),
    ] {
        let (_dir, path, _first, second) = held();
        let mut world = scripted(holder, |_| true);
        let text = take(second, Duration::from_millis(limit), &mut world).unwrap_err();
        assert_eq!(world.waited, Duration::from_millis(waited), "{text}");
        assert!(text.contains(said), "{text}");
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    }
}

#[test]
fn a_process_that_has_been_told_to_end_is_waited_for() {
    let (_dir, _, first, second) = held();
    first.mark_ending().unwrap();
    let mut first = Some(first);
    let runs = Holder::Process {
        pid: 4711,
        command: "stratablk".into(),
    };
    let mut world = scripted(runs, |waited| {
        if waited == Duration::from_secs(5) {
            first = None;
        }
        true
    });
    let fence = take(second, LIMIT, &mut world).unwrap().unwrap();
    assert!(!fence.is_ending(), "the next one begins");
    assert_eq!(world.waited, Duration::from_secs(5));
}

#[test]
fn an_order_to_end_ends_the_wait() {
    let (_dir, _, _first, second) = held();
    let mut world = scripted(UNSEEN, |waited| waited < Duration::from_secs(2));
    assert!(take(second, LIMIT, &mut world).unwrap().is_none());
}

#[test]
fn the_file_that_is_locked_is_the_one_at_the_name() {
    // Removed, or another one in its place: before it is locked, and while it is waited for.
    for (replaced, waits) in [(false, false), (false, true), (true, false), (true, true)] {
        let (_dir, path, first, second) = held();
        let replace = || {
            std::fs::remove_file(&path).unwrap();
            replaced.then(|| FenceFile::open(&path).unwrap())
        };
        let (mut first, mut other) = (Some(first), None);
        if !waits {
            other = replace();
            first = None;
        }
        let mut world = scripted(UNSEEN, |waited| {
            if waited == Duration::from_millis(50) && waits {
                other = replace();
            }
            // The I/O that it was locked for ends.
            if waited == Duration::from_millis(90) {
                first = None;
            }
            true
        });
        let fence = take(second, LIMIT, &mut world).unwrap().unwrap();
        assert!(fence.is_in_place());
        assert!(!waits || world.waited >= Duration::from_millis(90));
        let again = FenceFile::open(&path).unwrap();
        assert!(!again.try_lock().unwrap(), "nobody else meets the lock");
        assert_eq!(other.is_some_and(|other| other.is_same(&fence)), replaced);
    }
}

#[test]
fn a_fence_that_never_stays_is_given_up() {
    let (_dir, path, first, second) = held();
    drop(first);
    std::fs::remove_file(&path).unwrap();
    let mut world = scripted(UNSEEN, |_| {
        let _ = std::fs::remove_file(&path);
        FenceFile::open(&path).unwrap();
        true
    });
    // Each that it opens is gone by the time it looks.
    world.step = Duration::from_secs(1);
    let text = match take(second, Duration::ZERO, &mut world) {
        Err(text) => text,
        Ok(_) => panic!("a lock on what is gone"),
    };
    assert!(text.contains("replaced again and again"), "{text}");
}

#[test]
fn two_exports_have_two_fences() {
    let dir = tempfile::tempdir().unwrap();
    let export = |id: &str, socket: PathBuf| ExportOptions {
        id: id.into(),
        node_name: "n".into(),
        addr: SocketAddress::Unix(socket),
        writable: false,
        writethrough: false,
        num_queues: 1,
        logical_block_size: 512,
        iothread: None,
        serial: None,
    };
    let socket = dir.path().join("vm.sock");
    let same = dir.path().join(".").join("vm.sock");
    let exports = [export("a", socket), export("b", same)];
    let (_stop, stopped) = channel();
    let text = hold(&exports, None, LIMIT, &stopped)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("export 'b'") && text.contains("another export's"),
        "{text}"
    );
}
