//! Adaptive polling: how long to look for work before sleeping.
//!
//! Sleeping and being woken costs more than looking around for a moment, if work comes soon. The
//! window grows while sleeps turn out shorter than the longest window that is allowed, and
//! closes when they are longer: an idle queue costs nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The first window.
const FIRST: Duration = Duration::from_micros(4);

/// What a poll came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Polled {
    /// There was work.
    pub(super) found: bool,
    /// How long it took, up to the last time that the clock was read: nothing for one that found
    /// work at once. Another reading only to count would cost as much as the looks it counts.
    pub(super) time: Duration,
}

#[derive(Debug)]
pub(super) struct Poller {
    /// The longest window, in microseconds. It may change at any time.
    max_us: Arc<AtomicU32>,
    window: Duration,
}

impl Poller {
    pub(super) fn new(max_us: Arc<AtomicU32>) -> Self {
        Self {
            max_us,
            window: Duration::ZERO,
        }
    }

    fn max(&self) -> Duration {
        Duration::from_micros(self.max_us.load(Ordering::Relaxed).into())
    }

    /// Looks for work, until `found` says there is some or the window is over. `None`: the window
    /// is closed, and there was no look.
    pub(super) fn poll(&self, mut found: impl FnMut() -> bool) -> Option<Polled> {
        let window = self.window.min(self.max());
        if window.is_zero() {
            return None;
        }
        let start = Instant::now();
        let mut time = Duration::ZERO;
        loop {
            // Reading the clock costs as much as a few looks.
            for _ in 0..16 {
                if found() {
                    return Some(Polled { found: true, time });
                }
                std::hint::spin_loop();
            }
            time = start.elapsed();
            if time >= window {
                return Some(Polled { found: false, time });
            }
        }
    }

    /// Whether sleeps need to be measured.
    pub(super) fn is_on(&self) -> bool {
        !self.max().is_zero()
    }

    /// Learns from a sleep.
    pub(super) fn slept(&mut self, time: Duration) {
        let max = self.max();
        if time > max {
            self.window = Duration::ZERO;
        } else if time > self.window {
            self.window = (self.window * 2).clamp(FIRST.min(max), max);
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: an idle queue that keeps polling, a window past its bound, polling
    //! although it is switched off, a poll that is counted wrongly.

    use super::*;

    fn poller(max_us: u32) -> Poller {
        Poller::new(Arc::new(AtomicU32::new(max_us)))
    }

    fn open(max_us: u32) -> Poller {
        let mut poller = poller(max_us);
        for _ in 0..64 {
            poller.slept(poller.max());
        }
        assert!(poller.window == poller.max());
        poller
    }

    #[test]
    fn the_window_grows_to_its_bound_and_closes() {
        let mut poller = poller(32);
        assert_eq!(poller.poll(|| true), None, "closed at first");
        for _ in 0..10 {
            poller.slept(Duration::from_micros(31));
        }
        assert!(poller.window <= poller.max() && !poller.window.is_zero());
        assert!(poller.poll(|| true).is_some_and(|polled| polled.found));
        poller.slept(Duration::from_millis(1));
        assert_eq!(poller.poll(|| true), None, "closed by a long sleep");
    }

    #[test]
    fn a_bound_that_changes_holds_at_once() {
        let poller = open(1 << 20);
        poller.max_us.store(0, Ordering::Relaxed);
        assert_eq!(poller.poll(|| true), None);
        assert!(!poller.is_on());
        poller.max_us.store(50, Ordering::Relaxed);
        let polled = poller.poll(|| false).unwrap();
        assert!(
            polled.time < Duration::from_micros(1 << 20),
            "it is the old window"
        );
    }

    #[test]
    fn a_bound_of_zero_never_polls() {
        let mut poller = poller(0);
        poller.slept(Duration::ZERO);
        poller.slept(Duration::from_nanos(1));
        assert!(!poller.is_on());
        assert_eq!(poller.poll(|| true), None);
    }

    #[test]
    fn a_poll_tells_how_long_it_took_as_far_as_the_clock_was_read() {
        let poller = open(32);
        let missed = poller.poll(|| false).unwrap();
        assert!(!missed.found && missed.time >= poller.window);
        let mut looks = 0;
        let mut after = |count| {
            looks = 0;
            // No window is over before the looks are.
            let poller = open(u32::MAX);
            poller.poll(|| {
                looks += 1;
                looks > count
            })
        };
        let at_once = Polled {
            found: true,
            time: Duration::ZERO,
        };
        assert_eq!(after(0), Some(at_once));
        assert_eq!(after(15), Some(at_once), "before the clock was read again");
        let later = after(1000).unwrap();
        assert!(later.found && !later.time.is_zero());
    }
}
