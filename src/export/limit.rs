//! Messages that guests and front-ends can cause at will: a few of each kind are written in a
//! stretch of time, the others are counted and the count is written.
//!
//! An export has one [`Log`] for as long as it lives, so that a front-end which comes and goes
//! does not begin anew each time. What goes wrong with the disk has an account of its own: a
//! guest's nonsense must not hide it.

use std::fmt::Arguments;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The target of messages that are limited here, and need no other limit.
pub(crate) const TARGET: &str = "stratablk::export::limited";

/// A stretch of time.
const WINDOW: Duration = Duration::from_secs(10);
/// Messages of a kind in one.
const PER_WINDOW: u32 = 5;

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Topic {
    /// What a front-end does: connections, messages of the protocol.
    Session,
    /// What a guest's driver does in its ring.
    Ring,
    /// What the disk cannot do.
    Disk,
}

/// Lets a few messages through in each stretch of time.
#[derive(Debug, Default)]
pub(crate) struct Window {
    since: Option<Instant>,
    count: u32,
    left_out: u64,
}

impl Window {
    /// Whether a message may be written `now`, of which there are to be no more than `most` in a
    /// stretch of time, and how many were left out before it since one last was.
    pub(crate) fn allow(&mut self, now: Instant, most: u32) -> Option<u64> {
        if self.since.is_none_or(|since| now - since > WINDOW) {
            self.since = Some(now);
            self.count = 0;
        }
        self.count = self.count.saturating_add(1);
        if self.count <= most {
            return Some(std::mem::take(&mut self.left_out));
        }
        self.left_out += 1;
        None
    }
}

/// The messages of one export.
#[derive(Debug)]
pub(super) struct Log {
    id: String,
    windows: Mutex<[Window; 3]>,
}

impl Log {
    /// The messages of the export `id`.
    pub(super) fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            windows: Mutex::default(),
        }
    }

    /// Something went wrong with the disk or with the export itself.
    pub(super) fn error(&self, topic: Topic, what: Arguments<'_>) {
        self.write(log::Level::Error, topic, what);
    }

    /// A guest or a front-end did what it must not.
    pub(super) fn warn(&self, topic: Topic, what: Arguments<'_>) {
        self.write(log::Level::Warn, topic, what);
    }

    /// It is as usual.
    pub(super) fn info(&self, topic: Topic, what: Arguments<'_>) {
        self.write(log::Level::Info, topic, what);
    }

    fn write(&self, level: log::Level, topic: Topic, what: Arguments<'_>) {
        // What nobody is to see must not take the place of what somebody is.
        if level > log::max_level() || !log::log_enabled!(target: TARGET, level) {
            return;
        }
        let allowed = {
            let mut windows = self.windows.lock();
            windows
                .get_mut(topic as usize)
                .and_then(|window| window.allow(Instant::now(), PER_WINDOW))
        };
        let Some(left_out) = allowed else { return };
        self.tell(left_out);
        log::log!(target: TARGET, level, "export '{}': {what}", self.id);
    }

    fn tell(&self, left_out: u64) {
        if left_out > 0 {
            let id = &self.id;
            log::warn!(target: TARGET, "export '{id}': {left_out} more messages were left out");
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let left_out = self.windows.lock().iter().map(|w| w.left_out).sum();
        self.tell(left_out);
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: messages without end, silence without end, and messages that are
    //! left out without a word.

    use super::*;

    #[test]
    fn a_few_messages_pass_and_the_others_are_counted() {
        let start = Instant::now();
        let mut window = Window::default();
        let mut at = |ms: u64| window.allow(start + Duration::from_millis(ms), PER_WINDOW);
        let passed: Vec<u64> = (0..1000).filter_map(&mut at).collect();
        assert_eq!(passed, [0; PER_WINDOW as usize]);
        assert_eq!(at(10_000), None);
        assert_eq!(at(10_001), Some(1000 - u64::from(PER_WINDOW) + 1));
        assert_eq!(at(10_002), Some(0), "they are told once");
    }
}
