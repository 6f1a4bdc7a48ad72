//! The speed limit of a job.
//!
//! [`Bucket`] is the arithmetic, free of clocks and sleeping: it is asked with the time of day and
//! answers how long to wait. It counts in bytes: time brings some in at the present speed, a request
//! is let through when there are enough for it. What has come in stays when the speed is changed,
//! so that a job that waits has not waited in vain. Time that a job could not use (a slow disk, a
//! pause) may be caught up with, but only 100 ms of it, or what a single request needs: that
//! bounds the bursts.

use std::time::Duration;

/// How much unused time may be caught up with.
const CATCH_UP: Duration = Duration::from_millis(100);

/// Bytes are counted in units of so many parts: what a byte a second brings in a nanosecond.
const PARTS: u64 = 1_000_000_000;

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
    /// It has asked before: the time since then was spent waiting.
    waits: bool,
}

/// A limit on a rate, in bytes per second. Times are those of any steady clock.
#[derive(Debug)]
pub struct Bucket {
    speed: u64,
    /// What is in hand, in parts of a byte; below zero: more was moved than had come in.
    balance: i128,
    /// The time up to which it has come in.
    counted: Duration,
    /// The size of the last request that had to wait.
    wanted: u64,
    /// What was in hand when the speed was changed, as far as it still is: a lower speed does
    /// not take away what was waited for at the higher one.
    kept: i128,
}

impl Bucket {
    /// A limit of `speed` bytes per second from `now` on; 0 is no limit.
    pub fn new(speed: u64, now: Duration) -> Self {
        Self {
            speed,
            balance: 0,
            counted: now,
            wanted: 0,
            kept: 0,
        }
    }

    /// The limit in bytes per second, or 0.
    pub fn speed(&self) -> u64 {
        self.speed
    }

    /// What comes in within `time`.
    fn income(&self, time: Duration) -> i128 {
        let nanos = i128::try_from(time.as_nanos()).unwrap_or(i128::MAX);
        nanos.saturating_mul(i128::from(self.speed))
    }

    /// The most that may be in hand where nobody has waited for it.
    fn room(&self, request: u64) -> i128 {
        self.income(CATCH_UP).max(parts(request))
    }

    /// Takes in what has come since the last time.
    fn count(&mut self, now: Duration) {
        let time = now.saturating_sub(self.counted);
        self.balance = self.balance.saturating_add(self.income(time));
        self.counted = now.max(self.counted);
    }

    /// Asks for `bytes`. A request that has to wait asks again with the same `ticket`.
    pub fn take(&mut self, now: Duration, bytes: u64, ticket: &mut Ticket) -> Grant {
        if self.speed == 0 {
            (self.balance, self.kept, self.counted) = (0, 0, now);
            return Grant::Now;
        }
        self.count(now);
        // The time of waiting always counts, however late the waiter is woken; of the time before
        // it only as much as may be caught up with.
        if !std::mem::replace(&mut ticket.waits, true) {
            self.balance = self.balance.min(self.room(bytes).max(self.kept));
        }
        let missing = parts(bytes).saturating_sub(self.balance);
        if missing > 0 {
            self.wanted = bytes;
            let nanos = (missing.unsigned_abs()).div_ceil(u128::from(self.speed));
            return Grant::After(Duration::from_nanos(
                u64::try_from(nanos).unwrap_or(u64::MAX),
            ));
        }
        self.balance -= parts(bytes);
        self.kept = self.kept.min(self.balance);
        Grant::Now
    }

    /// Corrects what was granted when more (`used > granted`) or less was moved in the end.
    pub fn settle(&mut self, granted: u64, used: u64) {
        let correction = parts(granted).saturating_sub(parts(used));
        self.balance = self.balance.saturating_add(correction);
    }

