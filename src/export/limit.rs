//! A bound for messages that a guest can cause at will.

use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(10);
const PER_WINDOW: u32 = 5;

/// Lets a few messages through in each stretch of time.
#[derive(Debug, Default)]
pub struct LogLimit {
    since: Option<Instant>,
    count: u32,
}

impl LogLimit {
    /// Whether one more message may be written now.
    pub fn allow(&mut self) -> bool {
        let now = Instant::now();
        if self.since.is_none_or(|since| now - since > WINDOW) {
            self.since = Some(now);
            self.count = 0;
        }
        self.count = self.count.saturating_add(1);
        self.count <= PER_WINDOW
    }
}
