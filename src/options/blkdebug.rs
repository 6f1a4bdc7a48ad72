//! The options of `blkdebug`, and the file that may hold its rules.
//!
//! The file has sections of assignments, as QEMU's has:
//!
//! ```text
//! # reading sector 100 fails
//! [inject-error]
//! event = "read_aio"
//! sector = "100"
//! ```
//!
//! Its rules come before those of the options.

use serde_json::{Map, Value, json};

use super::blockdev::{BlkdebugOptions, BlockRef};
use super::error::ConfigError;
use super::fields::{Dialect, Fields};
use super::keys;
use crate::storage::blkdebug::Settings;
use crate::storage::blkdebug::rules::{Event, InjectError, IoType, Rules, SetState};

/// The largest block that can be asked for, in bytes.
const MAX_ALIGN: u64 = 1 << 20;
/// Error numbers that the kernel has are not above this.
const MAX_ERRNO: u64 = 4095;

/// The options of a node that fails by rules, over `image`.
pub(super) fn parse(fields: &Fields<'_>, image: BlockRef) -> Result<BlkdebugOptions, ConfigError> {
    for key in ["take-child-perms", "unshare-child-perms"] {
        if fields.list(key)?.is_some_and(|list| !list.is_empty()) {
            return Err(ConfigError::other(format!(
                "'{}' is not supported: other programs would not see such permissions",
                fields.path(key)
            )));
        }
    }
    let align = fields.opt_u64("align")?.filter(|align| *align > 0);
    if let Some(align) = align
        && !(align.is_power_of_two() && align <= MAX_ALIGN)
    {
        let expected = format!("a power of two up to {MAX_ALIGN}");
        return Err(constraint(fields, "align", align, &expected));
    }
    let block = align.unwrap_or(1);
    let sizes = [
        "max-transfer",
        "opt-write-zero",
        "max-write-zero",
        "opt-discard",
        "max-discard",
    ];
    for key in sizes {
        if let Some(size) = fields.opt_ranged(key, 0, i32::MAX as u64)?
            && !size.is_multiple_of(block)
        {
            let expected = format!("a multiple of {block}");
            return Err(constraint(fields, key, size, &expected));
        }
    }
    Ok(BlkdebugOptions {
        image,
        config: fields.opt_file("config")?,
        settings: Settings {
            rules: parse_rules(fields)?,
            align,
            max_transfer: fields.opt_u64("max-transfer")?.filter(|most| *most > 0),
        },
    })
}

fn constraint(fields: &Fields<'_>, key: &str, value: u64, expected: &str) -> ConfigError {
    let key = fields.path(key);
    ConfigError::other(format!(
        "Cannot meet constraints with {key} {value} (expected {expected})"
    ))
}

fn parse_rules(fields: &Fields<'_>) -> Result<Rules, ConfigError> {
    let inject = fields.objects("inject-error")?;
    let set_state = fields.objects("set-state")?;
    Ok(Rules {
        inject: inject.iter().map(parse_inject).collect::<Result<_, _>>()?,
        set_state: set_state
            .iter()
            .map(parse_set_state)
            .collect::<Result<_, _>>()?,
    })
}

fn parse_inject(fields: &Fields<'_>) -> Result<InjectError, ConfigError> {
    fields.only_keys(&[keys::INJECT_ERROR])?;
    // As everywhere in QEMU's rules: -1 is any sector.
    let sector = fields
        .opt_i64("sector", -1..=i64::MAX / 512)?
        .and_then(|sector| u64::try_from(sector).ok());
    let errno = fields.opt_ranged("errno", 0, MAX_ERRNO)?;
    Ok(InjectError {
        event: event(fields)?,
        state: state(fields, "state")?.filter(|state| *state > 0),
        iotype: fields.opt_word("iotype", IoType::ALL)?,
        errno: errno
            .and_then(|errno| u16::try_from(errno).ok())
            .unwrap_or(libc::EIO as u16),
        sector,
        once: fields.bool_or("once", false)?,
        immediately: fields.bool_or("immediately", false)?,
    })
}

fn parse_set_state(fields: &Fields<'_>) -> Result<SetState, ConfigError> {
    fields.only_keys(&[keys::SET_STATE])?;
    Ok(SetState {
        event: event(fields)?,
        state: state(fields, "state")?.filter(|state| *state > 0),
        new_state: state(fields, "new_state")?.ok_or_else(|| fields.missing("new_state"))?,
    })
}

