//! Structured options as text, in either notation.

use serde_json::Value;

use super::error::ConfigError;
use super::fields::Dialect;
use super::keyval::{Notation, parse};

/// The value of a structured option, in either notation.
///
/// # Errors
/// What is wrong with it, and near which word.
pub fn read_text(text: &str, notation: Notation) -> Result<(Value, Dialect), ConfigError> {
    if !text.starts_with('{') {
        return Ok((parse(text, notation)?, Dialect::Keyval));
    }
    match serde_json::from_str(text) {
        Ok(value) => Ok((value, Dialect::Json)),
        Err(error) => {
            let rest: String = text
                .chars()
                .skip(error.column().saturating_sub(8))
                .collect();
            Err(ConfigError::other(format!("invalid JSON: {error}")).near(rest))
        }
    }
}
