//! The control protocol over a real socket, with a daemon of names behind it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod qmp_support;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use qmp_support::{Bench, Client, FakeDaemon, MIB};
use serde_json::{Value, json};
use stratablk::control::{Control, Endpoint, Limits, Server};
use stratablk::job::Event;

fn generic(text: &str) -> (String, String) {
    ("GenericError".to_owned(), text.to_owned())
}

/// Would catch a greeting that `qemu.qmp` refuses, and commands that work before negotiation.
#[test]
fn negotiation() {
    let bench = Bench::new();
    let mut client = Client::connect(&bench.path);
    let version = &client.greeting["QMP"]["version"];
    assert!(version["qemu"]["major"].is_u64() && version["qemu"]["micro"].is_u64());
    assert!(
        version["package"]
            .as_str()
            .unwrap()
            .starts_with("stratablk-")
    );
    assert_eq!(client.greeting["QMP"]["capabilities"], json!([]));
    for command in ["query-version", "nope"] {
        let (class, desc) = client.fail(command, json!({}));
        assert_eq!(class, "CommandNotFound");
        assert_eq!(
            desc,
            "Expecting capabilities negotiation with 'qmp_capabilities'"
        );
    }
    let refused = client.fail("qmp_capabilities", json!({"enable": ["warp"]}));
    assert_eq!(
        refused,
        generic("Parameter 'null' does not accept value 'warp'")
    );
    let refused = client.fail("qmp_capabilities", json!({"enable": ["oob"]}));
    assert_eq!(refused, generic("Capability oob not available"));
    client.get("qmp_capabilities", json!({"enable": []}));
    let (class, desc) = client.fail("qmp_capabilities", json!({}));
    assert_eq!(class, "CommandNotFound");
    assert_eq!(
        desc,
        "Capabilities negotiation is already complete, command ignored"
    );
}

/// Would catch an `id` that is lost or changed, in answers and in errors.
#[test]
fn ids_come_back() {
    let bench = Bench::new();
    let mut client = bench.client();
    for id in [
        json!(1),
        json!("x"),
        json!(null),
        json!([1, {"a": [null, 2.5]}]),
        json!({}),
    ] {
        for command in ["query-jobs", "nope"] {
            client.send(json!({"execute": command, "id": id}).to_string().as_bytes());
            assert_eq!(client.answer().get("id"), Some(&id));
        }
    }
    client.send(b"{\"execute\":\"query-jobs\"}");
    assert!(client.answer().get("id").is_none());
}

/// Would catch a server that takes a packet for a command.
#[test]
fn packets_mean_nothing() {
    let bench = Bench::new();
    let mut client = bench.client();
    client.send(b"{'execute':'query-jobs','id':1}{\"execute\":\"query-jobs\",\"id\":2} {\"exec");
    assert_eq!(client.answer()["id"], 1);
    assert_eq!(client.answer()["id"], 2);
    client.send(b"ute\":\"query-jobs\",\"id\":");
    client.send(b"3}");
    assert_eq!(client.answer()["id"], 3);
}

/// Would catch a session that ends, or gets out of step, because of nonsense.
#[test]
fn nonsense_is_answered_and_survived() {
    let bench = Bench::new();
    let mut client = bench.client();
    let deep = vec![b'['; 5000];
    for nonsense in [
        &b"{]\n"[..],
        b"\xff\n",
        b"{\"a\":nul}",
        b"{\"execute\":1}",
        b"[]",
        &deep,
    ] {
        client.send(nonsense);
        client.send(b"\n");
        assert!(client.answer().get("error").is_some());
        assert_eq!(client.get("query-jobs", json!({})), json!([]));
    }
}

/// Would catch a decoder that grows with its input, or gives up the session at the limit.
#[test]
fn an_oversized_value_is_answered_and_survived() {
    let bench = Bench::new();
    let mut client = bench.client();
    client.send(b"{\"execute\":\"");
    let block = vec![b'x'; 1 << 20];
    for _ in 0..65 {
        client.send(&block);
    }
    client.send(b"\"}");
    assert_eq!(
        client.answer()["error"]["desc"],
        "JSON token size limit exceeded"
    );
    assert_eq!(client.get("query-jobs", json!({})), json!([]));
}

/// Would catch a second client that has to wait for the first, or gets none of the events.
#[test]
fn several_clients_at_once() {
    let bench = Bench::new();
    let mut silent = Client::connect(&bench.path);
    let mut clients: Vec<_> = (0..5).map(|_| bench.client()).collect();
    clients[3].get("block-stream", json!({"device": "e0"}));
    for client in &mut clients {
        client.status("e0", "null");
        assert_eq!(client.get("query-jobs", json!({})), json!([]));
    }
    // Who has not negotiated gets no events: the first line is the answer.
    silent.send(b"{'execute':'qmp_capabilities'}");
    assert_eq!(silent.line(), Some(json!({"return": {}})));
}

/// Would catch an event that is lost to a client that has just been told that it is in.
#[test]
fn events_come_from_the_answer_on() {
    let bench = Bench::new();
    for number in 0..50 {
        let mut client = bench.client();
        let data = json!({"number": number});
        bench.hub.send(&Event {
            name: "TEST",
            data: data.clone(),
        });
        assert_eq!(client.named("TEST"), data);
    }
}

/// Would catch events without a usable time, and members missing from them.
#[test]
fn a_whole_stream() {
    let bench = Bench::new();
    let mut client = bench.client();
    client.get("block-stream", json!({"device": "top", "speed": 100 * MIB}));
    let created = client.event(|_| true);
    assert_eq!(created["data"], json!({"status": "created", "id": "e0"}));
    let seconds = created["timestamp"]["seconds"].as_u64().unwrap();
    assert!(seconds > 1_600_000_000 && created["timestamp"]["microseconds"].is_u64());
    let done = client.named("BLOCK_JOB_COMPLETED");
    assert_eq!(
        done,
        json!({"device": "e0", "len": 4 * MIB, "offset": 4 * MIB, "speed": 100 * MIB,
               "type": "stream"})
    );
    client.status("e0", "null");
    let (spec, backing) = bench.daemon.finished.lock().unwrap().pop().unwrap();
    assert_eq!(
        (spec.target.as_str(), spec.base, backing),
        ("top", None, None)
    );
    assert_eq!(spec.layers, ["top", "mid", "low", "base"]);
}

