//! The control tool against the real qemu-storage-daemon.
//!
//! The tool uses only the part of QMP that both daemons have, so that what passes here is known
//! to be the protocol, and not an agreement between our two halves.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use stratablk::ctl::client::{Client, ClientError};

const MIB: u64 = 1 << 20;

/// A daemon with a base of 8 MiB of data and an empty overlay, the node `top`.
struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(program: &str, args: &[&str], dir: &Path) {
    let output = Command::new(program)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
}

impl Daemon {
    /// `None`, with a message, where the programs are not installed.
    fn start() -> Option<Self> {
        Self::with_nodes(&["qcow2,node-name=top,file=file"])
    }

    /// The same, with these nodes above the overlay's file.
    fn with_nodes(nodes: &[&str]) -> Option<Self> {
        for program in ["qemu-storage-daemon", "qemu-img", "qemu-io"] {
            if Command::new(program).arg("--version").output().is_err() {
                eprintln!("SKIPPED: {program} is not installed (Debian: qemu-utils)");
                return None;
            }
        }
        let dir = tempfile::tempdir().unwrap();
        run(
            "qemu-img",
            &["create", "-q", "-f", "raw", "base.raw", "32M"],
            dir.path(),
        );
        run(
            "qemu-io",
            &["-f", "raw", "-c", "write -P 7 0 8M", "base.raw"],
            dir.path(),
        );
        let overlay = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.raw",
            "-F",
            "raw",
            "top.qcow2",
        ];
        run("qemu-img", &overlay, dir.path());
        let pid = dir.path().join("pid");
        let mut child = Command::new("qemu-storage-daemon")
            .args([
                "--chardev",
                "socket,id=c,path=qmp,server=on,wait=off",
                "--monitor",
                "c",
            ])
            .args(["--blockdev", "file,node-name=file,filename=top.qcow2"])
            .args(nodes.iter().flat_map(|node| ["--blockdev", node]))
            .args([
                "--export",
                "vhost-user-blk,id=disk0,node-name=top,addr.type=unix,addr.path=v",
            ])
            .args(["--pidfile", "pid"])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        // The file says that all is ready. Its coming is bounded by the daemon's own life.
        while !pid.exists() {
            assert!(
                child.try_wait().unwrap().is_none(),
                "qemu-storage-daemon ended early"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(Self { child, dir })
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stratactl"));
        command.arg("--socket").arg(self.socket()).args(args);
        command
    }

    fn ctl(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Standard output of a command that must succeed.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.ctl(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        serde_json::from_str(&self.ok(&all)).unwrap()
    }

    fn backing_file(&self) -> Value {
        self.info()["backing-filename"].clone()
    }

    /// What `qemu-img` says of the overlay.
    fn info(&self) -> Value {
        // Without the image's lock, which the daemon holds.
        let output = Command::new("qemu-img")
            .args(["info", "-U", "--output=json", "top.qcow2"])
            .current_dir(self.dir.path())
            .output()
            .unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

/// Would catch a client that a real daemon does not understand, or the other way round.
#[test]
fn the_client_speaks_to_a_real_daemon() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let mut client = Client::connect(&daemon.socket(), Some(Duration::from_secs(60))).unwrap();
    assert!(client.version()["qemu"]["major"].is_u64());
    let nodes = client
        .execute("query-named-block-nodes", json!({"flat": true}))
        .unwrap();
    assert!(nodes.as_array().unwrap().len() >= 2);
    match client.execute("block-stream", json!({"device": "nope", "job-id": "j"})) {
        Err(ClientError::Answer(error)) => {
            assert_eq!(error.class, "GenericError".to_owned(), "{error}");
            assert!(error.desc.contains("nope"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    client
        .execute("block-stream", json!({"device": "top", "job-id": "j"}))
        .unwrap();
    let completed = loop {
        let event = client
            .next_event(Duration::from_secs(60))
            .unwrap()
            .expect("an event");
        if event.name == "BLOCK_JOB_COMPLETED" {
            break event.data;
        }
    };
    assert_eq!(
        (&completed["device"], &completed["len"]),
        (&json!("j"), &json!(32 * MIB))
    );
}

/// Would catch a stream that is not waited for, or whose success is not told.
#[test]
fn stream_and_wait() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let text = daemon.ok(&["stream", "top", "--wait"]);
    assert!(
        text.trim_end()
            .lines()
            .last()
            .unwrap()
            .starts_with("top: completed"),
        "{text}"
    );
    assert_eq!(daemon.backing_file(), Value::Null);
    assert_eq!(daemon.ok(&["jobs"]), "No active jobs\n");
    assert_eq!(daemon.ok(&["jobs", "--watch"]), "No active jobs\n");
}

/// Would catch a command that acts on the wrong job or sends the wrong arguments.
#[test]
fn a_job_is_controlled() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let started = daemon.json(&["stream", "top", "--speed", "64K", "--job-id", "s1"]);
    assert_eq!(started, json!({"job": "s1"}));
    let job = |field: &str| daemon.json(&["jobs"])[0][field].clone();
    assert_eq!(job("id"), "s1");
    assert_eq!(job("speed"), 64 << 10);
    assert!(daemon.ok(&["jobs"]).contains("64.0 KiB/s"));
    daemon.ok(&["speed", "s1", "128K"]);
    assert_eq!(job("speed"), 128 << 10);
    daemon.ok(&["pause", "s1"]);
    // The job gets to its pause in its own time.
    while job("status") != "paused" {}
    let again = daemon.ctl(&["pause", "s1"]);
    assert_eq!(code(&again), 1);
    assert_eq!(
        String::from_utf8_lossy(&again.stderr).trim(),
        "stratactl: Job is already paused"
    );
    daemon.ok(&["resume", "s1"]);
    while job("status") != "running" {}
    daemon.ok(&["cancel", "s1"]);
    daemon.ok(&["jobs", "--watch", "--json"]);
    assert_eq!(daemon.json(&["jobs"]), json!([]));
    assert_eq!(
        daemon.backing_file(),
        "base.raw",
        "a cancelled stream keeps the backing file"
    );

    // What was cancelled is started again, at full speed, and is made effective by hand.
    daemon.ok(&["stream", "top", "--no-auto-finalize", "--no-auto-dismiss"]);
    let job_status = || daemon.json(&["jobs"])[0]["status"].clone();
    while job_status() != "pending" {}
    daemon.ok(&["finalize", "top"]);
    let text = daemon.ok(&["jobs", "--watch"]);
    assert!(text.contains("top: completed"), "{text}");
    assert_eq!(job_status(), "concluded");
    daemon.ok(&["dismiss", "top"]);
    assert_eq!(daemon.ok(&["jobs"]), "No active jobs\n");

    // The one word that this daemon does not know.
    let refused = daemon.ctl(&["clear-sync-error", "top"]);
    assert_eq!(code(&refused), 1);
    assert_eq!(
        String::from_utf8_lossy(&refused.stderr).trim(),
        "stratactl: The command x-clear-sync-error has not been found"
    );
    assert_eq!(daemon.backing_file(), Value::Null);
}

/// Would catch words that the tool takes and the daemon does not, and a snapshot of another name.
#[test]
fn snapshots_inside_of_an_image_come_and_go() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let names = || -> Vec<Value> {
        let info = daemon.info();
        let snapshots = info["snapshots"].as_array().cloned().unwrap_or_default();
        snapshots.iter().map(|one| one["name"].clone()).collect()
    };
    daemon.ok(&["snapshot", "top", "--internal", "before"]);
    daemon.ok(&["snapshot", "top", "--internal", "after"]);
    assert_eq!(names(), ["before", "after"]);
    let again = daemon.ctl(&["snapshot", "top", "--internal", "before"]);
    assert_eq!(code(&again), 1);
    let text = String::from_utf8_lossy(&again.stderr);
    assert!(text.contains("'before' already exists"), "{text}");
    daemon.ok(&["snapshot", "top", "--delete", "before"]);
    assert_eq!(names(), ["after"]);
    let gone = daemon.ctl(&["snapshot", "top", "--delete", "before"]);
    assert_eq!(code(&gone), 1);
    assert_eq!(names(), ["after"]);
}

/// Would catch a failed job that a script takes for a completed one.
#[test]
fn a_failed_job_is_told_to_who_waits() {
    let nodes = [
        "blkdebug,node-name=bad,image.driver=file,image.filename=base.raw,\
         inject-error.0.event=read_aio,inject-error.0.errno=5",
        "raw,node-name=base,file=bad",
        "qcow2,node-name=top,file=file,backing=base",
    ];
    let Some(daemon) = Daemon::with_nodes(&nodes) else {
        return;
    };
    let failed = daemon.ctl(&["stream", "top", "--wait"]);
    let text = String::from_utf8_lossy(&failed.stdout).into_owned();
    assert_eq!(code(&failed), 4, "{failed:?}");
    assert!(text.contains("top: read error, action: report"), "{text}");
    assert!(
        text.ends_with("top: failed: Input/output error\n"),
        "{text}"
    );
    assert_eq!(failed.stderr, b"", "the end is told once");
    let failed = daemon.ctl(&["--json", "stream", "top", "--wait"]);
    let text = String::from_utf8_lossy(&failed.stdout).into_owned();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!((code(&failed), &last["outcome"]), (4, &json!("failed")));
    assert_eq!(last["error"], "Input/output error");
}

/// A peer that answers every command from `answers`, by its name, and sends `events` before the
/// answer to the first `query-block-jobs`. It serves one client.
fn scripted(dir: &Path, answers: Value, events: Vec<Value>) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(dir.join("qmp")).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut writer = stream.try_clone().unwrap();
        let greeting = json!({"QMP": {"version": {"qemu": {}, "package": ""}, "capabilities": []}});
        write!(writer, "{greeting}\r\n").unwrap();
        let mut events = Some(events);
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let command: Value = serde_json::from_str(&line).unwrap();
            let name = command["execute"].as_str().unwrap();
            if name == "query-block-jobs" {
                for event in events.take().unwrap_or_default() {
                    write!(writer, "{event}\r\n").unwrap();
                }
            }
            let result = answers.get(name).cloned().unwrap_or(json!({}));
            write!(
                writer,
                "{}\r\n",
                json!({"return": result, "id": command["id"]})
            )
            .unwrap();
        }
    })
}

