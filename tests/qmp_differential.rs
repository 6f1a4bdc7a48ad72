//! The same bytes to us and to qemu-storage-daemon: the answers must be the same.
//!
//! Skipped, with a word about it, where qemu-storage-daemon or qemu-img is not installed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod qmp_support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qmp_support::skips::skip;
use qmp_support::{Bench, Client};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A qemu-storage-daemon with the chain that [`qmp_support::FakeDaemon`] pretends to have.
struct Qsd {
    child: Child,
    directory: TempDir,
}

impl Qsd {
    fn start() -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let mut daemon = Command::new("qemu-storage-daemon");
        daemon.current_dir(directory.path()).stderr(Stdio::null());
        daemon.args(["--chardev", "socket,id=c,path=qmp.sock,server=on,wait=off"]);
        daemon.args(["--monitor", "chardev=c"]);
        let mut below: Option<&str> = None;
        for name in ["base", "low", "mid", "top"] {
            create_image(directory.path(), name, below)?;
            let mut node = json!({
                "driver": "qcow2",
                "node-name": name,
                "file": {"driver": "file", "filename": format!("{name}.qcow2")},
            });
            if let Some(below) = below {
                node["backing"] = json!(below);
            }
            daemon.args(["--blockdev", &node.to_string()]);
            below = Some(name);
        }
        let child = daemon.spawn().ok()?;
        Some(Self { child, directory })
    }

    fn connect(&self) -> Client {
        let path = self.directory.path().join("qmp.sock");
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(&path).is_err() {
            assert!(
                Instant::now() < deadline,
                "qemu-storage-daemon does not come up"
            );
            std::thread::yield_now();
        }
        // It serves one client at a time, and the look above was one: it is gone by now.
        let mut client = Client::connect(&path);
        client.get("qmp_capabilities", json!({}));
        client
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn create_image(directory: &Path, name: &str, below: Option<&str>) -> Option<()> {
    let mut command = Command::new("qemu-img");
    command
        .current_dir(directory)
        .args(["create", "-q", "-f", "qcow2"]);
    if let Some(below) = below {
        command.args(["-F", "qcow2", "-b", &format!("{below}.qcow2")]);
    }
    let created = command
        .args([&format!("{name}.qcow2"), "4M"])
        .status()
        .ok()?;
    created.success().then_some(())
}

/// All answers to `bytes`, up to the one to a command that marks the end.
fn answers(client: &mut Client, bytes: &[u8]) -> Vec<Value> {
    client.send(bytes);
    // The line's end first: it brings a lexer that is lost back to its senses.
    client.send(b"\n{\"execute\":\"query-jobs\",\"id\":\"the end\"}");
    let mut answers = Vec::new();
    loop {
        let answer = client.answer();
        if answer.get("id") == Some(&json!("the end")) {
            return answers;
        }
        answers.push(answer);
    }
}

fn compare(requests: &[&[u8]]) {
    let Some(qsd) = Qsd::start() else {
        skip("qemu-storage-daemon and qemu-img are needed").unwrap();
        return;
    };
    let mut theirs = qsd.connect();
    let bench = Bench::new();
    let mut ours = bench.client();
    for request in requests {
        let wanted = answers(&mut theirs, request);
        let got = answers(&mut ours, request);
        assert_eq!(got, wanted, "to {}", String::from_utf8_lossy(request));
    }
}

/// Would catch any difference in what is taken for a value, and in what is said about the rest.
#[test]
fn broken_json() {
    compare(&[
        b"{1:2}",
        b"{\"a\" 1}",
        b"{\"a\"}",
        b"{\"a\":1 \"b\":2}",
        b"{\"a\":1,}",
        b"{,}",
        b"{\"a\":}",
        b"{a:1}",
        b"{null:1}",
        b"[1 2]",
        b"[1,]",
        b"[,]",
        b"[1,}",
        b"]]",
        b"}",
        b":",
        b"{\"a\":1:2}",
        b"{]",
        b"[tru]",
        b"truefalse ",
        b"nul",
        b"1 2 3 \"a\" null",
        b"[01]",
        b"[-]",
        b"[1.]",
        b"[1e]",
        b"[.5]",
        b"[+1]",
        b"[TRUE]",
        b"[1.5e400]",
        b"[\"\\q\"]",
        b"{\"\\q\":1}",
        b"[\"\\u12\"]",
        b"[\"\\ud800\"]",
        b"[\"\\udc00\"]",
        b"[\"\\u0000\"]",
        b"[\"\\ud83d\\u0041\"]",
        b"[\"\xc0\x80\"]",
        b"[\"\xed\xa0\x80\"]",
        b"[\"\xe2\x82\"]",
        b"[\"a\tb\"]",
        b"\"abc",
        b"%d",
        b"[\"%d\"]",
        b"{\"execute\":query-version}",
        b"{\"exec\x00ute\":\"x\"}",
        b"{\"a\":@#$ \"b\":1}",
        b"/* */",
        b"\x01\x02",
        b"{\"execute\":\"query-jobs\",\"id\":1,\"id\":2}",
        b"{\"execute\":\"query-jobs\" \"id\"}",
    ]);
}

/// Would catch any difference in how requests are taken apart.
#[test]
fn requests() {
    compare(&[
        b"{}",
        b"[]",
        b"\"x\"",
        b"{\"foo\":1}",
        b"{\"foo\":1,\"id\":7}",
        b"{\"execute\":1}",
        b"{\"arguments\":{}}",
        b"{\"execute\":\"nope\"}",
        b"{\"execute\":\"nope\",\"id\":null}",
        b"{\"execute\":\"nope\",\"foo\":1}",
        b"{\"execute\":\"query-jobs\",\"arguments\":[]}",
        b"{\"execute\":\"query-jobs\",\"arguments\":null}",
        b"{\"execute\":\"query-jobs\",\"arguments\":{\"a\":1}}",
        b"{\"exec-oob\":\"query-jobs\"}",
        b"{\"execute\":\"qmp_capabilities\"}",
        b"{'execute':'nope','id':'it\\'s \"x\"'}",
        b"{\"execute\":\"query-jobs\",\"id\":[1,-2,18446744073709551615,0.5,{\"a\":[null,true]}]}",
        b"{\"execute\":\"\\\"\\'\\/\\b\\f\\n\\r\\t\\u00e9\\ud83d\\ude00\"}",
        b"{\"execute\":\"query-block-jobs\"}{\"execute\":\"query-block\",\"arguments\":{\"x\":{}}}",
    ]);
}

/// Would catch any difference in what job commands say about their arguments.
#[test]
fn job_commands() {
    let stream = |arguments: Value| {
        json!({"execute": "block-stream", "arguments": arguments})
            .to_string()
            .into_bytes()
    };
    let mut requests: Vec<Vec<u8>> = [
        json!({}),
        json!({"device": 1}),
        json!({"device": "x"}),
        json!({"device": "x", "speed": "1"}),
        json!({"device": "x", "speed": 1.5}),
        json!({"device": "x", "speed": 2.0}),
        json!({"device": "x", "speed": u64::MAX}),
        json!({"device": "x", "on-error": "boo"}),
        json!({"device": "x", "on-error": 3}),
        json!({"device": "x", "auto-finalize": 3}),
        json!({"device": "x", "base": "a", "base-node": "b"}),
        json!({"device": "mid"}),
        json!({"device": "mid", "job-id": ""}),
        json!({"device": "mid", "job-id": "1 x"}),
        json!({"device": "mid", "job-id": "j", "zz": 1}),
        json!({"device": "mid", "job-id": "j", "base": "a", "base-node": "b"}),
        json!({"device": "mid", "job-id": "j", "base": "a", "bottom": "b"}),
        json!({"device": "mid", "job-id": "j", "base-node": "a", "bottom": "b"}),
        json!({"device": "mid", "job-id": "j", "base": "a"}),
        json!({"device": "mid", "job-id": "j", "base-node": "a"}),
        json!({"device": "mid", "job-id": "j", "base-node": "mid"}),
        json!({"device": "mid", "job-id": "j", "base-node": "top"}),
        json!({"device": "mid", "job-id": "j", "bottom": "a"}),
        json!({"device": "mid", "job-id": "j", "bottom": "top"}),
        json!({"device": "mid", "job-id": "j", "backing-file": "a"}),
        json!({"device": "mid", "job-id": "j", "filter-node-name": "base"}),
        json!({"device": "mid", "job-id": "j", "filter-node-name": "1 2"}),
    ]
    .map(stream)
    .into();
    for command in [
        "cancel",
        "pause",
        "resume",
        "complete",
        "finalize",
        "dismiss",
        "set-speed",
    ] {
        for arguments in [
            json!({}),
            json!({"device": "j"}),
            json!({"id": "j"}),
            json!({"device": "j", "speed": 1}),
            json!({"device": "j", "force": 1}),
        ] {
            for family in ["block-job", "job"] {
                let command = format!("{family}-{command}");
                let request = json!({"execute": command, "arguments": arguments});
                requests.push(request.to_string().into_bytes());
            }
        }
    }
    let requests: Vec<&[u8]> = requests.iter().map(Vec::as_slice).collect();
    compare(&requests);
}

/// Would catch a job whose events, in their order and with their members, are not those of QEMU.
#[test]
fn the_life_of_a_job() {
    let Some(qsd) = Qsd::start() else {
        skip("qemu-storage-daemon and qemu-img are needed").unwrap();
        return;
    };
    let bench = Bench::new();
    let mut lives = Vec::new();
    for mut client in [qsd.connect(), bench.client()] {
        let mut life = Vec::new();
        // Each has something to do: QEMU gives a job with nothing to do a length of 0.
        let mut run = |arguments: Value, verbs: &[(&str, &str)]| {
            client.get("block-stream", arguments);
            for (after, verb) in verbs {
                loop {
                    // One event is our own.
                    let mut event = client.event(|event| event["event"] != "JOB_COPIED");
                    event.as_object_mut().unwrap().remove("timestamp");
                    let found = event["event"] == **after || event["data"]["status"] == **after;
                    life.push(event);
                    if found {
                        break;
                    }
                }
                if !verb.is_empty() {
                    client.get(verb, json!({"id": "j"}));
                }
            }
        };
        run(json!({"device": "low", "job-id": "j"}), &[("null", "")]);
        run(
            json!({"device": "mid", "job-id": "j", "auto-finalize": false, "auto-dismiss": false}),
            &[
                ("BLOCK_JOB_PENDING", "job-finalize"),
                ("concluded", "job-dismiss"),
                ("null", ""),
            ],
        );
        run(
            json!({"device": "top", "job-id": "j", "auto-finalize": false}),
            &[("BLOCK_JOB_PENDING", "job-cancel"), ("null", "")],
        );
        lives.push(life);
    }
    assert_eq!(lives[1], lives[0]);
}

/// Would catch a snapshot that is refused in other words, at another argument, or not at all.
#[test]
fn snapshots_that_are_refused() {
    let mut requests: Vec<Vec<u8>> = Vec::new();
    let mut ask = |command: &str, arguments: Value| {
        let request = json!({"execute": command, "arguments": arguments});
        requests.push(request.to_string().into_bytes());
    };
    let (snapshot, sync) = ("blockdev-snapshot", "blockdev-snapshot-sync");
    for (node, overlay) in [
        ("nobody", "top"),
        ("top", "nobody"),
        ("top", "mid"),
        ("mid", "top"),
    ] {
        ask(snapshot, json!({"node": node, "overlay": overlay}));
    }
    ask(snapshot, json!({"node": "top"}));
    ask(snapshot, json!({"node": 5, "overlay": "top"}));
    ask(snapshot, json!({"node": "top", "overlay": "mid", "x": 1}));
    for arguments in [
        json!({"snapshot-file": "/nowhere/s"}),
        json!({"node-name": "nobody", "snapshot-file": "/nowhere/s"}),
        json!({"device": "nobody", "snapshot-file": "/nowhere/s"}),
        json!({"node-name": "top", "snapshot-file": "/nowhere/s"}),
        json!({"node-name": "mid", "snapshot-file": "/nowhere/s", "snapshot-node-name": "s"}),
        json!({"node-name": "top", "snapshot-file": "/nowhere/s", "snapshot-node-name": "low"}),
        json!({"node-name": "top", "snapshot-file": "/nowhere/s", "snapshot-node-name": "s"}),
        json!({"node-name": "top", "snapshot-file": "/nowhere/s", "snapshot-node-name": "s",
            "format": "raw"}),
        json!({"node-name": "top", "snapshot-file": "/nowhere/s", "snapshot-node-name": "s",
            "format": "other"}),
        json!({"node-name": "top", "snapshot-file": "/nowhere/s", "snapshot-node-name": "s",
            "mode": "existing"}),
        json!({"node-name": "top", "snapshot-file": "/nowhere/s", "mode": "other"}),
        json!({"node-name": "top"}),
    ] {
        ask(sync, arguments);
    }
    let abort = json!({"type": "abort", "data": {}});
    for actions in [
        json!([]),
        json!(5),
        json!([5]),
        json!([abort]),
        json!([abort, {"type": "other", "data": {}}]),
        json!([{"data": {}}]),
        json!([{"type": "abort"}]),
        json!([{"type": "abort", "data": {}, "y": 1}]),
        json!([{"type": "abort", "data": {"z": 1}}]),
        json!([{"type": snapshot, "data": {"node": "top"}}]),
        json!([{"type": snapshot, "data": {"node": "top", "overlay": 3}}]),
        json!([{"type": snapshot, "data": {"node": "top", "overlay": "mid", "x": 1}}]),
        json!([{"type": snapshot, "data": {"node": "nobody", "overlay": "mid"}}, abort]),
        json!([{"type": sync, "data": {"node-name": "top"}}]),
    ] {
        ask("transaction", json!({"actions": actions}));
    }
    ask("transaction", json!({}));
    for mode in ["other", "grouped"] {
        let properties = json!({"completion-mode": mode});
        ask(
            "transaction",
            json!({"actions": [abort], "properties": properties}),
        );
    }
    let requests: Vec<&[u8]> = requests.iter().map(Vec::as_slice).collect();
    compare(&requests);
}