/// Would catch layers that are left out of a partial stream, or are in it and should not be.
#[test]
fn partial_streams_stop_where_they_should() {
    let bench = Bench::new();
    let mut client = bench.client();
    for (arguments, base, layers, backing) in [
        (json!({"base": "low.qcow2"}), "low", 2, None),
        (json!({"base-node": "low"}), "low", 2, None),
        (json!({"bottom": "mid"}), "low", 2, None),
        (
            json!({"bottom": "low", "backing-file": "/b"}),
            "base",
            3,
            Some("/b"),
        ),
    ] {
        let mut arguments = arguments;
        arguments["device"] = json!("e0");
        client.get("block-stream", arguments);
        client.status("e0", "null");
        let (spec, written) = bench.daemon.finished.lock().unwrap().pop().unwrap();
        assert_eq!(spec.base.as_deref(), Some(base));
        assert_eq!(spec.layers.len(), layers);
        assert_eq!(written.as_deref(), backing);
    }
}

/// Would catch any error text of the contract that is not word for word as tools expect it.
#[test]
fn block_stream_refuses_in_the_words_of_qemu() {
    let bench = Bench::new();
    let mut client = bench.client();
    for (arguments, desc) in [
        (
            json!({"device": "x"}),
            "Cannot find device='x' nor node-name='x'",
        ),
        (json!({}), "Parameter 'device' is missing"),
        (
            json!({"device": 1}),
            "Invalid parameter type for 'device', expected: string",
        ),
        (
            json!({"device": "x", "speed": 1.5}),
            "Invalid parameter type for 'speed', expected: integer",
        ),
        (
            json!({"device": "x", "zz": 1}),
            "Parameter 'zz' is unexpected",
        ),
        (
            json!({"device": "x", "on-error": "boo"}),
            "Parameter 'on-error' does not accept value 'boo'",
        ),
        (
            json!({"device": "top", "base": "a", "base-node": "b"}),
            "'base' and 'base-node' cannot be specified at the same time",
        ),
        (
            json!({"device": "top", "base": "a"}),
            "Can't find 'a' in the backing chain",
        ),
        (
            json!({"device": "top", "base": "top.qcow2"}),
            "Can't find 'top.qcow2' in the backing chain",
        ),
        (
            json!({"device": "top", "base-node": "a"}),
            "Cannot find device='' nor node-name='a'",
        ),
        (
            json!({"device": "top", "base-node": "solo"}),
            "Node 'solo' is not a backing image of 'top'",
        ),
        (
            json!({"device": "mid", "bottom": "top"}),
            "Node 'top' is not in a chain starting from 'mid'",
        ),
        (
            json!({"device": "top", "backing-file": "a"}),
            "backing file specified, but streaming the entire chain",
        ),
        (
            json!({"device": "top", "speed": -1}),
            "Parameter 'speed' expects a non-negative value",
        ),
        (json!({"device": "mid"}), "Invalid job ID ''"),
        (
            json!({"device": "top", "job-id": "1 x"}),
            "Invalid job ID '1 x'",
        ),
        (
            json!({"device": "solo", "job-id": "j"}),
            "Block node is read-only",
        ),
        (
            json!({"device": "top", "filter-node-name": "mid"}),
            "Could not create node: Duplicate nodes with node-name='mid'",
        ),
    ] {
        assert_eq!(
            client.fail("block-stream", arguments.clone()),
            generic(desc),
            "{arguments}"
        );
    }
    assert_eq!(
        client.get("query-jobs", json!({})),
        json!([]),
        "nothing was left behind"
    );
    client.get("block-stream", json!({"device": "e0"}));
    client.status("e0", "null");
}

/// Would catch jobs that meet in a layer, and a refusal of jobs that do not.
#[test]
fn layers_belong_to_one_job() {
    let bench = Bench::new();
    let mut client = bench.client();
    bench.daemon.shut_gate();
    client.get("block-stream", json!({"device": "e0", "base-node": "low"}));
    let busy = |node: &str| {
        generic(&format!(
            "Node '{node}' is busy: block device is in use by block job: stream"
        ))
    };
    assert_eq!(
        client.fail("block-stream", json!({"device": "e0"})),
        busy("e0")
    );
    assert_eq!(
        client.fail("block-stream", json!({"device": "top"})),
        busy("top")
    );
    let middle = json!({"device": "mid", "job-id": "m"});
    assert_eq!(client.fail("block-stream", middle), busy("mid"));
    client.get("block-stream", json!({"device": "low", "job-id": "l"}));
    let jobs = client.get("query-block-jobs", json!({}));
    assert_eq!(jobs.as_array().unwrap().len(), 2);
    bench.daemon.open_gate();
    client.status("e0", "null");
}

/// Would catch verbs on jobs that are not there answered in the wrong class or words.
#[test]
fn unknown_jobs() {
    let bench = Bench::new();
    let mut client = bench.client();
    let inactive = (
        "DeviceNotActive".to_owned(),
        "Block job 'j' not found".to_owned(),
    );
    for command in ["cancel", "pause", "resume", "complete"] {
        let command = format!("block-job-{command}");
        assert_eq!(client.fail(&command, json!({"device": "j"})), inactive);
    }
    for command in ["finalize", "dismiss"] {
        assert_eq!(
            client.fail(&format!("block-job-{command}"), json!({"id": "j"})),
            inactive
        );
    }
    let speed = json!({"device": "j", "speed": 1});
    assert_eq!(client.fail("block-job-set-speed", speed), inactive);
    for command in [
        "pause", "resume", "cancel", "complete", "finalize", "dismiss",
    ] {
        let refused = client.fail(&format!("job-{command}"), json!({"id": "j"}));
        assert_eq!(refused, generic("Job not found"));
    }
}