/// Would catch a cancelled job that a script takes for a completed one.
#[test]
fn a_cancelled_job_is_told_to_who_waits() {
    let dir = tempfile::tempdir().unwrap();
    let data = json!({"device": "d", "type": "stream", "len": 100, "offset": 40, "speed": 0});
    let answers = json!({"query-jobs": [], "query-block-jobs": []});
    let events = vec![json!({"event": "BLOCK_JOB_CANCELLED", "data": data})];
    let peer = scripted(dir.path(), answers, events);
    let output = Command::new(env!("CARGO_BIN_EXE_stratactl"))
        .args(["--socket", "qmp", "stream", "d", "--wait"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "d: cancelled at 40.0%\n"
    );
    assert_eq!(code(&output), 4, "{output:?}");
    peer.join().unwrap();
}

/// Would catch a wait that goes on, or ends well, when the daemon is gone.
#[test]
fn the_end_of_the_daemon_ends_the_wait() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let mut waiting = daemon
        .command(&["--json", "stream", "top", "--speed", "64K", "--wait"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(waiting.stdout.take().unwrap()).lines();
    let first: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(
        (&first["job"], &first["len"]),
        (&json!("top"), &json!(32 * MIB))
    );
    let pid = std::fs::read_to_string(daemon.dir.path().join("pid")).unwrap();
    run("kill", &["-KILL", pid.trim()], daemon.dir.path());
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(code(&output), 3, "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("connection lost"),
        "{output:?}"
    );
}

/// Would catch a failure that a script cannot tell from another.
#[test]
fn exit_codes() {
    let nowhere = Command::new(env!("CARGO_BIN_EXE_stratactl"))
        .args(["--socket", "/nonexistent/socket", "jobs"])
        .output()
        .unwrap();
    assert_eq!(code(&nowhere), 3);
    let text = String::from_utf8_lossy(&nowhere.stderr).into_owned();
    assert!(
        text.contains("cannot connect to /nonexistent/socket"),
        "{text}"
    );
    let which = Command::new(env!("CARGO_BIN_EXE_stratactl"))
        .arg("jobs")
        .env_remove("STRATABLK_QMP")
        .output()
        .unwrap();
    assert_eq!(code(&which), 2);
    assert!(String::from_utf8_lossy(&which.stderr).contains("STRATABLK_QMP"));

    let Some(daemon) = Daemon::start() else {
        return;
    };
    for args in [&["speed", "j", "fast"][..], &["stream"], &["nonsense"]] {
        assert_eq!(code(&daemon.ctl(args)), 2, "{args:?}");
    }
    let help = daemon.ok(&["--help"]);
    for word in ["Exit codes", "STRATABLK_QMP", "stream", "jobs", "hmp"] {
        assert!(help.contains(word), "{word}");
    }
    let unknown = daemon.ctl(&["--json", "speed", "j", "1M"]);
    assert_eq!(code(&unknown), 1);
    let error: Value = serde_json::from_slice(&unknown.stderr).unwrap();
    assert_eq!(error["error"]["class"], "DeviceNotActive");
    assert_eq!(error["error"]["desc"], "Block job 'j' not found");
    // By the variable instead of the option.
    let variable = Command::new(env!("CARGO_BIN_EXE_stratactl"))
        .arg("quit")
        .env("STRATABLK_QMP", daemon.socket())
        .output()
        .unwrap();
    assert_eq!(code(&variable), 0, "{variable:?}");
}

/// Would catch a command or option that the documentation forgot.
#[test]
fn the_documentation_names_every_command() {
    let page = include_str!("../docs/stratactl.md");
    let help = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_stratactl"))
            .args(args)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let top = help(&["-h"]);
    let commands: Vec<&str> = top
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect();
    assert!(commands.len() > 10, "{top}");
    for command in commands {
        assert!(
            page.contains(&format!("`{command}")),
            "docs/stratactl.md lacks {command}"
        );
        for word in help(&[command, "-h"]).split_whitespace() {
            let option = word.trim_matches(|c: char| !c.is_ascii_alphabetic() && c != '-');
            if option.starts_with("--") && !["--help", "--version"].contains(&option) {
                assert!(
                    page.contains(option),
                    "docs/stratactl.md lacks {command} {option}"
                );
            }
        }
    }
}

/// Would catch an overview that misses a layer or shows chains in the wrong order.
#[test]
fn overview() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let text = daemon.ok(&["info"]);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("Daemon: QMP "), "{text}");
    let at = |what: &str| {
        lines
            .iter()
            .position(|line| line.contains(what))
            .unwrap_or_else(|| panic!("{what}: {text}"))
    };
    let (export, top, base) = (
        at("disk0 (vhost-user-blk)"),
        at("top: qcow2, 32.0 MiB"),
        at("base.raw"),
    );
    assert!(export + 1 == top && top + 1 == base, "{text}");
    let indent = |line: usize| lines[line].len() - lines[line].trim_start().len();
    assert!(
        indent(export) < indent(top) && indent(top) < indent(base),
        "{text}"
    );
    assert!(
        lines[base].contains("raw") && lines[base].contains("read-only"),
        "{text}"
    );
    assert!(
        !text.contains("Other nodes"),
        "the files of layers are not told twice: {text}"
    );

    let info = daemon.json(&["info"]);
    let layers = info["exports"][0]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    assert_eq!(
        (&layers[0]["node-name"], &layers[1]["format"]),
        (&json!("top"), &json!("raw"))
    );
}

