//! What there is, told to clients: `query-commands` and `query-qmp-schema`.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::answers::{Member, TYPES, counted};
use super::args::{Arg, Kind};
use super::command::{Command, Returns};
use super::snapshot;
use crate::options::keys::{self, Key, KeyType};

/// Each event with its members and their types; those that may be missing have a star.
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
            ("*error", "str"),
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
        ],
    ),
    ("JOB_COPIED", &[("id", "str"), ("copied", "int")]),
    ("BLOCK_EXPORT_DELETED", &[("id", "str")]),
    (
        "BLOCK_JOB_ERROR",
        &[("device", "str"), ("operation", "str"), ("action", "str")],
    ),
    (
        "BLOCK_IO_ERROR",
        &[
            ("qom-path", "str"),
            ("device", "str"),
            ("*node-name", "str"),
            ("operation", "str"),
            ("action", "str"),
            ("*nospace", "bool"),
            ("reason", "str"),
        ],
    ),
    (
        "BLOCK_IMAGE_CORRUPTED",
        &[
            ("device", "str"),
            ("*node-name", "str"),
            ("msg", "str"),
            ("*offset", "int"),
            ("*size", "int"),
            ("fatal", "bool"),
        ],
    ),
    (
        "BLOCK_WRITE_THRESHOLD",
        &[
            ("node-name", "str"),
            ("amount-exceeded", "int"),
            ("write-threshold", "int"),
        ],
    ),
    (
        "BLOCK_JOB_READY",
        &[
            ("type", "str"),
            ("device", "str"),
            ("len", "int"),
            ("offset", "int"),
            ("speed", "int"),
        ],
    ),
    ("BLOCK_JOB_PENDING", &[("type", "str"), ("id", "str")]),
];

/// The value of `query-commands`.
pub(super) fn commands(table: &[Command]) -> Value {
    table
        .iter()
        .map(|command| json!({"name": command.name}))
        .collect()
}

/// The value of `query-qmp-schema`: all that can be asked for, given, answered and told.
pub(super) fn schema(table: &[Command]) -> Value {
    let mut entries = Entries::default();
    for command in table {
        let arguments = arguments(command, &mut entries);
        let returns = entries.reference(match command.returns {
            Returns::Nothing => "empty",
            Returns::Any => "any",
            Returns::Text => "str",
            Returns::BlockJobs => "[BlockJobInfo]",
            Returns::Of(kind) => kind,
        });
        entries.add(json!({
            "name": command.name,
            "meta-type": "command",
            "arg-type": arguments,
            "ret-type": returns,
            "allow-oob": false,
        }));
    }
    for (name, members) in EVENTS {
        let data = format!("{name}-data");
        entries.add(json!({"name": name, "meta-type": "event", "arg-type": data}));
        let members = members
            .iter()
            .map(|(name, kind)| match name.strip_prefix('*') {
                Some(name) => (name, *kind, true),
                None => (*name, *kind, false),
            });
        let members = entries.members(members);
        entries.add(json!({"name": data, "meta-type": "object", "members": members}));
    }
    for (name, members) in TYPES {
        entries.answer(name, members);
    }
    for (name, members) in counted() {
        entries.answer(name, &members);
    }
    entries.options();
    entries.transaction();
    entries.into_value()
}

/// The type of a command's arguments.
fn arguments(command: &Command, entries: &mut Entries) -> String {
    if let [
        Arg {
            kind: Kind::Whole(name),
            ..
        },
    ] = command.args
    {
        return (*name).to_owned();
    }
    let name = format!("{}-arg", command.name);
    let arguments = command.args.iter();
    let members: Value = arguments.map(|arg| entries.argument(arg)).collect();
    entries.add(json!({"name": name, "meta-type": "object", "members": members}));
    name
}

/// What has been described so far, each thing once.
#[derive(Default)]
struct Entries {
    list: Vec<Value>,
    names: HashSet<String>,
}

impl Entries {
    fn add(&mut self, entry: Value) {
        let name = entry
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if self.names.insert(name.to_owned()) {
            self.list.push(entry);
        }
    }

    fn into_value(mut self) -> Value {
        for (name, json_type) in [
            ("str", "string"),
            ("int", "int"),
            ("number", "number"),
            ("bool", "boolean"),
            ("null", "null"),
            ("any", "value"),
        ] {
            self.add(json!({"name": name, "meta-type": "builtin", "json-type": json_type}));
        }
        Value::Array(self.list)
    }

    /// A type by name; that of a list is described here.
    fn reference(&mut self, name: &str) -> String {
        if let Some(element) = name
            .strip_prefix('[')
            .and_then(|name| name.strip_suffix(']'))
        {
            self.add(json!({"name": name, "meta-type": "array", "element-type": element}));
        }
        name.to_owned()
    }

