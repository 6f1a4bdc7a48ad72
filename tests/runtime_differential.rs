//! Nodes, exports and objects that come and go: the same commands to us and to
//! qemu-storage-daemon, and the same answers and events.
//!
//! What would be caught: any difference in what is accepted, in the words of a refusal, and in the
//! events that come before an answer.
//!
//! Skipped, with a word about it, where qemu-storage-daemon or qemu-img is not installed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod qmp_support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qmp_support::Client;
use qmp_support::skips::skip;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A daemon that has nothing but its control socket at first, in a folder with images.
struct Daemon {
    child: Child,
    directory: TempDir,
}

impl Daemon {
    fn start(program: &str) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let top = ("top.qcow2", Some("base.qcow2"));
        for (name, below) in [("base.qcow2", None), top, ("other.qcow2", None)] {
            create(directory.path(), name, below)?;
        }
        let child = Command::new(program)
            .current_dir(directory.path())
            .stderr(Stdio::null())
            .args(["--chardev", "socket,id=c,path=qmp.sock,server=on,wait=off"])
            .args(["--monitor", "chardev=c"])
            .spawn()
            .ok()?;
        Some(Self { child, directory })
    }

    fn connect(&self) -> Client {
        let path = self.directory.path().join("qmp.sock");
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(&path).is_err() {
            assert!(Instant::now() < deadline, "the daemon does not come up");
            std::thread::yield_now();
        }
        // qemu-storage-daemon serves one client at a time, and the look above is gone by now.
        let mut client = Client::connect(&path);
        client.get("qmp_capabilities", json!({}));
        client
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn create(directory: &Path, name: &str, below: Option<&str>) -> Option<()> {
    let mut command = Command::new("qemu-img");
    command.current_dir(directory);
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some(below) = below {
        command.args(["-F", "qcow2", "-b", below]);
    }
    let created = command.args([name, "4M"]).status().ok()?;
    created.success().then_some(())
}

/// What comes of each command: its events, which are told before the answer, and the answer.
fn run(client: &mut Client, commands: &[(&str, Value)]) -> Vec<(Value, Vec<Value>)> {
    let commands = commands.iter();
    let answers = commands.map(|(command, arguments)| {
        client.events.clear();
        let answer = client.ask(command, arguments.clone());
        let events = client.events.iter().map(|event| {
            let mut event = event.clone();
            event.as_object_mut().unwrap().remove("timestamp");
            event
        });
        (answer, events.collect())
    });
    answers.collect()
}

fn compare(commands: &[(&str, Value)]) {
    let Some(theirs) = Daemon::start("qemu-storage-daemon") else {
        skip("qemu-storage-daemon and qemu-img are needed").unwrap();
        return;
    };
    let ours = Daemon::start(env!("CARGO_BIN_EXE_stratablk")).unwrap();
    let wanted = run(&mut theirs.connect(), commands);
    let got = run(&mut ours.connect(), commands);
    for ((got, wanted), command) in got.iter().zip(&wanted).zip(commands) {
        assert_eq!(got, wanted, "to {command:?}");
    }
}

/// Compares the sizes of `nodes` after the commands.
fn compare_sizes(commands: &[(&str, Value)], nodes: &[&str]) {
    let Some(theirs) = Daemon::start("qemu-storage-daemon") else {
        return;
    };
    let ours = Daemon::start(env!("CARGO_BIN_EXE_stratablk")).unwrap();
    let [theirs, ours] = [theirs, ours].map(|daemon| {
        let mut client = daemon.connect();
        run(&mut client, commands);
        let all = client.get("query-named-block-nodes", json!({"flat": true}));
        let all = all.as_array().unwrap().iter();
        let sizes = all.map(|node| {
            (
                node["node-name"].clone(),
                node["image"]["virtual-size"].clone(),
            )
        });
        let wanted = |(name, _): &(Value, Value)| nodes.iter().any(|node| name == node);
        let mut sizes: Vec<_> = sizes.filter(wanted).collect();
        sizes.sort_by_key(|(name, _)| name.to_string());
        sizes
    });
    assert_eq!(ours.len(), nodes.len());
    assert_eq!(ours, theirs);
}

fn file(name: &str) -> Value {
    json!({"driver": "file", "filename": name})
}

#[test]
fn nodes() {
    let top = json!({"driver": "qcow2", "node-name": "t", "file":
        {"driver": "file", "filename": "top.qcow2", "node-name": "tf"}, "backing": "b"});
    let named = |name: &str, more: Value| {
        let mut node = json!({"driver": "file", "node-name": name, "filename": "base.qcow2"});
        node.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        node
    };
    let del = |name: &str| ("blockdev-del", json!({"node-name": name}));
    compare(&[
        ("blockdev-add", json!({})),
        ("blockdev-add", json!({"driver": "nope", "node-name": "x"})),
        ("blockdev-add", json!({"driver": 1, "node-name": "x"})),
        ("blockdev-add", json!({"driver": "file"})),
        ("blockdev-add", file("base.qcow2")),
        ("blockdev-add", named("1x", json!({}))),
        ("blockdev-add", named(&"x".repeat(32), json!({}))),
        ("blockdev-add", named("x", json!({"zz": 1}))),
        ("blockdev-add", named("x", json!({"read-only": "on"}))),
        ("blockdev-add", named("x", json!({"discard": "maybe"}))),
        ("blockdev-add", named("x", json!({"filename": "none"}))),
        ("blockdev-add", named("x", json!({"force-share": true}))),
        (
            "blockdev-add",
            named("x", json!({"detect-zeroes": "unmap"})),
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "t", "file": "none"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "t", "file": file("none")}),
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "t", "file":
                {"driver": "file", "filename": "top.qcow2", "zz": 1}}),
        ),
        ("blockdev-add", top.clone()),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "b", "file": file("base.qcow2")}),
        ),
        ("blockdev-add", top.clone()),
        ("blockdev-add", top),
        ("blockdev-add", named("tf", json!({}))),
        ("blockdev-del", json!({})),
        ("blockdev-del", json!({"node-name": 1})),
        del("x"),
        del("b"),
        del("tf"),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "r", "file": "t"}),
        ),
        del("t"),
        del("r"),
        del("t"),
        del("tf"),
        del("b"),
        del("b"),
        ("query-named-block-nodes", json!({})),
    ]);
}

