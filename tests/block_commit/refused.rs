//! What is refused, in the words and the order of qemu-storage-daemon 10.0.2.

use crate::common::Res;
use crate::scene::{Chain, Life};
use serde_json::{Value, json};

#[test]
fn what_is_refused_is_refused_in_the_words_of_qemu() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::create(dir.path(), "qcow2", [9; 4])?;
    let mut life = Life::begin(&chain, &[])?;
    let base = chain.path("base").display().to_string();
    let nodes_before = life.run("query-named-block-nodes", json!({}))?;
    let cases = [
        (json!({"device": "nope"}), "Device 'nope' not found"),
        (
            json!({"device": "act", "base": "x"}),
            "Can't find 'x' in the backing chain",
        ),
        (
            json!({"device": "act", "base-node": "x"}),
            "Cannot find device='' nor node-name='x'",
        ),
        (
            json!({"device": "act", "base-node": "act"}),
            "cannot commit an image into itself",
        ),
        (
            json!({"device": "act", "base": base, "base-node": "base"}),
            "'base-node' and 'base' are mutually exclusive",
        ),
        (
            json!({"device": "act", "top": base, "top-node": "base"}),
            "'top-node' and 'top' are mutually exclusive",
        ),
        (
            json!({"device": "act", "top": "x"}),
            "Top image file x not found",
        ),
        (
            json!({"device": "act", "top-node": "x"}),
            "Cannot find device='' nor node-name='x'",
        ),
        (
            json!({"device": "mid", "top-node": "act"}),
            "Need a root block node",
        ),
        (
            json!({"device": "act", "top-node": "mid", "base-node": "mid"}),
            "cannot commit an image into itself",
        ),
        (
            json!({"device": "act", "top-node": "mid", "base-node": "top"}),
            "'top' is not in this backing file chain",
        ),
        (
            json!({"device": "act", "top-node": "base"}),
            "cannot commit an image into itself",
        ),
        (json!({"device": "base"}), "Need a root block node"),
        (
            json!({"device": "act", "top-node": "mid", "speed": -1}),
            "Parameter 'speed' expects a non-negative value",
        ),
        (
            json!({"device": "act", "job-id": "1j"}),
            "Invalid job ID '1j'",
        ),
        (
            json!({"device": "act", "backing-file": "x"}),
            "'backing-file' specified, but 'top' is the active layer",
        ),
        (
            json!({"device": "act", "top-node": "mid", "filter-node-name": "act"}),
            "Duplicate nodes with node-name='act'",
        ),
        (
            json!({"device": "act", "top-node": "mid", "filter-node-name": "1x"}),
            "Invalid node-name: '1x'",
        ),
    ];
    for (mut arguments, expected) in cases {
        if arguments.get("job-id").is_none() {
            arguments["job-id"] = json!("j");
        }
        let refusal = life.qmp.execute("block-commit", arguments.clone())?;
        let refusal = refusal.expect_err(expected);
        assert_eq!(refusal.desc, expected, "{arguments}");
        let class = match expected {
            "Device 'nope' not found" => "DeviceNotFound",
            _ => "GenericError",
        };
        assert_eq!(refusal.class, class, "{arguments}");
    }
    assert_eq!(life.run("query-jobs", json!({}))?, json!([]));
    let nodes = life.run("query-named-block-nodes", json!({}))?;
    let modes = |nodes: &Value| -> Vec<Value> {
        let nodes = nodes.as_array().into_iter().flatten();
        nodes.map(|node| node["ro"].clone()).collect()
    };
    assert_eq!(modes(&nodes), modes(&nodes_before), "opened to be written");
    life.daemon.stop()
}
