//! `x-debug-query-block-graph`: who uses which node for what, as it is now.

use serde_json::{Value, json};

use super::args::Args;
use super::command::{Control, Done};
use crate::graph::{Holder, NodeUse, NodeUser, Rights};

/// Elements of the answer, each with its number.
#[derive(Default)]
struct Elements(Vec<(NodeUser, u64)>);

impl Elements {
    fn number(&mut self, user: &NodeUser) -> u64 {
        if let Some((_, number)) = self.0.iter().find(|(known, _)| known == user) {
            return *number;
        }
        let number = self.0.len() as u64 + 1;
        self.0.push((user.clone(), number));
        number
    }

    fn to_value(&self) -> Value {
        let element = |(user, id): &(NodeUser, u64)| {
            let (name, kind) = match user {
                NodeUser::Node(name) => (name.as_str(), "block-driver"),
                NodeUser::Holder(Holder::Job(_, id)) => (id.as_str(), "block-job"),
                NodeUser::Holder(_) => ("", "block-backend"),
            };
            json!({"name": name, "type": kind, "id": id})
        };
        self.0.iter().map(element).collect()
    }
}

/// Tells all nodes, and all uses of them.
pub(super) fn query(control: &Control, _: &Args) -> Done {
    let graph = &control.engine.graph;
    let mut elements = Elements::default();
    for node in graph.shown().nodes() {
        elements.number(&NodeUser::Node(node.name.clone()));
    }
    // What a job holds to keep others away is no use.
    let uses = graph.uses_shown().into_iter();
    let uses = uses.filter(|used| match &used.user {
        NodeUser::Holder(Holder::Job(_, id)) => !id.is_empty(),
        _ => true,
    });
    let edges: Value = uses.map(|used| edge(&used, &mut elements)).collect();
    Ok(json!({"edges": edges, "nodes": elements.to_value()}).into())
}

fn edge(used: &NodeUse, elements: &mut Elements) -> Value {
    let names = |rights: Rights| rights.qemu_names().collect::<Vec<_>>();
    json!({
        "name": used.child,
        "parent": elements.number(&used.user),
        "shared-perm": names(used.demand.tolerates),
        "perm": names(used.demand.does),
        "child": elements.number(&NodeUser::Node(used.node.clone())),
    })
}
