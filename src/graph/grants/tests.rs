//! What would be caught: two holders that harm each other; two that do not, of which one is
//! refused; rights that stay when their holder is gone; nodes that change under a job; an image
//! that stays open for writing without a writer, or is closed under one.

#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::super::{FilterKind, Node};
use super::*;
use crate::format::qcow2::create::{CreateOptions, create};
use crate::options::{BlockdevOptions, Dialect};
use crate::reactor::Reactor;
use crate::storage::memory::MemoryStorage;

struct Bed {
    dir: tempfile::TempDir,
    reactor: Reactor,
    graph: Graph,
}

impl Drop for Bed {
    fn drop(&mut self) {
        Reactor::leave_thread();
    }
}

impl Bed {
    /// `top` over `mid` over `base`; the filter `seen` over `top`; `raw` over `loose`, a file.
    fn new() -> Self {
        let bed = Self {
            dir: tempfile::tempdir().unwrap(),
            reactor: Reactor::for_this_thread().unwrap(),
            graph: Graph::default(),
        };
        let memory = MemoryStorage::new(Vec::new());
        let options = CreateOptions::new(1 << 20);
        let made = create(&memory, &options);
        bed.reactor.block_on(made).unwrap();
        for name in ["top", "mid", "base", "loose"] {
            std::fs::write(bed.dir.path().join(name), memory.snapshot()).unwrap();
        }
        bed.open(bed.image("base", Value::Null)).unwrap();
        bed.open(bed.image("mid", json!("base"))).unwrap();
        bed.open(bed.image("top", json!("mid"))).unwrap();
        bed.open(json!({"driver": "copy-on-read", "node-name": "seen", "file": "top"}))
            .unwrap();
        bed.open(bed.file("loose")).unwrap();
        bed.open(json!({"driver": "raw", "node-name": "raw", "file": "loose"}))
            .unwrap();
        bed
    }

    fn file(&self, name: &str) -> Value {
        let path = self.dir.path().join(name);
        json!({"driver": "file", "node-name": name, "filename": path})
    }

    fn image(&self, name: &str, backing: Value) -> Value {
        let mut file = self.file(name);
        file["node-name"] = json!(format!("f-{name}"));
        json!({"driver": "qcow2", "node-name": name, "file": file, "backing": backing})
    }

    fn open(&self, node: Value) -> Result<String> {
        let options = BlockdevOptions::from_value(&node, Dialect::Json).unwrap();
        self.reactor.block_on(self.graph.open(&options))
    }

    fn access(&self, request: &Request) -> Result<Grant> {
        self.reactor.block_on(self.graph.access(request.clone()))
    }

    fn give_back(&self, grant: Grant) {
        self.reactor.block_on(grant.give_back()).unwrap();
    }

    fn is_writable(&self, name: &str) -> bool {
        !self.graph.node(name).unwrap().layer.read_only
    }

    fn stream(&self, layers: &[&str]) -> Request {
        let layers: Vec<_> = layers.iter().map(|&layer| layer.to_owned()).collect();
        Request::stream(&self.graph.state(), "j", &layers)
    }
}

fn export(node: &str, writable: bool) -> Request {
    Request::disk(Holder::Export(format!("e-{node}")), node, writable)
}

fn resize(node: &str) -> Request {
    let demand = Demand {
        does: Rights::READ | Rights::WRITE | Rights::RESIZE,
        tolerates: Rights::READ | Rights::WRITE_UNCHANGED,
    };
    Request::new(Holder::Tool).with(node, "root", demand)
}

