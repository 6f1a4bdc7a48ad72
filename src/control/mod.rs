//! The control socket: QMP, and what of HMP it carries.
//!
//! A [`Server`] accepts clients and gives each a thread. A client's bytes become JSON values in
//! [`wire`], a [`session`] negotiates and checks them, [`commands`] holds the table of what can be
//! asked for of the [engine](crate::engine), whose views become answers here. Events go out through an
//! [`EventHub`] to all clients. `docs/qmp.md` is the manual.
//!
//! Wherever it can be observed, names, texts and order are those of qemu-storage-daemon.

mod answers;
pub mod args;
mod blockdev;
mod command;
pub mod commands;
mod commit;
mod error;
mod event_rate;
mod events;
mod exports;
mod graph;
mod hmp;
mod nodes;
mod objects;
mod places;
mod schema;
pub mod server;
pub mod session;
mod snapshot;
mod stats;
mod stream;
pub mod wire;

pub use command::{Answer, Control};
pub use error::{CommandError, ErrorClass};
pub use events::EventHub;
pub use places::Limits;
pub use server::{Endpoint, Server};
