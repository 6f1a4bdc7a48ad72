//! What would be caught: lost wake-ups and completions, operations whose memory is freed under the
//! kernel or never, also when their thread leaves the reactor; work that is left half done then, or
//! dropped in a way that ends the process; timers that fire early, tasks that starve others.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::*;

#[test]
fn a_wake_from_another_thread_reaches_a_sleeping_task() {
    let reactor = Reactor::for_this_thread().unwrap();
    let event = std::sync::Arc::new(event_listener::Event::new());
    let listener = event.listen();
    let other = std::thread::spawn({
        let event = event.clone();
        move || event.notify(1)
    });
    reactor.block_on(listener);
    other.join().unwrap();
}

#[test]
fn sleep_does_not_end_early_and_tasks_run_meanwhile() {
    let reactor = Reactor::for_this_thread().unwrap();
    let ran = Rc::new(Cell::new(0));
    for _ in 0..3 {
        let ran = ran.clone();
        reactor.spawn(async move {
            yield_now().await;
            ran.set(ran.get() + 1);
        });
    }
    let start = Instant::now();
    reactor.block_on(reactor.sleep(Duration::from_millis(20)));
    assert!(start.elapsed() >= Duration::from_millis(20));
    assert_eq!(ran.get(), 3);
    assert_eq!(reactor.tasks(), 0);
}

#[test]
fn a_watched_eventfd_is_reported_on_every_signal_without_being_read() {
    let reactor = Reactor::for_this_thread().unwrap();
    let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    reactor.watch(event.as_raw_fd(), 7).unwrap();
    for _ in 0..3 {
        event.write(1).unwrap();
        let seen = loop {
            reactor.turn();
            if let Some(completion) = reactor.next_completion() {
                break completion;
            }
            reactor.wait(None);
        };
        assert_eq!(seen.value, 7);
    }
    reactor.unwatch(7).unwrap();
}

/// What an operation uses, and whether it is still there.
struct Used {
    buffer: Box<[u8; 8]>,
    freed: Rc<Cell<Option<u64>>>,
}

impl Drop for Used {
    fn drop(&mut self) {
        self.freed.set(Some(u64::from_ne_bytes(*self.buffer)));
    }
}

/// Begins to read from `event`, as a task does; and what the buffer held when it was freed.
fn begin_read(
    reactor: &Reactor,
    event: &vmm_sys_util::eventfd::EventFd,
) -> (OpGuard<Used>, Rc<Cell<Option<u64>>>) {
    let mut buffer = Box::new([0; 8]);
    let freed = Rc::new(Cell::new(None));
    let entry = opcode::Read::new(types::Fd(event.as_raw_fd()), buffer.as_mut_ptr(), 8).build();
    let mut guard = reactor.reserve(Used {
        buffer,
        freed: freed.clone(),
    });
    // SAFETY: the guard keeps the buffer until the operation has ended.
    unsafe { reactor.start(entry, guard.token()) }.unwrap();
    guard.mark_started();
    (guard, freed)
}

#[test]
fn dropping_an_operation_waits_for_nobody_and_keeps_its_memory() {
    let reactor = Reactor::for_this_thread().unwrap();
    let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let (guard, freed) = begin_read(&reactor, &event);
    drop(guard);
    assert_eq!((reactor.queued(), reactor.in_flight()), (0, 1));
    while reactor.turn() {}
    assert_eq!(freed.get(), None);
    event.write(5).unwrap();
    while reactor.in_flight() > 0 {
        reactor.turn();
    }
    assert_eq!(freed.get(), Some(5), "freed at once, and not before");
    // One that has ended, or has not begun, keeps nothing.
    event.write(6).unwrap();
    let (mut guard, freed) = begin_read(&reactor, &event);
    reactor.block_on(&mut guard).unwrap();
    drop(guard);
    assert_eq!(freed.get(), Some(6));
    let (buffer, freed) = (Box::new([0; 8]), Rc::new(Cell::new(None)));
    let used = Used {
        buffer,
        freed: freed.clone(),
    };
    drop(reactor.reserve(used));
    assert_eq!(freed.get(), Some(0));
    assert_eq!(reactor.with_ops(|ops| ops.abandoned()), 0);
}

#[test]
fn a_reactor_that_ends_frees_nothing_that_is_in_use() {
    let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let reactor = Reactor::for_this_thread().unwrap();
    let (guard, freed) = begin_read(&reactor, &event);
    drop(guard);
    Reactor::leave_thread();
    drop(reactor);
    assert_eq!(freed.get(), None);
}