/// Would catch a query that lacks members or shows an old speed, by either family of names.
#[test]
fn speed_pause_and_cancel() {
    let bench = Bench::new();
    let mut client = bench.client();
    let slow = json!({"device": "e0", "auto-dismiss": false, "speed": 1});
    client.get("block_stream", slow);
    client.get(
        "block_job_set_speed",
        json!({"device": "e0", "value": 65536}),
    );
    let refused = client.fail("block_job_set_speed", json!({"device": "e0", "value": -1}));
    assert_eq!(
        refused,
        generic("Parameter 'speed' expects a non-negative value")
    );
    let mut job = client.get("query-block-jobs", json!({}))[0].take();
    assert!(job["busy"].is_boolean());
    assert!(job["to-copy"].is_u64() && job["to-copy-final"].is_boolean());
    for changing in ["busy", "to-copy", "to-copy-final"] {
        job[changing] = Value::Null;
    }
    assert_eq!(
        job,
        json!({"auto-finalize": true, "io-status": "ok", "device": "e0", "auto-dismiss": false,
               "busy": null, "len": 4 * MIB, "offset": 0, "status": "running", "paused": false,
               "speed": 65536, "ready": false, "type": "stream", "copied": 0, "to-copy": null,
               "to-copy-final": null})
    );
    client.get("job-pause", json!({"id": "e0"}));
    assert_eq!(client.get("query-block-jobs", json!({}))[0]["paused"], true);
    client.status("e0", "paused");
    client.get("block-job-set-speed", json!({"device": "e0", "speed": 1}));
    client.get("block-job-resume", json!({"device": "e0"}));
    client.get("block_job_cancel", json!({"device": "e0"}));
    let cancelled = client.named("BLOCK_JOB_CANCELLED");
    assert_eq!(
        (&cancelled["speed"], &cancelled["type"]),
        (&json!(1), &json!("stream"))
    );
    client.status("e0", "concluded");
    let jobs = client.get("query-jobs", json!({}));
    assert_eq!(
        (&jobs[0]["status"], &jobs[0]["id"]),
        (&json!("concluded"), &json!("e0"))
    );
    client.get("job-dismiss", json!({"id": "e0"}));
    assert_eq!(client.get("query-jobs", json!({})), json!([]));
    assert!(bench.daemon.finished.lock().unwrap().is_empty());
}

/// Would catch a client that learns of an end and then finds the job, or its layers, still there.
#[test]
fn an_end_that_was_told_is_an_end() {
    let bench = Bench::new();
    let mut client = bench.client();
    for _ in 0..100 {
        client.get("block-stream", json!({"device": "e0"}));
        client.named("BLOCK_JOB_COMPLETED");
        assert_eq!(client.get("query-jobs", json!({})), json!([]));
    }
}

/// Would catch an error of a job that does not reach its clients.
#[test]
fn job_errors_are_told() {
    let bench = Bench::new();
    let mut client = bench.client();
    bench.daemon.faults.lock().unwrap().push(libc::EIO);
    client.get(
        "block-stream",
        json!({"device": "e0", "on-error": "stop", "speed": 100 * MIB}),
    );
    let error = client.named("BLOCK_JOB_ERROR");
    assert_eq!(
        error,
        json!({"device": "e0", "operation": "read", "action": "stop"})
    );
    client.status("e0", "paused");
    assert_eq!(
        client.get("query-block-jobs", json!({}))[0]["io-status"],
        "failed"
    );
    client.get("block-job-resume", json!({"device": "e0"}));
    let done = client.named("BLOCK_JOB_COMPLETED");
    assert_eq!(
        (done["offset"].as_u64(), done.get("error")),
        (Some(4 * MIB), None)
    );
}

/// Would catch a queue that grows for a client that does not read, and events that stop for the
/// others because of it.
#[test]
fn a_client_that_does_not_read_is_cut_off() {
    let bench = Bench::new();
    let mut deaf = bench.client();
    let mut client = bench.client();
    let padding = "x".repeat(1 << 20);
    for number in 0..12 {
        let data = json!({"number": number, "padding": padding});
        bench.hub.send(&Event { name: "TEST", data });
        let seen = client.event(|event| event["data"]["number"] == number);
        assert_eq!(seen["event"], "TEST");
    }
    // What its socket held is all that it gets.
    let mut rest = Vec::new();
    let _ = deaf.stream.read_to_end(&mut rest);
    assert!(rest.len() < 12 << 20, "{} bytes", rest.len());
    assert_eq!(client.get("query-jobs", json!({})), json!([]));
}

/// Would catch answers that pile up for a client that asks and does not read.
#[test]
fn a_client_that_only_asks_waits() {
    let bench = Bench::new();
    let mut greedy = bench.client();
    let asking = greedy.stream.try_clone().unwrap();
    let asker = std::thread::spawn(move || {
        let request = b"{'execute':'query-qmp-schema'}";
        let mut asking = asking;
        for _ in 0..2000 {
            if std::io::Write::write_all(&mut asking, request).is_err() {
                return;
            }
        }
        let _ = asking.shutdown(Shutdown::Write);
    });
    let mut other = bench.client();
    assert_eq!(other.get("query-jobs", json!({})), json!([]));
    let mut answers = 0;
    while greedy.line().is_some() {
        answers += 1;
    }
    assert_eq!(answers, 2000, "asked and read to the end, nothing is lost");
    asker.join().unwrap();
}

