//! What clients see of a job in the graph, its filter node: the same commands to us and to
//! qemu-storage-daemon while jobs are at work.
//!
//! What would be caught: a filter that is not listed, or not where it belongs; one whose name somebody else
//! gets, or that is removed, reopened, covered or streamed under its job; another word in the refusals of
//! jobs that meet others; a filter that stays when its job has ended, or is not there again when another
//! process goes on with it; and a name of a filter in a record, which no later process knows.
//!
//! The comparisons are skipped, with a word about it, where qemu-storage-daemon is not installed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod qmp_support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qmp_support::Client;
use qmp_support::skips::skip;
use serde_json::{Value, json};
use tempfile::TempDir;

const OURS: &str = env!("CARGO_BIN_EXE_stratablk");
const THEIRS: &str = "qemu-storage-daemon";
const LAYERS: usize = 6;

/// A folder with a chain of images, each of which has something that no other one has.
fn images() -> TempDir {
    let directory = TempDir::new().unwrap();
    let run = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        let done = command.current_dir(directory.path()).args(args).output();
        assert!(done.unwrap().status.success(), "{program} {args:?}");
    };
    for layer in 0..LAYERS {
        let name = format!("n{layer}.qcow2");
        let below = layer.checked_sub(1).map(|below| format!("n{below}.qcow2"));
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if let Some(below) = &below {
            args.extend(["-F", "qcow2", "-b", below]);
        }
        args.extend([&name, "16M"]);
        run("qemu-img", &args);
        let write = format!("write -q {}M 2M", 2 * layer);
        run("qemu-io", &["-f", "qcow2", "-c", &write, &name]);
    }
    for name in ["over.qcow2", "under.qcow2", "lowest.qcow2"] {
        run("qemu-img", &["create", "-q", "-f", "qcow2", name, "16M"]);
    }
    directory
}

/// A daemon with the chain `n5` to `n0`, whose files are `f5` to `f0`. It is killed in the end.
struct Daemon(Child);

impl Daemon {
    fn start(program: &str, folder: &Path, more: &[&str]) -> Option<Self> {
        let _ = std::fs::remove_file(folder.join("qmp.sock"));
        let mut command = Command::new(program);
        command.current_dir(folder).stderr(Stdio::null());
        command.args(["--chardev", "socket,id=c,path=qmp.sock,server=on,wait=off"]);
        command.args(["--monitor", "chardev=c"]);
        for layer in 0..LAYERS {
            let file = json!({"driver": "file", "node-name": format!("f{layer}"),
                "filename": format!("n{layer}.qcow2")});
            let below = layer.checked_sub(1).map(|below| format!("n{below}"));
            let node = json!({"driver": "qcow2", "node-name": format!("n{layer}"),
                "file": format!("f{layer}"), "backing": below});
            command.args(["--blockdev", &file.to_string()]);
            command.args(["--blockdev", &node.to_string()]);
        }
        Some(Self(command.args(more).spawn().ok()?))
    }