fn event(fields: &Fields<'_>) -> Result<Event, ConfigError> {
    let event = fields.opt_word("event", Event::ALL)?;
    event.ok_or_else(|| fields.missing("event"))
}

fn state(fields: &Fields<'_>, key: &str) -> Result<Option<u32>, ConfigError> {
    let state = fields.opt_ranged(key, 0, u32::MAX.into())?;
    Ok(state.and_then(|state| u32::try_from(state).ok()))
}

impl BlkdebugOptions {
    /// Its own options as members, but for the node that it is over.
    pub(super) fn members(&self) -> Map<String, Value> {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        if let Some(path) = &self.config {
            put("config", json!(path.display().to_string()));
        }
        if let Some(align) = self.settings.align {
            put("align", json!(align));
        }
        if let Some(most) = self.settings.max_transfer {
            put("max-transfer", json!(most));
        }
        let rules = &self.settings.rules;
        let inject: Value = rules.inject.iter().map(inject_members).collect();
        put("inject-error", inject);
        let set_state = rules.set_state.iter().map(|rule| {
            let mut value = json!({"event": rule.event.name(), "new_state": rule.new_state});
            if let (Some(state), Some(map)) = (rule.state, value.as_object_mut()) {
                map.insert("state".into(), json!(state));
            }
            value
        });
        put("set-state", set_state.collect());
        map
    }
}

fn inject_members(rule: &InjectError) -> Value {
    let mut map = Map::new();
    let mut put = |key: &str, value: Option<Value>| {
        map.extend(value.map(|value| (key.to_owned(), value)));
    };
    put("event", Some(json!(rule.event.name())));
    put("state", rule.state.map(Value::from));
    put("iotype", rule.iotype.map(|kind| json!(kind.name())));
    put("errno", Some(json!(rule.errno)));
    put("sector", rule.sector.map(Value::from));
    put("once", Some(json!(rule.once)));
    put("immediately", Some(json!(rule.immediately)));
    Value::Object(map)
}

/// The rules in the text of a file.
///
/// # Errors
/// What is no rule, and in which line.
pub fn parse_config(text: &str) -> Result<Rules, ConfigError> {
    let mut sections: Vec<(usize, &str, Map<String, Value>)> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let (number, line) = (number + 1, line.trim());
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(group) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            // A section may have a name of its own, which tells nothing.
            let group = group.split_whitespace().next().unwrap_or_default();
            if !["inject-error", "set-state"].contains(&group) {
                return Err(at(number, &format!("There is no option group '{group}'")));
            }
            sections.push((number, group, Map::new()));
            continue;
        }
        let Some((_, _, section)) = sections.last_mut() else {
            return Err(at(number, "no group defined"));
        };
        let (key, value) = assignment(line)
            .ok_or_else(|| at(number, &format!("'{line}' (expected KEY = \"VALUE\")")))?;
        section.insert(key.to_owned(), value.into());
    }
    let mut rules = Rules::default();
    for (number, group, section) in sections {
        let section = Value::Object(section);
        let fields = Fields::new(&section, "", Dialect::Keyval)?;
        let added = match group {
            "inject-error" => parse_inject(&fields).map(|rule| rules.inject.push(rule)),
            _ => parse_set_state(&fields).map(|rule| rules.set_state.push(rule)),
        };
        added.map_err(|error| at(number, &format!("[{group}]: {error}")))?;
    }
    Ok(rules)
}

/// `key = "value"`, and a comment perhaps.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let (value, rest) = value.trim().strip_prefix('"')?.split_once('"')?;
    let rest = rest.trim();
    let key = key.trim();
    let is_whole = !key.is_empty() && (rest.is_empty() || rest.starts_with('#'));
    is_whole.then_some((key, value))
}

fn at(line: usize, text: &str) -> ConfigError {
    ConfigError::other(format!("line {line}: {text}"))
}

#[cfg(test)]
mod tests {
    //! What would be caught: a rule that is read as another one, or passed over; a mistake that is
    //! taken for a rule, or not told with its place.

    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::options::BlockdevOptions;
    use crate::options::blockdev::Driver;
    use serde_json::json;

    const RULE: InjectError = InjectError {
        event: Event::ReadAio,
        state: None,
        iotype: None,
        errno: 5,
        sector: None,
        once: false,
        immediately: false,
    };