#[test]
fn exports() {
    let export = |more: Value| {
        let mut export = json!({"type": "vhost-user-blk", "id": "e", "node-name": "t",
            "addr": {"type": "unix", "path": "e.sock"}});
        export
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        ("block-export-add", export)
    };
    let del = |more: Value| {
        let mut arguments = json!({"id": "e"});
        arguments
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        ("block-export-del", arguments)
    };
    let node = |name: &str, read_only: bool| {
        let node = json!({"driver": "qcow2", "node-name": name, "read-only": read_only,
            "file": file(&format!("{}.qcow2", if read_only { "base" } else { "top" }))});
        ("blockdev-add", node)
    };
    let query = || ("query-block-exports", json!({}));
    compare(&[
        node("t", false),
        node("r", true),
        ("block-export-add", json!({})),
        export(json!({"type": "nope"})),
        (
            "block-export-add",
            json!({"type": "vhost-user-blk", "id": "e", "node-name": "t"}),
        ),
        export(json!({"node-name": "nope"})),
        export(json!({"node-name": 1})),
        export(json!({"id": "1e"})),
        export(json!({"num-queues": 0})),
        export(json!({"num-queues": 65536})),
        export(json!({"num-queues": "1"})),
        export(json!({"logical-block-size": 513})),
        export(json!({"iothread": "no"})),
        export(json!({"writable": "on"})),
        export(json!({"zz": 1})),
        export(json!({"addr": {"type": "unix"}})),
        export(json!({"addr": {"type": "inet", "host": "localhost", "port": "1"}})),
        export(json!({"addr": {"type": "fd", "str": "99"}})),
        export(json!({"addr": {"type": "unix", "path": "x".repeat(200)}})),
        export(json!({"node-name": "r", "writable": true})),
        query(),
        export(json!({"writable": true})),
        query(),
        export(json!({})),
        export(json!({"id": "f", "addr": {"type": "unix", "path": "f.sock"}, "writable": true})),
        ("blockdev-del", json!({"node-name": "t"})),
        ("block-export-del", json!({})),
        ("block-export-del", json!({"id": "nope"})),
        del(json!({"mode": "soft"})),
        del(json!({"mode": "safe"})),
        query(),
        export(json!({"allow-inactive": true})),
        export(json!({"writethrough": true, "num-queues": 4})),
        del(json!({"mode": "hard"})),
        del(json!({"id": "f"})),
        query(),
        ("blockdev-del", json!({"node-name": "t"})),
    ]);
}