    fn connect(folder: &Path) -> Client {
        let path = folder.join("qmp.sock");
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(&path).is_err() {
            assert!(Instant::now() < deadline, "the daemon does not come up");
            std::thread::yield_now();
        }
        let mut client = Client::connect(&path);
        client.get("qmp_capabilities", json!({}));
        client
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A job that comes to no end.
type Start = (&'static str, Value);

fn stream() -> Start {
    (
        "block-stream",
        json!({"device": "n4", "base-node": "n2", "filter-node-name": "F"}),
    )
}

fn commit() -> Start {
    (
        "block-commit",
        json!({"device": "n5", "top-node": "n4", "base-node": "n2", "filter-node-name": "F"}),
    )
}

fn active_commit() -> Start {
    (
        "block-commit",
        json!({"device": "n5", "base-node": "n3", "filter-node-name": "F"}),
    )
}

/// Runs `job` in both daemons, with an export of the top, and has `ask` ask both. `None` where there is
/// only one.
fn with_both<T>(job: &Start, mut ask: impl FnMut(&mut Client) -> T) -> Option<[T; 2]> {
    let mut answers = Vec::new();
    for program in [OURS, THEIRS] {
        let folder = images();
        let Some(_daemon) = Daemon::start(program, folder.path(), &[]) else {
            skip("qemu-storage-daemon is needed").unwrap();
            return None;
        };
        let mut client = Daemon::connect(folder.path());
        let export = json!({"type": "vhost-user-blk", "id": "e", "node-name": "n5", "writable": true,
            "addr": {"type": "unix", "path": "e.sock"}});
        client.get("block-export-add", export);
        begin(&mut client, job);
        answers.push(ask(&mut client));
    }
    answers.try_into().ok()
}

fn begin(client: &mut Client, (command, arguments): &Start) {
    let mut arguments = arguments.clone();
    arguments["job-id"] = json!("j");
    arguments["speed"] = json!(1);
    client.get(command, arguments);
}

/// Asks both daemons for what both refuse.
fn refused(job: &Start, requests: &[(&str, Value)]) {
    let both = with_both(job, |client| {
        let ask = |(command, arguments): &(&str, Value)| client.ask(command, arguments.clone());
        requests.iter().map(ask).collect::<Vec<_>>()
    });
    let Some([ours, theirs]) = both else {
        return;
    };
    for ((ours, theirs), request) in ours.iter().zip(&theirs).zip(requests) {
        assert!(theirs.get("error").is_some(), "{request:?} is not refused");
        assert_eq!(ours, theirs, "{:?} to {request:?}", job.1);
    }
}

/// What must not be done to a filter, under each of its names, and what may not take its name.
fn to_any_filter() -> Vec<(&'static str, Value)> {
    let reopen = |options: Value| ("blockdev-reopen", json!({"options": [options]}));
    vec![
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "F"}),
        ),
        ("blockdev-del", json!({"node-name": "F"})),
        reopen(json!({"driver": "copy-on-read", "node-name": "F", "file": "n4"})),
        (
            "blockdev-snapshot-sync",
            json!({"node-name": "F", "snapshot-file": "x.qcow2",
            "snapshot-node-name": "x"}),
        ),
        ("block-stream", json!({"device": "F", "job-id": "k"})),
        (
            "block-stream",
            json!({"device": "n5", "bottom": "F", "job-id": "k"}),
        ),
        ("block-commit", json!({"device": "F", "job-id": "k"})),
        (
            "change-backing-file",
            json!({"device": "F", "image-node-name": "F", "backing-file": "x"}),
        ),
    ]
}

fn streams(list: &[(&str, &str)]) -> Vec<(&'static str, Value)> {
    let request = |(device, base): &(&str, &str)| {
        let arguments = json!({"device": device, "base-node": base, "job-id": "k"});
        ("block-stream", arguments)
    };
    list.iter().map(request).collect()
}

fn commits(list: &[(&str, &str)]) -> Vec<(&'static str, Value)> {
    let request = |(top, base): &(&str, &str)| {
        let arguments = json!({"device": "n5", "top-node": top, "base-node": base, "job-id": "k"});
        ("block-commit", arguments)
    };
    list.iter().map(request).collect()
}

#[test]
fn who_meets_a_stream() {
    let mut requests = to_any_filter();
    requests.extend(streams(&[
        ("n5", "n3"),
        ("n5", "n0"),
        ("n4", "F"),
        ("n4", "n3"),
        ("n4", "n0"),
        ("n3", "n2"),
    ]));
    requests.extend(commits(&[
        ("n5", "n4"),
        ("n5", "F"),
        ("n5", "n0"),
        ("F", "n0"),
        ("n4", "n3"),
        ("n2", "n1"),
    ]));
    for name in ["F", "1", ""] {
        requests.push((
            "block-stream",
            json!({"device": "n1", "filter-node-name": name, "job-id": "k"}),
        ));
        requests.push((
            "block-commit",
            json!({"device": "n5", "top-node": "n1", "base-node": "n0", "filter-node-name": name,
                "job-id": "k"}),
        ));
    }
    for name in ["n4", "n3"] {
        requests.push(("blockdev-del", json!({"node-name": name})));
    }
    refused(&stream(), &requests);
}

#[test]
fn who_meets_a_commit() {
    let mut requests = to_any_filter();
    requests.extend(streams(&[("n4", "n2"), ("n3", "n2"), ("n2", "n0")]));
    for name in ["n4", "n3", "n2"] {
        requests.push(("blockdev-del", json!({"node-name": name})));
    }
    refused(&commit(), &requests);
}

