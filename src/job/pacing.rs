//! The speed limit of a job.
//!
//! [`Bucket`] is the arithmetic, free of clocks and sleeping: it is asked with the time of day and
//! answers how long to wait. A request is paid for before it is granted: the `n`th byte is let
//! through no sooner than `n / speed` seconds after the start, so that the whole of a transfer takes
//! the time it should. Time that a job could not use (a slow disk, a late wake-up) may be caught up
//! with, but only 100 ms of it, or what a single request needs: that bounds the bursts.

use std::time::Duration;

/// How much unused time may be caught up with.
const CATCH_UP: Duration = Duration::from_millis(100);

/// What a request gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Go on.
    Now,
    /// Ask again after this time.
    After(Duration),
}

/// One request, while it waits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ticket {
    /// From when on the time counts for this request.
    since: Option<Duration>,
}

/// A limit on a rate, in bytes per second. Times are those of any steady clock.
#[derive(Debug)]
pub struct Bucket {
    speed: u64,
    /// All that was granted so far is paid for by the time up to here.
    paid_until: Duration,
}

impl Bucket {
    /// A limit of `speed` bytes per second from `now` on; 0 is no limit.
    pub fn new(speed: u64, now: Duration) -> Self {
        Self {
            speed,
            paid_until: now,
        }
    }

    /// The limit in bytes per second, or 0.
    pub fn speed(&self) -> u64 {
        self.speed
    }

    /// The time `bytes` take at the present speed.
    fn cost(&self, bytes: u64) -> Duration {
        if self.speed == 0 {
            return Duration::ZERO;
        }
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.speed);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Asks for `bytes`. A request that has to wait asks again with the same `ticket`.
    pub fn take(&mut self, now: Duration, bytes: u64, ticket: &mut Ticket) -> Grant {
        if self.speed == 0 {
            self.paid_until = now;
            return Grant::Now;
        }
        // The time of waiting always counts, however late the waiter is woken; of the time before
        // it only as much as may be caught up with.
        let since = *ticket.since.get_or_insert(now.saturating_sub(CATCH_UP));
        let start = self.paid_until.max(since);
        let due = start.saturating_add(self.cost(bytes));
        if due > now {
            return Grant::After(due - now);
        }
        self.paid_until = due;
        Grant::Now
    }

    /// Corrects what was granted when more (`used > granted`) or less was moved in the end.
    pub fn settle(&mut self, granted: u64, used: u64) {
        if used > granted {
            self.paid_until = self.paid_until.saturating_add(self.cost(used - granted));
        } else {
            self.paid_until = self.paid_until.saturating_sub(self.cost(granted - used));
        }
    }

    /// Another speed from `now` on. Whoever waits must ask again.
    pub fn set_speed(&mut self, speed: u64, now: Duration) {
        let debt = self.paid_until.saturating_sub(now);
        let bytes = debt.as_nanos() * u128::from(self.speed) / 1_000_000_000;
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.speed = speed;
        self.paid_until = now.saturating_add(self.cost(bytes));
    }

