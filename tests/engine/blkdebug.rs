//! `blkdebug` in the graph, beside QEMU's own.
//!
//! What would be caught: a request that fails here and not there, or the other way round, by the same
//! rules; rules that begin anew when an image is opened to be written; bytes that are lost where an
//! operation beside them fails; a header that leads to a file of rules without being allowed to; an
//! image that is not sound after any of its operations has failed once.

use std::path::Path;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stratablk::format::qcow2::journal::Folder;
use stratablk::graph::{Allowed, Graph};
use stratablk::options::{BlockdevOptions, Dialect};
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs, Syncs};

use crate::support::*;

const SIZE: u64 = 1 << 20;
/// Scripts that both are given, `STRATABLK_ROUNDS` times as many if that is set.
const SCRIPTS: u64 = 40;

fn file(path: &Path) -> Value {
    json!({"driver": "file", "filename": path.to_str().unwrap()})
}

/// A node over `image` that fails by `rules`.
fn failing(image: &Value, rules: &Value) -> Value {
    let mut node = json!({"driver": "blkdebug", "image": image});
    let rules = rules.as_object().unwrap().clone();
    node.as_object_mut().unwrap().extend(rules);
    node
}

/// A node that is opened to be written, and its graph.
fn open(node: &Value) -> Result<Disk, String> {
    open_in(Graph::default(), node)
}

fn open_in(graph: Graph, node: &Value) -> Result<Disk, String> {
    let mut node = node.clone();
    node["node-name"] = json!("top");
    let options = BlockdevOptions::from_value(&node, Dialect::Json).unwrap();
    let reactor = Reactor::for_this_thread().unwrap();
    let text = |error: stratablk::error::Error| error.to_string();
    let name = reactor.block_on(graph.open(&options)).map_err(text)?;
    if !options.read_only {
        let writable = reactor.block_on(graph.make_writable(&name));
        writable.map_err(text)?;
    }
    let root = graph.root(&name).map_err(text)?;
    Ok(Disk {
        graph,
        root,
        name,
        reactor,
    })
}

/// A request, as `qemu-io` is told it.
#[derive(Clone, Copy, Debug)]
enum Request {
    Read(u64, usize),
    Write(u64, usize),
    Zero(u64, usize),
    Discard(u64, usize),
    Flush,
}

impl Request {
    fn word(self) -> String {
        match self {
            Self::Read(at, len) => format!("read {at} {len}"),
            Self::Write(at, len) => format!("write {at} {len}"),
            Self::Zero(at, len) => format!("write -z {at} {len}"),
            Self::Discard(at, len) => format!("discard {at} {len}"),
            Self::Flush => "flush".into(),
        }
    }

    /// Whether it succeeds, or the system's text.
    fn carry_out(self, disk: &Disk) -> Result<(), String> {
        let view = disk.view();
        let result = match self {
            Self::Read(at, len) => return try_read(disk, at, len).map(drop),
            Self::Write(at, len) => disk.try_write(at, &vec![9; len]),
            Self::Zero(at, len) => {
                let zero = view.write_zeroes(at, len as u64, false);
                disk.reactor.block_on(zero)
            }
            Self::Discard(at, len) => disk.reactor.block_on(view.discard(at, len as u64)),
            Self::Flush => {
                let flushed = disk.reactor.block_on(disk.root.chain().flush());
                clear_failures(disk);
                flushed
            }
        };
        result.map_err(|error| error.to_string())
    }
}

/// A flush that has failed fails until it is cleared, with QEMU once.
fn clear_failures(disk: &Disk) {
    for storage in disk.root.chain().top().storages() {
        Syncs::of(storage).clear();
    }
}

fn try_read(disk: &Disk, at: u64, len: usize) -> Result<Vec<u8>, String> {
    let buffer = AlignedBuf::zeroed(len);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
    let read = disk.reactor.block_on(disk.view().read(at, bufs));
    read.map(|()| buffer.to_vec())
        .map_err(|error| error.to_string())
}