#[test]
fn reopening() {
    let reopen = |options: Value| ("blockdev-reopen", json!({"options": [options]}));
    let top = |more: Value| {
        let mut node = json!({"driver": "qcow2", "node-name": "t", "file": "tf"});
        node.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        node
    };
    compare(&[
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "b", "read-only": true, "file":
                {"driver": "file", "node-name": "bf", "filename": "base.qcow2"}}),
        ),
        (
            "blockdev-add",
            json!({"driver": "file", "node-name": "tf", "filename": "top.qcow2"}),
        ),
        ("blockdev-add", top(json!({"backing": "b"}))),
        ("blockdev-reopen", json!({})),
        ("blockdev-reopen", json!({"options": 1})),
        reopen(json!({"driver": "qcow2"})),
        reopen(json!({"driver": "qcow2", "file": "tf"})),
        reopen(json!({"driver": "qcow2", "node-name": "x", "file": "tf"})),
        reopen(json!({"driver": "qcow2", "node-name": "", "file": "tf"})),
        reopen(top(json!({"backing": ""}))),
        reopen(top(json!({"file": "", "backing": "b"}))),
        reopen(top(json!({"file": "none", "backing": "b"}))),
        reopen(top(json!({}))),
        reopen(top(json!({"backing": "b"}))),
        reopen(top(json!({"backing": "t"}))),
        reopen(top(json!({"backing": "x"}))),
        reopen(top(json!({"backing": null}))),
        reopen(top(
            json!({"backing": {"driver": "qcow2", "file": file("base.qcow2")}}),
        )),
        reopen(top(json!({}))),
        reopen(top(json!({"backing": "b", "read-only": true}))),
        (
            "block-export-add",
            json!({"type": "vhost-user-blk", "id": "e", "node-name": "t", "writable": true,
                "addr": {"type": "unix", "path": "e.sock"}}),
        ),
        reopen(top(json!({"backing": "b"}))),
        (
            "block-export-add",
            json!({"type": "vhost-user-blk", "id": "e", "node-name": "t", "writable": true,
                "addr": {"type": "unix", "path": "e.sock"}}),
        ),
        reopen(top(json!({"backing": "b", "read-only": true}))),
        reopen(json!({"driver": "file", "node-name": "tf", "filename": "other.qcow2"})),
        reopen(top(json!({"backing": null}))),
        (
            "blockdev-reopen",
            json!({"options": [top(json!({"backing": "b"})), top(json!({"backing": "x"}))]}),
        ),
        ("blockdev-del", json!({"node-name": "b"})),
    ]);
}

/// A header names one file, and the options have put another one there: the data would go to the wrong one.
#[test]
fn files_that_only_a_header_names_are_no_layers() {
    let below = json!({"driver": "qcow2", "node-name": "o", "file": file("other.qcow2")});
    let named = |base: &str| json!({"device": "t", "job-id": "j", "base": base});
    compare(&[
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "t", "file": file("top.qcow2"), "backing": below}),
        ),
        ("block-commit", named("base.qcow2")),
        ("block-stream", named("base.qcow2")),
        ("block-stream", named("none.qcow2")),
    ]);
}

#[test]
fn write_thresholds() {
    let set = |node: Value, at: Value| {
        let arguments = json!({"node-name": node, "write-threshold": at});
        ("block-set-write-threshold", arguments)
    };
    compare(&[
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "t", "file":
                {"driver": "file", "node-name": "tf", "filename": "base.qcow2"}}),
        ),
        ("block-set-write-threshold", json!({})),
        ("block-set-write-threshold", json!({"node-name": "t"})),
        ("block-set-write-threshold", json!({"write-threshold": 1})),
        (
            "block-set-write-threshold",
            json!({"node-name": "t", "write-threshold": 1, "zz": 1}),
        ),
        set(json!("x"), json!(1)),
        set(json!(""), json!(0)),
        set(json!(1), json!(1)),
        set(json!("t"), json!("1")),
        set(json!("t"), json!(1.5)),
        set(json!("t"), json!(null)),
        set(json!("t"), json!(-1)),
        set(json!("t"), json!(u64::MAX)),
        set(json!("tf"), json!(4096)),
        set(json!("t"), json!(0)),
        set(json!("t"), json!(0)),
        ("blockdev-del", json!({"node-name": "t"})),
    ]);
}

