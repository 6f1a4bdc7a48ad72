//! What there is, told to clients: `query-commands` and `query-qmp-schema`.

use serde_json::{Map, Value, json};

use super::args::{Arg, Kind};
use super::command::{Command, Returns};

/// Each event with its members and their types.
const EVENTS: &[(&str, &[(&str, &str)])] = &[
    ("JOB_STATUS_CHANGE", &[("id", "str"), ("status", "str")]),
    (
        "BLOCK_JOB_COMPLETED",
        &[
            ("type", "str"),
            ("device", "str"),
            ("len", "int"),
            ("offset", "int"),
            ("speed", "int"),
            ("copied", "int"),
            ("error", "str"),
        ],
    ),
    (
        "BLOCK_JOB_CANCELLED",
        &[
            ("type", "str"),
            ("device", "str"),
            ("len", "int"),
            ("offset", "int"),
            ("speed", "int"),
            ("copied", "int"),
        ],
    ),
    (
        "BLOCK_JOB_ERROR",
        &[("device", "str"), ("operation", "str"), ("action", "str")],
    ),
    (
        "BLOCK_IO_ERROR",
        &[
            ("qom-path", "str"),
            ("device", "str"),
            ("node-name", "str"),
            ("operation", "str"),
            ("action", "str"),
            ("nospace", "bool"),
            ("reason", "str"),
        ],
    ),
    ("BLOCK_JOB_PENDING", &[("type", "str"), ("id", "str")]),
];

/// The members of an item of `query-block-jobs`; the last may be missing.
const BLOCK_JOB: &[(&str, &str)] = &[
    ("type", "str"),
    ("device", "str"),
    ("len", "int"),
    ("offset", "int"),
    ("busy", "bool"),
    ("paused", "bool"),
    ("speed", "int"),
    ("io-status", "str"),
    ("ready", "bool"),
    ("status", "str"),
    ("auto-finalize", "bool"),
    ("auto-dismiss", "bool"),
    ("copied", "int"),
    ("to-copy", "int"),
    ("to-copy-final", "bool"),
    ("error", "str"),
];

/// The value of `query-commands`.
pub(super) fn commands(table: &[Command]) -> Value {
    table
        .iter()
        .map(|command| json!({"name": command.name}))
        .collect()
}

/// The value of `query-qmp-schema`: arguments in full, answers by their outermost type only, but
/// for those that have members which QEMU's have not.
pub(super) fn schema(table: &[Command]) -> Value {
    let mut entries = builtins();
    let mut enums: Map<String, Value> = Map::new();
    for command in table {
        let arguments = format!("{}-arg", command.name);
        let returns = match command.returns {
            Returns::Nothing => "empty",
            Returns::Object => "any",
            Returns::List => "[any]",
            Returns::Text => "str",
            Returns::BlockJobs => "[BlockJobInfo]",
        };
        entries.push(json!({
            "name": command.name,
            "meta-type": "command",
            "arg-type": arguments,
            "ret-type": returns,
            "allow-oob": false,
        }));
        let members: Value = command
            .args
            .iter()
            .map(|arg| member(arg, &mut enums))
            .collect();
        entries.push(json!({"name": arguments, "meta-type": "object", "members": members}));
    }
    for (name, members) in EVENTS {
        let data = format!("{name}-data");
        entries.push(json!({"name": name, "meta-type": "event", "arg-type": data}));
        let members: Value = members
            .iter()
            .map(|(name, kind)| json!({"name": name, "type": kind}))
            .collect();
        entries.push(json!({"name": data, "meta-type": "object", "members": members}));
    }
    entries.extend(enums.into_iter().map(|(_, entry)| entry));
    Value::Array(entries)
}

fn builtins() -> Vec<Value> {
    let mut entries: Vec<Value> = [
        ("str", "string"),
        ("int", "int"),
        ("bool", "boolean"),
        ("any", "value"),
    ]
    .iter()
    .map(|(name, json_type)| json!({"name": name, "meta-type": "builtin", "json-type": json_type}))
    .collect();
    for element in ["any", "BlockJobInfo"] {
        let name = format!("[{element}]");
        entries.push(json!({"name": name, "meta-type": "array", "element-type": element}));
    }
    let members: Value = BLOCK_JOB
        .iter()
        .map(|(name, kind)| match *name {
            "error" => json!({"name": name, "type": kind, "default": null}),
            _ => json!({"name": name, "type": kind}),
        })
        .collect();
    entries.push(json!({"name": "BlockJobInfo", "meta-type": "object", "members": members}));
    entries.push(json!({"name": "empty", "meta-type": "object", "members": []}));
    entries
}

fn member(arg: &Arg, enums: &mut Map<String, Value>) -> Value {
    let kind = match arg.kind {
        Kind::Str => "str".to_owned(),
        Kind::Int => "int".to_owned(),
        Kind::Bool => "bool".to_owned(),
        Kind::Enum(name, words) => word_type(name, words, enums),
        Kind::EnumList(name, words) => {
            let element = word_type(name, words, enums);
            let name = format!("[{element}]");
            let entry = json!({"name": name, "meta-type": "array", "element-type": element});
            enums.insert(name.clone(), entry);
            name
        }
    };
    let mut member = json!({"name": arg.name, "type": kind});
    if let (false, Some(members)) = (arg.required, member.as_object_mut()) {
        members.insert("default".to_owned(), Value::Null);
    }
    member
}

fn word_type(name: &str, words: &[&str], enums: &mut Map<String, Value>) -> String {
    let members: Value = words.iter().map(|word| json!({"name": word})).collect();
    let entry = json!({"name": name, "meta-type": "enum", "members": members, "values": words});
    enums.insert(name.to_owned(), entry);
    name.to_owned()
}