/// Would catch texts of the human monitor that scripts no longer recognise.
#[test]
fn the_human_monitor() {
    let bench = Bench::new();
    let mut client = bench.client();
    assert_eq!(client.human("info block-jobs"), "No active jobs\r\n");
    assert_eq!(client.human(""), "");
    assert_eq!(client.human("boo"), "unknown command: 'boo'\r\n");
    assert_eq!(client.human("info boo"), "unknown command: 'info boo'\r\n");
    assert_eq!(
        client.human("block_stream"),
        "block_stream: block device name expected\r\n\
         Try \"help block_stream\" for more information\r\n"
    );
    assert_eq!(
        client.human("block_stream nope"),
        "Error: Cannot find device='nope' nor node-name='nope'\r\n"
    );
    bench.daemon.shut_gate();
    assert_eq!(client.human("block_stream e0 64k base.qcow2"), "");
    assert_eq!(
        client.human(" info  block-jobs "),
        "Streaming device e0: Completed 0 of 4194304 bytes, speed limit 65536 bytes/s\r\n"
    );
    for (size, bytes) in [
        ("1", MIB),
        ("1.5", 3 * MIB / 2),
        ("2b", 2),
        ("3K", 3072),
        ("0", 0),
    ] {
        assert_eq!(client.human(&format!("block_job_set_speed e0 {size}")), "");
        assert_eq!(client.get("query-block-jobs", json!({}))[0]["speed"], bytes);
    }
    let bad = "invalid size\r\nTry \"help block_job_set_speed\" for more information\r\n";
    for size in ["", "-1", "x", "99999999999999999999", "8E"] {
        assert_eq!(client.human(&format!("block_job_set_speed e0 {size}")), bad);
    }
    assert_eq!(client.human("block_job_pause e0"), "");
    assert_eq!(
        client.human("block_job_cancel e0"),
        "Error: The block job for device 'e0' is currently paused\r\n"
    );
    assert_eq!(client.human("block_job_cancel -f e0"), "");
    bench.daemon.open_gate();
    client.status("e0", "null");
    assert_eq!(
        client.human("block_job_cancel e0"),
        "Error: Block job 'e0' not found\r\n"
    );
    assert_eq!(
        client.human("info block e0"),
        "e0 (top): top.qcow2 (qcow2)\r\n    Cache mode:       writeback\r\n    \
         Backing file:     mid.qcow2 (chain depth: 3)\r\n"
    );
    assert_eq!(client.human("info block zz"), "");
    assert!(
        client
            .human("help")
            .contains("block_job_set_speed device speed -- ")
    );
    assert_eq!(client.human("quit"), "");
    while !bench.daemon.quit.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
}

/// Would catch a word that is taken for another device's, or for done when there was nothing to do.
#[test]
fn a_sync_error_is_cleared_by_the_name_of_a_device() {
    let bench = Bench::new();
    let mut client = bench.client();
    bench.daemon.fail_flush("low", libc::EIO);
    client.get("x-clear-sync-error", json!({"device": "e0"}));
    let refused = client.fail("x-clear-sync-error", json!({"device": "mid"}));
    assert_eq!(refused, generic("No flush of node 'mid' has failed"));
    let refused = client.fail("x-clear-sync-error", json!({}));
    assert_eq!(refused, generic("Parameter 'device' is missing"));
}

/// Would catch a failed flush that does not show where QEMU's users look for it, one of many that
/// makes it a lack of space, and a device that stays failed.
#[test]
fn a_sync_error_shows() {
    let bench = Bench::new();
    let mut client = bench.client();
    let device = client.get("query-block", json!({}))[0].take();
    assert_eq!(device["io-status"], "ok");
    assert_eq!(device.get("x-sync-errors"), None);
    assert!(!client.human("info block").contains("I/O status"));

    let mid = bench.daemon.fail_flush("mid", libc::ENOSPC);
    let device = client.get("query-block", json!({}))[0].take();
    assert_eq!(device["io-status"], "nospace");
    let low = bench.daemon.fail_flush("low", libc::EIO);
    let device = client.get("query-block", json!({}))[0].take();
    assert_eq!(device["io-status"], "failed");
    let wanted = json!([
        {"node-name": "mid", "filename": "memory", "desc": mid},
        {"node-name": "low", "filename": "memory", "desc": low},
    ]);
    assert_eq!(device["x-sync-errors"], wanted);
    let text = client.human("info block");
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    let wanted = ["I/O status:       failed", mid.as_str(), low.as_str()];
    assert!(lines.ends_with(&wanted), "{text}");
}

/// Would catch a command that is not listed, and a schema that refers to what it does not define.
#[test]
fn commands_and_schema_agree() {
    let bench = Bench::new();
    let mut client = bench.client();
    let commands = client.get("query-commands", json!({}));
    let schema = client.get("query-qmp-schema", json!({}));
    let defined = |name: &Value| {
        schema
            .as_array()
            .unwrap()
            .iter()
            .any(|e| &e["name"] == name)
    };
    for command in commands.as_array().unwrap() {
        assert!(defined(&command["name"]), "{command}");
    }
    for wanted in [
        "block-stream",
        "block_stream",
        "query-block-jobs",
        "job-dismiss",
        "x-clear-sync-error",
        "quit",
    ] {
        assert!(
            commands
                .as_array()
                .unwrap()
                .contains(&json!({"name": wanted})),
            "{wanted}"
        );
    }
    for entry in schema.as_array().unwrap() {
        for reference in ["arg-type", "ret-type", "element-type"] {
            assert!(entry.get(reference).is_none_or(defined), "{entry}");
        }
        for member in entry["members"].as_array().into_iter().flatten() {
            assert!(member.get("type").is_none_or(defined), "{entry}");
        }
    }
}

/// Would catch queries that lack what tools look for.
#[test]
fn queries_about_nodes() {
    let bench = Bench::new();
    let mut client = bench.client();
    let nodes = client.get("query-named-block-nodes", json!({}));
    assert_eq!(nodes.as_array().unwrap().len(), 5);
    assert_eq!(nodes[3]["node-name"], "top");
    assert_eq!(nodes[3]["backing_file_depth"], 3);
    let image = &nodes[3]["image"];
    assert_eq!(
        image["backing-image"]["backing-image"]["filename"],
        "low.qcow2"
    );
    let flat = client.get("query-named-block-nodes", json!({"flat": true}));
    assert!(flat[3]["image"].get("backing-image").is_none());
    let exports = client.get("query-block-exports", json!({}));
    assert_eq!(
        exports,
        json!([{"node-name": "top", "shutting-down": false, "type": "vhost-user-blk", "id": "e0"}])
    );
    let devices = client.get("query-block", json!({}));
    assert_eq!(devices[0]["device"], "e0");
    assert_eq!(devices[0]["inserted"]["node-name"], "top");
}

