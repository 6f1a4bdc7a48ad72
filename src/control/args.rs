//! The arguments of commands: what is allowed, and the checking of what came.

use serde_json::{Map, Value};

use super::error::CommandError;

/// The type of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A string.
    Str,
    /// A whole number that fits 64 bits.
    Int,
    /// A whole number that fits 64 bits without a sign. A negative one is taken as QEMU takes it: as
    /// what its bits are without a sign.
    Size,
    /// True or false.
    Bool,
    /// One of some words; the type's name comes first.
    Enum(&'static str, &'static [&'static str]),
    /// Any value.
    Any,
    /// All arguments are options of this type, which are read as a whole.
    Whole(&'static str),
    /// Options of this type.
    Options(&'static str),
    /// A list of options of this type.
    OptionsList(&'static str),
    /// A list of words.
    EnumList(&'static str, &'static [&'static str]),
    /// An object of this type, which the command looks into.
    Object(&'static str),
    /// A list of objects of this type, which the command looks into.
    Objects(&'static str),
}

/// An argument a command takes.
#[derive(Clone, Copy, Debug)]
pub struct Arg {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Whether the command cannot do without it.
    pub required: bool,
}

impl Arg {
    /// An argument that has to be there.
    pub const fn required(name: &'static str, kind: Kind) -> Self {
        Self {
            name,
            kind,
            required: true,
        }
    }

    /// An argument that may be left out.
    pub const fn optional(name: &'static str, kind: Kind) -> Self {
        Self {
            name,
            kind,
            required: false,
        }
    }
}

/// Arguments that were found to be as the command wants them.
#[derive(Debug, Default)]
pub struct Args(Map<String, Value>);

impl Args {
    /// Checks `given` against what a command takes. The first thing wrong is told, in the order of
    /// `wanted`, then what is too much.
    pub fn check(wanted: &[Arg], given: Map<String, Value>) -> Result<Self, CommandError> {
        if let [
            Arg {
                kind: Kind::Whole(_),
                ..
            },
        ] = wanted
        {
            return Ok(Self(given));
        }
        Self::check_in("", wanted, given)
    }

    /// As [`check`](Self::check), of an object inside an argument; `path` leads there, with a dot at
    /// its end.
    pub fn check_in(
        path: &str,
        wanted: &[Arg],
        given: Map<String, Value>,
    ) -> Result<Self, CommandError> {
        for arg in wanted {
            match given.get(arg.name) {
                Some(value) => check_value(path, arg, value)?,
                None if arg.required => {
                    return Err(CommandError::generic(format!(
                        "Parameter '{path}{}' is missing",
                        arg.name
                    )));
                }
                None => {}
            }
        }
        match given
            .keys()
            .find(|name| !wanted.iter().any(|arg| arg.name == *name))
        {
            Some(name) => Err(CommandError::generic(format!(
                "Parameter '{path}{name}' is unexpected"
            ))),
            None => Ok(Self(given)),
        }
    }

    /// All of them as one value.
    pub fn to_value(&self) -> Value {
        Value::Object(self.0.clone())
    }

    /// The argument `name`, if it was given.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// The object `name`, if it was given.
    pub fn object(&self, name: &str) -> Option<&Map<String, Value>> {
        self.0.get(name)?.as_object()
    }

    /// The objects of the list `name`.
    pub fn objects(&self, name: &str) -> impl Iterator<Item = &Map<String, Value>> {
        let list = self.0.get(name).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_object)
    }

    /// The string `name`, if it was given.
    pub fn str(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_str()
    }

    /// The number `name`, if it was given.
    pub fn int(&self, name: &str) -> Option<i64> {
        self.0.get(name)?.as_i64()
    }

    /// The number `name` without a sign, if it was given.
    pub fn size(&self, name: &str) -> Option<u64> {
        let value = self.0.get(name)?;
        value.as_u64().or_else(|| Some(value.as_i64()? as u64))
    }

    /// The flag `name`, if it was given.
    pub fn bool(&self, name: &str) -> Option<bool> {
        self.0.get(name)?.as_bool()
    }

    /// The words of the list `name`.
    pub fn words(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0
            .get(name)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
    }

    /// A string that the command cannot do without.
    pub fn required_str(&self, name: &str) -> Result<&str, CommandError> {
        self.str(name)
            .ok_or_else(|| CommandError::generic(format!("Parameter '{name}' is missing")))
    }
}

fn wrong_type(name: &str, expected: &str) -> CommandError {
    CommandError::generic(format!(
        "Invalid parameter type for '{name}', expected: {expected}"
    ))
}

fn check_value(path: &str, arg: &Arg, value: &Value) -> Result<(), CommandError> {
    let name = &format!("{path}{}", arg.name);
    match arg.kind {
        Kind::Str if !value.is_string() => Err(wrong_type(name, "string")),
        Kind::Int if value.as_i64().is_none() => Err(wrong_type(name, "integer")),
        Kind::Size if value.as_u64().is_none() && value.as_i64().is_none() => Err(
            CommandError::generic(format!("Parameter '{name}' expects uint64")),
        ),
        Kind::Bool if !value.is_boolean() => Err(wrong_type(name, "boolean")),
        Kind::Options(_) if !value.is_object() => Err(wrong_type(name, "object")),
        Kind::OptionsList(_) if !value.is_array() => Err(wrong_type(name, "array")),
        Kind::Enum(_, words) => check_word(name, arg.name, words, value),
        Kind::EnumList(_, words) => {
            let items = value.as_array().ok_or_else(|| wrong_type(name, "array"))?;
            // An item has no name of its own, and this is what QEMU calls it.
            items.iter().enumerate().try_for_each(|(at, item)| {
                check_word(&format!("{name}[{at}]"), "null", words, item)
            })
        }
        Kind::Object(_) if !value.is_object() => Err(wrong_type(name, "object")),
        Kind::Objects(_) => {
            let items = value.as_array().ok_or_else(|| wrong_type(name, "array"))?;
            let wrong = items.iter().position(|item| !item.is_object());
            wrong.map_or(Ok(()), |at| {
                Err(wrong_type(&format!("{name}[{at}]"), "object"))
            })
        }
        _ => Ok(()),
    }
}

fn check_word(
    full_name: &str,
    name: &str,
    words: &[&str],
    value: &Value,
) -> Result<(), CommandError> {
    let word = value
        .as_str()
        .ok_or_else(|| wrong_type(full_name, "string"))?;
    if words.contains(&word) {
        return Ok(());
    }
    Err(CommandError::generic(format!(
        "Parameter '{name}' does not accept value '{word}'"
    )))
}
