//! What would be caught: lost wake-ups and completions, operations whose memory is freed under the kernel,
//! timers that fire early, tasks that starve others.

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

#[test]
fn dropping_an_operation_waits_for_the_kernel() {
    let reactor = Reactor::for_this_thread().unwrap();
    let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let mut buffer = [0u8; 8];
    let mut guard = reactor.reserve();
    let entry = opcode::Read::new(types::Fd(event.as_raw_fd()), buffer.as_mut_ptr(), 8).build();
    // SAFETY: the buffer outlives the guard, whose drop waits for the operation.
    unsafe { reactor.start(entry, guard.token()) }.unwrap();
    guard.mark_started();
    reactor.submit();
    event.write(5).unwrap();
    drop(guard);
    assert_eq!(u64::from_ne_bytes(buffer), 5);
    assert_eq!(reactor.in_flight(), 0);
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
        let mut guard = reactor.reserve();
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
