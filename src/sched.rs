//! What threads ask of the system's scheduler.
//!
//! Threads of guests and of jobs often share processors with each other, with those of other
//! daemons and with the guests' own. How long one runs before the next decides how long requests
//! wait.

use std::io;
use std::time::Duration;

/// Sets the calling thread's nice value, and how long it wants to run at a time (a slice). The
/// scheduler of Linux 6.12 and later prefers who wants little when it wakes up, and takes no more
/// than the rest of a slice from who yields; older ones have slices of their own choice. A thread
/// that was given another policy than the usual one keeps it, and all that belongs to it: false.
///
/// # Errors
/// When the system refuses.
pub fn set(nice: i32, slice: Duration) -> io::Result<bool> {
    // SAFETY: no memory is passed; 0 is the calling thread.
    if unsafe { libc::sched_getscheduler(0) } != libc::SCHED_OTHER {
        return Ok(false);
    }
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: 0,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: slice.as_nanos() as u64,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel reads the attributes, whose size is in them; 0 is the calling thread.
    if unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(true)
}

/// The nice value of the calling thread.
#[must_use]
pub fn nice() -> i32 {
    // SAFETY: no memory is passed. An error cannot be told from -1, and 0 is the calling thread,
    // which there is.
    unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
}

/// Lets others run that are ready to.
pub fn give_turn() {
    // SAFETY: no memory is passed.
    unsafe { libc::sched_yield() };
}

/// How long a thread of this process was ready to run and had no processor; `None` where the
/// kernel does not tell (proc(5), `schedstat`).
#[must_use]
pub fn waited(thread: libc::pid_t) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).ok()?;
    let nanoseconds = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

#[cfg(test)]
mod tests {
    //! What would be caught: an attribute in the wrong field.

    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_was_set_holds() {
        std::thread::spawn(|| {
            let before = nice();
            if !set(before, Duration::from_micros(115)).unwrap() {
                // The tests were started with another policy.
                return;
            }
            assert_eq!(nice(), before);
            assert!(set(before + 1, Duration::from_micros(100)).unwrap());
            assert_eq!(nice(), before + 1);
        })
        .join()
        .unwrap();
    }

    /// Would catch a field of `schedstat` that is not the time in the queue, and a thread of
    /// another number that is taken for one which never waits.
    #[test]
    fn the_time_that_a_thread_waited() {
        let Ok(text) = std::fs::read_to_string("/proc/thread-self/schedstat") else {
            return;
        };
        let before: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
        // SAFETY: no memory is passed.
        let this = unsafe { libc::gettid() };
        assert!(waited(this) >= Some(Duration::from_nanos(before)));
        assert!(waited(this) < Some(Duration::from_secs(3600)));
        assert_eq!(waited(libc::pid_t::MAX), None);
    }
}
