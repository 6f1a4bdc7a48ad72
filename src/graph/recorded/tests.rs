//! What would be caught: layers that a stream has let go of and that come back with the options, a
//! base that is opened otherwise than the options say, or is not found; an image that something else has
//! changed and that is served all the same; a record that holds for another image.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use serde_json::{Value, json};

use super::*;
use crate::format::qcow2::create::{CreateOptions, create};
use crate::options::Dialect;
use crate::reactor::Reactor;
use crate::storage::FileStorage;
use crate::storage::OpenFlags;

/// A folder with images: `base`, `mid` over it, and `top` over what a stream has left.
struct Bed {
    dir: tempfile::TempDir,
    reactor: Reactor,
}

impl Bed {
    fn new(top_over: Option<&str>) -> Self {
        let bed = Self {
            dir: tempfile::tempdir().unwrap(),
            reactor: Reactor::for_this_thread().unwrap(),
        };
        bed.image("base", None);
        bed.image("mid", Some("base"));
        bed.image("top", top_over);
        bed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self, name: &str, backing: Option<&str>) {
        std::fs::File::create(self.path(name)).unwrap();
        let flags = OpenFlags {
            writable: true,
            ..OpenFlags::default()
        };
        let storage = FileStorage::open(&self.path(name), flags).unwrap();
        let options = CreateOptions {
            backing: backing.map(header),
            ..CreateOptions::new(1 << 20)
        };
        self.reactor.block_on(create(&storage, &options)).unwrap();
    }

    fn file(&self, name: &str) -> Value {
        json!({"driver": "file", "filename": self.path(name)})
    }

    /// What a stream into `top` has left: `below`, under a name if it had one.
    fn link(&self, below: Option<(&str, Option<&str>)>) -> RecordedLink {
        let text = |name: &str| self.path(name).display().to_string();
        RecordedLink {
            format: "qcow2".to_owned(),
            file: text("top"),
            identity: [0, 0],
            header: below.map(|(file, _)| header(file)),
            certain: true,
            let_go: false,
            below: below.map(|(file, name)| RecordedNode {
                name: name.map(str::to_owned),
                format: "qcow2".to_owned(),
                file: text(file),
                open_as: Backing {
                    name: text(file),
                    format: Some("qcow2".to_owned()),
                },
            }),
        }
    }

    /// The chain under node `n2`, as names and files.
    fn open(&self, list: &[Value], link: RecordedLink) -> Result<Vec<(String, String)>> {
        let list: Vec<BlockdevOptions> = list
            .iter()
            .map(|value| BlockdevOptions::from_value(value, Dialect::Json).unwrap())
            .collect();
        let graph = Graph::default();
        let recorded = Recorded {
            place: "/state/d.state".to_owned(),
            links: vec![link],
            released: HashSet::from(["n1".to_owned(), "f1".to_owned()]),
        };
        self.reactor
            .block_on(graph.open_recorded_all(&list, recorded))?;
        let nodes = graph.chain_nodes("n2").unwrap();
        let root = graph.root("n2").unwrap();
        assert_eq!(root.chain().layers().len(), nodes.len());
        let file = |node: &Node| {
            let name = node.filename.file_name().unwrap();
            name.to_str().unwrap().to_owned()
        };
        Ok(nodes
            .iter()
            .map(|node| (node.name.clone(), file(node)))
            .collect())
    }

    /// All three by name.
    fn named(&self) -> Vec<Value> {
        vec![
            json!({"driver": "qcow2", "node-name": "n0", "file": self.file("base")}),
            json!({"driver": "file", "node-name": "f1", "filename": self.path("mid")}),
            json!({"driver": "qcow2", "node-name": "n1", "file": "f1", "backing": "n0"}),
            json!({"driver": "qcow2", "node-name": "n2", "file": self.file("top"), "backing": "n1"}),
        ]
    }

    /// The layers of the top written inside it.
    fn nested(&self, names: bool) -> Vec<Value> {
        let mut base = json!({"driver": "qcow2", "file": self.file("base")});
        let mut mid = json!({"driver": "qcow2", "file": self.file("mid")});
        if names {
            base["node-name"] = json!("n0");
            mid["node-name"] = json!("n1");
        }
        mid["backing"] = base;
        vec![
            json!({"driver": "qcow2", "node-name": "n2", "file": self.file("top"),
            "backing": mid}),
        ]
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        Reactor::leave_thread();
    }
}

fn header(name: &str) -> Backing {
    Backing {
        name: name.to_owned(),
        format: Some("qcow2".to_owned()),
    }
}

fn files(chain: &[(String, String)]) -> Vec<&str> {
    chain.iter().map(|(_, file)| file.as_str()).collect()
}

#[test]
fn nothing_is_under_an_image_that_took_in_all() {
    let bed = Bed::new(None);
    for list in [bed.named(), bed.nested(false), bed.nested(true)] {
        let chain = bed.open(&list, bed.link(None)).unwrap();
        assert_eq!(files(&chain), ["top"]);
    }
}

