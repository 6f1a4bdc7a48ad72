//! `blockdev-*`: nodes that come and go.

use serde_json::{Value, json};

use super::args::Args;
use super::command::{Control, Done};
use super::error::CommandError;
use crate::options::{BlockdevOptions, ConfigError, Dialect, ImageOptions, check_node_name};

/// Opens a node.
pub(super) fn blockdev_add(control: &Control, args: &Args) -> Done {
    let given = args.to_value();
    let options = BlockdevOptions::from_value(&given, Dialect::Json)?;
    control.engine.add_node(&options)?;
    Ok(json!({}).into())
}

/// Starts a job that makes an image.
pub(super) fn blockdev_create(control: &Control, args: &Args) -> Done {
    let options = ImageOptions::from_value(args.value("options").unwrap_or(&Value::Null))?;
    control
        .engine
        .start_create(args.required_str("job-id")?, options)?;
    Ok(json!({}).into())
}

/// Gives nodes other options.
pub(super) fn blockdev_reopen(control: &Control, args: &Args) -> Done {
    let list = args.value("options").and_then(Value::as_array);
    for given in list.into_iter().flatten() {
        check_names(control, given)?;
    }
    let list = list
        .into_iter()
        .flatten()
        .enumerate()
        .map(|(at, given)| BlockdevOptions::from_unnamed(given, &format!("options[{at}]")));
    let list = list.collect::<Result<Vec<_>, ConfigError>>()?;
    control.engine.reopen_nodes(&list)?;
    Ok(json!({}).into())
}

/// Refuses names that no node has: in the options of a node that is added the empty one says that nothing
/// is to lie under it.
fn check_names(control: &Control, given: &Value) -> Result<(), CommandError> {
    let text = |key: &str| given.get(key).and_then(Value::as_str);
    let is_none =
        |name: &&str| check_node_name(name).is_err() && !control.engine.graph.has_name(name);
    if let Some(name) = text("node-name").filter(is_none) {
        return Err(CommandError::generic(format!(
            "Failed to find node with node-name='{name}'"
        )));
    }
    match [text("file"), text("backing")].contains(&Some("")) {
        true => Err(CommandError::generic(
            "Cannot find device='' nor node-name=''",
        )),
        false => Ok(()),
    }
}

/// Changes what an image's header says.
pub(super) fn change_backing_file(control: &Control, args: &Args) -> Done {
    let (device, image) = (
        args.required_str("device")?,
        args.required_str("image-node-name")?,
    );
    let name = args.required_str("backing-file")?;
    control.engine.change_backing_file(device, image, name)?;
    Ok(json!({}).into())
}

/// Removes a node.
pub(super) fn blockdev_del(control: &Control, args: &Args) -> Done {
    control
        .engine
        .remove_node(args.required_str("node-name")?)?;
    Ok(json!({}).into())
}

impl From<ConfigError> for CommandError {
    fn from(error: ConfigError) -> Self {
        Self::generic(error.qmp_desc())
    }
}

/// Has clients told when a write to a node reaches past an offset.
pub(super) fn set_write_threshold(control: &Control, args: &Args) -> Done {
    let at = args.size("write-threshold").unwrap_or_default();
    control
        .engine
        .set_write_threshold(args.required_str("node-name")?, at)?;
    Ok(json!({}).into())
}
