//! QEMU's `key=value,...` notation.
//!
//! Turns `driver=qcow2,file.driver=file,file.filename=/x` into the JSON value
//! `{"driver": "qcow2", "file": {"driver": "file", "filename": "/x"}}`, in which every leaf is
//! text: the reader of a key decides what its leaf means.
//!
//! The rules, as QEMU has them:
//! - pairs are separated by commas, a comma at the very end is allowed;
//! - inside a value `,,` stands for one comma;
//! - the first pair may be a bare value where the option has an implied key;
//! - dots in a key nest, and members that are all numbers make a list, which must have no gaps;
//! - of two equal keys the later one wins;
//! - one key cannot be both text and an object.

use super::error::ConfigError;
use serde_json::{Map, Value};

/// Deepest nesting of keys that is accepted; bounds the recursion over the result.
const MAX_DEPTH: usize = 48;
/// Longest component of a key, as in QEMU.
const MAX_COMPONENT: usize = 127;

/// How one option deviates from plain pairs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Notation {
    /// The key that the first word belongs to when it has none.
    pub implied_key: Option<&'static str>,
    /// Keys that may stand alone and then mean `on` (`server`), or, with `no` in front
    /// (`noserver`), `off`.
    pub flags: &'static [&'static str],
}

impl Notation {
    /// Plain pairs with an implied first key.
    pub const fn implied(key: &'static str) -> Self {
        Self {
            implied_key: Some(key),
            flags: &[],
        }
    }
}

/// Parses `text`. The result is always an object.
pub fn parse(text: &str, notation: Notation) -> Result<Value, ConfigError> {
    let mut root = Map::new();
    let mut rest = text;
    let mut first = true;
    while !rest.is_empty() {
        rest = parse_pair(rest, notation, first, &mut root)?;
        first = false;
    }
    lists_from_numbers(Value::Object(root), "")
}

/// Parses one pair from the front of `text`, stores it, and returns what follows its comma.
fn parse_pair<'a>(
    text: &'a str,
    notation: Notation,
    first: bool,
    root: &mut Map<String, Value>,
) -> Result<&'a str, ConfigError> {
    let end = text.find(['=', ',']).unwrap_or(text.len());
    let (key, tail) = text.split_at(end);
    if let Some(value) = tail.strip_prefix('=') {
        let (value, rest) = split_value(value);
        let near = format!("{key}={value}");
        insert(root, key, value, &near)?;
        return Ok(rest);
    }
    // A word alone, up to a comma or the end.
    let rest = tail.strip_prefix(',').unwrap_or("");
    if let (true, Some(implied), false) = (first, notation.implied_key, key.is_empty()) {
        insert(root, implied, key.to_owned(), key)?;
        return Ok(rest);
    }
    if notation.flags.contains(&key) {
        insert(root, key, "on".to_owned(), key)?;
        return Ok(rest);
    }
    match key.strip_prefix("no") {
        Some(flag) if notation.flags.contains(&flag) => {
            insert(root, flag, "off".to_owned(), key)?;
            Ok(rest)
        }
        _ if key.is_empty() => {
            Err(ConfigError::other("expected 'key=value' between two commas").near(text))
        }
        _ => Err(ConfigError::other(format!("expected '=' after '{key}'")).near(key)),
    }
}

/// Splits a value, with `,,` resolved, from what follows its closing comma.
fn split_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(comma) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        let (piece, tail) = rest.split_at(comma);
        value.push_str(piece);
        match tail.strip_prefix(",,") {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, tail.strip_prefix(',').unwrap_or("")),
        }
    }
}

