//! What went wrong in an option, said so that the user can put it right.
//!
//! One error value serves two readers: a person at a shell, who gets the option, the word it is
//! about and what was expected ([`Display`](std::fmt::Display)), and a QMP client, who gets the
//! text QEMU uses for the same mistake ([`ConfigError::qmp_desc`]).

use std::fmt;

/// Longest piece of the user's own text that an error repeats.
const NEAR_LIMIT: usize = 72;

/// An option, or the arguments of a QMP command, that cannot be accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    option: Option<Box<str>>,
    near: Option<Box<str>>,
    /// QEMU's text, where it has one of its own for this mistake.
    qmp: Option<Box<str>>,
    kind: ErrorKind,
}

/// The mistake itself, without where it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ErrorKind {
    /// A key that the option does not have.
    UnknownKey {
        /// The key with its dots, as it was written.
        key: String,
        /// Every key that is possible in this place.
        expected: Vec<&'static str>,
    },
    /// A key that must be given and was not.
    MissingKey {
        /// The key with its dots.
        key: String,
    },
    /// A value of the wrong kind, such as text where an object must be.
    WrongType {
        /// The key with its dots.
        key: String,
        /// The kind of value, in QEMU's words: `boolean`, `integer`, `string`, `object`.
        expected: &'static str,
    },
    /// A value of the right kind that is none of those allowed.
    BadValue {
        /// The key with its dots.
        key: String,
        /// The value that was given.
        value: String,
        /// The values that are possible, or their range, in words.
        expected: String,
    },
    /// Anything else, said in full.
    Other(String),
}

impl ConfigError {
    /// An error with no place yet.
    pub fn new(kind: ErrorKind) -> Self {
        Self {
            option: None,
            near: None,
            qmp: None,
            kind,
        }
    }

    /// An error told in free words.
    pub fn other(text: impl Into<String>) -> Self {
        Self::new(ErrorKind::Other(text.into()))
    }

    /// A value that is none of those allowed; `expected` says which are.
    pub fn bad_value(key: &str, value: &str, expected: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadValue {
            key: key.to_owned(),
            value: shorten(value),
            expected: expected.into(),
        })
        .near(format!("{key}={value}"))
    }

    /// Adds the word of the user's text that the error is about.
    #[must_use]
    pub fn near(mut self, word: impl AsRef<str>) -> Self {
        self.near = Some(shorten(word.as_ref()).into());
        self
    }

    /// Gives QMP clients this text, which QEMU has for the mistake.
    #[must_use]
    pub fn said(mut self, text: impl Into<String>) -> Self {
        self.qmp = Some(text.into().into());
        self
    }

    /// Names the option (`--export`) in which the error is; `text` is the option's value and is
    /// repeated when no closer word is known.
    #[must_use]
    pub fn in_option(mut self, option: &str, text: &str) -> Self {
        self.option = Some(option.into());
        if self.near.is_none() {
            self.near = Some(shorten(text).into());
        }
        self
    }

    /// The mistake itself.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// The text that a QMP client gets, in the words QEMU uses for the same mistake.
    pub fn qmp_desc(&self) -> String {
        if let Some(text) = &self.qmp {
            return text.to_string();
        }
        match &self.kind {
            ErrorKind::UnknownKey { key, .. } => format!("Parameter '{key}' is unexpected"),
            ErrorKind::MissingKey { key } => format!("Parameter '{key}' is missing"),
            ErrorKind::WrongType { key, expected } => {
                format!("Invalid parameter type for '{key}', expected: {expected}")
            }
            ErrorKind::BadValue { key, value, .. } => {
                // QEMU names no path here.
                let key = last_component(key);
                format!("Parameter '{key}' does not accept value '{value}'")
            }
            ErrorKind::Other(text) => text.clone(),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(option) = &self.option {
            write!(f, "{option}: ")?;
        }
        match &self.kind {
            ErrorKind::UnknownKey { key, .. } => write!(f, "unknown key '{key}'")?,
            ErrorKind::MissingKey { key } => write!(f, "key '{key}' is missing")?,
            ErrorKind::WrongType { key, expected } => {
                write!(f, "key '{key}' expects {}", spoken_type(expected))?;
            }
            ErrorKind::BadValue { key, value, .. } => {
                write!(f, "key '{key}' does not accept '{value}'")?;
            }
            ErrorKind::Other(text) => f.write_str(text)?,
        }
        if let Some(near) = self.near.as_deref().filter(|near| !near.is_empty()) {
            write!(f, " (near '{near}')")?;
        }
        match &self.kind {
            ErrorKind::UnknownKey { key, expected } => {
                write!(f, "; expected one of: {}", expected.join(", "))?;
                if let Some(guess) = closest(last_component(key), expected) {
                    write!(f, " (did you mean '{guess}'?)")?;
                }
                Ok(())
            }
            ErrorKind::BadValue {
                expected, value, ..
            } => {
                write!(f, "; expected {expected}")?;
                let words: Vec<&str> = expected
                    .strip_prefix("one of: ")
                    .map(|list| list.split(", ").collect())
                    .unwrap_or_default();
                if let Some(guess) = closest(value, &words) {
                    write!(f, " (did you mean '{guess}'?)")?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl std::error::Error for ConfigError {}

/// QEMU's names for kinds of values, with the article a sentence needs.
fn spoken_type(name: &str) -> &str {
    match name {
        "boolean" => "'on' or 'off'",
        "integer" => "a number",
        "string" => "text",
        "object" => "keys of its own (key.member=...)",
        other => other,
    }
}

fn last_component(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// The candidate from which `word` is a typing mistake away, if there is one.
pub fn closest<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    candidates
        .iter()
        .map(|candidate| (strsim::jaro_winkler(word, candidate), *candidate))
        .filter(|(score, candidate)| *score > 0.84 && *candidate != word)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// Cuts text that would drown the message, on a character boundary.
fn shorten(text: &str) -> String {
    if text.chars().count() <= NEAR_LIMIT {
        return text.to_owned();
    }
    let mut cut: String = text.chars().take(NEAR_LIMIT).collect();
    cut.push_str("...");
    cut
}