#[test]
fn who_meets_a_commit_of_the_guests_layer() {
    let mut requests = to_any_filter();
    requests.extend(streams(&[
        ("n5", "F"),
        ("n5", "n4"),
        ("n4", "n3"),
        ("n3", "n0"),
    ]));
    let over_itself = json!({"driver": "qcow2", "node-name": "n5", "file": "f5", "backing": "F"});
    requests.push(("blockdev-reopen", json!({"options": [over_itself]})));
    for name in ["n5", "n4", "n3"] {
        requests.push(("blockdev-del", json!({"node-name": name})));
    }
    refused(&active_commit(), &requests);
}

/// What a node shows of itself and of those under it, without sizes and what depends on the time.
fn shown(node: &Value) -> Value {
    fn image(of: &Value) -> Value {
        let Some(members) = of.as_object() else {
            return Value::Null;
        };
        let known = [
            "filename",
            "format",
            "backing-filename",
            "full-backing-filename",
        ];
        let known = known
            .iter()
            .chain(&["backing-filename-format", "cluster-size"]);
        let mut found: serde_json::Map<_, _> = known
            .filter_map(|key| Some(((*key).to_owned(), members.get(*key)?.clone())))
            .collect();
        found.insert("below".into(), image(&of["backing-image"]));
        found.insert(
            "specific".into(),
            of.get("format-specific").is_some().into(),
        );
        found.into()
    }
    let name = node["node-name"].as_str().unwrap();
    let mut own = image(&node["image"]);
    // With QEMU the name of the image over a filter says that it is over one.
    let is_over = name == "n5" && node["file"] != "n5.qcow2";
    if is_over {
        own["filename"] = json!("n5.qcow2");
    }
    let file = if is_over {
        &own["filename"]
    } else {
        &node["file"]
    };
    json!({
        "node-name": name.split_at(name.len().min(6)).0.replace("#block", "#"),
        "drv": node["drv"],
        "ro": node["ro"],
        "backing_file": node.get("backing_file"),
        "backing_file_depth": node["backing_file_depth"],
        "file": file,
        "image": own,
    })
}

/// The nodes, those over others first, and what exports have on top.
fn seen(client: &mut Client) -> Value {
    let nodes = client.get("query-named-block-nodes", json!({}));
    let nodes = nodes.as_array().unwrap().iter();
    let mut nodes: Vec<Value> = nodes.map(shown).collect();
    nodes.sort_by_key(|node| node["node-name"].as_str().unwrap().to_owned());
    let mut exports = client.get("query-block-exports", json!({}));
    let name = exports[0]["node-name"].as_str().unwrap();
    exports[0]["node-name"] = name.split_at(name.len().min(6)).0.into();
    json!({"nodes": nodes, "exports": exports})
}

/// Who has which node for what: nodes and jobs.
fn edges(client: &mut Client) -> Vec<String> {
    let graph = client.get("x-debug-query-block-graph", json!({}));
    let find = |id: &Value| {
        let nodes = graph["nodes"].as_array().unwrap();
        nodes.iter().find(|node| node["id"] == *id).unwrap().clone()
    };
    let edges = graph["edges"].as_array().unwrap().iter();
    let mut edges: Vec<_> = edges
        .map(|edge| {
            (
                find(&edge["parent"]),
                edge["name"].clone(),
                find(&edge["child"]),
            )
        })
        .filter(|(parent, ..)| parent["type"] != "block-backend")
        .map(|(parent, name, child)| {
            format!(
                "{} {} {name} {}",
                parent["type"], parent["name"], child["name"]
            )
        })
        .collect();
    edges.sort();
    edges
}

#[test]
fn filters_are_seen_as_with_qemu() {
    for job in [stream(), commit(), active_commit()] {
        if let Some([ours, theirs]) = with_both(&job, |client| (seen(client), edges(client))) {
            assert_eq!(ours, theirs, "{job:?}");
        }
        let mut unnamed = job.clone();
        unnamed
            .1
            .as_object_mut()
            .unwrap()
            .remove("filter-node-name");
        if let Some([ours, theirs]) = with_both(&unnamed, seen) {
            assert_eq!(ours, theirs, "{unnamed:?}");
        }
    }
}

