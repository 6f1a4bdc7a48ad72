//! What would be caught: a transaction of which a part is done, a reader that sees half of one, a
//! chain that is not what the graph says, nodes that go while they are used or stay when they are
//! not; a change that is not made on the owner's thread, or that waits for itself there.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::format::Raw;
use crate::options::{BlockdevOptions, Dialect};
use crate::storage::memory::MemoryStorage;

const DEADLINE: Duration = Duration::from_secs(30);

/// A layer in memory, which is known by its size in sectors.
fn layer(name: &str, sectors: u64) -> Layer {
    Layer {
        name: name.to_owned(),
        format: Format::Raw(Raw::new(sectors * 512)),
        storage: Arc::new(MemoryStorage::new(Vec::new())),
        read_only: true,
        discard: true,
        copy_on_read: false,
    }
}

fn options(value: &Value) -> BlockdevOptions {
    BlockdevOptions::from_value(value, Dialect::Json).unwrap()
}

/// A node over a file that is not there.
fn node(name: &str, sectors: u64) -> Node {
    let options = options(&json!({"driver": "raw", "node-name": name, "file": "x"}));
    Node::new(options, layer(name, sectors), PathBuf::from("/disk"))
}

fn filter(name: &str, of: &str) -> Node {
    let options = options(&json!({"driver": "copy-on-read", "node-name": name, "file": of}));
    let node = Node::new(options, layer(name, 99), PathBuf::from("/disk"));
    node.over(Role::Filtered, Some(of))
}

/// A graph as a table: sectors, child, and whether a user has named it.
type Model = BTreeMap<usize, (u64, Option<usize>, bool)>;

#[derive(Clone, Debug)]
enum Change {
    Add(usize, Option<usize>, bool),
    Remove(usize),
    Layer(usize, u64),
    Child(usize, Option<usize>),
}

fn name(node: usize) -> String {
    format!("n{node}")
}

fn model_chain(model: &Model, top: usize) -> Vec<u64> {
    let mut chain = Vec::new();
    let mut next = Some(top);
    while let Some(node) = next {
        chain.push(model[&node].0);
        next = model[&node].1;
    }
    chain
}

fn is_under(model: &Model, node: usize, top: usize) -> bool {
    let mut next = Some(top);
    while let Some(at) = next {
        if at == node {
            return true;
        }
        next = model[&at].1;
    }
    false
}

/// `model` after all `changes`; `None`: one of them cannot be made. Tops of disks stay.
fn after(mut model: Model, changes: &[Change], tops: &[usize]) -> Option<Model> {
    let mut frees = false;
    for change in changes {
        match *change {
            Change::Add(node, child, named) => {
                let known = child.is_none_or(|child| model.contains_key(&child));
                if !known || model.contains_key(&node) {
                    return None;
                }
                model.insert(node, (1, child, named));
            }
            Change::Remove(node) => {
                let used = model.values().any(|other| other.1 == Some(node));
                if used || model.remove(&node).is_none() {
                    return None;
                }
                frees = true;
            }
            Change::Layer(node, sectors) => model.get_mut(&node)?.0 = sectors,
            Change::Child(node, child) => {
                if let Some(child) = child
                    && (!model.contains_key(&child) || is_under(&model, node, child))
                {
                    return None;
                }
                model.get_mut(&node)?.1 = child;
                frees = true;
            }
        }
    }
    if tops.iter().any(|top| !model.contains_key(top)) {
        return None;
    }
    let named = |node: &usize| model[node].2 || tops.contains(node);
    let roots: Vec<_> = model.keys().copied().filter(named).collect();
    let kept = model.clone();
    if frees {
        model.retain(|node, _| roots.iter().any(|root| is_under(&kept, *node, *root)));
    }
    Some(model)
}