/// Would catch a command that only our own daemon has, or that fails on one that counts nothing.
#[test]
fn statistics() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    assert_eq!(daemon.ok(&["stats"]), "No queues\n");
    assert_eq!(daemon.json(&["stats"]), json!([]));
}

/// Would catch raw commands that lose their arguments or result.
#[test]
fn raw_commands() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    assert!(
        daemon
            .ok(&["qmp", "query-version"])
            .contains("\n  \"qemu\"")
    );
    let exports = daemon.json(&["qmp", "query-block-exports"]);
    assert_eq!(exports[0]["id"], "disk0");
    daemon.ok(&[
        "qmp",
        "block-export-del",
        r#"{"id": "disk0", "mode": "hard"}"#,
    ]);
    // This daemon has no such command: its refusal must come through.
    let hmp = daemon.ctl(&["hmp", "info", "block-jobs"]);
    assert_eq!(code(&hmp), 1);
    assert!(String::from_utf8_lossy(&hmp.stderr).contains("human-monitor-command"));
}

/// Would catch options that reach a daemon with other types than it expects, or with keys that
/// only one of the two daemons knows.
#[test]
fn nodes_and_exports_come_and_go() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "more.qcow2", "4M"],
        daemon.dir.path(),
    );
    let node = "qcow2,node-name=more,file.driver=file,file.filename=more.qcow2,discard=unmap";
    assert_eq!(daemon.ok(&["node", "add", node]), "");
    let json = json!({"driver": "raw", "node-name": "over", "file": "more"});
    daemon.ok(&["node", "add", &json.to_string()]);
    let listed = daemon.ok(&["node", "list"]);
    let line = listed.lines().find(|line| line.starts_with("more "));
    let words: Vec<_> = line.unwrap().split_whitespace().collect();
    assert_eq!(words, ["more", "qcow2", "more.qcow2"]);
    let refused = daemon.ctl(&["node", "del", "more"]);
    assert_eq!(code(&refused), 1);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("Block device more is in use"), "{said}");
    daemon.ok(&["node", "del", "over"]);
    let export = "vhost-user-blk,id=e,node-name=more,addr.type=unix,addr.path=e.sock,\
                  writable=on,num-queues=2";
    daemon.ok(&["export", "add", export]);
    assert!(daemon.dir.path().join("e.sock").exists());
    let exports = daemon.json(&["export", "list"]);
    assert_eq!(exports.as_array().unwrap().len(), 2);
    daemon.ok(&["export", "del", "e"]);
    daemon.ok(&["export", "del", "disk0", "--force"]);
    daemon.ok(&["node", "del", "more"]);
    assert_eq!(daemon.json(&["export", "list"]), json!([]));
    for wrong in [
        &["node", "add", "qcow,node-name=x"][..],
        &["export", "add", "vhost-user-blk,id=e,wrtable=on"],
    ] {
        let refused = daemon.ctl(wrong);
        assert_eq!(code(&refused), 2, "{refused:?}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("did you mean"));
    }
}

