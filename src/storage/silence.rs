//! Signs of life, which tell a disk that is slow from one that hangs.
//!
//! While a sync or a blocking call of a file is under way, the ends of the file's other operations are
//! noted, with their time. A file with a call under way and no such time since then is silent. Nobody
//! looks at the clock while nothing is under way, in any file: the data path pays some loads each time
//! that a queue's thread goes to sleep or lets others run.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Syncs and calls under way in this process.
static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// What times are counted from.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// A sync or a call that is under way, until this is dropped.
#[derive(Debug)]
pub struct UnderWay {
    since: Instant,
}

impl UnderWay {
    /// It begins.
    #[must_use]
    pub fn begin() -> Self {
        UNDER_WAY.fetch_add(1, Ordering::Relaxed);
        Self {
            since: Instant::now(),
        }
    }

    /// When it began.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
    }
}

/// When an operation last ended while some sync or call was under way.
#[derive(Debug, Default)]
pub struct LastEnd {
    /// Nanoseconds from the start, and one more. 0: never.
    at: AtomicU64,
}

impl LastEnd {
    /// An operation has ended.
    pub fn note(&self) {
        if UNDER_WAY.load(Ordering::Relaxed) > 0 {
            self.note_at(Instant::now());
        }
    }

    fn note_at(&self, now: Instant) {
        let passed = now.saturating_duration_since(*START).as_nanos();
        self.at.store(passed as u64 + 1, Ordering::Relaxed);
    }

    /// When that was.
    #[must_use]
    pub fn at(&self) -> Option<Instant> {
        let passed = self.at.load(Ordering::Relaxed).checked_sub(1)?;
        START.checked_add(Duration::from_nanos(passed))
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: an end that is not noted while a sync is under way, or noted at another time.

    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn ends_are_noted_while_a_sync_is_under_way() {
        let last = LastEnd::default();
        assert_eq!(last.at(), None);
        let sync = UnderWay::begin();
        let before = Instant::now();
        last.note();
        let noted = last.at().unwrap();
        assert!(noted >= before && noted <= Instant::now());
        assert!(sync.since() <= before);
        let later = Instant::now() + Duration::from_secs(60);
        last.note_at(later);
        assert_eq!(last.at(), Some(later));
    }
}