#[test]
fn the_base_is_the_node_that_the_options_have() {
    let bed = Bed::new(Some("base"));
    let link = || bed.link(Some(("base", Some("n0"))));
    for list in [bed.named(), bed.nested(true)] {
        let chain = bed.open(&list, link()).unwrap();
        assert_eq!(chain[1], ("n0".to_owned(), "base".to_owned()));
        assert_eq!(chain.len(), 2);
    }
    // Without a name, wherever it is.
    let link = bed.link(Some(("base", None)));
    let chain = bed.open(&bed.nested(false), link.clone()).unwrap();
    assert_eq!(files(&chain), ["top", "base"]);
    let mut list = bed.named();
    list.remove(0);
    list[1] = json!({"driver": "qcow2", "node-name": "n1", "file": "f1"});
    let chain = bed.open(&list, link).unwrap();
    assert_eq!(files(&chain), ["top", "base"]);
}

#[test]
fn layers_that_were_let_go_of_need_not_be_there() {
    let bed = Bed::new(Some("base"));
    std::fs::remove_file(bed.path("mid")).unwrap();
    let link = || bed.link(Some(("base", Some("n0"))));
    for list in [bed.named(), bed.nested(true)] {
        let chain = bed.open(&list, link()).unwrap();
        assert_eq!(files(&chain), ["top", "base"]);
    }
    // Known to have been under it alone: any other one is missed.
    let mut list = bed.named();
    list.push(json!({"driver": "file", "node-name": "f9", "filename": bed.path("mid")}));
    bed.open(&list, link()).unwrap_err();
}

#[test]
fn a_base_that_the_options_do_not_have_is_opened_as_recorded() {
    let bed = Bed::new(Some("base"));
    let only = [
        json!({"driver": "qcow2", "node-name": "n2", "file": bed.file("top"),
        "backing": null}),
    ];
    let chain = bed
        .open(&only, bed.link(Some(("base", Some("n0")))))
        .unwrap();
    assert_eq!(chain[1], ("n0".to_owned(), "base".to_owned()));
}

#[test]
fn a_header_that_something_else_has_changed_is_told() {
    let bed = Bed::new(Some("mid"));
    let text = bed
        .open(&bed.named(), bed.link(None))
        .unwrap_err()
        .to_string();
    for word in [
        "top: ",
        "'mid'",
        "/state/d.state",
        "no backing file",
        "remove",
    ] {
        assert!(text.contains(word), "{text}");
    }
    // What was only about to be is another matter.
    let link = RecordedLink {
        certain: false,
        ..bed.link(None)
    };
    let chain = bed.open(&bed.named(), link).unwrap();
    assert_eq!(files(&chain), ["top", "mid", "base"]);
}

#[test]
fn a_record_holds_for_its_image_alone() {
    let bed = Bed::new(None);
    let link = RecordedLink {
        file: bed.path("other").display().to_string(),
        ..bed.link(None)
    };
    let chain = bed.open(&bed.named(), link).unwrap();
    assert_eq!(files(&chain), ["top", "mid", "base"]);
}

/// Would catch an image that cannot be made under a name that was used before, where the file system
/// does not tell files from each other.
#[test]
fn a_new_image_under_the_path_of_one_that_was_let_go_of_is_another_one() {
    let bed = Bed::new(Some("mid"));
    let let_go = RecordedLink {
        let_go: true,
        ..bed.link(None)
    };
    let chain = bed.open(&bed.named(), let_go.clone()).unwrap();
    assert_eq!(files(&chain), ["top", "mid", "base"]);
    // As the stream has left it, it is no new one.
    bed.image("top", None);
    let chain = bed.open(&bed.named(), let_go).unwrap();
    assert_eq!(files(&chain), ["top"]);
}

/// Would catch a header that calls the image under a filter raw: what is read from it then is
/// metadata.
#[test]
fn a_filter_is_recorded_by_the_format_of_its_image() {
    let bed = Bed::new(None);
    let graph = Graph::default();
    let list = [
        json!({"driver": "qcow2", "node-name": "n0", "file": bed.file("base")}),
        json!({"driver": "copy-on-read", "node-name": "c", "file": "n0"}),
    ];
    let list = list.map(|value| BlockdevOptions::from_value(&value, Dialect::Json).unwrap());
    bed.reactor.block_on(graph.open_all(&list)).unwrap();
    let filter = graph.node("c").unwrap();
    let path = bed.path("base").display().to_string();
    assert_eq!(graph.header_name("c").unwrap(), path);
    assert_eq!(filter.format_name(), "qcow2");
}

/// Parts of a file have its identity, each of them.
#[test]
fn a_record_of_a_part_of_a_file_is_about_that_part_alone() {
    let part = |path: &str, offset: u64| {
        let file = json!({"driver": "file", "filename": path});
        format!(
            "json:{}",
            json!({"driver": "raw", "offset": offset, "file": file})
        )
    };
    let identity = [7, 7];
    let is_same = |one: &str, other: &str| is_same_image((one, identity), (other, identity));
    assert!(is_same("/gone/a", "/gone/b"));
    assert!(is_same(&part("/gone/a", 512), &part("/gone/b", 512)));
    assert!(!is_same(&part("/gone/a", 512), &part("/gone/a", 1024)));
    assert!(!is_same(&part("/gone/a", 512), "/gone/a"));
}
