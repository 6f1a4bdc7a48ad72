//! Adaptive polling: how long to look for work before sleeping.
//!
//! Sleeping and being woken costs more than looking around for a moment, if work comes soon. The
//! window grows while sleeps turn out shorter than the longest window that is allowed, and
//! closes when they are longer: an idle queue costs nothing.

use std::time::{Duration, Instant};

/// The first window.
const FIRST: Duration = Duration::from_micros(4);

#[derive(Debug)]
pub(super) struct Poller {
    max: Duration,
    window: Duration,
}

impl Poller {
    pub(super) fn new(max_us: u32) -> Self {
        Self {
            max: Duration::from_micros(u64::from(max_us)),
            window: Duration::ZERO,
        }
    }

    /// Looks for work, until `found` says there is some or the window is over. True: found.
    pub(super) fn poll(&self, mut found: impl FnMut() -> bool) -> bool {
        if self.window.is_zero() {
            return false;
        }
        let start = Instant::now();
        loop {
            // Reading the clock costs as much as a few looks.
            for _ in 0..16 {
                if found() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= self.window {
                return false;
            }
        }
    }

    /// Whether sleeps need to be measured.
    pub(super) fn is_on(&self) -> bool {
        !self.max.is_zero()
    }

    /// Learns from a sleep.
    pub(super) fn slept(&mut self, time: Duration) {
        if time > self.max {
            self.window = Duration::ZERO;
        } else if time > self.window {
            self.window = (self.window * 2).clamp(FIRST.min(self.max), self.max);
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: an idle queue that keeps polling, a window past its bound, polling
    //! although it is switched off.

    use super::*;

    #[test]
    fn the_window_grows_to_its_bound_and_closes() {
        let mut poller = Poller::new(32);
        assert!(!poller.poll(|| true), "closed at first");
        for _ in 0..10 {
            poller.slept(Duration::from_micros(31));
        }
        assert!(poller.window <= poller.max && !poller.window.is_zero());
        assert!(poller.poll(|| true));
        poller.slept(Duration::from_millis(1));
        assert!(!poller.poll(|| true), "closed by a long sleep");
    }

    #[test]
    fn a_bound_of_zero_never_polls() {
        let mut poller = Poller::new(0);
        poller.slept(Duration::ZERO);
        poller.slept(Duration::from_nanos(1));
        assert!(!poller.is_on() && !poller.poll(|| true));
    }
}
