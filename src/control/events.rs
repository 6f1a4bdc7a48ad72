//! Events, on their way to the clients.
//!
//! Each client has an [`Outbox`] of bounded size between those who have something to tell it and the
//! thread that writes to its socket. A client that does not read cannot hold up a job: when its
//! outbox is full of events, it is cut off. Answers it asked for are different: its own thread waits
//! with them, and so takes no more commands from it.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex};
use serde_json::{Value, json};

use super::event_rate::EventRate;
use crate::job::{Event, EventSink};

/// Events wait for a client while less than this many bytes do.
const EVENT_ROOM: usize = 4 << 20;

/// Answers wait to be queued while at least this many bytes are.
const ANSWER_ROOM: usize = 1 << 20;

#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The client takes events.
    negotiated: bool,
    /// No more is queued; what is there is still written.
    closed: bool,
    /// What is there is not written either.
    broken: bool,
    /// A line is being written.
    writing: bool,
}

/// What is to be written to one client.
#[derive(Debug, Default)]
pub struct Outbox {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Outbox {
    /// Queues an answer; waits while the client does not read. False if it is gone. With
    /// `then_events`, all events after this answer are queued, too, and none before it.
    pub fn answer(&self, value: &Value, then_events: bool) -> bool {
        let line = line_of(value);
        let mut queue = self.queue.lock();
        while queue.bytes >= ANSWER_ROOM && !queue.closed {
            self.changed.wait(&mut queue);
        }
        queue.negotiated |= then_events;
        self.add(&mut queue, line)
    }

    fn add(&self, queue: &mut Queue, line: Vec<u8>) -> bool {
        if queue.closed {
            return false;
        }
        queue.bytes += line.len();
        queue.lines.push_back(line);
        self.changed.notify_all();
        true
    }

    /// Queues an event. False if there was no room for it: the client has to go.
    fn event(&self, line: &[u8]) -> bool {
        let mut queue = self.queue.lock();
        if !queue.negotiated || queue.closed {
            return true;
        }
        if queue.bytes + line.len() > EVENT_ROOM {
            return false;
        }
        self.add(&mut queue, line.to_vec())
    }

    /// The next line to write; waits for one. None when there will be no more.
    pub fn next(&self) -> Option<Vec<u8>> {
        let mut queue = self.queue.lock();
        queue.writing = false;
        self.changed.notify_all();
        loop {
            if queue.broken {
                return None;
            }
            if let Some(line) = queue.lines.pop_front() {
                queue.bytes -= line.len();
                queue.writing = true;
                return Some(line);
            }
            if queue.closed {
                return None;
            }
            self.changed.wait(&mut queue);
        }
    }

    /// Takes no more; what was queued is still written.
    pub fn close(&self) {
        self.queue.lock().closed = true;
        self.changed.notify_all();
    }

    /// Takes no more, and throws away what was queued.
    pub fn cut(&self) {
        let mut queue = self.queue.lock();
        queue.closed = true;
        queue.broken = true;
        queue.lines.clear();
        queue.bytes = 0;
        self.changed.notify_all();
    }

    /// Waits until all is written, at most for `patience`.
    pub fn drain(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut queue = self.queue.lock();
        while (!queue.lines.is_empty() || queue.writing) && !queue.broken {
            if self.changed.wait_until(&mut queue, deadline).timed_out() {
                return;
            }
        }
    }
}

/// A client, as the hub knows it.
struct Listener {
    outbox: Weak<Outbox>,
    /// Closes the client's connection.
    hang_up: Box<dyn Fn() + Send + Sync>,
}

/// Sends events to every client that has finished negotiation.
#[derive(Default)]
pub struct EventHub {
    listeners: Arc<Listeners>,
    rate: Arc<EventRate>,
}

/// All clients that may take events.
#[derive(Default)]
struct Listeners(Mutex<Vec<Listener>>);

impl Listeners {
    /// Queues an event for each of them.
    fn tell(&self, line: &[u8]) {
        self.0.lock().retain(|listener| {
            let Some(outbox) = listener.outbox.upgrade() else {
                return false;
            };
            let kept_up = outbox.event(line);
            if !kept_up {
                log::warn!("a control client does not read its events and is cut off");
                outbox.cut();
                (listener.hang_up)();
            }
            kept_up
        });
    }
}

impl Drop for EventHub {
    fn drop(&mut self) {
        self.rate.end();
    }
}

impl EventHub {
    /// A hub without clients.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Adds a client. `hang_up` is called when it does not keep up.
    pub fn add(&self, outbox: &Arc<Outbox>, hang_up: Box<dyn Fn() + Send + Sync>) {
        let mut listeners = self.listeners.0.lock();
        listeners.retain(|listener| listener.outbox.strong_count() > 0);
        listeners.push(Listener {
            outbox: Arc::downgrade(outbox),
            hang_up,
        });
    }

    /// Tells all clients, with the time of now; later, or never, where that would be too often.
    pub fn send(&self, event: &Event) {
        let value = on_the_wire(event);
        let listeners = self.listeners.clone();
        let later = move |line: &[u8]| listeners.tell(line);
        let named = (event.name, &event.data);
        if let Some(line) = self.rate.take(named, line_of(&value), later) {
            self.listeners.tell(&line);
        }
    }

    /// Tells all clients, however often.
    pub fn send_each(&self, event: &Event) {
        self.listeners.tell(&line_of(&on_the_wire(event)));
    }

    /// The hub as jobs need it.
    pub fn sink(self: &Arc<Self>) -> EventSink {
        let hub = self.clone();
        Arc::new(move |event| hub.send(&event))
    }

    /// The hub for those who tell of a thing once, which no other event may take the place of.
    pub fn sink_of_each(self: &Arc<Self>) -> EventSink {
        let hub = self.clone();
        Arc::new(move |event| hub.send_each(&event))
    }
}

/// An event with the time of now.
fn on_the_wire(event: &Event) -> Value {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut value = json!({
        "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
        "event": event.name,
    });
    let no_data = event
        .data
        .as_object()
        .is_some_and(serde_json::Map::is_empty);
    if let (Some(members), false) = (value.as_object_mut(), no_data || event.data.is_null()) {
        members.insert("data".to_owned(), event.data.clone());
    }
    value
}

/// A value as it goes on the wire.
pub(super) fn line_of(value: &Value) -> Vec<u8> {
    // Values made of maps with string keys can always be written.
    let mut line = serde_json::to_vec(value).unwrap_or_default();
    line.extend_from_slice(b"\r\n");
    line
}