/// Would catch queues that are left out of the sum, an answer that typed clients of QEMU refuse,
/// and polling that does not show.
#[test]
fn statistics() {
    let bench = Bench::new();
    let mut client = bench.client();
    let exports = client.get("query-blockstats", json!({}));
    let export = &exports[0];
    assert_eq!(exports.as_array().unwrap().len(), 1);
    assert_eq!(
        (&export["device"], &export["node-name"]),
        (&json!("e0"), &json!("top"))
    );
    let stats = &export["stats"];
    assert_eq!(
        (&stats["rd_operations"], &stats["rd_bytes"]),
        (&json!(4), &json!(16384))
    );
    assert_eq!(
        (&stats["wr_operations"], &stats["wr_bytes"]),
        (&json!(1), &json!(512))
    );
    assert_eq!(stats["flush_operations"], 2);
    // QEMU's schema names so many that may not be left out.
    assert_eq!(stats.as_object().unwrap().len(), 32);
    assert_eq!(export["poll-max-ns"], 64_000);
    let [busy, other] = export["queues"].as_array().unwrap().as_slice() else {
        panic!("two queues");
    };
    assert_eq!(
        (&busy["polls-found"], &busy["polls-missed"]),
        (&json!(5), &json!(1))
    );
    assert_eq!(busy["poll-ns"], 250_000);
    let share = 250_000.0 / export["elapsed-ns"].as_f64().unwrap();
    let told = busy["poll-share"].as_f64().unwrap();
    // Decimal digits may round the last bit.
    assert!((told / share - 1.0).abs() < 1e-9, "{told}, not {share}");
    assert_eq!(
        (&other["poll-ns"], &other["poll-share"]),
        (&json!(0), &json!(0.0))
    );
}

/// Would catch a socket file that stays, a stale one in the way, and a live one that is stolen.
#[test]
fn socket_files() {
    let mut bench = Bench::new();
    assert!(Endpoint::bind(&bench.path).is_err(), "it is in use");
    let mut client = bench.client();
    bench.server.stop();
    assert!(client.line().is_none(), "hung up");
    assert!(!bench.path.exists());
    drop(UnixListener::bind(&bench.path).unwrap());
    assert!(bench.path.exists(), "stale");
    drop(Endpoint::bind(&bench.path).unwrap());
    std::fs::remove_file(&bench.path).unwrap();
    std::fs::write(&bench.path, "precious").unwrap();
    assert!(Endpoint::bind(&bench.path).is_err());
    assert_eq!(std::fs::read(&bench.path).unwrap(), b"precious");
}

/// Would catch inherited sockets that are not told apart.
#[test]
fn inherited_sockets() {
    let bench = Bench::new();
    let engine = FakeDaemon::new().engine(Arc::default(), bench.jobs.clone(), bench.hub.sink());
    let control = Control::new(engine);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("inherited");
    let listener = UnixListener::bind(&path).unwrap();
    let endpoints = [OwnedFd::from(theirs), OwnedFd::from(listener)]
        .map(Endpoint::from_fd)
        .into();
    let mut server = Server::start(endpoints, control, bench.hub.clone()).unwrap();
    for mut client in [Client::new(ours), Client::connect(&path)] {
        client.get("qmp_capabilities", json!({}));
        assert_eq!(client.get("query-jobs", json!({})), json!([]));
    }
    server.stop();
    assert!(path.exists(), "not ours to remove");
}

/// Would catch a `quit` whose answer is lost.
#[test]
fn quit_is_answered_first() {
    let bench = Bench::new();
    let mut client = bench.client();
    assert_eq!(client.ask("quit", json!({})), json!({"return": {}}));
    while !bench.daemon.quit.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
}

/// Three places, and a last one that is free again after `idle`.
fn three_places(idle: Duration) -> Bench {
    Bench::with_limits(Limits {
        clients: 3,
        idle,
        ..Limits::default()
    })
}

/// What is said to a client for whom there is no place, before the connection ends.
fn turned_away(bench: &Bench) -> String {
    // What it is met with is not a greeting.
    let mut client = Client::connect(&bench.path);
    assert_eq!(client.line(), None);
    let error = &client.greeting["error"];
    assert_eq!(error["class"], "GenericError");
    error["desc"].as_str().unwrap().to_owned()
}

/// Would catch a client that is not answered because there are too many, and one that takes the
/// place of a client that has negotiated.
#[test]
fn clients_beyond_the_limit_are_told_so() {
    let bench = three_places(Duration::from_secs(3600));
    let mut clients: Vec<_> = (0..3).map(|_| bench.client()).collect();
    for _ in 0..5 {
        let text = turned_away(&bench);
        assert!(
            text.starts_with("Too many clients: 3 are connected"),
            "{text}"
        );
    }
    for client in &mut clients {
        assert_eq!(client.get("query-jobs", json!({})), json!([]));
    }
    // A place is free when its client has gone.
    drop(clients.remove(0));
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut late = loop {
        let client = Client::connect(&bench.path);
        if client.greeting.get("QMP").is_some() {
            break client;
        }
        assert!(Instant::now() < deadline);
    };
    late.get("qmp_capabilities", json!({}));
}

/// Would catch clients that keep everybody else out by doing nothing: the last place changes hands,
/// the others do not.
#[test]
fn the_last_place_can_be_had() {
    let bench = three_places(Duration::ZERO);
    let mut first = [bench.client(), bench.client()];
    let mut before = bench.client();
    for _ in 0..10 {
        let mut next = bench.client();
        assert_eq!(next.get("query-jobs", json!({})), json!([]));
        assert_eq!(before.line(), None, "made room for the next one");
        before = next;
    }
    for client in &mut first {
        assert_eq!(client.get("query-jobs", json!({})), json!([]));
    }
}

/// Would catch a client that keeps a place and never says what it wants: nothing, half a value, or
/// one thing after another that is no negotiation.
#[test]
fn negotiation_has_its_time() {
    let bench = Bench::with_limits(Limits {
        negotiation: Duration::from_millis(100),
        ..Limits::default()
    });
    let mut negotiated = bench.client();
    for said in [&b""[..], b"{'execute':", b"{'execute':'query-jobs'}"] {
        let mut client = Client::connect(&bench.path);
        client.send(said);
        let mut asking = client.stream.try_clone().unwrap();
        let asker = std::thread::spawn(move || {
            // Goes on talking until it is cut off.
            let deadline = Instant::now() + Duration::from_secs(20);
            while Instant::now() < deadline && asking.write_all(b" ").is_ok() {
                std::thread::yield_now();
            }
        });
        let told: Vec<_> = std::iter::from_fn(|| client.line()).collect();
        let last = &told.last().unwrap()["error"]["desc"];
        assert_eq!(last, "Capabilities negotiation was not completed in time");
        asker.join().unwrap();
    }
    assert_eq!(negotiated.get("query-jobs", json!({})), json!([]));
}

