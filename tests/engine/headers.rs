//! Names in the headers of images, which may come from a guest.
//!
//! What would be caught: a header that leads to another host, into another disk's nodes, to a
//! device file that does something when it is opened, or that decides about locks and durability;
//! a name that loses what makes the bytes of the node that it stands for; and parts of one file that
//! are taken for a loop, or a loop that is not.

use std::path::Path;

use serde_json::{Value, json};
use stratablk::format::Format;
use stratablk::format::qcow2::Backing;
use stratablk::graph::Graph;
use stratablk::options::{BlockdevOptions, Dialect};
use stratablk::reactor::Reactor;

use crate::support::*;

/// Writes a backing file's name into the image's header as it is.
fn name_backing(path: &Path, name: &str, format: Option<&str>) {
    let disk = Disk::open(path, "qcow2", json!({"backing": null}));
    let Format::Qcow2(image) = disk.root.chain().top().format.clone() else {
        panic!("not a qcow2 image");
    };
    let backing = Backing {
        name: name.into(),
        format: format.map(str::to_owned),
    };
    disk.reactor
        .block_on(image.set_backing(Some(&backing)))
        .unwrap();
    disk.close();
}

/// Opens a qcow2 or QED image with other nodes beside it.
fn open(path: &Path, driver: &str) -> Result<(), String> {
    let reactor = Reactor::for_this_thread().unwrap();
    let graph = Graph::default();
    let file = |path: &Path| json!({"driver": "file", "filename": path.to_str().unwrap()});
    let open = |mut node: Value, name: &str| {
        node["node-name"] = json!(name);
        let options = BlockdevOptions::from_value(&node, Dialect::Json).unwrap();
        reactor.block_on(graph.open(&options)).map(drop)
    };
    open(file(&path.with_file_name("other")), "other-disk").unwrap();
    let node = json!({"driver": driver, "file": file(path)});
    open(node, "top").map_err(|error| error.to_string())
}

