//! The command line: what is understood, what it means, and what is said when it is wrong.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use proptest::prelude::*;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;
use stratablk::config::{Action, Config, parse};
use stratablk::options::{
    Aio, BackingRef, BlockRef, BlockdevOptions, CacheOptions, DetectZeroes, Dialect, Discard,
    Driver, ExportOptions, ObjectOptions, OverlapCheck, SocketAddress,
};

fn action(args: &[&str]) -> Action {
    parse(std::iter::once("stratablk").chain(args.iter().copied()))
        .unwrap_or_else(|error| panic!("{args:?}: {error}"))
}

fn run(args: &[&str]) -> Config {
    match action(args) {
        Action::Run(config) => *config,
        other => panic!("{args:?}: {other:?}"),
    }
}

fn error(args: &[&str]) -> String {
    match parse(std::iter::once("stratablk").chain(args.iter().copied())) {
        Ok(action) => panic!("{args:?} was accepted: {action:?}"),
        Err(error) => error.to_string(),
    }
}

fn help(args: &[&str]) -> String {
    match action(args) {
        Action::Help(text) => text,
        other => panic!("{args:?}: {other:?}"),
    }
}

fn inline(reference: &BlockRef) -> &BlockdevOptions {
    match reference {
        BlockRef::Inline(node) => node,
        BlockRef::Name(name) => panic!("'{name}' should be a node in place"),
    }
}

fn filename(node: &BlockdevOptions) -> &Path {
    match &node.driver {
        Driver::File(file) => &file.filename,
        other => panic!("{other:?}"),
    }
}

/// Would catch a front-end manager (libvirt) being refused when it only asks what we can do.
#[test]
fn capabilities_come_before_everything_else() {
    assert_eq!(action(&["--print-capabilities"]), Action::PrintCapabilities);
    assert_eq!(
        action(&["--nonsense", "--print-capabilities", "x"]),
        Action::PrintCapabilities
    );
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(stratablk::config::CAPABILITIES).unwrap(),
        json!({"type": "block", "features": ["read-only", "blk-file"]})
    );
}

/// Would catch a disk that is set up in another way than its options say.
#[test]
fn one_disk_becomes_nodes_and_an_export() {
    let config = run(&["--socket-path=/s", "--blk-file=/i.qcow2"]);
    let [node] = &config.blockdevs[..] else {
        panic!("{config:?}")
    };
    let [export] = &config.exports[..] else {
        panic!("{config:?}")
    };
    assert_eq!(export.id, "disk0");
    assert_eq!(Some(export.node_name.as_str()), node.node_name.as_deref());
    assert_eq!(export.addr, SocketAddress::Unix(PathBuf::from("/s")));
    assert!(export.writable && !export.writethrough);
    assert_eq!((export.num_queues, export.logical_block_size), (1, 512));
    assert_eq!((node.read_only, node.discard), (false, Discard::Unmap));
    let Driver::Auto(auto) = &node.driver else {
        panic!("{node:?}")
    };
    assert!(!auto.copy_on_read);
    assert_eq!(filename(inline(&auto.file)), Path::new("/i.qcow2"));

    let config = run(&[
        "--fd=7",
        "--blk-file",
        "i",
        "--read-only",
        "--num-queues",
        "4",
        "--serial",
        "S1",
        "--cache",
        "none",
        "--copy-on-read",
        "--discard",
        "ignore",
        "--image-format",
        "qcow2",
        "--qmp",
        "/q",
        "--pidfile",
        "/p",
        "--daemonize",
        "--stop-timeout",
        "300",
    ]);
    let (node, export) = (&config.blockdevs[0], &config.exports[0]);
    assert_eq!(export.addr, SocketAddress::Fd(7));
    assert_eq!((export.writable, export.num_queues), (false, 4));
    assert_eq!(export.serial.as_deref(), Some("S1"));
    assert_eq!((node.read_only, node.discard), (true, Discard::Ignore));
    assert_eq!(
        node.cache,
        CacheOptions {
            direct: true,
            no_flush: false
        }
    );
    let Driver::Qcow2(qcow2) = &node.driver else {
        panic!("{node:?}")
    };
    assert!(qcow2.copy_on_read);
    let file = inline(&qcow2.file);
    assert!(
        file.read_only && file.cache.direct,
        "the file under the image: {file:?}"
    );
    let (monitor, chardev) = config.monitor_sockets().next().unwrap();
    assert_eq!(monitor.chardev, chardev.id);
    assert!(chardev.server && !chardev.wait);
    assert_eq!(chardev.addr, Some(SocketAddress::Unix(PathBuf::from("/q"))));
    assert_eq!(
        (config.pidfile, config.daemonize),
        (Some(PathBuf::from("/p")), true)
    );
    assert_eq!(config.stop_timeout, Some(Duration::from_secs(300)));
}

