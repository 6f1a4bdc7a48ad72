//! One client's conversation: negotiation, the form of requests, answers.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::command::{Answer, Control, NEGOTIATE, version};
use super::error::CommandError;

/// What comes of a request.
#[derive(Debug)]
pub struct Reply {
    /// The answer.
    pub value: Value,
    /// The daemon is to end once the answer is out.
    pub quit: bool,
}

/// The state of one client's conversation.
pub struct Session {
    control: Arc<Control>,
    negotiated: bool,
}

/// A request whose form is right.
struct Request {
    command: String,
    arguments: Map<String, Value>,
}

impl Session {
    /// A client that has just connected.
    pub fn new(control: Arc<Control>) -> Self {
        Self {
            control,
            negotiated: false,
        }
    }

    /// What a client is met with.
    pub fn greeting() -> Value {
        json!({"QMP": {"version": version(), "capabilities": []}})
    }

    /// Whether the client takes events and all commands.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// Answers a value from the client, or what is wrong with one.
    pub fn handle(&mut self, item: Result<Value, String>) -> Reply {
        let mut id = None;
        let result = item.map_err(CommandError::generic).and_then(|value| {
            id = value.get("id").cloned();
            self.execute(value)
        });
        let (mut value, quit) = match result {
            Ok(answer) => (json!({"return": answer.value}), answer.quit),
            Err(error) => (json!({"error": error.to_value()}), false),
        };
        if let (Some(id), Some(members)) = (id, value.as_object_mut()) {
            members.insert("id".to_owned(), id);
        }
        Reply { value, quit }
    }

    fn execute(&mut self, value: Value) -> Result<Answer, CommandError> {
        let Request { command, arguments } = read_request(value)?;
        if self.negotiated {
            if command == NEGOTIATE {
                return Err(CommandError::not_found(
                    "Capabilities negotiation is already complete, command ignored",
                ));
            }
            return self.control.execute(&command, arguments);
        }
        if command != NEGOTIATE {
            return Err(CommandError::not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            ));
        }
        let answer = self.control.execute(&command, arguments)?;
        self.negotiated = true;
        Ok(answer)
    }
}

fn read_request(value: Value) -> Result<Request, CommandError> {
    let Value::Object(members) = value else {
        return Err(CommandError::generic("QMP input must be a JSON object"));
    };
    let mut command = None;
    let mut arguments = Map::new();
    for (name, value) in members {
        match (name.as_str(), value) {
            ("execute", Value::String(name)) => command = Some(name),
            ("execute", _) => {
                return Err(CommandError::generic(
                    "QMP input member 'execute' must be a string",
                ));
            }
            ("arguments", Value::Object(members)) => arguments = members,
            ("arguments", _) => {
                return Err(CommandError::generic(
                    "QMP input member 'arguments' must be an object",
                ));
            }
            ("id", _) => {}
            (name, _) => {
                return Err(CommandError::generic(format!(
                    "QMP input member '{name}' is unexpected"
                )));
            }
        }
    }
    let command =
        command.ok_or_else(|| CommandError::generic("QMP input lacks member 'execute'"))?;
    Ok(Request { command, arguments })
}