#[test]
fn headers_name_local_files() {
    let dir = tempfile::tempdir().unwrap();
    let (image, other) = (in_dir(&dir, "image"), in_dir(&dir, "other"));
    std::fs::write(&other, vec![7; 64 << 10]).unwrap();
    create(&image, "cluster_size=4k", 64 << 10);
    let qed = in_dir(&dir, "image.qed");
    let local = json!({"driver": "file", "filename": other.to_str().unwrap()});
    let with = |key: &str, value: Value| {
        let mut file = local.clone();
        file[key] = value;
        json!({"driver": "raw", "file": file})
    };
    let over = |file: Value| json!({"driver": "qcow2", "file": file});
    let mut cases: Vec<(String, String)> = Vec::new();
    for name in [
        "nbd:localhost:10809",
        "nbd://localhost/x",
        "nbd+unix:///x?socket=/s",
        "http://host/x",
        "https://host/x",
        "ftp://host/x",
        "ftps://host/x",
        "rbd:pool/x",
        "ssh://host/x",
        "iscsi://host/x",
        "gluster://host/x",
        "gluster+tcp://host/x",
        "nfs://host/x",
        "sheepdog:x",
    ] {
        cases.push((name.into(), "names a remote backing file".into()));
    }
    for name in [
        "fat:/tmp",
        "blkdebug::/x",
        "host_device:/dev/sda",
        "json",
        ":x",
    ] {
        if !["json", ":x"].contains(&name) {
            cases.push((name.into(), "with the protocol".into()));
        }
    }
    let server = json!({"type": "inet", "host": "localhost", "port": "10809"});
    let nbd = json!({"driver": "nbd", "server": server});
    let http = json!({"driver": "https", "url": "https://host/x"});
    for (value, says) in [
        (nbd.clone(), "a remote one, by driver 'nbd'"),
        (over(nbd.clone()), "a remote one, by driver 'nbd'"),
        (
            json!({"driver": "raw", "file.driver": "nbd", "file.path": "/s"}),
            "driver 'nbd'",
        ),
        (
            over(json!({"driver": "raw", "file": http})),
            "driver 'https'",
        ),
        (
            json!({"driver": "qcow2", "file": local, "backing": nbd}),
            "driver 'nbd'",
        ),
        (
            json!({"driver": "blkdebug", "image": local}),
            "driver 'blkdebug'",
        ),
        (
            json!({"driver": "copy-on-read", "file": local}),
            "driver 'copy-on-read'",
        ),
        (
            json!({"driver": "null-co", "latency-ns": 1}),
            "'latency-ns'",
        ),
        (
            json!({"driver": "raw", "file": "other-disk"}),
            "node 'other-disk' as its 'file'",
        ),
        (
            json!({"driver": "qcow2", "file": local, "backing": "other-disk"}),
            "node 'other-disk'",
        ),
        (
            json!({"driver": "qcow2", "file": local, "data-file": "other-disk"}),
            "node 'other-disk'",
        ),
        (
            json!({"driver": "raw", "file": local, "node-name": "other-disk"}),
            "'node-name'",
        ),
        (with("locking", json!("off")), "'locking'"),
        (with("read-only", json!(false)), "'read-only'"),
        (with("force-share", json!(true)), "'force-share'"),
        (with("auto-read-only", json!(true)), "'auto-read-only'"),
        (with("discard", json!("unmap")), "'discard'"),
        (with("aio", json!("native")), "'aio'"),
        (with("cache", json!({"no-flush": true})), "'cache'"),
        (
            json!({"driver": "raw", "file": local, "cache.no-flush": true}),
            "'cache'",
        ),
        (
            json!({"driver": "qcow2", "file": local, "copy-on-read": true}),
            "'copy-on-read'",
        ),
        (json!([]), "which holds no object"),
    ] {
        cases.push((format!("json:{value}"), says.into()));
    }
    let mut deep = local.clone();
    for _ in 0..30 {
        deep = json!({"driver": "raw", "file": deep});
    }
    cases.push((format!("json:{deep}"), "nested more than".into()));
    cases.push(("/dev/null".into(), "not a file or a block device".into()));
    let device = json!({"driver": "file", "filename": "/dev/null"});
    cases.push((
        format!("json:{device}"),
        "not a file or a block device".into(),
    ));
    let fifo = in_dir(&dir, "fifo");
    run("mkfifo", &[fifo.to_str().unwrap()]);
    cases.push((
        fifo.to_str().unwrap().into(),
        "not a file or a block device".into(),
    ));
    for (name, says) in cases {
        for format in [None, Some("raw")] {
            name_backing(&image, &name, format);
            let error = open(&image, "qcow2").expect_err(&name);
            assert!(error.contains(&says), "{name}: {error}");
        }
        if name.len() < 1023 && !name.contains("json") {
            let name_of_qed = qed.to_str().unwrap();
            run(
                "qemu-img",
                &["create", "-q", "-f", "qed", name_of_qed, "64k"],
            );
            let args = [
                "rebase",
                "-u",
                "-f",
                "qed",
                "-F",
                "raw",
                "-b",
                &name,
                name_of_qed,
            ];
            if output("qemu-img", &args).status.success() {
                let error = open(&qed, "qed").expect_err(&name);
                assert!(error.contains(&says), "QED, {name}: {error}");
            }
        }
    }
}

#[test]
fn data_files_are_local_files() {
    let dir = tempfile::tempdir().unwrap();
    let (image, other) = (in_dir(&dir, "image"), in_dir(&dir, "other"));
    std::fs::write(&other, vec![7; 64 << 10]).unwrap();
    let placeholder = in_dir(&dir, "a_data_file_with_a_name_that_is_long_enough");
    let placeholder = placeholder.to_str().unwrap();
    create(&image, &format!("data_file={placeholder}"), 64 << 10);
    let good = std::fs::read(&image).unwrap();
    let at = good
        .windows(placeholder.len())
        .position(|window| window == placeholder.as_bytes())
        .unwrap();
    for (name, says) in [
        ("nbd://localhost/", "names a remote data file"),
        ("http://host/", "names a remote data file"),
        (
            "json:{\"driver\":\"nbd\"}",
            "a data file with the protocol 'json'",
        ),
        ("/dev/../dev/./null", "not a file or a block device"),
    ] {
        let mut bytes = good.clone();
        let mut name = name.to_owned();
        if name.starts_with("/dev") {
            // As long as the other, and the same place.
            name = format!("/{}dev/null", "./".repeat((placeholder.len() - 9) / 2));
            if name.len() < placeholder.len() {
                name = name.replacen("/./", "//./", 1);
            }
        }
        while name.len() < placeholder.len() {
            name.push('x');
        }
        bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        std::fs::write(&image, bytes).unwrap();
        let error = open(&image, "qcow2").expect_err(&name);
        assert!(error.contains(says), "{name}: {error}");
    }
}

