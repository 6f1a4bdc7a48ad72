//! A control server on a real socket, with a daemon behind it that consists of names only, and a
//! client to drive it.
#![allow(dead_code, missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_listener::Event as Signal;
use futures_util::future::LocalBoxFuture;
use serde_json::{Value, json};
use stratablk::chain::CopyStatus;
use stratablk::control::backend::{Backing, ExportStats, QueueStats};
use stratablk::control::{
    Backend, BlockNode, ChainView, Control, Endpoint, EventHub, Export, LayerView, Limits, Server,
    SyncError,
};
use stratablk::job::source::{CopySource, JobIoError};
use stratablk::job::stream::StreamSpec;
use stratablk::job::{
    Body, BodyFactory, JobContext, JobError, Manager, ParkRunner, Refused, SystemClock, copier,
};
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon of names: chains of `top`, `mid`, `base` (exported as `e0`) and a lone `solo`.
pub struct FakeDaemon {
    pub quit: AtomicBool,
    /// While true, copies wait.
    gate: Mutex<bool>,
    gate_moved: Signal,
    /// What was streamed, with the `backing-file` that was written.
    pub finished: Mutex<Vec<(StreamSpec, Option<String>)>>,
    /// The next copies fail with these.
    pub faults: Mutex<Vec<i32>>,
    layers: Mutex<Vec<&'static str>>,
    /// The flushes that have failed.
    pub sync_errors: Mutex<Vec<SyncError>>,
}

impl FakeDaemon {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            quit: AtomicBool::new(false),
            gate: Mutex::new(false),
            gate_moved: Signal::new(),
            finished: Mutex::default(),
            faults: Mutex::default(),
            layers: Mutex::new(vec!["top", "mid", "low", "base"]),
            sync_errors: Mutex::default(),
        })
    }

    pub fn shut_gate(&self) {
        *self.gate.lock().unwrap() = true;
    }

    pub fn open_gate(&self) {
        *self.gate.lock().unwrap() = false;
        self.gate_moved.notify(usize::MAX);
    }

    fn view(name: &str) -> LayerView {
        LayerView {
            node_name: name.to_owned(),
            filenames: vec![format!("{name}.qcow2")],
            read_only: name == "solo",
        }
    }
}

fn node(name: &str, below: Option<&str>) -> BlockNode {
    BlockNode {
        node_name: name.to_owned(),
        driver: "qcow2".to_owned(),
        filename: format!("{name}.qcow2"),
        read_only: name == "solo",
        virtual_size: 4 * MIB,
        actual_size: 200_704,
        cluster_size: Some(65536),
        dirty: false,
        cache_direct: false,
        cache_no_flush: false,
        cache_writeback: true,
        detect_zeroes: "off".to_owned(),
        backing: below.map(|below| Backing {
            filename: format!("{below}.qcow2"),
            full_filename: format!("{below}.qcow2"),
            format: Some("qcow2".to_owned()),
            node_name: below.to_owned(),
        }),
        children: below
            .map(|below| ("backing", below.to_owned()))
            .into_iter()
            .collect(),
        format_specific: None,
    }
}

/// The daemon as the control socket has it.
pub struct Shared(pub Arc<FakeDaemon>);

impl Backend for Shared {
    fn block_nodes(&self) -> Vec<BlockNode> {
        let layers = self.0.layers.lock().unwrap();
        let mut nodes: Vec<_> = layers
            .iter()
            .enumerate()
            .map(|(at, name)| node(name, layers.get(at + 1).copied()))
            .collect();
        nodes.push(node("solo", None));
        nodes
    }

    fn exports(&self) -> Vec<Export> {
        vec![Export {
            id: "e0".to_owned(),
            kind: "vhost-user-blk".to_owned(),
            node_name: "top".to_owned(),
            shutting_down: false,
        }]
    }