/// Would catch a client that was handed down or connected to and is cut off before it speaks.
#[test]
fn an_invited_client_has_all_the_time_it_wants() {
    let bench = Bench::new();
    let engine = FakeDaemon::new().engine(Arc::default(), bench.jobs.clone(), bench.hub.sink());
    let control = Control::new(engine);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let limits = Limits {
        negotiation: Duration::ZERO,
        ..Limits::default()
    };
    let endpoint = Endpoint::from_fd(OwnedFd::from(theirs));
    let _server = Server::with_limits(limits, vec![endpoint], control, bench.hub.clone()).unwrap();
    let mut client = Client::new(ours);
    assert!(client.greeting.get("QMP").is_some());
    client.get("qmp_capabilities", json!({}));
}

/// Would catch clients that hold half a value each and together more than the server can bear, and
/// a session that does not live on after that.
#[test]
fn half_sent_values_are_bounded_together() {
    let bench = Bench::with_limits(Limits {
        unfinished: 1 << 20,
        ..Limits::default()
    });
    let mut clients: Vec<_> = (0..4).map(|_| bench.client()).collect();
    for client in &mut clients {
        client.send(b"{'execute': '");
        client.send(&vec![b'x'; 900 << 10]);
    }
    let mut refused = 0;
    for client in &mut clients {
        client.send(b"'}\n{'execute': 'query-version', 'id': 7}");
        let mut first = client.answer();
        let text = first["error"]["desc"].as_str().unwrap();
        if text.starts_with("Too much is held") {
            refused += 1;
        } else {
            assert!(text.starts_with("The command xxx"), "{}", &text[..40]);
        }
        first = client.answer();
        assert_eq!(first["id"], 7, "one answer for the large value");
    }
    assert!(refused >= 3, "{refused}");
}

/// Would catch members of a job that the schema does not tell, or tells and are not there.
#[test]
fn a_job_is_as_the_schema_says() {
    let bench = Bench::new();
    let mut client = bench.client();
    let schema = client.get("query-qmp-schema", json!({}));
    let entry = |name: &str| {
        let entries = schema.as_array().unwrap();
        let found = entries.iter().find(|entry| entry["name"] == name);
        found.unwrap().clone()
    };
    let list = entry(entry("query-block-jobs")["ret-type"].as_str().unwrap());
    let item = entry(list["element-type"].as_str().unwrap());
    let members = item["members"].as_array().unwrap();
    let mut told: Vec<_> = members
        .iter()
        .filter(|member| member.get("default").is_none())
        .map(|member| member["name"].as_str().unwrap())
        .collect();
    client.get(
        "block-stream",
        json!({"device": "e0", "auto-dismiss": false}),
    );
    client.status("e0", "concluded");
    let jobs = client.get("query-block-jobs", json!({}));
    let mut there: Vec<_> = jobs[0]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    told.sort_unstable();
    there.sort_unstable();
    assert_eq!(told, there);
}

/// Would catch a node that stays in use when its export is gone, while some query still looks at
/// the export; an event that comes before the export has left the list.
#[test]
fn a_node_is_free_when_its_export_has_ended() {
    let bench = Bench::new();
    let mut client = bench.client();
    let looked_at = bench.exports.list();
    client.get("block-export-del", json!({"id": "e0"}));
    assert_eq!(client.named("BLOCK_EXPORT_DELETED"), json!({"id": "e0"}));
    assert_eq!(client.get("query-block-exports", json!({})), json!([]));
    client.get("blockdev-del", json!({"node-name": "top"}));
    drop(looked_at);
}

/// Would catch a node that goes although something uses it, and any other words for it than QEMU's.
#[test]
fn nodes_in_use_stay() {
    let bench = Bench::new();
    let mut client = bench.client();
    bench.daemon.shut_gate();
    for (node, text) in [
        ("x", "Failed to find node with node-name='x'"),
        ("top", "Node top is in use"),
        (
            "mid",
            "Node 'mid' is busy: node is used as backing hd of 'top'",
        ),
    ] {
        let refused = client.fail("blockdev-del", json!({"node-name": node}));
        assert_eq!(refused, generic(text));
    }
    client.get("block-stream", json!({"device": "low", "job-id": "j"}));
    let busy = "Node 'base' is busy: block device is in use by block job: stream";
    let refused = client.fail("blockdev-del", json!({"node-name": "base"}));
    assert_eq!(refused, generic(busy));
    bench.daemon.open_gate();
    client.status("j", "null");
}

