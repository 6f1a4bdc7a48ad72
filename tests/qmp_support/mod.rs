//! A control server on a real socket, with a daemon behind it that consists of names only, and a
//! client to drive it.
#![allow(dead_code, missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/skips.rs"]
pub mod skips;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_listener::Event as Signal;
use futures_util::future::LocalBoxFuture;
use serde_json::{Value, json};
use stratablk::chain::{CopyStatus, Layer};
use stratablk::control::{Control, Endpoint, EventHub, Limits, Server};
use stratablk::engine::{Engine, Exports, Runtime};
use stratablk::export::{Export, ExportConfig, SocketSource};
use stratablk::format::Format;
use stratablk::format::qcow2::create::{CreateOptions, create};
use stratablk::format::qcow2::{Backing, Options, Qcow2};
use stratablk::graph::{Graph, Holder, Node, Request, Role};
use stratablk::job::source::{CopySource, JobIoError};
use stratablk::job::stream::StreamSpec;
use stratablk::job::{
    Body, BodyFactory, EventSink, JobContext, JobError, Manager, ParkRunner, SystemClock, copier,
};
use stratablk::options::{BlockdevOptions, Dialect, ExportOptions};
use stratablk::reactor::Reactor;
use stratablk::storage::Storage;
use stratablk::storage::fault::FaultStorage;
use stratablk::storage::memory::MemoryStorage;
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

type File = FaultStorage<MemoryStorage>;

/// An engine on images in memory: a chain of `top`, `mid`, `low`, `base` (exported as `e0`) and a
/// lone `solo`. Its streams copy nothing.
pub struct FakeDaemon {
    pub quit: AtomicBool,
    pub graph: Arc<Graph>,
    /// While true, copies wait.
    gate: Mutex<bool>,
    gate_moved: Signal,
    /// What was streamed, with the `backing-file` that was written.
    pub finished: Mutex<Vec<(StreamSpec, Option<String>)>>,
    /// The next copies fail with these.
    pub faults: Mutex<Vec<i32>>,
    files: Vec<(&'static str, Arc<File>)>,
}

impl FakeDaemon {
    pub fn new() -> Arc<Self> {
        let graph = Arc::new(Graph::default());
        let reactor = Reactor::for_this_thread().unwrap();
        let below = [("base", None), ("low", Some("base")), ("mid", Some("low"))];
        let names = below
            .into_iter()
            .chain([("top", Some("mid")), ("solo", None)]);
        let files = names
            .map(|(name, below)| (name, reactor.block_on(add(&graph, name, below))))
            .collect();
        Reactor::leave_thread();
        Arc::new(Self {
            quit: AtomicBool::new(false),
            graph,
            gate: Mutex::new(false),
            gate_moved: Signal::new(),
            finished: Mutex::default(),
            faults: Mutex::default(),
            files,
        })
    }

    pub fn shut_gate(&self) {
        *self.gate.lock().unwrap() = true;
    }

    pub fn open_gate(&self) {
        *self.gate.lock().unwrap() = false;
        self.gate_moved.notify(usize::MAX);
    }

    /// Lets a flush of a node's image fail. What is to be done then is what the daemon says of it.
    pub fn fail_flush(&self, node: &str, errno: i32) -> String {
        let (_, file) = self.files.iter().find(|(name, _)| *name == node).unwrap();
        file.inner().fail_after(0, errno);
        let layer = self.graph.node(node).unwrap().layer;
        let reactor = Reactor::for_this_thread().unwrap();
        let storage: Arc<dyn Storage> = layer.storage.clone();
        let failed = reactor.block_on(stratablk::storage::io::sync_shared(&storage));
        Reactor::leave_thread();
        failed.unwrap_err().to_string()
    }

