//! The places for clients: how many there are, and that one of them can always be had.
//!
//! A client keeps its place for as long as it likes once it has negotiated, busy or not. The last
//! place is different: who sits there while all others are taken, and is idle, makes room for the
//! next one who comes. So somebody who looks after the daemon gets in however many have forgotten
//! to leave.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::events::Outbox;

/// What clients may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many are served at once.
    pub clients: usize,
    /// How long one may take to negotiate.
    pub negotiation: Duration,
    /// How long the one in the last place may be idle when another wants it.
    pub idle: Duration,
    /// How many bytes are held of values that are not whole yet, of all clients together.
    pub unfinished: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            clients: 64,
            negotiation: Duration::from_secs(60),
            idle: Duration::from_secs(10),
            unfinished: 2 * super::wire::MAX_VALUE_BYTES,
        }
    }
}

/// A client that is being served.
pub(super) struct Client {
    pub outbox: Arc<Outbox>,
    pub stream: UnixStream,
    /// It is in the last place.
    last: bool,
    activity: Arc<Activity>,
}

/// Whether a client is idle. One whose command is being carried out is not, however long it takes.
pub(super) struct Activity {
    /// When it came, or its last command was answered; `None` while one is carried out.
    idle_since: Mutex<Option<Instant>>,
}

impl Activity {
    fn new() -> Self {
        Self {
            idle_since: Mutex::new(Some(Instant::now())),
        }
    }

    /// Carries out a command.
    pub fn during<T>(&self, command: impl FnOnce() -> T) -> T {
        *self.idle_since.lock() = None;
        let result = command();
        *self.idle_since.lock() = Some(Instant::now());
        result
    }

    fn is_idle_for(&self, time: Duration) -> bool {
        (*self.idle_since.lock()).is_some_and(|since| since.elapsed() >= time)
    }
}

impl Client {
    /// The client at the other end of `stream`, which has just come.
    pub fn new(outbox: Arc<Outbox>, stream: UnixStream) -> Self {
        Self {
            outbox,
            stream,
            last: false,
            activity: Arc::new(Activity::new()),
        }
    }

    /// Where it is noted what the client does.
    pub fn activity(&self) -> Arc<Activity> {
        self.activity.clone()
    }

    /// Ends the connection at once.
    pub fn hang_up(&self) {
        self.outbox.cut();
        // Not connected any more is as good.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// The clients that are being served.
#[derive(Default)]
pub(super) struct Places(Vec<Client>);

impl Places {
    /// Gives a client a place; where there is none, the text says why.
    pub fn admit(&mut self, mut client: Client, limits: &Limits) -> Result<(), String> {
        let is_idle = |client: &Client| client.activity.is_idle_for(limits.idle);
        if self.0.len() >= limits.clients {
            let idle = self.0.iter().position(|other| other.last && is_idle(other));
            let Some(idle) = idle else {
                return Err(format!(
                    "Too many clients: {} are connected; the place of the last is free again when \
                     it has been idle for {} s",
                    self.0.len(),
                    limits.idle.as_secs_f32()
                ));
            };
            log::info!("an idle control client makes room for another one");
            self.0.swap_remove(idle).hang_up();
        }
        client.last = self.0.len() + 1 >= limits.clients && !self.0.iter().any(|other| other.last);
        self.0.push(client);
        Ok(())
    }

    /// Gives a place back.
    pub fn leave(&mut self, outbox: &Arc<Outbox>) {
        self.0.retain(|client| !Arc::ptr_eq(&client.outbox, outbox));
    }

    /// All clients.
    pub fn iter(&self) -> std::slice::Iter<'_, Client> {
        self.0.iter()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a client that loses its place in the middle of a command.

    use super::*;

    #[test]
    fn a_client_with_a_long_command_is_not_idle() {
        let limits = Limits {
            clients: 1,
            idle: Duration::ZERO,
            ..Limits::default()
        };
        let client = || {
            let (stream, other) = UnixStream::pair().unwrap();
            (Client::new(Arc::default(), stream), other)
        };
        let mut places = Places::default();
        let ((first, _first_end), (second, _second_end)) = (client(), client());
        let activity = first.activity();
        places.admit(first, &limits).unwrap();
        activity.during(|| {
            let (third, _third_end) = client();
            let refused = places.admit(third, &limits).unwrap_err();
            assert!(refused.starts_with("Too many clients"), "{refused}");
        });
        places.admit(second, &limits).unwrap();
    }
}