/// What QEMU makes of the requests: its line about each, empty for those about which it is silent.
fn of_qemu(node: &Value, requests: &[Request]) -> Vec<String> {
    let name = format!("json:{node}");
    // Without that it flushes after each write.
    let mut args = ["-t", "writeback"].map(str::to_owned).to_vec();
    for request in requests {
        // A line that marks the end of what is said about the request.
        args.extend([
            "-c".to_owned(),
            request.word(),
            "-c".into(),
            "length".into(),
        ]);
    }
    args.push(name);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = output("qemu-io", &args);
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8(text).unwrap();
    let mut said = vec![String::new()];
    for line in text.lines() {
        if line.trim() == "1 MiB" {
            said.push(String::new());
        } else {
            said.last_mut().unwrap().push_str(line);
        }
    }
    said.pop();
    assert_eq!(said.len(), requests.len(), "{text}");
    said
}

fn compare_with_qemu(dir: &tempfile::TempDir, rules: &Value, requests: &[Request]) {
    let node = |name: &str| {
        let path = in_dir(dir, name);
        std::fs::write(&path, vec![7; SIZE as usize]).unwrap();
        json!({"driver": "raw", "discard": "unmap", "file": failing(&file(&path), rules)})
    };
    compare_nodes([node("theirs"), node("ours")], rules, requests);
    let bytes = |name: &str| std::fs::read(in_dir(dir, name)).unwrap();
    // QEMU writes other bytes, but in the same places.
    let places = |bytes: Vec<u8>| -> Vec<u8> {
        let changed = |byte| match byte {
            0 | 7 => byte,
            _ => 9,
        };
        bytes.into_iter().map(changed).collect()
    };
    assert!(places(bytes("ours")) == places(bytes("theirs")), "{rules}");
}

/// Puts the same requests to QEMU and to us.
fn compare_nodes([theirs, ours]: [Value; 2], rules: &Value, requests: &[Request]) {
    let theirs = of_qemu(&theirs, requests);
    let disk = open(&ours).unwrap();
    // The end of another script may have failed.
    clear_failures(&disk);
    for (request, theirs) in requests.iter().zip(theirs) {
        let ours = request.carry_out(&disk);
        let what = format!("{rules}\n{requests:?}\n{request:?}: {ours:?}, and QEMU '{theirs}'");
        match (request, ours) {
            // It says nothing about it.
            (Request::Flush, _) => {}
            (_, Ok(())) => assert!(!theirs.contains("failed"), "{what}"),
            (_, Err(error)) => {
                let (_, reason) = theirs.split_once("failed: ").expect(&what);
                assert!(error.contains(reason), "{what}");
            }
        }
    }
    disk.close();
}

fn random_rules(rng: &mut StdRng) -> Value {
    const EVENTS: &[&str] = &[
        "none",
        "read_aio",
        "read_aio",
        "write_aio",
        "pwritev",
        "pwritev_zero",
        "pwritev_done",
        "flush_to_os",
        "flush_to_disk",
        "l2_load",
    ];
    let event = |rng: &mut StdRng| *EVENTS.choose(rng).unwrap();
    let mut inject = Vec::new();
    for _ in 0..rng.random_range(1..5) {
        let errno = *[5, 28, 110].choose(rng).unwrap();
        let mut rule = json!({"event": event(rng), "errno": errno});
        let mut add = |key: &str, value: Value, odds: f64| {
            if rng.random_bool(odds) {
                rule[key] = value;
            }
        };
        add("once", json!(true), 0.6);
        add("immediately", json!(true), 0.3);
        let state = 1 + inject.len() as u32 % 3;
        add("state", json!(state), 0.5);
        let sector = rng.random_range(0..12_u64);
        let kind = *["read", "write", "write-zeroes", "discard", "flush"]
            .choose(rng)
            .unwrap();
        for (key, value) in [("sector", json!(sector)), ("iotype", json!(kind))] {
            if rng.random_bool(0.4) {
                rule[key] = value;
            }
        }
        inject.push(rule);
    }
    let mut set = Vec::new();
    for _ in 0..rng.random_range(0..4) {
        let mut rule = json!({"event": event(rng), "new_state": rng.random_range(1..4_u32)});
        if rng.random_bool(0.7) {
            rule["state"] = json!(rng.random_range(1..4_u32));
        }
        set.push(rule);
    }
    let mut rules = json!({"inject-error": inject});
    // QEMU takes no empty list.
    if !set.is_empty() {
        rules["set-state"] = json!(set);
    }
    rules
}

