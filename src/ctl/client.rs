//! A QMP client over a Unix socket.
//!
//! One command at a time, blocking. Events that arrive while an answer is awaited are kept and
//! handed out by [`Client::next_event`] in the order in which they came.

use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest message that is taken from the daemon.
const MAX_MESSAGE: usize = 64 << 20;
/// Shortest time-out handed to the kernel, for which zero means none.
const MIN_TIMEOUT: Duration = Duration::from_millis(1);

/// The daemon's refusal of a command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// The kind of error, such as `GenericError` or `DeviceNotFound`.
    pub class: String,
    /// The text for people.
    pub desc: String,
}

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody could be reached.
    #[error("cannot connect to {path}: {source}")]
    Connect {
        /// The socket's path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The connection broke, or the peer does not speak the protocol.
    #[error("connection lost: {0}")]
    Lost(String),
    /// The daemon refused.
    #[error(transparent)]
    Answer(#[from] QmpError),
}

/// Something that the daemon told unasked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The event's name, such as `BLOCK_JOB_COMPLETED`.
    pub name: String,
    /// What it is about.
    pub data: Value,
}

/// A connection that has finished its negotiation.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
    events: VecDeque<Event>,
    version: Value,
    next_id: u64,
    timeout: Option<Duration>,
}

impl Client {
    /// Connects to the socket at `path` and negotiates. `timeout` bounds the wait for the
    /// greeting and for each answer.
    pub fn connect(path: &Path, timeout: Option<Duration>) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| ClientError::Connect {
            path: path.display().to_string(),
            source,
        })?;
        Self::negotiate(stream, timeout)
    }

    /// Negotiates over a connected socket.
    pub fn negotiate(stream: UnixStream, timeout: Option<Duration>) -> Result<Self, ClientError> {
        let mut client = Self {
            stream,
            buffer: Vec::new(),
            events: VecDeque::new(),
            version: Value::Null,
            next_id: 0,
            timeout,
        };
        let greeting = client.read_message(client.deadline())?.ok_or_else(|| {
            ClientError::Lost("no greeting in time; is another client connected?".to_owned())
        })?;
        match (greeting.pointer("/QMP/version"), greeting.get("error")) {
            (Some(version), _) => client.version = version.clone(),
            // There is no place for another client, say.
            (None, Some(error)) => return Err(ClientError::Answer(to_error(error))),
            _ => return Err(ClientError::Lost(format!("not a QMP greeting: {greeting}"))),
        }
        client.execute("qmp_capabilities", Value::Null)?;
        Ok(client)
    }

    /// The daemon's version as it was told in the greeting.
    pub fn version(&self) -> &Value {
        &self.version
    }

    /// Sends a command and waits for its result. `arguments` is an object, or null for none.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        self.next_id += 1;
        let id = self.next_id;
        let mut message = Map::new();
        message.insert("execute".to_owned(), json!(command));
        if !arguments.is_null() {
            message.insert("arguments".to_owned(), arguments);
        }
        message.insert("id".to_owned(), json!(id));
        let mut text = Value::Object(message).to_string();
        text.push_str("\r\n");
        self.stream.write_all(text.as_bytes()).map_err(lost)?;
        let deadline = self.deadline();
        loop {
            let Some(mut message) = self.read_message(deadline)? else {
                return Err(ClientError::Lost(format!(
                    "no answer to '{command}' in time"
                )));
            };
            if let Some(event) = to_event(&message) {
                self.events.push_back(event);
                continue;
            }
            // A syntax error is answered without the id, which the daemon did not get to see.
            let ours = message
                .get("id")
                .is_none_or(|answered| *answered == json!(id));
            if !ours {
                continue;
            }
            if let Some(error) = message.get("error") {
                return Err(ClientError::Answer(to_error(error)));
            }
            return match message.get_mut("return") {
                Some(result) => Ok(result.take()),
                None => Err(ClientError::Lost(format!(
                    "neither result nor error: {message}"
                ))),
            };
        }
    }

    /// The next event, waiting for it up to `timeout`; `None` when there was none.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let deadline = Instant::now().checked_add(timeout);
        while let Some(message) = self.read_message(deadline)? {
            if let Some(event) = to_event(&message) {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    /// The events that came before the last answer and were not handed out yet.
    pub fn queued_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    fn deadline(&self) -> Option<Instant> {
        self.timeout
            .and_then(|timeout| Instant::now().checked_add(timeout))
    }

    /// The next message; `None` when the deadline passed first.
    fn read_message(&mut self, deadline: Option<Instant>) -> Result<Option<Value>, ClientError> {
        // Parsing is tried only when a line has ended since the last try: a message of many
        // packets would otherwise be read from its start again and again.
        let mut line_ended = true;
        loop {
            if line_ended && let Some(message) = self.parse_buffered()? {
                return Ok(Some(message));
            }
            let mut chunk = [0_u8; 16 << 10];
            let Some(count) = self.read_some(&mut chunk, deadline)? else {
                return Ok(None);
            };
            let chunk = chunk.get(..count).unwrap_or_default();
            line_ended = chunk.contains(&b'\n');
            self.buffer.extend_from_slice(chunk);
            if self.buffer.len() > MAX_MESSAGE {
                return Err(ClientError::Lost("a message of over 64 MiB".to_owned()));
            }
        }
    }

    /// Reads what is there; `None` when the deadline passed first.
    fn read_some(
        &mut self,
        chunk: &mut [u8],
        deadline: Option<Instant>,
    ) -> Result<Option<usize>, ClientError> {
        loop {
            let left = deadline.map(|deadline| {
                deadline
                    .saturating_duration_since(Instant::now())
                    .max(MIN_TIMEOUT)
            });
            self.stream.set_read_timeout(left).map_err(lost)?;
            match self.stream.read(chunk) {
                Ok(0) => return Err(ClientError::Lost("the daemon closed it".to_owned())),
                Ok(count) => return Ok(Some(count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) =>
                {
                    if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(lost(error)),
            }
        }
    }

    /// Takes one whole message from the front of the buffer, if there is one.
    fn parse_buffered(&mut self) -> Result<Option<Value>, ClientError> {
        let mut values = serde_json::Deserializer::from_slice(&self.buffer).into_iter::<Value>();
        match values.next() {
            Some(Ok(message)) => {
                let used = values.byte_offset();
                self.buffer.drain(..used);
                Ok(Some(message))
            }
            None => {
                self.buffer.clear();
                Ok(None)
            }
            Some(Err(error)) if error.is_eof() => Ok(None),
            Some(Err(error)) => Err(ClientError::Lost(format!("not QMP: {error}"))),
        }
    }
}

fn lost(error: io::Error) -> ClientError {
    ClientError::Lost(error.to_string())
}

fn to_event(message: &Value) -> Option<Event> {
    let name = message.get("event")?.as_str()?;
    Some(Event {
        name: name.to_owned(),
        data: message.get("data").cloned().unwrap_or(Value::Null),
    })
}

fn to_error(error: &Value) -> QmpError {
    let text = |key: &str| error.get(key).and_then(Value::as_str).map(str::to_owned);
    QmpError {
        class: text("class").unwrap_or_else(|| "GenericError".to_owned()),
        desc: text("desc").unwrap_or_else(|| error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"major": 10}, "package": ""}, "capabilities": []}}"#;

    /// A peer that sends its pieces, one after each byte-wise read command line.
    fn peer(pieces: Vec<Vec<&'static str>>) -> (UnixStream, thread::JoinHandle<Vec<String>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || {
            let mut asked = Vec::new();
            theirs.write_all(GREETING.as_bytes()).unwrap();
            theirs.write_all(b"\r\n").unwrap();
            for answers in pieces {
                let mut line = Vec::new();
                let mut byte = [0];
                while byte != *b"\n" {
                    if theirs.read(&mut byte).unwrap() == 0 {
                        return asked;
                    }
                    line.push(byte[0]);
                }
                asked.push(String::from_utf8(line).unwrap());
                for answer in answers {
                    theirs.write_all(answer.as_bytes()).unwrap();
                }
            }
            asked
        });
        (ours, thread)
    }

    /// Would catch a daemon's reason for not serving us that is taken for a broken connection.
    #[test]
    fn an_error_in_place_of_the_greeting() {
        let (stream, mut theirs) = UnixStream::pair().unwrap();
        let refusal =
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"Too many clients\"}}\r\n";
        theirs.write_all(refusal.as_bytes()).unwrap();
        drop(theirs);
        let error = Client::negotiate(stream, None).unwrap_err();
        assert_eq!(error.to_string(), "Too many clients");
    }

    /// Would catch answers that are lost or mixed up with events when packets split anywhere.
    #[test]
    fn split_answers_and_events_between() {
        let (stream, thread) = peer(vec![
            vec!["{\"return\": {}, \"id\": 1}\r\n"],
            vec![
                "{\"event\": \"A\", \"data\": {\"x\": 1}}\r\n{\"eve",
                "nt\": \"B\"}\r\n{\n \"return\":\n",
                " [1, 2],\n \"id\": 2\n}\r\n{\"event\": \"C\"}\r\n",
            ],
            vec!["{\"id\": 3, \"error\": {\"class\": \"DeviceNotFound\", \"desc\": \"no\"}}\r\n"],
        ]);
        let mut client = Client::negotiate(stream, None).unwrap();
        assert_eq!(client.version()["qemu"]["major"], 10);
        assert_eq!(client.execute("x", json!({"a": 1})).unwrap(), json!([1, 2]));
        match client.execute("y", Value::Null) {
            Err(ClientError::Answer(error)) => {
                assert_eq!(
                    (error.class.as_str(), error.desc.as_str()),
                    ("DeviceNotFound", "no")
                );
            }
            other => panic!("{other:?}"),
        }
        let mut names = Vec::new();
        for _ in 0..3 {
            names.push(
                client
                    .next_event(Duration::from_secs(60))
                    .unwrap()
                    .unwrap()
                    .name,
            );
        }
        assert_eq!(names, ["A", "B", "C"]);
        let asked = thread.join().unwrap();
        assert_eq!(
            asked[1],
            "{\"execute\":\"x\",\"arguments\":{\"a\":1},\"id\":2}\r\n"
        );
        assert!(matches!(
            client.execute("z", Value::Null),
            Err(ClientError::Lost(_))
        ));
    }

    /// Would catch a hang when the peer accepts and then says nothing.
    #[test]
    fn a_silent_peer_ends_the_wait() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = Client::negotiate(ours, Some(Duration::from_millis(10))).unwrap_err();
        assert!(error.to_string().contains("no greeting"), "{error}");
    }

    /// Would catch a peer of another protocol being taken for a daemon.
    #[test]
    fn not_qmp() {
        for text in ["SSH-2.0\r\n", "{\"hello\": 1}\r\n", "5\r\n"] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(text.as_bytes()).unwrap();
            drop(theirs);
            let error = Client::negotiate(ours, None).unwrap_err();
            assert!(matches!(error, ClientError::Lost(_)), "{error}");
        }
    }
}