#[test]
fn names_of_backing_files() {
    let change = |device: &str, image: &str| {
        let arguments = json!({"device": device, "image-node-name": image, "backing-file": "./y"});
        ("change-backing-file", arguments)
    };
    compare(&[
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "t", "file":
                {"driver": "file", "node-name": "tf", "filename": "top.qcow2"},
                "backing": {"driver": "qcow2", "node-name": "b", "file": file("base.qcow2")}}),
        ),
        ("change-backing-file", json!({})),
        ("change-backing-file", json!({"device": "t"})),
        (
            "change-backing-file",
            json!({"device": "t", "image-node-name": "t"}),
        ),
        change("x", "t"),
        change("t", "x"),
        change("t", "b"),
        change("t", "tf"),
        change("b", "t"),
        change("t", "t"),
    ]);
}

#[test]
fn snapshots_inside_of_images() {
    let take = |device: &str, name: &str| {
        let arguments = json!({"device": device, "name": name});
        ("blockdev-snapshot-internal-sync", arguments)
    };
    let delete = |arguments: Value| ("blockdev-snapshot-delete-internal-sync", arguments);
    let missing = |more: Value| {
        let mut arguments = json!({"device": "t"});
        let more = more.as_object().unwrap().clone();
        arguments.as_object_mut().unwrap().extend(more);
        delete(arguments)
    };
    let transaction = |actions: Value| ("transaction", json!({"actions": actions}));
    let action = |device: &str, name: &str| json!({"type": "blockdev-snapshot-internal-sync", "data": {"device": device, "name": name}});
    compare(&[
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "t", "file":
                {"driver": "file", "node-name": "tf", "filename": "top.qcow2"},
                "backing": {"driver": "qcow2", "node-name": "b", "file": file("base.qcow2")}}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "n", "size": 512}),
        ),
        ("blockdev-snapshot-internal-sync", json!({})),
        ("blockdev-snapshot-internal-sync", json!({"device": "t"})),
        ("blockdev-snapshot-internal-sync", json!({"name": "t"})),
        (
            "blockdev-snapshot-internal-sync",
            json!({"device": "t", "name": 1}),
        ),
        take("x", "one"),
        take("b", "one"),
        take("tf", "one"),
        take("n", "one"),
        take("t", ""),
        take("t", "one"),
        take("t", "one"),
        take("t", "1"),
        delete(json!({})),
        delete(json!({"device": "x", "id": "1"})),
        delete(json!({"device": "b", "id": "1"})),
        delete(json!({"device": "n", "id": "1"})),
        missing(json!({})),
        missing(json!({"id": "9"})),
        missing(json!({"name": "none"})),
        missing(json!({"id": "1", "name": "1"})),
        missing(json!({"id": "", "name": "one"})),
        transaction(json!([action("t", "two"), action("t", "two")])),
        transaction(json!([action("t", "two"), action("x", "two")])),
        transaction(json!([action("t", "two"), action("t", "one")])),
        transaction(json!([action("t", "two"), {"type": "abort", "data": {}}])),
        transaction(json!([action("t", "two"), action("t", "three")])),
        (
            "transaction",
            json!({"actions": [action("t", "four")],
                "properties": {"completion-mode": "grouped"}}),
        ),
        take("t", "three"),
        missing(json!({"id": "3", "name": "two2"})),
    ]);
}

#[test]
fn creating_images() {
    let create = |options: Value| {
        let arguments = json!({"job-id": "j", "options": options});
        ("blockdev-create", arguments)
    };
    compare(&[
        ("blockdev-create", json!({})),
        ("blockdev-create", json!({"job-id": "j"})),
        ("blockdev-create", json!({"job-id": "j", "options": 1})),
        create(json!({})),
        create(json!({"driver": "nope", "filename": "x", "size": 1})),
        create(json!({"driver": "file", "filename": "x"})),
        create(json!({"driver": "file", "filename": "x", "size": 1, "zz": 1})),
        create(json!({"driver": "qcow2", "file": "x"})),
        create(json!({"driver": "qcow2", "file": "x", "size": 1, "version": "v4"})),
        create(json!({"driver": "qcow2", "file": {"driver": "file"}, "size": 1})),
        (
            "blockdev-create",
            json!({"job-id": "1 j", "options": {"driver": "file", "filename": "x", "size": 1}}),
        ),
        ("block-job-cancel", json!({"device": "j"})),
        ("job-dismiss", json!({"id": "j"})),
    ]);
}

