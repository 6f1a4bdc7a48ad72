//! Jobs that come and go, counted in bytes of memory. Alone in its program: it counts what the
//! whole process has allocated.
//!
//! What would be caught: memory that a job leaves behind, however it ends and whatever layer it is
//! for, be it a few bytes; a daemon lives for years, and jobs may be started and cancelled all the
//! time.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use common::images::{qemu_img, run};
use common::qmp::Qmp;
use serde_json::{Value, json};
use stratablk::config::{self, Action};

/// Jobs of each kind.
const ROUNDS: i64 = 300;
/// What may be there that is no leak, of each kind: the spare room of lists, and what is made when
/// it is first needed.
const SPARE: i64 = 16 << 10;

/// Bytes that are allocated.
static LIVE: AtomicI64 = AtomicI64::new(0);

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all calls go to the system's allocator as they are.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// A daemon of this process that serves `top`, over `mid`, over `base`.
fn start(dir: &Path) -> (std::thread::JoinHandle<u8>, Qmp) {
    let path = |name: &str| dir.join(name).display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", &path("base"), "1M"]).unwrap();
    for (above, below) in [("mid", "base"), ("top", "mid")] {
        let backing = path(below);
        let words = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
        qemu_img(&[&words[..], &[&backing, &path(above)]].concat()).unwrap();
    }
    // Something to copy, so that jobs wait for their speed.
    let write = ["-f", "qcow2", "-c", "write -P 7 0 64k"];
    run("qemu-io", &[&write[..], &[&path("base")]].concat()).unwrap();
    let blockdev = format!(
        "qcow2,node-name=top,file.driver=file,file.filename={}",
        path("top")
    );
    let socket = path("export");
    let export = format!(
        "vhost-user-blk,id=disk,node-name=top,addr.type=unix,addr.path={socket},writable=on"
    );
    let control = path("qmp");
    let chardev = format!("socket,id=control,path={control},server=on,wait=off");
    let words = [
        "stratablk",
        "--blockdev",
        &blockdev,
        "--export",
        &export,
        "--chardev",
        &chardev,
        "--monitor",
        "control",
    ];
    let Action::Run(config) = config::parse(words.map(std::ffi::OsString::from)).unwrap() else {
        panic!("not a configuration to run");
    };
    let daemon = std::thread::spawn(move || stratablk::daemon::run(&config));
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match Qmp::connect(&dir.join("qmp")) {
            Ok(qmp) => return (daemon, qmp),
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::yield_now();
    }
}

/// The name of the node that was opened because a header names its file.
fn node_of(qmp: &mut Qmp, file: &Path) -> String {
    let nodes = qmp
        .execute("query-named-block-nodes", json!({"flat": true}))
        .unwrap()
        .unwrap();
    let is_it = |node: &&Value| node["file"] == json!(file) && node["drv"] == "qcow2";
    let node = nodes.as_array().unwrap().iter().find(is_it).unwrap();
    node["node-name"].as_str().unwrap().to_owned()
}

/// Waits until no more than `most` bytes are allocated; says how many are where there stay more.
fn settles_at(most: i64) -> Result<(), i64> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let live = LIVE.load(Ordering::Relaxed);
        if live <= most {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(live);
        }
        std::thread::yield_now();
    }
}

#[test]
fn jobs_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (daemon, mut qmp) = start(dir.path());
    let mid = node_of(&mut qmp, &dir.path().join("mid"));
    let kinds: [(&str, Value, bool); 4] = [
        ("into the top", json!({"device": "disk", "speed": 1}), true),
        (
            "into a lower layer",
            json!({"device": mid, "job-id": "disk", "speed": 1}),
            true,
        ),
        (
            "refused",
            json!({"device": "disk", "base": "nowhere"}),
            false,
        ),
        (
            "done at once",
            json!({"device": "disk", "base-node": mid}),
            true,
        ),
    ];
    for (what, arguments, starts) in kinds {
        let mut round = || {
            let answer = qmp.execute("block-stream", arguments.clone()).unwrap();
            assert_eq!(answer.is_ok(), starts, "{what}: {answer:?}");
            if starts {
                // It may have ended by itself.
                let _ = qmp.execute("block-job-cancel", json!({"device": "disk"}));
                let gone = json!({"id": "disk", "status": "null"});
                qmp.event(|event| event["data"] == gone).unwrap();
            }
        };
        // What is made once and kept is made here.
        for _ in 0..20 {
            round();
        }
        let before = LIVE.load(Ordering::Relaxed);
        for _ in 0..ROUNDS {
            round();
        }
        if let Err(live) = settles_at(before + SPARE) {
            let each = (live - before) as f64 / ROUNDS as f64;
            panic!("jobs {what}: {each:.1} bytes left behind by each");
        }
    }
    qmp.execute("quit", json!({})).unwrap().unwrap();
    assert_eq!(daemon.join().unwrap(), 0);
}
