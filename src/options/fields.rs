//! Strict reading of one JSON object: the step from a [`Value`] to typed options.
//!
//! Both notations of an option end up as a [`Value`]; they differ in their leaves. JSON has real
//! booleans and numbers, `key=value` has only text. [`Dialect`] says which of the two is read, so
//! that `"read-only": "on"` is refused in JSON as QEMU refuses it, and taken on a command line.

use super::error::{ConfigError, ErrorKind};
use super::keys::Key;
use super::keyval::{self, join};
use super::size;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;
use std::path::PathBuf;

/// The notation in which a value was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `key=value,...`: every leaf is text.
    Keyval,
    /// JSON, from a command line or a QMP client: leaves have types.
    Json,
    /// JSON that this program has written, where things may be that nobody can give.
    Recorded,
}

/// One object whose members are being read.
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
    dialect: Dialect,
}

impl<'a> Fields<'a> {
    /// Takes `value`, which must be an object. `path` is the dotted key that leads to it.
    pub fn new(value: &'a Value, path: &str, dialect: Dialect) -> Result<Self, ConfigError> {
        match value {
            Value::Object(map) => Ok(Self {
                map,
                path: path.to_owned(),
                dialect,
            }),
            other => Err(wrong_type(path, "object", other, dialect)),
        }
    }

    /// Refuses members that are in neither list of `known` keys.
    ///
    /// Called before any member is read, so that a mistyped key is told as such and not as the
    /// absence of the right one.
    pub fn only(&self, known: &[&[&'static str]]) -> Result<(), ConfigError> {
        let is_known = |key: &str| known.iter().any(|list| list.contains(&key));
        let Some((key, value)) = self.map.iter().find(|(key, _)| !is_known(key)) else {
            return Ok(());
        };
        let key = join(&self.path, key);
        let near = near(&key, value, self.dialect);
        let expected = known.iter().flat_map(|list| list.iter().copied()).collect();
        Err(ConfigError::new(ErrorKind::UnknownKey { key, expected }).near(near))
    }

    /// As [`only`](Self::only), with keys of tables.
    pub fn only_keys(&self, known: &[&[Key]]) -> Result<(), ConfigError> {
        let names = known.iter().flat_map(|list| list.iter());
        let names: Vec<&'static str> = names.map(|key| key.name).collect();
        self.only(&[names.as_slice()])
    }

    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// The dotted name of a member.
    pub fn path(&self, key: &str) -> String {
        join(&self.path, key)
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    pub fn missing(&self, key: &str) -> ConfigError {
        ConfigError::new(ErrorKind::MissingKey {
            key: self.path(key),
        })
    }

    pub fn wrong_type(&self, key: &str, expected: &'static str) -> ConfigError {
        let value = self.get(key).unwrap_or(&Value::Null);
        wrong_type(&self.path(key), expected, value, self.dialect)
    }

    pub fn opt_str(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong_type(key, "string")),
        }
    }

    pub fn string(&self, key: &str) -> Result<&'a str, ConfigError> {
        self.opt_str(key)?.ok_or_else(|| self.missing(key))
    }

    pub fn opt_owned(&self, key: &str) -> Result<Option<String>, ConfigError> {
        Ok(self.opt_str(key)?.map(str::to_owned))
    }