/// Every two holders, in both orders: what the second is refused for.
#[test]
fn holders_that_harm_each_other_are_refused() {
    let bed = Bed::new();
    let conflict = |node: &str, rights: &str, one: &str, other: &str| {
        vec![format!(
            "Permission conflict on node '{node}': permissions '{rights}' are both required \
             by {one} and unshared by {other}."
        )]
    };
    let root = |node: &str| format!("an unnamed block device (uses node '{node}' as 'root' child)");
    let between = "stream job 'j' (uses node 'mid' as 'intermediate node' child)";
    let main = "stream job 'j' (uses node 'top' as 'active node' child)";
    let below = "node 'raw' (uses node 'loose' as 'file' child)";
    let under =
        |top: &str, node: &str| format!("node '{top}' (uses node '{node}' as 'backing' child)");
    let layers = || bed.stream(&["top", "mid"]);
    let cases = [
        // Exports tolerate everything.
        (export("top", true), export("top", true), Vec::new()),
        (export("top", true), export("seen", true), Vec::new()),
        (export("top", true), export("top", false), Vec::new()),
        (export("mid", true), export("top", false), Vec::new()),
        (export("mid", true), export("top", true), Vec::new()),
        (export("base", false), layers(), Vec::new()),
        (export("raw", true), export("loose", true), Vec::new()),
        // A guest may write what is streamed into, and nothing between.
        (export("top", true), layers(), Vec::new()),
        (export("seen", true), layers(), Vec::new()),
        (export("mid", false), layers(), Vec::new()),
        // Nor do two streams in one chain mind each other.
        (bed.stream(&["base"]), layers(), Vec::new()),
        (
            export("base", true),
            layers(),
            conflict("base", "write", &root("base"), &under("mid", "base")),
        ),
        (
            export("mid", true),
            layers(),
            conflict("mid", "write", &root("mid"), between),
        ),
        // The size is for one alone.
        (
            resize("top"),
            layers(),
            conflict("top", "resize", &root("top"), main),
        ),
        (
            resize("raw"),
            export("loose", true),
            conflict("loose", "write", &root("loose"), below),
        ),
        (
            resize("raw"),
            export("raw", true),
            conflict("raw", "write", &root("raw"), &root("raw")),
        ),
        (resize("raw"), export("raw", false), Vec::new()),
        (
            resize("top"),
            export("mid", true),
            conflict("mid", "write", &root("mid"), &under("top", "mid")),
        ),
    ];
    for (one, other, refused) in cases {
        let second = refused.get(1).or(refused.first());
        for (first, second, refused) in [(&one, &other, refused.first()), (&other, &one, second)] {
            let held = bed.access(first).unwrap();
            let found = bed.access(second).map_err(|error| error.to_string());
            let what = format!("{first:?}, then {second:?}");
            match (found, refused) {
                (Ok(grant), None) => bed.give_back(grant),
                (Err(text), Some(wanted)) => assert_eq!(text, *wanted, "{what}"),
                (found, _) => panic!("{what}: {found:?}"),
            }
            bed.give_back(held);
            let again = bed.access(second).unwrap();
            bed.give_back(again);
            for node in ["top", "mid", "base", "seen", "raw", "loose"] {
                assert!(!bed.is_writable(node), "{what}: '{node}' is left open");
            }
        }
    }
}

#[test]
fn a_grant_is_seen_before_what_it_is_for_is_ready() {
    let bed = Bed::new();
    let pending = bed.graph.grant(export("mid", true)).unwrap();
    assert!(!bed.is_writable("mid"));
    bed.access(&bed.stream(&["top", "mid"])).unwrap_err();
    // Nor is anything opened that does not go with it.
    let pending_resize = bed.graph.grant(resize("raw")).unwrap();
    let over = json!({"driver": "qcow2", "node-name": "late", "file": "loose"});
    let text = bed.open(over.clone()).unwrap_err().to_string();
    let wanted = "permissions 'write, resize' are both required by node 'raw' (uses node \
                  'loose' as 'file' child) and unshared by node 'late'";
    assert!(text.contains(wanted), "{text}");
    assert!(bed.graph.node("late").is_err());
    drop((pending, pending_resize));
    bed.open(over).unwrap();
    let grant = bed.access(&bed.stream(&["top", "mid"])).unwrap();
    bed.give_back(grant);
    let text = bed.access(&export("raw", true)).unwrap_err().to_string();
    assert!(text.contains("unshared by node 'late'"), "{text}");
}