/// Would catch objects, properties and paths that do not behave as QEMU's.
#[test]
fn objects_and_their_properties() {
    let bench = Bench::new();
    let mut client = bench.client();
    let add = json!({"qom-type": "iothread", "id": "io", "poll-max-ns": 5000});
    client.get("object-add", add.clone());
    let refused = client.fail("object-add", add);
    let duplicate = "attempt to add duplicate property 'io' to object (type 'container')";
    assert_eq!(refused, generic(duplicate));
    for (path, property, value) in [
        ("io", "poll-max-ns", json!(5000)),
        ("/objects/io", "type", json!("iothread")),
        ("/objects", "io", json!("/objects/io")),
        ("/", "objects", json!("/objects")),
        ("/objects", "type", json!("container")),
        ("io", "poll-grow", json!(0)),
    ] {
        let arguments = json!({"path": path, "property": property});
        assert_eq!(client.get("qom-get", arguments), value, "{path} {property}");
    }
    let set = |value: Value| json!({"path": "io", "property": "poll-max-ns", "value": value});
    client.get("qom-set", set(json!(7)));
    let threads = client.get("query-iothreads", json!({}));
    assert_eq!(threads[0]["poll-max-ns"], 7);
    assert_eq!(threads[0]["id"], "io");
    assert!(threads[0]["thread-id"].is_i64());
    let range = "poll-max-ns value must be in range [0, 9223372036854775807]";
    for (arguments, text) in [
        (set(json!(-1)), range),
        (
            set(json!("7")),
            "Invalid parameter type for 'poll-max-ns', expected: integer",
        ),
        (
            json!({"path": "io", "property": "type", "value": "x"}),
            "Property 'iothread.type' is not writable",
        ),
        (
            json!({"path": "io", "property": "nope", "value": 1}),
            "Property 'iothread.nope' not found",
        ),
        (
            json!({"path": "io", "property": "poll-max-ns"}),
            "Parameter 'value' is missing",
        ),
    ] {
        assert_eq!(client.fail("qom-set", arguments), generic(text));
    }
    let (class, text) = client.fail("qom-list", json!({"path": "/nope"}));
    assert_eq!(
        (class.as_str(), text.as_str()),
        ("DeviceNotFound", "Device '/nope' not found")
    );
    client.get("object-del", json!({"id": "io"}));
    let refused = client.fail("object-del", json!({"id": "io"}));
    assert_eq!(refused, generic("object 'io' not found"));
}

/// Would catch uses of nodes that are missing, or are said to be another one's.
#[test]
fn the_block_graph_has_all_nodes_and_their_users() {
    let bench = Bench::new();
    let mut client = bench.client();
    let graph = client.get("x-debug-query-block-graph", json!({}));
    let nodes = graph["nodes"].as_array().unwrap();
    let id = |name: &str| {
        let node = nodes.iter().find(|node| node["name"] == name).unwrap();
        node["id"].clone()
    };
    let edges = graph["edges"].as_array().unwrap();
    let edge = |child: &str| {
        let edge = edges.iter().find(|edge| edge["child"] == id(child));
        edge.unwrap()
    };
    assert_eq!(nodes.len(), 6);
    assert_eq!(edge("mid")["parent"], id("top"));
    assert_eq!(edge("mid")["name"], "backing");
    assert_eq!(edge("top")["name"], "root");
    assert_eq!(edge("top")["parent"], id(""));
    assert_eq!(edge("top")["perm"], json!(["consistent-read"]));
    let all = json!(["resize", "write-unchanged", "write", "consistent-read"]);
    assert_eq!(edge("top")["shared-perm"], all);
    // Nodes have numbers of their own.
    let stats = client.get("query-blockstats", json!({"query-nodes": true}));
    let names = stats.as_array().unwrap().iter();
    let names: Vec<_> = names
        .map(|node| node["node-name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["base", "low", "mid", "top", "solo"]);
    assert_eq!(stats[3]["backing"]["node-name"], "mid");
}

/// The schema, to look things up in.
struct Schema(Value);

impl Schema {
    fn of(client: &mut Client) -> Self {
        Self(client.get("query-qmp-schema", json!({})))
    }

    fn entry(&self, name: &str) -> &Value {
        let entries = self.0.as_array().unwrap();
        let found = entries.iter().find(|entry| entry["name"] == name);
        found.unwrap_or_else(|| panic!("'{name}' is not described"))
    }

    fn kind<'v>(entry: &'v Value, key: &str) -> &'v str {
        entry[key].as_str().unwrap()
    }

    /// What does not fit the type called `name` in `value`, which is at `place`.
    fn check(&self, value: &Value, name: &str, place: &str) {
        let entry = self.entry(name);
        match Self::kind(entry, "meta-type") {
            "builtin" => {
                let fits = match Self::kind(entry, "json-type") {
                    "string" => value.is_string(),
                    "int" => value.is_i64() || value.is_u64(),
                    "number" => value.is_number(),
                    "boolean" => value.is_boolean(),
                    "null" => value.is_null(),
                    _ => true,
                };
                assert!(fits, "{place}: {value} is no {name}");
            }
            "array" => {
                let element = Self::kind(entry, "element-type");
                let items = value
                    .as_array()
                    .unwrap_or_else(|| panic!("{place}: no list"));
                for (at, item) in items.iter().enumerate() {
                    self.check(item, element, &format!("{place}[{at}]"));
                }
            }
            "object" => self.check_object(value, entry, place),
            other => panic!("{place}: an answer of type {other}"),
        }
    }

    fn check_object(&self, value: &Value, entry: &Value, place: &str) {
        let there = value
            .as_object()
            .unwrap_or_else(|| panic!("{place}: no object"));
        let members = entry["members"].as_array().unwrap();
        for member in members {
            let name = Self::kind(member, "name");
            match there.get(name) {
                Some(value) => {
                    self.check(
                        value,
                        Self::kind(member, "type"),
                        &format!("{place}.{name}"),
                    );
                }
                None => assert!(member.get("default").is_some(), "{place}: no '{name}'"),
            }
        }
        for name in there.keys() {
            let known = members.iter().any(|member| member["name"] == *name);
            assert!(known, "{place}: '{name}' is not declared");
        }
    }

    /// A value of this type, and one that is of none of its types.
    fn example(&self, name: &str, depth: usize) -> (Value, Value) {
        let entry = self.entry(name);
        match Self::kind(entry, "meta-type") {
            "builtin" => match Self::kind(entry, "json-type") {
                "string" => (json!("x"), json!(1)),
                "int" => (json!(4096), json!("x")),
                "boolean" => (json!(true), json!("on")),
                other => (json!(null), json!({"a": other})),
            },
            "enum" => (entry["values"][0].clone(), json!("nonesuch")),
            "array" => {
                let (item, _) = self.example(Self::kind(entry, "element-type"), depth);
                (json!([item]), json!("x"))
            }
            "alternate" => {
                // A name, or a word.
                let kinds = entry["members"].as_array().unwrap();
                let simple = kinds.iter().map(|kind| Self::kind(kind, "type"));
                let simple = simple.filter(|kind| self.entry(kind)["meta-type"] != "object");
                let kind = simple.into_iter().next().unwrap();
                (self.example(kind, depth).0, json!(1))
            }
            _ => (self.object(entry, None, depth), json!(1)),
        }
    }

    /// The members of an object type, for a case of its tag.
    fn all_members(&self, entry: &Value, case: Option<&str>) -> Vec<Value> {
        let mut members = entry["members"].as_array().unwrap().clone();
        if let Some(variants) = entry["variants"].as_array() {
            let wanted = |variant: &&Value| case.is_none_or(|case| variant["case"] == case);
            let variant = variants.iter().find(wanted).unwrap();
            let own = self.entry(Self::kind(variant, "type"));
            members.extend(own["members"].as_array().unwrap().clone());
        }
        members
    }

    /// An object with all that is required.
    fn object(&self, entry: &Value, case: Option<&str>, depth: usize) -> Value {
        assert!(depth < 8);
        let members = self.all_members(entry, case).into_iter();
        let required = members.filter(|member| member.get("default").is_none());
        let mut object = serde_json::Map::new();
        for member in required {
            let name = Self::kind(&member, "name");
            let (value, _) = match (entry.get("tag"), case) {
                (Some(tag), Some(case)) if tag == name => (json!(case), Value::Null),
                // Nothing is made.
                _ if name == "filename" => (json!("/none/x"), Value::Null),
                _ => self.example(Self::kind(&member, "type"), depth + 1),
            };
            object.insert(name.to_owned(), value);
        }
        Value::Object(object)
    }
}