fn make(transaction: &mut Transaction, change: &Change) -> Result<()> {
    let child_name = |child: Option<usize>| child.map(name);
    match *change {
        Change::Add(at, child, named) => {
            let node = node(&name(at), 1).over(Role::Backing, child_name(child).as_deref());
            transaction.add(Node {
                implicit: !named,
                ..node
            })
        }
        Change::Remove(at) => transaction.remove(&name(at)),
        Change::Layer(at, sectors) => {
            transaction.set_layer(&name(at), Arc::new(layer(&name(at), sectors)))
        }
        Change::Child(at, child) => {
            transaction.set_child(&name(at), Role::Backing, child_name(child).as_deref())
        }
    }
}

fn table(state: &State) -> Model {
    let number = |name: &str| name[1..].parse::<usize>().unwrap();
    let entry = |node: &Arc<Node>| {
        let child = node.child(Role::Backing).map(number);
        let sectors = node.layer.format.size() / 512;
        (number(&node.name), (sectors, child, !node.implicit))
    };
    state.nodes().iter().map(entry).collect()
}

fn sectors(root: &Root) -> Vec<u64> {
    let chain = root.chain();
    let layers = chain.layers().iter();
    layers.map(|layer| layer.format.size() / 512).collect()
}

fn a_change() -> impl Strategy<Value = Change> {
    let node = 0..6usize;
    let child = proptest::option::of(0..6usize);
    prop_oneof![
        4 => (node.clone(), child.clone(), any::<bool>())
            .prop_map(|(node, child, named)| Change::Add(node, child, named)),
        1 => node.clone().prop_map(Change::Remove),
        2 => (node.clone(), 2..9u64).prop_map(|(node, sectors)| Change::Layer(node, sectors)),
        3 => (node, child).prop_map(|(node, child)| Change::Child(node, child)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Transactions are made on a graph that others change before they are published.
    #[test]
    fn a_transaction_happens_whole_or_not_at_all(
        all in proptest::collection::vec(
            (proptest::collection::vec(a_change(), 1..5), any::<bool>()), 1..25)
    ) {
        let graph = Graph::default();
        let mut model = Model::new();
        let mut roots: Vec<(usize, Arc<Root>)> = Vec::new();
        let mut begun = None;
        for (changes, late) in all {
            let mut transaction = graph.transaction();
            let made = changes.iter().try_for_each(|change| make(&mut transaction, change));
            let ready = made.is_ok().then_some((transaction, changes));
            // Published now, or after the next one.
            let turn = match late {
                true => ready.and_then(|ready| begun.replace(ready)).into_iter().collect(),
                false => ready.into_iter().chain(begun.take()).collect::<Vec<_>>(),
            };
            for (transaction, changes) in turn {
                let old = graph.state();
                let tops: Vec<_> = roots.iter().map(|(top, _)| *top).collect();
                let chains: Vec<_> = roots.iter().map(|(_, root)| root.chain()).collect();
                let published = graph.commit(transaction);
                match after(model.clone(), &changes, &tops) {
                    Some(new) => {
                        prop_assert!(published.is_ok(), "{changes:?}: {published:?}");
                        model = new;
                    }
                    None => {
                        prop_assert!(published.is_err(), "{changes:?}");
                        prop_assert!(Arc::ptr_eq(&old, &graph.state()));
                        for ((_, root), chain) in roots.iter().zip(chains) {
                            prop_assert!(Arc::ptr_eq(&root.chain(), &chain));
                        }
                    }
                }
                prop_assert_eq!(table(&graph.state()), model.clone());
                for (top, root) in &roots {
                    prop_assert_eq!(sectors(root), model_chain(&model, *top));
                }
            }
            let next = roots.len();
            if model.contains_key(&next) {
                roots.push((next, graph.root(&name(next)).unwrap()));
            }
        }
    }
}

#[test]
fn a_reader_sees_the_old_value_or_the_new_one() {
    let graph = Graph::default();
    for name in ["x", "y", "a", "b"] {
        graph.add(node(name, 1)).unwrap();
    }
    let ended = AtomicBool::new(false);
    let put = |below: &str, sectors: u64| {
        let mut transaction = graph.transaction();
        for name in ["a", "b"] {
            let layer = Arc::new(layer(name, sectors));
            transaction.set_layer(name, layer).unwrap();
            transaction
                .set_child(name, Role::Backing, Some(below))
                .unwrap();
        }
        graph.commit(transaction).unwrap();
    };
    put("x", 1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..2000 {
                put("y", 2);
                put("x", 1);
            }
            ended.store(true, Ordering::Release);
        });
        while !ended.load(Ordering::Acquire) {
            let state = graph.state();
            let seen = ["a", "b"].map(|name| {
                let node = state.node(name).unwrap();
                let sectors = node.layer.format.size() / 512;
                (node.child(Role::Backing).unwrap(), sectors)
            });
            assert!(
                seen == [("x", 1); 2] || seen == [("y", 2); 2],
                "half of a change: {seen:?}"
            );
        }
    });
}