/// All that is told of create jobs, and how each ended. The answer may come between any two of the
/// events.
#[test]
fn the_lives_of_create_jobs() {
    let lives = |mut client: Client| {
        let file = |size: u64, more: Value| {
            let mut options = json!({"driver": "file", "filename": "new", "size": size});
            options
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            options
        };
        let qcow2 = |more: Value| {
            let mut options = json!({"driver": "qcow2", "file": "n", "size": 1 << 20});
            options
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            options
        };
        let mut lives = Vec::new();
        for (at, options) in [
            file(1 << 20, json!({})),
            file(1 << 20, json!({"preallocation": "metadata"})),
            file(1000, json!({"filename": "none/new"})),
            file(65536, json!({"preallocation": "full"})),
            qcow2(json!({})),
            qcow2(json!({"file": "x"})),
            qcow2(json!({"size": 1000})),
            qcow2(json!({"cluster-size": 1000})),
            qcow2(json!({"refcount-bits": 3})),
            qcow2(json!({"backing-fmt": "raw"})),
            qcow2(json!({"version": "v2", "lazy-refcounts": true})),
            qcow2(json!({"version": "v2", "extended-l2": true})),
            qcow2(json!({"version": "v2", "compression-type": "zstd"})),
            qcow2(json!({"backing-file": "x", "preallocation": "full"})),
            qcow2(json!({"preallocation": "metadata"})),
            qcow2(
                json!({"backing-file": "b.qcow2", "backing-fmt": "qcow2", "extended-l2": true,
                "cluster-size": 131_072, "compression-type": "zstd", "lazy-refcounts": true}),
            ),
            qcow2(json!({"file": file(0, json!({"filename": "none/new"}))})),
        ]
        .into_iter()
        .enumerate()
        {
            if at == 4 {
                let node = json!({"driver": "file", "node-name": "n", "filename": "new"});
                client.get("blockdev-add", node);
            }
            let mut options = options;
            if let Some(file) = options.get_mut("file").and_then(Value::as_object_mut) {
                file.remove("size");
            }
            client.get(
                "blockdev-create",
                json!({"job-id": "j", "options": options}),
            );
            client.status("j", "concluded");
            let events: Vec<_> = client
                .events
                .drain(..)
                .map(|event| event["event"].clone())
                .collect();
            let jobs = client.get("query-jobs", json!({}));
            assert_eq!(client.get("query-block-jobs", json!({})), json!([]));
            client.get("job-dismiss", json!({"id": "j"}));
            client.status("j", "null");
            lives.push((options, jobs, events));
        }
        lives
    };
    let Some(theirs) = Daemon::start("qemu-storage-daemon") else {
        skip("qemu-storage-daemon and qemu-img are needed").unwrap();
        return;
    };
    let ours = Daemon::start(env!("CARGO_BIN_EXE_stratablk")).unwrap();
    let wanted = lives(theirs.connect());
    let got = lives(ours.connect());
    for (got, wanted) in got.iter().zip(&wanted) {
        assert_eq!(got, wanted);
    }
    // What has been made is the same.
    let info = |daemon: &Daemon| {
        let mut command = Command::new("qemu-img");
        command.current_dir(daemon.directory.path());
        let output = command
            .args(["info", "-U", "--output=json", "new"])
            .output();
        let mut info: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
        for own in ["actual-size", "children", "full-backing-filename"] {
            info.as_object_mut().unwrap().remove(own);
        }
        info
    };
    assert_eq!(info(&ours), info(&theirs));
}

