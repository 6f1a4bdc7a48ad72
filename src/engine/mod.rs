//! The engine: everything that can change, and the operations that change it.

pub mod backend;
pub mod ending;
pub mod exports;
mod guests;
pub mod neighbours;
pub mod parts;
pub mod state;
pub mod sync_errors;

use crate::error::{Error, Result};
use crate::reactor::Reactor;

pub use exports::Exports;

/// Runs `work` with a reactor on a thread that has none of its own.
fn on_this_thread<T>(work: impl FnOnce(&Reactor) -> Result<T>) -> Result<T> {
    let had_one = Reactor::current().is_some();
    let reactor =
        Reactor::for_this_thread().map_err(|error| Error::Invalid(format!("starting: {error}")))?;
    let result = work(&reactor);
    if !had_one {
        Reactor::leave_thread();
    }
    result
}