/// Stores `value` under the dotted `key`, making the objects in between.
fn insert(
    root: &mut Map<String, Value>,
    key: &str,
    value: String,
    near: &str,
) -> Result<(), ConfigError> {
    let components: Vec<&str> = key.split('.').collect();
    if components.len() > MAX_DEPTH {
        let text = format!("key is nested more than {MAX_DEPTH} levels deep");
        return Err(ConfigError::other(text).near(near));
    }
    for (depth, component) in components.iter().enumerate() {
        // A number can only be an index, and the option as a whole is no list.
        let good = is_name(component) || (depth > 0 && is_index(component));
        if !good {
            let text = format!(
                "invalid key '{key}': a key is made of letters, digits, '-' and '_' in parts \
                 joined by dots, and starts with a letter"
            );
            return Err(ConfigError::other(text).near(near));
        }
    }
    let inconsistent = |part: &str| {
        let text = format!("'{part}' is used both as a value and as a group of keys");
        Err(ConfigError::other(text).near(near))
    };
    let Some((leaf, parents)) = components.split_last() else {
        return Ok(());
    };
    let mut place = root;
    for parent in parents {
        let entry = place
            .entry((*parent).to_owned())
            .or_insert_with(|| Value::Object(Map::new()));
        match entry {
            Value::Object(map) => place = map,
            _ => return inconsistent(parent),
        }
    }
    if matches!(place.get(*leaf), Some(Value::Object(_))) {
        return inconsistent(key);
    }
    place.insert((*leaf).to_owned(), Value::String(value));
    Ok(())
}

/// Turns every object whose members are all numbers into a list.
fn lists_from_numbers(value: Value, path: &str) -> Result<Value, ConfigError> {
    let Value::Object(map) = value else {
        return Ok(value);
    };
    let indexes = map.keys().filter(|key| is_index(key)).count();
    if indexes > 0 && indexes < map.len() {
        let text = format!("'{path}.*' has both numbers and names as members");
        return Err(ConfigError::other(text));
    }
    let is_list = indexes > 0;
    let mut members = Vec::with_capacity(map.len());
    for (key, member) in map {
        let member = lists_from_numbers(member, &join(path, &key))?;
        members.push((key, member));
    }
    if !is_list {
        return Ok(Value::Object(members.into_iter().collect()));
    }
    let mut slots: Vec<Option<Value>> = vec![None; members.len()];
    for (key, member) in members {
        // An index beyond the number of members leaves a gap below, which is found next.
        let index = key.parse::<usize>().ok();
        if let Some(slot) = index.and_then(|index| slots.get_mut(index)) {
            *slot = Some(member);
        }
    }
    let mut list = Vec::with_capacity(slots.len());
    for (index, slot) in slots.into_iter().enumerate() {
        match slot {
            Some(member) => list.push(member),
            None => return Err(ConfigError::other(format!("'{path}.{index}' is missing"))),
        }
    }
    Ok(Value::Array(list))
}