    /// Another speed from `now` on. A job that waits must ask again.
    pub fn set_speed(&mut self, speed: u64, now: Duration) {
        self.count(now);
        // Nobody may be waiting for it: no more than could be caught up with.
        let room = self.room(self.wanted).max(self.kept);
        self.balance = match self.speed {
            0 => 0,
            _ => self.balance.min(room),
        };
        self.kept = self.balance;
        self.speed = speed;
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

fn parts(bytes: u64) -> i128 {
    i128::from(bytes).saturating_mul(i128::from(PARTS))
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
                let cost = Duration::from_secs_f64(request as f64 / speed as f64);
                let busy = Duration::from_micros(3000).min(cost / 2);
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

    /// Would catch time that was waited and does not count because the speed was set meanwhile, be
    /// it to what it was, and bytes that nobody had waited for: whatever is set whenever, what was
    /// moved is the speed summed up over the time, less at most what is in hand.
    #[test]
    fn setting_the_speed_costs_no_time_and_brings_none() {
        for seed in 0..300 {
            let mut random = Random(seed);
            let cluster = *random.one_of(&[512, 64 * KIB, 2 * MIB]);
            let speeds = [64 * KIB, 100_000, 640 * KIB, 5 * MIB, 64 * MIB];
            let (one, other) = (*random.one_of(&speeds), *random.one_of(&speeds));
            let pause = Duration::from_millis(*random.one_of(&[1, 10, 70, 1000]));
            let late = Duration::from_micros(*random.one_of(&[0, 50, 900]));
            let start = Duration::from_secs(1000);
            let mut bucket = Bucket::new(one, start);
            let (mut now, mut moved, mut due) = (start, 0_u64, 0_u128);
            let (mut change, mut next_change) = (start, start + pause);
            let mut largest = 0;
            // Long enough for many requests of the slower one.
            let enough = 50 * u128::from(cluster.max(MIB)) * 1_000_000_000;
            while due < enough {
                let speed = bucket.speed();
                let request = bucket.smooth_request(cluster, 512 * KIB);
                let mut ticket = Ticket::default();
                while bucket.speed() >= speed && due < enough {
                    let Grant::After(wait) = bucket.take(now, request, &mut ticket) else {
                        moved += request;
                        largest = largest.max(request);
                        break;
                    };
                    if now + wait + late < next_change {
                        now += wait + late;
                        continue;
                    }
                    now = next_change;
                    due += (now - change).as_nanos() * u128::from(bucket.speed());
                    bucket.set_speed(*random.one_of(&[one, other]), now);
                    (change, next_change) = (now, now + pause);
                }
            }
            let due = (due + (now - change).as_nanos() * u128::from(bucket.speed())) as f64 / 1e9;
            let what =
                format!("{one} and {other} B/s every {pause:?}, {late:?} late (seed {seed})");
            assert!(moved as f64 <= due + 1.0, "{what}: {moved} of {due}");
            let least = 0.98 * due - largest as f64;
            assert!(moved as f64 >= least, "{what}: {moved} of {due}");
        }
    }

    /// Would catch a waiter that is let through by time before it asked, when the speed is set
    /// during its wait or before it: a pause would be made up for by a burst.
    #[test]
    fn setting_the_speed_makes_no_burst() {
        for (before, after) in [(64 * MIB, 64 * KIB), (64 * KIB, 64 * MIB), (0, 64 * KIB)] {
            let mut copier = Copier::new(before);
            copier.now += Duration::from_secs(3600);
            copier.bucket.set_speed(after, copier.now);
            copier.now += Duration::from_secs(3600);
            copier.bucket.set_speed(after, copier.now);
            for _ in 0..400 {
                let request = copier.bucket.smooth_request(64 * KIB, 512 * KIB);
                copier.copy(request, Duration::ZERO, Duration::ZERO);
            }
            let allowed = (64 * KIB).max(before.max(after) / 10);
            let burst = copier.largest_burst();
            assert!(burst <= allowed, "{before}, then {after} B/s: {burst}");
        }
    }

    /// A small source of choices that is the same every time.
    struct Random(u64);

    impl Random {
        fn one_of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
            // splitmix64
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            &choices[(mixed ^ (mixed >> 31)) as usize % choices.len()]
        }
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
