//! `block-export-*`: exports that come and go.

use serde_json::{Value, json};

use super::args::Args;
use super::command::{Control, Done};
use crate::engine::{Removal, Served};
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
    let exports = control.engine.exports.list();
    let to_value = |served: &Served| {
        json!({
            "node-name": control.engine.graph.shown_at(&served.export.node_name()),
            "shutting-down": served.export.info().shutting_down,
            "type": "vhost-user-blk",
            "id": served.options.id,
        })
    };
    Ok(exports.iter().map(to_value).collect::<Value>().into())
}