/// Would catch a state that has another name after a restart, or one that leads out of its folder.
#[test]
fn the_state_is_called_after_the_first_export() {
    let disk = ["--socket-path=/s", "--blk-file=/i.qcow2", "--state=/d"];
    let state = |more: &[&str]| run(&[&disk, more].concat()).state.unwrap();
    assert_eq!(
        (state(&[]).dir, state(&[]).name),
        (PathBuf::from("/d"), "disk0".to_owned())
    );
    assert_eq!(state(&["--state-name=vm-1.a"]).name, "vm-1.a");
    assert_eq!(run(&disk[..2]).state, None);
    for name in ["../x", "", ".x", "a/b", "a b"] {
        let text = error(&[&disk[..], &[&format!("--state-name={name}")]].concat());
        assert!(text.contains("--state-name"), "{text}");
    }
    let alone = ["--state-name=a", "--blk-file=/i", "--socket-path=/s"];
    assert!(error(&alone).contains("--state"));
    assert!(error(&["--state=/d"]).contains("--state-name"));
}

/// Would catch a cache mode with the wrong promise about stable data.
#[test]
fn cache_modes() {
    let modes = [
        ("none", true, false, false),
        ("writeback", false, false, false),
        ("writethrough", false, false, true),
        ("unsafe", false, true, false),
    ];
    for (mode, direct, no_flush, writethrough) in modes {
        let config = run(&["--fd=3", "--blk-file=i", "--cache", mode]);
        assert_eq!(
            config.blockdevs[0].cache,
            CacheOptions { direct, no_flush },
            "{mode}"
        );
        assert_eq!(config.exports[0].writethrough, writethrough, "{mode}");
    }
}

/// Would catch a disk option that is silently without effect, or half a disk.
#[test]
fn one_disk_mistakes() {
    assert!(error(&[]).contains("--blk-file"));
    assert!(error(&["--blk-file=i"]).contains("--socket-path=PATH or --fd=N"));
    assert!(error(&["--socket-path=s"]).contains("--blk-file"));
    assert!(error(&["--read-only", "--qmp=q"]).contains("--blk-file"));
    assert!(error(&["--fd=3", "--socket-path=s", "--blk-file=i"]).contains("cannot be used"));
    assert!(error(&["--fd=-1", "--blk-file=i"]).contains("-1"));
    assert!(error(&["--fd=3", "--blk-file=i", "--num-queues=0"]).contains("--num-queues"));
    let serial = error(&["--fd=3", "--blk-file=i", "--serial=123456789012345678901"]);
    assert!(
        serial.contains("--serial") && serial.contains("at most 20 bytes"),
        "{serial}"
    );
    let cache = error(&["--fd=3", "--blk-file=i", "--cache=writebak"]);
    assert!(
        cache.contains("writethrough") && cache.contains("'writeback'"),
        "{cache}"
    );
    let raw = error(&[
        "--fd=3",
        "--blk-file=i",
        "--image-format=raw",
        "--copy-on-read",
    ]);
    assert!(raw.contains("raw image has no layers"), "{raw}");
    assert!(error(&["--blk-fil=i", "--fd=3", "--foo"]).contains("--foo"));
    let socket = format!("--socket-path=/{}", "x".repeat(107));
    assert!(error(&[&socket, "--blk-file=i"]).contains("107 bytes"));
}