#[test]
fn an_image_is_open_for_writing_while_a_grant_needs_it() {
    let bed = Bed::new();
    let grants = ["top", "seen", "top"].map(|node| bed.access(&export(node, true)).unwrap());
    let reader = bed.access(&export("top", false)).unwrap();
    for grant in grants {
        assert!(bed.is_writable("top") && bed.is_writable("seen"));
        bed.give_back(grant);
    }
    assert!(!bed.is_writable("top") && !bed.is_writable("seen"));
    bed.give_back(reader);
    // One that could not be had leaves nothing behind.
    let path = bed.dir.path().join("base");
    let mut file = bed.image("base", Value::Null);
    file["node-name"] = json!("again");
    file["file"]["node-name"] = json!("f-again");
    bed.open(file).unwrap();
    let demand = Demand {
        does: Rights::WRITE,
        tolerates: Rights::ALL,
    };
    let both = Request::new(Holder::Tool).with("top", "root", demand);
    let both = both.with("base", "root", demand);
    let text = bed.access(&both).unwrap_err().to_string();
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    assert!(!bed.is_writable("top") && !bed.is_writable("base"));
    bed.access(&resize("top")).unwrap();
}

/// By several threads, of which every second one gives back at once what it has.
#[test]
fn an_image_is_prepared_once_for_all_who_write_it() {
    let bed = Bed::new();
    let (count, graph) = (4, &bed.graph);
    let barrier = std::sync::Barrier::new(count);
    let faults = std::sync::Mutex::new(Vec::new());
    // None panics, since the others would wait for it.
    let (meet, fault) = (&barrier, |text: String| faults.lock().unwrap().push(text));
    let fault = &fault;
    std::thread::scope(|scope| {
        for thread in 0..count {
            scope.spawn(move || {
                let reactor = Reactor::for_this_thread().unwrap();
                let layer = || graph.node("top").unwrap().layer;
                let give_back = |grant: Grant| match reactor.block_on(grant.give_back()) {
                    Ok(()) => {}
                    Err(error) => fault(error.to_string()),
                };
                for _ in 0..20 {
                    meet.wait();
                    let grant = reactor.block_on(graph.access(export("top", true)));
                    let seen = layer();
                    let kept = match grant {
                        Ok(grant) if thread % 2 == 0 => {
                            give_back(grant);
                            None
                        }
                        Ok(grant) => Some(grant),
                        Err(error) => {
                            fault(error.to_string());
                            None
                        }
                    };
                    meet.wait();
                    if kept.is_some() && layer().read_only {
                        fault("closed under a writer".to_owned());
                    }
                    if kept.is_some() && !Arc::ptr_eq(&seen, &layer()) {
                        fault("opened twice".to_owned());
                    }
                    meet.wait();
                    kept.into_iter().for_each(give_back);
                }
                Reactor::leave_thread();
            });
        }
    });
    assert_eq!(*faults.lock().unwrap(), Vec::<String>::new());
    assert!(!bed.is_writable("top"));
}

#[test]
fn what_a_job_relies_on_stays() {
    let bed = Bed::new();
    let names = ["top", "mid"].map(str::to_owned);
    let lease = bed.graph.reserve(&names, "stream").unwrap();
    let busy = bed.graph.reserve(&names[1..], "stream").unwrap_err();
    assert_eq!(
        busy,
        Busy {
            index: 0,
            kind: "stream"
        }
    );
    assert_eq!(bed.graph.reserved_by("mid"), Some("stream"));
    let grant = bed.access(&bed.stream(&["top", "mid"])).unwrap();
    for (node, backing, child) in [("top", None, "mid"), ("mid", None, "base")] {
        let text = bed
            .graph
            .set_backing(node, backing)
            .unwrap_err()
            .to_string();
        assert_eq!(
            text,
            format!("Cannot change frozen 'backing' link from '{node}' to '{child}'")
        );
    }
    bed.graph.remove("seen").unwrap();
    let text = bed.graph.remove("top").unwrap_err().to_string();
    assert_eq!(
        text,
        "Node 'top' is busy: block device is in use by block job: stream"
    );
    drop(lease);
    let text = bed.graph.remove("top").unwrap_err().to_string();
    assert_eq!(text, "Block device top is in use");
    grant.set_backing("top", Some("base")).unwrap();
    assert_eq!(bed.graph.chain_nodes("top").unwrap().len(), 2);
    bed.give_back(grant);
    bed.graph.set_backing("top", None).unwrap();
    bed.graph.remove("top").unwrap();
    assert_eq!(bed.graph.reserved_by("mid"), None);
}