fn is_about_type(text: &str) -> bool {
    text.contains("Invalid parameter type")
        || text.contains("does not accept value")
        || text.contains("expects uint")
}

/// Calls each command with arguments made from the schema. Would catch an argument that is declared
/// and not taken, taken as another type, or required and not missed; and one that is not declared.
#[test]
fn arguments_are_as_the_schema_says() {
    let bench = Bench::new();
    let mut client = bench.client();
    let schema = Schema::of(&mut client);
    let entries = schema.0.as_array().unwrap().clone();
    let mut calls = 0;
    for command in entries
        .iter()
        .filter(|entry| entry["meta-type"] == "command")
    {
        let name = Schema::kind(command, "name");
        if ["quit", "qmp_capabilities"].contains(&name) {
            continue;
        }
        let arguments = schema.entry(Schema::kind(command, "arg-type")).clone();
        let cases: Vec<Option<String>> = match arguments["variants"].as_array() {
            Some(variants) => {
                let cases = variants.iter().map(|variant| Schema::kind(variant, "case"));
                cases.map(|case| Some(case.to_owned())).collect()
            }
            None => vec![None],
        };
        for case in cases {
            let case = case.as_deref();
            let whole = schema.object(&arguments, case, 0);
            let mut ask = |arguments: &Value| {
                calls += 1;
                let answer = client.ask(name, arguments.clone());
                let text = answer["error"]["desc"].as_str().unwrap_or_default();
                text.to_owned()
            };
            for member in schema.all_members(&arguments, case) {
                let key = Schema::kind(&member, "name");
                let (good, bad) = schema.example(Schema::kind(&member, "type"), 0);
                let good = whole.get(key).cloned().unwrap_or(good);
                let with = |value: Value| {
                    let mut given = whole.clone();
                    given[key] = value;
                    given
                };
                let text = ask(&with(good));
                let unexpected = format!("Parameter '{key}' is unexpected");
                let about_it = is_about_type(&text) && text.contains(&format!("'{key}'"));
                assert!(
                    text != unexpected && !about_it,
                    "{name} {case:?} {key}: {text}"
                );
                if Schema::kind(&member, "type") != "any" {
                    let text = ask(&with(bad));
                    assert!(is_about_type(&text), "{name} {case:?} {key}, wrong: {text}");
                }
                if member.get("default").is_none() {
                    let mut given = whole.clone();
                    given.as_object_mut().unwrap().remove(key);
                    let text = ask(&given);
                    assert_eq!(
                        text,
                        format!("Parameter '{key}' is missing"),
                        "{name} {case:?}"
                    );
                }
            }
            let mut given = whole.clone();
            given["x-none"] = json!(1);
            let text = ask(&given);
            assert_eq!(text, "Parameter 'x-none' is unexpected", "{name} {case:?}");
        }
    }
    assert!(calls > 300, "{calls} calls");
}

/// Would catch a member of an answer or of an event that is not declared, or declared and not there.
#[test]
fn answers_are_as_the_schema_says() {
    let bench = Bench::new();
    let mut client = bench.client();
    bench.daemon.fail_flush("mid", libc::EIO);
    client.get("object-add", json!({"qom-type": "iothread", "id": "io"}));
    // Before a job has the layers.
    let taken = json!({"device": "top", "name": "s"});
    client.get("blockdev-snapshot-internal-sync", taken.clone());
    let deleted = client.get("blockdev-snapshot-delete-internal-sync", taken);
    let stream = json!({"device": "e0", "auto-dismiss": false, "base": "low.qcow2"});
    client.get("block-stream", stream);
    client.status("e0", "concluded");
    let schema = Schema::of(&mut client);
    let entries = schema.0.as_array().unwrap().clone();
    let mut asked = Vec::new();
    for command in entries
        .iter()
        .filter(|entry| entry["meta-type"] == "command")
    {
        let name = Schema::kind(command, "name");
        let returns = Schema::kind(command, "ret-type");
        let arguments = match name {
            "qom-list" => json!({"path": "/objects/io"}),
            "blockdev-snapshot-delete-internal-sync" => {
                schema.check(&deleted, returns, name);
                continue;
            }
            name if name.starts_with("query-") || name.starts_with("x-debug") => json!({}),
            _ => {
                let told = ["empty", "any", "str"].contains(&returns);
                assert!(told, "{name}: its answers are not looked at here");
                continue;
            }
        };
        let answer = client.get(name, arguments);
        schema.check(&answer, returns, name);
        let is_empty = answer.as_array().is_some_and(Vec::is_empty);
        assert!(!is_empty, "{name}: nothing to look at");
        asked.push(name.to_owned());
    }
    let nodes = client.get("query-blockstats", json!({"query-nodes": true}));
    schema.check(&nodes, "[BlockStats]", "query-blockstats");
    assert!(asked.len() > 10, "{asked:?}");
}