const EXPORT: &str = "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=/s";

/// Would catch a structured option that is read differently from qemu-storage-daemon.
#[test]
fn qemu_storage_daemons_words() {
    let config = run(&[
        "--object",
        "iothread,id=io0,poll-max-ns=4096",
        "--blockdev",
        "driver=file,node-name=f,filename=/a,,b,aio=io_uring,cache.direct=on",
        "--blockdev",
        "qcow2,node-name=n,file=f,backing.driver=raw,backing.file.driver=file,\
         backing.file.filename=/base,l2-cache-size=1M,overlap-check.template=all,\
         overlap-check.active-l1=off,discard=unmap,detect-zeroes=unmap,copy-on-read=on,",
        "--export",
        "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=/s,writable=on,num-queues=2,\
         logical-block-size=4K,iothread=io0,serial=abc",
        "--chardev",
        "socket,id=c,path=/q,server=on,wait=off",
        "--monitor",
        "c,mode=control,pretty=on",
        "--pidfile",
        "/p",
        "-T",
        "job_*,file=/log",
    ]);
    let ObjectOptions::Iothread(iothread) = &config.objects[0];
    assert_eq!(
        (iothread.id.as_str(), iothread.poll_max_ns),
        ("io0", Some(4096))
    );
    let Driver::File(file) = &config.blockdevs[0].driver else {
        panic!("{config:?}")
    };
    assert_eq!(
        (file.filename.as_path(), file.aio),
        (Path::new("/a,b"), Some(Aio::IoUring))
    );
    let node = &config.blockdevs[1];
    assert_eq!(
        (node.discard, node.detect_zeroes),
        (Discard::Unmap, DetectZeroes::Unmap)
    );
    let Driver::Qcow2(qcow2) = &node.driver else {
        panic!("{node:?}")
    };
    assert_eq!(qcow2.file, BlockRef::Name("f".into()));
    assert_eq!(qcow2.l2_cache_size, Some(1 << 20));
    assert_eq!(qcow2.overlap_check, OverlapCheck::All);
    assert!(qcow2.copy_on_read);
    let BackingRef::Node(backing) = &qcow2.backing else {
        panic!("{qcow2:?}")
    };
    let backing = inline(backing);
    assert!(
        backing.read_only,
        "a backing node is read-only unless it says otherwise"
    );
    let Driver::Raw(raw) = &backing.driver else {
        panic!("{backing:?}")
    };
    assert!(inline(&raw.file).read_only);
    let export = &config.exports[0];
    assert_eq!((export.logical_block_size, export.num_queues), (4096, 2));
    assert_eq!(export.iothread.as_deref(), Some("io0"));
    assert_eq!(export.serial.as_deref(), Some("abc"));
    assert!(config.monitors[0].pretty);
    assert_eq!(config.trace[0].enable.as_deref(), Some("job_*"));
    assert_eq!(config.trace[0].file.as_deref(), Some(Path::new("/log")));
}

