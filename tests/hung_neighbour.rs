//! A disk whose storage hangs, beside another one on the same thread.
//!
//! What would be caught: a call to storage that blocks its thread while a file system hangs, and with
//! it whatever else the thread serves; one that does not go on when the file system does.

#![allow(clippy::unwrap_used)]

mod common;

use std::cell::Cell;
use std::future::Future;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use common::Res;
use common::frontend::PATIENCE;
use common::skips::skip;
use common::slow::Slow;
use stratablk::reactor::Reactor;
use stratablk::storage::OpenFlags;
use stratablk::storage::{Access, AlignedBuf, FileStorage, Storage, io};

const LEN: usize = 1 << 20;

const FLAGS: OpenFlags = OpenFlags {
    writable: true,
    direct: false,
    no_flush: false,
    no_lock: false,
    force_share: false,
};

/// Lets the file system go on, however the test ends.
struct Resume<'a>(&'a Slow);

impl Drop for Resume<'_> {
    fn drop(&mut self) {
        self.0.signal(libc::SIGCONT);
    }
}

fn open(path: &Path) -> Arc<FileStorage> {
    Arc::new(FileStorage::open(path, FLAGS).unwrap())
}

/// Runs the thread until `done`.
fn run_until(reactor: &Reactor, what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        if !reactor.turn() {
            reactor.wait(Some(std::time::Duration::from_millis(10)));
        }
    }
}

fn spawn(reactor: &Reactor, work: impl Future<Output = ()> + 'static) -> Rc<Cell<bool>> {
    let done = Rc::new(Cell::new(false));
    let ended = done.clone();
    reactor.spawn(async move {
        work.await;
        ended.set(true);
    });
    done
}

/// What another disk does meanwhile: all that storage can be asked for.
async fn neighbour(storage: Arc<FileStorage>, value: u8) {
    let bytes = AlignedBuf::copy_of(&[value; 4096]);
    io::write_buf(&*storage, 0, &bytes).await.unwrap();
    io::sync(&*storage).await.unwrap();
    let read = io::read_buf(&*storage, 0, 4096).await.unwrap();
    assert!(*read == *bytes);
    assert_eq!(storage.len().await.unwrap(), LEN as u64);
    storage.set_len(LEN as u64).await.unwrap();
    assert!(storage.next_data(0).await.is_some());
    storage.set_access(Access::Write).await.unwrap();
    let again = storage.open_writable().await.unwrap();
    again.set_access(Access::Read).await.unwrap();
    drop(again);
    storage.set_access(Access::Read).await.unwrap();
}

type Call = (&'static str, fn(Arc<FileStorage>) -> Rc<Cell<bool>>);

fn ask<F: Future<Output = ()> + 'static>(work: F) -> Rc<Cell<bool>> {
    spawn(&Reactor::for_this_thread().unwrap(), work)
}

const CALLS: [Call; 10] = [
    ("read", |s| {
        ask(async move { drop(io::read_buf(&*s, 8192, 4096).await.unwrap()) })
    }),
    ("write", |s| {
        ask(async move {
            let bytes = AlignedBuf::copy_of(&[3; 4096]);
            io::write_buf(&*s, 4096, &bytes).await.unwrap();
        })
    }),
    ("sync", |s| ask(async move { io::sync(&*s).await.unwrap() })),
    ("zero", |s| {
        ask(async move { io::zero(&*s, 12288, 4096, false).await.unwrap() })
    }),
    ("len", |s| {
        ask(async move { assert_eq!(s.len().await.unwrap(), LEN as u64) })
    }),
    ("set_len", |s| {
        ask(async move { drop(s.set_len(LEN as u64).await) })
    }),
    ("next_data", |s| {
        ask(async move {
            let _ = s.next_data(0).await;
        })
    }),
    ("set_access", |s| {
        ask(async move { drop(s.set_access(Access::Write).await) })
    }),
    ("open_writable", |s| {
        ask(async move { drop(s.open_writable().await) })
    }),
    ("close", |s| ask(async move { drop(s) })),
];

#[test]
fn no_call_of_a_file_that_hangs_keeps_its_thread() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let Some(slow) = Slow::mount(dir.path(), LEN as u64)? else {
        return Ok(skip("no file systems in user space here")?);
    };
    let other = dir.path().join("other");
    std::fs::write(&other, vec![1; LEN])?;
    let reactor = Reactor::for_this_thread()?;
    let beside = open(&other);
    for (round, (what, call)) in CALLS.into_iter().enumerate() {
        let hung = open(&slow.file);
        slow.signal(libc::SIGSTOP);
        let resume = Resume(&slow);
        let asked = call(hung);
        // All of it on this thread, from beginning to end.
        let done = spawn(&reactor, neighbour(beside.clone(), round as u8));
        run_until(&reactor, what, || done.get());
        drop(resume);
        run_until(&reactor, what, || asked.get());
    }
    // What waits for a file that hangs can be forgotten, in whatever call.
    let files: Vec<_> = CALLS.iter().map(|_| open(&slow.file)).collect();
    slow.signal(libc::SIGSTOP);
    let resume = Resume(&slow);
    let mut waiting: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
    for storage in files {
        waiting.push(Box::pin(async move {
            let _ = io::read_buf(&*storage, 8192, 4096).await;
        }));
    }
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    for work in &mut waiting {
        let _ = work.as_mut().poll(&mut context);
    }
    drop(waiting);
    let done = spawn(&reactor, neighbour(beside.clone(), 99));
    run_until(&reactor, "after what was cancelled", || done.get());
    drop(resume);
    run_until(&reactor, "the end of what was cancelled", || {
        reactor.in_flight() == 0
    });
    drop(beside);
    Reactor::leave_thread();
    Ok(())
}
