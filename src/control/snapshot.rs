//! `blockdev-snapshot`, `blockdev-snapshot-sync`, internal snapshots and `transaction`: the arguments.

use serde_json::{Map, Value, json};

use super::args::{Arg, Args, Kind};
use super::command::{Control, Done};
use super::error::CommandError;
use crate::engine::snapshot::{Action, NewOverlay};
use crate::format::qcow2::snapshots::Snapshot;

const MODE: Kind = Kind::Enum("NewImageMode", &["existing", "absolute-paths"]);
const COMPLETION: Kind = Kind::Enum("ActionCompletionMode", &["individual", "grouped"]);

/// What `blockdev-snapshot` takes.
pub(super) const SNAPSHOT: &[Arg] = &[
    Arg::required("node", Kind::Str),
    Arg::required("overlay", Kind::Str),
];
/// What `blockdev-snapshot-sync` takes.
pub(super) const SNAPSHOT_SYNC: &[Arg] = &[
    Arg::optional("device", Kind::Str),
    Arg::optional("node-name", Kind::Str),
    Arg::required("snapshot-file", Kind::Str),
    Arg::optional("snapshot-node-name", Kind::Str),
    Arg::optional("format", Kind::Str),
    Arg::optional("mode", MODE),
];
/// What `blockdev-snapshot-internal-sync` takes.
pub(super) const INTERNAL: &[Arg] = &[
    Arg::required("device", Kind::Str),
    Arg::required("name", Kind::Str),
];
/// What `blockdev-snapshot-delete-internal-sync` takes.
pub(super) const DELETE_INTERNAL: &[Arg] = &[
    Arg::required("device", Kind::Str),
    Arg::optional("id", Kind::Str),
    Arg::optional("name", Kind::Str),
];
/// What `transaction` takes.
pub(super) const TRANSACTION: &[Arg] = &[
    Arg::required("actions", Kind::Objects("TransactionAction")),
    Arg::optional("properties", Kind::Object("TransactionProperties")),
];
pub(super) const PROPERTIES: &[Arg] = &[Arg::optional("completion-mode", COMPLETION)];

/// What a transaction is made of.
struct Kinds {
    name: &'static str,
    args: &'static [Arg],
    action: fn(&Args) -> Result<Action, CommandError>,
}

static ACTIONS: &[Kinds] = &[
    Kinds {
        name: "abort",
        args: &[],
        action: |_| Ok(Action::Abort),
    },
    Kinds {
        name: "blockdev-snapshot",
        args: SNAPSHOT,
        action: snapshot,
    },
    Kinds {
        name: "blockdev-snapshot-internal-sync",
        args: INTERNAL,
        action: internal,
    },
    Kinds {
        name: "blockdev-snapshot-sync",
        args: SNAPSHOT_SYNC,
        action: snapshot_sync,
    },
];

/// The actions of a transaction, each with what it takes.
pub(super) fn actions() -> impl Iterator<Item = (&'static str, &'static [Arg])> {
    ACTIONS.iter().map(|kind| (kind.name, kind.args))
}

/// Puts a node on top of another one.
pub(super) fn blockdev_snapshot(control: &Control, args: &Args) -> Done {
    carry_out(control, &[snapshot(args)?])
}

/// Makes an image, or opens one, and puts it on top of a node.
pub(super) fn blockdev_snapshot_sync(control: &Control, args: &Args) -> Done {
    carry_out(control, &[snapshot_sync(args)?])
}

/// Takes a snapshot inside of an image.
pub(super) fn blockdev_snapshot_internal(control: &Control, args: &Args) -> Done {
    carry_out(control, &[internal(args)?])
}

/// Deletes a snapshot inside of an image.
pub(super) fn blockdev_snapshot_delete_internal(control: &Control, args: &Args) -> Done {
    let device = args.required_str("device")?;
    let (id, name) = (args.str("id"), args.str("name"));
    let deleted = control.engine.delete_internal_snapshot(device, id, name)?;
    Ok(describe(&deleted).into())
}

/// A snapshot as clients are told of it.
pub(super) fn describe(snapshot: &Snapshot) -> Value {
    let second = 1_000_000_000;
    let mut value = json!({
        "vm-clock-nsec": snapshot.vm_clock % second,
        "name": snapshot.name,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": snapshot.vm_clock / second,
        "id": snapshot.id,
        "vm-state-size": snapshot.vm_state_size,
    });
    if let (Some(members), Some(count)) = (value.as_object_mut(), snapshot.instructions) {
        members.insert("icount".to_owned(), count.into());
    }
    value
}

/// Carries out all actions, or none.
pub(super) fn transaction(control: &Control, args: &Args) -> Done {
    let actions = args.objects("actions").enumerate();
    let actions = actions.map(|(at, action)| read(at, action));
    let actions = actions.collect::<Result<Vec<_>, _>>()?;
    let properties = args.object("properties").cloned().unwrap_or_default();
    let properties = Args::check_in("properties.", PROPERTIES, properties)?;
    if properties.str("completion-mode") == Some("grouped")
        && let Some((kind, _)) = actions.first()
    {
        return Err(CommandError::generic(format!(
            "Action '{}' does not support transaction property completion-mode = grouped",
            kind.name
        )));
    }
    let actions: Vec<_> = actions.into_iter().map(|(_, action)| action).collect();
    carry_out(control, &actions)
}

fn carry_out(control: &Control, actions: &[Action]) -> Done {
    control.engine.transact(actions)?;
    Ok(json!({}).into())
}

fn read(at: usize, action: &Map<String, Value>) -> Result<(&'static Kinds, Action), CommandError> {
    let path = format!("actions[{at}].");
    let wanted = [
        Arg::required("type", Kind::Str),
        Arg::required("data", Kind::Object("empty")),
    ];
    // The type comes first: what else there is depends on it.
    if let Some(Value::String(name)) = action.get("type")
        && !ACTIONS.iter().any(|kind| kind.name == name)
    {
        return Err(CommandError::generic(format!(
            "Parameter 'type' does not accept value '{name}'"
        )));
    }
    let args = Args::check_in(&path, &wanted, action.clone())?;
    let kind = ACTIONS
        .iter()
        .find(|kind| args.str("type") == Some(kind.name));
    let kind = kind.ok_or_else(|| CommandError::generic("an action of no known type"))?;
    let data = args.object("data").cloned().unwrap_or_default();
    let data = Args::check_in(&format!("{path}data."), kind.args, data)?;
    Ok((kind, (kind.action)(&data)?))
}

fn snapshot(args: &Args) -> Result<Action, CommandError> {
    Ok(Action::Snapshot {
        node: args.required_str("node")?.to_owned(),
        overlay: args.required_str("overlay")?.to_owned(),
    })
}

fn internal(args: &Args) -> Result<Action, CommandError> {
    Ok(Action::Internal {
        device: args.required_str("device")?.to_owned(),
        name: args.required_str("name")?.to_owned(),
    })
}

fn snapshot_sync(args: &Args) -> Result<Action, CommandError> {
    let text = |name: &str| args.str(name).map(str::to_owned);
    Ok(Action::SnapshotSync(NewOverlay {
        device: text("device"),
        node_name: text("node-name"),
        file: args.required_str("snapshot-file")?.to_owned(),
        snapshot_node_name: text("snapshot-node-name"),
        format: text("format"),
        existing: args.str("mode") == Some("existing"),
    }))
}