fn random_requests(rng: &mut StdRng) -> Vec<Request> {
    let mut requests = Vec::new();
    while requests.len() < 24 {
        let at = rng.random_range(0..8_u64) * 512;
        let len = rng.random_range(1..6_usize) * 512;
        requests.push(match rng.random_range(0..8) {
            0..4 => Request::Read(at, len),
            4..6 => Request::Write(at, len),
            6 => Request::Discard(at, len),
            _ => Request::Zero(at, len),
        });
        // QEMU has nothing to flush where nothing was written.
        if !matches!(requests.last(), Some(Request::Read(..))) && rng.random_bool(0.4) {
            requests.push(Request::Flush);
        }
    }
    requests
}

#[test]
fn the_same_requests_fail_as_with_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let rounds = std::env::var("STRATABLK_ROUNDS").ok();
    let rounds: u64 = rounds.and_then(|rounds| rounds.parse().ok()).unwrap_or(1);
    for seed in 0..SCRIPTS * rounds {
        let mut rng = StdRng::seed_from_u64(seed);
        let rules = random_rules(&mut rng);
        let requests = random_requests(&mut rng);
        compare_with_qemu(&dir, &rules, &requests);
    }
}

/// What an image does to its file, told by what the operations are for.
#[test]
fn metadata_is_told_as_by_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let twice = |request: Request| vec![request, request];
    let (read, write) = (Request::Read(0, 512), Request::Write(0, 512));
    let cow = vec![
        Request::Write(65_536, 512),
        read,
        Request::Read(65_536, 512),
    ];
    for (event, kind, requests) in [
        ("l2_load", "read", twice(read)),
        ("l2_load", "read", twice(write)),
        ("read_aio", "read", twice(read)),
        ("write_aio", "write", twice(write)),
        ("write_aio", "write", cow.clone()),
        (
            "read_compressed",
            "read",
            twice(Request::Read(1 << 19, 512)),
        ),
        ("read_compressed", "read", twice(read)),
        ("l1_update", "write", twice(read)),
        ("refblock_load", "read", twice(read)),
        ("vmstate_load", "read", twice(read)),
    ] {
        let rule = json!({"event": event, "iotype": kind, "once": true});
        let rules = json!({"inject-error": [rule]});
        let node = |name: &str| {
            let path = in_dir(&dir, name);
            create(&path, "cluster_size=64k", SIZE);
            let data = [
                "-f",
                "qcow2",
                "-c",
                "write -q 0 64k",
                "-c",
                "write -q -c 512k 64k",
            ];
            run("qemu-io", &[&data[..], &[path.to_str().unwrap()]].concat());
            json!({"driver": "qcow2", "file": failing(&file(&path), &rules)})
        };
        compare_nodes([node("theirs"), node("ours")], &rules, &requests);
    }
}

#[test]
fn a_file_of_rules_is_read_as_qemu_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = in_dir(&dir, "rules");
    // As QEMU's test 030 uses them: one failure at the second read of a place.
    let text = "[inject-error]\nstate = \"1\"\nevent = \"read_aio\"\nerrno = \"5\"\n\
                immediately = \"off\"\nonce = \"on\"\nsector = \"4\"\n\
                [set-state]\nstate = \"1\"\nevent = \"read_aio\"\nnew_state = \"2\"\n\
                [set-state]\nstate = \"2\"\nevent = \"read_aio\"\nnew_state = \"1\"\n";
    std::fs::write(&config, text).unwrap();
    let rules = json!({"config": config.to_str().unwrap()});
    let requests = [Request::Read(2048, 512); 4];
    compare_with_qemu(&dir, &rules, &requests);
    let missing = json!({"config": "/missing/rules"});
    let node = failing(&file(&config), &missing);
    let error = open(&node).err().unwrap();
    assert!(
        error.contains("Could not read blkdebug config file")
            && error.ends_with("No such file or directory"),
        "{error}"
    );
    std::fs::write(&config, "[inject-error]\nevent = \"x\"\n").unwrap();
    let error = open(&failing(&file(&config), &rules)).err().unwrap();
    assert!(error.contains("rules: line 1: [inject-error]"), "{error}");
}