#[test]
fn a_thread_that_leaves_its_reactor_ends_what_nobody_waits_for() {
    let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let reactor = Reactor::for_this_thread().unwrap();
    let (guard, freed) = begin_read(&reactor, &event);
    drop(guard);
    let remote = reactor.remote();
    let (mut outside, ended) = (reactor.reserve(()), Rc::new(Cell::new(false)));
    outside.mark_started();
    let (token, done) = (outside.token(), ended.clone());
    reactor.spawn(async move {
        outside.await.unwrap();
        done.set(true);
    });
    let other = std::thread::spawn(move || {
        event.write(5).unwrap();
        remote.complete(token, Ok(0));
    });
    Reactor::end_thread();
    assert_eq!((freed.get(), ended.get()), (Some(5), true));
    assert!(Reactor::current().is_none());
    assert_eq!((reactor.in_flight(), reactor.tasks()), (0, 0));
    other.join().unwrap();
}

#[test]
fn work_that_ends_with_its_thread_is_left() {
    let thread = std::thread::spawn(|| {
        let reactor = Reactor::for_this_thread().unwrap();
        reactor.spawn(async { carry_out(std::future::pending::<()>()).await });
        while reactor.turn() {}
    });
    thread.join().unwrap();
}

#[test]
fn work_that_has_begun_is_carried_out() {
    let reactor = Reactor::for_this_thread().unwrap();
    let steps = Rc::new(Cell::new(0));
    let work = || {
        let steps = steps.clone();
        carry_out(async move {
            steps.set(1);
            yield_now().await;
            steps.set(2);
            yield_now().await;
            steps.set(3);
            7
        })
    };
    drop(work());
    assert_eq!((steps.get(), reactor.tasks()), (0, 0), "it had not begun");
    let mut begun = work();
    let waker = Waker::noop();
    let mut context = Context::from_waker(waker);
    assert!(Pin::new(&mut begun).poll(&mut context).is_pending());
    drop(begun);
    assert_eq!(steps.get(), 1);
    while reactor.tasks() > 0 {
        assert!(reactor.turn());
    }
    assert_eq!(steps.get(), 3);
    assert_eq!(reactor.block_on(work()), 7);
    assert_eq!(reactor.tasks(), 0);
}

#[test]
fn a_descriptor_that_cannot_be_watched_is_given_up() {
    // Arming it again and again would never let the thread sleep.
    let reactor = Reactor::for_this_thread().unwrap();
    reactor.watch(-1, 9).unwrap();
    reactor.submit();
    while reactor.turn() {}
    assert_eq!(reactor.inner.ops.borrow().watched(Token::watch(9)), None);
}

#[test]
fn a_watch_that_was_ended_is_not_armed_again() {
    let reactor = Reactor::for_this_thread().unwrap();
    let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    reactor.watch(event.as_raw_fd(), 11).unwrap();
    reactor.submit();
    reactor.unwatch(11).unwrap();
    while reactor.turn() {}
    event.write(1).unwrap();
    while reactor.turn() {}
    assert!(reactor.next_completion().is_none());
}

#[test]
fn operations_are_completed_by_another_thread() {
    let reactor = Reactor::for_this_thread().unwrap();
    let (sender, started) = std::sync::mpsc::channel::<Token>();
    let remote = reactor.remote();
    let other = std::thread::spawn(move || {
        for token in started {
            let count = match token.is_client() {
                true => token.value() as u32,
                false => 7,
            };
            remote.complete(token, Ok(count));
        }
    });
    let mut polled = 0;
    for number in 0..2000 {
        // Of a task; the reactor may be about to sleep, asleep or awake.
        let mut guard = reactor.reserve(());
        guard.mark_started();
        sender.send(guard.token()).unwrap();
        assert_eq!(reactor.block_on(guard).unwrap(), 7);
        // Of the data path.
        sender.send(Token::client(number)).unwrap();
        let completion = loop {
            reactor.turn();
            if let Some(completion) = reactor.next_completion() {
                break completion;
            }
            polled += 1;
            reactor.wait(None);
        };
        assert_eq!(completion.value, number);
        assert_eq!(completion.result.unwrap(), number as u32);
    }
    assert!(polled > 0, "it never waited");
    drop(sender);
    other.join().unwrap();
}