/// A layer that was written inside another one's options goes when it was committed, as all that it has is
/// in the base.
#[test]
fn layers_that_were_committed_are_closed() {
    let mut left = Vec::new();
    for program in [OURS, THEIRS] {
        let folder = images();
        let Some(_daemon) = Daemon::start(program, folder.path(), &[]) else {
            skip("qemu-storage-daemon is needed").unwrap();
            return;
        };
        let mut client = Daemon::connect(folder.path());
        let image = |name: &str, below: Value| {
            let file = json!({"driver": "file", "filename": format!("{name}.qcow2")});
            json!({"driver": "qcow2", "node-name": name, "file": file, "backing": below})
        };
        let chain = image("over", image("under", image("lowest", Value::Null)));
        client.get("blockdev-add", chain);
        let commit = json!({"device": "over", "top-node": "under", "job-id": "j"});
        client.get("block-commit", commit);
        client.event(|event| event["data"]["status"] == "null");
        let mut names = names(&mut client);
        names.retain(|name| !name.starts_with('#'));
        names.sort();
        left.push(names);
    }
    assert_eq!(left[0], left[1]);
}

fn names(client: &mut Client) -> Vec<String> {
    let nodes = client.get("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().unwrap().iter();
    let names = nodes.map(|node| node["node-name"].as_str().unwrap().to_owned());
    names.collect()
}

fn child(client: &mut Client, of: &str) -> Value {
    let nodes = client.get("query-named-block-nodes", json!({"flat": true}));
    let mut nodes = nodes.as_array().unwrap().iter();
    let node = nodes.find(|node| node["node-name"] == of).unwrap();
    let mut children = node["children"].as_array().unwrap().iter();
    let found = children.find(|child| child["child"] == "backing");
    found.map_or(Value::Null, |child| child["node-name"].clone())
}

fn end(client: &mut Client, verb: &str) {
    client.get(verb, json!({"id": "j"}));
    client.event(|event| event["data"]["status"] == "concluded");
}

/// Jobs end in every way; what was over the filter is over what the job has left then.
#[test]
fn a_filter_goes_with_its_job() {
    for (start, left) in [(stream(), "n4"), (commit(), "n4"), (active_commit(), "n5")] {
        let folder = images();
        let _daemon = Daemon::start(OURS, folder.path(), &[]).unwrap();
        let mut client = Daemon::connect(folder.path());
        begin(&mut client, &start);
        assert!(names(&mut client).contains(&"F".to_owned()));
        let over = json!({"driver": "copy-on-read", "node-name": "over", "file": "F"});
        if start.0 == "block-stream" {
            client.get("blockdev-add", over);
        }
        end(&mut client, "job-cancel");
        assert!(!names(&mut client).contains(&"F".to_owned()), "{start:?}");
        if start.0 == "block-stream" {
            client.get("blockdev-del", json!({"node-name": "over"}));
        }
        // The name is free.
        client.get(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "F"}),
        );
        let again = client.ask(start.0, {
            let mut arguments = start.1.clone();
            arguments["job-id"] = json!("j");
            arguments
        });
        let text = again["error"]["desc"].as_str().unwrap();
        assert!(
            text.contains("Duplicate nodes with node-name='F'"),
            "{text}"
        );
        client.get("blockdev-del", json!({"node-name": "F"}));
        // The refused one has left nothing.
        let mut arguments = start.1.clone();
        arguments["job-id"] = json!("j");
        arguments["auto-dismiss"] = json!(false);
        client.get(start.0, arguments);
        if left == "n5" {
            client.event(|event| event["event"] == "BLOCK_JOB_READY");
            client.get("job-complete", json!({"id": "j"}));
        }
        client.event(|event| event["data"]["status"] == "concluded");
        assert!(!names(&mut client).contains(&"F".to_owned()), "{start:?}");
        client.get("job-dismiss", json!({"id": "j"}));
    }
}

/// A job goes on in the next process under its name; a node that was put over its filter is over the node
/// under it, in the record as well.
#[test]
fn a_filter_comes_back_with_its_job() {
    let folder = images();
    let state = folder.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let start = |more: &[&str]| {
        let more = [&["--state", "state", "--state-name", "vm"], more].concat();
        let daemon = Daemon::start(OURS, folder.path(), &more).unwrap();
        (daemon, Daemon::connect(folder.path()))
    };
    let (daemon, mut client) = start(&[]);
    begin(&mut client, &stream());
    let over = json!({"driver": "qcow2", "node-name": "over", "backing": "F",
        "file": {"driver": "file", "filename": "over.qcow2"}});
    client.get("blockdev-add", over);
    assert_eq!(child(&mut client, "over"), "F");
    assert_eq!(child(&mut client, "n5"), "F");
    drop(daemon);
    let (daemon, mut client) = start(&[]);
    assert!(names(&mut client).contains(&"F".to_owned()));
    assert_eq!(child(&mut client, "over"), "F");
    assert_eq!(child(&mut client, "n5"), "F");
    drop(daemon);
    // The command line has given the name away meanwhile.
    let taken = json!({"driver": "null-co", "node-name": "F"}).to_string();
    let (daemon, mut client) = start(&["--blockdev", &taken]);
    let other = child(&mut client, "n5");
    assert!(other.as_str().unwrap().starts_with("#block"), "{other}");
    end(&mut client, "job-cancel");
    assert_eq!(child(&mut client, "over"), "n4");
    drop(daemon);
    // The job is gone, and its filter with it: what was over that needs it no longer.
    let (_daemon, mut client) = start(&[]);
    assert_eq!(child(&mut client, "over"), "n4");
}