    /// An engine that has `exports`, and runs `jobs`.
    pub fn engine(
        self: &Arc<Self>,
        exports: Arc<Exports>,
        jobs: Arc<Manager>,
        events: EventSink,
    ) -> Arc<Engine> {
        let (daemon, quitting) = (self.clone(), self.clone());
        Arc::new(Engine {
            graph: self.graph.clone(),
            exports,
            jobs,
            store: None,
            runtime: Runtime::alone(events),
            streams: Box::new(move |spec, _job| {
                let body = FakeBody(FakeSource {
                    daemon: daemon.clone(),
                    spec: spec.clone(),
                });
                let body: BodyFactory =
                    Box::new(move || Box::pin(async move { Ok(Box::new(body) as Box<dyn Body>) }));
                Ok(body)
            }),
            quit: Box::new(move || quitting.quit.store(true, Ordering::SeqCst)),
        })
    }
}

/// Adds an image in memory to the graph.
async fn add(graph: &Graph, name: &'static str, below: Option<&str>) -> Arc<File> {
    let memory = Arc::new(MemoryStorage::new(Vec::new()));
    let options = CreateOptions {
        backing: below.map(|below| Backing {
            name: format!("{below}.qcow2"),
            format: Some("qcow2".to_owned()),
        }),
        ..CreateOptions::new(4 * MIB)
    };
    create(&*memory, &options).await.unwrap();
    let file = Arc::new(FaultStorage::over(memory).with_page_cache());
    let image = Qcow2::open(file.clone(), Options::default()).await.unwrap();
    let filename = format!("{name}.qcow2");
    let options = json!({"driver": "qcow2", "node-name": name, "read-only": name == "solo",
        "file": {"driver": "file", "filename": filename}});
    let layer = Layer {
        name: name.to_owned(),
        format: Format::Qcow2(Arc::new(image)),
        storage: file.clone(),
        read_only: true,
        discard: false,
        copy_on_read: false,
    };
    let options = BlockdevOptions::from_value(&options, Dialect::Json).unwrap();
    let node = Node {
        fixed_read_only: name == "solo",
        ..Node::new(options, layer, filename.into()).over(Role::Backing, below)
    };
    graph.add(node).unwrap();
    file
}

/// The export `e0`, with what two queues have done.
fn exports(graph: &Graph, directory: &Path) -> Arc<Exports> {
    let path = directory.join("e0.sock");
    let options = json!({"type": "vhost-user-blk", "id": "e0", "node-name": "top",
        "addr": {"type": "unix", "path": path}});
    let options = ExportOptions::from_value(&options, Dialect::Json).unwrap();
    let config = ExportConfig {
        queues: 2,
        poll_max_us: 64,
        ..ExportConfig::new("e0", SocketSource::Path(path))
    };
    let export = Export::start(config, graph.root("top").unwrap()).unwrap();
    let [busy, other] = export.stats() else {
        panic!("two queues");
    };
    busy.reads.add(3);
    busy.read_bytes.add(12288);
    busy.writes.add(1);
    busy.write_bytes.add(512);
    busy.flushes.add(2);
    busy.polls_found.add(5);
    busy.polls_missed.add(1);
    busy.poll_ns.add(250_000);
    other.reads.add(1);
    other.read_bytes.add(4096);
    let exports = Arc::new(Exports::default());
    let request = Request::disk(Holder::Export("e0".into()), "top", false);
    exports.add(export, options, graph.grant(request).unwrap());
    exports
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
    pub exports: Arc<Exports>,
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
        let exports = exports(&daemon.graph, directory.path());
        let hub = EventHub::new();
        let jobs = Manager::new(
            Graph::clone(&daemon.graph),
            Arc::new(ParkRunner),
            Arc::new(SystemClock::new()),
            hub.sink(),
        );
        let control = Control::new(daemon.engine(exports.clone(), jobs.clone(), hub.sink()));
        let endpoint = Endpoint::bind(&path).unwrap();
        let server = Server::with_limits(limits, vec![endpoint], control, hub.clone()).unwrap();
        Self {
            daemon,
            server,
            jobs,
            hub,
            path,
            exports,
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