/// A file that was opened to be read is opened once more, and the rules are where they were.
#[test]
fn rules_go_on_when_an_image_is_opened_to_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let raw = in_dir(&dir, "raw");
    std::fs::write(&raw, vec![7; SIZE as usize]).unwrap();
    let rule = |kind: &str| json!({"event": "none", "iotype": kind, "once": true, "sector": 1024});
    let rules = json!({"inject-error": [rule("read"), rule("write")]});
    let of = |path: &Path| {
        let mut file = file(path);
        file["read-only"] = json!(true);
        failing(&file, &rules)
    };
    let window = json!({"driver": "raw", "offset": 512, "file": of(&raw)});
    let requests = |at: u64| [Request::Read(at, 512), Request::Write(at, 512)];
    let at = 1024 * 512;
    for (node, at) in [(of(&raw), at), (window, at - 512)] {
        let disk = open(&node).unwrap();
        for is_gone in [false, true] {
            let outcomes = requests(at).map(|request| request.carry_out(&disk).is_ok());
            assert_eq!(outcomes, [is_gone; 2], "{node}");
        }
        disk.close();
    }
}

/// A limit of transfers, blocks, and the disk in an image under it.
#[test]
fn blocks_and_limits_lose_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let raw = in_dir(&dir, "raw");
    let mut expected: Vec<u8> = (0..SIZE).map(|at| (at / 517) as u8).collect();
    std::fs::write(&raw, &expected).unwrap();
    let image = in_dir(&dir, "image");
    let convert = [
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        "cluster_size=4k",
    ];
    let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
    run("qemu-img", &[&convert[..], &paths].concat());
    let settings = json!({"align": 4096, "max-transfer": 8192, "opt-write-zero": 4096});
    let qcow2 = |settings: &Value| {
        let below = failing(&file(&image), settings);
        json!({"driver": "qcow2", "file": below})
    };
    for node in [
        qcow2(&settings),
        failing(&qcow2(&json!({})), &settings),
        failing(&qcow2(&settings), &settings),
    ] {
        let disk = open(&node).unwrap();
        assert!(disk.read(0, SIZE as usize) == expected, "{node}");
        for (at, len) in [(4096, 4096), (12_288, 69_632), (1 << 19, 131_072)] {
            let byte = expected[at].wrapping_add(1);
            disk.try_write(at as u64, &vec![byte; len]).unwrap();
            expected[at..at + len].fill(byte);
        }
        assert!(disk.read(0, SIZE as usize) == expected, "{node}");
        disk.reactor.block_on(disk.root.chain().flush()).unwrap();
        disk.close();
        check(&image, false);
        compare(&image, "qcow2", &expected);
    }
}

