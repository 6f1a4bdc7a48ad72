//! The log: to standard error, and bounded.
//!
//! Exports limit what their guests and front-ends can cause ([`crate::export::limit`]). Whatever
//! else of a guest's doing comes to a message, in the floors below or in a library, is limited
//! here, by the place in the source that writes it: a log that fills a disk would be the end of
//! all guests.

use std::collections::HashMap;
use std::time::Instant;

use log::{Level, Log, Metadata, Record};
use parking_lot::Mutex;

use crate::export::limit::{TARGET, Window};

/// Messages of a place in ten seconds: a daemon that ends may have something to say of each of its
/// images.
const PER_PLACE: u32 = 50;

/// Where a message is written.
type CallSite = (String, u32);

struct Bounded<L> {
    inner: L,
    windows: Mutex<HashMap<CallSite, Window>>,
}

impl<L> Bounded<L> {
    fn new(inner: L) -> Self {
        Self {
            inner,
            windows: Mutex::default(),
        }
    }

    /// Whether a message may be written `now`, and how many of its place were left out before it.
    fn allow(&self, record: &Record<'_>, now: Instant) -> Option<u64> {
        // A user who asks for more than that wants all of it.
        if record.level() > Level::Info || record.target() == TARGET {
            return Some(0);
        }
        let place = (
            record.file().unwrap_or_default().to_owned(),
            record.line().unwrap_or_default(),
        );
        self.windows
            .lock()
            .entry(place)
            .or_default()
            .allow(now, PER_PLACE)
    }
}

impl<L: Log> Log for Bounded<L> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.inner.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.inner.enabled(record.metadata()) {
            return;
        }
        let Some(left_out) = self.allow(record, Instant::now()) else {
            return;
        };
        if left_out > 0 {
            let text = format_args!("{left_out} more messages like the next one were left out");
            self.inner.log(
                &Record::builder()
                    .metadata(record.metadata().clone())
                    .args(text)
                    .build(),
            );
        }
        self.inner.log(record);
    }

    fn flush(&self) {
        self.inner.flush();
    }
}

/// Starts the log: warnings to standard error, more with `STRATABLK_LOG` (`debug`, or
/// `stratablk::export=debug,…`).
pub fn start(verbose: bool) {
    let level = if verbose { "debug" } else { "warn" };
    let environment = env_logger::Env::new().filter_or("STRATABLK_LOG", level);
    let logger = env_logger::Builder::from_env(environment)
        .format_target(false)
        .build();
    let most = logger.filter();
    // A second start (in tests) keeps the first.
    if log::set_boxed_logger(Box::new(Bounded::new(logger))).is_ok() {
        log::set_max_level(most);
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a message that a guest or another client can write without end, and
    //! one that hides another.

    use super::*;

    /// Counts what comes through.
    struct Count(Mutex<Vec<String>>);

    impl Log for Count {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &Record<'_>) {
            self.0.lock().push(record.args().to_string());
        }

        fn flush(&self) {}
    }

    fn passed(log: &Bounded<Count>, level: Level, target: &str, line: u32) -> usize {
        let before = log.inner.0.lock().len();
        for _ in 0..1000 {
            let mut record = Record::builder();
            record.level(level).target(target);
            record.file(Some("read.rs")).line(Some(line));
            log.log(&record.args(format_args!("it fails")).build());
        }
        log.inner.0.lock().len() - before
    }

    #[test]
    fn each_place_may_write_a_few_messages() {
        let log = Bounded::new(Count(Mutex::default()));
        // A window may begin anew between two messages.
        let few = 1..=200;
        assert!(few.contains(&passed(&log, Level::Warn, "stratablk::chain", 1)));
        assert!(few.contains(&passed(&log, Level::Error, "vhost", 2)));
        assert_eq!(passed(&log, Level::Debug, "stratablk::chain", 3), 1000);
        assert_eq!(passed(&log, Level::Warn, TARGET, 4), 1000, "limited before");
    }
}