#[test]
fn a_filter_has_the_layer_of_what_is_under_it() {
    let graph = Graph::default();
    let mut transaction = graph.transaction();
    transaction.add(node("base", 1)).unwrap();
    transaction
        .add(node("image", 2).over(Role::Backing, Some("base")))
        .unwrap();
    transaction.add(filter("inner", "image")).unwrap();
    transaction.add(filter("outer", "inner")).unwrap();
    // Another layer is put there while this is prepared.
    graph.commit(transaction).unwrap();
    let mut late = graph.transaction();
    late.add(filter("late", "image")).unwrap();
    let root = graph.root("outer").unwrap();
    assert_eq!(sectors(&root), [2, 1]);
    let written = Layer {
        read_only: false,
        ..layer("image", 7)
    };
    graph.replace_layer("image", Arc::new(written)).unwrap();
    graph.commit(late).unwrap();
    for top in ["outer", "inner", "late"] {
        let chain = graph.root(top).unwrap().chain();
        assert_eq!(sectors(&graph.root(top).unwrap()), [7, 1], "{top}");
        let layer = chain.top();
        assert_eq!(layer.name, top);
        assert!(layer.copy_on_read && !layer.read_only, "{top}");
    }
    assert_eq!(sectors(&root), [7, 1]);
    assert!(!graph.node("image").unwrap().layer.copy_on_read);
    graph.set_backing("image", None).unwrap();
    assert_eq!(sectors(&root), [7]);
}

/// An owner, which tells whether the graph changed while it carried out a task.
struct Owned {
    graph: Graph,
    owner: std::thread::JoinHandle<Vec<bool>>,
}

impl Owned {
    fn new(run: bool) -> Self {
        let (send, tasks) = channel::<Task>();
        let graph = Graph::default();
        let watched = graph.clone();
        let owner = std::thread::spawn(move || {
            let mut changed = Vec::new();
            while let Ok(task) = tasks.recv_timeout(DEADLINE) {
                let before = watched.state();
                match run {
                    true => task(),
                    false => drop(task),
                }
                changed.push(!Arc::ptr_eq(&before, &watched.state()));
                if watched.state().node("last").is_ok() {
                    // On this thread it cannot be waited for.
                    watched.add(node("own", 1)).unwrap();
                    break;
                }
            }
            changed
        });
        graph.owned_by(owner.thread().id(), move |task| drop(send.send(task)));
        Self { graph, owner }
    }
}

#[test]
fn changes_are_made_on_the_owners_thread() {
    let Owned { graph, owner } = Owned::new(true);
    std::thread::scope(|scope| {
        for number in 0..4 {
            let graph = &graph;
            scope.spawn(move || graph.add(node(&name(number), 1)).unwrap());
        }
    });
    graph.add(node("n0", 1)).unwrap_err();
    graph.add(node("last", 1)).unwrap();
    let changed = owner.join().unwrap();
    assert_eq!(changed.iter().filter(|changed| **changed).count(), 5);
    assert_eq!(graph.nodes().len(), 6);
    // It has ended.
    graph.add(node("late", 1)).unwrap();
    assert!(graph.node("late").is_ok());
}

#[test]
fn a_task_that_the_owner_drops_is_carried_out_all_the_same() {
    let Owned { graph, owner } = Owned::new(false);
    graph.add(node("n0", 1)).unwrap();
    assert!(graph.node("n0").is_ok());
    drop(graph);
    drop(owner);
}

mod nested;