    /// A path, which must not be empty and cannot hold a NUL byte.
    pub fn opt_file(&self, key: &str) -> Result<Option<PathBuf>, ConfigError> {
        let Some(text) = self.opt_str(key)? else {
            return Ok(None);
        };
        if text.is_empty() || text.contains('\0') {
            return Err(ConfigError::bad_value(&self.path(key), text, "a path"));
        }
        Ok(Some(PathBuf::from(text)))
    }

    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        match (self.get(key), self.dialect) {
            (None, _) => Ok(None),
            (Some(Value::Bool(on)), _) => Ok(Some(*on)),
            (Some(Value::String(text)), Dialect::Keyval) => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(ConfigError::bad_value(
                    &self.path(key),
                    text,
                    "one of: on, off",
                )),
            },
            (Some(_), _) => Err(self.wrong_type(key, "boolean")),
        }
    }

    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        Ok(self.opt_bool(key)?.unwrap_or(default))
    }

    /// A number that is not negative; as text it may carry a suffix (`64K`, `2M`, `0x200`).
    pub fn opt_u64(&self, key: &str) -> Result<Option<u64>, ConfigError> {
        match (self.get(key), self.dialect) {
            (None, _) => Ok(None),
            (Some(Value::Number(number)), _) => match number.as_u64() {
                Some(number) => Ok(Some(number)),
                None if number.is_f64() => Err(self.wrong_type(key, "integer")),
                None => Err(ConfigError::bad_value(
                    &self.path(key),
                    &number.to_string(),
                    "a number of 0 or more",
                )),
            },
            (Some(Value::String(text)), Dialect::Keyval) => match size::parse(text) {
                Some(number) => Ok(Some(number)),
                None => Err(ConfigError::bad_value(
                    &self.path(key),
                    text,
                    size::EXPECTED,
                )),
            },
            (Some(_), _) => Err(self.wrong_type(key, "integer")),
        }
    }

    /// A number of this range, which may be negative.
    pub fn opt_i64(
        &self,
        key: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ConfigError> {
        let number = match (self.get(key), self.dialect) {
            (None, _) => return Ok(None),
            (Some(Value::Number(number)), _) if !number.is_f64() => number.as_i64(),
            (Some(Value::String(text)), Dialect::Keyval) => text.parse().ok(),
            (Some(_), _) => return Err(self.wrong_type(key, "integer")),
        };
        match number.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let expected = format!("a number from {} to {}", range.start(), range.end());
                let value = self.get(key).map(Value::to_string).unwrap_or_default();
                let value = value.trim_matches('"');
                Err(ConfigError::bad_value(&self.path(key), value, expected))
            }
        }
    }

    /// A list.
    pub fn list(&self, key: &str) -> Result<Option<&'a [Value]>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => Err(self.wrong_type(key, "array")),
        }
    }

    /// The objects of a list, none if there is no list.
    pub fn objects(&self, key: &str) -> Result<Vec<Fields<'a>>, ConfigError> {
        let list = self.list(key)?.unwrap_or_default().iter().enumerate();
        let path = self.path(key);
        list.map(|(number, value)| {
            Fields::new(value, &join(&path, &number.to_string()), self.dialect)
        })
        .collect()
    }

    /// A number between `low` and `high`.
    pub fn opt_ranged(&self, key: &str, low: u64, high: u64) -> Result<Option<u64>, ConfigError> {
        match self.opt_u64(key)? {
            Some(number) if !(low..=high).contains(&number) => Err(ConfigError::bad_value(
                &self.path(key),
                &number.to_string(),
                format!("a number from {low} to {high}"),
            )),
            number => Ok(number),
        }
    }

    /// One word of a fixed set.
    pub fn opt_word<T: Copy>(
        &self,
        key: &str,
        words: &[(&'static str, T)],
    ) -> Result<Option<T>, ConfigError> {
        let Some(text) = self.opt_str(key)? else {
            return Ok(None);
        };
        match words.iter().find(|(word, _)| *word == text) {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => {
                let list: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
                let expected = format!("one of: {}", list.join(", "));
                Err(ConfigError::bad_value(&self.path(key), text, expected))
            }
        }
    }

    /// An object inside this one.
    pub fn opt_object(&self, key: &str) -> Result<Option<Fields<'a>>, ConfigError> {
        self.get(key)
            .map(|value| Fields::new(value, &self.path(key), self.dialect))
            .transpose()
    }

    /// The name of a node, export or object, by QEMU's rules: a letter, then letters, digits,
    /// `-`, `.` and `_`.
    pub fn opt_id(&self, key: &str) -> Result<Option<String>, ConfigError> {
        let Some(text) = self.opt_str(key)? else {
            return Ok(None);
        };
        if !is_well_formed_id(text) {
            let expected = "a name of letters, digits, '-', '.' and '_' that starts with a letter";
            return Err(ConfigError::bad_value(&self.path(key), text, expected));
        }
        Ok(Some(text.to_owned()))
    }

    pub fn id(&self, key: &str) -> Result<String, ConfigError> {
        self.opt_id(key)?.ok_or_else(|| self.missing(key))
    }
}

/// Whether `text` may name a node, an export, a job or an object.
pub fn is_well_formed_id(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

fn wrong_type(path: &str, expected: &'static str, value: &Value, dialect: Dialect) -> ConfigError {
    let key = if path.is_empty() {
        "options".to_owned()
    } else {
        path.to_owned()
    };
    let near = near(&key, value, dialect);
    ConfigError::new(ErrorKind::WrongType { key, expected }).near(near)
}

/// A member as the user wrote it.
fn near(key: &str, value: &Value, dialect: Dialect) -> String {
    match (value, dialect) {
        (Value::String(text), Dialect::Keyval) => format!("{key}={text}"),
        (Value::Object(_) | Value::Array(_), Dialect::Keyval) => {
            let pairs = keyval::format(value);
            format!("{key}.{}", pairs.split(',').next().unwrap_or(&pairs))
        }
        _ => format!("{key}: {value}"),
    }
}
