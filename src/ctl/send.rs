//! Commands whose answers say nothing.

use super::Failure;
use super::client::Client;
use serde_json::Value;
use std::io::Write;

/// A command whose answer says nothing beyond that it was done.
pub fn send(
    client: &mut Client,
    command: &str,
    arguments: Value,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let result = client.execute(command, arguments)?;
    if json {
        writeln!(out, "{result}")?;
    }
    Ok(())
}
