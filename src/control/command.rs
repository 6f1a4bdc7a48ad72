//! What a command is, and what commands act on. The table of them is in `commands`.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::args::{Arg, Args};
use super::error::CommandError;
use crate::engine::Engine;
use crate::job::Manager;

/// The command that ends the negotiation.
pub(super) const NEGOTIATE: &str = "qmp_capabilities";

/// What a command gives back.
#[derive(Debug, PartialEq)]
pub struct Answer {
    /// For the client.
    pub value: Value,
    /// The daemon is to end once the answer is out.
    pub quit: bool,
}

impl From<Value> for Answer {
    fn from(value: Value) -> Self {
        Self { value, quit: false }
    }
}

/// What a command gives back if it works out.
pub(super) type Done = Result<Answer, CommandError>;

/// A command.
pub(super) struct Command {
    pub name: &'static str,
    pub args: &'static [Arg],
    /// What `query-qmp-schema` says about what it gives back.
    pub returns: Returns,
    pub run: fn(&Control, &Args) -> Done,
}

/// What a command gives back, roughly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Returns {
    Nothing,
    Text,
    Any,
    /// A list of jobs, told in full.
    BlockJobs,
    /// This type of `answers`; that of a list in brackets.
    Of(&'static str),
}

/// A line of the table of commands.
pub(super) const fn command(
    name: &'static str,
    args: &'static [Arg],
    returns: Returns,
    run: fn(&Control, &Args) -> Done,
) -> Command {
    Command {
        name,
        args,
        returns,
        run,
    }
}

/// What commands act on; shared by all clients.
pub struct Control {
    pub(super) engine: Arc<Engine>,
    /// All that can be asked for.
    pub(super) commands: &'static [Command],
}

impl Control {
    /// `commands` that act on `engine`.
    pub(super) fn with(engine: Arc<Engine>, commands: &'static [Command]) -> Self {
        Self { engine, commands }
    }

    /// The jobs.
    pub fn jobs(&self) -> &Arc<Manager> {
        &self.engine.jobs
    }

    /// Ends the daemon.
    pub fn quit(&self) {
        (self.engine.quit)();
    }

    /// Carries out a command, as a negotiated client would have it done.
    pub fn execute(&self, name: &str, arguments: Map<String, Value>) -> Done {
        let command = self.commands.iter().find(|command| command.name == name);
        let command = command.ok_or_else(|| {
            CommandError::not_found(format!("The command {name} has not been found"))
        })?;
        (command.run)(self, &Args::check(command.args, arguments)?)
    }
}

/// Our version, in the form that clients of QEMU know.
pub(super) fn version() -> Value {
    let number = |text: &str| text.parse::<u32>().unwrap_or_default();
    json!({
        "qemu": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("stratablk-", env!("CARGO_PKG_VERSION")),
    })
}