/// The name of a window says where it is: by its file alone it would be another disk.
#[test]
fn a_name_stands_for_all_of_its_node() {
    let dir = tempfile::tempdir().unwrap();
    let (image, base, other) = (
        in_dir(&dir, "image"),
        in_dir(&dir, "base"),
        in_dir(&dir, "other"),
    );
    let bytes: Vec<u8> = (0..256 << 10).map(|at: u32| (at / 512) as u8).collect();
    std::fs::write(&other, &bytes).unwrap();
    create(&base, "cluster_size=4k", 64 << 10);
    name_backing(&base, other.to_str().unwrap(), Some("raw"));
    let file = |path: &Path| json!({"driver": "file", "filename": path.to_str().unwrap()});
    let window = json!({"driver": "raw", "offset": 4096, "size": 65_536, "file": file(&other)});
    let over = |more: Value| {
        let mut node = json!({"driver": "qcow2", "file": file(&base)});
        let more = more.as_object().unwrap().clone();
        node.as_object_mut().unwrap().extend(more);
        node
    };
    // Everything is mapped.
    let split = in_dir(&dir, "split");
    let data_file = in_dir(&dir, "data");
    let options = format!("data_file={},data_file_raw=on", data_file.display());
    create(&split, &options, 65_536);
    let write = ["-f", "qcow2", "-c", "write -q 0 65536"];
    run(
        "qemu-io",
        &[&write[..], &[split.to_str().unwrap()]].concat(),
    );
    for (node, plain, expected) in [
        (window.clone(), false, bytes[4096..4096 + 65_536].to_vec()),
        (
            json!({"driver": "raw", "offset": 0, "size": 65_536, "file": file(&other)}),
            false,
            bytes[..65_536].to_vec(),
        ),
        (
            json!({"driver": "raw", "file": window.clone()}),
            false,
            bytes[4096..4096 + 65_536].to_vec(),
        ),
        (
            json!({"driver": "raw", "file": file(&other)}),
            true,
            bytes[..65_536].to_vec(),
        ),
        (file(&other), true, bytes[..65_536].to_vec()),
        (
            json!({"driver": "copy-on-read", "file": over(json!({}))}),
            true,
            bytes[..65_536].to_vec(),
        ),
        // The options put there what the header says, or something else.
        (
            over(json!({"backing": {"driver": "raw", "file": file(&other)}})),
            true,
            bytes[..65_536].to_vec(),
        ),
        (
            over(json!({"backing": window})),
            false,
            bytes[4096..4096 + 65_536].to_vec(),
        ),
        (over(json!({"backing": null})), false, vec![0; 65_536]),
        (
            json!({"driver": "null-co", "size": 65_536, "latency-ns": 1}),
            false,
            vec![0; 65_536],
        ),
        (
            json!({"driver": "raw", "offset": 512, "file": {"driver": "null-aio"}}),
            false,
            vec![0; 65_536],
        ),
        (
            json!({"driver": "qcow2", "file": file(&split), "data-file": window}),
            false,
            bytes[4096..4096 + 65_536].to_vec(),
        ),
    ] {
        let reactor = Reactor::for_this_thread().unwrap();
        let graph = Graph::default();
        let mut named = node.clone();
        named["node-name"] = json!("base");
        let options = BlockdevOptions::from_value(&named, Dialect::Json).unwrap();
        let top = reactor.block_on(graph.open(&options)).unwrap();
        let name = graph.header_name(&top).unwrap();
        assert_eq!(name.starts_with('/'), plain, "{name}");
        let format = graph.root(&top).unwrap().chain().top().format.name();
        drop(graph);
        create(&image, "cluster_size=4k", 64 << 10);
        name_backing(&image, &name, Some(format));
        let disk = Disk::open(&image, "qcow2", json!({}));
        assert!(disk.read(0, 65_536) == expected, "{name}");
        disk.close();
        let out = in_dir(&dir, "read");
        let args = ["convert", "-f", "qcow2", "-O", "raw"];
        let paths = [image.to_str().unwrap(), out.to_str().unwrap()];
        run("qemu-img", &[&args[..], &paths].concat());
        assert!(std::fs::read(out).unwrap() == expected, "{name}, to QEMU");
    }
}

