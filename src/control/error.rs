//! Errors as QMP clients get to see them.

use serde_json::{Value, json};

use crate::job::Refused;

/// What kind of error it is, where clients are to tell kinds apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Any error; the text says which.
    GenericError,
    /// No such command, or not now.
    CommandNotFound,
    /// No such job.
    DeviceNotActive,
    /// No such device or object.
    DeviceNotFound,
}

impl ErrorClass {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::DeviceNotFound => "DeviceNotFound",
        }
    }
}

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct CommandError {
    /// The kind of error.
    pub class: ErrorClass,
    /// The text for people.
    pub desc: String,
}

impl CommandError {
    /// An error that is told apart by its text alone.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::GenericError,
            desc: desc.into(),
        }
    }

    /// The error for a command that is not there.
    pub fn not_found(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::CommandNotFound,
            desc: desc.into(),
        }
    }

    /// The error as the value of `error` in an answer.
    pub fn to_value(&self) -> Value {
        json!({"class": self.class.name(), "desc": self.desc})
    }
}

impl From<Refused> for CommandError {
    fn from(refused: Refused) -> Self {
        Self::generic(refused.0)
    }
}
