//! A control client on standard input and output.
//!
//! What would be caught: a daemon without an export that does not start, a last answer that is lost
//! at the end, and a daemon that ends with its client.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

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

fn start(more: &[&str]) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_stratablk"))
        .current_dir(dir.path())
        .args(["--chardev", "stdio,id=s", "--monitor", "s"])
        .args(more)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    Daemon { child, dir }
}

#[test]
fn all_answers_come_before_the_end() {
    let mut daemon = start(&[]);
    let mut input = daemon.child.stdin.take().unwrap();
    let output = daemon.child.stdout.take().unwrap();
    for command in ["qmp_capabilities", "query-version", "quit"] {
        let request = json!({"execute": command, "id": command});
        writeln!(input, "{request}").unwrap();
    }
    let lines = BufReader::new(output).lines();
    let lines: Vec<Value> = lines
        .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
        .collect();
    assert!(lines[0].get("QMP").is_some());
    let ids: Vec<_> = lines[1..].iter().map(|line| line["id"].clone()).collect();
    assert_eq!(ids, ["qmp_capabilities", "query-version", "quit"]);
    assert_eq!(daemon.child.wait().unwrap().code(), Some(0));
}

#[test]
fn the_end_of_the_input_is_not_the_daemons() {
    let more = [
        "--chardev",
        "socket,id=c,path=qmp,server=on,wait=off",
        "--monitor",
        "c",
    ];
    let mut daemon = start(&more);
    let mut input = daemon.child.stdin.take().unwrap();
    let mut output = BufReader::new(daemon.child.stdout.take().unwrap());
    writeln!(input, "{{'execute':'qmp_capabilities'}}").unwrap();
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert!(line.contains("QMP"), "{line}");
    drop(input);
    // What was asked for is answered.
    line.clear();
    output.read_line(&mut line).unwrap();
    assert_eq!(line.trim_end(), "{\"return\":{}}");
    let mut client =
        std::os::unix::net::UnixStream::connect(daemon.dir.path().join("qmp")).unwrap();
    writeln!(
        client,
        "{{'execute':'qmp_capabilities'}}{{'execute':'quit'}}"
    )
    .unwrap();
    assert_eq!(daemon.child.wait().unwrap().code(), Some(0));
}