/// An image in storage whose every operation fails once, the next one at each attempt.
#[test]
fn an_image_outlives_each_failure() {
    let dir = tempfile::tempdir().unwrap();
    // They are on a tmpfs only.
    let journals = tempfile::tempdir_in("/dev/shm").unwrap();
    let base = in_dir(&dir, "base");
    std::fs::write(&base, vec![5; SIZE as usize]).unwrap();
    let mut refused = 0;
    for (with_journal, copy_on_read, kind) in [
        (false, false, "write"),
        (true, false, "write"),
        (false, true, "write"),
        (false, false, "flush"),
        (false, true, "read"),
    ] {
        let mut failed = 0;
        for number in 1..12 {
            let what = format!("{with_journal} {copy_on_read} {kind} {number}");
            // A failed flush is remembered of a file: each one has a file of its own.
            let image = in_dir(&dir, &what);
            create_over(&image, "cluster_size=4k", &base, "raw");
            // The state counts the operations of this kind.
            let event = match kind {
                "write" => "pwritev",
                "flush" => "flush_to_disk",
                "read" => "read_aio",
                _ => "pwritev_zero",
            };
            let count =
                |state: u64| json!({"event": event, "state": state, "new_state": state + 1});
            let rules = json!({
                "inject-error": [{"event": event, "state": number, "iotype": kind, "once": true}],
                "set-state": (1..20).map(count).collect::<Vec<_>>(),
            });
            let node = json!({"driver": "qcow2", "discard": "unmap",
                "copy-on-read": copy_on_read, "file": failing(&file(&image), &rules)});
            let graph = Graph::default();
            if with_journal {
                graph.keep_journals(Folder::open(journals.path(), None).unwrap());
            }
            let Ok(disk) = open_in(graph, &node) else {
                // Its header could not be read or written.
                check(&image, true);
                refused += 1;
                continue;
            };
            let mut expected = vec![5; SIZE as usize];
            let mut unknown = Vec::new();
            for at in [0_usize, 10_000, 65_536, 200_000, 9_216] {
                let (at, len) = (at / 512 * 512, 3072);
                match disk.try_write(at as u64, &vec![at as u8 | 1; len]) {
                    Ok(()) => {
                        expected[at..at + len].fill(at as u8 | 1);
                        unknown.retain(|(other, _)| *other != at);
                    }
                    Err(_) => unknown.push((at, len)),
                }
                let flushed = disk.reactor.block_on(disk.root.chain().flush());
                failed += u32::from(flushed.is_err());
            }
            let discarded = disk.reactor.block_on(disk.view().discard(65_536, 8192));
            let flushed = disk.reactor.block_on(disk.root.chain().flush());
            failed += u32::from(flushed.is_err()) + unknown.len() as u32;
            if discarded.is_err() {
                unknown.push((65_536, 8192));
            } else {
                expected[65_536..65_536 + 8192].fill(0);
            }
            let seen = try_read(&disk, 0, SIZE as usize);
            failed += u32::from(seen.is_err());
            if let Ok(mut seen) = seen {
                for (at, len) in &unknown {
                    let range = *at..*at + *len;
                    seen[range.clone()].copy_from_slice(&expected[range]);
                }
                assert!(seen == expected, "{what}");
            }
            clear_failures(&disk);
            disk.close();
            check(&image, true);
            let again = open(&json!({"driver": "qcow2", "read-only": true, "file": file(&image)}));
            let again = again.unwrap_or_else(|error| panic!("{what}: {error}"));
            let mut seen = again.read(0, SIZE as usize);
            for (at, len) in &unknown {
                let range = *at..*at + *len;
                seen[range.clone()].copy_from_slice(&expected[range]);
            }
            assert!(seen == expected, "{what}: after the end");
        }
        assert!(failed > 0, "no {kind} failed");
    }
    assert!(refused < 20, "{refused} were not opened");
}

/// What a header names is not followed unless it is allowed, and then as in QEMU.
#[test]
fn headers_lead_to_rules_only_where_they_may() {
    let dir = tempfile::tempdir().unwrap();
    let (config, base, image) = (
        in_dir(&dir, "rules"),
        in_dir(&dir, "base"),
        in_dir(&dir, "top"),
    );
    std::fs::write(
        &config,
        "[inject-error]\nevent = \"read_aio\"\nsector = \"8\"\n",
    )
    .unwrap();
    std::fs::write(&base, vec![5; SIZE as usize]).unwrap();
    let plain = format!("blkdebug:{}:{}", config.display(), base.display());
    let settings = json!({"config": config.to_str().unwrap()});
    let described = json!({"driver": "raw", "file": failing(&file(&base), &settings)});
    let described = format!("json:{described}");
    for name in [&plain, &described] {
        create_over(&image, "cluster_size=4k", Path::new(name), "raw");
        let node = json!({"driver": "qcow2", "file": file(&image)});
        let error = open(&node).err().unwrap();
        assert!(error.contains("--allow-backing blkdebug"), "{error}");
        let graph = Graph::default();
        graph.allow_backing(Allowed::default().with("blkdebug").unwrap());
        let disk = open_in(graph, &node).unwrap();
        assert!(disk.read(0, 4096) == [5; 4096]);
        let error = Request::Read(4096, 512).carry_out(&disk).unwrap_err();
        assert!(error.contains("Input/output error"), "{error}");
        // That operations fail is no part of what a header is to say.
        let below = disk.graph.chain_nodes("top").unwrap()[1].name.clone();
        let named = disk.graph.header_name(&below).unwrap();
        assert_eq!(named, base.to_str().unwrap());
        disk.close();
    }
    assert_eq!(Allowed::default().with("nbd"), None);
}