    fn export_stats(&self) -> Vec<ExportStats> {
        let busy = QueueStats {
            reads: 3,
            read_bytes: 12288,
            writes: 1,
            write_bytes: 512,
            flushes: 2,
            polls_found: 5,
            polls_missed: 1,
            poll_ns: 250_000,
            ..QueueStats::default()
        };
        let other = QueueStats {
            reads: 1,
            read_bytes: 4096,
            ..QueueStats::default()
        };
        vec![ExportStats {
            id: "e0".to_owned(),
            node_name: "top".to_owned(),
            elapsed_ns: 1_000_000,
            poll_max_ns: 64_000,
            queues: vec![busy, other],
        }]
    }

    fn sync_errors(&self, _: &Export) -> Vec<SyncError> {
        self.0.sync_errors.lock().unwrap().clone()
    }

    fn chain(&self, device: &str) -> Option<ChainView> {
        if device == "solo" {
            return Some(ChainView {
                export: None,
                len: MIB,
                layers: vec![FakeDaemon::view("solo")],
            });
        }
        let layers = self.0.layers.lock().unwrap();
        let name = if device == "e0" { "top" } else { device };
        let at = layers.iter().position(|layer| *layer == name)?;
        Some(ChainView {
            export: (at == 0).then(|| "e0".to_owned()),
            len: 4 * MIB,
            layers: layers[at..]
                .iter()
                .map(|name| FakeDaemon::view(name))
                .collect(),
        })
    }

    fn open_stream(&self, spec: &StreamSpec, _job: &str) -> Result<BodyFactory, Refused> {
        let body = FakeBody(FakeSource {
            daemon: self.0.clone(),
            spec: spec.clone(),
        });
        Ok(Box::new(move || {
            Box::pin(async move { Ok(Box::new(body) as Box<dyn Body>) })
        }))
    }

    fn clear_sync_error(&self, device: &str) -> Result<(), Refused> {
        match device {
            "e0" => Ok(()),
            _ => Err(Refused(format!("No flush of node '{device}' has failed"))),
        }
    }

    fn quit(&self) {
        self.0.quit.store(true, Ordering::SeqCst);
    }
}

struct FakeSource {
    daemon: Arc<FakeDaemon>,
    spec: StreamSpec,
}

impl CopySource for FakeSource {
    fn len(&self) -> u64 {
        4 * MIB
    }

    fn cluster_size(&self) -> u64 {
        65536
    }

    fn status(
        &self,
        _offset: u64,
        max_len: u64,
    ) -> LocalBoxFuture<'_, Result<(u64, CopyStatus), JobIoError>> {
        Box::pin(async move { Ok((max_len, CopyStatus::Data)) })
    }

    fn copy(&self, _offset: u64, len: u64) -> LocalBoxFuture<'_, Result<u64, JobIoError>> {
        Box::pin(async move {
            loop {
                let moved = self.daemon.gate_moved.listen();
                if !*self.daemon.gate.lock().unwrap() {
                    break;
                }
                moved.await;
            }
            match self.daemon.faults.lock().unwrap().pop() {
                Some(errno) => Err(JobIoError {
                    errno,
                    write: false,
                    text: "a fault".to_owned(),
                }),
                None => Ok(len),
            }
        })
    }
}

struct FakeBody(FakeSource);

impl Body for FakeBody {
    fn run<'a>(&'a mut self, context: &'a JobContext) -> LocalBoxFuture<'a, Result<(), JobError>> {
        Box::pin(copier::run(&self.0, context))
    }

    fn commit<'a>(
        &'a mut self,
        _context: &'a JobContext,
    ) -> LocalBoxFuture<'a, Result<(), JobError>> {
        let spec = self.0.spec.clone();
        let backing_file = spec.backing_file.clone();
        self.0
            .daemon
            .finished
            .lock()
            .unwrap()
            .push((spec, backing_file));
        Box::pin(async { Ok(()) })
    }
}