    fn node(more: &Value) -> Result<BlkdebugOptions, String> {
        let mut node = json!({"driver": "blkdebug", "node-name": "n", "image": "below"});
        let more = more.as_object().unwrap().clone();
        node.as_object_mut().unwrap().extend(more);
        let options = BlockdevOptions::from_value(&node, Dialect::Json);
        match options.map_err(|error| error.to_string())?.driver {
            Driver::Blkdebug(options) => Ok(*options),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_says_what_options_say() {
        let text = "# a comment\n[inject-error \"one\"]\nevent = \"read_aio\" # more\nstate=\"2\"\n\
                    iotype = \"read\"\nerrno = \"28\"\n  sector = \"7\"\nonce = \"on\"\n\
                    immediately = \"on\"\n\n[set-state]\nevent = \"l2_load\"\nnew_state = \"3\"\n\
                    [inject-error]\nevent = \"read_aio\"\nsector = \"-1\"\nstate = \"0\"\n";
        let options = node(&json!({
            "inject-error": [
                {"event": "read_aio", "state": 2, "iotype": "read", "errno": 28, "sector": 7,
                 "once": true, "immediately": true},
                {"event": "read_aio", "sector": -1, "state": 0},
            ],
            "set-state": [{"event": "l2_load", "new_state": 3}],
        }))
        .unwrap();
        let rules = parse_config(text).unwrap();
        assert_eq!(rules, options.settings.rules);
        let first = InjectError {
            state: Some(2),
            iotype: Some(IoType::Read),
            errno: 28,
            sector: Some(7),
            once: true,
            immediately: true,
            ..RULE
        };
        assert_eq!(rules.inject, [first, RULE]);
        let set = SetState {
            event: Event::L2Load,
            state: None,
            new_state: 3,
        };
        assert_eq!(rules.set_state, [set]);
        assert_eq!(parse_config("").unwrap(), Rules::default());
    }

    #[test]
    fn mistakes_in_a_file_are_told_with_their_line() {
        for (text, expected) in [
            ("event = \"none\"", "line 1: no group defined"),
            ("\n[foo]", "line 2: There is no option group 'foo'"),
            ("[set-state]\nevent = none", "line 2: 'event = none'"),
            ("[set-state]\nevent = \"none\" x", "line 2"),
            (
                "[inject-error]\nstate = \"1\"",
                "line 1: [inject-error]: key 'event' is missing",
            ),
            (
                "[set-state]\nevent = \"none\"",
                "key 'new_state' is missing",
            ),
            (
                "[inject-error]\nevent = \"foo\"",
                "'event' does not accept 'foo'",
            ),
            (
                "[inject-error]\nevent = \"none\"\nnew_state = \"1\"",
                "unknown key 'new_state'",
            ),
            (
                "[inject-error]\nevent = \"none\"\nonce = \"maybe\"",
                "'once' does not accept",
            ),
            (
                "[inject-error]\nevent = \"none\"\nerrno = \"4096\"",
                "from 0 to 4095",
            ),
            (
                "[inject-error]\nevent = \"none\"\nsector = \"-2\"",
                "from -1 to",
            ),
        ] {
            let error = parse_config(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn options_that_are_not_met_are_refused() {
        for (more, expected) in [
            (json!({"align": 3}), "Cannot meet constraints with align 3"),
            (json!({"align": 2 << 20}), "a power of two up to 1048576"),
            (
                json!({"align": 4096, "max-transfer": 1000}),
                "max-transfer 1000 (expected a multiple of 4096)",
            ),
            (
                json!({"align": 512, "opt-write-zero": 100}),
                "opt-write-zero 100",
            ),
            (
                json!({"take-child-perms": ["write"]}),
                "'take-child-perms' is not supported",
            ),
            (
                json!({"unshare-child-perms": ["resize"]}),
                "'unshare-child-perms' is not supported",
            ),
            (json!({"inject-error": {"event": "none"}}), "inject-error"),
            (
                json!({"inject-error": [{"event": "none"}, {"state": 1}]}),
                "'inject-error.1.event' is missing",
            ),
            (
                json!({"inject-error": [{"event": "none", "iotype": "x"}]}),
                "'inject-error.0.iotype'",
            ),
            (
                json!({"inject-error": [{"event": "none", "once": "on"}]}),
                "inject-error.0.once",
            ),
            (json!({"set-state": [7]}), "set-state.0"),
            (json!({"config": ""}), "config"),
            (json!({"image": null}), "image"),
        ] {
            let error = node(&more).unwrap_err();
            assert!(error.contains(expected), "{more}: {error}");
        }
        let fine = node(&json!({"align": 0, "max-discard": 100, "take-child-perms": []})).unwrap();
        assert_eq!(fine.settings, Settings::default());
    }
}