#[test]
fn an_image_that_somebody_writes_keeps_its_size() {
    use crate::chain::resize::Resize;
    use crate::format::qcow2::Preallocation;

    let bed = Bed::new();
    let wanted = Resize {
        size: 2 << 20,
        shrink: false,
        preallocation: Preallocation::Off,
    };
    let guest = bed.access(&export("top", true)).unwrap();
    let resized = bed.reactor.block_on(bed.graph.resize("top", wanted));
    let text = resized.unwrap_err().to_string();
    assert!(text.contains("permissions 'write' are both"), "{text}");
    bed.give_back(guest);
    let resized = bed.reactor.block_on(bed.graph.resize("top", wanted));
    assert_eq!(resized.unwrap(), 2 << 20);
}

/// While the storage of an image hangs, nobody takes what does not go with its grant, and nobody
/// waits for it.
#[test]
fn a_grant_is_seen_while_its_image_is_opened() {
    use crate::chain::Layer;
    use crate::format::{Format, Raw};
    use crate::graph::Node;
    use crate::storage::fault::{Call, FaultStorage, Gate};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    let bed = Bed::new();
    let gate = Arc::new(Gate::default());
    let memory = Arc::new(MemoryStorage::new(vec![0; 1 << 20]));
    let storage = Arc::new(FaultStorage::over(memory).with_gate(&gate));
    let add = |options: Value, child: Option<&str>| {
        let options = BlockdevOptions::from_value(&options, Dialect::Json).unwrap();
        let layer = Layer {
            name: options.node_name.clone().unwrap(),
            format: Format::Raw(Raw::new(1 << 20)),
            storage: storage.clone(),
            read_only: true,
            discard: false,
            copy_on_read: false,
        };
        let node = Node::new(options, layer, "/slow".into());
        bed.graph.add(node.over(Role::File, child)).unwrap();
    };
    add(bed.file("slow"), None);
    let raw = json!({"driver": "raw", "node-name": "disk", "file": "slow"});
    add(raw, Some("slow"));
    gate.shut(&[Call::SetAccess]);
    let graph = bed.graph.clone();
    bed.reactor.spawn(async move {
        let grant = graph.access(export("disk", true)).await.unwrap();
        grant.keep();
    });
    let deadline = Instant::now() + Duration::from_secs(30);
    let run_until = |done: &dyn Fn() -> bool| {
        while !done() {
            assert!(Instant::now() < deadline, "it never comes");
            if !bed.reactor.turn() {
                bed.reactor.wait(Some(Duration::from_millis(1)));
            }
        }
    };
    run_until(&|| gate.hung() > 0);
    assert!(!bed.is_writable("disk"));
    let text = bed.graph.grant(resize("disk")).unwrap_err().to_string();
    assert!(text.contains("permissions 'write' are both"), "{text}");
    let reader = bed.access(&export("disk", false)).unwrap();
    bed.give_back(reader);
    gate.open();
    run_until(&|| bed.reactor.tasks() == 0);
    assert!(bed.is_writable("disk"));
}