/// Would catch a snapshot that names the disk or its new image in a way that the daemon reads as
/// another one (the daemon has another folder), disks that are left out, and a commit that is ready
/// and not completed.
#[test]
fn snapshots_of_disks() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    // Wrong words are found before anything is sent.
    for wrong in [
        &["snapshot", "top"][..],
        &["snapshot", "=file"],
        &["snapshot", "top=a", "top=b", "--node-name", "n"],
    ] {
        assert_eq!(code(&daemon.ctl(wrong)), 2, "{wrong:?}");
    }
    let elsewhere = daemon.dir.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let snapshot = |args: &[&str]| {
        let mut command = daemon.command(&["snapshot"]);
        command.args(args).current_dir(&elsewhere).output().unwrap()
    };
    let made = snapshot(&["top=over.qcow2", "--node-name", "over"]);
    assert_eq!(code(&made), 0, "{made:?}");
    assert!(elsewhere.join("over.qcow2").exists());
    let nodes = daemon.ok(&["node", "list"]);
    assert!(
        nodes.lines().any(|line| line.starts_with("over ")),
        "{nodes}"
    );
    // One that cannot be made leaves the other one unmade.
    let refused = snapshot(&["over=more.qcow2", "nobody=none.qcow2"]);
    assert_eq!(code(&refused), 1, "{refused:?}");
    assert!(!daemon.ok(&["node", "list"]).contains("more.qcow2"));
    let own = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2"];
    let own = [&own[..], &["-b", "over.qcow2", "own.qcow2", "32M"]].concat();
    run("qemu-img", &own, &elsewhere);
    let existing = snapshot(&["over=own.qcow2", "--existing", "--node-name", "own"]);
    assert_eq!(code(&existing), 0, "{existing:?}");
    let nodes = daemon.ok(&["node", "list"]);
    assert!(nodes.contains("own.qcow2"), "{nodes}");
    // Back again: without more words such a job would wait to be completed.
    let back = [
        "commit",
        "own",
        "--base-node",
        "over",
        "--job-id",
        "back",
        "--complete",
    ];
    let told = daemon.ok(&back);
    assert!(told.contains("back: completed"), "{told}");
    let refused = snapshot(&["nobody", "--internal", "x"]);
    assert_eq!(code(&refused), 1, "{refused:?}");
}