/// A running server.
pub struct Bench {
    pub daemon: Arc<FakeDaemon>,
    pub server: Server,
    pub jobs: Arc<Manager>,
    pub hub: Arc<EventHub>,
    pub path: PathBuf,
    _directory: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self::with_limits(Limits::default())
    }

    pub fn with_limits(limits: Limits) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("qmp.sock");
        let daemon = FakeDaemon::new();
        let hub = EventHub::new();
        let jobs = Manager::new(
            Arc::new(ParkRunner),
            Arc::new(SystemClock::new()),
            hub.sink(),
        );
        let control = Control::new(Arc::new(Shared(daemon.clone())), jobs.clone());
        let endpoint = Endpoint::bind(&path).unwrap();
        let server = Server::with_limits(limits, vec![endpoint], control, hub.clone()).unwrap();
        Self {
            daemon,
            server,
            jobs,
            hub,
            path,
            _directory: directory,
        }
    }

    /// A client that has negotiated.
    pub fn client(&self) -> Client {
        let mut client = Client::connect(&self.path);
        assert_eq!(
            client.ask("qmp_capabilities", json!({})),
            json!({"return": {}})
        );
        client
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.daemon.open_gate();
        self.jobs.shut_down();
    }
}

/// A QMP client that keeps events apart from answers.
pub struct Client {
    pub stream: UnixStream,
    reader: BufReader<UnixStream>,
    pub greeting: Value,
    pub events: Vec<Value>,
}

impl Client {
    pub fn connect(path: &Path) -> Self {
        Self::new(UnixStream::connect(path).unwrap())
    }

    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        let mut client = Self {
            stream,
            reader,
            greeting: Value::Null,
            events: Vec::new(),
        };
        client.greeting = client.line().expect("a greeting");
        client
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next line, or nothing at the end.
    pub fn line(&mut self) -> Option<Value> {
        let mut line = Vec::new();
        if self.reader.read_until(b'\n', &mut line).unwrap() == 0 {
            return None;
        }
        assert!(line.ends_with(b"\r\n"), "{line:?}");
        Some(serde_json::from_slice(&line).unwrap())
    }

    /// The next answer.
    pub fn answer(&mut self) -> Value {
        loop {
            let value = self.line().expect("the connection ended");
            if value.get("event").is_none() {
                return value;
            }
            self.events.push(value);
        }
    }

    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        self.send(request.to_string().as_bytes());
        self.answer()
    }

    /// Asks for something that has to work.
    pub fn get(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.ask(command, arguments);
        answer
            .get("return")
            .unwrap_or_else(|| panic!("{command}: {answer}"))
            .clone()
    }

    /// Asks for something that must not work; class and text of the error.
    pub fn fail(&mut self, command: &str, arguments: Value) -> (String, String) {
        let answer = self.ask(command, arguments);
        let text = |name: &str| {
            answer["error"][name]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        assert!(answer.get("error").is_some(), "{command}: {answer}");
        (text("class"), text("desc"))
    }

    pub fn human(&mut self, line: &str) -> String {
        let text = self.get("human-monitor-command", json!({"command-line": line}));
        text.as_str().unwrap().to_owned()
    }

    /// The next event that `wanted` accepts, among those kept and those to come.
    pub fn event(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            if let Some(at) = self.events.iter().position(&wanted) {
                return self.events.drain(..=at).next_back().unwrap();
            }
            let value = self.line().expect("the connection ended");
            self.events.push(value);
        }
    }

    /// Waits until the job reaches a state.
    pub fn status(&mut self, id: &str, status: &str) {
        self.event(|event| {
            event["event"] == "JOB_STATUS_CHANGE"
                && event["data"] == json!({"status": status, "id": id})
        });
    }

    /// Waits for an event by name; its data.
    pub fn named(&mut self, name: &str) -> Value {
        self.event(|event| event["event"] == name)["data"].clone()
    }
}