/// What would be caught: somebody who sees a base change; a guest or a reader who is refused though the
/// layers hide that from them; a commit that stands in its own way at the end, or lets go of what it
/// has when its end fails.
#[test]
fn nobody_reads_a_base_while_it_is_committed_into() {
    let bed = Bed::new();
    let commit = |overlay: Option<&str>, layers: &[&str]| {
        let layers: Vec<_> = layers.iter().map(|&layer| layer.to_owned()).collect();
        let base = ("base", Rights::NONE);
        Request::commit(&bed.graph.state(), "j", overlay, &layers, base)
    };
    let both = [commit(Some("top"), &["mid"]), commit(None, &["top", "mid"])];
    for (active, request) in both.into_iter().enumerate() {
        let guest = bed.access(&export("seen", true)).unwrap();
        let job = bed.access(&request).unwrap();
        assert!(bed.is_writable("base"));
        drop(bed.access(&export("top", true)).unwrap());
        let between = bed.access(&export("mid", false));
        assert_eq!(between.is_ok(), active == 0, "what lies between changes");
        let text = bed.access(&export("base", false)).unwrap_err().to_string();
        assert!(
            text.contains("'consistent read' are both required by"),
            "{text}"
        );
        let role = ["base", "target"][active];
        assert!(
            text.contains(&format!("commit job 'j' (uses node 'base' as '{role}'")),
            "{text}"
        );
        bed.access(&resize("base")).unwrap_err();
        bed.graph.set_backing("mid", None).unwrap_err();
        // An end that fails is none: this one would let nobody write the base, which the job does.
        let mut transaction = bed.graph.transaction().by(&job).ending();
        transaction.set_child("mid", Role::Backing, None).unwrap();
        let _taken = transaction.taking(resize("base"));
        bed.graph.commit(transaction).unwrap_err();
        bed.access(&export("base", false)).unwrap_err();
        assert_eq!(bed.graph.chain_nodes("mid").unwrap().len(), 2);
        // One that does not puts the base under the guest.
        let mut transaction = bed.graph.transaction().by(&job).ending();
        let taken = match active {
            0 => {
                transaction
                    .set_child("top", Role::Backing, Some("base"))
                    .unwrap();
                None
            }
            _ => {
                transaction.replace("top", "base").unwrap();
                Some(transaction.taking(export("base", true)))
            }
        };
        drop(bed.graph.commit(transaction).unwrap());
        let moved = taken.map(|taken| taken.grant(&bed.graph));
        let expected: &[&str] = [&["seen", "base"][..], &["seen"]][active];
        let nodes = bed.graph.chain_nodes("seen").unwrap();
        let names: Vec<_> = nodes.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, expected);
        drop(bed.access(&export("base", false)).unwrap());
        bed.give_back(job);
        // The guest still writes it, if it is there.
        assert_eq!(bed.is_writable("base"), active == 1);
        if let Some(moved) = moved {
            drop(guest);
            bed.give_back(moved);
        } else {
            bed.give_back(guest);
            bed.graph.set_backing("top", Some("mid")).unwrap();
        }
    }
}

/// Of a node that was opened before a filter had its name and is published after that, and of what clients
/// see.
#[test]
fn a_name_is_a_nodes_or_a_filters() {
    let bed = Bed::new();
    let lease = bed.graph.reserve(&["top".to_owned()], "stream").unwrap();
    let filter = |name: &str| JobFilter {
        name: name.to_owned(),
        named: true,
        kind: FilterKind::Stream,
        job: "j".to_owned(),
        node: "top".to_owned(),
        overlay: None,
        top: None,
    };
    let opened = |name: &str| {
        let node = bed.graph.node("raw").unwrap();
        let name = name.to_owned();
        let mut transaction = bed.graph.transaction();
        transaction.add(Node { name, ..node }).unwrap();
        transaction
    };
    let duplicate = |name: &str| format!("Duplicate nodes with node-name='{name}'");
    let taken = lease.show_filter(filter("mid")).unwrap_err();
    assert_eq!(taken.to_string(), duplicate("mid"));
    let early = opened("F");
    lease.show_filter(filter("F")).unwrap();
    let refused = bed.graph.commit(early).unwrap_err();
    assert_eq!(refused.to_string(), duplicate("F"));
    assert!(bed.graph.node("F").is_err() && bed.graph.has_name("F"));
    let child = |state: &State, of: &str| {
        let node = state.node(of).unwrap();
        node.child(Role::Filtered).map(str::to_owned)
    };
    let shown = bed.graph.shown();
    assert_eq!(child(&shown, "seen").as_deref(), Some("F"));
    assert_eq!(child(&shown, "F").as_deref(), Some("top"));
    assert_eq!(child(&bed.graph.state(), "seen").as_deref(), Some("top"));
    let other = bed.graph.reserve(&["mid".to_owned()], "stream").unwrap();
    let taken = other.show_filter(filter("F")).unwrap_err();
    assert_eq!(taken.to_string(), duplicate("F"));
    drop(lease);
    assert_eq!(bed.graph.filters(), []);
    drop(bed.graph.commit(opened("F")).unwrap());
}