#[test]
fn objects() {
    let add = |more: Value| {
        let mut object = json!({"qom-type": "iothread", "id": "a"});
        object
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        ("object-add", object)
    };
    let get = |path: &str, property: &str| {
        let arguments = json!({"path": path, "property": property});
        ("qom-get", arguments)
    };
    let set = |property: &str, value: Value| {
        let arguments = json!({"path": "a", "property": property, "value": value});
        ("qom-set", arguments)
    };
    compare(&[
        ("object-add", json!({})),
        ("object-add", json!({"qom-type": "iothread"})),
        add(json!({"id": "1"})),
        add(json!({"qom-type": "nope"})),
        add(json!({"zz": 1})),
        add(json!({"poll-max-ns": -1})),
        add(json!({"poll-max-ns": "1"})),
        add(json!({"poll-max-ns": 5000, "poll-grow": 2})),
        add(json!({})),
        ("qom-list", json!({"path": "/objects"})),
        ("qom-list", json!({"path": "/nope"})),
        ("qom-list", json!({})),
        get("a", "poll-max-ns"),
        get("/objects/a", "poll-grow"),
        get("a", "type"),
        get("a", "nope"),
        get("/nope", "type"),
        get("/objects", "a"),
        get("/objects", "type"),
        get("/", "type"),
        get("/", "objects"),
        set("poll-max-ns", json!(7)),
        set("poll-max-ns", json!("7")),
        set("poll-max-ns", json!(-7)),
        set("nope", json!(1)),
        set("type", json!("x")),
        get("a", "poll-max-ns"),
        ("object-del", json!({})),
        ("object-del", json!({"id": "nope"})),
        ("object-del", json!({"id": "a"})),
        ("object-del", json!({"id": "a"})),
        ("qom-list", json!({"path": "/objects"})),
    ]);
}

#[test]
fn other_sizes() {
    let resize = |arguments: Value| ("block_resize", arguments);
    let of = |node: &str, size: i64| resize(json!({"node-name": node, "size": size}));
    const MIB: i64 = 1 << 20;
    let image = json!({"driver": "qcow2", "node-name": "t",
        "file": {"driver": "file", "filename": "top.qcow2", "node-name": "tf"}, "backing": "b"});
    let base = json!({"driver": "qcow2", "node-name": "b", "file": file("base.qcow2")});
    let null = json!({"driver": "null-co", "node-name": "n", "size": 4096});
    let raw = |name: &str, more: Value| {
        let mut node = json!({"driver": "raw", "node-name": name, "file": "f"});
        let more = more.as_object().unwrap().clone();
        node.as_object_mut().unwrap().extend(more);
        ("blockdev-add", node)
    };
    let del = |name: &str| ("blockdev-del", json!({"node-name": name}));
    compare(&[
        resize(json!({})),
        resize(json!({"size": 1})),
        resize(json!({"device": "t", "size": MIB})),
        resize(json!({"node-name": "t", "size": "1"})),
        resize(json!({"node-name": "t", "size": 1, "zz": 1})),
        resize(json!({"device": "x", "node-name": "y", "size": MIB})),
        ("blockdev-add", base),
        ("blockdev-add", image),
        ("blockdev-add", null),
        resize(json!({"node-name": "t"})),
        of("t", 8 * MIB),
        of("t", MIB),
        of("t", 0),
        of("t", 4 * MIB),
        of("t", 4 * MIB + 1),
        of("t", -1),
        of("b", 8 * MIB),
        of("tf", 8 * MIB),
        of("n", 8192),
        resize(json!({"device": "x", "node-name": "t", "size": 5 * MIB})),
    ]);
    compare(&[
        (
            "blockdev-add",
            json!({"driver": "file", "node-name": "f", "filename": "base.qcow2"}),
        ),
        raw("r", json!({})),
        of("r", 8 * MIB),
        of("f", 9 * MIB),
        of("r", 1000),
        of("r", 1 << 62),
        raw("w", json!({"offset": 512})),
        of("w", MIB),
        of("f", 9 * MIB),
        del("w"),
        raw("s", json!({"size": 512})),
        of("s", 1024),
        of("f", 9 * MIB),
        of("r", 9 * MIB),
        del("s"),
        raw("o", json!({"read-only": true})),
        of("o", MIB),
    ]);
    // A part of an image: its end is the image's, its size is not.
    let part = json!({"driver": "raw", "node-name": "part", "file": "t", "offset": MIB});
    let image = json!({"driver": "qcow2", "node-name": "t", "file": file("other.qcow2")});
    let mut commands = vec![("blockdev-add", image), ("blockdev-add", part)];
    commands.extend([3, 2, 5].map(|size| of("part", size * MIB)));
    compare(&commands);
    compare_sizes(&commands, &["part", "t"]);
}