fn is_name(component: &str) -> bool {
    let body = component.strip_prefix("__").unwrap_or(component);
    component.len() <= MAX_COMPONENT
        && body.starts_with(|c: char| c.is_ascii_alphabetic())
        && body
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

fn is_index(component: &str) -> bool {
    !component.is_empty()
        && component.len() <= 9
        && component.bytes().all(|byte| byte.is_ascii_digit())
}

/// Joins a key to the dotted path in front of it.
pub(crate) fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// Writes a value in this notation; the inverse of [`parse`] for objects whose leaves are text.
///
/// Numbers are written as such, booleans as `on` and `off`. What the notation cannot say (null,
/// an empty object or list) is left out.
pub fn format(value: &Value) -> String {
    let mut pairs = Vec::new();
    collect_pairs(value, "", &mut pairs);
    pairs.join(",")
}

fn collect_pairs(value: &Value, path: &str, pairs: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, member) in map {
                collect_pairs(member, &join(path, key), pairs);
            }
        }
        Value::Array(list) => {
            for (index, member) in list.iter().enumerate() {
                collect_pairs(member, &join(path, &index.to_string()), pairs);
            }
        }
        Value::String(text) => pairs.push(format!("{path}={}", text.replace(',', ",,"))),
        Value::Bool(on) => pairs.push(format!("{path}={}", if *on { "on" } else { "off" })),
        Value::Number(number) => pairs.push(format!("{path}={number}")),
        Value::Null => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn ok(text: &str) -> Value {
        parse(text, Notation::implied("driver")).unwrap()
    }

    fn err(text: &str) -> String {
        parse(text, Notation::implied("driver"))
            .unwrap_err()
            .to_string()
    }

    /// Would catch a wrong reading of the notation's rules, each as the real program reads it.
    #[test]
    fn reads_the_notation() {
        assert_eq!(ok(""), json!({}));
        assert_eq!(
            ok("file,node-name=a"),
            json!({"driver": "file", "node-name": "a"})
        );
        assert_eq!(ok("a=1,"), json!({"a": "1"}));
        assert_eq!(ok("a=1,a=2"), json!({"a": "2"}));
        assert_eq!(ok("a=x,,y,b="), json!({"a": "x,y", "b": ""}));
        assert_eq!(ok("a=x=y"), json!({"a": "x=y"}));
        assert_eq!(ok("a=,,,b=1"), json!({"a": ",", "b": "1"}));
        assert_eq!(
            ok("f.d=x,f.c.d=on"),
            json!({"f": {"d": "x", "c": {"d": "on"}}})
        );
        assert_eq!(ok("l.1=b,l.0=a"), json!({"l": ["a", "b"]}));
        assert_eq!(
            ok("l.0.x=a,l.1.x=b"),
            json!({"l": [{"x": "a"}, {"x": "b"}]})
        );
        assert_eq!(ok("__org.x=1"), json!({"__org": {"x": "1"}}));
    }

    /// Would catch a malformed option that is silently taken for something else.
    #[test]
    fn refuses_what_is_malformed() {
        assert!(err("file,read-only").contains("expected '=' after 'read-only'"));
        assert!(err("file,=a").contains("invalid key ''"));
        assert!(err(",a=b").contains("between two commas"));
        assert!(err("x..y=1").contains("invalid key 'x..y'"));
        assert!(err("1x=1").contains("invalid key"));
        assert!(err("0=1").contains("invalid key"));
        assert!(err("a.b=1,a=2").contains("both as a value and as a group"));
        assert!(err("a=1,a.b=2").contains("both as a value and as a group"));
        assert!(err("a.0=1,a.b=2").contains("both numbers and names"));
        assert!(err("a.1=1,a.5=2").contains("'a.0' is missing"));
        assert!(err(&format!("{}x=1", "a.".repeat(60))).contains("levels deep"));
    }

    /// Would catch the loss of QEMU's old way to switch something on or off by a bare word.
    #[test]
    fn bare_flags_where_the_option_has_them() {
        let notation = Notation {
            implied_key: Some("backend"),
            flags: &["server", "wait"],
        };
        let value = parse("socket,server,nowait", notation).unwrap();
        assert_eq!(
            value,
            json!({"backend": "socket", "server": "on", "wait": "off"})
        );
    }

    fn text_tree() -> impl Strategy<Value = Value> {
        let leaf = any::<String>().prop_map(Value::String);
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 1..4).prop_map(Value::Array),
                prop::collection::btree_map("[a-z][a-z0-9_-]{0,8}", inner, 1..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Would catch any text, nesting or list that is lost or changed on the way.
        #[test]
        fn round_trip(members in prop::collection::btree_map("[a-z][a-z0-9_-]{0,8}", text_tree(), 0..5)) {
            let value = Value::Object(members.into_iter().collect());
            prop_assert_eq!(parse(&format(&value), Notation::default()).unwrap(), value);
        }

        /// Would catch a panic or an endless loop on any input.
        #[test]
        fn never_panics(text in "[a-c0-2.,=_ é-]{0,64}|.*") {
            let _ = parse(&text, Notation::implied("driver"));
            let _ = parse(&text, Notation { implied_key: None, flags: &["a", "b"] });
        }
    }
}