    /// The largest request that keeps the rate smooth: 100 ms worth of bytes in units of `unit`,
    /// at least one unit and at most `max`.
    pub fn smooth_request(&self, unit: u64, max: u64) -> u64 {
        let unit = unit.clamp(1, max.max(1));
        if self.speed == 0 {
            return max;
        }
        let quota = self.speed / 10;
        (quota.min(max) / unit * unit).max(unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;

    /// A user of the bucket that wakes late and is busy between its requests.
    struct Copier {
        bucket: Bucket,
        now: Duration,
        moved: u64,
        /// When how much had been moved.
        log: Vec<(Duration, u64)>,
    }

    impl Copier {
        fn new(speed: u64) -> Self {
            let now = Duration::from_secs(1000);
            Self {
                bucket: Bucket::new(speed, now),
                now,
                moved: 0,
                log: vec![(now, 0)],
            }
        }

        fn copy(&mut self, bytes: u64, late: Duration, busy: Duration) {
            let mut ticket = Ticket::default();
            while let Grant::After(wait) = self.bucket.take(self.now, bytes, &mut ticket) {
                self.now += wait + late;
            }
            self.moved += bytes;
            self.log.push((self.now, self.moved));
            self.now += busy;
        }

        fn largest_burst(&self) -> u64 {
            let mut largest = 0;
            let mut previous = (Duration::ZERO, 0);
            let mut before = 0;
            for &(at, moved) in &self.log {
                if at != previous.0 {
                    before = previous.1;
                }
                largest = largest.max(moved - before);
                previous = (at, moved);
            }
            largest
        }
    }

    /// Would catch a rate off by more than 2 % anywhere between 64 KiB/s and 512 MiB/s, with a
    /// timer that is a millisecond late and a disk that takes 3 ms per request.
    #[test]
    fn the_average_rate_is_exact() {
        let late = Duration::from_millis(1);
        for speed in [64 * KIB, 100_000, 640 * KIB, 5 * MIB, 64 * MIB, 512 * MIB] {
            for cluster in [512, 64 * KIB, 512 * KIB] {
                let mut copier = Copier::new(speed);
                let request = copier.bucket.smooth_request(cluster, 512 * KIB);
                // 16 requests are in flight at once at most, so a slow disk is no brake by itself.
                let busy = Duration::from_micros(3000).min(copier.bucket.cost(request) / 2);
                while copier.moved < 20 * speed {
                    copier.copy(request, late, busy);
                }
                let (at, moved) = *copier.log.last().unwrap();
                let rate = moved as f64 / (at - copier.log[0].0).as_secs_f64();
                let off = (rate / speed as f64 - 1.0).abs();
                assert!(off < 0.02, "{speed} B/s, clusters of {cluster}: {rate} B/s");
            }
        }
    }

    /// Would catch a job that saves up quota while idle, and one that copies much and sleeps long.
    #[test]
    fn bursts_are_small() {
        for speed in [64 * KIB, 640 * KIB, 5 * MIB, 512 * MIB] {
            for cluster in [4 * KIB, 64 * KIB, 512 * KIB] {
                let mut copier = Copier::new(speed);
                let request = copier.bucket.smooth_request(cluster, 512 * KIB);
                copier.now += Duration::from_secs(3600);
                for _ in 0..1000 {
                    copier.copy(request, Duration::ZERO, Duration::ZERO);
                }
                let allowed = cluster.max(speed / 10);
                let burst = copier.largest_burst();
                assert!(
                    burst <= allowed,
                    "{speed} B/s, clusters of {cluster}: {burst} at once"
                );
            }
        }
    }

    /// Would catch a new speed that waits for the debt of the old one to be paid.
    #[test]
    fn a_new_speed_counts_at_once() {
        let mut copier = Copier::new(64 * KIB);
        let mut ticket = Ticket::default();
        let now = copier.now;
        let slow = copier.bucket.take(now, 512 * KIB, &mut ticket);
        assert_eq!(slow, Grant::After(Duration::from_secs(8)));
        copier.bucket.set_speed(64 * MIB, now);
        let Grant::After(wait) = copier.bucket.take(now, 512 * KIB, &mut ticket) else {
            return;
        };
        assert!(wait < Duration::from_millis(10), "{wait:?}");
        copier.bucket.set_speed(0, now);
        assert_eq!(copier.bucket.take(now, u64::MAX, &mut ticket), Grant::Now);
    }

    /// Would catch debts that are lost or kept when another amount was moved than was asked for.
    #[test]
    fn settling_corrects_the_account() {
        let now = Duration::from_secs(5);
        let mut bucket = Bucket::new(MIB, now);
        let later = now + Duration::from_secs(1);
        let mut ticket = Ticket::default();
        assert_eq!(bucket.take(later, 64 * KIB, &mut ticket), Grant::Now);
        bucket.settle(64 * KIB, 2 * MIB);
        let Grant::After(wait) = bucket.take(later, 1, &mut Ticket::default()) else {
            panic!("more was moved than paid for, and it went on");
        };
        assert!(wait > Duration::from_millis(1800), "{wait:?}");
        bucket.settle(2 * MIB, 0);
        assert_eq!(bucket.take(later, 1, &mut Ticket::default()), Grant::Now);
    }

    /// Would catch a panic of `clamp`, and requests that split clusters for no reason.
    #[test]
    fn requests_are_whole_clusters() {
        let bucket = Bucket::new(MIB, Duration::ZERO);
        assert_eq!(bucket.smooth_request(64 * KIB, 512 * KIB), 64 * KIB);
        assert_eq!(bucket.smooth_request(4 * KIB, 512 * KIB), 100 * KIB);
        assert_eq!(bucket.smooth_request(2 * MIB, 512 * KIB), 512 * KIB);
        assert_eq!(bucket.smooth_request(0, 512 * KIB), 104_857);
        assert_eq!(
            Bucket::new(0, Duration::ZERO).smooth_request(64 * KIB, 512 * KIB),
            512 * KIB
        );
    }
}
