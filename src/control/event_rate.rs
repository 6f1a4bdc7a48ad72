//! How often an event is told that guests can cause at will.
//!
//! As in QEMU: of such events of one device the first is told at once, and of those that follow within
//! a second the last one, at its end, where another second begins. Nobody misses how it ended, and a
//! guest that tries a failing request again and again does not fill the clients' queues.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde_json::Value;

/// Between two events of a device is at least so much time.
const INTERVAL: Duration = Duration::from_secs(1);
/// The events that are limited.
const LIMITED: &[&str] = &["BLOCK_IO_ERROR"];

/// Devices whose last event was told less than [`INTERVAL`] ago, each with when that is over, and
/// what is to be told then.
#[derive(Debug, Default)]
struct Recent<T> {
    devices: BTreeMap<String, (Instant, Option<T>)>,
}

impl<T> Recent<T> {
    /// Takes what happens `now`. Some: it is to be told at once.
    fn take(&mut self, device: &str, told: T, now: Instant) -> Option<T> {
        match self.devices.get_mut(device) {
            Some((until, held)) if now < *until => {
                *held = Some(told);
                None
            }
            _ => {
                // Devices come and go.
                self.devices
                    .retain(|_, (until, held)| now < *until || held.is_some());
                self.devices
                    .insert(device.to_owned(), (now + INTERVAL, None));
                Some(told)
            }
        }
    }

    /// What is to be told `now`, having been held.
    fn due(&mut self, now: Instant) -> Vec<T> {
        let mut due = Vec::new();
        self.devices.retain(|_, (until, held)| {
            if now < *until {
                return true;
            }
            *until = now + INTERVAL;
            let told = held.take();
            let is_told = told.is_some();
            due.extend(told);
            is_told
        });
        due
    }

    /// When there may be something due.
    fn next(&self) -> Option<Instant> {
        self.devices.values().map(|(until, _)| *until).min()
    }
}

#[derive(Debug, Default)]
struct State {
    recent: Recent<Vec<u8>>,
    /// A thread tells what is held.
    has_thread: bool,
    end: bool,
}

/// Limits the events of a hub.
#[derive(Debug, Default)]
pub(super) struct EventRate {
    state: Mutex<State>,
    changed: Condvar,
}

impl EventRate {
    /// Takes an event, as a line with these members. Some: it is to be told at once; otherwise `tell`
    /// gets it, or one that comes after it, when it is due.
    pub fn take(
        self: &Arc<Self>,
        (name, data): (&str, &Value),
        line: Vec<u8>,
        tell: impl Fn(&[u8]) + Send + 'static,
    ) -> Option<Vec<u8>> {
        if !LIMITED.contains(&name) {
            return Some(line);
        }
        let device = data.get("device").and_then(Value::as_str).unwrap_or("");
        let mut state = self.state.lock();
        let now = state.recent.take(device, line, Instant::now());
        if now.is_none() && !state.has_thread {
            state.has_thread = self.start(tell);
            if !state.has_thread {
                // Nobody would tell it later.
                let (_, held) = state.recent.devices.get_mut(device)?;
                return held.take();
            }
        }
        now
    }

    /// Starts a thread that tells what is held, for as long as something may be.
    fn start(self: &Arc<Self>, tell: impl Fn(&[u8]) + Send + 'static) -> bool {
        let rate = self.clone();
        let thread = std::thread::Builder::new()
            .name("event-rate".into())
            .spawn(move || {
                while let Some(due) = rate.wait() {
                    due.iter().for_each(|line| tell(line));
                }
            });
        thread
            .inspect_err(|error| log::warn!("events of failed requests are not limited: {error}"))
            .is_ok()
    }

    /// Waits for what is due. `None`: nothing is held, and nothing was told lately.
    fn wait(&self) -> Option<Vec<Vec<u8>>> {
        let mut state = self.state.lock();
        loop {
            let due = state.recent.due(Instant::now());
            if !due.is_empty() && !state.end {
                return Some(due);
            }
            match state.recent.next() {
                Some(next) if !state.end => {
                    self.changed.wait_until(&mut state, next);
                }
                _ => {
                    state.has_thread = false;
                    return None;
                }
            }
        }
    }

    /// Nothing more is told.
    pub fn end(&self) {
        self.state.lock().end = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a first event that comes late, or a last one that never comes; more of
    //! them than one a second; a device that makes another one's wait; an event that is not limited
    //! and is.

    use std::sync::mpsc::channel;

    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_the_last_in_the_end() {
        let begin = Instant::now();
        let at = |ms: u64| begin + Duration::from_millis(ms);
        let mut recent = Recent::default();
        assert_eq!(recent.take("a", 1, at(0)), Some(1));
        assert_eq!(recent.take("b", 2, at(500)), Some(2));
        for (ms, told) in [(1, 3), (999, 4)] {
            assert_eq!(recent.take("a", told, at(ms)), None);
        }
        assert_eq!(
            (recent.due(at(999)), recent.next()),
            (vec![], Some(at(1000)))
        );
        assert_eq!(recent.due(at(1000)), [4]);
        // That was told, and another second begins.
        assert_eq!(recent.take("a", 5, at(1999)), None);
        assert_eq!(recent.due(at(1999)), [0; 0]);
        assert_eq!(recent.due(at(2000)), [5]);
        assert_eq!(recent.due(at(3000)), [0; 0]);
        assert_eq!(
            recent.next(),
            None,
            "nothing is kept of devices that are well"
        );
        assert_eq!(recent.take("a", 6, at(3000)), Some(6));
    }

    #[test]
    fn what_is_held_is_told_without_another_event() {
        let rate = Arc::<EventRate>::default();
        let (send, told) = channel();
        let tell = move |line: &[u8]| drop(send.send(line.to_vec()));
        let take = |name, device, line: u8| {
            let data = json!({"device": device});
            rate.take((name, &data), vec![line], tell.clone())
        };
        assert_eq!(take("BLOCK_IO_ERROR", "a", 1), Some(vec![1]));
        assert_eq!(take("BLOCK_JOB_ERROR", "a", 2), Some(vec![2]));
        assert_eq!(take("BLOCK_JOB_ERROR", "a", 3), Some(vec![3]));
        assert_eq!(take("BLOCK_IO_ERROR", "b", 4), Some(vec![4]));
        assert_eq!(take("BLOCK_IO_ERROR", "a", 5), None);
        let patience = Duration::from_secs(60);
        assert_eq!(told.recv_timeout(patience), Ok(vec![5]));
        rate.end();
    }
}