    fn members<'m>(&mut self, members: impl Iterator<Item = (&'m str, &'m str, bool)>) -> Value {
        let members =
            members.map(|(name, kind, optional)| member(name, self.reference(kind), !optional));
        members.collect()
    }

    fn answer(&mut self, name: &str, members: &[Member]) {
        let members = self.members(members.iter().copied());
        self.add(json!({"name": name, "meta-type": "object", "members": members}));
    }

    fn argument(&mut self, arg: &Arg) -> Value {
        let kind = match arg.kind {
            Kind::Str => "str".to_owned(),
            Kind::Int | Kind::Size => "int".to_owned(),
            Kind::Bool => "bool".to_owned(),
            Kind::Any => "any".to_owned(),
            Kind::Object(name) => name.to_owned(),
            Kind::Objects(name) => self.reference(&format!("[{name}]")),
            Kind::Whole(name) | Kind::Options(name) => name.to_owned(),
            Kind::OptionsList(name) => self.reference(&format!("[{name}]")),
            Kind::Enum(name, words) => self.words(name, words),
            Kind::EnumList(name, words) => {
                let element = self.words(name, words);
                self.reference(&format!("[{element}]"))
            }
        };
        member(arg.name, kind, arg.required)
    }

    fn words(&mut self, name: &str, words: &[&str]) -> String {
        let members: Value = words.iter().map(|word| json!({"name": word})).collect();
        self.add(json!({"name": name, "meta-type": "enum", "members": members, "values": words}));
        name.to_owned()
    }

    fn alternate(&mut self, name: &str, kinds: &[&str]) -> String {
        let members: Value = kinds.iter().map(|kind| json!({"type": kind})).collect();
        self.add(json!({"name": name, "meta-type": "alternate", "members": members}));
        name.to_owned()
    }

    fn key(&mut self, key: &Key) -> Value {
        let kind = match key.kind {
            KeyType::Str => "str".to_owned(),
            KeyType::Int => "int".to_owned(),
            KeyType::Bool => "bool".to_owned(),
            KeyType::Word(name, words) => self.words(name, words),
            KeyType::Object(name) => name.to_owned(),
            KeyType::Objects(name) => self.reference(&format!("[{name}]")),
            KeyType::WordList(name, words) => {
                let element = self.words(name, words);
                self.reference(&format!("[{element}]"))
            }
            KeyType::Node => self.alternate("BlockdevRef", &["BlockdevOptions", "str"]),
            KeyType::NodeOrNull => {
                let kinds = ["BlockdevOptions", "str", "null"];
                self.alternate("BlockdevRefOrNull", &kinds)
            }
            KeyType::WordOr(name, words, object) => {
                let word = self.words(name, words);
                self.alternate(&format!("{object}OrMode"), &[object, &word])
            }
        };
        member(key.name, kind, key.required)
    }

    fn object(&mut self, name: &str, args: &[Arg]) {
        let members: Value = args.iter().map(|arg| self.argument(arg)).collect();
        self.add(json!({"name": name, "meta-type": "object", "members": members}));
    }

    /// What a transaction is made of.
    fn transaction(&mut self) {
        self.object("TransactionProperties", snapshot::PROPERTIES);
        let (mut names, mut variants) = (Vec::new(), Vec::new());
        for (case, args) in snapshot::actions() {
            let (own, data) = (format!("TransactionAction-{case}"), format!("{case}-arg"));
            self.object(&data, args);
            let members = json!([member("data", data, true)]);
            self.add(json!({"name": own, "meta-type": "object", "members": members}));
            variants.push(json!({"case": case, "type": own}));
            names.push(case);
        }
        let kind = self.words("TransactionActionKind", &names);
        let members = json!([member("type", kind, true)]);
        self.add(
            json!({"name": "TransactionAction", "meta-type": "object", "tag": "type",
            "variants": variants, "members": members}),
        );
    }

    /// All types of structured options.
    fn options(&mut self) {
        for (name, keys) in keys::OBJECTS {
            let members: Value = keys.iter().map(|key| self.key(key)).collect();
            self.add(json!({"name": name, "meta-type": "object", "members": members}));
        }
        for union in keys::UNIONS {
            let name = union.name;
            let mut variants = Vec::new();
            for (case, keys) in union.variants {
                let own = format!("{name}-{case}");
                let members: Value = keys.iter().map(|key| self.key(key)).collect();
                self.add(json!({"name": own, "meta-type": "object", "members": members}));
                variants.push(json!({"case": case, "type": own}));
            }
            let members: Value = union.common.iter().map(|key| self.key(key)).collect();
            self.add(
                json!({"name": name, "meta-type": "object", "tag": union.tag,
                "variants": variants, "members": members}),
            );
        }
    }
}

fn member(name: &str, kind: String, required: bool) -> Value {
    match required {
        true => json!({"name": name, "type": kind}),
        false => json!({"name": name, "type": kind, "default": null}),
    }
}