/// Two jobs in one chain, which work at the same time, with no layer for both.
#[test]
fn jobs_beside_each_other_leave_what_they_leave_with_qemu() {
    let jobs = |device: &str, base: &str, more: Value| {
        let mut arguments = json!({"device": device, "base-node": base});
        let members = arguments.as_object_mut().unwrap();
        members.extend(more.as_object().unwrap().clone());
        arguments
    };
    let low_stream = ("block-stream", jobs("n2", "n0", json!({})));
    let pairs = [
        [
            ("block-stream", jobs("n4", "n2", json!({}))),
            ("block-commit", jobs("n5", "n0", json!({"top-node": "n1"}))),
        ],
        [
            ("block-stream", jobs("n4", "n2", json!({}))),
            low_stream.clone(),
        ],
        [
            low_stream.clone(),
            ("block-commit", jobs("n5", "n3", json!({}))),
        ],
        [
            low_stream,
            ("block-commit", jobs("n5", "n3", json!({"top-node": "n4"}))),
        ],
    ];
    for pair in &pairs {
        let mut left = Vec::new();
        for program in [OURS, THEIRS] {
            let folder = images();
            let Some(daemon) = Daemon::start(program, folder.path(), &[]) else {
                skip("qemu-storage-daemon is needed").unwrap();
                return;
            };
            let mut client = Daemon::connect(folder.path());
            left.push(run_both(&mut client, pair));
            client.get("quit", json!({}));
            let mut daemon = daemon;
            assert!(daemon.0.wait().unwrap().success());
            read(folder.path(), &pair[1]);
        }
        assert_eq!(left[0], left[1], "{pair:?}");
    }
}

/// Starts two jobs, the second while the first is at work, and has both end. What is under what then.
fn run_both(client: &mut Client, pair: &[Start; 2]) -> Vec<(String, Value)> {
    for (id, (command, arguments)) in ["one", "two"].into_iter().zip(pair) {
        let mut arguments = arguments.clone();
        arguments["job-id"] = json!(id);
        arguments["speed"] = json!(1);
        client.get(command, arguments);
    }
    for id in ["one", "two"] {
        client.get("block-job-set-speed", json!({"device": id, "speed": 0}));
    }
    let mut ended = 0;
    while ended < 2 {
        let event = client.event(|event| {
            event["event"] == "BLOCK_JOB_READY" || event["data"]["status"] == "null"
        });
        match event["event"] == "BLOCK_JOB_READY" {
            true => drop(client.get("job-complete", json!({"id": event["data"]["device"]}))),
            false => ended += 1,
        }
    }
    let nodes = client.get("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().unwrap().iter();
    let links = nodes.filter(|node| node["drv"] == "qcow2").map(|node| {
        let name = node["node-name"].as_str().unwrap().to_owned();
        (name, node["backing_file"].clone())
    });
    let mut links: Vec<_> = links.collect();
    links.sort_by(|one, other| one.0.cmp(&other.0));
    links
}

/// Reads the disk as its guest has it after the second job: all that the images were made with is there.
fn read(folder: &Path, (command, arguments): &Start) {
    let is_active = *command == "block-commit" && arguments.get("top-node").is_none();
    let top = if is_active { "n3" } else { "n5" };
    let mut command = Command::new("qemu-io");
    command.current_dir(folder).args(["-r", "-f", "qcow2"]);
    command.args(["-c", "read -P 0xcd 0 12M", "-c", "read -P 0 12M 4M"]);
    let output = command.arg(format!("{top}.qcow2")).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && !text.contains("failed"),
        "{text}"
    );
}
