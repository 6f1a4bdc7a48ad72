//! A QMP client small enough to trust: one command at a time, events kept for later.

use super::Res;
use super::frontend::PATIENCE;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// An error answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The error class.
    pub class: String,
    /// The text.
    pub desc: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.class, self.desc)
    }
}

impl std::error::Error for Refusal {}

/// A negotiated session.
pub struct Qmp {
    stream: UnixStream,
    buffer: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and negotiates.
    pub fn connect(socket: &Path) -> Res<Self> {
        Self::connect_within(socket, PATIENCE)
    }

    /// The same, with a limit for each answer of the negotiation. `TimedOut` if one does not come.
    pub fn connect_within(socket: &Path, patience: Duration) -> Res<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(patience))?;
        let mut qmp = Qmp {
            stream,
            buffer: Vec::new(),
            events: VecDeque::new(),
        };
        let greeting = qmp.receive()?;
        if greeting.get("QMP").is_none() {
            return Err(format!("not a greeting: {greeting}").into());
        }
        qmp.execute("qmp_capabilities", json!({}))??;
        qmp.set_patience(PATIENCE)?;
        Ok(qmp)
    }

    /// Runs a command. The outer error means that the session is broken.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Res<Result<Value, Refusal>> {
        let mut message = json!({"execute": command});
        if arguments.as_object().is_some_and(|a| !a.is_empty()) {
            message["arguments"] = arguments;
        }
        self.stream.write_all(format!("{message}\n").as_bytes())?;
        loop {
            let answer = self.receive()?;
            if let Some(error) = answer.get("error") {
                let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
                return Ok(Err(Refusal {
                    class: text("class"),
                    desc: text("desc"),
                }));
            }
            if let Some(value) = answer.get("return") {
                return Ok(Ok(value.clone()));
            }
            self.events.push_back(answer);
        }
    }

    /// The next event that `wanted` accepts; those before it are dropped.
    pub fn event(&mut self, wanted: impl Fn(&Value) -> bool) -> Res<Value> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.receive()?,
            };
            if wanted(&event) {
                return Ok(event);
            }
        }
    }

    /// Waits for the end of the job `id`, as BLOCK_JOB_COMPLETED or BLOCK_JOB_CANCELLED.
    pub fn job_end(&mut self, id: &str) -> Res<Value> {
        self.event(|e| is_job_end(e, id))
    }

    /// Takes the events that have come so far.
    pub fn pending_events(&mut self) -> Res<Vec<Value>> {
        self.stream.set_nonblocking(true)?;
        let filled = self.fill();
        self.stream.set_nonblocking(false)?;
        match filled {
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            other => {
                other?;
            }
        }
        while let Some(value) = self.parse()? {
            self.events.push_back(value);
        }
        Ok(self.events.drain(..).collect())
    }

    /// Takes the events that are left when the back-end has ended.
    pub fn last_events(&mut self) -> Vec<Value> {
        while self.fill().is_ok_and(|n| n > 0) {}
        while let Ok(Some(value)) = self.parse() {
            self.events.push_back(value);
        }
        self.events.drain(..).collect()
    }

    fn receive(&mut self) -> Res<Value> {
        loop {
            if let Some(value) = self.parse()? {
                return Ok(value);
            }
            match self.fill() {
                Ok(0) => return Err("the control socket was closed".into()),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    let text = "no answer from the control socket in time";
                    return Err(io::Error::new(ErrorKind::TimedOut, text).into());
                }
                Err(e) => return Err(format!("no answer from the control socket: {e}").into()),
            }
        }
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut chunk = [0; 4096];
        let n = self.stream.read(&mut chunk)?;
        self.buffer.extend(chunk.iter().take(n));
        Ok(n)
    }

    /// One message from the buffer, if a whole one is there.
    fn parse(&mut self) -> Res<Option<Value>> {
        let mut values = serde_json::Deserializer::from_slice(&self.buffer).into_iter::<Value>();
        let value = match values.next() {
            None => return Ok(None),
            Some(Err(e)) if e.is_eof() => return Ok(None),
            Some(value) => value?,
        };
        let used = values.byte_offset();
        self.buffer.drain(..used);
        Ok(Some(value))
    }

    /// Limits how long one answer or event may take.
    pub fn set_patience(&mut self, patience: Duration) -> Res<()> {
        Ok(self.stream.set_read_timeout(Some(patience))?)
    }
}

/// True if `event` says that the job `id` has ended, well or not.
pub fn is_job_end(event: &Value, id: &str) -> bool {
    matches!(
        event["event"].as_str(),
        Some("BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED")
    ) && event["data"]["device"] == id
}