/// An image and its backing file in two parts of one file: they share its locks, too.
#[test]
fn parts_of_one_file_are_no_loop() {
    const PART: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let (image, disk) = (in_dir(&dir, "image"), in_dir(&dir, "disk"));
    let name = |offset: u64, size: Option<u64>| {
        let file = json!({"driver": "file", "filename": disk.to_str().unwrap()});
        let mut window = json!({"driver": "raw", "offset": offset, "file": file});
        if let Some(size) = size {
            window["size"] = json!(size);
        }
        format!("json:{window}")
    };
    let outcome = |backing: &str, shared: bool| {
        create(&image, "cluster_size=4k", 64 << 10);
        name_backing(&image, backing, Some("raw"));
        let mut bytes = vec![7; 2 * PART as usize];
        bytes.extend(std::fs::read(&image).unwrap());
        bytes.resize(4 * PART as usize, 9);
        std::fs::write(&disk, bytes).unwrap();
        let reactor = Reactor::for_this_thread().unwrap();
        let graph = Graph::default();
        let open = |node: Value| {
            let options = BlockdevOptions::from_value(&node, Dialect::Json).unwrap();
            reactor.block_on(graph.open(&options))
        };
        let mut file = json!({"driver": "file", "filename": disk.to_str().unwrap()});
        if shared {
            file["node-name"] = json!("disk");
            open(file).unwrap();
            file = json!("disk");
        }
        let window = json!({"driver": "raw", "offset": 2 * PART, "size": PART, "file": file});
        open(json!({"driver": "qcow2", "node-name": "top", "file": window}))
            .map_err(|error| error.to_string())?;
        reactor.block_on(graph.make_writable("top")).unwrap();
        let root = graph.root("top").unwrap();
        let disk = Disk {
            graph,
            root,
            name: "top".into(),
            reactor,
        };
        disk.try_write(4096, &[5; 512]).unwrap();
        let mut expected = vec![7; 64 << 10];
        expected[4096..4608].fill(5);
        assert!(disk.read(0, 64 << 10) == expected, "{backing}");
        disk.close();
        let bytes = std::fs::read(in_dir(&dir, "disk")).unwrap();
        assert!(bytes[..2 * PART as usize].iter().all(|&byte| byte == 7));
        assert!(bytes[3 * PART as usize..].iter().all(|&byte| byte == 9));
        Ok::<_, String>(())
    };
    for shared in [false, true] {
        for (offset, size) in [(PART, 64 << 10), (2 * PART - (64 << 10), 64 << 10)] {
            outcome(&name(offset, Some(size)), shared).unwrap();
        }
        for (offset, size) in [
            (0, None),
            (PART, Some(PART + 512)),
            (3 * PART - 512, Some(512)),
        ] {
            let error = outcome(&name(offset, size), shared).unwrap_err();
            let says = "the image is under itself: the chain is a loop (";
            assert!(error.contains(says) && error.contains("overlap"), "{error}");
        }
        let error = outcome(disk.to_str().unwrap(), shared).unwrap_err();
        assert!(error.contains("the chain is a loop"), "{error}");
    }
}
