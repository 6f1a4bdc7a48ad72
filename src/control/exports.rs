//! `block-export-*`: exports that come and go.

use serde_json::{Value, json};

use super::args::Args;
use super::command::{Control, Done};
use crate::engine::{Engine, Removal, Served};
use crate::options::{Dialect, ExportOptions};

/// Makes an export.
pub(super) fn add(control: &Control, args: &Args) -> Done {
    let given = args.to_value();
    let options = ExportOptions::from_value(&given, Dialect::Json)?;
    control.engine.add_export(&options)?;
    Ok(json!({}).into())
}

/// Removes an export.
pub(super) fn del(control: &Control, args: &Args) -> Done {
    let how = match args.str("mode") {
        Some("hard") => Removal::Hard,
        _ => Removal::Safe,
    };
    control
        .engine
        .remove_export(args.required_str("id")?, how)?;
    Ok(json!({}).into())
}

/// Lists all exports.
pub(super) fn query(control: &Control, _: &Args) -> Done {
    let exports = with_tops(&control.engine);
    let state = control.engine.graph.shown();
    let to_value = |(node, served): &(String, Served)| {
        json!({
            "node-name": state.shown_at(node),
            "shutting-down": served.export.info().shutting_down,
            "type": "vhost-user-blk",
            "id": served.options.id,
        })
    };
    Ok(exports.iter().map(to_value).collect::<Value>().into())
}

/// All exports, each with the name of its disk's top. That top is in the graph that is looked at after
/// this; it may no longer be in one that was looked at before.
pub(super) fn with_tops(engine: &Engine) -> Vec<(String, Served)> {
    let exports = engine.exports.list().into_iter();
    exports
        .map(|served| (served.export.node_name(), served))
        .collect()
}