/// Would catch a backing file that stays open though the user said there is none.
#[test]
fn backing_can_be_nothing() {
    let backing = |blockdev: &str| {
        let config = run(&[
            "--blockdev",
            "file,node-name=f,filename=/a",
            "--blockdev",
            blockdev,
        ]);
        match &config.blockdevs[1].driver {
            Driver::Qcow2(qcow2) => qcow2.backing.clone(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(backing("qcow2,node-name=n,file=f"), BackingRef::Default);
    assert_eq!(
        backing("qcow2,node-name=n,file=f,backing=null"),
        BackingRef::None
    );
    assert_eq!(
        backing("qcow2,node-name=n,file=f,backing="),
        BackingRef::None
    );
    let json = r#"{"driver":"qcow2","node-name":"n","file":"f","backing":null}"#;
    assert_eq!(backing(json), BackingRef::None);
    let name = BackingRef::Node(BlockRef::Name("f".into()));
    assert_eq!(backing("qcow2,node-name=n,file=f,backing=f"), name);
}

/// Would catch cache options that do not reach the file under the image.
#[test]
fn nodes_in_place_take_over_options() {
    let value = json!({
        "driver": "qcow2", "node-name": "n", "read-only": true, "force-share": true,
        "cache": {"direct": true, "no-flush": true},
        "file": {"driver": "file", "filename": "/a", "cache": {"no-flush": false}},
    });
    let node = BlockdevOptions::from_value(&value, Dialect::Json).unwrap();
    let Driver::Qcow2(qcow2) = &node.driver else {
        panic!("{node:?}")
    };
    let file = inline(&qcow2.file);
    assert_eq!(
        file.cache,
        CacheOptions {
            direct: true,
            no_flush: false
        }
    );
    assert!(file.read_only && file.force_share);
    assert_eq!(file.discard, Discard::Unmap);
    assert_eq!(node.discard, Discard::Ignore);
    let below = node.backing_node(node.child_file(Path::new("/b")).driver);
    assert!(below.read_only && below.cache.direct && below.node_name.is_none());
}

/// Would catch JSON that is taken with the wrong types, which QEMU refuses.
#[test]
fn json_is_strict() {
    let parse = |value| BlockdevOptions::from_value(&value, Dialect::Json);
    let bad = json!({"driver": "file", "node-name": "a", "filename": "/x", "read-only": "on"});
    assert_eq!(
        parse(bad).unwrap_err().qmp_desc(),
        "Invalid parameter type for 'read-only', expected: boolean"
    );
    let bad = json!({"driver": "file", "node-name": "a", "filename": "/x", "wrtable": true});
    assert_eq!(
        parse(bad).unwrap_err().qmp_desc(),
        "Parameter 'wrtable' is unexpected"
    );
    let bad = json!({"driver": "file", "node-name": "a"});
    assert_eq!(
        parse(bad).unwrap_err().qmp_desc(),
        "Parameter 'filename' is missing"
    );
    let bad = json!({"driver": "nbd", "node-name": "a"});
    assert_eq!(
        parse(bad).unwrap_err().qmp_desc(),
        "Parameter 'driver' does not accept value 'nbd'"
    );
    let bad = json!({"driver": "raw", "node-name": "a", "file": "f", "size": -1});
    assert!(
        parse(bad)
            .unwrap_err()
            .to_string()
            .contains("a number of 0 or more")
    );
    let bad = json!({"driver": "file", "filename": "/x"});
    let root = "'node-name' must be specified for the root node";
    assert_eq!(parse(bad).unwrap_err().qmp_desc(), root);
    let bad = json!({"type": "vhost-user-blk", "id": "e", "node-name": "n"});
    let error = ExportOptions::from_value(&bad, Dialect::Json).unwrap_err();
    assert_eq!(error.qmp_desc(), "Parameter 'addr' is missing");
}

/// Would catch a message that does not name the option, the word, or what was expected.
#[test]
fn mistakes_are_told_with_place_and_remedy() {
    let blockdev = |text: &str| error(&["--blockdev", text]);
    let export = |more: &str| {
        let text = format!("{EXPORT},{more}");
        error(&[
            "--blockdev",
            "file,node-name=n,filename=/x",
            "--export",
            &text,
        ])
    };
    assert_eq!(
        export("wrtable=on"),
        "--export: unknown key 'wrtable' (near 'wrtable=on'); expected one of: type, id, \
         node-name, writable, writethrough, iothread, fixed-iothread, allow-inactive, addr, \
         num-queues, logical-block-size, serial (did you mean 'writable'?)"
    );
    assert_eq!(
        blockdev("qcow,node-name=a"),
        "--blockdev: key 'driver' does not accept 'qcow' (near 'driver=qcow'); expected one of: \
         file, host_device, raw, qcow2, qed, copy-on-read, null-co, null-aio, blkdebug (did you mean 'qcow2'?)"
    );
    assert_eq!(
        blockdev("qcow2,node-name=a,file.driver=file,file.filenam=/x"),
        "--blockdev: unknown key 'file.filenam' (near 'file.filenam=/x'); expected one of: \
         driver, node-name, read-only, auto-read-only, force-share, discard, detect-zeroes, \
         cache, active, filename, aio, aio-max-batch, locking, drop-cache, pr-manager, \
         x-check-cache-dropped (did you mean 'filename'?)"
    );
    assert_eq!(
        blockdev("file,node-name=a"),
        "--blockdev: key 'filename' is missing (near 'file,node-name=a')"
    );
    assert_eq!(
        export("writable=maybe"),
        "--export: key 'writable' does not accept 'maybe' (near 'writable=maybe'); expected one \
         of: on, off"
    );
    assert_eq!(
        export("read-only"),
        "--export: expected '=' after 'read-only' (near 'read-only')"
    );
    assert!(blockdev("{\"driver\": }").contains("invalid JSON"));
    assert!(blockdev("file,node-name=a,filename=/x,cache=none").contains("keys of its own"));
    assert!(blockdev("file,node-name=1a,filename=/x").contains("starts with a letter"));
    let long = format!("file,node-name={},filename=/x", "a".repeat(32));
    assert!(blockdev(&long).contains("at most 31 characters"));
    assert!(export("logical-block-size=1000").contains("power of 2"));
    assert!(export("num-queues=0").contains("from 1 to 65535"));
    assert!(export("serial=123456789012345678901").contains("at most 20 bytes"));
    assert!(export("iothread=x").contains("no --object defines"));
    assert!(error(&["--export", "nbd,id=x,node-name=n"]).contains("one of: vhost-user-blk"));
    assert!(error(&["--object", "throttle-group,id=t"]).contains("not supported yet"));
    assert!(error(&["--object", "foo,id=t"]).contains("one of: iothread"));
    assert!(error(&["--chardev", "file,id=t"]).contains("one of: socket, stdio"));
    let twice = ["--chardev", "stdio,id=a", "--chardev", "stdio,id=b"];
    assert!(error(&twice).contains("cannot use stdio by multiple character devices"));
    let behind = ["--chardev", "stdio,id=a", "--monitor", "a", "--daemonize"];
    assert!(error(&behind).contains("no standard input"));
    assert!(error(&["--chardev", "socket,id=t"]).contains("'path' and 'fd'"));
    assert!(error(&["--chardev", "socket,id=t,path=/x,wait=off"]).contains("server=on"));
    assert!(error(&["--monitor", "c"]).contains("no --chardev defines"));
    assert!(error(&["--monitor", "c,mode=readline"]).contains("mode=control"));
    assert!(error(&["--nbd-server", "addr.type=unix"]).contains("NBD"));
    assert!(error(&["--blockdef", "x"]).contains("--blockdev"));
    assert!(error(&["--pidfile"]).contains("--pidfile"));
    for time in ["0", "-1", "1.5", "90s", "4294967296"] {
        let error = error(&[&format!("--stop-timeout={time}")]);
        assert!(
            error.contains("--stop-timeout") && error.contains(time),
            "{error}"
        );
    }
    assert!(error(&["--allow-backing", "nbd"]).contains("one of: blkdebug"));
    assert!(error(&["stray"]).contains("stray"));
}

/// Would catch a configuration whose parts do not fit, found only when half of it is running.
#[test]
fn the_parts_must_fit_together() {
    let file = "file,node-name=n,filename=/x";
    assert!(error(&["--blockdev", file, "--blockdev", file]).contains("two nodes named 'n'"));
    let late = ["--blockdev", "raw,node-name=r,file=n", "--blockdev", file];
    assert!(error(&late).contains("to the left of here"));
    let path = error(&["--blockdev", "qcow2,node-name=r,file=/x.qcow2"]);
    assert!(
        path.contains("file.driver=file,file.filename=/x.qcow2"),
        "{path}"
    );
    assert!(error(&["--export", EXPORT]).contains("node named 'n'"));
    assert!(error(&["--blockdev", file, "--export", EXPORT, "--export", EXPORT]).contains("twice"));
    let other = EXPORT.replace("id=e", "id=e2");
    let args = ["--blockdev", file, "--export", EXPORT, "--export", &other];
    assert!(error(&args).contains("socket /s is used twice"));
    let chardev = "socket,id=c,path=/q,server=on";
    let args = ["--chardev", chardev, "--monitor", "c", "--monitor", "c"];
    assert!(error(&args).contains("twice"));
}

/// Would catch names made up for the one disk that collide with the user's own.
#[test]
fn both_dialects_together() {
    let config = run(&[
        "--blockdev",
        "file,node-name=n,filename=/x",
        "--export",
        "vhost-user-blk,id=disk0,node-name=n,addr.type=unix,addr.path=/s",
        "--chardev",
        "socket,id=qmp0,path=/q,server,nowait",
        "--monitor",
        "qmp0",
        "--blk-file=/y",
        "--socket-path=/t",
        "--qmp=/r",
    ]);
    let ids: Vec<&str> = config
        .exports
        .iter()
        .map(|export| export.id.as_str())
        .collect();
    assert_eq!(ids, ["disk0", "disk1"]);
    assert_eq!(config.monitor_sockets().count(), 2);
    assert!(config.chardevs[0].server && !config.chardevs[0].wait);
}

/// Would catch help that does not name an option or key, or lines too long for a terminal.
#[test]
fn help_is_complete() {
    let text = help(&["--help"]);
    for word in [
        "--socket-path",
        "--fd",
        "--blk-file",
        "--read-only",
        "--print-capabilities",
        "--num-queues",
        "--qmp",
        "--serial",
        "--cache",
        "--copy-on-read",
        "--discard",
        "--image-format",
        "--blockdev",
        "--chardev",
        "--monitor",
        "--object",
        "--export",
        "--pidfile",
        "--daemonize",
        "--stop-timeout",
        "--state",
        "--state-name",
        "--trace",
        "--version",
        "--help",
        "writethrough",
        "addr.str",
        "logical-block-size",
        "l2-cache-size",
        "backing=",
        "detect-zeroes",
        "Examples:",
    ] {
        assert!(text.contains(word), "--help does not mention {word}");
    }
    assert!(help(&["-h"]).len() < text.len() / 2);
    assert!(help(&["--export", "help"]).contains("num-queues"));
    assert!(help(&["--object", "iothread,help"]).contains("poll-max-ns"));
    assert_eq!(action(&["-V"]), Action::Version);
    assert_eq!(action(&["--version"]), Action::Version);
}

proptest! {
    /// Would catch a panic on any command line.
    #[test]
    fn no_words_make_it_panic(words in prop::collection::vec(
        prop_oneof![
            "--(blockdev|export|chardev|monitor|object|trace|qmp|fd|serial|blk-file|cache)=?",
            "(\\{\"|file|qcow2|vhost-user-blk|iothread|socket)[,a-z.=\"{}:0-9-]{0,40}",
            ".*",
        ], 0..8)) {
        let _ = parse(std::iter::once("stratablk".to_owned()).chain(words));
    }

    /// Would catch a panic on any arguments that a client may send.
    #[test]
    fn no_value_makes_it_panic(driver in "file|raw|qcow2|copy-on-read|null-co|blkdebug|x", key in
        "file|image|inject-error|backing|cache|node-name|overlap-check|size|read-only|addr|id", text in ".*", number in any::<f64>()) {
        for member in [json!(text), json!(number), json!(null), json!([text]), json!({&key: {"driver": driver}})] {
            let value = json!({"driver": driver, "type": "vhost-user-blk", &key: member});
            for dialect in [Dialect::Json, Dialect::Keyval] {
                let _ = BlockdevOptions::from_value(&value, dialect);
                let _ = ExportOptions::from_value(&value, dialect);
                let _ = ObjectOptions::from_value(&value, dialect);
            }
        }
    }
}
