//! What guests have asked of the exports, told to clients: `query-blockstats`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::engine::Served;
use crate::export::{Counter, QueueStats};
use crate::graph::{Node, Role, State};

/// An export, with its node, as an item of `query-blockstats`.
pub(super) fn export(state: &State, node: &str, served: &Served) -> Value {
    let export = &served.export;
    let elapsed = nanoseconds(export.elapsed());
    let queues = export.stats().iter();
    let node = state.node(state.shown_at(node));
    let mut members = node.map_or_else(|_| Map::new(), |node| node_members(state, node));
    let own = json!({
        "device": served.options.id,
        "stats": device_stats(export.stats()),
        "elapsed-ns": elapsed,
        "poll-max-ns": nanoseconds(export.poll_max()),
        "queues": queues.map(|stats| queue(stats, elapsed)).collect::<Value>(),
    });
    if let Value::Object(own) = own {
        members.extend(own);
    }
    members.into()
}

/// All nodes as items of `query-blockstats`, each with those under it. As in QEMU nothing but their
/// devices is counted, which are the exports.
pub(super) fn nodes(state: &State) -> Value {
    let nodes = state.nodes().iter();
    nodes.map(|node| node_stats(state, node)).collect()
}

fn node_stats(state: &State, node: &Node) -> Value {
    node_members(state, node).into()
}

fn node_members(state: &State, node: &Node) -> Map<String, Value> {
    let mut members = Map::new();
    let child = |role| node.child(role).and_then(|name| state.node(name).ok());
    let roles = [Role::DataFile, Role::File, Role::Filtered, Role::Image];
    if let Some(file) = roles.into_iter().find_map(child) {
        members.insert("parent".to_owned(), node_stats(state, file));
    }
    members.insert("stats".to_owned(), device_stats(&[]));
    if let Some(below) = child(Role::Backing) {
        members.insert("backing".to_owned(), node_stats(state, below));
    }
    members.insert("node-name".to_owned(), node.name.clone().into());
    members
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The members that QEMU's clients expect, all of them: typed ones refuse an answer that lacks
/// one. What is not counted here is 0.
fn device_stats(queues: &[Arc<QueueStats>]) -> Value {
    let sum = |count: fn(&QueueStats) -> &Counter| {
        let counts = queues.iter().map(|queue| count(queue).get());
        counts.sum::<u64>()
    };
    json!({
        "rd_bytes": sum(|queue| &queue.read_bytes),
        "rd_operations": sum(|queue| &queue.reads),
        "wr_bytes": sum(|queue| &queue.write_bytes),
        "wr_operations": sum(|queue| &queue.writes),
        "flush_operations": sum(|queue| &queue.flushes),
        "unmap_operations": sum(|queue| &queue.discards),
        "unmap_bytes": 0,
        "zone_append_bytes": 0,
        "zone_append_operations": 0,
        "rd_total_time_ns": 0,
        "wr_total_time_ns": 0,
        "flush_total_time_ns": 0,
        "unmap_total_time_ns": 0,
        "zone_append_total_time_ns": 0,
        "rd_merged": 0,
        "wr_merged": 0,
        "unmap_merged": 0,
        "zone_append_merged": 0,
        "wr_highest_offset": 0,
        "failed_rd_operations": 0,
        "failed_wr_operations": 0,
        "failed_flush_operations": 0,
        "failed_unmap_operations": 0,
        "failed_zone_append_operations": 0,
        "invalid_rd_operations": 0,
        "invalid_wr_operations": 0,
        "invalid_flush_operations": 0,
        "invalid_unmap_operations": 0,
        "invalid_zone_append_operations": 0,
        "account_invalid": false,
        "account_failed": false,
        "timed_stats": [],
    })
}

/// All counters of a queue, by their names.
fn queue(stats: &QueueStats, elapsed_ns: u64) -> Value {
    let mut members = Map::new();
    let thread = stats.thread.load(Ordering::Relaxed);
    members.insert("thread-id".to_owned(), thread.into());
    for (name, count) in stats.counters() {
        members.insert(name.to_owned(), count.into());
    }
    let share = share(stats.poll_ns.get(), elapsed_ns);
    members.insert("poll-share".to_owned(), share.into());
    members.into()
}

/// How much of `total` it is, from 0 to 1.
fn share(part: u64, total: u64) -> f64 {
    if total == 0 {
        return 0.0;
    }
    (part as f64 / total as f64).min(1.0)
}
