//! The records as text.
//!
//! ```json
//! {"stratablk-state": 4, "crc32": "1c291ca3", "state": {"links": [], "jobs": [], …}}
//! ```
//!
//! The number is the format's version. A program reads its own version and all before it, each
//! made into the next by an [`Upgrade`]; a newer one is refused, since it records what this program
//! would drop. The checksum is of the state's text without white space.

use std::path::Path;

use serde_json::{Value, json};

use super::record::State;
use super::{StateError, upgrade};

/// The version that is written.
pub(super) const VERSION: u64 = UPGRADES.len() as u64 + 1;

/// Makes a state of one version into one of the next. An error says what was not understood.
pub(super) type Upgrade = fn(Value) -> Result<Value, String>;

/// From version 1 to 2, from 2 to 3 and so on.
const UPGRADES: &[Upgrade] = &[upgrade::to_2, upgrade::to_3, upgrade::to_4];

/// Where the version stands.
const KEY: &str = "stratablk-state";

/// The text of a state.
pub(super) fn write(state: &State) -> Vec<u8> {
    // Records are made of what JSON has, with strings for keys: they can always be written.
    let state = serde_json::to_value(state).unwrap_or_default();
    let value = json!({KEY: VERSION, "crc32": checksum(&state), "state": state});
    let mut text = serde_json::to_vec_pretty(&value).unwrap_or_default();
    text.push(b'\n');
    text
}

/// The state that a text tells of; `path` is for messages.
pub(super) fn parse(text: &[u8], path: &Path) -> Result<State, StateError> {
    let state = current(text, path, UPGRADES)?;
    serde_json::from_value(state).map_err(|error| damaged(path, error.to_string()))
}

/// The state as the newest version has it that `upgrades` lead to.
pub(super) fn current(text: &[u8], path: &Path, upgrades: &[Upgrade]) -> Result<Value, StateError> {
    let known = upgrades.len() as u64 + 1;
    let value: Value =
        serde_json::from_slice(text).map_err(|error| damaged(path, error.to_string()))?;
    let found = value.get(KEY).and_then(Value::as_u64);
    let Some(found) = found.filter(|&found| found > 0) else {
        return Err(damaged(path, format!("it has no version ('{KEY}')")));
    };
    // Before anything else is looked at, which may be other in newer versions.
    if found > known {
        return Err(StateError::Newer {
            path: path.to_owned(),
            found,
            known,
        });
    }
    let Some(mut state) = value.get("state").cloned() else {
        return Err(damaged(path, "it has no 'state'".to_owned()));
    };
    let sum = checksum(&state);
    if value.get("crc32").and_then(Value::as_str) != Some(&sum) {
        return Err(damaged(path, format!("its checksum is not {sum}")));
    }
    let first = usize::try_from(found - 1).unwrap_or(usize::MAX);
    for upgrade in upgrades.get(first..).unwrap_or_default() {
        state = upgrade(state).map_err(|what| damaged(path, what))?;
    }
    Ok(state)
}

fn damaged(path: &Path, what: String) -> StateError {
    StateError::Damaged {
        path: path.to_owned(),
        what,
    }
}

pub(super) fn checksum(state: &Value) -> String {
    let text = serde_json::to_vec(state).unwrap_or_default();
    format!("{:08x}", crc32fast::hash(&text))
}
