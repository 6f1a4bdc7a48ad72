//! Who may write what at the same time: every pair of exports on a graph, beside
//! qemu-storage-daemon.
//!
//! What would be caught: two writers on the same bytes, of which one believes that nobody changes
//! what it has in memory; and exports refused that do no harm.

use serde_json::{Value, json};
use stratablk::error::Result;
use stratablk::graph::Graph;
use stratablk::options::{BlockdevOptions, Dialect};
use stratablk::reactor::Reactor;

use crate::support::*;

/// A graph, and what is exported from it in this order, writable or not.
struct Case {
    nodes: Vec<Value>,
    exports: Vec<(&'static str, bool)>,
}

fn ours(reactor: &Reactor, case: &Case) -> Result<()> {
    let options: Vec<_> = case
        .nodes
        .iter()
        .map(|node| BlockdevOptions::from_value(node, Dialect::Json).unwrap())
        .collect();
    let graph = Graph::default();
    let result = reactor.block_on(async {
        graph.open_all(&options).await?;
        let mut roots = Vec::new();
        for (node, writable) in &case.exports {
            if *writable {
                graph.make_writable(node).await?;
            }
            roots.push(graph.root(node)?);
            let chain = roots.last().unwrap().chain();
            assert!(
                !writable || !chain.top().read_only,
                "{node} cannot be written"
            );
        }
        Ok(())
    });
    reactor.block_on(graph.close());
    result
}

fn theirs(dir: &tempfile::TempDir, case: &Case) -> std::result::Result<(), String> {
    let mut args = Vec::new();
    for node in &case.nodes {
        args.extend(["--blockdev".to_owned(), node.to_string()]);
    }
    for (index, (node, writable)) in case.exports.iter().enumerate() {
        let socket = in_dir(dir, &format!("socket{index}"));
        args.push("--export".into());
        args.push(
            json!({"type": "vhost-user-blk", "id": format!("e{index}"), "node-name": node,
                "writable": writable, "addr": {"type": "unix", "path": socket}})
            .to_string(),
        );
    }
    // It ends with this, after all before.
    args.extend(["--object".into(), "help".into()]);
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let output = output("qemu-storage-daemon", &args);
    for index in 0..case.exports.len() {
        let _ = std::fs::remove_file(in_dir(dir, &format!("socket{index}")));
    }
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[test]
fn writers_are_those_that_qemu_allows() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| in_dir(&dir, name).to_str().unwrap().to_owned();
    let reactor = Reactor::for_this_thread().unwrap();
    std::fs::write(path("raw"), vec![1; 1 << 20]).unwrap();
    for name in ["image", "over"] {
        create(&in_dir(&dir, name), "cluster_size=4k", 1 << 20);
    }
    let file = |node: &str, name: &str| json!({"driver": "file", "node-name": node, "filename": path(name)});
    let raw = |node: &str, file: &str| json!({"driver": "raw", "node-name": node, "file": file});
    let window = |node: &str, file: &str, offset: u64, size: u64| json!({"driver": "raw", "node-name": node, "file": file, "offset": offset, "size": size});
    let qcow2 = |node: &str, file: &str| json!({"driver": "qcow2", "node-name": node, "file": file, "backing": null});
    let over = |node: &str, file: &str, backing: &str| json!({"driver": "qcow2", "node-name": node, "file": file, "backing": backing});
    let filter =
        |node: &str, file: &str| json!({"driver": "copy-on-read", "node-name": node, "file": file});
    let graphs = [
        vec![
            file("f", "raw"),
            raw("r", "f"),
            raw("s", "f"),
            raw("t", "r"),
        ],
        vec![
            file("f", "raw"),
            window("v", "f", 0, 65_536),
            window("w", "f", 131_072, 65_536),
            window("x", "v", 512, 1024),
        ],
        vec![file("f", "image"), qcow2("q", "f"), raw("r", "f")],
        vec![
            file("f", "image"),
            raw("r", "f"),
            qcow2("q", "r"),
            raw("s", "f"),
        ],
        vec![
            file("f", "image"),
            qcow2("q", "f"),
            filter("c", "q"),
            filter("d", "c"),
        ],
        vec![
            file("f", "raw"),
            raw("r", "f"),
            file("g", "image"),
            over("q", "g", "r"),
        ],
        vec![
            file("f", "image"),
            qcow2("q", "f"),
            file("g", "over"),
            over("o", "g", "q"),
        ],
    ];
    let mut refused = 0;
    for nodes in graphs {
        let names: Vec<&'static str> = nodes
            .iter()
            .map(|node| &*node["node-name"].as_str().unwrap().to_owned().leak())
            .collect();
        for (at, first) in names.iter().enumerate() {
            for (other, second) in names.iter().enumerate() {
                // A reader does not mind whether it comes first.
                let with_reader = at < other;
                for (one, two) in [(true, true), (true, false), (false, true)] {
                    if !(one && two || with_reader) {
                        continue;
                    }
                    let case = Case {
                        nodes: nodes.clone(),
                        exports: vec![(first, one), (second, two)],
                    };
                    let what = format!("{:?} on {:?}", case.exports, case.nodes);
                    match (ours(&reactor, &case), theirs(&dir, &case)) {
                        (Ok(()), Ok(())) => {}
                        (Err(ours), Err(theirs)) => {
                            refused += 1;
                            // The same words, without the full stop and what stands before.
                            let ours = ours.to_string();
                            assert!(ours.contains("Permission conflict"), "{what}: {ours}");
                            assert!(theirs.contains(&ours), "{what}: {ours}; theirs: {theirs}");
                        }
                        (ours, theirs) => panic!("{what}: ours: {ours:?}; theirs: {theirs:?}"),
                    }
                }
            }
        }
    }
    assert!(refused > 20, "{refused} were refused");
}

/// Two images in one file, and a data file that belongs to an image.
#[test]
fn images_do_not_share_their_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| in_dir(&dir, name).to_str().unwrap().to_owned();
    let reactor = Reactor::for_this_thread().unwrap();
    create(&in_dir(&dir, "image"), "cluster_size=4k", 1 << 20);
    create(
        &in_dir(&dir, "split"),
        &format!("data_file={}", path("data")),
        1 << 20,
    );
    let file = |node: &str, name: &str| json!({"driver": "file", "node-name": node, "filename": path(name)});
    let twice = |writable: (bool, bool)| Case {
        nodes: vec![
            file("f", "image"),
            json!({"driver": "qcow2", "node-name": "p", "file": "f"}),
            json!({"driver": "qcow2", "node-name": "q", "file": "f"}),
        ],
        exports: vec![("p", writable.0), ("q", writable.1)],
    };
    let mut inside = vec![2; 1 << 20];
    inside.extend(std::fs::read(in_dir(&dir, "image")).unwrap());
    inside.resize(3 << 20, 2);
    std::fs::write(in_dir(&dir, "container"), inside).unwrap();
    // QEMU does not even open this.
    let contained = Case {
        nodes: vec![
            file("f", "container"),
            json!({"driver": "raw", "node-name": "v", "file": "f", "offset": 1 << 20,
                "size": 1 << 20}),
            json!({"driver": "raw", "node-name": "w", "file": "f", "offset": 2 << 20}),
            json!({"driver": "qcow2", "node-name": "q", "file": "v"}),
        ],
        exports: vec![("q", true), ("w", true)],
    };
    let split = |data: bool, image: bool| Case {
        nodes: vec![
            file("f", "split"),
            file("d", "data"),
            json!({"driver": "qcow2", "node-name": "q", "file": "f", "data-file": "d"}),
        ],
        exports: vec![("d", data), ("q", image)],
    };
    for (case, says) in [
        (
            twice((true, true)),
            "unshared by node 'q' (uses node 'f' as 'file' child)",
        ),
        (
            twice((false, true)),
            "unshared by node 'p' (uses node 'f' as 'file' child)",
        ),
        (
            contained,
            "unshared by node 'v' (uses node 'f' as 'file' child)",
        ),
        (
            split(true, false),
            "unshared by node 'q' (uses node 'd' as 'data-file' child)",
        ),
    ] {
        let error = ours(&reactor, &case).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    ours(&reactor, &twice((false, false))).unwrap();
    ours(&reactor, &split(false, true)).unwrap();
}
